//! Counters by reason and rule, events, and aya-log.

use aya_log_ebpf::info;
use mesh_common::event::DropEvent;
use mesh_common::flow::{FlowKey, Stage};
use mesh_common::maps::{self, Count};
use mesh_common::{Direction, Effect, Facts, Verdict};

use crate::maps::{EVENTS, REASON_CTR, RULE_CTR};
use crate::tables::Size;

/// Every packet counts by outcome. Rules count the flows that they admitted and the packets that they
/// refused; what an admitted flow carries is in its own entry, which saves the second look-up here.
#[inline(always)]
pub fn count(verdict: &Verdict, direction: Direction, size: Size) {
    if let Some(count) = REASON_CTR.get_ptr_mut(maps::reason_slot(verdict.drop, direction)) {
        // SAFETY: the slot of this CPU, on which nothing else of ours runs meanwhile.
        unsafe { add(count, size) };
    }
    let decides = match verdict.effect {
        Effect::Write(Stage::HalfOpen) => true,
        _ => !verdict.passes(),
    };
    if decides && verdict.rule.0 != 0 {
        if let Some(count) = RULE_CTR.get_ptr_mut(verdict.rule.0) {
            // SAFETY: as above.
            unsafe { add(count, size) };
        }
    }
}

#[inline(always)]
unsafe fn add(count: *mut Count, size: Size) {
    // SAFETY: the caller's look-up returned the pointer.
    unsafe {
        (*count).packets += u64::from(size.segments);
        (*count).bytes += size.bytes;
    }
}

/// Tells the agent of a dropped packet.
#[inline(always)]
pub fn report(
    key: &FlowKey,
    direction: Direction,
    tcp: u8,
    verdict: &Verdict,
    now: u64,
    size: Size,
) {
    let Some(mut event) = EVENTS.reserve::<DropEvent>(0) else {
        let lost = maps::events_lost_slot(direction);
        if let Some(count) = REASON_CTR.get_ptr_mut(lost) {
            // SAFETY: the slot of this CPU.
            unsafe { add(count, size) };
        }
        return;
    };
    event.write(DropEvent {
        time: now,
        remote: key.remote,
        local: key.local,
        remote_port: key.remote_port,
        local_port: key.local_port,
        proto: key.proto,
        direction: direction as u8,
        reason: number(verdict),
        tcp,
        remote_identity: verdict.remote,
        local_identity: verdict.local,
        rule: verdict.rule,
        length: size.bytes as u32,
    });
    event.submit(0);
}

#[inline(always)]
fn number(verdict: &Verdict) -> u8 {
    match verdict.drop {
        Some(reason) => reason as u8,
        None => maps::PASSED,
    }
}

/// One line per flow that opens or moves on (reason 0), and per dropped packet.
#[inline(never)]
pub fn log(facts: &Facts, verdict: &Verdict) {
    info!(
        &(),
        "reason {} direction {} proto {} remote {:i} port {} local {:i} port {} identities {} {} rule {}",
        number(verdict),
        facts.direction as u8,
        facts.key.proto,
        facts.key.remote.octets(),
        facts.key.remote_port.get(),
        facts.key.local.octets(),
        facts.key.local_port.get(),
        verdict.remote.0,
        verdict.local.0,
        verdict.rule.0
    );
}
