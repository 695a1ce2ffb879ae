//! Events to the last field: what one says, how many there may be, and when a reader is woken up.

mod denials;

use std::net::IpAddr;

use mesh_agent::dataplane::EventKind::{Closed, Confirmed, Denied, Opened, Revoked};
use mesh_agent::dataplane::FlowEvent;
use mesh_common::budget::{Bucket, PeerLoad, Rate};
use mesh_common::flow::FlowKey;
use mesh_common::{Be16, DropReason, maps};
use mesh_core::Direction::{Egress, Ingress};
use mesh_core::{Identity, RuleId};
use rustix::event::{Timespec, epoll};

use crate::kernel::{Kernel, full_at};
use crate::scene::*;

/// Of the connection that peer 2 opens.
fn key() -> FlowKey {
    FlowKey {
        remote: IpAddr::from(PEER).into(),
        local: IpAddr::from(ME).into(),
        remote_port: Be16::new(40_000),
        local_port: Be16::new(22),
        proto: 6,
        pad: 0,
        pad2: 0,
    }
}

#[test]
fn an_event_says_all_of_its_flow() {
    let mut kernel = kernel();
    // Of somebody else, and long before: nothing of it is left in the next.
    kernel.at(5, |kernel| {
        for (flags, reason) in [(SYN_ACK | RST, "tcp flags"), (SYN, "no rule")] {
            let denied = tcp_between(OTHER, [5, 6], Egress, flags);
            assert_eq!(kernel.outcome(Egress, &denied), Err(reason));
        }
    });
    let told = |kernel: &mut Kernel, direction, flags| {
        let before = kernel.flows();
        kernel.at_once(|kernel, now| {
            kernel.events();
            kernel.set_flows(&before);
            assert!(passes(kernel, direction, flags));
            let [event] = kernel.events()[..] else {
                panic!("one event");
            };
            (event, now)
        })
    };
    let (event, opened) = told(&mut kernel, Ingress, SYN);
    let expected = FlowEvent {
        time: opened,
        first: opened,
        bytes: [40, 0],
        packets: [1, 0],
        key: key(),
        remote: Identity(18),
        local: Identity(16),
        rule: RuleId(1),
        peer: 2,
        kind: Opened as u8,
        direction: 0,
        reason: 0,
        tcp: 0,
        length: 40,
    };
    assert_eq!(event, expected);
    assert!(passes(&kernel, Egress, SYN_ACK));
    let (event, now) = told(&mut kernel, Ingress, ACK);
    let expected = FlowEvent {
        time: now,
        bytes: [80, 40],
        packets: [2, 1],
        kind: Confirmed as u8,
        ..expected
    };
    assert_eq!(event, expected);
    let (event, now) = told(&mut kernel, Egress, RST);
    let expected = FlowEvent {
        time: now,
        bytes: [80, 80],
        packets: [2, 2],
        kind: Closed as u8,
        ..expected
    };
    assert_eq!(event, expected);
    // Once: that it goes on being closed is no news.
    for direction in [Ingress, Egress] {
        assert!(passes(&kernel, direction, RST));
    }
    assert_eq!(kernel.events(), []);
    kernel.apply(&revoked());
    let [before] = kernel.flows()[..] else {
        panic!("one flow");
    };
    let (event, now) = kernel.at_once(|kernel, now| {
        kernel.events();
        kernel.set_flows(&[before]);
        assert!(!passes(kernel, Ingress, RST));
        (kernel.events()[0], now)
    });
    let expected = FlowEvent {
        time: now,
        bytes: [160, 120],
        packets: [4, 3],
        rule: RuleId::NONE,
        kind: Revoked as u8,
        reason: DropReason::Revoked as u8,
        ..expected
    };
    assert_eq!(event, expected);
}

#[test]
fn each_kind_and_each_peer_has_exactly_so_many_events() {
    let mut kernel = kernel();
    let interval = |rate: u64| 1_000_000_000 / rate;
    let (of_peer, of_kind) = (interval(100) * 199, interval(1_000) * 999);
    let denied = tcp_between(PEER, [40_000, 23], Ingress, SYN);
    for (what, packet) in [(Denied, denied), (Opened, tcp(Ingress, SYN))] {
        for (peer, kind, expected) in [
            (of_peer, of_kind, true),
            (of_peer + 1, of_kind, false),
            (of_peer, of_kind + 1, false),
            (of_peer + 1, of_kind + 1, false),
        ] {
            let lost = |kernel: &mut Kernel| kernel.dataplane().counters().unwrap().events_lost;
            let (told, lost, after, tokens, now) = kernel.at_once(|kernel, now| {
                let keys: Vec<_> = kernel.denials().keys().map(Result::unwrap).collect();
                for key in keys {
                    kernel.denials().remove(&key).unwrap();
                }
                kernel.set_flows(&[]);
                let load = PeerLoad {
                    events: full_at(now + peer),
                    ..PeerLoad::default()
                };
                kernel.set_load(2, load);
                kernel.set_tokens(what, full_at(now + kind));
                let before = lost(kernel);
                kernel.events();
                assert_eq!(kernel.run(Ingress, &packet).0, what == Opened);
                let mut gone = lost(kernel);
                for (kind, count) in &mut gone {
                    *count -= before[kind];
                }
                let tokens = kernel.tokens(what);
                (kernel.events().len(), gone, kernel.load(2), tokens, now)
            });
            assert_eq!(told, usize::from(expected), "{what:?}");
            for (kind, count) in lost {
                let mine = kind == what && !expected;
                assert_eq!(count, u64::from(mine), "{kind:?}");
            }
            // The peer's own token is asked for first, and one that was found is gone.
            let before = full_at(now + peer);
            let paid = before.taken(now, &Rate::new(100, 200));
            let pays = peer <= of_peer;
            assert_eq!(after.events, if pays { paid } else { before }, "{what:?}");
            assert_eq!(after.errors, Bucket::default());
            assert_eq!(after.new[0] != Bucket::default(), what == Opened);
            let before = full_at(now + kind);
            let paid = before.taken(now, &Rate::new(1_000, 1_000));
            let cpus = tokens.iter().filter(|tokens| **tokens == paid).count();
            assert_eq!(cpus, usize::from(expected), "{what:?}: {tokens:?}");
            assert!(tokens.iter().all(|tokens| [before, paid].contains(tokens)));
        }
    }
}

#[test]
fn a_revocation_is_told_of_whatever_its_peer_has_used() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    kernel.apply(&revoked());
    let far = kernel.now() + 1_000_000_000_000;
    let used = PeerLoad {
        events: full_at(far),
        ..PeerLoad::default()
    };
    kernel.set_load(2, used);
    kernel.events();
    assert!(!passes(&kernel, Ingress, ACK));
    assert!(!passes(&kernel, Ingress, ACK));
    let kinds: Vec<_> = kernel.events().iter().map(|e| e.kind().unwrap()).collect();
    assert_eq!(kinds, [Revoked], "but not of the denials that follow");
    assert_eq!(kernel.load(2), used);
    let lost = kernel.dataplane().counters().unwrap().events_lost;
    assert_eq!((lost[&Denied], lost[&Revoked]), (1, 0));
    // Its own kind's tokens it needs.
    kernel.apply(&tables());
    handshake(&mut kernel);
    kernel.apply(&revoked());
    kernel.set_tokens(Revoked, full_at(far));
    kernel.events();
    assert!(!passes(&kernel, Ingress, ACK));
    assert_eq!(kernel.events(), []);
    let lost = kernel.dataplane().counters().unwrap().events_lost;
    assert_eq!((lost[&Denied], lost[&Revoked]), (1, 1));
}

#[test]
fn a_reader_is_woken_up_when_a_quarter_of_the_ring_is_full() {
    let mut kernel = kernel();
    let ring = kernel.ring();
    let waker = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&waker, &ring, epoll::EventData::new_u64(0), edges).unwrap();
    let is_woken = |milliseconds: i64| {
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: milliseconds * 1_000_000,
        };
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }];
        epoll::wait(&waker, &mut events, Some(&patience)).unwrap() == 1
    };
    // One record is a header and an event, so that none of them ends at the very quarter.
    const RECORD: usize = 8 + size_of::<FlowEvent>();
    let quarter = maps::EVENTS_BYTES as usize / 4 / RECORD;
    is_woken(0);
    for port in 0..=quarter {
        kernel.set_load(3, PeerLoad::default());
        kernel.set_tokens(Denied, Bucket::default());
        let denied = tcp_between(OTHER, [40_000, port as u16], Ingress, SYN);
        assert!(!kernel.run(Ingress, &denied).0);
    }
    assert!(!is_woken(50), "the reader will come by itself");
    kernel.set_load(3, PeerLoad::default());
    let denied = tcp_between(OTHER, [40_000, 65_535], Ingress, SYN);
    assert!(!kernel.run(Ingress, &denied).0);
    assert!(is_woken(900), "much has gathered");
    drop(ring);
    assert_eq!(kernel.events().len(), quarter + 2);
}

#[test]
fn of_a_peer_without_room_nothing_is_told() {
    let mut kernel = kernel();
    for number in 0..maps::PEER_CAPACITY {
        kernel.set_load(1_000 + number, PeerLoad::default());
    }
    let denied = tcp_between(OTHER, [40_000, 22], Ingress, SYN);
    assert_eq!(kernel.outcome(Ingress, &denied), Err("no rule"));
    assert_eq!(kernel.events(), []);
    let lost = kernel.dataplane().counters().unwrap().events_lost;
    assert_eq!(lost[&Denied], 1);
}

#[test]
fn what_was_lost_is_told_once_by_whichever_agent() {
    let mut kernel = kernel();
    let far = kernel.now() + 1_000_000_000_000;
    kernel.set_tokens(Denied, full_at(far));
    let deny = |kernel: &Kernel, port| {
        let denied = tcp_between(OTHER, [40_000, port], Ingress, SYN);
        assert!(!kernel.run(Ingress, &denied).0);
    };
    deny(&kernel, 1);
    deny(&kernel, 2);
    assert_eq!(kernel.dataplane().losses().unwrap(), [(Denied, 2)].into());
    assert_eq!(kernel.dataplane().losses().unwrap(), [].into());
    deny(&kernel, 3);
    kernel.kill();
    kernel.start();
    kernel.apply(&tables());
    deny(&kernel, 4);
    assert_eq!(kernel.dataplane().losses().unwrap(), [(Denied, 2)].into());
    assert_eq!(kernel.dataplane().losses().unwrap(), [].into());
    let lost = kernel.dataplane().counters().unwrap().events_lost;
    assert_eq!(lost[&Denied], 4, "since the maps were made");
}
