//! Whole packets through an [`Engine`]: what the programs do with the same is asked by the conformance suite.

use std::net::Ipv4Addr;

use mesh_common::{DropReason, Identity, RuleId};

use super::*;

const SECOND: u64 = 1_000_000_000;

fn udp(from: [u8; 4], to: [u8; 4], ports: [u16; 2]) -> Vec<u8> {
    let mut packet = vec![0; 28];
    packet[0] = 0x45;
    packet[9] = 17;
    packet[12..16].copy_from_slice(&from);
    packet[16..20].copy_from_slice(&to);
    packet[20..22].copy_from_slice(&ports[0].to_be_bytes());
    packet[22..24].copy_from_slice(&ports[1].to_be_bytes());
    packet
}

/// 100.64.0.1 is this node; 100.64.0.2 may open UDP towards it.
fn tables() -> Tables {
    let entry = |number, flags, peer| IdentityEntry {
        identity: Identity(number),
        flags,
        peer,
    };
    let host = |last| mesh_common::addr::Prefix {
        len: 128,
        address: Address::from(std::net::IpAddr::from(Ipv4Addr::new(100, 64, 0, last))),
    };
    let rule = RuleId(7);
    let row = PolicyPrefix {
        len: PolicyPrefix::ANY_PORT,
        key: PolicyKey::new(Identity(17), Identity(16), Direction::Ingress, 17, 0),
    };
    Tables {
        identities: BTreeMap::from([
            (host(1), entry(16, IdentityEntry::LOCAL, 0)),
            (host(2), entry(17, 0, 2)),
        ]),
        rows: BTreeMap::from([(row, PolicyEntry::accept(rule))]),
        rules: [rule].into(),
        ..Tables::default()
    }
}

const ME: [u8; 4] = [100, 64, 0, 1];
const PEER: [u8; 4] = [100, 64, 0, 2];

#[test]
fn without_tables_everything_is_dropped() {
    let filter = Filter::new();
    let verdict = filter.judge(Direction::Ingress, &mut udp(PEER, ME, [1, 2]));
    assert_eq!(verdict.drop, Some(DropReason::NoPolicy));
}

#[test]
fn an_answer_passes_and_what_is_unsolicited_does_not() {
    let mut engine = Engine::default();
    engine.apply(&tables());
    let out = engine.judge(Direction::Egress, &mut udp(ME, PEER, [53, 4000]), 0);
    assert_eq!(out.drop, Some(DropReason::NoRule));
    let ask = engine.judge(Direction::Ingress, &mut udp(PEER, ME, [4000, 53]), 0);
    assert!(ask.passes());
    let answer = engine.judge(Direction::Egress, &mut udp(ME, PEER, [53, 4000]), SECOND);
    assert!(answer.passes());
    assert_eq!(answer.rule, RuleId(7));
    let late = engine.judge(
        Direction::Egress,
        &mut udp(ME, PEER, [53, 4000]),
        200 * SECOND,
    );
    assert_eq!(late.drop, Some(DropReason::NoRule));
}

#[test]
fn an_edit_ends_a_running_flow_and_its_revert_revives_it() {
    let mut engine = Engine::default();
    let allowed = tables();
    let denied = Tables {
        rows: BTreeMap::new(),
        ..allowed.clone()
    };
    engine.apply(&allowed);
    let mut packet = udp(PEER, ME, [4000, 53]);
    assert!(engine.judge(Direction::Ingress, &mut packet, 0).passes());
    engine.apply(&denied);
    let verdict = engine.judge(Direction::Ingress, &mut packet, 1);
    assert_eq!(verdict.drop, Some(DropReason::Revoked));
    engine.apply(&allowed);
    assert!(engine.judge(Direction::Ingress, &mut packet, 2).passes());
}

/// Of a protocol without ports that is every flow between the two addresses.
#[test]
fn an_explanation_does_not_know_the_flow_that_it_asks_about() {
    let filter = Filter::new();
    let allowed = tables();
    filter.apply(&allowed);
    let (mut ask, mut answer) = (udp(PEER, ME, [4000, 53]), udp(ME, PEER, [53, 4000]));
    assert!(filter.judge(Direction::Ingress, &mut ask).passes());
    assert!(filter.judge(Direction::Egress, &mut answer).passes());
    let drop = |direction, packet: &[u8]| filter.explain(direction, packet).drop;
    let no_rule = Some(DropReason::NoRule);
    assert_eq!(drop(Direction::Ingress, &ask), None);
    assert_eq!(drop(Direction::Egress, &answer), no_rule);
    let denied = Tables {
        rows: BTreeMap::new(),
        ..allowed
    };
    filter.apply(&denied);
    assert_eq!(drop(Direction::Ingress, &ask), no_rule);
}

#[test]
fn a_peer_that_floods_passes_for_itself_and_takes_nobodys_place() {
    let mut engine = Engine::default();
    engine.apply(&tables());
    engine.judge(Direction::Ingress, &mut udp(PEER, ME, [1, 53]), 0);
    engine.judge(Direction::Egress, &mut udp(ME, PEER, [53, 1]), 0);
    let mut flood = |n: u32| {
        let ports = [(n >> 8) as u16, 1_000 + (n & 0xff) as u16];
        let asked = engine.judge(Direction::Ingress, &mut udp(PEER, ME, ports), 1);
        let mut answer = udp(ME, PEER, [ports[1], ports[0]]);
        let answered = engine.judge(Direction::Egress, &mut answer, 1);
        assert!(asked.passes() && answered.passes(), "{n}");
    };
    (0..FLOW_CAPACITY).for_each(&mut flood);
    assert!(
        engine.established.len() < 5_000,
        "{}",
        engine.established.len()
    );
    assert!(engine.half_open.len() < 5_000);
    assert_eq!(engine.sweep(125 * SECOND), 0);
    assert_eq!(engine.load(2).added, [0, 0]);
}

#[test]
fn counters_and_events_tell_the_same_story() {
    let filter = Filter::new();
    filter.apply(&tables());
    let mut events = filter.events();
    filter.judge(Direction::Ingress, &mut udp(PEER, ME, [4000, 53]));
    filter.judge(
        Direction::Ingress,
        &mut udp([100, 64, 0, 9], ME, [4000, 53]),
    );
    let counters = filter.counters();
    let reason = (Direction::Ingress, DropReason::UnknownIdentity);
    assert_eq!(counters.dropped[&reason].packets, 1);
    assert_eq!(counters.passed[&Direction::Ingress].packets, 1);
    assert_eq!(counters.rules[&RuleId(7)].packets, 1);
    let opened = events.try_recv().unwrap();
    assert_eq!(opened.kind(), Some(EventKind::Opened));
    let event = events.try_recv().unwrap();
    assert_eq!(event.kind(), Some(EventKind::Denied));
    assert_eq!(event.reason(), Some(DropReason::UnknownIdentity));
    assert_eq!(event.key.remote.to_string(), "100.64.0.9");
    assert!(events.try_recv().is_err());
}
