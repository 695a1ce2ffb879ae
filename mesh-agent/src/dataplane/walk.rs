//! Reads whole tables of the kernel: flows, denials.
//!
//! Flows are read in bulk. A walk of another hash table asks for one key after the other while packets change
//! the table, and starts again from the front when the key that it stands on has gone. So it is bounded:
//! under a flood it misses some and sees others twice, and ends.

use aya::maps::{HashMap, MapData, MapError};
use aya::programs::SchedClassifier;
use mesh_common::event::{DenyEntry, DenyKey};
use mesh_common::flow::{FlowEntry, FlowKey, Stage};
use mesh_core::dataplane::{Review, Tables};

use super::error::ApplyError;
use super::established::Only;
use super::tables::Kernel;
use super::{clock, half_open};

impl Kernel {
    /// What one of the two tables of flows holds.
    pub(super) fn flows(&self, stage: Stage) -> Result<Vec<(FlowKey, FlowEntry)>, ApplyError> {
        let flows = match stage {
            Stage::Established => self.established.flows(),
            Stage::HalfOpen => half_open::flows(&self.half_open, clock::now()),
        };
        flows.map_err(ApplyError::at("read a flow"))
    }

    pub(super) fn flow(&self, key: &FlowKey) -> Option<FlowEntry> {
        self.established.get(key).ok()
    }

    /// Denied packets, counted.
    pub(super) fn denials(&self) -> Result<Vec<(DenyKey, DenyEntry)>, ApplyError> {
        let denials = bounded(&self.denials);
        denials
            .collect::<Result<_, _>>()
            .map_err(ApplyError::at("read a denial"))
    }

    /// Ends the flows that `tables`, the policy in force, no longer allow: each gets the tombstone that
    /// its next packet would have left, and is told of. A tombstone grants nothing, so nothing is lost if a
    /// packet is being judged meanwhile.
    ///
    /// `revoke` is the program [`half_open::REVOKE`].
    pub(super) fn review(
        &mut self,
        tables: &Tables,
        revoke: &SchedClassifier,
    ) -> Result<Vec<(FlowKey, FlowEntry)>, ApplyError> {
        let failed = || ApplyError::at("read a flow");
        let mut ended = Vec::new();
        let mut review = Review::new(tables, self.generation());
        let established = self.established.each(|key, entry| {
            ended.extend(end(key, entry, &mut review));
        });
        established.map_err(failed())?;
        for (key, entry) in &ended {
            // Gone already is as good.
            let _ = self.established.put(*key, *entry, Only::There);
        }
        let half_open = half_open::flows(&self.half_open, clock::now()).map_err(failed())?;
        let half_open: Vec<_> = half_open
            .into_iter()
            .filter_map(|(key, entry)| end(key, entry, &mut review))
            .collect();
        // Without its tombstone a flow ends by its next packet.
        let mut unmarked = half_open
            .iter()
            .filter_map(|(key, entry)| half_open::end(revoke, key, &entry.state).err());
        if let Some(error) = unmarked.next_back() {
            tracing::warn!(%error, "mark half-open flows that are no longer allowed");
        }
        ended.extend(half_open);
        Ok(ended)
    }
}

/// The flow with its tombstone, if it has come to an end.
fn end(
    key: FlowKey,
    mut entry: FlowEntry,
    review: &mut Review<'_>,
) -> Option<(FlowKey, FlowEntry)> {
    entry.state = review.tombstone(&key, &entry.state)?;
    Some((key, entry))
}

/// Twice what the largest table holds.
const MOST_STEPS: usize = 1 << 21;

/// Every entry, and no more steps than it could take.
pub(super) fn bounded<K: aya::Pod, V: aya::Pod>(
    map: &HashMap<MapData, K, V>,
) -> impl Iterator<Item = Result<(K, V), MapError>> {
    map.iter().take(MOST_STEPS)
}
