//! What the agent is told through the ring buffer, and what is only counted.
//!
//! Whoever floods uses up the tokens of its own peer first, then those of its kind of event, and never
//! another kind's. The reader polls, so a record wakes it up only when much has gathered.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use mesh_common::budget::{Bucket, Rate};
use mesh_common::event::{DenyEntry, DenyKey, EventKind, FlowEvent, KIND_RATE, PEER_RATE};
use mesh_common::flow::{FlowEntry, FlowKey};
use mesh_common::proto;
use mesh_common::{Be16, Direction, Effect, Verdict, maps};

use crate::maps::{DENY_AGG, EVENT, EVENT_LOST, EVENT_TOKENS, EVENTS};
use crate::meta::Meta;
use crate::scratch::Asked;
use crate::{peers, stats};

/// Bytes in the ring that are worth a wake-up before the reader's next poll.
const PLENTY: u64 = maps::EVENTS_BYTES as u64 / 4;

/// Tells what became of the flow that `entry` tells of, if it [`is_heard`].
#[inline(never)]
pub fn flow(
    kind: EventKind,
    key: &FlowKey,
    verdict: &Verdict,
    meta: &Meta,
    entry: &FlowEntry,
) -> u32 {
    let Some(event) = EVENT.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: the slot of this CPU, on which no other packet is judged until we are done.
    let event = unsafe { &mut *event };
    fill(event, kind, key, verdict, meta);
    event.direction = entry.state.opened() as u8;
    event.first = entry.opened;
    event.bytes = entry.bytes;
    event.packets = [u64::from(entry.packets[0]), u64::from(entry.packets[1])];
    send(event, kind)
}

/// Counts a denied packet, and tells of it now and then.
#[inline(never)]
pub fn deny(key: &FlowKey, port: u16, tcp: u8, verdict: &Verdict, meta: &Meta) -> u32 {
    let same = DenyKey {
        remote: verdict.remote,
        local: verdict.local,
        peer: verdict.state.peer,
        port: Be16::new(port),
        proto: key.proto,
        direction: meta.direction as u8,
        reason: stats::number(verdict),
        pad: 0,
        pad2: 0,
    };
    let segments = u64::from(meta.segments);
    let mut entry = DenyEntry {
        packets: segments,
        bytes: meta.bytes,
        first: meta.now,
        last: meta.now,
        told: DenyEntry::tick(meta.now),
        rule: verdict.rule,
    };
    match DENY_AGG.get_ptr_mut(&same) {
        Some(found) => {
            // SAFETY: the pointer that the look-up returned. If the entry has become another's
            // meanwhile, that one counts a packet too many.
            unsafe {
                entry.packets += (*found).packets;
                entry.bytes += (*found).bytes;
                entry.first = (*found).first;
                let is_news = (*found).is_news(entry.packets, meta.now);
                (*found).last = meta.now;
                (*found).rule = verdict.rule;
                atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(
                    &raw mut (*found).packets,
                    segments,
                );
                atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(
                    &raw mut (*found).bytes,
                    meta.bytes,
                );
                if !is_news {
                    return 0;
                }
                (*found).told = entry.told;
            }
        }
        None => {
            let _ = DENY_AGG.insert(&same, &entry, 0);
        }
    }
    let kind = EventKind::Denied;
    if !has_token(kind, verdict.state.peer, meta.now) {
        return lose(kind);
    }
    let Some(event) = EVENT.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: the slot of this CPU, on which no other packet is judged until we are done.
    let event = unsafe { &mut *event };
    fill(event, kind, key, verdict, meta);
    event.direction = meta.direction as u8;
    event.tcp = match key.proto {
        proto::ICMP | proto::ICMPV6 => port as u8,
        _ => tcp,
    };
    event.first = entry.first;
    (event.bytes, event.packets) = match meta.direction {
        Direction::Ingress => ([entry.bytes, 0], [entry.packets, 0]),
        Direction::Egress => ([0, entry.bytes], [0, entry.packets]),
    };
    send(event, kind)
}

#[inline(always)]
fn fill(event: &mut FlowEvent, kind: EventKind, key: &FlowKey, verdict: &Verdict, meta: &Meta) {
    event.time = meta.now;
    event.key = *key;
    event.remote = verdict.remote;
    event.local = verdict.local;
    event.rule = verdict.rule;
    event.peer = verdict.state.peer;
    event.kind = kind as u8;
    event.reason = stats::number(verdict);
    event.tcp = 0;
    event.length = meta.bytes as u32;
}

#[inline(always)]
fn send(event: &FlowEvent, kind: EventKind) -> u32 {
    let wake = if EVENTS.query(u64::from(BPF_RB_AVAIL_DATA)) > PLENTY {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    };
    match EVENTS.output::<FlowEvent>(event, u64::from(wake)) {
        Ok(()) => 0,
        Err(_) => lose(kind),
    }
}

/// Whether an event of the flow may be told; otherwise it is counted as lost. The peer of a flow that was
/// opened has been asked already, when the flow was counted.
#[inline(always)]
pub fn is_heard(kind: EventKind, verdict: &Verdict, now: u64, asked: &Asked) -> bool {
    let heard = match verdict.effect {
        Effect::Open => asked.heard.get() != 0 && kind_has_token(kind, now),
        _ => has_token(kind, verdict.state.peer, now),
    };
    if !heard {
        lose(kind);
    }
    heard
}

/// Whether there is a token for an event about this peer, and one for its kind. Revocations cost their
/// peer nothing: there are never more of them than flows.
#[inline(always)]
fn has_token(kind: EventKind, peer: u32, now: u64) -> bool {
    if !matches!(kind, EventKind::Revoked) {
        let Some(load) = peers::load(peer) else {
            return false;
        };
        // SAFETY: the pointer that the look-up returned.
        if !unsafe { take(&raw mut (*load).events, now, &PEER_RATE) } {
            return false;
        }
    }
    kind_has_token(kind, now)
}

#[inline(always)]
fn kind_has_token(kind: EventKind, now: u64) -> bool {
    match EVENT_TOKENS.get_ptr_mut(kind as u32) {
        // SAFETY: the slot of this CPU.
        Some(tokens) => unsafe { take(tokens, now, &KIND_RATE) },
        None => false,
    }
}

/// SAFETY: `bucket` points to one.
#[inline(always)]
pub unsafe fn take(bucket: *mut Bucket, now: u64, rate: &Rate) -> bool {
    // SAFETY: the caller's word.
    unsafe {
        if !(*bucket).has(now, rate) {
            return false;
        }
        *bucket = (*bucket).taken(now, rate);
    }
    true
}

#[inline(always)]
fn lose(kind: EventKind) -> u32 {
    if let Some(lost) = EVENT_LOST.get_ptr_mut(kind as u32) {
        // SAFETY: the slot of this CPU.
        unsafe { *lost += 1 };
    }
    0
}
