//! Records from events and walks.

mod words;

use mesh_common::event::FlowEvent;
use mesh_common::flow::FlowState;
use mesh_common::{Address, Be16};

use super::denials::{OF_ONE_PEER, deny_key};
use super::*;
use crate::Identity;

fn key(port: u16) -> FlowKey {
    FlowKey {
        remote: Address::from(std::net::IpAddr::from([100, 64, 0, 2])),
        local: Address::from(std::net::IpAddr::from([100, 64, 0, 1])),
        remote_port: Be16::new(40_000),
        local_port: Be16::new(port),
        proto: 6,
        ..FlowKey::NONE
    }
}

fn event(kind: EventKind, port: u16) -> FlowEvent {
    FlowEvent {
        time: 20,
        first: 10,
        bytes: [60, 0],
        packets: [1, 0],
        key: key(port),
        remote: Identity(18),
        local: Identity(16),
        rule: RuleId(7),
        peer: 2,
        kind: kind as u8,
        direction: Direction::Ingress as u8,
        reason: if kind == EventKind::Denied {
            DropReason::NoRule as u8
        } else {
            0
        },
        tcp: 2,
        length: 60,
    }
}

fn entry(bytes: u64, flags: u32) -> FlowEntry {
    FlowEntry {
        state: FlowState {
            last_seen: 30,
            flags,
            remote: Identity(18),
            local: Identity(16),
            rule: RuleId(7),
            peer: 2,
            ..FlowState::default()
        },
        packets: [2, 1],
        bytes: [bytes, 50],
        opened: 10,
    }
}

fn told(log: &mut FlowLog) -> Vec<(Kind, [u64; 2])> {
    std::iter::from_fn(|| log.poll_record())
        .map(|record| (record.kind, record.bytes))
        .collect()
}

#[test]
fn a_flow_is_told_of_from_its_first_packet_to_its_end() {
    let mut log = FlowLog::default();
    log.handle_event(&event(EventKind::Opened, 22));
    log.handle_event(&event(EventKind::Confirmed, 22));
    assert_eq!(
        told(&mut log),
        [(Kind::Opened, [60, 0]), (Kind::Confirmed, [60, 0])]
    );
    log.handle_flow(key(22), &entry(100, 0), 30);
    log.handle_walked(40);
    assert_eq!(told(&mut log), [(Kind::Active, [100, 50])]);
    // Nothing moved: nothing to tell.
    log.handle_flow(key(22), &entry(100, 0), 30);
    log.handle_walked(50);
    assert_eq!(told(&mut log), []);
}

/// A flow that its ends close at 20, after `bytes` of the opener's.
fn closed(log: &mut FlowLog, bytes: u64) {
    log.handle_flow(key(22), &entry(bytes, 0), 30);
    log.handle_event(&event(EventKind::Closed, 22));
}

const BOTH_FINS: u32 = flags::CONFIRMED | flags::FIN_OPENER | flags::FIN_RESPONDER;

#[test]
fn a_close_is_told_once_with_the_packets_that_follow_it() {
    let mut log = FlowLog::default();
    closed(&mut log, 100);
    assert_eq!(told(&mut log), [(Kind::Active, [100, 50])]);
    assert_eq!(log.poll_closed(20 + LAST_PACKETS - 1), None);
    assert_eq!(log.poll_closed(20 + LAST_PACKETS), Some(key(22)));
    assert_eq!(log.poll_closed(20 + LAST_PACKETS), None);
    let last = entry(152, BOTH_FINS);
    log.handle_closed(key(22), Some(&last));
    let record = log.poll_record().unwrap();
    assert_eq!((record.kind, record.time), (Kind::Closed, 20));
    assert_eq!((record.bytes, record.packets), ([152, 50], [2, 1]));
    // The table holds it for a while, and then does not.
    for _ in 0..2 {
        log.handle_flow(key(22), &last, 30);
        log.handle_walked(60);
    }
    log.handle_walked(70);
    log.handle_walked(80);
    assert_eq!(told(&mut log), []);
}

#[test]
fn a_close_is_told_whoever_finds_it_first() {
    // The table has it no more.
    let mut log = FlowLog::default();
    closed(&mut log, 100);
    told(&mut log);
    assert!(log.poll_closed(u64::MAX).is_some());
    log.handle_closed(key(22), None);
    assert_eq!(told(&mut log), [(Kind::Closed, [100, 50])]);
    // Two walks come before.
    let mut log = FlowLog::default();
    closed(&mut log, 100);
    told(&mut log);
    log.handle_walked(30);
    log.handle_walked(40);
    assert_eq!(told(&mut log), [(Kind::Closed, [100, 50])]);
    assert_eq!(log.poll_closed(u64::MAX), None);
    // No event told of it.
    let mut log = FlowLog::default();
    log.handle_flow(key(22), &entry(100, BOTH_FINS), 30);
    assert!(log.poll_closed(u64::MAX).is_some());
    log.handle_closed(key(22), Some(&entry(100, BOTH_FINS)));
    assert_eq!(told(&mut log), [(Kind::Closed, [100, 50])]);
}

#[test]
fn the_same_ports_opened_again_are_another_flow() {
    let again = |kind| FlowEvent {
        first: 15,
        ..event(kind, 22)
    };
    let mut log = FlowLog::default();
    closed(&mut log, 100);
    told(&mut log);
    // Before the first one's end was told.
    log.handle_event(&again(EventKind::Opened));
    assert_eq!(
        told(&mut log),
        [(Kind::Closed, [100, 50]), (Kind::Opened, [60, 0])]
    );
    // The table holds both for a moment, and events may have waited.
    log.handle_flow(key(22), &entry(100, BOTH_FINS), 30);
    log.handle_event(&event(EventKind::Closed, 22));
    assert_eq!(log.poll_closed(u64::MAX), None);
    assert_eq!(told(&mut log), []);
    // Of an end that no event told of, the walk knows only that it was.
    let third = FlowEntry {
        opened: 17,
        ..entry(300, 0)
    };
    log.handle_flow(key(22), &third, 30);
    assert_eq!(
        told(&mut log),
        [(Kind::Idle, [60, 0]), (Kind::Active, [300, 50])]
    );
}

#[test]
fn what_a_peer_has_used_does_not_shrink() {
    let mut log = FlowLog::default();
    let bytes = |log: &FlowLog| log.usage()[&2].bytes;
    log.handle_event(&event(EventKind::Opened, 22));
    assert_eq!(bytes(&log), [60, 0]);
    // A look between the walks is no walk.
    log.handle_usage(key(22), &entry(100, 0));
    assert_eq!(bytes(&log), [100, 50]);
    assert_eq!(told(&mut log), [(Kind::Opened, [60, 0])]);
    log.handle_flow(key(22), &entry(100, 0), 30);
    assert_eq!(told(&mut log), [(Kind::Active, [100, 50])]);
    // An event that waited.
    log.handle_event(&event(EventKind::Confirmed, 22));
    assert_eq!(told(&mut log), [(Kind::Confirmed, [100, 50])]);
    // One-way flows count if they were told of, and the packet that a tombstone refuses does not.
    log.handle_half_open_usage(key(514), &entry(900, 0));
    log.handle_usage(key(22), &entry(160, flags::DENIED));
    assert_eq!(bytes(&log), [100, 50]);
    log.handle_walked(40);
    log.handle_walked(50);
    told(&mut log);
    assert_eq!(bytes(&log), [100, 50]);
    let other = FlowEntry {
        opened: 60,
        ..entry(7, 0)
    };
    log.handle_usage(key(22), &other);
    assert_eq!(bytes(&log), [107, 100]);
    // A peer that is gone is forgotten with its last flow.
    log.forget_usage(|_| true);
    assert_eq!(bytes(&log), [107, 100]);
    log.handle_walked(70);
    log.handle_walked(80);
    log.forget_usage(|_| false);
    assert_eq!(bytes(&log), [107, 100]);
    log.forget_usage(|peer| peer == 2);
    assert!(log.usage().is_empty());
}

#[test]
fn a_flow_that_vanishes_has_ended_in_silence() {
    let mut log = FlowLog::default();
    log.handle_flow(key(22), &entry(100, 0), 30);
    log.handle_walked(40);
    log.handle_walked(50);
    assert_eq!(
        told(&mut log),
        [(Kind::Active, [100, 50]), (Kind::Idle, [100, 50])]
    );
}

#[test]
fn flows_end_with_the_filter() {
    let mut log = FlowLog::default();
    log.handle_flow(key(22), &entry(100, 0), 30);
    log.handle_flow(key(23), &entry(100, BOTH_FINS), 30);
    log.handle_flow(key(24), &entry(100, flags::DENIED), 30);
    told(&mut log);
    log.handle_over(40);
    assert_eq!(
        told(&mut log),
        [(Kind::Idle, [100, 50]), (Kind::Closed, [100, 50])]
    );
    log.handle_walked(50);
    assert_eq!(told(&mut log), []);
}

#[test]
fn one_way_flows_go_on_being_told_of_and_a_flood_of_them_is_not() {
    let mut log = FlowLog::default();
    log.handle_event(&event(EventKind::Opened, 514));
    for bytes in [100, 200] {
        log.handle_half_open(key(514), &entry(bytes, 0), 30);
        log.handle_half_open(key(515), &entry(bytes, 0), 30);
        log.handle_walked(40);
    }
    assert_eq!(
        told(&mut log),
        [
            (Kind::Opened, [60, 0]),
            (Kind::Active, [100, 50]),
            (Kind::Active, [200, 50])
        ]
    );
}

#[test]
fn a_revoked_flow_is_told_of_once_whoever_finds_it() {
    let mut log = FlowLog::default();
    log.handle_flow(key(22), &entry(100, 0), 30);
    told(&mut log);
    log.handle_ended(key(22), &entry(100, flags::DENIED), [34, 35]);
    log.handle_event(&event(EventKind::Revoked, 22));
    log.handle_flow(key(22), &entry(160, flags::DENIED), 30);
    log.handle_walked(40);
    log.handle_walked(50);
    assert_eq!(told(&mut log), [(Kind::Revoked, [100, 50])]);
    // Allowed again in time, it is a flow like any other.
    let mut log = FlowLog::default();
    log.handle_event(&event(EventKind::Revoked, 22));
    log.handle_flow(key(22), &entry(200, 0), 30);
    assert_eq!(
        told(&mut log),
        [(Kind::Revoked, [60, 0]), (Kind::Active, [200, 50])]
    );
}

#[test]
fn denials_that_no_event_told_of_are_found_in_the_table() {
    let mut log = FlowLog::default();
    log.handle_event(&event(EventKind::Denied, 23));
    assert_eq!(told(&mut log), [(Kind::Denied, [60, 0])]);
    let counted = |port, packets| {
        let key = deny_key(&Record { port, ..record() });
        let entry = DenyEntry {
            packets,
            bytes: packets * 60,
            first: 10,
            last: 20,
            told: 20,
            rule: RuleId(7),
        };
        (key, entry)
    };
    log.handle_denials([counted(23, 1), counted(25, 1)].into_iter());
    assert_eq!(
        told(&mut log),
        [(Kind::Denied, [60, 0])],
        "port 25 alone is new"
    );
    log.handle_denials([counted(23, 5), counted(25, 1)].into_iter());
    assert_eq!(told(&mut log), [(Kind::Denied, [300, 0])]);
}

#[test]
fn a_peer_that_tries_every_port_is_told_of_in_few_lines() {
    let mut log = FlowLog::default();
    let counted = |peer, port: u16| {
        let mut key = deny_key(&record());
        (key.peer, key.port) = (peer, Be16::new(port));
        let entry = DenyEntry {
            packets: if port == 900 { 5 } else { 1 },
            bytes: 60,
            first: port.into(),
            last: 2_000,
            told: 20,
            rule: RuleId(7),
        };
        (key, entry)
    };
    let scan = (1..=1_000).map(|port| counted(2, port));
    log.handle_denials(scan.chain([counted(3, 25)]));
    let records: Vec<_> = std::iter::from_fn(|| log.poll_record()).collect();
    assert_eq!(records.len(), OF_ONE_PEER + 2);
    let packets = |peer| {
        let records = records.iter().filter(|record| record.peer == peer);
        records.map(|record| record.packets[0]).sum::<u64>()
    };
    assert_eq!((packets(2), packets(3)), (1_004, 1));
    let named = |port| records.iter().any(|r| r.port == port);
    assert!(named(900), "the most frequent");
    let folded = records.iter().find(|r| r.peer == 2 && r.key.proto == 0);
    let folded = folded.unwrap();
    assert_eq!(folded.packets[0], 1_000 - OF_ONE_PEER as u64);
    assert_eq!((folded.port, folded.time), (0, 2_000));
    assert_eq!(folded.reason, Some(DropReason::NoRule));
    assert_eq!(folded.rule, RuleId(7));
}

/// A denial as the log writes it.
fn record() -> Record {
    let mut log = FlowLog::default();
    log.handle_event(&event(EventKind::Denied, 23));
    log.poll_record().unwrap()
}

#[test]
fn a_count_that_wraps_goes_on() {
    let mut log = FlowLog::default();
    let mut bytes = 0;
    let mut packets = |packets, opened| {
        bytes += 60;
        let counted = FlowEntry {
            packets: [packets, 1],
            opened,
            ..entry(bytes, 0)
        };
        log.handle_flow(key(22), &counted, 30);
        std::iter::from_fn(|| log.poll_record())
            .last()
            .unwrap()
            .packets
    };
    assert_eq!(packets(u32::MAX - 1, 10), [0xffff_fffe, 1]);
    assert_eq!(packets(3, 10), [0x1_0000_0003, 1]);
    // An event that waited.
    assert_eq!(packets(2, 10), [0x1_0000_0003, 1]);
    // Another flow under the same key.
    assert_eq!(packets(5, 11), [5, 1]);
}

#[test]
fn losses_are_counted_by_kind() {
    let mut log = FlowLog::default();
    log.handle_lost([(EventKind::Denied, 5)]);
    log.handle_lost([(EventKind::Denied, 2)]);
    let losses: Vec<_> = std::iter::from_fn(|| log.poll_loss())
        .map(|loss| (loss.kind, loss.count))
        .collect();
    assert_eq!(losses, [(EventKind::Denied, 5), (EventKind::Denied, 2)]);
}

/// Events wait for their reader, and what an edit ends is told at once.
#[test]
fn what_was_told_late_does_not_revoke_a_flow_twice() {
    let at = |kind, time| FlowEvent {
        time,
        ..event(kind, 22)
    };
    let denied = entry(100, flags::DENIED);
    let mut log = FlowLog::default();
    log.handle_ended(key(22), &denied, [34, 35]);
    log.handle_event(&at(EventKind::Opened, 20));
    log.handle_event(&at(EventKind::Confirmed, 21));
    log.handle_flow(key(22), &denied, 90);
    let kinds = |log: &mut FlowLog| -> Vec<_> {
        std::iter::from_fn(|| log.poll_record())
            .map(|record| (record.kind, record.time))
            .collect()
    };
    assert_eq!(
        kinds(&mut log),
        [
            (Kind::Revoked, 35),
            (Kind::Opened, 20),
            (Kind::Confirmed, 21)
        ]
    );
    // Allowed again at 50, which nobody has heard of, and revoked again.
    log.handle_ended(key(22), &denied, [60, 61]);
    log.handle_event(&at(EventKind::Opened, 50));
    log.handle_flow(key(22), &denied, 90);
    assert_eq!(kinds(&mut log), [(Kind::Revoked, 61), (Kind::Opened, 50)]);
    // The flow's own packet met the change first.
    log.handle_event(&at(EventKind::Opened, 70));
    log.handle_event(&at(EventKind::Revoked, 80));
    log.handle_ended(key(22), &denied, [80, 81]);
    log.handle_flow(key(22), &denied, 90);
    assert_eq!(kinds(&mut log), [(Kind::Opened, 70), (Kind::Revoked, 80)]);
    // A walk did, which knows not when.
    log.handle_event(&at(EventKind::Opened, 91));
    log.handle_flow(key(22), &denied, 96);
    log.handle_ended(key(22), &denied, [94, 95]);
    assert_eq!(kinds(&mut log), [(Kind::Opened, 91), (Kind::Revoked, 96)]);
}
