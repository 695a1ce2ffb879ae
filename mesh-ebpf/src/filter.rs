//! One packet of the mesh device: read, judged, remembered, counted.

use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::programs::TcContext;
use mesh_common::flow::FragmentEntry;
use mesh_common::maps::Config;
use mesh_common::packet::{self, Fragment, Kind};
use mesh_common::verdict::complete;
use mesh_common::{Direction, Effect, Facts, Verdict, decide, tcp};

use crate::maps::{CFG, FRAG};
use crate::skb::Skb;
use crate::tables::{Size, Tables};
use crate::{DROP, L2, NEXT, mss, stats};

#[inline(always)]
pub fn run<const AT: usize>(ctx: &TcContext, direction: Direction) -> i32 {
    let Some(config) = CFG.get(0) else {
        return DROP;
    };
    // SAFETY: a field of the context that the kernel lets classifiers read.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    let size = Size {
        segments: if segments == 0 { 1 } else { segments },
        bytes: u64::from(ctx.len()) - AT as u64,
    };
    // SAFETY: takes no argument.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let mut facts = Facts::nothing(direction);
    let tables = Tables::new(config.generation);
    let read = packet::parse(&Skb::<AT>::new(ctx), &mut facts);
    let verdict = match read.and_then(|()| complete(&mut facts, now, &tables)) {
        Ok(()) => decide(&facts, now, &tables),
        Err(reason) => Verdict::refused(reason),
    };
    tables.carry_out(&facts, &verdict, size);
    stats::count(&verdict, direction, size);
    if verdict.passes() {
        after::<AT>(ctx, config, &facts, now);
        if config.flags & Config::LOG != 0 && matches!(verdict.effect, Effect::Write(_)) {
            stats::log(&facts, &verdict);
        }
        return NEXT;
    }
    dropped(config, &facts, &verdict, now, size)
}

/// Counted, reported, and dropped if this device is ours to drop from.
#[inline(always)]
fn dropped(config: &Config, facts: &Facts, verdict: &Verdict, now: u64, size: Size) -> i32 {
    stats::report(&facts.key, facts.direction, facts.tcp, verdict, now, size);
    if config.flags & Config::LOG != 0 {
        stats::log(facts, verdict);
    }
    if config.flags & Config::OBSERVE != 0 {
        NEXT
    } else {
        DROP
    }
}

/// Ethernet carries more than IP; what is not IP is none of our business there.
#[inline(always)]
pub fn run_ethernet(ctx: &TcContext, direction: Direction) -> i32 {
    // SAFETY: a field of the context that the kernel lets classifiers read.
    let protocol = unsafe { (*ctx.skb.skb).protocol } as u16;
    match u16::from_be(protocol) {
        0x0800 | 0x86dd => run::<L2>(ctx, direction),
        _ => NEXT,
    }
}

/// What a packet that passes leaves behind: its ports for the fragments that follow, and an MSS that
/// fits the mesh.
#[inline(always)]
fn after<const AT: usize>(
    ctx: &TcContext,
    config: &Config,
    facts: &Facts,
    now: u64,
) {
    if matches!(facts.fragment, Fragment::First) {
        let key = facts.fragment_key();
        let entry = FragmentEntry {
            last_seen: now,
            remote_port: facts.key.remote_port,
            local_port: facts.key.local_port,
            proto: facts.key.proto,
            pad: [0; 3],
        };
        // Without room the fragments that follow are dropped, as if this one had been lost.
        let _ = FRAG.insert(&key, &entry, 0);
    }
    if matches!(facts.kind, Kind::Tcp) && facts.tcp & tcp::SYN != 0 {
        let max = if facts.remote.is_mapped() {
            config.mss_v4
        } else {
            config.mss_v6
        };
        if max != 0 {
            mss::clamp(ctx, AT + facts.transport as usize, max);
        }
    }
}
