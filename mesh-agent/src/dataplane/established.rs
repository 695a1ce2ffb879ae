//! The kernel's table of established flows, as the agent sees it: flows by their keys.
//!
//! The kernel's keys are places, which hang on a secret. Whatever lies in a place says itself whose it is, and who
//! reads asks. Who writes does not: a neighbour that came into the place meanwhile loses its state.

use aya::maps::{HashMap, IterableMap as _, MapData, MapError};
use mesh_common::flow::{Flow, FlowEntry, FlowKey};
use mesh_common::place::{Place, Secret};

use crate::sys;

/// Which flows a write is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Only {
    /// Those that are not there yet: `BPF_NOEXIST`.
    New = 1,
    /// Those that are not gone: `BPF_EXIST`.
    There = 2,
}

/// `ct_est`.
#[derive(Debug)]
pub struct Established {
    map: HashMap<MapData, Place, Flow>,
    secret: Secret,
}

impl Established {
    pub fn new(map: HashMap<MapData, Place, Flow>, secret: Secret) -> Self {
        Self { map, secret }
    }

    /// Forgets all, which under another secret nobody would find.
    pub(super) fn clear(&mut self) -> Result<(), MapError> {
        let places: Vec<Place> = self.map.keys().collect::<Result<_, _>>()?;
        places.iter().try_for_each(|place| self.map.remove(place))
    }

    pub fn get(&self, key: &FlowKey) -> Result<FlowEntry, MapError> {
        let flow = self.map.get(&self.place(key), 0)?;
        if flow.key == *key {
            Ok(flow.entry)
        } else {
            Err(MapError::KeyNotFound)
        }
    }

    pub fn put(&mut self, key: FlowKey, entry: FlowEntry, only: Only) -> Result<(), MapError> {
        let place = self.place(&key);
        self.map.insert(place, Flow { key, entry }, only as u64)
    }

    pub fn remove(&mut self, key: &FlowKey) -> Result<(), MapError> {
        self.map.remove(&self.place(key))
    }

    /// Calls `each` with every flow. In steps of hundreds: one by one takes two calls for each, and nobody
    /// can ask for anything else meanwhile.
    pub(super) fn each(&self, mut each: impl FnMut(FlowKey, FlowEntry)) -> Result<(), MapError> {
        sys::bpf::values::<Place, Flow>(self.map.map(), false, |flow| each(flow.key, flow.entry))
    }

    /// Every flow.
    pub fn flows(&self) -> Result<Vec<(FlowKey, FlowEntry)>, MapError> {
        let mut flows = Vec::new();
        self.each(|key, entry| flows.push((key, entry)))?;
        Ok(flows)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.map.keys().next().is_none()
    }

    fn place(&self, key: &FlowKey) -> Place {
        Place::of(key, &self.secret)
    }
}
