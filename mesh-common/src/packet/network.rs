//! The network header: IPv4, or IPv6 and the extension headers behind it.

use super::{Bytes, Fragment};
use crate::{Address, DropReason};

/// The network header, whichever family.
pub(super) struct Network {
    pub(super) source: Address,
    pub(super) destination: Address,
    pub(super) proto: u8,
    pub(super) fragment: Fragment,
    pub(super) fragment_id: u32,
}

/// Shortest distance of a later fragment from the first byte, in units of eight: TCP's fixed header
/// and a little. Nearer ones exist only to overwrite what a filter has read (RFC 3128).
const MIN_FRAGMENT_OFFSET: u32 = 3;

/// The header, and where the next one starts.
#[inline(always)]
pub(super) fn v4<B: Bytes>(bytes: &B) -> Result<(Network, usize), DropReason> {
    let header = bytes.words::<0, 5>().ok_or(DropReason::Truncated)?;
    let length = ((u32::from_be(header[0]) >> 24) & 0xf) as usize * 4;
    if length < 20 {
        return Err(DropReason::MalformedHeader);
    }
    let second = u32::from_be(header[1]);
    let offset = second & 0x1fff;
    if offset != 0 && offset < MIN_FRAGMENT_OFFSET {
        return Err(DropReason::TinyFragment);
    }
    let network = Network {
        source: Address::from_v4_word(header[3]),
        destination: Address::from_v4_word(header[4]),
        proto: (u32::from_be(header[2]) >> 16) as u8,
        fragment: fragment(offset, second & 0x2000 != 0),
        fragment_id: second >> 16,
    };
    Ok((network, length))
}

/// The fixed header; extension headers follow it.
#[inline(always)]
pub(super) fn v6<B: Bytes>(bytes: &B) -> Result<Network, DropReason> {
    let h = bytes.words::<0, 10>().ok_or(DropReason::Truncated)?;
    let network = Network {
        source: Address::from_words([h[2], h[3], h[4], h[5]]),
        destination: Address::from_words([h[6], h[7], h[8], h[9]]),
        proto: (u32::from_be(h[1]) >> 8) as u8,
        fragment: Fragment::Whole,
        fragment_id: 0,
    };
    if network.source.is_mapped() || network.destination.is_mapped() {
        return Err(DropReason::MappedAddress);
    }
    Ok(network)
}

#[inline(always)]
const fn fragment(offset: u32, more: bool) -> Fragment {
    match (offset, more) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    }
}

/// A header that ends at `end` is there to its end, though nobody reads all of it.
#[inline(always)]
pub(super) fn whole<B: Bytes>(bytes: &B, end: usize) -> Result<(), DropReason> {
    match bytes.words_at::<1>(end - 4) {
        Some(_) => Ok(()),
        None => Err(DropReason::Truncated),
    }
}

/// Whether the options of an IPv4 header that ends at `end` send the packet on from where it is addressed to (RFC
/// 791, 3.1: loose and strict source routes with a stop left).
///
/// Looks at every byte and not from option to option, as each step of that would be another offset for a verifier:
/// what looks like one inside another option is taken for one.
#[inline(always)]
pub(super) fn has_source_route<B: Bytes>(bytes: &B, end: usize) -> bool {
    const LOOSE: u32 = 131;
    const STRICT: u32 = 137;
    let mut window = 0_u64;
    for word in 0..10 {
        let at = 20 + word * 4;
        if at >= end {
            break;
        }
        let [next] = bytes.words_at::<1>(at).unwrap_or_default();
        window = window << 32 | u64::from(u32::from_be(next));
        for shift in [0, 8, 16, 24] {
            let three = (window >> shift) as u32;
            let (kind, length, next) = (three >> 16 & 0xff, three >> 8 & 0xff, three & 0xff);
            // The next stop is counted from 1, and the first is the fourth byte.
            if (kind == LOOSE || kind == STRICT) && next >= 4 && next < length {
                return true;
            }
        }
    }
    false
}

const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// Extension headers that we walk, and those of which we only know that they are one (mobility, HIP,
/// Shim6, the two for experiments: RFC 7045, section 4).
#[inline(always)]
pub const fn is_extension(proto: u8) -> bool {
    matches!(
        proto,
        HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION | 135 | 139 | 140 | 253 | 254
    )
}

/// More than anybody sends, few enough for a verifier.
const MAX_EXTENSIONS: usize = 4;

/// Walks the extension headers from `at`; leaves the protocol and the fragment in `network`.
#[inline(always)]
pub(super) fn extensions<B: Bytes>(
    bytes: &B,
    network: &mut Network,
    mut at: usize,
) -> Result<usize, DropReason> {
    for _ in 0..MAX_EXTENSIONS {
        match network.proto {
            HOP_BY_HOP | ROUTING | DESTINATION => {
                let [word] = bytes.words_at::<1>(at).ok_or(DropReason::Truncated)?;
                let word = u32::from_be(word);
                // Type 0 lets a sender bounce packets between nodes (RFC 5095).
                if network.proto == ROUTING && (word >> 8) & 0xff == 0 {
                    return Err(DropReason::RoutingHeader);
                }
                if network.proto == ROUTING && word & 0xff != 0 {
                    return Err(DropReason::SourceRoute);
                }
                network.proto = (word >> 24) as u8;
                at += (((word >> 16) & 0xff) as usize + 1) * 8;
                whole(bytes, at)?;
            }
            FRAGMENT => {
                let [word, id] = bytes.words_at::<2>(at).ok_or(DropReason::Truncated)?;
                let word = u32::from_be(word);
                let offset = (word & 0xffff) >> 3;
                if offset != 0 && offset < MIN_FRAGMENT_OFFSET {
                    return Err(DropReason::TinyFragment);
                }
                network.proto = (word >> 24) as u8;
                network.fragment = fragment(offset, word & 1 != 0);
                network.fragment_id = u32::from_be(id);
                at += 8;
                if network.fragment == Fragment::Later {
                    return Ok(at);
                }
            }
            other if is_extension(other) => return Err(DropReason::UnknownExtension),
            _ => return Ok(at),
        }
    }
    if is_extension(network.proto) {
        Err(DropReason::TooManyExtensions)
    } else {
        Ok(at)
    }
}
