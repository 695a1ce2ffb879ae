//! Half-open flows, in sets of seven as a processor's cache keeps its lines.
//!
//! What is hard is that whoever floods fills this table, and every new flow of everybody else's goes through it.
//! In an LRU hash map of the kernel a flow that is remembered costs six to seven cache misses, because another
//! must be found that makes room. Here a look-up in vain costs one and the flow two or three more: the oldest
//! of its own set makes room. Where a flow lies hangs on a secret, so nobody can compute whose flow that is.
//!
//! A set's lock (`bpf_spin_lock`, Linux 5.1) is held for whatever reads or changes a flow, so an entry never
//! becomes another's meanwhile.

use crate::flow::{Flow, FlowEntry, FlowKey};

/// Flows of a set.
pub const WAYS: usize = 7;
/// One peer that floods as fast as [`crate::budget::NEW_FLOWS`] lets it puts a flow into half of the sets each second,
/// and takes thirteen seconds to push half of the others' flows out.
pub const SETS: u32 = 8_192;
/// A step of [`Set::used`], as a power of two of nanoseconds: short beside a handshake, and so long that only after two
/// years the count begins anew, and a flow that was left in its set passes for a young one.
const STEP: u32 = 24;
/// Steps by which a flow may have been seen in the future: a second, as a processor may be taken away from whoever
/// has read the clock.
const AHEAD: u32 = 64;

/// The kernel knows it by this name, keeps user space's hands off it, and says which program forgets to
/// unlock.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct bpf_spin_lock {
    value: u32,
}

/// The value of `ct_new`. All zero, as the kernel makes it, it holds no flow.
///
/// The first cache line is all that a look-up in vain reads.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Set {
    pub lock: bpf_spin_lock,
    pad: u32,
    /// Part of each flow's hash; 0 where there is none. No two are alike.
    tags: [u32; WAYS],
    /// When a packet of each was last seen, in [`STEP`]s.
    used: [u32; WAYS],
    flows: [Flow; WAYS],
    pad2: [u64; 5],
}

const _: () = assert!(size_of::<Set>() == 13 * 64);

impl Default for Set {
    fn default() -> Self {
        let nobody = Flow {
            key: FlowKey::NONE,
            entry: FlowEntry::default(),
        };
        Self {
            lock: bpf_spin_lock::default(),
            pad: 0,
            tags: [0; WAYS],
            used: [0; WAYS],
            flows: [nobody; WAYS],
            pad2: [0; 5],
        }
    }
}

impl Set {
    /// The way of this tag.
    #[inline(always)]
    pub fn position(&self, tag: u32) -> Option<usize> {
        let mut way = 0;
        while way < WAYS {
            if self.tags[way] == tag {
                return Some(way);
            }
            way += 1;
        }
        None
    }

    #[inline(always)]
    pub fn get(&self, tag: u32, key: &FlowKey) -> Option<&FlowEntry> {
        let flow = self.flows.get(self.position(tag)?)?;
        flow.key.is_same(key).then_some(&flow.entry)
    }

    /// Changes the flow, if it is there.
    #[inline(always)]
    pub fn change(&mut self, tag: u32, key: &FlowKey, change: impl FnOnce(&mut FlowEntry)) {
        if let Some(way) = self.position(tag)
            && let (Some(flow), Some(used)) = (self.flows.get_mut(way), self.used.get_mut(way))
            && flow.key.is_same(key)
        {
            change(&mut flow.entry);
            *used = step(flow.entry.state.last_seen);
        }
    }

    /// Puts the flow in its own place, or a free one, or that of the oldest.
    #[inline(always)]
    pub fn put(&mut self, tag: u32, key: &FlowKey, entry: &FlowEntry) {
        let now = step(entry.state.last_seen);
        let way = match self.position(tag) {
            Some(way) => way,
            None => self.oldest(now),
        };
        if let Some(flow) = self.flows.get_mut(way) {
            self.tags[way] = tag;
            self.used[way] = now;
            flow.key = *key;
            flow.entry = *entry;
        }
    }

    /// Of the ways, the one that is to make room at this time.
    #[inline(always)]
    fn oldest(&self, now: u32) -> usize {
        // Its age, and below it the way: one number, as a verifier follows each that it knows by itself.
        let mut oldest = 0_u64;
        let mut way = 0;
        while way < WAYS {
            let age = if self.tags[way] == 0 {
                u32::MAX
            } else {
                // Another CPU may be ahead.
                now.wrapping_sub(self.used[way]).wrapping_add(AHEAD)
            };
            let candidate = u64::from(age) << 3 | way as u64;
            if candidate > oldest {
                oldest = candidate;
            }
            way += 1;
        }
        oldest as usize & 7
    }

    #[inline(always)]
    pub fn remove(&mut self, tag: u32, key: &FlowKey) {
        if let Some(way) = self.position(tag)
            && let (Some(flow), Some(tag)) = (self.flows.get(way), self.tags.get_mut(way))
            && flow.key.is_same(key)
        {
            *tag = 0;
        }
    }

    pub fn flows(&self) -> impl Iterator<Item = (FlowKey, FlowEntry)> {
        let ways = self.tags.iter().zip(&self.flows);
        let there = ways.filter(|(tag, _)| **tag != 0);
        there.map(|(_, flow)| (flow.key, flow.entry))
    }
}

#[inline(always)]
const fn step(time: u64) -> u32 {
    (time >> STEP) as u32
}

#[cfg(test)]
mod tests;
