//! Frees the memory of flows whose time is over, and counts what each peer still holds.
//!
//! The packet path takes an expired flow for none, so nothing depends on when this runs. It must not
//! take away a flow that has just been opened anew under the same key, so it leaves what expired only
//! lately to the next round.

use std::collections::BTreeMap;

use mesh_common::budget::PeerFreed;
use mesh_common::maps::Config;

use super::clock;
use super::error::ApplyError;
use super::established::Established;
use super::tables::Kernel;

/// Nanoseconds between a flow's end and its removal.
const GRACE: u64 = 5_000_000_000;

/// Flows by peer, and by who opened them.
type Held = BTreeMap<u32, [u32; 2]>;

impl Kernel {
    /// Returns how many established flows stand. Half-open ones that do not are the first to make room.
    pub(super) fn sweep(&mut self) -> Result<usize, ApplyError> {
        let now = clock::now();
        // Before the flows: one that comes in between is counted twice until the next round, and not
        // never.
        let loads: Result<Vec<_>, _> = self.peer_load.iter().collect();
        let loads = loads.map_err(ApplyError::at("read what peers hold"))?;
        let mut held = Held::new();
        let established = sweep(&mut self.established, now, &mut held)?;
        for (peer, load) in loads {
            let Some(held) = held.get(&peer) else {
                if load.is_idle(now) {
                    // Gone already is as good.
                    let _ = self.peer_load.remove(&peer);
                    let _ = self.peer_freed.remove(&peer);
                    continue;
                }
                self.free(peer, load.added)?;
                continue;
            };
            let freed = |way: usize| load.added[way].wrapping_sub(held[way]);
            self.free(peer, [freed(0), freed(1)])?;
        }
        self.ration(established)?;
        Ok(established)
    }

    /// A table that is nearly full is left to the flows that are in it: every peer's share counts as
    /// taken, so what comes is judged packet by packet and not forgotten in a crowd of half-open flows.
    fn ration(&mut self, established: usize) -> Result<(), ApplyError> {
        // Some room must be there before it opens again.
        let sixteenths = if self.is_full() { 14 } else { 15 };
        let is_full = established as u64 * 16 >= u64::from(self.flow_capacity) * sixteenths;
        let peer_flows = if is_full { 0 } else { self.share() };
        if self.config.peer_flows == peer_flows {
            return Ok(());
        }
        let config = Config {
            peer_flows,
            ..self.config
        };
        self.cfg
            .set(0, config, 0)
            .map_err(ApplyError::at("say whether there is room for flows"))?;
        self.config = config;
        Ok(())
    }

    /// Flows that one peer may have opened here, or this node there.
    pub(super) fn share(&self) -> u32 {
        self.flow_capacity / 4
    }

    pub(super) fn is_full(&self) -> bool {
        self.config.peer_flows == 0
    }

    fn free(&mut self, peer: u32, freed: [u32; 2]) -> Result<(), ApplyError> {
        self.peer_freed
            .insert(peer, PeerFreed { freed }, 0)
            .map_err(ApplyError::at("write what a peer no longer holds"))
    }
}

fn sweep(flows: &mut Established, now: u64, held: &mut Held) -> Result<usize, ApplyError> {
    let mut over = Vec::new();
    let mut stand = 0;
    let read = flows.each(|key, entry| {
        if entry.state.is_expired(key.proto, now.wrapping_sub(GRACE)) {
            over.push(key);
        } else {
            stand += 1;
            held.entry(entry.state.peer).or_default()[entry.state.opened() as usize] += 1;
        }
    });
    read.map_err(ApplyError::at("read a flow"))?;
    for key in over {
        // Gone already is as good.
        let _ = flows.remove(&key);
    }
    Ok(stand)
}
