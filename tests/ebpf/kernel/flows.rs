//! What the programs remember of flows and fragments, read and written as a whole.

use std::collections::BTreeMap;

use aya::maps::{Array, Map, MapData};
use mesh_agent::dataplane::{Established, Only, half_open_flows};
use mesh_common::flow::{FlowEntry, FlowKey, FragmentEntry, FragmentKey, Stage};
use mesh_common::half_open::Set;
use mesh_common::maps;
use mesh_common::place::Place;

use super::{Kernel, Table};

/// A flow as a table holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Remembered {
    pub(crate) stage: Stage,
    pub(crate) key: FlowKey,
    pub(crate) entry: FlowEntry,
}

impl Kernel {
    /// Every flow that is remembered, and in which table.
    pub(crate) fn flows(&self) -> Vec<Remembered> {
        let half_open = self.half_open().into_iter();
        let half_open = half_open.map(|(key, entry)| (Stage::HalfOpen, key, entry));
        let established = self.established().into_iter();
        let established = established.map(|(key, entry)| (Stage::Established, key, entry));
        let all = half_open.chain(established);
        all.map(|(stage, key, entry)| Remembered { stage, key, entry })
            .collect()
    }

    /// Remembers these flows and no other.
    pub(crate) fn set_flows(&self, flows: &[Remembered]) {
        let of = |stage| flows.iter().filter(move |flow| flow.stage == stage);
        let mut established = self.ct_est();
        for (key, _) in self.established() {
            established.remove(&key).unwrap();
        }
        for flow in of(Stage::Established) {
            established.put(flow.key, flow.entry, Only::New).unwrap();
        }
        let half_open: Vec<_> = of(Stage::HalfOpen)
            .map(|flow| (flow.key, flow.entry))
            .collect();
        self.set_half_open(&self.half_open(), &half_open);
    }

    /// Puts `flows` in the place of those `before`, which are all that there are.
    fn set_half_open(&self, before: &[(FlowKey, FlowEntry)], flows: &[(FlowKey, FlowEntry)]) {
        let config = self.config();
        let place = |key| Place::of(key, &config.secret);
        let index = |key| place(key).set(config.half_open_mask);
        let empty = before.iter().map(|(key, _)| (index(key), Set::default()));
        let mut filled: BTreeMap<_, _> = empty.collect();
        for (key, entry) in flows {
            let set = filled.entry(index(key)).or_default();
            set.put(place(key).tag(), key, entry);
        }
        let mut sets = self.sets();
        for (index, set) in filled {
            sets.set(index, set, 0).unwrap();
        }
    }

    /// Lets every flow and fragment grow older, also for whoever reads the kernel's own clock.
    pub(crate) fn age(&self, seconds: u64) {
        let nanoseconds = seconds * 1_000_000_000;
        let aged = |(key, mut entry): (FlowKey, FlowEntry)| {
            entry.state.last_seen = entry.state.last_seen.wrapping_sub(nanoseconds);
            (key, entry)
        };
        let half_open = self.half_open();
        let later: Vec<_> = half_open.iter().copied().map(aged).collect();
        self.set_half_open(&half_open, &later);
        let mut established = self.ct_est();
        for (key, entry) in self.established().into_iter().map(aged) {
            established.put(key, entry, Only::There).unwrap();
        }
        let mut fragments = self.fragments();
        let all: Vec<_> = fragments.iter().map(Result::unwrap).collect();
        for (key, mut entry) in all {
            entry.last_seen = entry.last_seen.wrapping_sub(nanoseconds);
            fragments.insert(key, entry, 0).unwrap();
        }
    }

    /// Confirmed flows.
    pub(crate) fn established(&self) -> Vec<(FlowKey, FlowEntry)> {
        self.ct_est().flows().unwrap()
    }

    /// Their table.
    pub(crate) fn ct_est(&self) -> Established {
        Established::new(self.pinned(maps::CT_EST), self.config().secret)
    }

    /// Flows that wait for their confirmation, or for room.
    pub(crate) fn half_open(&self) -> Vec<(FlowKey, FlowEntry)> {
        half_open_flows(&self.data(maps::CT_NEW)).unwrap()
    }

    fn sets(&self) -> Array<MapData, Set> {
        Map::Array(self.data(maps::CT_NEW)).try_into().unwrap()
    }

    /// What first fragments have left.
    pub(crate) fn fragments(&self) -> Table<FragmentKey, FragmentEntry> {
        self.pinned(maps::FRAG)
    }
}
