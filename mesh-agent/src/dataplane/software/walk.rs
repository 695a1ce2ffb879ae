//! What the filter in process shows of its tables: the same as the kernel's.

use std::time::Duration;

use mesh_common::event::{DenyEntry, DenyKey};
use mesh_common::flow::{FlowEntry, FlowKey, Stage};
use mesh_common::packet::{self, Slice};
use mesh_common::verdict::{complete, decide_new};
use mesh_common::{Direction, RuleId};
use mesh_core::dataplane::why::Answer;
use mesh_core::dataplane::{Review, Tables};

use super::{Engine, Filter};

impl Filter {
    /// Flows of one stage.
    pub fn flows(&self, stage: Stage) -> Vec<(FlowKey, FlowEntry)> {
        let engine = self.engine();
        let flows = match stage {
            Stage::Established => &engine.established,
            Stage::HalfOpen => &engine.half_open,
        };
        flows.iter().map(|(key, entry)| (*key, *entry)).collect()
    }

    /// One flow of the established.
    pub fn flow(&self, key: &FlowKey) -> Option<FlowEntry> {
        self.engine().established.get(key).copied()
    }

    /// Denied packets, counted.
    pub fn denials(&self) -> Vec<(DenyKey, DenyEntry)> {
        let engine = self.engine();
        let denials = engine.told.denials.iter();
        denials.map(|(key, entry)| (*key, *entry)).collect()
    }

    /// Ends the flows that `tables`, which were applied, do not allow; returns them.
    pub fn review(&self, tables: &Tables) -> Vec<(FlowKey, FlowEntry)> {
        self.engine().review(tables)
    }

    /// What [`Filter::judge`] would do with a packet if it knew no flow of it. Remembers nothing and counts nothing.
    pub fn explain(&self, direction: Direction, packet: &[u8]) -> Answer {
        let now = self.now();
        let engine = self.engine();
        let refused = |reason| Answer {
            drop: Some(reason),
            rule: RuleId::NONE,
        };
        let mut facts = match packet::parse(&Slice(packet), direction) {
            Ok(facts) => facts,
            Err(reason) => return refused(reason),
        };
        match complete(&mut facts, now, &*engine) {
            Ok(()) => {
                let verdict = decide_new(&facts, now, &*engine);
                Answer {
                    drop: verdict.drop,
                    rule: verdict.rule,
                }
            }
            Err(reason) => refused(reason),
        }
    }

    /// The clock that stamps flows.
    pub fn clock(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Engine {
    fn review(&mut self, tables: &Tables) -> Vec<(FlowKey, FlowEntry)> {
        let mut review = Review::new(tables, self.generation);
        let mut ended = Vec::new();
        for (key, entry) in self.established.iter_mut().chain(&mut self.half_open) {
            if let Some(state) = review.tombstone(key, &entry.state) {
                entry.state = state;
                ended.push((*key, *entry));
            }
        }
        ended
    }
}
