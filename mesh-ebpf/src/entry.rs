//! Entry points, one per hook. Whatever goes wrong in here ends in a drop.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use mesh_common::Direction;

use crate::maps::CFG;
use crate::tc::{DROP, L3, NEXT};
use crate::{filter, guard, half_open, meta, tables};

#[classifier]
pub fn mesh_in(ctx: TcContext) -> i32 {
    filter::run::<L3>(&ctx, Direction::Ingress)
}

#[classifier]
pub fn mesh_eg(ctx: TcContext) -> i32 {
    filter::run::<L3>(&ctx, Direction::Egress)
}

/// [`mesh_in`] for an Ethernet device: for looking at any interface, never used by the agent.
#[classifier]
pub fn mesh_in_l2(ctx: TcContext) -> i32 {
    filter::run_ethernet(&ctx, Direction::Ingress)
}

/// [`mesh_eg`] for an Ethernet device.
#[classifier]
pub fn mesh_eg_l2(ctx: TcContext) -> i32 {
    filter::run_ethernet(&ctx, Direction::Egress)
}

/// What [`mesh_in`] would do with a packet, by BPF_PROG_TEST_RUN: attached nowhere.
#[classifier]
pub fn why_in(ctx: TcContext) -> i32 {
    filter::explain(&ctx, Direction::Ingress)
}

/// What [`mesh_eg`] would do.
#[classifier]
pub fn why_eg(ctx: TcContext) -> i32 {
    filter::explain(&ctx, Direction::Egress)
}

/// Ends a half-open flow that the policy in force no longer allows, by BPF_PROG_TEST_RUN: the packet begins
/// with a [`mesh_common::flow::Revocation`].
#[classifier]
pub fn revoke(ctx: TcContext) -> i32 {
    let (Some(config), Ok(ended)) = (CFG.get(0), ctx.load(0)) else {
        return DROP;
    };
    half_open::revoke(&ended, config);
    NEXT
}

/// Writes an entry of `id_exact` where it lies, by BPF_PROG_TEST_RUN: the packet begins with a
/// [`mesh_common::identity::Identified`]. Refused if there is no such entry.
#[classifier]
pub fn identify(ctx: TcContext) -> i32 {
    match ctx.load(0) {
        Ok(told) if tables::identify(&told) => NEXT,
        _ => DROP,
    }
}

/// Writes the counter of ticks over a packet's first bytes, by BPF_PROG_TEST_RUN.
#[classifier]
pub fn ticks(ctx: TcContext) -> i32 {
    match ctx.store(0, &meta::ticks(), 0) {
        Ok(()) => NEXT,
        Err(_) => DROP,
    }
}

/// Ingress of every interface but the mesh's own and loopback.
#[classifier]
pub fn guard(ctx: TcContext) -> i32 {
    guard::run(&ctx)
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers that we call are for GPL-compatible programs only; Apache-2.0 alone is not on the
/// kernel's list, and this file and what it is linked with may be used under either.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
