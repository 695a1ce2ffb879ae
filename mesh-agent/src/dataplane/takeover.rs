//! One agent's programs in the place of another's.
//!
//! What an agent of the same layout left is replaced at once. What one of another layout left goes on
//! filtering until our policy is loaded, and its flows are carried over: with the generation of no
//! policy, so each is judged anew before its next packet passes. Whatever its bytes meant to the other
//! agent, they grant nothing here.

use std::collections::BTreeSet;
use std::fs;

use anyhow::Context as _;
use aya::maps::{HashMap, Map, MapData, MapError};
use aya::programs::SchedClassifier;
use mesh_common::flow::{Flow, FlowEntry, FlowKey, flags};
use mesh_common::maps::{self, Config, Shape};
use mesh_common::place::Place;
use mesh_core::dataplane::vigil::Standing;

use super::attach::{Chain, Hook, Left, Way};
use super::established::{Established, Only};
use super::pins::{Folder, Role};
use super::walk::bounded;
use super::{clock, half_open};

/// Of `ct_est` before layout 7: flows lay under their keys.
const BY_KEY: Shape = Shape::new::<FlowKey, FlowEntry>();
const _: () = assert!(BY_KEY.key == 40 && BY_KEY.value == 64);

/// Copies the confirmed flows of `from` that are not in `to` yet; returns how many were seen. A table
/// of another shape is left.
pub(super) fn carry_flows(from: &Folder, to: &mut Established) -> anyhow::Result<usize> {
    let Some(shape) = from.shape(maps::CT_EST)? else {
        return Ok(0);
    };
    let old = || MapData::from_pin(from.map(maps::CT_EST)).map(Map::HashMap);
    let flows: Vec<(FlowKey, FlowEntry)> = if shape == Shape::of(maps::CT_EST) {
        let old: HashMap<_, Place, Flow> = old()?.try_into()?;
        let flows = bounded(&old).map(|found| found.map(|(_, flow)| (flow.key, flow.entry)));
        flows.collect::<Result<_, MapError>>()?
    } else if shape == BY_KEY {
        let old: HashMap<_, FlowKey, FlowEntry> = old()?.try_into()?;
        bounded(&old).collect::<Result<_, MapError>>()?
    } else {
        return Ok(0);
    };
    let carried = flows.len();
    for (key, mut entry) in flows {
        entry.state.generation = 0;
        // The first layout knew it by the table alone.
        entry.state.flags |= flags::CONFIRMED;
        // There already, no room, or another in its place: then the flow has to be opened anew.
        let _ = to.put(key, entry, Only::New);
    }
    Ok(carried)
}

/// Likewise those under way, into sets in which there is nothing and that no program looks at yet.
pub(super) fn carry_half_open(from: &Folder, to: &Folder, config: &Config) -> anyhow::Result<()> {
    let shape = Shape::of(maps::CT_NEW);
    if from.shape(maps::CT_NEW)? != Some(shape) {
        return Ok(());
    }
    let open = |folder: &Folder| MapData::from_pin(folder.map(maps::CT_NEW));
    let to = open(to)?;
    if half_open::all(&to)?.is_empty() {
        let flows = half_open::flows(&open(from)?, clock::now())?;
        half_open::fill(&mut Map::Array(to).try_into()?, config, flows)?;
    }
    Ok(())
}

/// Where the programs are that earlier agents have left; `None` if there are none.
pub(super) fn found(
    interface: &str,
    chain: Chain,
    folder: &Folder,
    earlier: &[Folder],
) -> anyhow::Result<Option<Standing>> {
    let mut worst = None;
    for (role, way) in [(Role::Ingress, Way::Ingress), (Role::Egress, Way::Egress)] {
        let left = left(folder, earlier, role)?;
        if left.is_empty() {
            continue;
        }
        let standing = match Hook::find(interface, way, chain, &left)? {
            Some(mut hook) => hook.standing()?,
            None => Standing::Gone,
        };
        worst = worst.max(Some(standing));
    }
    Ok(worst)
}

/// The program at its hook; or another layout's that is there, until our policy is loaded.
pub(super) fn hang_or_wait(
    program: &mut SchedClassifier,
    interface: &str,
    (role, way): (Role, Way),
    chain: Chain,
    folder: &Folder,
    earlier: &[Folder],
) -> anyhow::Result<Hook> {
    if let Some(hook) = Hook::find(interface, way, chain, &left_in(earlier, role)?)? {
        folder.keep(role, program)?;
        return Ok(hook);
    }
    let left = folder.programs(role)?;
    hang(program, interface, (role, way), chain, folder, &left)
}

/// Pinned first and hung then: what hangs can always be found again.
pub(super) fn hang(
    program: &mut SchedClassifier,
    interface: &str,
    (role, way): (Role, Way),
    chain: Chain,
    folder: &Folder,
    left: &[Left],
) -> anyhow::Result<Hook> {
    folder.keep(role, program).context("pin the program")?;
    let hook = Hook::hang(program, interface, way, chain, left, &BTreeSet::new())?;
    let own = program.info()?.id();
    for other in left.iter().filter(|left| left.id != own) {
        fs::remove_file(&other.pin).context("remove the pin of an earlier program")?;
    }
    Ok(hook)
}

pub(super) fn left(folder: &Folder, earlier: &[Folder], role: Role) -> anyhow::Result<Vec<Left>> {
    let mut left = folder.programs(role)?;
    left.extend(left_in(earlier, role)?);
    Ok(left)
}

pub(super) fn left_in(folders: &[Folder], role: Role) -> anyhow::Result<Vec<Left>> {
    let mut left = Vec::new();
    for folder in folders {
        left.extend(folder.programs(role)?);
    }
    Ok(left)
}
