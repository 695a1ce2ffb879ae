//! Records in words, and which of them somebody wants to see.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::key::NodePublic;
use crate::netmap::{Me, Netmap, NodePolicy, Peer, Rule};
use crate::node::{Addresses, Epoch, Generation, MeshId, Name, NodeId, Tag};
use crate::world::{Mesh, Pools};

fn addresses(host: u8) -> Addresses {
    Addresses {
        v4: [100, 64, 0, host].into(),
        v6: [0xfd01, 0, 0, 0, 0, 0, 0, u16::from(host)].into(),
    }
}

/// This node is number 1 and identity 16; its peer is number 2.
fn netmap(generation: u64, peers: &[u64], rules: &[u32]) -> Arc<Netmap> {
    let peer = |id: &u64| {
        let peer = Peer {
            id: NodeId(*id),
            name: Name::parse(&format!("peer-{id}")).unwrap(),
            key: NodePublic([2; 32]),
            addresses: addresses(u8::try_from(*id).unwrap()),
            endpoints: BTreeSet::new(),
            routes: BTreeSet::new(),
            tags: [Tag::parse("tag:sandbox").unwrap()].into(),
            user: None,
        };
        (peer.id, peer)
    };
    let rule = |id: &u32| {
        let rule = Rule {
            file: "policy.hujson".into(),
            line: id * 10,
            summary: "accept".to_owned(),
        };
        (RuleId(*id), rule)
    };
    let host = |host: u8| ipnet::IpNet::from(std::net::IpAddr::from(addresses(host).v4));
    Arc::new(Netmap {
        mesh: Mesh {
            id: MeshId([0; 16]),
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([1; 5]),
            },
        },
        epoch: Epoch(0),
        generation: Generation(generation),
        me: Me {
            id: NodeId(1),
            name: Name::parse("me").unwrap(),
            key: NodePublic([1; 32]),
            addresses: addresses(1),
            tags: BTreeSet::new(),
            user: None,
            expires: None,
            expired: false,
        },
        peers: peers.iter().map(peer).collect(),
        policy: NodePolicy {
            identities: [(host(1), Identity(16)), (host(2), Identity(18))].into(),
            rules: rules.iter().map(rule).collect(),
            ..NodePolicy::default()
        },
    })
}

fn names(netmaps: &[Arc<Netmap>]) -> Names {
    let mut names = Names::default();
    netmaps.iter().for_each(|netmap| names.take(netmap));
    names
}

fn described(record: &Record, names: &Names) -> Described {
    record.describe(names, Duration::from_secs(1_000))
}

#[test]
fn a_record_speaks_of_sources_and_destinations() {
    let described = described(&record(), &Names::default());
    assert_eq!(described.source.port, 40_000);
    assert_eq!(described.destination.port, 23);
    assert_eq!(described.reason, Some("no rule"));
    assert_eq!((described.packets, described.bytes), ([1, 0], [60, 0]));
    assert_eq!(described.rule, Some((7, None)));
}

#[test]
fn ends_are_named_by_node_and_by_who_is_behind_it() {
    let names = names(&[netmap(1, &[2, 3], &[7])]);
    let check = |record: &Record, source: (&str, bool), destination: (&str, bool)| {
        let described = described(record, &names);
        for (end, (name, is_behind)) in [
            (described.source, source),
            (described.destination, destination),
        ] {
            assert_eq!(end.node.as_deref(), Some(name));
            assert_eq!(end.is_behind, is_behind, "{name}");
        }
    };
    let record = record();
    check(&record, ("peer-2", false), ("me", false));
    let with = |remote: [u8; 4], local: [u8; 4]| Record {
        key: FlowKey {
            remote: std::net::IpAddr::from(remote).into(),
            local: std::net::IpAddr::from(local).into(),
            ..record.key
        },
        ..record
    };
    let routed = with([10, 0, 0, 9], [192, 168, 0, 1]);
    check(&routed, ("peer-2", true), ("me", true));
    // What this node passes on between two of its peers.
    let passed = with([100, 64, 0, 2], [100, 64, 0, 3]);
    check(&passed, ("peer-2", false), ("peer-3", false));
    // The far end was not asked for, or is nobody's.
    let by_address = Record { peer: 0, ..record };
    check(&by_address, ("peer-2", false), ("me", false));
    // Denials that were only counted have no addresses.
    let counted = Record {
        key: FlowKey::NONE,
        ..record
    };
    check(&counted, ("peer-2", false), ("me", false));
    let routed = Record {
        remote: Identity(20),
        local: Identity(17),
        ..counted
    };
    check(&routed, ("peer-2", true), ("me", true));
    let unknown = Record {
        local: Identity::UNKNOWN,
        ..counted
    };
    check(&unknown, ("peer-2", false), ("me", false));
}

#[test]
fn names_outlive_the_policies_that_had_them_while_a_flow_speaks_of_them() {
    let mut log = FlowLog::default();
    log.handle_flow(key(22), &entry(100, 0), 30);
    let mut names = names(&[
        netmap(1, &[2], &[7]),
        netmap(2, &[], &[8]),
        netmap(3, &[], &[9]),
    ]);
    let known = |names: &Names| {
        let mut log = FlowLog::default();
        log.handle_flow(key(22), &entry(100, 0), 30);
        let described = described(&log.poll_record().unwrap(), names);
        let line = described.rule.and_then(|(_, rule)| rule);
        (described.source.node, line.map(|rule| rule.line))
    };
    let here = (Some("peer-2".to_owned()), Some(70));
    for now in 0..3 {
        log.handle_flow(key(22), &entry(100, 0), 30);
        log.handle_walked(now);
        names.handle_walked(&log);
        assert_eq!(known(&names), here);
    }
    log.handle_walked(40);
    assert_eq!(log.poll_record().unwrap().kind, Kind::Active);
    assert_eq!(log.poll_record().unwrap().kind, Kind::Idle);
    for _ in 0..2 {
        names.handle_walked(&log);
    }
    assert_eq!(known(&names), (None, None), "it was known long enough");
    // What nothing speaks of is kept over one walk: events may have waited.
    names.take(&netmap(4, &[], &[7]));
    names.take(&netmap(5, &[], &[]));
    assert_eq!(known(&names).1, Some(70));
    names.handle_walked(&log);
    assert_eq!(known(&names).1, Some(70));
    names.handle_walked(&log);
    assert_eq!(known(&names).1, None);
}

#[test]
fn a_peer_that_comes_back_is_a_peer_again() {
    let mut log = FlowLog::default();
    log.handle_flow(key(22), &entry(100, 0), 30);
    let mut names = names(&[netmap(1, &[2], &[7]), netmap(2, &[], &[7])]);
    assert!(names.is_former(2));
    names.take(&netmap(3, &[2], &[7]));
    assert!(!names.is_former(2));
    names.handle_walked(&log);
    names.take(&netmap(4, &[], &[7]));
    assert!(names.is_former(2) && names.peer(2).is_some());
}

fn verdict(word: &str) -> Query {
    Query {
        verdict: Some(Verdict::from_word(word).unwrap()),
        ..Query::default()
    }
}

fn peer(who: &str) -> Query {
    Query {
        peer: Some(Who::new(who, Some(&netmap(1, &[2], &[7])))),
        ..Query::default()
    }
}

#[test]
fn a_query_picks_records() {
    let names = names(&[netmap(1, &[2], &[7])]);
    let denied = described(&record(), &names);
    let check = |query: Query, matches| assert_eq!(query.matches(&denied), matches, "{query:?}");
    check(Query::default(), true);
    check(verdict("denied"), true);
    check(verdict("no rule"), true);
    check(verdict("revoked"), false);
    check(verdict("allowed"), false);
    for who in [
        "100.64.0.2",
        "peer-2",
        "PEER-2",
        "peer-2.mesh.internal",
        "Peer-2.Mesh.Internal.",
        "me",
        "tag:sandbox",
    ] {
        check(peer(who), true);
    }
    for who in ["100.64.0.3", "peer", "peer-2.other", "tag:other"] {
        check(peer(who), false);
    }
    let mut counted = record();
    counted.key.remote = Address::default();
    let counted = described(&counted, &names);
    assert_eq!(counted.source.address, None);
    assert!(peer("100.64.0.2").matches(&counted) && !peer("100.64.0.3").matches(&counted));
    let port = |port| Query {
        port: Some(port),
        ..Query::default()
    };
    check(port(23), true);
    check(port(40_000), false);
    let rule = |file: Option<&str>, line| Query {
        rule: Some(Place {
            file: file.map(str::to_owned),
            line,
        }),
        ..Query::default()
    };
    check(rule(None, 70), true);
    check(rule(None, 7), false);
    check(rule(Some("policy.hujson"), 70), true);
    check(rule(Some("other.hujson"), 70), false);
}

#[test]
fn icmp_is_that_of_both_families() {
    let of = |proto| {
        let mut record = record();
        record.key.proto = proto;
        described(&record, &Names::default())
    };
    let matches = |wanted, proto| {
        let query = Query {
            proto: Some(wanted),
            ..Query::default()
        };
        query.matches(&of(proto))
    };
    assert!(matches(1, 1) && matches(1, 58) && matches(58, 58));
    assert!(!matches(58, 1) && !matches(1, 6) && !matches(6, 1));
}

/// Who asks is told apart by the identifier of the echo, what is asked by the type.
#[test]
fn icmp_has_an_identifier_and_a_type() {
    for (proto, kind) in [(proto::ICMP, 8), (proto::ICMPV6, 128)] {
        for direction in [Direction::Ingress, Direction::Egress] {
            let told = |kind, tcp| {
                let mut log = FlowLog::default();
                log.handle_event(&FlowEvent {
                    key: FlowKey {
                        remote_port: Be16::new(0x1234),
                        local_port: Be16::new(direction as u16),
                        proto,
                        ..key(0)
                    },
                    direction: direction as u8,
                    tcp,
                    ..event(kind, 0)
                });
                let record = log.poll_record().unwrap();
                (record, described(&record, &Names::default()))
            };
            let (_, opened) = told(EventKind::Opened, 0);
            let ports = (opened.source.port, opened.destination.port);
            assert_eq!(ports, (0x1234, kind), "{direction:?}");
            let (record, denied) = told(EventKind::Denied, 135);
            assert_eq!(denied.destination.port, 135);
            assert_eq!(deny_key(&record).port.get(), 135);
        }
    }
}

#[test]
fn every_word_for_a_verdict_is_one() {
    assert!(Verdict::words().all(|word| Verdict::from_word(word).is_some()));
    assert_eq!(Verdict::from_word("Denied"), Some(Verdict::Denied));
    assert_eq!(Verdict::from_word("dennied"), None);
}
