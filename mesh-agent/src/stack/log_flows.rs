//! Feeds the flow log: events as they come, the tables every few seconds, revocations at once. And
//! says what it has added up, to whoever asks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_common::flow::{FlowEntry, FlowKey, Stage, flags};
use mesh_core::flow::{self, Names};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};

use super::{Enforcer, Plans};
use crate::brief;
use crate::dataplane::FlowEvent;
use crate::flow_log::{Entry, FlowLog, since_1970};

/// How often flows are asked what they have carried.
const WALK: Duration = Duration::from_secs(10);
/// How often the ends of flows are told that were closed.
const CLOSE: Duration = Duration::from_secs(1);
/// By how much the two clocks may drift apart before times are told by the new difference: two looks at
/// both never agree, and a flow's start should be the same in all its records.
const DRIFT: Duration = Duration::from_millis(100);

/// Flows that a change of the policy has ended.
pub(super) struct Ended {
    /// When it was begun and when it was made, by the packet path's clock.
    pub(super) between: [Duration; 2],
    pub(super) flows: Vec<(FlowKey, FlowEntry)>,
}

/// What was carried from and to one peer.
#[derive(Clone, Debug)]
pub struct PeerUsage {
    pub number: u32,
    pub name: Option<String>,
    /// Established flows that stand.
    pub flows: u64,
    pub usage: flow::Usage,
}

/// To be answered with every peer's.
pub type AskUsage = oneshot::Sender<anyhow::Result<Vec<PeerUsage>>>;

/// What becomes of flows when nobody feeds the log from here any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Over {
    /// The filter goes on, or its tables are taken over.
    WithoutItsFlows,
    /// The filter is taken away.
    WithItsFlows,
}

pub(super) struct Feed {
    pub(super) enforcer: Arc<Enforcer>,
    pub(super) plans: Plans,
    pub(super) log: FlowLog,
}

impl Feed {
    /// Runs until there are no more events, or it is `over`.
    pub(super) async fn run(
        self,
        mut events: mpsc::Receiver<FlowEvent>,
        mut ended: mpsc::Receiver<Ended>,
        mut asked: mpsc::Receiver<AskUsage>,
        mut over: oneshot::Receiver<Over>,
    ) {
        let mut machine = flow::FlowLog::default();
        let mut names = Names::default();
        let mut epoch = Duration::ZERO;
        let every = |period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        };
        let (mut walk, mut close) = (every(WALK), every(CLOSE));
        let mut is_over = false;
        while !is_over {
            // In this order, because of flows that an edit has ended a walk would not know when, and of those that
            // are over not when they were opened. Of events there are no more than there are tokens for.
            tokio::select! {
                biased;
                Some(ended) = ended.recv() => {
                    let between = ended.between.map(nanoseconds);
                    for (key, entry) in &ended.flows {
                        machine.handle_ended(*key, entry, between);
                    }
                }
                event = events.recv() => match event {
                    Some(event) => machine.handle_event(&event),
                    None => return,
                },
                Some(asked) = asked.recv() => {
                    // Nobody may wait for it any more.
                    let _ = asked.send(self.usage(&mut machine, &names));
                }
                over = &mut over => {
                    // What was carried since is not lost.
                    let walked = self.walk(&mut machine);
                    if let Err(error) = walked {
                        tracing::warn!(error = brief(&error), "read the flows at last");
                    }
                    if matches!(over, Ok(Over::WithItsFlows)) {
                        machine.handle_over(self.now());
                    }
                    is_over = true;
                }
                _ = close.tick() => self.close(&mut machine),
                _ = walk.tick() => match self.walk(&mut machine) {
                    Ok(()) => {
                        names.handle_walked(&machine);
                        machine.forget_usage(|peer| names.peer(peer).is_none());
                    }
                    Err(error) => tracing::warn!(error = brief(&error), "read the flows"),
                },
            }
            if let Some(plan) = &*self.plans.borrow() {
                names.take(&plan.netmap);
            }
            let now = since_1970().saturating_sub(self.enforcer.clock());
            if now.abs_diff(epoch) > DRIFT {
                epoch = now;
            }
            self.tell(&mut machine, &names, epoch);
        }
    }

    fn walk(&self, machine: &mut flow::FlowLog) -> anyhow::Result<()> {
        let established = self.enforcer.flows(Stage::Established)?;
        let half_open = self.enforcer.flows(Stage::HalfOpen)?;
        // After they were read: what they say was so by now.
        let now = self.now();
        for (key, entry) in established {
            machine.handle_flow(key, &entry, now);
        }
        for (key, entry) in half_open {
            machine.handle_half_open(key, &entry, now);
        }
        machine.handle_walked(now);
        machine.handle_denials(self.enforcer.denials()?.into_iter());
        machine.handle_lost(self.enforcer.losses()?);
        Ok(())
    }

    fn close(&self, machine: &mut flow::FlowLog) {
        let now = self.now();
        while let Some(key) = machine.poll_closed(now) {
            machine.handle_closed(key, self.enforcer.flow(&key).as_ref());
        }
    }

    fn usage(&self, machine: &mut flow::FlowLog, names: &Names) -> anyhow::Result<Vec<PeerUsage>> {
        let mut flows: BTreeMap<u32, u64> = BTreeMap::new();
        for (key, entry) in self.enforcer.flows(Stage::Established)? {
            machine.handle_usage(key, &entry);
            if entry.state.flags & flags::DENIED == 0 && !entry.state.is_closing() {
                *flows.entry(entry.state.peer).or_default() += 1;
            }
        }
        for (key, entry) in self.enforcer.flows(Stage::HalfOpen)? {
            machine.handle_half_open_usage(key, &entry);
        }
        let peers = machine.usage().iter().map(|(number, usage)| PeerUsage {
            number: *number,
            name: names
                .peer(*number)
                .map(|peer| match names.is_former(*number) {
                    true => format!("{} (no peer now)", peer.name),
                    false => peer.name.to_string(),
                }),
            flows: flows.get(number).copied().unwrap_or(0),
            usage: *usage,
        });
        Ok(peers.collect())
    }

    /// `epoch`: the time since 1970 at the packet path's time 0.
    fn tell(&self, machine: &mut flow::FlowLog, names: &Names, epoch: Duration) {
        while let Some(record) = machine.poll_record() {
            let described = record.describe(names, epoch);
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

    fn now(&self) -> u64 {
        nanoseconds(self.enforcer.clock())
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
