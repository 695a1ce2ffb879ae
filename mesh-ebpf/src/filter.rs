//! One packet of the mesh device: read, judged, remembered, counted.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::programs::TcContext;
use mesh_common::flow::{FlowKey, FragmentEntry};
use mesh_common::maps::Config;
use mesh_common::packet::{self, Fragment, Kind};
use mesh_common::verdict::complete;
use mesh_common::{Direction, DropReason, Effect, Facts, Verdict, decide, tcp};

use crate::maps::{CFG, FRAG, SCRATCH, Scratch};
use crate::skb::Skb;
use crate::tables::{Meta, Tables};
use crate::{DROP, L2, NEXT, mss, stats};

#[inline(always)]
pub fn run<const AT: usize>(ctx: &TcContext, direction: Direction) -> i32 {
    let Some(config) = CFG.get(0) else {
        return DROP;
    };
    // SAFETY: a field of the context that the kernel lets classifiers read.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    let meta = Meta {
        // SAFETY: takes no argument.
        now: unsafe { bpf_ktime_get_coarse_ns() },
        bytes: u64::from(ctx.len()) - AT as u64,
        segments: if segments == 0 { 1 } else { segments },
        direction,
    };
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return DROP;
    };
    // SAFETY: the slot of this CPU, on which no other packet is judged until we are done.
    let Scratch { facts, verdict } = unsafe { &mut *scratch };
    if let Some(reason) = read(&Skb::<AT>::new(ctx), direction, facts) {
        return unreadable(config, reason, &meta);
    }
    // SAFETY: written, as nothing was refused.
    let facts = unsafe { facts.assume_init_mut() };
    let mut place = MaybeUninit::uninit();
    let tables = Tables::new(&mut place, config.generation);
    let refused = judge(facts, meta.now, tables, verdict);
    // SAFETY: always written.
    let verdict = unsafe { verdict.assume_init_ref() };
    tables.carry_out(facts, verdict, &meta);
    stats::count(verdict, &meta);
    if refused.is_some() {
        stats::report(&facts.key, facts.tcp, verdict, &meta);
        if config.flags & Config::LOG != 0 {
            stats::log(facts, verdict);
        }
        return drop(config);
    }
    if matches!(facts.fragment, Fragment::First) {
        lead(facts, meta.now);
    }
    if matches!(facts.kind, Kind::Tcp) && facts.tcp & tcp::SYN != 0 {
        clamp::<AT>(ctx, config, facts);
    }
    if config.flags & Config::LOG != 0 && matches!(verdict.effect, Effect::WriteHalfOpen) {
        stats::log(facts, verdict);
    }
    NEXT
}

/// A packet of which nobody can say whose it is.
#[inline(never)]
fn unreadable(config: &Config, reason: DropReason, meta: &Meta) -> i32 {
    let verdict = Verdict::refused(reason);
    stats::count(&verdict, meta);
    stats::report(&FlowKey::NONE, 0, &verdict, meta);
    drop(config)
}

/// Only from a device that is ours to drop from.
#[inline(always)]
fn drop(config: &Config) -> i32 {
    if config.flags & Config::OBSERVE != 0 {
        NEXT
    } else {
        DROP
    }
}

// Functions of their own, because a program's stack is 512 bytes over all that are active at once. They
// return numbers and write the rest, because what a function without a number leaves in the return
// register may be a pointer to the stack, which a verifier does not let out.

#[inline(never)]
fn read<const AT: usize>(
    skb: &Skb<'_, AT>,
    direction: Direction,
    facts: &mut MaybeUninit<Facts>,
) -> Option<DropReason> {
    match packet::parse(skb, direction) {
        Ok(read) => {
            facts.write(read);
            None
        }
        Err(reason) => Some(reason),
    }
}

#[inline(never)]
fn judge(
    facts: &mut Facts,
    now: u64,
    tables: &Tables,
    verdict: &mut MaybeUninit<Verdict>,
) -> Option<DropReason> {
    let judged = match complete(facts, now, tables) {
        Ok(()) => decide(facts, now, tables),
        Err(reason) => Verdict::refused(reason),
    };
    verdict.write(judged).drop
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

/// Leaves the ports of a first fragment for those that follow. Without room they are dropped, as if
/// this one had been lost.
#[inline(never)]
fn lead(facts: &Facts, now: u64) {
    let entry = FragmentEntry {
        last_seen: now,
        remote_port: facts.key.remote_port,
        local_port: facts.key.local_port,
        proto: facts.key.proto,
        pad: [0; 3],
    };
    let _ = FRAG.insert(&facts.fragment_key(), &entry, 0);
}

/// Gives a SYN an MSS that fits the mesh.
#[inline(always)]
fn clamp<const AT: usize>(ctx: &TcContext, config: &Config, facts: &Facts) {
    let max = if facts.remote.is_mapped() {
        config.mss_v4
    } else {
        config.mss_v6
    };
    if max != 0 {
        mss::clamp(ctx, AT + facts.transport as usize, max);
    }
}
