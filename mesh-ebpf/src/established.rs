//! The table of established flows, and how an entry, of either table, grows by a packet.
//!
//! Another flow may lie in a flow's [place](mesh_common::place), so its whole key is compared.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use mesh_common::flow::{FlowEntry, FlowKey};
use mesh_common::place::Place;
use mesh_common::verdict::STICKY;
use mesh_common::{Direction, Verdict};

use crate::maps::CT_EST;
use crate::meta::Meta;

/// [`get`], for whoever has no room for it on the stack.
#[inline(never)]
pub fn find(place: &Place, key: &FlowKey) -> Option<*mut FlowEntry> {
    get(place, key)
}

/// The flow, if `ct_est` holds it.
#[inline(always)]
pub fn get(place: &Place, key: &FlowKey) -> Option<*mut FlowEntry> {
    let flow = CT_EST.get_ptr_mut(place)?;
    // SAFETY: the pointer that the look-up returned.
    unsafe { is_same(&raw const (*flow).key, key).then(|| &raw mut (*flow).entry) }
}

/// Volatile, or a compiler keeps all words of a key that it has just put together, on the stack beside the key.
///
/// SAFETY: both can be read.
#[inline(always)]
unsafe fn is_same(a: *const FlowKey, b: *const FlowKey) -> bool {
    const _: () = assert!(size_of::<FlowKey>() == size_of::<[u64; 5]>());
    const _: () = assert!(align_of::<FlowKey>() == align_of::<[u64; 5]>());
    let (a, b) = (a.cast::<u64>(), b.cast::<u64>());
    let mut differ = 0;
    for word in 0..5 {
        // SAFETY: the caller's word.
        differ |= unsafe { a.add(word).read_volatile() ^ b.add(word).read_volatile() };
    }
    differ == 0
}

/// [`touch`], and what else the packet has changed. `entry` is the flow afterwards, if the verdict has an event.
///
/// SAFETY: as of [`touch`].
#[inline(always)]
pub unsafe fn grow(found: *mut FlowEntry, verdict: &Verdict, meta: &Meta, entry: &mut FlowEntry) {
    // SAFETY: the caller's word. Flags are only ever added.
    unsafe {
        touch(found, meta, verdict.state.last_seen);
        let added = verdict.state.flags & STICKY & !(*found).state.flags;
        if added != 0 {
            (*found).state.flags |= added;
        }
        if verdict.event.is_some() {
            *entry = *found;
        }
    }
}

/// In place, so only what grants nothing if the entry has become another flow's meanwhile. Other CPUs
/// may write too: times race to nearly the same value, counters are atomic.
///
/// SAFETY: `entry` is a pointer that a look-up of this program run returned.
#[inline(always)]
pub unsafe fn touch(entry: *mut FlowEntry, meta: &Meta, now: u64) {
    // SAFETY: the caller's word.
    unsafe {
        (*entry).state.last_seen = now;
        let (packets, bytes) = match meta.direction {
            Direction::Ingress => (&raw mut (*entry).packets[0], &raw mut (*entry).bytes[0]),
            Direction::Egress => (&raw mut (*entry).packets[1], &raw mut (*entry).bytes[1]),
        };
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(packets, meta.segments);
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(bytes, meta.bytes);
    }
}
