//! Denied packets that were counted, as records.
//!
//! The packet path counts by peer, service and reason, and tells of a count now and then; a walk finds
//! what was never told. A peer that tries every port makes a count for each, of which the most frequent
//! are told by themselves.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use mesh_common::event::{DenyEntry, DenyKey};
use mesh_common::flow::FlowKey;
use mesh_common::{Be16, Direction, DropReason};

use super::{Kind, Record};
use crate::RuleId;

/// Kinds of denials that one walk tells of for each peer, beside one for all the others.
pub(super) const OF_ONE_PEER: usize = 64;

/// How many packets of each kind of denial were told of.
#[derive(Debug, Default)]
pub(super) struct Denials(BTreeMap<DenyKey, u64>);

impl Denials {
    /// An event told of it.
    pub(super) fn told(&mut self, record: &Record) {
        let packets = record.packets[record.direction as usize];
        self.0.insert(deny_key(record), packets);
    }

    /// What is to be told of all that is `counted`.
    pub(super) fn news(
        &mut self,
        counted: impl Iterator<Item = (DenyKey, DenyEntry)>,
    ) -> Vec<Record> {
        let before = std::mem::take(&mut self.0);
        let mut news: BTreeMap<u32, Vec<(DenyKey, DenyEntry)>> = BTreeMap::new();
        for (key, entry) in counted {
            self.0.insert(key, entry.packets);
            if before.get(&key) != Some(&entry.packets) {
                news.entry(key.peer).or_default().push((key, entry));
            }
        }
        let mut records = Vec::new();
        for mut of_peer in news.into_values() {
            of_peer.sort_by_key(|(_, entry)| Reverse(entry.packets));
            let others = of_peer.split_off(of_peer.len().min(OF_ONE_PEER));
            let told = of_peer.into_iter().chain(folded(others));
            records.extend(told.map(|(key, entry)| counted_denial(&key, &entry)));
        }
        records
    }
}

/// Without ports.
fn folded(others: Vec<(DenyKey, DenyEntry)>) -> BTreeMap<DenyKey, DenyEntry> {
    let mut folded: BTreeMap<DenyKey, DenyEntry> = BTreeMap::new();
    for (key, entry) in others {
        let same = DenyKey {
            port: Be16::new(0),
            proto: 0,
            ..key
        };
        let all = folded.entry(same).or_insert(DenyEntry {
            packets: 0,
            bytes: 0,
            ..entry
        });
        if all.rule != entry.rule {
            all.rule = RuleId::NONE;
        }
        all.packets += entry.packets;
        all.bytes += entry.bytes;
        all.first = all.first.min(entry.first);
        all.last = all.last.max(entry.last);
    }
    folded
}

/// Under which the packet path counts what a record of a denial tells of.
pub(super) fn deny_key(record: &Record) -> DenyKey {
    DenyKey {
        remote: record.remote,
        local: record.local,
        peer: record.peer,
        port: Be16::new(record.port),
        proto: record.key.proto,
        direction: record.direction as u8,
        reason: record.reason.map_or(0, |reason| reason as u8),
        pad: 0,
        pad2: 0,
    }
}

fn counted_denial(key: &DenyKey, entry: &DenyEntry) -> Record {
    let direction = if key.direction == Direction::Egress as u8 {
        Direction::Egress
    } else {
        Direction::Ingress
    };
    let mut record = Record {
        kind: Kind::Denied,
        time: entry.last,
        first: entry.first,
        key: FlowKey {
            proto: key.proto,
            ..FlowKey::NONE
        },
        port: key.port.get(),
        direction,
        remote: key.remote,
        local: key.local,
        rule: entry.rule,
        peer: key.peer,
        reason: DropReason::from_number(key.reason),
        packets: [0; 2],
        bytes: [0; 2],
    };
    record.packets[direction as usize] = entry.packets;
    record.bytes[direction as usize] = entry.bytes;
    record
}
