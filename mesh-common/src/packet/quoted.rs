//! What an ICMP error quotes: the packet that it speaks of, of which no more than this is known.

use super::network::{FRAGMENT, Network};
use super::transport::{Upper, icmp_kind, key};
use super::{Bytes, Fragment, Kind};
use crate::flow::FlowKey;
use crate::policy::Direction;
use crate::{Address, DropReason, proto};

/// The flow of the packet that an ICMP error quotes from `at`, seen from this node.
///
/// An error goes to the sender of what it quotes, so the quoted packet went the other way, and a
/// quoted source that is not the error's destination is a forgery.
#[inline(always)]
pub(super) fn embedded<B: Bytes>(
    bytes: &B,
    direction: Direction,
    destination: &Address,
    icmp: u8,
    at: usize,
) -> Result<FlowKey, DropReason> {
    const BAD: DropReason = DropReason::IcmpErrorMalformed;
    let (network, at) = quoted(bytes, icmp, at).ok_or(BAD)?;
    if network.source != *destination || !matches!(network.fragment, Fragment::Whole) {
        return Err(BAD);
    }
    let upper = if matches!(network.proto, proto::TCP | proto::UDP | proto::SCTP) {
        let [word] = bytes.words_at::<1>(at).ok_or(BAD)?;
        Upper::with_ports(Kind::Datagram, word)
    } else if network.proto == icmp {
        let [word, rest] = bytes.words_at::<2>(at).ok_or(BAD)?;
        match icmp_kind(icmp, (u32::from_be(word) >> 24) as u8, 0) {
            Some(kind @ (Kind::EchoRequest | Kind::EchoReply)) => Upper {
                source: (u32::from_be(rest) >> 16) as u16,
                ..Upper::of(kind)
            },
            _ => return Err(BAD),
        }
    } else {
        Upper::of(Kind::Datagram)
    };
    Ok(key(direction.reverse(), &network, &upper))
}

/// The network header at `at`, and where the next one starts.
#[inline(always)]
fn quoted<B: Bytes>(bytes: &B, icmp: u8, at: usize) -> Option<(Network, usize)> {
    if icmp == proto::ICMP {
        let header = bytes.words_at::<5>(at)?;
        let first = u32::from_be(header[0]);
        let length = ((first >> 24) & 0xf) as usize * 4;
        if first >> 28 != 4 || length < 20 {
            return None;
        }
        let network = Network {
            source: Address::from_v4_word(header[3]),
            destination: Address::from_v4_word(header[4]),
            proto: (u32::from_be(header[2]) >> 16) as u8,
            fragment: quoted_fragment(u32::from_be(header[1]) & 0x1fff),
            fragment_id: 0,
        };
        return Some((network, at + length));
    }
    let h = bytes.words_at::<10>(at)?;
    if u32::from_be(h[0]) >> 28 != 6 {
        return None;
    }
    let mut network = Network {
        source: Address::from_words([h[2], h[3], h[4], h[5]]),
        destination: Address::from_words([h[6], h[7], h[8], h[9]]),
        proto: (u32::from_be(h[1]) >> 8) as u8,
        fragment: Fragment::Whole,
        fragment_id: 0,
    };
    // What our own nodes send carries a fragment header at most; an error about more exotic packets
    // is not worth a second walk to the verifier.
    if network.proto != FRAGMENT {
        return Some((network, at + 40));
    }
    let [word] = bytes.words_at::<1>(at + 40)?;
    network.proto = (u32::from_be(word) >> 24) as u8;
    network.fragment = quoted_fragment((u32::from_be(word) & 0xffff) >> 3);
    Some((network, at + 48))
}

/// Quoted first fragments have their ports, as whole packets do.
#[inline(always)]
const fn quoted_fragment(offset: u32) -> Fragment {
    if offset == 0 {
        Fragment::Whole
    } else {
        Fragment::Later
    }
}
