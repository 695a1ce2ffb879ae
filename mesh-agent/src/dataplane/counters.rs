//! Reads the kernel's counters, which every CPU keeps for itself.

use aya::maps::PerCpuValues;
use mesh_common::maps::{self, Count};
use mesh_common::{Direction, DropReason};

use super::tables::{ApplyError, Kernel};
use super::{Counters, EventKind};

impl Kernel {
    pub(super) fn counters(&self) -> Result<Counters, ApplyError> {
        let mut counters = Counters::default();
        let slot = |slot| {
            let values = self.reason_ctr.get(&slot, 0);
            values
                .map(|values| sum(&values))
                .map_err(ApplyError::at("read a counter"))
        };
        for direction in Direction::ALL {
            let passed = slot(maps::reason_slot(None, direction))?;
            counters.passed.insert(direction, passed);
            for reason in DropReason::ALL {
                let count = slot(maps::reason_slot(Some(*reason), direction))?;
                if count != Count::default() {
                    counters.dropped.insert((direction, *reason), count);
                }
            }
        }
        for kind in EventKind::ALL {
            let lost = self.events_lost.get(&(kind as u32), 0);
            let lost = lost.map_err(ApplyError::at("read a counter"))?;
            counters.events_lost.insert(kind, lost.iter().sum());
        }
        let rules = self
            .rules()
            .map_err(ApplyError::at("read a rule's counter"))?;
        counters.rules = rules
            .iter()
            .map(|(rule, values)| (*rule, sum(values)))
            .collect();
        Ok(counters)
    }
}

fn sum(values: &PerCpuValues<Count>) -> Count {
    let mut sum = Count::default();
    for value in values.iter() {
        sum += *value;
    }
    sum
}
