//! Counters by reason and rule, and aya-log.

use aya_log_ebpf::info;
use mesh_common::maps::{self, Count};
use mesh_common::{Effect, Verdict};

use crate::maps::{REASON_CTR, RULE_CTR};
use crate::meta::Meta;
use crate::scratch::scratch;

/// What [`count`] does for a packet that passes and that no rule is asked for.
#[inline(always)]
pub fn passed(meta: &Meta) {
    if let Some(count) = REASON_CTR.get_ptr_mut(maps::reason_slot(None, meta.direction)) {
        // SAFETY: the slot of this CPU, on which nothing else of ours runs meanwhile.
        unsafe { add(count, meta) };
    }
}

/// Every packet counts by outcome. Rules count the flows that they admitted and the packets that they
/// refused; what an admitted flow carries is in its own entry, which saves the second look-up here.
#[inline(always)]
pub fn count(verdict: &Verdict, meta: &Meta) {
    if let Some(count) = REASON_CTR.get_ptr_mut(maps::reason_slot(verdict.drop, meta.direction)) {
        // SAFETY: the slot of this CPU, on which nothing else of ours runs meanwhile.
        unsafe { add(count, meta) };
    }
    if verdict.is_decision() && verdict.rule.0 != 0 {
        if let Some(count) = RULE_CTR.get_ptr_mut(verdict.rule.0) {
            // SAFETY: as above.
            unsafe { add(count, meta) };
        }
    }
}

#[inline(always)]
unsafe fn add(count: *mut Count, meta: &Meta) {
    // SAFETY: the caller's look-up returned the pointer.
    unsafe {
        (*count).packets += u64::from(meta.segments);
        (*count).bytes += meta.bytes;
    }
}

#[inline(always)]
pub fn number(verdict: &Verdict) -> u8 {
    match verdict.drop {
        Some(reason) => reason as u8,
        None => maps::PASSED,
    }
}

/// One line for the packet that was judged, if it opens a flow (reason 0) or is dropped.
///
/// A global function, because formatting is much for a verifier to follow more than once.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn log_verdict() -> u32 {
    let Some(scratch) = scratch() else {
        return 0;
    };
    // SAFETY: the slot of this CPU, both written before anything is logged.
    let (facts, verdict) = unsafe {
        (
            (*scratch).facts.assume_init_ref(),
            (*scratch).verdict.assume_init_ref(),
        )
    };
    if verdict.passes() && !matches!(verdict.effect, Effect::Open) {
        return 0;
    }
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
    0
}
