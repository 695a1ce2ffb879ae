//! What a set remembers, and what a flood does to the others.

extern crate std;

use std::collections::BTreeSet;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::flow::FlowState;
use crate::place::Place;
use crate::place::tests::{key, secret};

const SECOND: u64 = 1_000_000_000;

fn entry(last_seen: u64) -> FlowEntry {
    FlowEntry {
        state: FlowState {
            last_seen,
            ..FlowState::default()
        },
        ..FlowEntry::default()
    }
}

#[test]
fn a_set_holds_what_was_put_until_it_is_removed() {
    let mut set = Set::default();
    assert_eq!(set.position(1), None);
    assert_eq!(set.get(1, &key(1)), None);
    set.put(1, &key(1), &entry(SECOND));
    set.put(2, &key(2), &entry(2 * SECOND));
    assert_eq!(set.get(1, &key(1)), Some(&entry(SECOND)));
    // Another flow by chance of the same tag.
    assert_eq!(set.get(2, &key(1)), None);
    set.change(2, &key(1), |_| panic!("another flow"));
    set.remove(2, &key(1));
    set.put(1, &key(1), &entry(3 * SECOND));
    set.change(2, &key(2), |entry| entry.opened = 9);
    set.change(3, &key(3), |_| panic!("a flow that is not there"));
    let changed = FlowEntry {
        opened: 9,
        ..entry(2 * SECOND)
    };
    let both = vec![(key(1), entry(3 * SECOND)), (key(2), changed)];
    let flows = |set: &Set| {
        let mut flows: Vec<_> = set.flows().collect();
        flows.sort_by_key(|(key, _)| *key);
        flows
    };
    assert_eq!(flows(&set), both);
    set.remove(3, &key(3));
    set.remove(1, &key(1));
    assert_eq!(flows(&set), both[1..]);
    set.put(2, &key(3), &entry(SECOND));
    assert_eq!(flows(&set), [(key(3), entry(SECOND))]);
}

#[test]
fn the_flow_that_was_quiet_for_longest_makes_room() {
    // Also where the step at which flows were seen is about to begin anew, and after years.
    for start in [SECOND, (1 << (32 + STEP)) - 4 * SECOND, 1 << 62] {
        let mut set = Set::default();
        for number in 0..WAYS as u32 {
            let seen = start + u64::from(number) * SECOND;
            set.put(1 + number, &key(number), &entry(seen));
        }
        // A packet of the first.
        set.change(1, &key(0), |entry| {
            entry.state.last_seen = start + 8 * SECOND;
        });
        set.put(100, &key(100), &entry(start + 9 * SECOND));
        assert_eq!(set.get(2, &key(1)), None);
        // One that is gone makes room before one that stands.
        set.remove(5, &key(4));
        // Another CPU has seen it, whose clock is ahead.
        set.put(101, &key(101), &entry(start + 10 * SECOND + 500_000_000));
        set.put(102, &key(102), &entry(start + 10 * SECOND));
        let left: BTreeSet<_> = set.flows().map(|(key, _)| key).collect();
        let wanted = [0, 3, 5, 6, 100, 101, 102].map(key);
        assert_eq!(left, BTreeSet::from(wanted), "from {start}");
    }
}

/// What the table's size is for.
#[test]
fn a_handshake_of_a_second_outlives_a_flood_of_one_peer() {
    let secret = secret(7);
    let mut sets = vec![Set::default(); SETS as usize];
    let put = |sets: &mut [Set], now: u64, number: u32| {
        let place = Place::of(&key(number), &secret);
        sets[place.set(SETS - 1) as usize].put(place.tag(), &key(number), &entry(now));
    };
    let honest = 1_000;
    let left = |sets: &[Set]| {
        let is_left = |number: &u32| {
            let place = Place::of(&key(*number), &secret);
            let set = &sets[place.set(SETS - 1) as usize];
            set.get(place.tag(), &key(*number)).is_some()
        };
        (0..honest).filter(is_left).count()
    };
    // By who opens them, as `budget::NEW_FLOWS` has it.
    for (rate, seconds, least) in [(4_096, 1, 1_000), (4_096, 5, 970), (16_384, 1, 990)] {
        let mut number = honest;
        // The table is full of the flood when it begins, and the honest ones in the midst of it.
        for second in 0..32 + seconds {
            if second == 32 {
                for number in 0..honest {
                    put(&mut sets, second * SECOND, number);
                }
            }
            for flow in 0..rate {
                put(&mut sets, second * SECOND + flow * SECOND / rate, number);
                number += 1;
            }
        }
        assert!(
            left(&sets) >= least,
            "{} of {honest} after {seconds} s of {rate} a second",
            left(&sets)
        );
        sets.fill(Set::default());
    }
}
