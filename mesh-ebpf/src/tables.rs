//! The maps as [`decide`](mesh_common::decide) asks for them, and its effects carried out.
//!
//! The generation is read before anything that it vouches for is looked up, and stamped into whatever is written: a
//! change of the policy in between makes the entry stale, never wrong.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::maps::lpm_trie::Key;
use mesh_common::budget::{Bucket, ICMP_ERRORS};
use mesh_common::event::PEER_RATE;
use mesh_common::flow::{Flow, FlowKey, FlowState, FragmentEntry, FragmentKey, Stage, flags};
use mesh_common::identity::Identified;
use mesh_common::maps::Config;
use mesh_common::place::Place;
use mesh_common::verdict::{Lookup, rate};
use mesh_common::{
    Address, Direction, Effect, Facts, IdentityEntry, PolicyEntry, PolicyKey, Verdict,
};

use crate::maps::{CT_EST, FRAG, ID_CIDR, ID_EXACT};
use crate::meta::Meta;
use crate::scratch::Asked;
use crate::{established, events, half_open, peers, policy};

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
                if let Some(found) = established::find(self.place(), &facts.key) {
                    // SAFETY: the pointer that the look-up returned.
                    unsafe { established::grow(found, verdict, meta, &mut flow.entry) };
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
                if let Some(load) = peers::load(verdict.state.peer) {
                    // SAFETY: the pointer that the look-up returned.
                    unsafe { (*load).errors = (*load).errors.taken(meta.now, &ICMP_ERRORS) };
                }
            }
        }
    }

    #[inline(always)]
    fn established(&self, key: &FlowKey) -> Option<FlowState> {
        let found = established::find(self.place(), key)?;
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
            if let Some(load) = peers::load(verdict.state.peer) {
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
            } else if let Some(before) = established::find(self.place(), &facts.key) {
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
            if was_established {
                self.disestablish(&facts.key);
            }
        }
        0
    }

    /// Takes the flow out of `ct_est`, and out of what whoever opened it holds: another end may open it anew.
    #[inline(always)]
    fn disestablish(&self, key: &FlowKey) {
        if let Some(before) = established::find(self.place(), key) {
            // SAFETY: the pointer that the look-up returned.
            let (peer, opened) = unsafe { ((*before).state.peer, (*before).state.opened()) };
            if CT_EST.remove(self.place()).is_ok() {
                peers::count(peer, opened, u32::MAX);
            }
        }
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
            peers::count(flow.entry.state.peer, flow.entry.state.opened(), 1);
            return true;
        }
        // Another CPU may have done so since we looked.
        established::find(self.place(), &facts.key).is_some()
    }
}

/// A function of its own, or whoever asks has a frame for all the words that meet here.
#[inline(never)]
fn place_of(key: &FlowKey, config: &Config) -> Place {
    Place::of(key, &config.secret)
}

/// Whether neither table holds a flow that was not found established. One that becomes so is put there before it is
/// taken from among the half-open, so whoever comes at that moment must ask once more. Not who `opens` a connection: of
/// that packet the policy is asked as of any that opens one, and if it passes a half-open flow stands beside the
/// established one until it is too old.
#[inline(always)]
pub fn is_absent(place: &Place, key: &FlowKey, opens: bool) -> bool {
    !half_open::may_hold(*place) && (opens || established::find(place, key).is_none())
}

/// In place, because an entry that user space replaces is given to the next address at once, and a program that has
/// just found it would read who stands behind that. What is read meanwhile does not change: it is the other side.
#[inline(always)]
pub fn identify(told: &Identified) -> bool {
    let Some(sides) = ID_EXACT.get_ptr_mut(told.address) else {
        return false;
    };
    // SAFETY: the pointer that the look-up returned; user space takes turns.
    unsafe { sides.write(told.sides) };
    true
}

/// Who stands behind an address: its own entry, else the longest prefix's.
#[inline(always)]
fn identity<'a>(address: &Address, asked: &'a Asked) -> &'a IdentityEntry {
    // SAFETY: of an entry user space changes only the side that nobody reads, and where it has removed one it waits
    // until we are done.
    let exact = unsafe { ID_EXACT.get(address) };
    match exact.or_else(|| ID_CIDR.get(Key::new(128, *address))) {
        Some(sides) => sides.at(asked.generation),
        None => &asked.nobody,
    }
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
        *identity(address, self.asked)
    }

    #[inline(always)]
    fn local(&self, address: &Address) -> IdentityEntry {
        let known = &self.asked.local;
        // What is behind an address is the same for as long as a generation lasts.
        let now = self.asked.generation;
        if known.generation.get() == now && known.address.get().is_same(address) {
            return known.entry.get();
        }
        let entry = self.identity(address);
        known.generation.set(now);
        known.address.set(*address);
        known.entry.set(entry);
        entry
    }

    #[inline(always)]
    fn policy(&self, key: &PolicyKey) -> PolicyEntry {
        policy::entry(key, self.asked.generation)
    }

    #[inline(always)]
    fn new_flows(&self, peer: u32, opened: Direction) -> Bucket {
        peers::new_flows(peer, opened)
    }

    #[inline(always)]
    fn is_share_taken(&self, peer: u32, opened: Direction) -> bool {
        peers::held(peer, opened) >= self.config.peer_flows.cast_signed()
    }

    #[inline(always)]
    fn icmp_errors(&self, peer: u32) -> Bucket {
        peers::icmp_errors(peer)
    }

    #[inline(always)]
    fn pickup_until(&self) -> u64 {
        self.config.pickup_until
    }
}
