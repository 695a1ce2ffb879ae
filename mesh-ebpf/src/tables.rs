//! The maps as [`decide`](mesh_common::decide) asks for them, and its effects carried out.
//!
//! The generation is read once, before any look-up, and stamped into whatever is written: a swap of
//! the policy in between makes the entry stale, never wrong.

use core::cell::Cell;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use core::ptr;

use aya_ebpf::maps::lpm_trie::Key;
use mesh_common::flow::{FlowEntry, FlowKey, FlowState, FragmentEntry, FragmentKey, Stage};
use mesh_common::policy::PolicyPrefix;
use mesh_common::verdict::{Lookup, STICKY};
use mesh_common::{Address, Direction, Effect, Facts, IdentityEntry, PolicyEntry, PolicyKey, Verdict};

use crate::maps::{CT_EST, CT_NEW, FRAG, ID_CIDR, ID_EXACT, POL};

pub struct Tables {
    generation: u32,
    /// Entries that a look-up has found, so that its effect needs no second one.
    established: Cell<*mut FlowEntry>,
    half_open: Cell<*mut FlowEntry>,
}

impl Tables {
    #[inline(always)]
    pub fn new(generation: u32) -> Self {
        Self {
            generation,
            established: Cell::new(ptr::null_mut()),
            half_open: Cell::new(ptr::null_mut()),
        }
    }

    /// Remembers what the verdict wants remembered. A full table forgets, which costs the flow its
    /// state and grants nobody anything.
    #[inline(always)]
    pub fn carry_out(&self, facts: &Facts, verdict: &Verdict, size: Size) {
        match verdict.effect {
            Effect::Nothing => {}
            Effect::Touch(Stage::Established) => touch(self.established.get(), facts, verdict, size),
            Effect::Touch(Stage::HalfOpen) => touch(self.half_open.get(), facts, verdict, size),
            Effect::Write(stage) => self.write(stage, facts, verdict, size),
        }
    }

    #[inline(always)]
    fn write(&self, stage: Stage, facts: &Facts, verdict: &Verdict, size: Size) {
        let (established, half_open) = (self.established.get(), self.half_open.get());
        let mut entry = FlowEntry {
            state: verdict.state,
            packets: [0; 2],
            bytes: [0; 2],
            spare: 0,
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
            }
        }
        match facts.direction {
            Direction::Ingress => {
                entry.packets[0] += size.segments;
                entry.bytes[0] += size.bytes;
            }
            Direction::Egress => {
                entry.packets[1] += size.segments;
                entry.bytes[1] += size.bytes;
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

/// What one buffer counts for: GSO and GRO carry many packets in one.
#[derive(Clone, Copy)]
pub struct Size {
    pub segments: u32,
    pub bytes: u64,
}

/// In place, so only what grants nothing if the entry has become another flow's meanwhile.
#[inline(always)]
fn touch(entry: *mut FlowEntry, facts: &Facts, verdict: &Verdict, size: Size) {
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
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(packets, size.segments);
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(bytes, size.bytes);
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
    fn policy(&self, key: &PolicyKey) -> Option<PolicyEntry> {
        let policy = POL.get(0)?;
        let key = Key::new(PolicyPrefix::EXACT, *key);
        policy.get(&key).copied()
    }
}
