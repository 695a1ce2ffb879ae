//! Frees the memory of flows whose time is over.
//!
//! The packet path takes an expired flow for none, so nothing depends on when this runs. It must not
//! take away a flow that has just been opened anew under the same key, so it leaves what expired only
//! lately to the next round.

use aya::maps::{HashMap, MapData};
use mesh_common::flow::{FlowEntry, FlowKey, Stage};

use super::tables::{ApplyError, Kernel};

/// Nanoseconds between a flow's end and its removal.
const GRACE: u64 = 5_000_000_000;

impl Kernel {
    /// Returns how many flows stand.
    pub(super) fn sweep(&mut self) -> Result<usize, ApplyError> {
        let now = now();
        let established = sweep(&mut self.established, Stage::Established, now)?;
        let half_open = sweep(&mut self.half_open, Stage::HalfOpen, now)?;
        Ok(established + half_open)
    }
}

fn sweep(
    flows: &mut HashMap<MapData, FlowKey, FlowEntry>,
    stage: Stage,
    now: u64,
) -> Result<usize, ApplyError> {
    let mut over = Vec::new();
    let mut stand = 0;
    for flow in flows.iter() {
        let (key, entry) = flow.map_err(ApplyError::at("read a flow"))?;
        if entry
            .state
            .is_expired(key.proto, stage, now.wrapping_sub(GRACE))
        {
            over.push(key);
        } else {
            stand += 1;
        }
    }
    for key in over {
        // Gone already is as good.
        let _ = flows.remove(&key);
    }
    Ok(stand)
}

/// The clock that the packet path stamps flows with.
fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}
