//! The kernel's table of half-open flows, as the agent sees it.
//!
//! An element is a whole set of flows, so the agent cannot change one without taking the others back to
//! what it has read of them. It only reads; what is to be written a program writes, under the set's lock; but
//! for a table that no program looks at yet.

use std::collections::BTreeMap;

use aya::maps::{Array, MapData, MapError};
use aya::programs::{ProgramError, SchedClassifier};
use mesh_common::flow::{FlowEntry, FlowKey, FlowState, Revocation};
use mesh_common::half_open::Set;
use mesh_common::maps::Config;
use mesh_common::place::Place;

use super::dry;
use crate::sys;

/// All that lie there. What is over does until another needs the place.
pub fn all(sets: &MapData) -> Result<Vec<(FlowKey, FlowEntry)>, MapError> {
    read(sets, |_| true)
}

/// Those that are not over at this time.
pub(super) fn flows(sets: &MapData, now: u64) -> Result<Vec<(FlowKey, FlowEntry)>, MapError> {
    read(sets, |(key, entry)| !entry.state.is_expired(key.proto, now))
}

fn read(
    sets: &MapData,
    wanted: impl Fn(&(FlowKey, FlowEntry)) -> bool,
) -> Result<Vec<(FlowKey, FlowEntry)>, MapError> {
    let mut flows = Vec::new();
    sys::bpf::values::<u32, Set>(sets, true, |set| flows.extend(set.flows().filter(&wanted)))?;
    Ok(flows)
}

/// Puts flows into sets that no program looks at yet; one of the same number in an empty table. Each is
/// judged anew by its next packet.
pub(super) fn fill(
    sets: &mut Array<MapData, Set>,
    config: &Config,
    flows: Vec<(FlowKey, FlowEntry)>,
) -> Result<(), MapError> {
    let mut filled: BTreeMap<u32, Set> = BTreeMap::new();
    for (key, mut entry) in flows {
        entry.state.generation = 0;
        let place = Place::of(&key, &config.secret);
        let set = filled.entry(place.set(config.half_open_mask)).or_default();
        set.put(place.tag(), &key, &entry);
    }
    filled
        .into_iter()
        .try_for_each(|(number, set)| sets.set(number, set, 0))
}

/// The program that ends a flow.
pub(super) const REVOKE: &str = "revoke";

/// Gives the flow this tombstone. `revoke` is the program [`REVOKE`].
pub(super) fn end(
    revoke: &SchedClassifier,
    key: &FlowKey,
    tombstone: &FlowState,
) -> Result<(), ProgramError> {
    let ended = Revocation::new(*key, tombstone);
    // Newer kernels take the first bytes for a header of Ethernet, and want as much behind it as it promises.
    let mut packet = [0; 64];
    packet[..size_of::<Revocation>()].copy_from_slice(&ended.bytes());
    dry::run(revoke, &packet, &mut [0; 64])
}
