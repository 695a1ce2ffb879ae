//! What an agent of another layout left: its programs, which go on filtering until our policy is
//! loaded, and its flows, which are carried over.
//!
//! A carried flow has the generation of no policy, so it is judged anew before its next packet passes:
//! whatever its bytes meant to the other agent, they grant nothing here.

use aya::maps::{HashMap, Map, MapData};
use mesh_common::flow::{FlowEntry, FlowKey, flags};
use mesh_common::maps::{self, Shape};

use super::pins::Folder;

/// `BPF_NOEXIST`: do not overwrite.
const ONLY_NEW: u64 = 1;

type Flows = HashMap<MapData, FlowKey, FlowEntry>;

/// Copies the confirmed flows of `from` that are not in `to` yet; returns how many were seen. A table
/// of another shape is left.
pub(super) fn carry_flows(from: &Folder, to: &mut Flows) -> anyhow::Result<usize> {
    if from.shape(maps::CT_EST)? != Some(Shape::of(maps::CT_EST)) {
        return Ok(0);
    }
    let pinned = MapData::from_pin(from.map(maps::CT_EST))?;
    let old: Flows = Map::HashMap(pinned).try_into()?;
    let mut carried = 0;
    for flow in &old {
        let (key, mut entry) = flow?;
        entry.state.generation = 0;
        // The first layout knew it by the table alone.
        entry.state.flags |= flags::CONFIRMED;
        carried += 1;
        // There already, or no room: then the flow has to be opened anew.
        let _ = to.insert(key, entry, ONLY_NEW);
    }
    Ok(carried)
}
