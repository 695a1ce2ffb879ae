//! Policy entries to rows of a longest-prefix table.
//!
//! A longest match knows one answer where a policy has many: a deny of all ports must beat an accept
//! of one. So who wins is settled here, for every protocol and port, and a row is written only where
//! the answer differs from that of the next shorter row.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::policy::{PolicyPrefix, Row, RowKey};
use mesh_common::{Be16, PolicyEntry, PolicyKey};

use crate::netmap::{Action, Entry, EntryKey, NodePolicy, PortRange};
use crate::{Direction, Identity, RuleId};

/// Flows that differ in nothing but protocol and port.
type Ends = (Identity, Identity, Direction);

pub(super) fn compile(policy: &NodePolicy) -> BTreeMap<PolicyPrefix, PolicyEntry> {
    let mut groups: BTreeMap<Ends, Vec<(&EntryKey, &Entry)>> = BTreeMap::new();
    for (key, entry) in &policy.entries {
        let ends = (key.remote, key.local, key.direction);
        groups.entry(ends).or_default().push((key, entry));
    }
    // Put in order at once: a tree that grows row by row takes several times as long.
    let mut rows = Vec::with_capacity(policy.entries.len());
    for (ends, entries) in groups {
        group(policy, ends, &entries, &mut rows);
    }
    rows.into_iter().collect()
}

fn group(
    policy: &NodePolicy,
    ends: Ends,
    entries: &[(&EntryKey, &Entry)],
    rows: &mut Vec<(PolicyPrefix, PolicyEntry)>,
) {
    let every_proto: Vec<_> = entries
        .iter()
        .filter(|(key, _)| key.proto.is_none())
        .collect();
    let any = winner(policy, every_proto.iter().map(|(_, entry)| *entry));
    if let Some(answer) = any {
        rows.push((row(ends, 0, 0, PolicyPrefix::ANY_PROTO), answer));
    }
    let protos: BTreeSet<u8> = entries.iter().filter_map(|(key, _)| key.proto).collect();
    for proto in protos {
        let about: Vec<(PortRange, &Entry)> = entries
            .iter()
            .filter(|(key, _)| key.proto.is_none_or(|p| p == proto))
            .map(|(key, entry)| (key.ports, *entry))
            .collect();
        let mut put = |port, len, answer| {
            rows.push((row(ends, proto, port, PolicyPrefix::ANY_PORT + len), answer));
        };
        prefixes(&runs(policy, &about), 0, 0, any, &mut put);
    }
}

/// The deny, or else the accept, that stands first in the policy text.
fn winner<'a>(
    policy: &NodePolicy,
    entries: impl Iterator<Item = &'a Entry>,
) -> Option<PolicyEntry> {
    entries.map(|entry| rank(policy, entry)).min().map(ranked)
}

/// Whether it accepts, the line that says so, the rule: the least of them wins.
type Rank = (bool, u32, RuleId);

fn rank(policy: &NodePolicy, entry: &Entry) -> Rank {
    let line = policy.rules.get(&entry.rule);
    let line = line.map_or(u32::MAX, |rule| rule.line);
    (entry.action == Action::Accept, line, entry.rule)
}

fn ranked((accepts, _, rule): Rank) -> PolicyEntry {
    match accepts {
        true => PolicyEntry::accept(rule),
        false => PolicyEntry::deny(rule),
    }
}

fn row((remote, local, direction): Ends, proto: u8, port: u16, len: u32) -> PolicyPrefix {
    PolicyPrefix {
        len,
        key: PolicyKey::new(remote, local, direction, proto, port),
    }
}

/// From a port on, until the next such port: what is answered.
type Run = (u32, Option<PolicyEntry>);

/// The answer for every port of one protocol, the first of them 0.
fn runs(policy: &NodePolicy, about: &[(PortRange, &Entry)]) -> Vec<Run> {
    // What begins and what ends where, in one walk over the ports: there may be thousands.
    let mut turns: Vec<(u32, bool, Rank)> = Vec::with_capacity(2 * about.len());
    for (range, entry) in about.iter().filter(|(range, _)| range.first <= range.last) {
        let rank = rank(policy, entry);
        turns.push((u32::from(range.first), true, rank));
        turns.push((u32::from(range.last) + 1, false, rank));
    }
    turns.sort_unstable();
    let mut holding: BTreeMap<Rank, usize> = BTreeMap::new();
    let mut runs = vec![(0, None)];
    for turns in turns.chunk_by(|(one, ..), (other, ..)| one == other) {
        for (_, begins, rank) in turns {
            let count = holding.entry(*rank).or_default();
            match begins {
                true => *count += 1,
                false => *count -= 1,
            }
            if *count == 0 {
                holding.remove(rank);
            }
        }
        let start = turns[0].0;
        let answer = holding.first_key_value().map(|(rank, _)| ranked(*rank));
        match runs.last_mut() {
            _ if start > u32::from(u16::MAX) => {}
            Some(run) if run.0 == start => run.1 = answer,
            Some(run) if run.1 == answer => {}
            _ => runs.push((start, answer)),
        }
    }
    runs
}

/// Writes the prefixes below `port/len` whose answer is not what is inherited from above; `runs` are those
/// that its ports lie in.
fn prefixes(
    runs: &[Run],
    port: u16,
    len: u32,
    inherited: Option<PolicyEntry>,
    put: &mut impl FnMut(u16, u32, PolicyEntry),
) {
    // No answer below an answer: the row above holds for every port, so there is always one.
    if let [(_, answer)] = runs {
        if let Some(answer) = *answer
            && Some(answer) != inherited
        {
            put(port, len, answer);
        }
        return;
    }
    let middle = u32::from(port) + (1 << (15 - len));
    let before = runs.partition_point(|(start, _)| *start < middle);
    let from = runs.partition_point(|(start, _)| *start <= middle) - 1;
    prefixes(&runs[..before], port, len + 1, inherited, put);
    prefixes(&runs[from..], middle as u16, len + 1, inherited, put);
}

/// One of the kernel's rows as it should be; `None`: it should not be there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RowWrite {
    pub at: RowKey,
    pub row: Option<Row>,
}

/// What the kernel must write when `changed` rows have become what `rows` has of them. With each go the
/// ends that it is about: their row says of which lengths others are.
pub fn layout<'a>(
    changed: impl IntoIterator<Item = &'a PolicyPrefix>,
    rows: &BTreeMap<PolicyPrefix, PolicyEntry>,
) -> Vec<RowWrite> {
    let mut writes = Vec::new();
    let mut ends = BTreeSet::new();
    for prefix in changed {
        let key = prefix.key;
        ends.insert((key.remote, key.local, key.direction));
        if prefix.len != PolicyPrefix::ANY_PROTO
            && let Some(at) = RowKey::of(prefix)
        {
            let row = rows.get(prefix).map(|entry| Row::new(*entry, 0));
            writes.push(RowWrite { at, row });
        }
    }
    for (remote, local, direction) in ends {
        let first = PolicyKey {
            remote,
            local,
            direction,
            proto: 0,
            port: Be16::new(0),
        };
        writes.push(RowWrite {
            at: RowKey::every_proto(&first),
            row: every_proto(first, rows),
        });
    }
    writes
}

/// The row that speaks for every protocol between the ends of `first`, the least key about them.
fn every_proto(first: PolicyKey, rows: &BTreeMap<PolicyPrefix, PolicyEntry>) -> Option<Row> {
    let last = PolicyKey {
        proto: u8::MAX,
        port: Be16::new(u16::MAX),
        ..first
    };
    let of_length = |len| {
        let between = |key| PolicyPrefix { len, key };
        let mut others = rows.range(between(first)..=between(last));
        others.next().map_or(0, |_| Row::length(len))
    };
    let lengths = (PolicyPrefix::ANY_PORT..=PolicyPrefix::EXACT)
        .map(of_length)
        .fold(0, |lengths, length| lengths | length);
    let own = PolicyPrefix {
        len: PolicyPrefix::ANY_PROTO,
        key: first,
    };
    match rows.get(&own) {
        None if lengths == 0 => None,
        entry => {
            let entry = entry.copied().unwrap_or(PolicyEntry::NONE);
            Some(Row::new(entry, lengths))
        }
    }
}

/// The longest row around `key`, where `row` finds rows by their prefix.
pub fn longest(key: &PolicyKey, row: impl Fn(&PolicyPrefix) -> Option<PolicyEntry>) -> PolicyEntry {
    let port = u32::from(key.port.get());
    let ports = (PolicyPrefix::ANY_PORT..=PolicyPrefix::EXACT)
        .rev()
        .map(|len| {
            let ignored = PolicyPrefix::EXACT - len;
            (len, key.proto, ((port >> ignored) << ignored) as u16)
        });
    ports
        .chain([(PolicyPrefix::ANY_PROTO, 0, 0)])
        .find_map(|(len, proto, port)| {
            let key = PolicyKey {
                proto,
                port: Be16::new(port),
                ..*key
            };
            row(&PolicyPrefix { len, key })
        })
        .unwrap_or(PolicyEntry::NONE)
}
