//! The life of a flow: what opens it, what it remembers, how long it may be silent, how it ends.

use std::net::IpAddr;

use mesh_common::flow::{FlowEntry, FlowKey, FlowState, Stage, flags};
use mesh_common::policy::PolicyPrefix;
use mesh_common::{Be16, PolicyEntry, PolicyKey};
use mesh_core::Direction::{self, Egress, Ingress};
use mesh_core::{Identity, RuleId};

use crate::kernel::Kernel;
use crate::packet::{Body, Fragment, Packet};
use crate::scene::*;

#[test]
fn tcp_is_established_by_its_openers_acknowledgement_alone() {
    let mut kernel = kernel();
    for (direction, flags, expected) in [
        (Ingress, SYN, (1, 0)),
        (Ingress, SYN, (1, 0)),
        (Egress, SYN_ACK, (1, 0)),
        (Egress, SYN_ACK, (1, 0)),
        (Ingress, ACK, (0, 1)),
        (Egress, ACK, (0, 1)),
    ] {
        assert_eq!(kernel.outcome(direction, &tcp(direction, flags)), PASS);
        assert_eq!(flows(&kernel), expected, "after {flags:#x}");
    }
    let entry = kernel.established()[0].1;
    assert_eq!((entry.packets, entry.bytes), ([3, 3], [120, 120]));
    assert_eq!(entry.state.rule, RuleId(1));
    assert_eq!(
        (entry.state.remote, entry.state.local),
        (Identity(18), Identity(16))
    );
    assert_eq!(entry.state.peer, 2);
    assert!(entry.opened > 0 && entry.opened <= entry.state.last_seen);
}

#[test]
fn a_flow_lives_exactly_as_long_as_its_kind_may_be_silent() {
    type Step = (Direction, Vec<u8>);
    const SECOND: u64 = 1_000_000_000;
    let tcp = |direction, flags| (direction, tcp(direction, flags));
    let handshake = [tcp(Ingress, SYN), tcp(Egress, SYN_ACK), tcp(Ingress, ACK)];
    let datagram = [(Ingress, udp(Ingress)), (Egress, udp(Egress))];
    let echo = [
        (Ingress, echo(Ingress, true)),
        (Egress, echo(Egress, false)),
    ];
    let with = |first: &[Step], then: &[Step]| [first, then].concat();
    let fins = [tcp(Ingress, FIN), tcp(Egress, FIN)];
    let table: [(&str, Vec<Step>, u64, Step); 9] = [
        (
            "half-open TCP",
            handshake[..1].to_vec(),
            20,
            handshake[1].clone(),
        ),
        (
            "established TCP",
            handshake.to_vec(),
            8_000,
            tcp(Egress, ACK),
        ),
        (
            "TCP closed by one",
            with(&handshake, &fins[..1]),
            8_000,
            tcp(Ingress, FIN),
        ),
        (
            "TCP closed by both",
            with(&handshake, &fins),
            30,
            tcp(Ingress, ACK),
        ),
        (
            "TCP that was reset",
            with(&handshake, &[tcp(Egress, RST)]),
            10,
            tcp(Egress, RST),
        ),
        (
            "UDP without answer",
            datagram[..1].to_vec(),
            30,
            datagram[1].clone(),
        ),
        (
            "UDP with answer",
            datagram.to_vec(),
            120,
            datagram[1].clone(),
        ),
        ("echo", echo[..1].to_vec(), 10, echo[1].clone()),
        ("answered echo", echo.to_vec(), 10, echo[1].clone()),
    ];
    let mut kernel = kernel();
    for (name, steps, patience, next) in table {
        kernel.set_flows(&[]);
        for (direction, packet) in &steps {
            assert_eq!(kernel.outcome(*direction, packet), PASS, "{name}");
        }
        let flows = kernel.flows();
        for (silence, expected) in [(patience * SECOND, true), (patience * SECOND + 1, false)] {
            let passes = kernel.at_once(|kernel, now| {
                let mut flows = flows.clone();
                for flow in &mut flows {
                    flow.entry.state.last_seen = now.wrapping_sub(silence);
                }
                kernel.set_flows(&flows);
                kernel.run(next.0, &next.1).0
            });
            assert_eq!(passes, expected, "{name} after {silence} ns");
        }
    }
}

/// What every packet of a flow leaves in its entry.
#[test]
fn a_flow_remembers_what_its_packets_have_said() {
    const OURS: u32 = flags::OPENED_EGRESS;
    const UP: u32 = flags::REPLIED | flags::CONFIRMED;
    type Step = (Direction, Vec<u8>, Stage, u32);
    let tcp = |direction, tcp_flags, stage, flags| -> Step {
        (direction, tcp(direction, tcp_flags), stage, flags)
    };
    let ours = |direction, tcp_flags, stage, flags| -> Step {
        let packet = tcp_between(PEER, [443, 50_000], direction, tcp_flags);
        (direction, packet, stage, flags)
    };
    let fragment = |direction, offset, more| {
        let (source, destination) = match direction {
            Ingress => (4_000, 53),
            Egress => (53, 4_000),
        };
        let body = Body::Udp {
            source,
            destination,
        };
        let mut packet = packet(PEER, direction, body);
        packet.fragment = Some(Fragment {
            id: 9,
            offset,
            more,
        });
        packet.bytes()
    };
    let (half, full) = (Stage::HalfOpen, Stage::Established);
    let handshake = || {
        vec![
            tcp(Ingress, SYN, half, 0),
            tcp(Ingress, SYN, half, 0),
            tcp(Ingress, ACK, half, 0),
            tcp(Egress, ACK, half, 0),
            tcp(Egress, SYN_ACK, half, flags::REPLIED),
            tcp(Egress, SYN_ACK, half, flags::REPLIED),
            tcp(Ingress, SYN, half, flags::REPLIED),
            tcp(Ingress, ACK, full, UP),
            tcp(Egress, ACK, full, UP),
        ]
    };
    let then = |mut steps: Vec<Step>, more: &[Step]| {
        steps.extend_from_slice(more);
        steps
    };
    let closed = flags::FIN_OPENER | flags::FIN_RESPONDER;
    let table: [(&str, u64, Vec<Step>); 7] = [
        (
            "closed by its opener first",
            0,
            then(
                handshake(),
                &[
                    tcp(Ingress, FIN, full, UP | flags::FIN_OPENER),
                    tcp(Egress, ACK, full, UP | flags::FIN_OPENER),
                    tcp(Egress, FIN, full, UP | closed),
                    tcp(Ingress, ACK, full, UP | closed),
                ],
            ),
        ),
        (
            "closed by the other end first",
            0,
            then(
                handshake(),
                &[
                    tcp(Egress, FIN, full, UP | flags::FIN_RESPONDER),
                    tcp(Ingress, FIN, full, UP | closed),
                ],
            ),
        ),
        (
            "reset by its opener",
            0,
            then(handshake(), &[tcp(Ingress, RST, full, UP | flags::RESET)]),
        ),
        (
            "reset by the other end",
            0,
            then(handshake(), &[tcp(Egress, RST, full, UP | flags::RESET)]),
        ),
        (
            "refused",
            0,
            vec![
                tcp(Ingress, SYN, half, 0),
                tcp(Egress, RST | ACK, half, flags::RESET),
            ],
        ),
        (
            "ours",
            1,
            vec![
                ours(Egress, SYN, half, OURS),
                ours(Ingress, SYN_ACK, half, OURS | flags::REPLIED),
                ours(Egress, ACK, full, OURS | UP),
                ours(Ingress, FIN, full, OURS | UP | flags::FIN_RESPONDER),
                ours(Egress, FIN, full, OURS | UP | closed),
            ],
        ),
        (
            "UDP in fragments",
            0,
            vec![
                (Ingress, fragment(Ingress, 0, true), half, 0),
                (Ingress, fragment(Ingress, 9, false), half, 0),
                (Ingress, udp(Ingress), half, 0),
                (Egress, udp(Egress), full, UP),
                (Ingress, udp(Ingress), full, UP),
                (Egress, fragment(Egress, 0, true), full, UP),
                (Egress, fragment(Egress, 9, false), full, UP),
            ],
        ),
    ];
    let mut kernel = kernel();
    let generation = kernel.config().generation;
    for (name, opened, steps) in table {
        kernel.set_flows(&[]);
        let mut packets = [0, 0];
        let mut bytes = [0, 0];
        for (step, (direction, packet, stage, flags)) in steps.iter().enumerate() {
            packets[*direction as usize] += 1;
            bytes[*direction as usize] += packet.len() as u64;
            let before = kernel.flows();
            // A second older, so that what refreshes it shows.
            let (flow, then, now) = kernel.at_once(|kernel, now| {
                let mut flows = before.clone();
                for flow in &mut flows {
                    flow.entry.state.last_seen = now.wrapping_sub(1_000_000_000);
                }
                kernel.set_flows(&flows);
                assert!(kernel.run(*direction, packet).0, "{name}, step {step}");
                let [flow] = kernel.flows()[..] else {
                    panic!("{name}, step {step}: {:?}", kernel.flows());
                };
                (
                    flow,
                    before.first().map_or(now, |flow| flow.entry.opened),
                    now,
                )
            });
            assert_eq!(flow.stage, *stage, "{name}, step {step}");
            let expected = FlowEntry {
                state: FlowState {
                    last_seen: now,
                    generation,
                    flags: *flags,
                    remote: Identity(18),
                    local: Identity(16),
                    rule: flow.entry.state.rule,
                    peer: 2,
                },
                packets,
                bytes,
                opened: then,
            };
            assert_eq!(flow.entry, expected, "{name}, step {step}");
            assert_eq!(flow.entry.state.opened() as u64, opened, "{name}");
        }
    }
}

#[test]
fn keys_of_flows_are_far_and_near_end() {
    let mut kernel = kernel();
    let key = |remote_port, local_port, proto| FlowKey {
        remote: IpAddr::from(PEER).into(),
        local: IpAddr::from(ME).into(),
        remote_port: Be16::new(remote_port),
        local_port: Be16::new(local_port),
        proto,
        pad: 0,
        pad2: 0,
    };
    let gre = packet(PEER, Ingress, Body::Other(47)).bytes();
    for (direction, packet, expected) in [
        (Ingress, tcp(Ingress, SYN), key(40_000, 22, 6)),
        (Ingress, udp(Ingress), key(4_000, 53, 17)),
        (Ingress, echo(Ingress, true), key(7, 0, 1)),
        (Egress, echo(Egress, true), key(7, 1, 1)),
        (Ingress, gre, key(0, 0, 47)),
    ] {
        let mut tables = tables();
        for way in [Ingress, Egress] {
            let row = PolicyKey::new(Identity(18), Identity(16), way, 0, 0);
            let prefix = PolicyPrefix {
                len: PolicyPrefix::ANY_PROTO,
                key: row,
            };
            tables.rows.insert(prefix, PolicyEntry::accept(RuleId(9)));
        }
        kernel.apply(&tables);
        kernel.set_flows(&[]);
        assert_eq!(kernel.outcome(direction, &packet), PASS);
        let keys: Vec<_> = kernel.flows().iter().map(|flow| flow.key).collect();
        assert_eq!(keys, [expected]);
    }
}

#[test]
fn a_reset_is_not_kept_alive_by_repeating_it() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, RST)), PASS);
    for _ in 0..2 {
        kernel.age(6);
        let _ = kernel.outcome(Ingress, &tcp(Ingress, RST));
    }
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), NO_FLOW);
}

/// As a TCP does not that is outside of its window (RFC 5961, section 3.2).
#[test]
fn a_connection_whose_ends_do_not_believe_a_reset_goes_on_while_it_carries_something() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, RST)), PASS);
    for _ in 0..5 {
        kernel.age(6);
        assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), PASS);
        kernel.age(6);
        assert_eq!(kernel.outcome(Egress, &tcp(Egress, ACK)), PASS);
    }
    kernel.age(11);
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), NO_FLOW);
}

#[test]
fn what_was_closed_opens_anew_through_the_policy() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, FIN)), PASS);
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, FIN)), PASS);
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, SYN)), Err("no rule"));
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, SYN)), PASS);
    assert_eq!(flows(&kernel), (1, 0));
    let entry = kernel.half_open()[0].1;
    assert_eq!(entry.packets, [1, 0], "a new flow, counted from the start");
    handshake(&mut kernel);
    assert_eq!(flows(&kernel), (0, 1));
}

#[test]
fn a_super_packet_counts_as_its_segments() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    // What the kernel says of one that is so much longer than its headers.
    for (count, size, more, expected) in [
        (7, 0, 0, 7),
        (7, 100, 300, 7),
        (0, 0, 300, 1),
        (0, 100, 40, 1),
        (0, 100, 41, 1),
        (0, 100, 140, 1),
        (0, 100, 141, 2),
        (0, 100, 300, 3),
    ] {
        let mut packet = tcp(Ingress, ACK);
        packet.resize(40 + more, 0);
        packet[2..4].copy_from_slice(&(40 + more as u16).to_be_bytes());
        let seen = |kernel: &mut Kernel| {
            let entry = kernel.established()[0].1;
            let passed = kernel.dataplane().counters().unwrap().passed[&Ingress];
            [
                entry.packets[0].into(),
                passed.packets,
                entry.bytes[0],
                passed.bytes,
            ]
        };
        let before = seen(&mut kernel);
        let outcome = kernel.run_super_packet("mesh_in", &packet, count, size);
        assert_eq!(outcome, u32::MAX);
        let [packets, all, bytes, all_bytes] = before;
        let length = packet.len() as u64;
        assert_eq!(
            seen(&mut kernel),
            [
                packets + expected,
                all + expected,
                bytes + length,
                all_bytes + length
            ],
            "{count} segments of {size}, {more} more bytes"
        );
    }
}

/// A program keeps what it was told of the near address beside that address, which is this one at first.
#[test]
fn nobody_has_the_unspecified_address() {
    let mut kernel = kernel();
    let known = from_peer(true, UDP);
    let unspecified = Packet {
        destination: "::".parse().unwrap(),
        ..known.clone()
    };
    assert_eq!(kernel.outcome(Ingress, &known.bytes()), PASS);
    let outcome = kernel.outcome(Ingress, &unspecified.bytes());
    assert_eq!(outcome, Err("unknown local address"));
}
