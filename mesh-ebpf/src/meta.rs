//! What is known of a buffer before its headers are read.

use aya_ebpf::helpers::bpf_jiffies64;
use aya_ebpf::programs::TcContext;
use mesh_common::Direction;
use mesh_common::maps::Config;

/// At least what headers mostly take: TCP with timestamps behind IPv6 has 72 bytes. Too little would count
/// a segment too many; so a last one is left out that is shorter than what they take less.
const HEADERS: u32 = 80;

#[derive(Clone, Copy)]
pub struct Meta {
    pub now: u64,
    pub bytes: u64,
    /// GSO and GRO carry many packets in one.
    pub segments: u32,
    pub direction: Direction,
}

impl Meta {
    /// `length` is that of the packet from its IP header on.
    #[inline(always)]
    pub fn new(ctx: &TcContext, length: u32, direction: Direction, now: u64) -> Self {
        Self {
            now,
            bytes: u64::from(length),
            segments: segments(ctx, length),
            direction,
        }
    }
}

/// What a TUN device gets from user space says how large its segments are, and not how many.
#[inline(always)]
fn segments(ctx: &TcContext, length: u32) -> u32 {
    // SAFETY: fields of the context that the kernel lets classifiers read.
    let (count, size) = unsafe { ((*ctx.skb.skb).gso_segs, (*ctx.skb.skb).gso_size) };
    if count != 0 {
        return count;
    }
    if size == 0 || length <= HEADERS {
        return 1;
    }
    (length - HEADERS).div_ceil(size)
}

/// The monotonic clock, as exact as the timer's tick: reading the counter of ticks is one load, where a
/// call for the time costs a quarter of all that an established flow's packet may.
#[inline(always)]
pub fn now(config: &Config) -> u64 {
    ticks()
        .wrapping_mul(u64::from(config.clock_tick))
        .wrapping_add(config.clock_base)
}

#[inline(always)]
pub fn ticks() -> u64 {
    // SAFETY: takes no argument.
    unsafe { bpf_jiffies64() }
}
