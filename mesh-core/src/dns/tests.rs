//! What the zone answers, question by question.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::wire::{Asker, Outcome, Transport};
use super::*;
use crate::key::NodeKey;
use crate::netmap::{Me, NodePolicy, Peer};
use crate::node::{Epoch, Generation, MeshId, NodeId};
use crate::world::Mesh;

fn addresses(host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(100, 64, 0, host),
        v6: Ipv6Addr::new(0xfd01, 0x203, 0x405, 0, 0, 0, 0x6440, host.into()),
    }
}

/// A map of nodes with these names; the first is the node itself, with the address .1.
fn netmap(names: &[&str]) -> Netmap {
    let name = |text: &str| Name::parse(text).unwrap();
    let key = NodeKey::from_seed([7; 32]).public();
    let peer = |(n, text): (u8, &&str)| {
        let id = NodeId(n.into());
        let peer = Peer {
            id,
            name: name(text),
            key,
            addresses: addresses(n),
            endpoints: BTreeSet::new(),
            routes: BTreeSet::new(),
            tags: BTreeSet::new(),
            user: None,
        };
        (id, peer)
    };
    Netmap {
        mesh: Mesh {
            id: MeshId([0; 16]),
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([1, 2, 3, 4, 5]),
            },
        },
        epoch: Epoch(0),
        generation: Generation((1 << 32) + 42),
        me: Me {
            id: NodeId(1),
            name: name(names[0]),
            key,
            addresses: addresses(1),
            tags: BTreeSet::new(),
            user: None,
            expires: None,
            expired: false,
        },
        peers: (2..).zip(&names[1..]).map(peer).collect::<BTreeMap<_, _>>(),
        policy: NodePolicy::default(),
    }
}

pub(super) fn zone() -> Zone {
    Zone::of(&netmap(&["web", "db", "com", "wpad"])).unwrap()
}

pub(super) fn query(name: &str, query_type: RecordType) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    // Raw labels, since the wire carries names that no zone file may spell.
    let labels = name.split('.').filter(|label| !label.is_empty());
    let name = DnsName::from_labels(labels.map(str::as_bytes)).unwrap();
    message.add_query(Query::query(name, query_type));
    message
}

fn reply(name: &str, query_type: RecordType) -> Message {
    match zone().answer(&query(name, query_type)) {
        Answer::Reply(reply) => reply,
        other => panic!("{name} {query_type}: {other:?}"),
    }
}

/// `CODE: data, data | authority` of the reply, or `forward`.
fn outcome(name: &str, query_type: RecordType) -> String {
    let reply = match zone().answer(&query(name, query_type)) {
        Answer::Reply(reply) => reply,
        Answer::Forward => return "forward".to_owned(),
        Answer::Drop => return "drop".to_owned(),
    };
    let data: Vec<String> = reply.answers.iter().map(|r| r.data.to_string()).collect();
    let authority: Vec<String> = reply
        .authorities
        .iter()
        .map(|r| format!(" | {} {}", r.name.to_ascii(), r.record_type()))
        .collect();
    let code = reply.metadata.response_code;
    format!("{code:?}: {}{}", data.join(", "), authority.concat())
}

#[test]
fn names_of_the_mesh_are_answered_here() {
    use RecordType::{A, AAAA, ANY, MX, NS, PTR, SOA};
    let check = |name: &str, query_type, expected: &str| {
        assert_eq!(outcome(name, query_type), expected, "{name} {query_type}");
    };
    let soa = "web.mesh.internal. hostmaster.mesh.internal. 42 3600 900 1209600 5";
    let nothing = "NoError:  | mesh.internal. SOA";
    let missing = "NXDomain:  | mesh.internal. SOA";

    check("db.mesh.internal.", A, "NoError: 100.64.0.2");
    check("db.mesh.internal.", AAAA, "NoError: fd01:203:405::6440:2");
    check("web.mesh.internal.", A, "NoError: 100.64.0.1");
    check(
        "db.mesh.internal.",
        ANY,
        "NoError: 100.64.0.2, fd01:203:405::6440:2",
    );
    check("db.mesh.internal.", MX, nothing);
    check("nobody.mesh.internal.", A, missing);
    check("a.db.mesh.internal.", A, missing);
    check("mesh.internal.", SOA, &format!("NoError: {soa}"));
    check("mesh.internal.", NS, "NoError: web.mesh.internal.");
    check("mesh.internal.", A, nothing);

    check(
        "2.0.64.100.in-addr.arpa.",
        PTR,
        "NoError: db.mesh.internal.",
    );
    check(
        "9.0.64.100.in-addr.arpa.",
        PTR,
        "NXDomain:  | 64.100.in-addr.arpa. SOA",
    );
    check(
        "0.64.100.in-addr.arpa.",
        PTR,
        "NoError:  | 64.100.in-addr.arpa. SOA",
    );
    check(
        "x.2.0.64.100.in-addr.arpa.",
        PTR,
        "NXDomain:  | 64.100.in-addr.arpa. SOA",
    );
    check("64.100.in-addr.arpa.", SOA, &format!("NoError: {soa}"));
    check(
        "2.0.0.0.0.4.4.6.0.0.0.0.0.0.0.0.0.0.0.0.5.0.4.0.3.0.2.0.1.0.d.f.ip6.arpa.",
        PTR,
        "NoError: db.mesh.internal.",
    );
}

#[test]
fn other_names_are_forwarded() {
    for name in [
        "example.org.",
        ".",
        "internal.",
        "notmesh.internal.",
        "mesh.internal.example.org.",
        "1.0.0.10.in-addr.arpa.",
        "100.in-addr.arpa.",
        "printer.",
    ] {
        assert_eq!(outcome(name, RecordType::A), "forward", "{name}");
    }
    let mut iterative = query("example.org.", RecordType::A);
    iterative.metadata.recursion_desired = false;
    let Answer::Reply(refusal) = zone().answer(&iterative) else {
        panic!("we resolve nothing by ourselves");
    };
    assert_eq!(refusal.metadata.response_code, ResponseCode::Refused);
}

#[test]
fn short_names_of_nodes_are_answered_without_shadowing_the_root() {
    use RecordType::{A, DS, MX, NS};
    assert_eq!(outcome("db.", A), "NoError: 100.64.0.2");
    assert_eq!(outcome("db.", MX), "NoError: ");
    assert!(!reply("db.", A).metadata.authoritative);
    assert_eq!(outcome("com.", NS), "forward");
    assert_eq!(outcome("com.", DS), "forward");
    assert_eq!(outcome("x.com.", A), "forward");
}

#[test]
fn names_that_programs_obey_unasked_belong_to_no_node() {
    assert_eq!(outcome("wpad.", RecordType::A), "forward");
    assert_eq!(
        outcome("wpad.mesh.internal.", RecordType::A),
        "NXDomain:  | mesh.internal. SOA"
    );
}

#[test]
fn the_name_comes_back_in_the_case_it_was_asked() {
    let reply = reply("dB.MeSh.iNterNal.", RecordType::A);
    assert_eq!(reply.queries[0].name.to_ascii(), "dB.MeSh.iNterNal.");
    assert_eq!(reply.answers[0].name.to_ascii(), "dB.MeSh.iNterNal.");
    assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
}

#[test]
fn a_peer_cannot_take_the_name_of_this_node() {
    let zone = Zone::of(&netmap(&["web", "web"])).unwrap();
    let Answer::Reply(reply) = zone.answer(&query("web.mesh.internal.", RecordType::A)) else {
        panic!("the mesh answers its own names");
    };
    assert_eq!(reply.answers[0].data, RData::A(A(addresses(1).v4)));
}

#[test]
fn what_is_not_a_plain_question_gets_its_own_code() {
    let check = |code, edit: &dyn Fn(&mut Message)| {
        let mut message = query("db.mesh.internal.", RecordType::A);
        edit(&mut message);
        let Answer::Reply(reply) = zone().answer(&message) else {
            panic!("{code:?}");
        };
        assert_eq!(reply.metadata.response_code, code);
        assert!(reply.answers.is_empty());
    };
    check(ResponseCode::NotImp, &|m| {
        m.metadata.op_code = OpCode::Notify;
    });
    check(ResponseCode::FormErr, &|m| m.queries.clear());
    check(ResponseCode::FormErr, &|m| {
        let again = m.queries[0].clone();
        m.queries.push(again);
    });
    check(ResponseCode::Refused, &|m| {
        m.queries[0].query_class = DNSClass::CH;
    });
    check(ResponseCode::Refused, &|m| {
        m.queries[0].query_type = RecordType::AXFR;
    });
    check(ResponseCode::BADVERS, &|m| {
        let mut edns = Edns::new();
        edns.set_version(1);
        m.set_edns(edns);
    });
    let mut response = query("db.mesh.internal.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert_eq!(zone().answer(&response), Answer::Drop);
}

#[test]
fn edns_is_answered_with_edns_and_only_then() {
    assert!(reply("db.mesh.internal.", RecordType::A).edns.is_none());
    let mut message = query("db.mesh.internal.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(4096).set_dnssec_ok(true);
    message.set_edns(edns);
    let Answer::Reply(reply) = zone().answer(&message) else {
        panic!("the mesh answers its own names");
    };
    let edns = reply.edns.unwrap();
    assert_eq!((edns.version(), edns.max_payload()), (0, wire::UDP_PAYLOAD));
    assert!(edns.flags().dnssec_ok);
}

#[test]
fn a_config_names_what_the_host_should_ask_us() {
    let config = Config::of(&netmap(&["web"])).unwrap();
    assert_eq!(config.domain.as_str(), "mesh.internal");
    assert_eq!(
        config.routing,
        [
            "mesh.internal",
            "100.in-addr.arpa",
            "5.0.4.0.3.0.2.0.1.0.d.f.ip6.arpa"
        ]
    );
    let mut hostile = netmap(&["web"]);
    hostile.mesh.domain = "x\nnameserver 192.0.2.6".to_owned();
    assert!(Config::of(&hostile).is_err());
}

/// Names near the line between ours and not ours.
fn any_name() -> impl Strategy<Value = String> {
    let label = prop_oneof![
        3 => "[a-zA-Z0-9_*-]{1,8}",
        1 => Just("wEb".to_owned()),
        1 => Just("64".to_owned()),
        1 => Just("100".to_owned()),
        1 => Just("mesh".to_owned()),
    ];
    let ending = prop_oneof![
        Just("mesh.Internal."),
        Just("64.100.in-addr.arpa."),
        Just("100.in-addr.arpa."),
        Just("5.0.4.0.3.0.2.0.1.0.d.f.ip6.arpa."),
        Just("org."),
        Just(""),
    ];
    (prop::collection::vec(label, 0..4), ending).prop_map(|(labels, ending)| {
        let labels: String = labels.iter().map(|l| format!("{l}.")).collect();
        match labels + ending {
            name if name.is_empty() => ".".to_owned(),
            name => name,
        }
    })
}

proptest! {
    #[test]
    fn every_reply_fits_its_query(name in any_name(), number: u16, id: u16) {
        let mut message = query(&name, RecordType::from(number));
        message.metadata.id = id;
        let ours = name.to_lowercase().ends_with("mesh.internal.")
            && (name.len() == 14 || name.as_bytes()[name.len() - 15] == b'.');
        match zone().answer(&message) {
            Answer::Drop => prop_assert!(false, "a query was taken for an answer"),
            Answer::Forward => prop_assert!(!ours, "{} left the mesh", name),
            Answer::Reply(reply) => {
                prop_assert_eq!(reply.metadata.id, id);
                prop_assert_eq!(reply.metadata.message_type, MessageType::Response);
                prop_assert_eq!(reply.queries[0].name.to_ascii(), message.queries[0].name.to_ascii());
                for record in &reply.answers {
                    prop_assert!(record.name.eq_case(&message.queries[0].name));
                }
                // Whatever we are the authority for either has records or says how long not.
                let code = reply.metadata.response_code;
                if reply.metadata.authoritative {
                    prop_assert_eq!(reply.answers.is_empty(), !reply.authorities.is_empty());
                    for record in &reply.authorities {
                        prop_assert!(record.name.zone_of(&message.queries[0].name));
                    }
                }
                prop_assert!(code != ResponseCode::NXDomain || reply.answers.is_empty());
                let bytes = reply.to_vec().unwrap();
                prop_assert_eq!(Message::from_vec(&bytes).unwrap(), reply);
            }
        }
    }

    #[test]
    fn every_node_is_found_forwards_and_backwards(names in prop::collection::btree_set("[a-z][a-z0-9]{0,9}", 1..20)) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let zone = Zone::of(&netmap(&names)).unwrap();
        for (host, name) in (1..).zip(&names) {
            prop_assume!(!UNASKED.contains(name));
            let fqdn = format!("{name}.mesh.internal.");
            let Answer::Reply(reply) = zone.answer(&query(&fqdn, RecordType::A)) else {
                panic!("{fqdn}");
            };
            prop_assert_eq!(&reply.answers[0].data, &RData::A(A(addresses(host).v4)));
            let arpa = format!("{host}.0.64.100.in-addr.arpa.");
            let Answer::Reply(reply) = zone.answer(&query(&arpa, RecordType::PTR)) else {
                panic!("{arpa}");
            };
            prop_assert_eq!(reply.answers[0].data.to_string(), fqdn);
        }
    }

    #[test]
    fn no_bytes_break_the_server(bytes: Vec<u8>, header: [u8; 8]) {
        let zone = zone();
        let framed = [&header[..2], &[1, 0, 0, 1], &header[2..], &bytes].concat();
        for bytes in [bytes, framed] {
            for asker in [Asker::Host, Asker::Peer, Asker::Stranger] {
                for transport in [Transport::Udp, Transport::Tcp] {
                    if let Outcome::Reply(reply) = zone.respond(asker, transport, &bytes) {
                        prop_assert!(Message::from_vec(&reply).is_ok());
                        prop_assert!(transport == Transport::Tcp || reply.len() <= 1232);
                    }
                }
            }
        }
    }

    #[test]
    fn no_damage_to_a_query_breaks_the_server(at: prop::sample::Index, byte: u8, name in any_name()) {
        let mut bytes = query(&name, RecordType::A).to_vec().unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Outcome::Reply(reply) = zone().respond(Asker::Host, Transport::Udp, &bytes) {
            prop_assert_eq!(&reply[..2], &bytes[..2]);
        }
    }
}
