//! The maps as [`decide`](mesh_common::decide) asks for them, and its effects carried out.
//!
//! The generation is read before anything that it vouches for is looked up, and stamped into whatever is written: a
//! swap of the policy in between makes the entry stale, never wrong.

use core::intrinsics::{AtomicOrdering, atomic_xadd};
use core::mem::MaybeUninit;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::maps::lpm_trie::Key;
use mesh_common::budget::{self, ICMP_ERRORS, PeerLoad};
use mesh_common::event::PEER_RATE;
use mesh_common::flow::{
    Flow, FlowEntry, FlowKey, FlowState, FragmentEntry, FragmentKey, Stage, flags,
};
use mesh_common::maps::Config;
use mesh_common::place::Place;
use mesh_common::policy::{Bucket, Row, RowKey, RuleId, find, longest};
use mesh_common::verdict::{Lookup, STICKY, rate};
use mesh_common::{
    Address, Be16, Be32, Direction, Effect, Facts, IdentityEntry, PolicyEntry, PolicyKey, Verdict,
};

use crate::maps::{CT_EST, FRAG, ID_CIDR, ID_EXACT, PEER_FREED, PEER_LOAD, POL};
use crate::meta::Meta;
use crate::scratch::Asked;
use crate::{events, half_open};

pub struct Tables<'a> {
    config: &'a Config,
    asked: &'a Asked,
}

impl<'a> Tables<'a> {
    #[inline(always)]
    pub fn new(config: &'a Config, asked: &'a Asked) -> Self {
        Self { config, asked }
    }

    /// Notes where the flow would lie. Of one that is known to be new it was noted before.
    #[inline(always)]
    pub fn note_place(&self, key: &FlowKey) {
        if self.asked.absent != 0 {
            return;
        }
        self.asked.place.set(place_of(key, self.config));
    }

    /// As a map's key, where it is noted: that takes no stack.
    #[inline(always)]
    fn place(&self) -> &Place {
        // SAFETY: nobody writes it once it is noted.
        unsafe { &*self.asked.place.as_ptr() }
    }

    /// Remembers what the verdict wants remembered. A full table forgets, which costs the flow its
    /// state and grants nobody anything. `flow.entry` is the flow afterwards, if the verdict has an event; its key
    /// is there to be written.
    #[inline(always)]
    pub fn carry_out(&self, facts: &Facts, verdict: &Verdict, meta: &Meta, flow: &mut Flow) {
        match verdict.effect {
            Effect::Nothing => {}
            Effect::TouchEstablished => {
                if let Some(found) = find_established(self.place(), &facts.key) {
                    // SAFETY: the pointer that the look-up returned.
                    unsafe { grow(found, verdict, meta, &mut flow.entry) };
                }
            }
            Effect::TouchHalfOpen => {
                let place = self.asked.place.get();
                half_open::grow(place, &facts.key, verdict, meta, &mut flow.entry);
            }
            Effect::WriteEstablished | Effect::WriteHalfOpen | Effect::Open => {
                self.write(facts, verdict, meta, flow);
            }
            Effect::Report => {
                if let Some(load) = load(verdict.state.peer) {
                    // SAFETY: the pointer that the look-up returned.
                    unsafe { (*load).errors = (*load).errors.taken(meta.now, &ICMP_ERRORS) };
                }
            }
        }
    }

    #[inline(always)]
    fn established(&self, key: &FlowKey) -> Option<FlowState> {
        let found = find_established(self.place(), key)?;
        self.asked.established.set(1);
        // SAFETY: the pointer that the look-up returned.
        Some(unsafe { (*found).state })
    }

    #[inline(never)]
    fn write(&self, facts: &Facts, verdict: &Verdict, meta: &Meta, flow: &mut Flow) -> u32 {
        let (was_established, was_half_open) = (
            self.asked.established.get() != 0,
            self.asked.half_open.get() != 0,
        );
        let place = self.asked.place.get();
        let entry = &mut flow.entry;
        let opened = verdict.state.opened();
        let mut stage = Stage::HalfOpen;
        entry.state = verdict.state;
        // Word by word: see `Asked::begin`.
        // SAFETY: fields of a value that we hold alone.
        unsafe {
            (&raw mut entry.packets[0]).write_volatile(0);
            (&raw mut entry.packets[1]).write_volatile(0);
            (&raw mut entry.bytes[0]).write_volatile(0);
            (&raw mut entry.bytes[1]).write_volatile(0);
        }
        entry.opened = meta.now;
        if matches!(verdict.effect, Effect::Open) {
            if let Some(load) = load(verdict.state.peer) {
                // SAFETY: the pointer that the look-up returned.
                unsafe {
                    let tokens = &mut (*load).new[opened as usize & 1];
                    *tokens = tokens.taken(meta.now, rate(opened));
                    let heard = events::take(&raw mut (*load).events, meta.now, &PEER_RATE);
                    self.asked.heard.set(u32::from(heard));
                }
            }
            // One that was running already.
            if verdict.state.flags & flags::CONFIRMED != 0
                && !self.is_share_taken(verdict.state.peer, opened)
            {
                stage = Stage::Established;
            }
        } else {
            if matches!(verdict.effect, Effect::WriteEstablished) {
                stage = Stage::Established;
            }
            if !was_established {
                half_open::carried(place, &facts.key, entry);
            } else if let Some(before) = find_established(self.place(), &facts.key) {
                // SAFETY: the pointer that the look-up returned.
                unsafe {
                    entry.packets = (*before).packets;
                    entry.bytes = (*before).bytes;
                    entry.opened = (*before).opened;
                }
            }
        }
        match meta.direction {
            Direction::Ingress => {
                entry.packets[0] += meta.segments;
                entry.bytes[0] += meta.bytes;
            }
            Direction::Egress => {
                entry.packets[1] += meta.segments;
                entry.bytes[1] += meta.bytes;
            }
        }
        if matches!(stage, Stage::Established) && self.establish(facts, flow, was_established) {
            if was_half_open {
                half_open::remove(place, &facts.key);
            }
        } else {
            half_open::put(place, &facts.key, &flow.entry);
            if was_established && CT_EST.remove(self.place()).is_ok() {
                held(verdict.state.peer, opened, u32::MAX);
            }
        }
        0
    }

    /// Puts the flow into `ct_est`; false if there is no room, or another in its place.
    #[inline(always)]
    fn establish(&self, facts: &Facts, flow: &mut Flow, was_established: bool) -> bool {
        flow.key = facts.key;
        if was_established {
            return CT_EST.insert(self.place(), &*flow, 0).is_ok();
        }
        if CT_EST
            .insert(self.place(), &*flow, u64::from(BPF_NOEXIST))
            .is_ok()
        {
            held(flow.entry.state.peer, flow.entry.state.opened(), 1);
            return true;
        }
        // Another CPU may have done so since we looked.
        find_established(self.place(), &facts.key).is_some()
    }
}

/// A function of its own, or whoever asks has a frame for all the words that meet here.
#[inline(never)]
pub fn place_of(key: &FlowKey, config: &Config) -> Place {
    Place::of(key, &config.secret)
}

/// Whether neither table holds a flow that was not found established. One that becomes so is put there before it is
/// taken from among the half-open, so whoever comes at that moment must ask once more.
#[inline(always)]
pub fn is_absent(place: &Place, key: &FlowKey) -> bool {
    !half_open::may_hold(*place) && find_established(place, key).is_none()
}

/// [`established`], for whoever has no room for it on the stack.
#[inline(never)]
fn find_established(place: &Place, key: &FlowKey) -> Option<*mut FlowEntry> {
    established(place, key)
}

/// The flow, if `ct_est` holds it.
#[inline(always)]
pub fn established(place: &Place, key: &FlowKey) -> Option<*mut FlowEntry> {
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

/// Counts a flow in or, by the greatest number, out.
#[inline(always)]
fn held(peer: u32, opened: Direction, by: u32) {
    if let Some(load) = load(peer) {
        // SAFETY: the pointer that the look-up returned.
        unsafe {
            let added = match opened {
                Direction::Ingress => &raw mut (*load).added[0],
                Direction::Egress => &raw mut (*load).added[1],
            };
            atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(added, by);
        }
    }
}

/// The peer's load, made if it has none yet.
#[inline(never)]
pub fn load(peer: u32) -> Option<*mut PeerLoad> {
    if let Some(load) = PEER_LOAD.get_ptr_mut(&peer) {
        return Some(load);
    }
    let mut none = MaybeUninit::<PeerLoad>::uninit();
    // Word by word: a call of memset would be one frame too many where each takes 32 bytes of the 512
    // at least (Linux 6.1).
    // SAFETY: the words of a variable that we hold alone, and all of them.
    let none = unsafe {
        let words = none.as_mut_ptr().cast::<u64>();
        for word in 0..size_of::<PeerLoad>() / size_of::<u64>() {
            words.add(word).write_volatile(0);
        }
        none.assume_init_ref()
    };
    let _ = PEER_LOAD.insert(&peer, none, u64::from(BPF_NOEXIST));
    PEER_LOAD.get_ptr_mut(&peer)
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

/// Who stands behind an address: its own entry, else the longest prefix's.
#[inline(always)]
fn identity<'a>(address: &Address, nobody: &'a IdentityEntry) -> &'a IdentityEntry {
    // SAFETY: the entry is copied at once; user space replaces entries whole.
    if let Some(entry) = unsafe { ID_EXACT.get(address) } {
        return entry;
    }
    ID_CIDR.get(Key::new(128, *address)).unwrap_or(nobody)
}

impl Lookup for Tables<'_> {
    #[inline(always)]
    fn generation(&self) -> u32 {
        self.asked.generation
    }

    #[inline(always)]
    fn flow(&self, stage: Stage, key: &FlowKey) -> Option<FlowState> {
        if self.asked.absent != 0 {
            return None;
        }
        match stage {
            Stage::Established => self.established(key),
            Stage::HalfOpen => {
                let mut state = MaybeUninit::uninit();
                let found = half_open::find(self.asked.place.get(), key, &mut state);
                self.asked.half_open.set(found);
                if found == 0 {
                    // Established since that was asked: see `is_absent`.
                    return self.established(key);
                }
                // SAFETY: it was written.
                Some(unsafe { state.assume_init() })
            }
        }
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentEntry> {
        // SAFETY: copied at once.
        unsafe { FRAG.get(key) }.copied()
    }

    #[inline(always)]
    fn identity(&self, address: &Address) -> IdentityEntry {
        *identity(address, &self.asked.nobody)
    }

    #[inline(always)]
    fn local(&self, address: &Address) -> IdentityEntry {
        let known = &self.asked.local;
        // Before the answer is looked for: by a later number it would pass for one of later.
        // SAFETY: a field of a value that is there.
        let now = unsafe { (&raw const self.config.identities).read_volatile() };
        if now == 0 {
            return self.identity(address);
        }
        if known.identities.get() == now && known.address.get().is_same(address) {
            return known.entry.get();
        }
        let entry = self.identity(address);
        known.identities.set(now);
        known.address.set(*address);
        known.entry.set(entry);
        entry
    }

    #[inline(always)]
    fn policy(&self, key: &PolicyKey) -> PolicyEntry {
        let about = u32::from(key.direction) << 24 | u32::from(key.proto) << 16;
        let about = about | u32::from(key.port.get());
        let answer = policy_entry(key.remote.get(), key.local.get(), about);
        PolicyEntry {
            flags: answer as u32,
            rule: RuleId((answer >> 32) as u32),
        }
    }

    #[inline(always)]
    fn new_flows(&self, peer: u32, opened: Direction) -> budget::Bucket {
        match PEER_LOAD.get_ptr(&peer) {
            // SAFETY: the pointer that the look-up returned.
            Some(load) => unsafe {
                match opened {
                    Direction::Ingress => (*load).new[0],
                    Direction::Egress => (*load).new[1],
                }
            },
            None => budget::Bucket::default(),
        }
    }

    #[inline(always)]
    fn is_share_taken(&self, peer: u32, opened: Direction) -> bool {
        let Some(load) = PEER_LOAD.get_ptr(&peer) else {
            return false;
        };
        let freed = PEER_FREED.get_ptr(&peer);
        // SAFETY: pointers that look-ups returned.
        let held = unsafe {
            let (added, freed) = match opened {
                Direction::Ingress => {
                    ((*load).added[0], freed.map_or(0, |freed| (*freed).freed[0]))
                }
                Direction::Egress => ((*load).added[1], freed.map_or(0, |freed| (*freed).freed[1])),
            };
            added.wrapping_sub(freed).cast_signed()
        };
        held >= self.config.peer_flows.cast_signed()
    }

    #[inline(always)]
    fn icmp_errors(&self, peer: u32) -> budget::Bucket {
        match PEER_LOAD.get_ptr(&peer) {
            // SAFETY: the pointer that the look-up returned.
            Some(load) => unsafe { (*load).errors },
            None => budget::Bucket::default(),
        }
    }

    #[inline(always)]
    fn pickup_until(&self) -> u64 {
        self.config.pickup_until
    }
}

/// What the longest row around a [`PolicyKey`] says: the flags, and above them the rule. `about` is the
/// direction, the protocol and the port, from above.
///
/// Global, because it is asked in many places; of numbers, because it is deep on the stack.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn policy_entry(remote: u32, local: u32, about: u32) -> u64 {
    let key = PolicyKey {
        remote: Be32::new(remote),
        local: Be32::new(local),
        direction: (about >> 24) as u8,
        proto: (about >> 16) as u8,
        port: Be16::new(about as u16),
    };
    let row = |at: &RowKey| Row::from_bits(policy_row(at.ends, at.about));
    let entry = longest(&key, row);
    u64::from(entry.rule.0) << 32 | u64::from(entry.flags)
}

/// The [`Row`] under this [`RowKey`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn policy_row(ends: u64, about: u32) -> u64 {
    let at = RowKey { ends, about };
    let row = match POL.get(0) {
        Some(slots) => find(&at, |slot| slots.get(slot).map(of_words)),
        None => Row::NOTHING,
    };
    row.to_bits()
}

/// The map's slots, for what they are.
#[inline(always)]
fn of_words(words: &[u64; 8]) -> &Bucket {
    const _: () = assert!(size_of::<Bucket>() == size_of::<[u64; 8]>());
    const _: () = assert!(align_of::<Bucket>() == align_of::<[u64; 8]>());
    // SAFETY: the bucket is eight words, every pattern of which is one; user space gives it up before
    // programs see it.
    unsafe { &*core::ptr::from_ref(words).cast() }
}
