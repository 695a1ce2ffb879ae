//! The maps as [`decide`](mesh_common::decide) asks for them, and its effects carried out.
//!
//! The generation is read once, before any look-up, and stamped into whatever is written: a swap of
//! the policy in between makes the entry stale, never wrong.

use core::cell::Cell;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use core::mem::MaybeUninit;
use core::ptr;

use aya_ebpf::maps::lpm_trie::Key;
use mesh_common::flow::{FlowEntry, FlowKey, FlowState, FragmentEntry, FragmentKey, Stage};
use mesh_common::policy::PolicyPrefix;
use mesh_common::verdict::{Lookup, STICKY};
use mesh_common::{
    Address, Direction, Effect, Facts, IdentityEntry, PolicyEntry, PolicyKey, Verdict,
};

use crate::maps::{CT_EST, CT_NEW, FRAG, ID_CIDR, ID_EXACT, POL};

pub struct Tables {
    generation: u32,
    /// Entries that a look-up has found, so that its effect needs no second one.
    established: Cell<*mut FlowEntry>,
    half_open: Cell<*mut FlowEntry>,
}

impl Tables {
    /// In place and by volatile writes, or the compiler makes it a call of memset, which writes byte by
    /// byte: the verifier then no longer sees that a pointer of eight such bytes is null.
    #[inline(always)]
    pub fn new(place: &mut MaybeUninit<Self>, generation: u32) -> &mut Self {
        let new = place.as_mut_ptr();
        // SAFETY: every field is written, through pointers to a variable that we hold alone.
        unsafe {
            (&raw mut (*new).generation).write_volatile(generation);
            (&raw mut (*new).established).write_volatile(Cell::new(ptr::null_mut()));
            (&raw mut (*new).half_open).write_volatile(Cell::new(ptr::null_mut()));
            place.assume_init_mut()
        }
    }

    /// Remembers what the verdict wants remembered. A full table forgets, which costs the flow its
    /// state and grants nobody anything.
    #[inline(always)]
    pub fn carry_out(&self, facts: &Facts, verdict: &Verdict, meta: &Meta) {
        match verdict.effect {
            Effect::Nothing => {}
            Effect::TouchEstablished => touch(self.established.get(), facts, verdict, meta),
            Effect::TouchHalfOpen => touch(self.half_open.get(), facts, verdict, meta),
            Effect::WriteEstablished => self.write(Stage::Established, facts, verdict, meta),
            Effect::WriteHalfOpen => self.write(Stage::HalfOpen, facts, verdict, meta),
        }
    }

    #[inline(never)]
    fn write(&self, stage: Stage, facts: &Facts, verdict: &Verdict, meta: &Meta) {
        let (established, half_open) = (self.established.get(), self.half_open.get());
        let mut entry = FlowEntry {
            state: verdict.state,
            packets: [0; 2],
            bytes: [0; 2],
            opened: meta.now,
        };
        let continues = match stage {
            Stage::Established if established.is_null() => half_open,
            Stage::Established => established,
            Stage::HalfOpen if established.is_null() => half_open,
            Stage::HalfOpen => ptr::null_mut(),
        };
        if !continues.is_null() {
            // SAFETY: a pointer that a look-up of this program run returned.
            unsafe {
                entry.packets = (*continues).packets;
                entry.bytes = (*continues).bytes;
                entry.opened = (*continues).opened;
            }
        }
        match facts.direction {
            Direction::Ingress => {
                entry.packets[0] += meta.segments;
                entry.bytes[0] += meta.bytes;
            }
            Direction::Egress => {
                entry.packets[1] += meta.segments;
                entry.bytes[1] += meta.bytes;
            }
        }
        match stage {
            Stage::Established => {
                if CT_EST.insert(&facts.key, &entry, 0).is_ok() {
                    if !half_open.is_null() {
                        let _ = CT_NEW.remove(&facts.key);
                    }
                } else {
                    // No room among the confirmed: it stays with the half-open, and passes.
                    let _ = CT_NEW.insert(&facts.key, &entry, 0);
                }
            }
            Stage::HalfOpen => {
                let _ = CT_NEW.insert(&facts.key, &entry, 0);
                if !established.is_null() {
                    let _ = CT_EST.remove(&facts.key);
                }
            }
        }
    }
}

/// What is known of a buffer before its headers are read.
#[derive(Clone, Copy)]
pub struct Meta {
    pub now: u64,
    pub bytes: u64,
    /// GSO and GRO carry many packets in one.
    pub segments: u32,
    pub direction: Direction,
}

/// In place, so only what grants nothing if the entry has become another flow's meanwhile.
#[inline(always)]
fn touch(entry: *mut FlowEntry, facts: &Facts, verdict: &Verdict, meta: &Meta) {
    if entry.is_null() {
        return;
    }
    // SAFETY: a pointer that a look-up of this program run returned. Other CPUs may write too:
    // times race to nearly the same value, counters are atomic, flags are only ever added.
    unsafe {
        (*entry).state.last_seen = verdict.state.last_seen;
        let added = verdict.state.flags & STICKY & !(*entry).state.flags;
        if added != 0 {
            (*entry).state.flags |= added;
        }
        let (packets, bytes) = match facts.direction {
            Direction::Ingress => (&raw mut (*entry).packets[0], &raw mut (*entry).bytes[0]),
            Direction::Egress => (&raw mut (*entry).packets[1], &raw mut (*entry).bytes[1]),
        };
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(packets, meta.segments);
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(bytes, meta.bytes);
    }
}

/// Who stands behind an address: its own entry, else the longest prefix's.
#[inline(always)]
pub fn identity(address: &Address) -> IdentityEntry {
    // SAFETY: the entry is copied at once; user space replaces entries whole.
    if let Some(entry) = unsafe { ID_EXACT.get(address) } {
        return *entry;
    }
    match ID_CIDR.get(Key::new(128, *address)) {
        Some(entry) => *entry,
        None => IdentityEntry::UNKNOWN,
    }
}

impl Lookup for Tables {
    #[inline(always)]
    fn generation(&self) -> u32 {
        self.generation
    }

    #[inline(always)]
    fn flow(&self, stage: Stage, key: &FlowKey) -> Option<FlowState> {
        let (found, slot) = match stage {
            Stage::Established => (CT_EST.get_ptr_mut(key)?, &self.established),
            Stage::HalfOpen => (CT_NEW.get_ptr_mut(key)?, &self.half_open),
        };
        slot.set(found);
        // SAFETY: the pointer that the look-up returned, and not null.
        Some(unsafe { (*found).state })
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentEntry> {
        // SAFETY: copied at once.
        unsafe { FRAG.get(key) }.copied()
    }

    #[inline(always)]
    fn identity(&self, address: &Address) -> IdentityEntry {
        identity(address)
    }

    #[inline(always)]
    fn policy(&self, key: &PolicyKey) -> PolicyEntry {
        let Some(policy) = POL.get(0) else {
            return PolicyEntry::NONE;
        };
        let key = Key::new(PolicyPrefix::EXACT, *key);
        match policy.get(&key) {
            Some(entry) => *entry,
            None => PolicyEntry::NONE,
        }
    }
}
