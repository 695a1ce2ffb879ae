//! Denials, which are counted by kind of packet and told of now and then.

use std::net::IpAddr;

use mesh_agent::dataplane::EventKind::Denied;
use mesh_agent::dataplane::FlowEvent;
use mesh_common::event::{DenyEntry, DenyKey, RETELL};
use mesh_common::flow::FlowKey;
use mesh_common::proto;
use mesh_common::{Address, Be16, DropReason};
use mesh_core::Direction::{Egress, Ingress};
use mesh_core::{Identity, RuleId};

use super::key;
use crate::packet::Body;
use crate::scene::*;

#[test]
fn a_denial_says_all_of_its_packets() {
    let mut kernel = kernel();
    let at = |remote_port, local_port, proto| FlowKey {
        remote_port: Be16::new(remote_port),
        local_port: Be16::new(local_port),
        proto,
        ..key()
    };
    let asked = tcp_between(PEER, [40_000, 23], Ingress, SYN);
    let ours = tcp_between(PEER, [23, 40_000], Egress, SYN);
    let flagless = tcp(Ingress, 0);
    let mut to_all = udp(Ingress);
    to_all[16..20].copy_from_slice(&[224, 0, 0, 1]);
    let unasked = packet(PEER, Ingress, Body::Icmp(13)).bytes();
    let gre = packet(PEER, Ingress, Body::Other(47)).bytes();
    let answers = [false, true].map(|v6| {
        let body = Body::Echo {
            request: false,
            id: 7,
        };
        from_peer(v6, body)
    });
    let cut = [tcp(Egress, SYN), answers[1].bytes()];
    let quoted = Body::Tcp {
        source: 50_000,
        destination: 8_080,
        flags: SYN,
    };
    let error = Body::IcmpError {
        kind: 3,
        code: 3,
        quoted: Box::new(packet(OTHER, Egress, quoted)),
    };
    let error = packet(PEER, Ingress, error);
    // The near port of an answer is who asked.
    let of_answers = answers.each_ref().map(|answer| FlowKey {
        remote: answer.source.into(),
        local: answer.destination.into(),
        ..at(7, 1, answer.proto())
    });
    kernel.apply(&revoked());
    let same = |port, proto, direction, reason: DropReason| DenyKey {
        remote: Identity(18),
        local: Identity(16),
        peer: 2,
        port: Be16::new(port),
        proto,
        direction,
        reason: reason as u8,
        pad: 0,
        pad2: 0,
    };
    let nobody = DenyKey {
        remote: Identity::UNKNOWN,
        local: Identity::UNKNOWN,
        peer: 0,
        ..same(0, 0, 0, DropReason::NotIp)
    };
    let unread = DenyKey {
        reason: DropReason::Truncated as u8,
        ..nobody
    };
    for (direction, packet, same, flow, tcp_flags) in [
        (
            Ingress,
            asked,
            same(23, 6, 0, DropReason::NoRule),
            at(40_000, 23, 6),
            SYN,
        ),
        (
            Egress,
            ours,
            same(23, 6, 1, DropReason::NoRule),
            at(23, 40_000, 6),
            SYN,
        ),
        (Ingress, vec![0; 40], nobody, FlowKey::NONE, 0),
        (
            Ingress,
            flagless,
            same(0, 6, 0, DropReason::TcpFlags),
            at(0, 0, 6),
            0,
        ),
        // Its header is whole, and it is nobody's if not.
        (
            Egress,
            cut[0][..20].to_vec(),
            same(0, 6, 1, DropReason::Truncated),
            at(0, 0, 6),
            0,
        ),
        (
            Egress,
            cut[0][..19].to_vec(),
            DenyKey {
                direction: 1,
                ..unread
            },
            FlowKey::NONE,
            0,
        ),
        (
            Ingress,
            cut[1][..40].to_vec(),
            same(0, 58, 0, DropReason::Truncated),
            FlowKey {
                remote: answers[1].source.into(),
                local: answers[1].destination.into(),
                ..at(0, 0, 58)
            },
            0,
        ),
        (Ingress, cut[1][..39].to_vec(), unread, FlowKey::NONE, 0),
        // About a flow with somebody else: the blame is the sender's.
        (
            Ingress,
            error.bytes(),
            same(3, 1, 0, DropReason::IcmpErrorUnknownFlow),
            at(0, 0, 1),
            0,
        ),
        (
            Ingress,
            to_all,
            DenyKey {
                local: Identity::UNKNOWN,
                ..same(53, 17, 0, DropReason::Multicast)
            },
            FlowKey {
                local: Address::from(IpAddr::from([224, 0, 0, 1])),
                ..at(4_000, 53, 17)
            },
            0,
        ),
        (
            Ingress,
            unasked,
            same(13, 1, 0, DropReason::NoRule),
            at(0, u16::MAX, 1),
            0,
        ),
        (
            Ingress,
            udp(Ingress),
            same(53, 17, 0, DropReason::NoRule),
            at(4_000, 53, 17),
            0,
        ),
        (
            Ingress,
            gre,
            same(0, 47, 0, DropReason::NoRule),
            at(0, 0, 47),
            0,
        ),
        (
            Ingress,
            answers[0].bytes(),
            same(0, 1, 0, DropReason::NoFlow),
            of_answers[0],
            0,
        ),
        (
            Ingress,
            answers[1].bytes(),
            same(129, 58, 0, DropReason::NoFlow),
            of_answers[1],
            0,
        ),
    ] {
        let way = direction as usize;
        let length = packet.len() as u64;
        let count = |n| {
            let mut both = [0, 0];
            both[way] = n;
            both
        };
        let (first, entry, now) = kernel.at_once(|kernel, now| {
            let mut denials = kernel.denials();
            let _ = denials.remove(&same);
            kernel.events();
            assert!(!kernel.run(direction, &packet).0);
            let [event] = kernel.events()[..] else {
                panic!("one event");
            };
            (event, denials.get(&same, 0).unwrap(), now)
        });
        let expected = FlowEvent {
            time: now,
            first: now,
            bytes: count(length),
            packets: count(1),
            key: flow,
            remote: same.remote,
            local: same.local,
            rule: RuleId::NONE,
            peer: same.peer,
            kind: Denied as u8,
            direction: direction as u8,
            reason: same.reason,
            tcp: match flow.proto {
                proto::ICMP | proto::ICMPV6 => same.port.get() as u8,
                _ => tcp_flags,
            },
            length: length as u32,
        };
        assert_eq!(first, expected);
        let alone = DenyEntry {
            packets: 1,
            bytes: length,
            first: now,
            last: now,
            told: DenyEntry::tick(now),
            rule: RuleId::NONE,
        };
        assert_eq!(entry, alone);
        // One more, and one that is no news: counted, and not told.
        let earlier = DenyEntry {
            packets: 4,
            bytes: 1_000,
            first: 5,
            last: 6,
            told: 7,
            rule: RuleId(9),
        };
        for (told, news) in [(RETELL, false), (RETELL + 1, true)] {
            let (events, entry, now) = kernel.at_once(|kernel, now| {
                let before = DenyEntry {
                    told: DenyEntry::tick(now).wrapping_sub(told),
                    ..earlier
                };
                kernel.denials().insert(same, before, 0).unwrap();
                kernel.events();
                assert!(!kernel.run(direction, &packet).0);
                (
                    kernel.events(),
                    kernel.denials().get(&same, 0).unwrap(),
                    now,
                )
            });
            let grown = DenyEntry {
                packets: 5,
                bytes: 1_000 + length,
                first: 5,
                last: now,
                told: DenyEntry::tick(now).wrapping_sub(if news { 0 } else { told }),
                // Of the last packet.
                rule: RuleId::NONE,
            };
            assert_eq!(entry, grown);
            let expected = FlowEvent {
                time: now,
                first: 5,
                bytes: count(1_000 + length),
                packets: count(5),
                ..expected
            };
            assert_eq!(events, if news { vec![expected] } else { vec![] });
        }
    }
}

#[test]
fn a_counted_denial_names_the_rule_that_denies() {
    let mut kernel = kernel();
    kernel.apply(&denying(RuleId(9)));
    let denied = tcp_between(PEER, [40_000, 23], Ingress, SYN);
    for packets in 1..3 {
        assert_eq!(kernel.outcome(Ingress, &denied), Err("denied by rule"));
        let denials = kernel.dataplane().denials().unwrap();
        let [(_, counted)] = denials[..] else {
            panic!("one kind: {denials:?}");
        };
        assert_eq!((counted.packets, counted.rule), (packets, RuleId(9)));
    }
}

/// Whether the flow stands or was revoked: it is another's, who has nothing to do with it.
#[test]
fn an_error_about_anothers_flow_is_the_senders() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    let error = error(OTHER, 3, 1);
    let sender = tables().identity(OTHER.into());
    for reason in ["icmp error from a third node", "revoked"] {
        kernel.events();
        assert_eq!(kernel.outcome(Ingress, &error), Err(reason));
        let [event] = kernel.events()[..] else {
            panic!("one event");
        };
        // What it is itself, not what it speaks of.
        let own = FlowKey {
            remote: IpAddr::from(OTHER).into(),
            local: IpAddr::from(ME).into(),
            proto: 1,
            ..FlowKey::NONE
        };
        assert_eq!((event.peer, event.remote), (3, sender.identity));
        assert_eq!((event.key, event.local), (own, Identity(16)));
        assert_eq!(event.tcp, 3, "the type");
        kernel.apply(&revoked());
    }
}
