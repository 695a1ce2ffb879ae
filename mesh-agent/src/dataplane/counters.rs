//! Reads the kernel's counters, which every CPU keeps for itself.

use std::collections::BTreeMap;

use aya::maps::PerCpuValues;
use aya::util;
use mesh_common::maps::{self, Count};
use mesh_common::{Direction, DropReason};

use super::error::ApplyError;
use super::tables::Kernel;
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
            let lost = self.lost(kind as u32)?;
            counters.events_lost.insert(kind, lost);
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

    /// How many events of each kind were lost since this was last asked, of an agent before this one too.
    pub(super) fn losses(&mut self) -> Result<BTreeMap<EventKind, u64>, ApplyError> {
        let mut losses = BTreeMap::new();
        for kind in EventKind::ALL {
            let told = maps::told_slot(kind);
            let lost = self.lost(kind as u32)?;
            let news = lost.saturating_sub(self.lost(told)?);
            if news > 0 {
                let cpus = util::nr_cpus().map_err(|(_, error)| ApplyError::Cpus(error))?;
                let mut sum = vec![0; cpus];
                sum[0] = lost;
                let sum = PerCpuValues::try_from(sum).map_err(ApplyError::Cpus)?;
                let noted = self.events_lost.set(told, sum, 0);
                noted.map_err(ApplyError::at("note what was told"))?;
                losses.insert(kind, news);
            }
        }
        Ok(losses)
    }

    fn lost(&self, slot: u32) -> Result<u64, ApplyError> {
        let values = self.events_lost.get(&slot, 0);
        let values = values.map_err(ApplyError::at("read a counter"))?;
        Ok(values.iter().sum())
    }
}

fn sum(values: &PerCpuValues<Count>) -> Count {
    let mut sum = Count::default();
    for value in values.iter() {
        sum += *value;
    }
    sum
}
