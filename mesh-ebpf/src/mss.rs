//! Lowers the MSS option of a SYN to what fits the mesh.

use aya_ebpf::programs::TcContext;
use mesh_common::packet::Bytes as _;
use mesh_common::tcp::{self, MAX_OPTION_STEPS, OptionStep};

use crate::skb::Linear;

/// Whether the SYN's first option, as is the rule, is an MSS, and not above `max` either. `transport` is
/// where the TCP header starts, seen from the IP header.
#[inline(always)]
pub fn fits<const AT: usize>(ctx: &TcContext, transport: u16, max: u16) -> bool {
    let linear = Linear::<AT>(ctx);
    let option = match transport {
        20 => linear.words::<40, 1>(),
        40 => linear.words::<60, 1>(),
        _ => None,
    };
    let Some([option]) = option else {
        return false;
    };
    let option = u32::from_be(option);
    option >> 16 == 0x0204 && option as u16 <= max
}

/// `at` is where the TCP header starts. A packet that cannot be changed passes as it is: the path MTU
/// then does slowly what the option would have done at once.
#[inline(never)]
pub fn clamp(ctx: &TcContext, at: usize, max: u16) {
    let Ok(offset) = ctx.load::<u8>(at + 12) else {
        return;
    };
    let end = at + usize::from(offset >> 4) * 4;
    let mut here = at + 20;
    for _ in 0..MAX_OPTION_STEPS {
        if here + 4 > end {
            return;
        }
        let Ok([kind, length, high, low]) = ctx.load::<[u8; 4]>(here) else {
            return;
        };
        match tcp::option(kind, length) {
            OptionStep::Mss => {
                let value = u16::from_be_bytes([high, low]);
                if value > max {
                    rewrite(ctx, at, here + 2, value, max);
                }
                return;
            }
            OptionStep::Skip(length) => here += usize::from(length),
            OptionStep::Stop => return,
        }
    }
}

#[inline(always)]
fn rewrite(ctx: &TcContext, tcp: usize, at: usize, value: u16, max: u16) {
    // A sum over 16-bit words sees a value at an odd offset with its bytes swapped.
    let (from, to) = if (at - tcp) & 1 == 0 {
        (value.to_be(), max.to_be())
    } else {
        (value.to_be().swap_bytes(), max.to_be().swap_bytes())
    };
    // Right for CHECKSUM_PARTIAL too, as the pseudo-header does not change: the helper leaves it be.
    if ctx
        .l4_csum_replace(tcp + 16, u64::from(from), u64::from(to), 2)
        .is_ok()
    {
        let _ = ctx.store(at, &max.to_be_bytes(), 0);
    }
}
