//! Packets that name further stops: a host that was told to heed them makes the next stop the destination,
//! behind the guard.
//!
//! Linux does so where somebody said `accept_source_route`, `seg6_enabled` or `rpl_seg_enabled`. Stops that we
//! cannot read, because they are compressed or too many, may be this node.

use aya_ebpf::programs::TcContext;
use mesh_common::Address;
use mesh_common::packet::{FRAGMENT, ROUTING, is_extension};

use crate::skb::load;

/// Headers between that of IPv6 and what it carries; behind so many we cannot say.
const EXTENSIONS: usize = 6;
/// Stops in one routing header.
const STOPS: u32 = 16;

/// RFC 6554: leaves out of each stop what it has in common with the destination.
const RPL: u8 = 3;

/// Whether the options of IPv4, of so many words from `at`, have this node's address anywhere: source routes
/// (RFC 791, 3.1), and lists of hosts that are to write down that or when the packet came by, if we are on them.
#[inline(never)]
pub fn options_name(ctx: &TcContext, at: u32, words: u32, own: &Address) -> bool {
    let [.., own] = own.words();
    let own = u32::from_be(own);
    // We have none yet, and padding is zeros.
    if own == 0 {
        return false;
    }
    // An address may begin at any byte.
    let mut window = 0_u64;
    for word in 0..10 {
        if word >= words {
            break;
        }
        let Some(next) = load::<u32>(ctx, at + word * 4) else {
            break;
        };
        window = window << 32 | u64::from(u32::from_be(next));
        for shift in [0, 8, 16, 24] {
            if (window >> shift) as u32 == own {
                return true;
            }
        }
    }
    false
}

/// Whether a header of this kind at `at`, or one behind it, sends an IPv6 packet on to this node's address.
#[inline(never)]
pub fn routes_to(ctx: &TcContext, mut kind: u8, mut at: u32, own: &Address) -> bool {
    for _ in 0..EXTENSIONS {
        if !is_extension(kind) {
            return false;
        }
        // All of them begin alike (RFC 8200, 4): the next one, and how long this is.
        let Some([next, length, routing, left]) = load::<[u8; 4]>(ctx, at) else {
            return false;
        };
        let mut length = u32::from(length);
        if kind == ROUTING && left != 0 {
            // Two units of eight bytes for each.
            let stops = length / 2;
            if routing == RPL || stops > STOPS || has_stop(ctx, at + 8, stops, own) {
                return true;
            }
        }
        if kind == FRAGMENT {
            // Only the first has headers: its offset, above three bits of flags, is zero.
            if routing != 0 || left >> 3 != 0 {
                return false;
            }
            length = 0;
        }
        at += (length + 1) * 8;
        kind = next;
    }
    is_extension(kind)
}

#[inline(always)]
fn has_stop(ctx: &TcContext, at: u32, stops: u32, own: &Address) -> bool {
    // We have none yet.
    if own.is_same(&Address::default()) {
        return false;
    }
    for stop in 0..STOPS {
        if stop >= stops {
            break;
        }
        match load::<[u32; 4]>(ctx, at + stop * 16) {
            Some(words) if Address::from_words(words).is_same(own) => return true,
            Some(_) => {}
            None => break,
        }
    }
    false
}
