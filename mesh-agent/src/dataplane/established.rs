//! The kernel's table of established flows, as the agent sees it: flows by their keys.
//!
//! The kernel's keys are places, which hang on a secret. Whatever lies in a place says itself whose it is, and who
//! reads asks. Who writes does not: a neighbour that came into the place meanwhile loses its state.

use aya::maps::{HashMap, MapData, MapError};
use mesh_common::flow::{Flow, FlowEntry, FlowKey};
use mesh_common::place::{Place, Secret};

use super::walk::bounded;

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

    /// Every flow, and no more steps than it could take.
    pub fn flows(&self) -> impl Iterator<Item = Result<(FlowKey, FlowEntry), MapError>> {
        bounded(&self.map).map(|found| found.map(|(_, flow)| (flow.key, flow.entry)))
    }

    fn place(&self, key: &FlowKey) -> Place {
        Place::of(key, &self.secret)
    }
}
