//! The packet path and what only the benchmark runs: an object of its own, which is never shipped.
//!
//! BPF_PROG_TEST_RUN repeats one packet, so these programs make it another each time; what that costs
//! is measured by one that does nothing else.
#![no_std]
#![no_main]
#![feature(core_intrinsics, stmt_expr_attributes)]
#![expect(
    internal_features,
    reason = "atomic addition: core has no AtomicU64 for a target without compare-and-swap"
)]

mod detour;
mod entry;
mod established;
mod events;
mod filter;
mod guard;
mod half_open;
mod maps;
mod meta;
mod mss;
mod peers;
mod policy;
mod scratch;
mod skb;
mod stats;
mod tables;
mod tc;

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::{classifier, map, xdp};
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::{TcContext, XdpContext};
use mesh_common::Direction;
use mesh_common::packet::{self, Kind};
use tc::{DROP, L3, NEXT};

use crate::skb::Linear;

/// Source addresses, 100.64.16.0 onward; flows among them, or 0 for a random source port; destination
/// ports, 1000 onward; and the interface that frames are sent to.
#[map(name = "spread")]
static SPREAD: Array<u32> = Array::with_max_entries(4, 0);

#[map(name = "seed")]
static SEED: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// What every other program's time is measured against.
#[classifier]
pub fn empty(_: TcContext) -> i32 {
    NEXT
}

#[classifier]
pub fn parse(ctx: TcContext) -> i32 {
    let plain = packet::usual(&Linear::<L3>(&ctx), Direction::Ingress, |key, kind, tcp| {
        matches!(kind, Kind::Tcp) && key.local_port.get() != 0 && tcp != 0
    });
    if plain { NEXT } else { DROP }
}

#[classifier]
pub fn vary(ctx: TcContext) -> i32 {
    vary_packet(&ctx)
}

#[classifier]
pub fn varied_in(ctx: TcContext) -> i32 {
    if vary_packet(&ctx) == DROP {
        return DROP;
    }
    filter::run::<L3>(&ctx, Direction::Ingress)
}

#[inline(never)]
fn vary_packet(ctx: &TcContext) -> i32 {
    let (Some(addresses), Some(flows), Some(ports), Some(seed)) = (
        SPREAD.get(0),
        SPREAD.get(1),
        SPREAD.get(2),
        SEED.get_ptr_mut(0),
    ) else {
        return DROP;
    };
    // Marsaglia's xorshift, 2003.
    // SAFETY: the slot of this CPU.
    let random = unsafe {
        let mut x = *seed | 1 << 63;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *seed = x;
        x
    };
    // A remainder by 0 would panic, which no program can.
    let (addresses, ports) = ((*addresses).max(1), (*ports).max(1));
    let (low, high) = (random as u32, (random >> 32) as u32);
    let index = if *flows != 0 {
        low % (*flows).max(1)
    } else {
        low
    };
    let address = 0x6440_1000 + index % addresses;
    let source = if *flows != 0 {
        1_024 + index / addresses
    } else {
        high & 0xffff
    };
    let port = 1_000 + (high >> 16) % ports;
    let skb = ctx.skb.skb;
    // SAFETY: fields of the context, and bytes of the packet whose bounds are checked.
    unsafe {
        let data = (&raw const (*skb).data).read_volatile() as usize;
        let end = (&raw const (*skb).data_end).read_volatile() as usize;
        if data + 24 > end {
            return DROP;
        }
        *((data + 12) as *mut u32) = address.to_be();
        *((data + 20) as *mut u32) = (source << 16 | port).to_be();
    }
    NEXT
}

/// Sends the frame to an interface.
#[xdp]
pub fn frame(_: XdpContext) -> u32 {
    match SPREAD.get(3) {
        // SAFETY: takes numbers.
        Some(interface) => unsafe { bpf_redirect(*interface, 0) as u32 },
        None => xdp_action::XDP_ABORTED,
    }
}

/// Makes a veth receive frames as a network card does.
#[xdp]
pub fn pass(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}
