//! The table of a policy's rows, as the kernel finds them and the agent changes them.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use std::collections::BTreeMap;

use mesh_common::policy::{Bucket, NoRoom, PolicyPrefix, Row, RowKey, Table, find, near};
use mesh_common::{Direction, Identity, PolicyEntry, PolicyKey, RuleId};
use proptest::prelude::*;

fn slots(rows: usize) -> Vec<Bucket> {
    vec![Bucket::EMPTY; Table::slots(rows)]
}

fn row_at(slots: &[Bucket], at: &RowKey) -> Row {
    let mask = slots[0].mask();
    let slot = |slot| slots.get(slot as usize);
    let found = find(at, mask, slot);
    assert!(near(at, mask, slot).is_none_or(|near| near == found));
    found
}

fn key(remote: u32, port: u16) -> RowKey {
    let (remote, local) = (Identity(remote), Identity(16));
    let key = PolicyKey::new(remote, local, Direction::Ingress, 6, port);
    let len = PolicyPrefix::EXACT;
    RowKey::of(&PolicyPrefix { len, key }).unwrap()
}

fn row(rule: u32) -> Row {
    Row::new(PolicyEntry::accept(RuleId(rule)), 0)
}

#[test]
fn rows_of_consecutive_numbers_find_room() {
    for (remotes, ports) in [(1, 60_000), (100, 1_000), (4_000, 25), (100_000, 1), (3, 1)] {
        let mut slots = slots(remotes * ports);
        let mut table = Table::new(&mut slots);
        for (number, (remote, port)) in (0..remotes)
            .flat_map(|remote| (0..ports).map(move |port| (remote, port)))
            .enumerate()
        {
            let at = key(16 + remote as u32, port as u16);
            assert_eq!(
                table.insert(at, row(1 + number as u32)),
                Ok(()),
                "{remotes} {ports} {number}"
            );
        }
    }
}

#[test]
fn a_table_that_is_full_takes_no_more_and_loses_none() {
    let mut slots = slots(0);
    let mut table = Table::new(&mut slots);
    let full = (1..).find(|port| table.insert(key(16, *port), row(1)) == Err(NoRoom));
    let full = full.unwrap();
    assert!(full > 12, "{full}");
    assert_eq!(row_at(&slots, &key(16, full)), Row::NOTHING);
    for port in 1..full {
        assert_eq!(row_at(&slots, &key(16, port)), row(1), "{port}");
    }
}

proptest! {
    /// Few keys and a table that is nearly full, so that rows lie far from where they hash to.
    #[test]
    fn it_is_a_map(changes in prop::collection::vec((1..40_u16, prop::option::of(1..9_u32)), 0..200)) {
        let (mut slots, mut expected) = (slots(0), BTreeMap::new());
        for (port, rule) in changes {
            let at = key(16, port);
            let mut table = Table::new(&mut slots);
            match rule {
                None => {
                    table.remove(&at);
                    expected.remove(&port);
                }
                Some(rule) => {
                    if table.insert(at, row(rule)).is_ok() {
                        expected.insert(port, row(rule));
                    }
                }
            }
            for port in 0..41 {
                let found = row_at(&slots, &key(16, port));
                prop_assert_eq!(found, expected.get(&port).copied().unwrap_or(Row::NOTHING));
            }
        }
        let mut table = Table::new(&mut slots);
        for port in expected.keys() {
            table.remove(&key(16, *port));
        }
        // No trace is left but the head.
        prop_assert!(slots[1..].iter().all(|bucket| *bucket == Bucket::EMPTY));
    }
}
