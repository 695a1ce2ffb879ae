//! One packet of the mesh device: read, judged, remembered, counted.
//!
//! Nearly every packet belongs to an established flow and has its headers where they usually are, so
//! [`run`] asks that question first, in one look-up, and leaves everything else to [`judge`] and [`conclude`].

use core::cell::Cell;
use core::mem::MaybeUninit;

use aya_ebpf::programs::TcContext;
use mesh_common::event::{EventKind, Explanation};
use mesh_common::flow::{FlowKey, FragmentEntry};
use mesh_common::maps::Config;
use mesh_common::packet::{self, Fragment, Kind};
use mesh_common::place::Place;
use mesh_common::verdict::{complete, continues};
use mesh_common::{Direction, Effect, Facts, Verdict, decide, tcp};

use crate::maps::{CFG, FRAG};
use crate::meta::{self, Meta};
use crate::scratch::{Scratch, dry_scratch, scratch};
use crate::skb::{Linear, Skb};
use crate::tables::{self, Tables};
use crate::tc::{DROP, L2, NEXT};
use crate::{established, events, mss, stats};

#[inline(always)]
pub fn run<const AT: usize>(ctx: &TcContext, direction: Direction) -> i32 {
    let Some(config) = CFG.get(0) else {
        return DROP;
    };
    let generation = config.generation;
    let seen = Cell::new(Seen::Nothing);
    let goes_on = packet::usual(
        &Linear::<AT>(ctx),
        direction,
        // Two callers would share it, and each packet pay for the call.
        #[inline(always)]
        |key, kind, tcp| {
            let place = Place::of(key, &config.secret);
            let Some(entry) = established::get(&place, key) else {
                seen.set(remember(key, direction, kind, tcp, place));
                return false;
            };
            let meta = Meta::new(ctx, ctx.len() - AT as u32, direction, meta::now(config));
            // SAFETY: the pointer that the look-up returned.
            unsafe {
                let state = &(*entry).state;
                if !continues(kind, key.proto, tcp, meta.now, generation, state) {
                    return false;
                }
                established::touch(entry, &meta, meta.now);
            }
            stats::passed(&meta);
            true
        },
    );
    if goes_on {
        return NEXT;
    }
    let Some(scratch) = scratch() else {
        return DROP;
    };
    // One after the other and not one in the other: their frames do not fit on one stack where the kernel counts
    // a frame in steps of 32 bytes, as 6.1 does; newer ones take steps of 16.
    // SAFETY: the slot of this CPU, on which no other packet is judged until we are done.
    unsafe {
        if let Seen::Nothing = seen.get() {
            let Scratch { facts, verdict, .. } = &mut *scratch;
            if read(&Skb::<AT>::new(ctx), direction, facts, verdict) {
                seen.set(Seen::Facts);
            } else {
                blame::<AT>(ctx, direction, facts);
            }
        }
        judge(&mut *scratch, config, seen.get());
        let Scratch { facts, verdict, .. } = &mut *scratch;
        if verdict
            .assume_init_ref()
            .is_nameless(facts.assume_init_ref())
        {
            name(&mut *scratch, config);
        }
    }
    let end = conclude::<AT>(ctx, config, direction);
    if config.flags & Config::LOG != 0 {
        stats::log_verdict();
    }
    end
}

/// What [`run`] knows of a packet that is to be judged.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// It cannot be read.
    Nothing,
    /// Its facts.
    Facts,
    /// And that no table has a flow for them.
    NewFlow,
}

/// Leaves the facts of a packet whose flow is not in `ct_est` for [`judge`].
#[inline(never)]
fn remember(key: &FlowKey, direction: Direction, kind: Kind, tcp: u8, place: Place) -> Seen {
    // Before anything else is looked at, so that its cache line and that of `ct_est` are fetched at once.
    let opens = matches!(kind, Kind::Tcp) && tcp::opens(tcp);
    let is_new = tables::is_absent(&place, key, opens);
    // The slow reader says why; the quick one leaves both to it.
    let refused = key.remote.is_mapped() != key.local.is_mapped()
        || matches!(kind, Kind::Tcp) && tcp::is_nonsense(tcp);
    if refused {
        return Seen::Nothing;
    }
    let Some(scratch) = scratch() else {
        return Seen::Nothing;
    };
    // SAFETY: the slot of this CPU, on which no other packet is judged until we are done.
    let Scratch { facts, asked, .. } = unsafe { &mut *scratch };
    facts.write(Facts::usual(key, direction, kind, tcp));
    asked.place.set(place);
    if is_new { Seen::NewFlow } else { Seen::Facts }
}

/// What becomes of a packet that was judged.
#[inline(never)]
fn conclude<const AT: usize>(ctx: &TcContext, config: &Config, direction: Direction) -> i32 {
    let Some(scratch) = scratch() else {
        return DROP;
    };
    // SAFETY: the slot of this CPU, on which no other packet is judged until we are done.
    let Scratch {
        facts,
        verdict,
        flow,
        asked,
        ..
    } = unsafe { &mut *scratch };
    let meta = &Meta::new(ctx, ctx.len() - AT as u32, direction, asked.now);
    // SAFETY: always written.
    let (facts, verdict) = unsafe { (facts.assume_init_mut(), verdict.assume_init_ref()) };
    Tables::new(config, asked).carry_out(facts, verdict, meta, flow);
    stats::count(verdict, meta);
    match verdict.event {
        None => {}
        Some(EventKind::Denied) => {
            facts.forget_quoted();
            events::deny(&facts.key, facts.port, facts.tcp, verdict, meta);
        }
        Some(kind) => {
            if events::is_heard(kind, verdict, meta.now, asked) {
                events::flow(kind, &facts.key, verdict, meta, &flow.entry);
            }
        }
    }
    if !verdict.passes() {
        return drop(config);
    }
    if matches!(facts.fragment, Fragment::First) {
        lead(facts, meta.now);
    }
    if matches!(facts.kind, Kind::Tcp) && facts.tcp & tcp::SYN != 0 {
        clamp::<AT>(ctx, config, facts);
    }
    NEXT
}

/// What [`run`] would do with the packet if no table knew its flow, written over its first bytes; nothing is
/// remembered or counted.
#[inline(always)]
pub fn explain(ctx: &TcContext, direction: Direction) -> i32 {
    let Some(config) = CFG.get(0) else {
        return DROP;
    };
    let Some(scratch) = dry_scratch() else {
        return DROP;
    };
    // SAFETY: the slot of this CPU for dry runs, of which there is one at a time.
    let scratch = unsafe { &mut *scratch };
    let Scratch { facts, verdict, .. } = scratch;
    if read(&Skb::<0>::new(ctx), direction, facts, verdict) {
        judge(scratch, config, Seen::NewFlow);
    }
    // SAFETY: always written.
    let verdict = unsafe { scratch.verdict.assume_init_ref() };
    let explanation = Explanation {
        rule: verdict.rule,
        remote: verdict.remote,
        local: verdict.local,
        reason: stats::number(verdict),
        flags: match verdict.effect {
            Effect::Open => Explanation::REMEMBERED,
            _ => 0,
        },
        pad: 0,
    };
    match ctx.store(0, &explanation, 0) {
        Ok(()) => NEXT,
        Err(_) => DROP,
    }
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
//
// A verifier follows each of them anew for every way that leads to it. Those with a C name, elsewhere, are
// global functions (Linux 5.6), which it reads once, whoever calls: they get numbers only, as of what a
// pointer leads to it would know nothing.

/// False if the packet is refused because it cannot be read.
#[inline(never)]
fn read<const AT: usize>(
    skb: &Skb<'_, AT>,
    direction: Direction,
    facts: &mut MaybeUninit<Facts>,
    verdict: &mut MaybeUninit<Verdict>,
) -> bool {
    match packet::parse(skb, direction) {
        Ok(read) => {
            facts.write(read);
            true
        }
        Err(reason) => {
            verdict.write(Verdict::refused(reason));
            false
        }
    }
}

/// Leaves what can be said of a packet that could not be read.
#[inline(never)]
fn blame<const AT: usize>(
    ctx: &TcContext,
    direction: Direction,
    facts: &mut MaybeUninit<Facts>,
) -> u32 {
    facts.write(Facts::refused(&Linear::<AT>(ctx), direction));
    0
}

/// Names the ends of a packet that was refused before anybody asked for them.
#[inline(never)]
fn name(scratch: &mut Scratch, config: &Config) -> u32 {
    let Scratch {
        facts,
        verdict,
        asked,
        ..
    } = scratch;
    // SAFETY: always written.
    let (facts, verdict) = unsafe { (facts.assume_init_ref(), verdict.assume_init_mut()) };
    verdict.name(facts, &Tables::new(config, asked));
    0
}

/// Writes the verdict; that of a packet that cannot be read is there already.
#[inline(never)]
fn judge(scratch: &mut Scratch, config: &Config, seen: Seen) -> u32 {
    let Scratch {
        facts,
        verdict,
        asked,
        ..
    } = scratch;
    let is_new = seen == Seen::NewFlow;
    asked.begin(config.generation, meta::now(config), is_new);
    if seen == Seen::Nothing {
        return 0;
    }
    // SAFETY: written, as nothing was refused.
    let facts = unsafe { facts.assume_init_mut() };
    let now = asked.now;
    let tables = &Tables::new(config, asked);
    let reached = match complete(facts, now, tables) {
        Ok(()) => {
            tables.note_place(&facts.key);
            decide(facts, now, tables)
        }
        Err(reason) => Verdict::refused(reason),
    };
    verdict.write(reached);
    0
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
    if max != 0 && !mss::fits::<AT>(ctx, facts.transport, max) {
        mss::clamp(ctx, AT + facts.transport as usize, max);
    }
}
