//! The table of [half-open flows](mesh_common::half_open), under the locks of its sets.
//!
//! While a lock is held no function may be called, so all of this is inlined, and what is long has
//! functions of its own around a whole look-up.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::bpf_spin_lock;
use aya_ebpf::helpers::{bpf_spin_lock, bpf_spin_unlock};
use mesh_common::Verdict;
use mesh_common::flow::{FlowEntry, FlowKey, FlowState, Revocation, flags};
use mesh_common::half_open::Set;
use mesh_common::maps::Config;
use mesh_common::place::Place;

use crate::established;
use crate::maps::{CFG, CT_NEW};
use crate::meta::Meta;

/// Whether the table may hold the flow. No is right, unless another CPU has just changed that.
#[inline(always)]
pub fn may_hold(place: Place) -> bool {
    let Some(config) = CFG.get(0) else {
        return false;
    };
    match CT_NEW.get(place.set(config.half_open_mask)) {
        Some(set) => set.position(place.tag()).is_some(),
        None => false,
    }
}

/// Does something with a flow's set.
#[inline(always)]
fn locked(place: Place, act: impl FnOnce(&mut Set)) {
    let Some(config) = CFG.get(0) else {
        return;
    };
    if let Some(set) = CT_NEW.get_ptr_mut(place.set(config.half_open_mask)) {
        // SAFETY: the pointer that the look-up returned; whoever else reads or changes a flow of the set waits
        // until we have unlocked it. [`may_hold`] does not, and reads tags alone.
        unsafe {
            let lock = (&raw mut (*set).lock).cast::<bpf_spin_lock>();
            bpf_spin_lock(lock);
            act(&mut *set);
            bpf_spin_unlock(lock);
        }
    }
}

/// Whether the table holds the flow; if so, the state is written.
#[inline(never)]
pub fn find(place: Place, key: &FlowKey, state: &mut MaybeUninit<FlowState>) -> u32 {
    let mut found = 0;
    locked(place, |set| {
        if let Some(entry) = set.get(place.tag(), key) {
            state.write(entry.state);
            found = 1;
        }
    });
    found
}

/// Takes over what the flow has carried so far, and since when.
#[inline(never)]
pub fn carried(place: Place, key: &FlowKey, entry: &mut FlowEntry) -> u32 {
    locked(place, |set| {
        if let Some(before) = set.get(place.tag(), key) {
            entry.packets = before.packets;
            entry.bytes = before.bytes;
            entry.opened = before.opened;
        }
    });
    0
}

/// Puts the flow there, in its own place or another's.
#[inline(never)]
pub fn put(place: Place, key: &FlowKey, entry: &FlowEntry) -> u32 {
    locked(place, |set| set.put(place.tag(), key, entry));
    0
}

#[inline(never)]
pub fn remove(place: Place, key: &FlowKey) -> u32 {
    locked(place, |set| set.remove(place.tag(), key));
    0
}

/// Counts a packet and adds the flags that it brings. `entry` is the flow afterwards.
#[inline(never)]
pub fn grow(
    place: Place,
    key: &FlowKey,
    verdict: &Verdict,
    meta: &Meta,
    entry: &mut FlowEntry,
) -> u32 {
    locked(place, |set| {
        set.change(place.tag(), key, |found| {
            // SAFETY: an entry whose lock we hold.
            unsafe { established::grow(found, verdict, meta, entry) };
        });
    });
    0
}

/// Leaves the tombstone that the flow's next packet would have left, if it was last judged under another policy.
#[inline(never)]
pub fn revoke(ended: &Revocation, config: &Config) -> u32 {
    let place = Place::of(&ended.key, &config.secret);
    locked(place, |set| {
        set.change(place.tag(), &ended.key, |entry| {
            let state = &mut entry.state;
            if state.generation != config.generation {
                state.generation = config.generation;
                state.flags |= flags::DENIED;
                state.remote = ended.remote;
                state.local = ended.local;
                state.rule = ended.rule;
                state.peer = ended.peer;
            }
        });
    });
    0
}
