//! Feeds the flow log: events as they come, the tables every few seconds, revocations at once.

use std::sync::Arc;
use std::time::Duration;

use mesh_common::flow::{FlowEntry, FlowKey, Stage};
use mesh_core::flow;
use mesh_core::netmap::Netmap;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::{Enforcer, Plans};
use crate::brief;
use crate::dataplane::FlowEvent;
use crate::flow_log::{Entry, FlowLog, since_1970};

/// How often flows are asked what they have carried.
const WALK: Duration = Duration::from_secs(10);

/// Flows that a change of the policy has ended.
pub(super) type Ended = Vec<(FlowKey, FlowEntry)>;

pub(super) struct Feed {
    pub(super) enforcer: Arc<Enforcer>,
    pub(super) plans: Plans,
    pub(super) log: FlowLog,
}

impl Feed {
    /// Runs until there are no more events.
    pub(super) async fn run(
        self,
        mut events: mpsc::Receiver<FlowEvent>,
        mut ended: mpsc::Receiver<Ended>,
    ) {
        let mut machine = flow::FlowLog::default();
        let mut netmaps = Netmaps::default();
        let mut walk = interval(WALK);
        walk.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => machine.handle_event(&event),
                    None => return,
                },
                Some(ended) = ended.recv() => {
                    for (key, entry) in &ended {
                        machine.handle_ended(*key, entry, self.nanoseconds());
                    }
                }
                _ = walk.tick() => if let Err(error) = self.walk(&mut machine) {
                    tracing::warn!(error = brief(&error), "read the flows");
                },
            }
            let plan = self.plans.borrow().clone();
            netmaps.take(plan.as_ref().map(|plan| &plan.netmap));
            self.tell(&mut machine, &netmaps);
        }
    }

    fn walk(&self, machine: &mut flow::FlowLog) -> anyhow::Result<()> {
        for (key, entry) in self.enforcer.flows(Stage::Established)? {
            machine.handle_flow(key, &entry);
        }
        for (key, entry) in self.enforcer.flows(Stage::HalfOpen)? {
            machine.handle_half_open(key, &entry);
        }
        machine.handle_walked(self.nanoseconds());
        machine.handle_denials(self.enforcer.denials()?.into_iter());
        machine.handle_lost(&self.enforcer.counters()?.events_lost);
        Ok(())
    }

    fn tell(&self, machine: &mut flow::FlowLog, netmaps: &Netmaps) {
        let epoch = since_1970().saturating_sub(self.enforcer.clock());
        let known = netmaps.known();
        while let Some(record) = machine.poll_record() {
            let described = record.describe(&known, epoch);
            self.log.tell(Entry::Flow(Box::new(described)));
        }
        while let Some(loss) = machine.poll_loss() {
            self.log.tell(Entry::Lost {
                time: since_1970(),
                what: loss.kind.name(),
                count: loss.count,
            });
        }
    }

    fn nanoseconds(&self) -> u64 {
        u64::try_from(self.enforcer.clock().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The newest netmap and the one before: what has just been revoked is only in that.
#[derive(Debug, Default)]
struct Netmaps([Option<Arc<Netmap>>; 2]);

impl Netmaps {
    fn take(&mut self, newest: Option<&Arc<Netmap>>) {
        let [now, _] = &self.0;
        if let Some(newest) = newest
            && !now.as_ref().is_some_and(|now| Arc::ptr_eq(now, newest))
        {
            let [now, before] = &mut self.0;
            *before = now.replace(newest.clone());
        }
    }

    fn known(&self) -> Vec<&Netmap> {
        self.0.iter().flatten().map(|netmap| &**netmap).collect()
    }
}
