//! What happens by itself as time passes: expiry, ephemeral nodes, old keys, last goodbyes.
//!
//! Level-triggered: each round looks at the world as it is, so a round that failed, or a coordinator
//! that was off, is made good by the next one.

use std::time::Duration;

use mesh_core::node::NodeId;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::clock::Clock;
use crate::registry;
use crate::sessions::Sessions;
use crate::world::Handle;

const ROUND: Duration = Duration::from_secs(1);
/// How many rounds pass between two notes of who was last seen when.
const NOTE_EVERY: u32 = 60;

#[derive(Debug)]
pub struct Janitor {
    pub world: Handle,
    pub sessions: Sessions,
    pub clock: Clock,
    /// How long an ephemeral node may be gone before it is deleted.
    pub ephemeral_grace: Duration,
}

impl Janitor {
    pub async fn run(self, shutdown: CancellationToken) {
        let started = self.clock.now();
        let mut ticks = tokio::time::interval(ROUND);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut rounds = 0_u32;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                _ = ticks.tick() => {}
            }
            if self.world.trouble().is_none() {
                self.round(started).await;
            }
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(NOTE_EVERY) {
                self.note().await;
            }
        }
        self.note().await;
    }

    async fn note(&self) {
        let seen = self.sessions.take_unsaved();
        if !seen.is_empty() {
            self.world.note_seen(seen).await;
        }
    }

    async fn round(&self, started: mesh_core::node::UnixTime) {
        let now = self.clock.now();
        if self.clock.jumped() {
            debug!("the wall clock was moved; time goes on by the monotonic one");
        }
        let current = self.world.current();
        let grace = self.ephemeral_grace.as_secs();
        let mut due = false;
        let mut gone: Vec<NodeId> = Vec::new();
        for node in current.world.nodes.values() {
            due |= !node.expired && node.expires.is_some_and(|at| at <= now);
            if node.ephemeral {
                // A node that was made a moment ago has not had the time to connect.
                let since = self.sessions.gone_since(node.id, started.max(node.created));
                if since.is_some_and(|since| now.0.saturating_sub(since.0) >= grace) {
                    gone.push(node.id);
                }
            }
        }
        let old_keys = current
            .keys
            .values()
            .any(|key| registry::admin::is_forgotten(key, now));
        if !due && gone.is_empty() && !old_keys {
            return;
        }
        let tidied = self
            .world
            .change(move |draft| {
                let expired = registry::expire_due(draft);
                let dropped = registry::drop_ephemeral(draft, &gone);
                registry::admin::forget_keys(draft);
                Ok((expired, dropped))
            })
            .await;
        match tidied {
            Ok((expired, dropped)) => info!(expired, dropped, "nodes whose time was up"),
            Err(error) => warn!(%error, "expire nodes"),
        }
    }
}
