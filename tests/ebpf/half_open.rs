//! The table of half-open flows: who makes room, what the agent ends, and who may know where a flow lies.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_common::flow::{FlowEntry, FlowKey, FlowState, Revocation, Stage, flags};
use mesh_common::half_open::{SETS, WAYS};
use mesh_common::maps;
use mesh_common::place::{Place, Secret};
use mesh_core::{Direction, Identity, RuleId};

use crate::kernel::Kernel;
use crate::scene::*;

/// A SYN from a port of the peer's, and the key of its flow.
fn syn(port: u16) -> Vec<u8> {
    tcp_between(PEER, [port, 22], Direction::Ingress, SYN)
}

fn keys(kernel: &Kernel) -> BTreeSet<u16> {
    let flows = kernel.half_open().into_iter();
    flows.map(|(key, _)| key.remote_port.get()).collect()
}

/// Ports of flows that lie in one set with the first of them.
fn neighbours(kernel: &Kernel, first: &FlowKey) -> Vec<u16> {
    let config = kernel.config();
    let set_of = |key: &FlowKey| Place::of(key, &config.secret).set(config.half_open_mask);
    let set = set_of(first);
    let key = |port| FlowKey {
        remote_port: mesh_common::Be16::new(port),
        ..*first
    };
    let ports = 1..u16::MAX;
    ports.filter(|port| set_of(&key(*port)) == set).collect()
}

#[test]
fn the_oldest_flow_of_a_full_set_makes_room() {
    let mut kernel = kernel();
    assert_eq!(kernel.outcome(Direction::Ingress, &syn(1)), PASS);
    let first = kernel.half_open()[0].0;
    let ports = neighbours(&kernel, &first);
    let start = kernel.now();
    let second = 1_000_000_000;
    for (nth, port) in ports[..7].iter().enumerate() {
        let now = start + nth as u64 * second;
        kernel.at(now, |kernel| {
            assert_eq!(kernel.outcome(Direction::Ingress, &syn(*port)), PASS);
        });
    }
    assert!(keys(&kernel).is_superset(&ports[..7].iter().copied().collect()));
    // The first is heard of again, so the second has been quiet for longest.
    kernel.at(start + 7 * second, |kernel| {
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(ports[0])), PASS);
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(ports[7])), PASS);
    });
    let mut wanted: BTreeSet<u16> = ports[..8].iter().copied().collect();
    wanted.remove(&ports[1]);
    let in_set = |kernel: &Kernel| -> BTreeSet<u16> {
        let ports: BTreeSet<u16> = ports.iter().copied().collect();
        keys(kernel).intersection(&ports).copied().collect()
    };
    assert_eq!(in_set(&kernel), wanted);
    // One that is confirmed leaves its place.
    let answer = tcp_between(PEER, [ports[2], 22], Direction::Egress, SYN_ACK);
    let ack = tcp_between(PEER, [ports[2], 22], Direction::Ingress, ACK);
    kernel.at(start + 8 * second, |kernel| {
        assert_eq!(kernel.outcome(Direction::Egress, &answer), PASS);
        assert_eq!(kernel.outcome(Direction::Ingress, &ack), PASS);
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(ports[8])), PASS);
    });
    wanted.remove(&ports[2]);
    wanted.insert(ports[8]);
    assert_eq!(in_set(&kernel), wanted);
}

/// A step of the times by which flows of a set make room.
const STEP: u64 = 1 << 24;

/// Ports whose flows share a set. The first seven are there, seen one step after the other from an even one; and
/// the time of the last.
fn full_set(kernel: &mut Kernel) -> (Vec<u16>, u64) {
    assert_eq!(kernel.outcome(Direction::Ingress, &syn(1)), PASS);
    let first = kernel.half_open()[0].0;
    let ports = neighbours(kernel, &first);
    let start = kernel.now() / STEP / 2 * 2 * STEP;
    for (nth, port) in (0..).zip(&ports[..7]) {
        see(kernel, start + nth * STEP, *port);
    }
    (ports, start + 6 * STEP)
}

fn see(kernel: &mut Kernel, now: u64, port: u16) {
    kernel.at(now, |kernel| {
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(port)), PASS);
    });
}

#[test]
fn all_flows_of_a_full_set_are_found() {
    let mut kernel = kernel();
    let (ports, _) = full_set(&mut kernel);
    for port in &ports[..7] {
        let answer = tcp_between(PEER, [*port, 22], Direction::Egress, SYN_ACK);
        assert_eq!(kernel.outcome(Direction::Egress, &answer), PASS);
    }
}

#[test]
fn flows_make_room_in_the_order_in_which_they_came() {
    let mut kernel = kernel();
    let (ports, last) = full_set(&mut kernel);
    for (nth, port) in (1..).zip(&ports[7..10]) {
        see(&mut kernel, last + nth * STEP, *port);
    }
    let there = keys(&kernel);
    for port in &ports[..3] {
        assert!(!there.contains(port));
    }
    assert!(there.is_superset(&ports[3..10].iter().copied().collect()));
}

#[test]
fn a_step_later_is_younger() {
    let mut kernel = kernel();
    let (ports, last) = full_set(&mut kernel);
    let start = last + 2 * STEP;
    for (nth, port) in (0..).zip(ports[..7].iter().rev()) {
        see(&mut kernel, start + nth * STEP, *port);
    }
    see(&mut kernel, start + 7 * STEP, ports[7]);
    assert!(!keys(&kernel).contains(&ports[6]));
    assert!(keys(&kernel).contains(&ports[5]));
}

#[test]
fn a_flow_of_the_next_second_is_young_and_one_beyond_is_old() {
    for (ahead, stays) in [(64, true), (65, false)] {
        let mut kernel = kernel();
        let (ports, last) = full_set(&mut kernel);
        see(&mut kernel, last + ahead * STEP, ports[6]);
        see(&mut kernel, last, ports[7]);
        assert_eq!(keys(&kernel).contains(&ports[6]), stays, "{ahead} steps");
    }
}

#[test]
fn a_review_ends_half_open_flows_and_tells_of_each_once() {
    let mut kernel = kernel();
    for port in 1..=100 {
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(port)), PASS);
    }
    let review = |kernel: &mut Kernel, tables| kernel.dataplane().review(&tables).unwrap();
    assert_eq!(review(&mut kernel, tables()), []);
    kernel.apply(&revoked());
    let mut ended = review(&mut kernel, revoked());
    assert_eq!(ended.len(), 100);
    for (_, entry) in &ended {
        assert_eq!(entry.state.generation, kernel.config().generation);
        assert_eq!(entry.state.flags, flags::DENIED);
        assert_eq!(entry.packets, [1, 0]);
    }
    let mut flows = kernel.half_open();
    for flows in [&mut flows, &mut ended] {
        flows.sort_by_key(|(key, _)| *key);
    }
    assert_eq!(flows, ended);
    assert_eq!(review(&mut kernel, revoked()), []);
    let answer = tcp_between(PEER, [7, 22], Direction::Egress, SYN_ACK);
    assert_eq!(kernel.outcome(Direction::Egress, &answer), Err("revoked"));
}

#[test]
fn what_ends_a_flow_leaves_alone_what_the_policy_in_force_has_judged() {
    let mut kernel = kernel();
    assert_eq!(kernel.outcome(Direction::Ingress, &syn(1)), PASS);
    let (key, entry) = kernel.half_open()[0];
    let tombstone = FlowState {
        generation: entry.state.generation + 1,
        flags: flags::DENIED,
        remote: Identity(5),
        local: Identity(6),
        rule: RuleId(7),
        peer: 8,
        ..entry.state
    };
    let asked = Revocation::new(key, &tombstone).bytes();
    let mut absent = asked;
    absent[0] ^= 1;
    for packet in [asked, absent] {
        kernel.explain("revoke", &packet);
        assert_eq!(kernel.half_open(), [(key, entry)]);
    }
    // What is cut short names no flow.
    assert_eq!(kernel.explain("revoke", &asked[..55]).0, 2);
    kernel.configure(|config| config.generation += 1);
    kernel.explain("revoke", &absent);
    assert_eq!(kernel.half_open(), [(key, entry)]);
    kernel.explain("revoke", &asked);
    let ended = FlowEntry {
        state: tombstone,
        ..entry
    };
    assert_eq!(kernel.half_open(), [(key, ended)]);
}

#[test]
fn the_secret_is_drawn_once_for_a_table() {
    let mut kernel = kernel();
    let secret = kernel.config().secret;
    assert_ne!(secret, Secret::default());
    assert_eq!(kernel.outcome(Direction::Ingress, &syn(1)), PASS);
    kernel.kill();
    kernel.start();
    assert_eq!(kernel.config().secret, secret);
    let answer = tcp_between(PEER, [1, 22], Direction::Egress, SYN_ACK);
    assert_eq!(kernel.outcome(Direction::Egress, &answer), PASS);
    assert_ne!(Kernel::new().config().secret, secret);
}

#[test]
fn the_flows_of_the_table_are_what_is_told_of_how_full_it_is() {
    let mut kernel = Kernel::for_floods(65_536);
    kernel.apply(&tables());
    for port in 1..=10 {
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(port)), PASS);
    }
    let usage = kernel.dataplane().usage().unwrap();
    let table = usage
        .iter()
        .find(|usage| usage.map == maps::CT_NEW)
        .unwrap();
    assert_eq!(
        (table.entries, table.capacity),
        (10, u64::from(SETS) * WAYS as u64)
    );
    assert!(table.memory_bytes >= table.capacity * 104);
}

#[test]
fn packets_of_one_half_open_flow_on_every_cpu_are_all_counted() {
    const THREADS: u32 = 4;
    const RUNS: u32 = 50_000;
    let mut kernel = kernel();
    assert_eq!(kernel.outcome(Direction::Ingress, &syn(1)), PASS);
    let runner = kernel.runner();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| runner.repeat(Direction::Ingress, &syn(1), RUNS));
        }
    });
    let flows = kernel.half_open();
    let [(_, entry)] = flows.as_slice() else {
        panic!("one flow: {flows:?}");
    };
    assert_eq!(entry.packets, [1 + THREADS * RUNS, 0]);
    assert_eq!(
        entry.bytes[0],
        u64::from(entry.packets[0]) * syn(1).len() as u64
    );
}

/// The agent reads while packets of the flow come.
#[test]
fn no_flow_is_read_half_written() {
    let kernel = &mut kernel();
    assert_eq!(kernel.outcome(Direction::Ingress, &syn(1)), PASS);
    let dataplane = kernel.dataplane.as_ref().expect("started");
    let runner = kernel.runner();
    let mut read = 0;
    std::thread::scope(|scope| {
        let writers =
            [1, 2].map(|_| scope.spawn(|| runner.repeat(Direction::Ingress, &syn(1), 300_000)));
        while !writers
            .iter()
            .all(std::thread::ScopedJoinHandle::is_finished)
        {
            let flows = dataplane.flows(Stage::HalfOpen).unwrap();
            let [(_, entry)] = flows.as_slice() else {
                panic!("one flow: {flows:?}");
            };
            assert_eq!(entry.bytes[0], u64::from(entry.packets[0]) * 40);
            read += 1;
        }
    });
    assert!(read > 10, "{read}");
}

#[test]
fn a_flow_that_is_over_is_told_to_nobody() {
    let mut kernel = kernel();
    for port in 1..=10 {
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(port)), PASS);
    }
    let told = |kernel: &mut Kernel| kernel.dataplane().flows(Stage::HalfOpen).unwrap().len();
    assert_eq!(told(&mut kernel), 10);
    kernel.age(60);
    assert_eq!(told(&mut kernel), 0);
    assert_eq!(
        kernel.half_open().len(),
        10,
        "until another needs the place"
    );
    kernel.apply(&revoked());
    assert_eq!(kernel.dataplane().review(&revoked()).unwrap(), []);
}

/// What a kernel takes for the header of Ethernet in front of a packet are bytes of the address.
#[test]
fn a_review_ends_flows_of_any_address() {
    let mut kernel = kernel();
    assert_eq!(kernel.outcome(Direction::Ingress, &syn(1)), PASS);
    let flow = kernel.flows()[0];
    let remotes: [IpAddr; 4] = [
        "fd00::86dd:1".parse().unwrap(),
        "fd00::800:1".parse().unwrap(),
        [134, 221, 0, 1].into(),
        [8, 0, 0, 1].into(),
    ];
    let flows = remotes.map(|remote| {
        let mut flow = flow;
        flow.key.remote = remote.into();
        flow
    });
    kernel.set_flows(&flows);
    kernel.apply(&revoked());
    assert_eq!(kernel.dataplane().review(&revoked()).unwrap().len(), 4);
    for (_, entry) in kernel.half_open() {
        assert_eq!(entry.state.flags, flags::DENIED);
    }
}
