//! Each kind of packet once, as a table: what passes, what is remembered, for how long, and what is told.

use aya::{TestRun, TestRunOptions};
use mesh_agent::dataplane::EventKind::{Closed, Confirmed, Denied, Opened, Revoked};
use mesh_common::event::Explanation;
use mesh_core::Direction::{self, Egress, Ingress};
use mesh_core::dataplane::Tables;
use mesh_core::desired::MTU;
use mesh_core::netmap::{Action, Entry, EntryKey, Netmap, NodePolicy, PortRange};
use mesh_core::{Identity, RuleId};

use crate::kernel::Kernel;
use crate::oracle::{Outcome, Strain};
use crate::packet::{Body, Extension, Fragment, Packet};
use crate::random::{self, Random};

const ME: [u8; 4] = [100, 64, 0, 1];
const PEER: [u8; 4] = [100, 64, 0, 2];
const OTHER: [u8; 4] = [100, 64, 0, 3];

pub(crate) const FIN: u8 = 17;
pub(crate) const SYN: u8 = 2;
pub(crate) const SYN_ACK: u8 = 18;
pub(crate) const ACK: u8 = 16;
pub(crate) const RST: u8 = 4;

/// Peer 2 may open TCP to port 22, UDP to port 53 and echo here, over IPv6 too; this node may open TCP
/// to port 443 there. Peer 3 is known, and may do nothing.
pub(crate) fn netmap() -> Netmap {
    let mut netmap = random::netmap(&mut Random(1));
    let (me, peer, other) = (Identity(16), Identity(18), Identity(19));
    let entry = |direction, proto, port, rule| {
        let ports = if port == 0 {
            PortRange::ALL
        } else {
            PortRange {
                first: port,
                last: port,
            }
        };
        let key = EntryKey {
            remote: peer,
            local: me,
            direction,
            proto: Some(proto),
            ports,
        };
        let entry = Entry {
            action: Action::Accept,
            rule: RuleId(rule),
        };
        (key, entry)
    };
    let address = |text: &str| text.parse::<ipnet::IpNet>().unwrap();
    netmap.policy = NodePolicy {
        identities: [
            (address("100.64.0.1/32"), me),
            (address("fd00::1/128"), me),
            (address("100.64.0.2/32"), peer),
            (address("fd00::2/128"), peer),
            (address("100.64.0.3/32"), other),
        ]
        .into(),
        entries: [
            entry(Ingress, 6, 22, 1),
            entry(Ingress, 17, 53, 2),
            entry(Ingress, 1, 0, 3),
            entry(Ingress, 58, 0, 3),
            entry(Egress, 6, 443, 4),
        ]
        .into(),
        ..NodePolicy::default()
    };
    netmap
}

fn tables() -> Tables {
    Tables::of(&netmap(), MTU)
}

/// The same without a rule for what comes in.
fn revoked() -> Tables {
    let mut netmap = netmap();
    netmap
        .policy
        .entries
        .retain(|key, _| key.direction == Egress);
    Tables::of(&netmap, MTU)
}

fn kernel() -> Kernel {
    let mut kernel = Kernel::with_flows(65_536);
    kernel.apply(&tables());
    kernel
}

fn packet(peer: [u8; 4], direction: Direction, body: Body) -> Packet {
    let (source, destination) = match direction {
        Ingress => (peer, ME),
        Egress => (ME, peer),
    };
    Packet::new(direction, source.into(), destination.into(), body)
}

fn tcp_between(peer: [u8; 4], ports: [u16; 2], direction: Direction, flags: u8) -> Vec<u8> {
    let [far, near] = ports;
    let (source, destination) = match direction {
        Ingress => (far, near),
        Egress => (near, far),
    };
    let body = Body::Tcp {
        source,
        destination,
        flags,
    };
    packet(peer, direction, body).bytes()
}

/// Of the connection that peer 2 may open.
pub(crate) fn tcp(direction: Direction, flags: u8) -> Vec<u8> {
    tcp_between(PEER, [40_000, 22], direction, flags)
}

fn udp(direction: Direction) -> Vec<u8> {
    let (source, destination) = match direction {
        Ingress => (4_000, 53),
        Egress => (53, 4_000),
    };
    let body = Body::Udp {
        source,
        destination,
    };
    packet(PEER, direction, body).bytes()
}

fn echo(direction: Direction, request: bool) -> Vec<u8> {
    packet(PEER, direction, Body::Echo { request, id: 7 }).bytes()
}

/// About the connection, by its far end or by another.
fn error(from: [u8; 4], kind: u8, code: u8) -> Vec<u8> {
    let body = Body::Tcp {
        source: 22,
        destination: 40_000,
        flags: ACK,
    };
    let quoted = Box::new(packet(PEER, Egress, body));
    packet(from, Ingress, Body::IcmpError { kind, code, quoted }).bytes()
}

const PASS: Outcome = Ok(());
const NO_FLOW: Outcome = Err("no flow");

/// Half-open and established flows.
fn flows(kernel: &Kernel) -> (usize, usize) {
    (
        kernel.half_open().keys().count(),
        kernel.established().keys().count(),
    )
}

fn handshake(kernel: &mut Kernel) {
    for (direction, flags) in [(Ingress, SYN), (Egress, SYN_ACK), (Ingress, ACK)] {
        assert_eq!(kernel.outcome(direction, &tcp(direction, flags)), PASS);
    }
}

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
    let entry = kernel.established().iter().next().unwrap().unwrap().1;
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
fn a_flow_lives_as_long_as_its_kind_may_be_silent() {
    type Step = (Direction, Vec<u8>);
    let tcp = |direction, flags| (direction, tcp(direction, flags));
    let handshake = [tcp(Ingress, SYN), tcp(Egress, SYN_ACK), tcp(Ingress, ACK)];
    let datagram = [(Ingress, udp(Ingress)), (Egress, udp(Egress))];
    let with = |first: &[Step], then: &[Step]| [first, then].concat();
    let table: [(&str, Vec<Step>, u64, Step); 7] = [
        (
            "half-open TCP",
            vec![tcp(Ingress, SYN)],
            20,
            tcp(Egress, SYN_ACK),
        ),
        (
            "established TCP",
            handshake.to_vec(),
            8_000,
            tcp(Egress, ACK),
        ),
        (
            "TCP closed by both",
            with(&handshake, &[tcp(Ingress, FIN), tcp(Egress, FIN)]),
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
        (
            "echo",
            vec![(Ingress, echo(Ingress, true))],
            10,
            (Egress, echo(Egress, false)),
        ),
    ];
    for (name, steps, patience, next) in table {
        for (silence, expected) in [(patience - 2, true), (patience + 2, false)] {
            let mut kernel = kernel();
            for (direction, packet) in &steps {
                assert_eq!(kernel.outcome(*direction, packet), PASS, "{name}");
            }
            kernel.age(silence);
            let outcome = kernel.outcome(next.0, &next.1);
            assert_eq!(
                outcome.is_ok(),
                expected,
                "{name} after {silence} s: {outcome:?}"
            );
        }
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

#[test]
fn what_was_closed_opens_anew_through_the_policy() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, FIN)), PASS);
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, FIN)), PASS);
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, SYN)), Err("no rule"));
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, SYN)), PASS);
    assert_eq!(flows(&kernel), (1, 0));
    let entry = kernel.half_open().iter().next().unwrap().unwrap().1;
    assert_eq!(entry.packets, [1, 0], "a new flow, counted from the start");
    handshake(&mut kernel);
    assert_eq!(flows(&kernel), (0, 1));
}

#[test]
fn a_revoked_flow_leaves_a_tombstone_that_outlasts_the_policy_and_the_window() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    kernel.apply(&revoked());
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, ACK)), Err("revoked"));
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), Err("revoked"));
    assert_eq!(kernel.outcome(Ingress, &error(PEER, 3, 1)), Err("revoked"));
    kernel.pick_up(true);
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), Err("revoked"));
    // A half-open flow is judged anew before it is established, too.
    kernel.pick_up(false);
    kernel.apply(&tables());
    let ports = [40_001, 22];
    for (direction, flags) in [(Ingress, SYN), (Egress, SYN_ACK)] {
        assert_eq!(
            kernel.outcome(direction, &tcp_between(PEER, ports, direction, flags)),
            PASS
        );
    }
    kernel.apply(&revoked());
    let last = tcp_between(PEER, ports, Ingress, ACK);
    assert_eq!(kernel.outcome(Ingress, &last), Err("revoked"));
    assert_eq!(flows(&kernel), (1, 1));
}

#[test]
fn running_connections_are_taken_up_in_the_window_and_never_after() {
    for (what, direction, ports, expected) in [
        ("forward, by the opener", Ingress, [40_000, 22], PASS),
        ("in reverse, by us", Egress, [40_000, 22], PASS),
        ("forward, by us", Egress, [443, 50_000], PASS),
        ("in reverse, by the peer", Ingress, [443, 50_000], PASS),
        ("nowhere allowed", Ingress, [40_000, 23], NO_FLOW),
        ("nowhere allowed", Egress, [40_000, 23], NO_FLOW),
    ] {
        let mut kernel = kernel();
        let packet = tcp_between(PEER, ports, direction, ACK);
        assert_eq!(
            kernel.outcome(direction, &packet),
            NO_FLOW,
            "{what}, too late"
        );
        kernel.pick_up(true);
        for flags in [RST, SYN_ACK, RST | ACK] {
            let packet = tcp_between(PEER, ports, direction, flags);
            assert_eq!(
                kernel.outcome(direction, &packet),
                NO_FLOW,
                "{what} {flags:#x}"
            );
        }
        assert_eq!(kernel.outcome(direction, &packet), expected, "{what}");
        if expected.is_err() {
            continue;
        }
        kernel.pick_up(false);
        assert_eq!(flows(&kernel), (0, 1), "{what}");
        let back = direction.reverse();
        assert_eq!(
            kernel.outcome(back, &tcp_between(PEER, ports, back, ACK)),
            PASS,
            "{what}"
        );
    }
    let mut kernel = kernel();
    kernel.pick_up(true);
    assert_eq!(
        kernel.outcome(Egress, &udp(Egress)),
        Err("no rule"),
        "TCP only"
    );
    assert_eq!(kernel.outcome(Egress, &echo(Egress, false)), NO_FLOW);
}

#[test]
fn a_peer_without_tokens_is_judged_packet_by_packet() {
    let mut kernel = kernel();
    kernel.strain(2, Ingress, Some(Strain::Empty));
    for (direction, packet) in [
        (Ingress, tcp(Ingress, SYN)),
        (Egress, tcp(Egress, SYN_ACK)),
        (Ingress, tcp(Ingress, ACK)),
        (Egress, tcp(Egress, FIN)),
        (Ingress, udp(Ingress)),
        (Egress, udp(Egress)),
        (Ingress, echo(Ingress, true)),
        (Egress, echo(Egress, false)),
    ] {
        assert_eq!(kernel.outcome(direction, &packet), PASS, "{direction:?}");
    }
    assert_eq!(flows(&kernel), (0, 0));
    let denied = tcp_between(PEER, [40_000, 23], Ingress, SYN);
    assert_eq!(kernel.outcome(Ingress, &denied), Err("no rule"));
    let denied = tcp_between(PEER, [40_000, 23], Ingress, ACK);
    assert_eq!(kernel.outcome(Ingress, &denied), NO_FLOW);
    // Its own packets never pass as answers, and nobody else's are let off.
    let answer = tcp_between(PEER, [443, 50_000], Ingress, ACK);
    assert_eq!(kernel.outcome(Ingress, &answer), NO_FLOW);
    let other = tcp_between(OTHER, [40_000, 22], Egress, ACK);
    assert_eq!(kernel.outcome(Egress, &other), NO_FLOW);
    // What we open there is another matter.
    let ours = tcp_between(PEER, [443, 50_000], Egress, SYN);
    assert_eq!(kernel.outcome(Egress, &ours), PASS);
    assert_eq!(flows(&kernel), (1, 0));
    // The flood is over.
    kernel.strain(2, Ingress, None);
    assert_eq!(kernel.outcome(Egress, &udp(Egress)), Err("no rule"));
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), NO_FLOW);
}

#[test]
fn while_tokens_are_low_a_running_connection_gets_its_state_back() {
    let mut kernel = kernel();
    kernel.strain(2, Ingress, Some(Strain::Low));
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, ACK)), PASS);
    assert_eq!(flows(&kernel), (0, 0));
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), PASS);
    assert_eq!(flows(&kernel), (0, 1));
}

#[test]
fn a_new_flow_costs_its_peer_a_token_and_a_held_one_counts() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    let load = kernel.load(2);
    assert_eq!(load.added, [1, 0]);
    assert_ne!(load.new[0], mesh_common::budget::Bucket::default());
    assert_eq!(load.new[1], mesh_common::budget::Bucket::default());
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, FIN)), PASS);
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, FIN)), PASS);
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, SYN)), PASS);
    assert_eq!(kernel.load(2).added, [0, 0]);
    let ours = [443, 50_000];
    for (direction, flags) in [(Egress, SYN), (Ingress, SYN_ACK), (Egress, ACK)] {
        assert_eq!(
            kernel.outcome(direction, &tcp_between(PEER, ours, direction, flags)),
            PASS
        );
    }
    let load = kernel.load(2);
    assert_eq!(load.added, [0, 1]);
    assert_ne!(load.new[1], mesh_common::budget::Bucket::default());
    // The sweep counts what is there, and takes away what is over.
    kernel.age(9_000);
    assert_eq!(kernel.dataplane().sweep().unwrap(), 0);
    assert_eq!(kernel.freed(2), [0, 1]);
}

#[test]
fn a_flow_beyond_its_peers_share_stays_half_open_and_lives_on() {
    let mut kernel = kernel();
    kernel.strain(2, Ingress, Some(Strain::Share));
    handshake(&mut kernel);
    assert_eq!(flows(&kernel), (1, 0));
    kernel.age(1_000);
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, ACK)), PASS);
    kernel.free(2, [1 << 24, 0]);
    kernel.age(2);
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), PASS);
    assert_eq!(flows(&kernel), (0, 1), "room was made");
}

#[test]
fn an_icmp_error_passes_for_a_flow_that_stands_by_its_far_end_and_not_too_often() {
    let mut kernel = kernel();
    assert_eq!(
        kernel.outcome(Ingress, &error(PEER, 3, 1)),
        Err("icmp error without flow")
    );
    assert_eq!(
        kernel.outcome(Ingress, &error(PEER, 3, 4)),
        Err("icmp error without flow")
    );
    handshake(&mut kernel);
    let before = kernel.load(2).errors;
    assert_eq!(kernel.outcome(Ingress, &error(PEER, 3, 1)), PASS);
    assert_ne!(kernel.load(2).errors, before);
    assert_eq!(
        kernel.outcome(Ingress, &error(OTHER, 3, 1)),
        Err("icmp error from a third node")
    );
    assert_eq!(
        kernel.outcome(Ingress, &error(OTHER, 3, 4)),
        PASS,
        "too big, whoever noticed"
    );
    kernel.strain(2, Ingress, Some(Strain::Errors));
    assert_eq!(
        kernel.outcome(Ingress, &error(PEER, 11, 0)),
        Err("icmp error rate")
    );
    assert_eq!(kernel.outcome(Ingress, &error(PEER, 3, 4)), PASS);
    assert_eq!(flows(&kernel), (0, 1), "none opens or ends a flow");
}

#[test]
fn fragments_follow_their_first() {
    let mut kernel = kernel();
    let body = Body::Udp {
        source: 4_000,
        destination: 53,
    };
    let fragment = |offset, more| {
        let mut packet = packet(PEER, Ingress, body.clone());
        packet.fragment = Some(Fragment {
            id: 5,
            offset,
            more,
        });
        packet.bytes()
    };
    let lost = Err("fragment without first");
    assert_eq!(kernel.outcome(Ingress, &fragment(100, false)), lost);
    assert_eq!(kernel.outcome(Ingress, &fragment(0, true)), PASS);
    assert_eq!(kernel.outcome(Ingress, &fragment(100, true)), PASS);
    assert_eq!(kernel.outcome(Ingress, &fragment(200, false)), PASS);
    assert_eq!(
        kernel.outcome(Ingress, &fragment(2, false)),
        Err("tiny fragment")
    );
    kernel.age(31);
    assert_eq!(kernel.outcome(Ingress, &fragment(100, false)), lost);
}

#[test]
fn four_extension_headers_are_walked_and_no_more() {
    use Extension::{Destination, HopByHop, Mobility, Routing};
    for (extensions, expected) in [
        (vec![HopByHop, Destination, Routing(4), Destination], PASS),
        (vec![Destination; 5], Err("too many extension headers")),
        (vec![Routing(0)], Err("routing header")),
        (vec![Mobility], Err("unknown extension header")),
    ] {
        let mut kernel = kernel();
        let body = Body::Tcp {
            source: 40_000,
            destination: 22,
            flags: SYN,
        };
        let (source, destination) = ("fd00::2".parse().unwrap(), "fd00::1".parse().unwrap());
        let mut packet = Packet::new(Ingress, source, destination, body);
        packet.extensions = extensions.clone();
        assert_eq!(
            kernel.outcome(Ingress, &packet.bytes()),
            expected,
            "{extensions:?}"
        );
    }
}

#[test]
fn every_packet_that_cannot_be_read_has_a_reason_of_its_own() {
    let mut kernel = kernel();
    let changed = |at: usize, byte: u8| {
        let mut packet = tcp(Ingress, SYN);
        packet[at] = byte;
        packet
    };
    let refused = |kind| packet(PEER, Ingress, Body::Icmp(kind)).bytes();
    let mut foreign_quote = error(PEER, 3, 1);
    foreign_quote[28 + 15] = 9;
    for (packet, reason) in [
        (changed(0, 0x55), "not ip"),
        (changed(0, 0x44), "malformed header"),
        (changed(32, 4 << 4), "malformed header"),
        (tcp(Ingress, SYN)[..30].to_vec(), "truncated"),
        (changed(33, 3), "tcp flags"),
        (changed(33, 0), "tcp flags"),
        (refused(5), "icmp refused"),
        (foreign_quote, "icmp error malformed"),
        (changed(15, 9), "unknown identity"),
        (changed(15, 1), "own address"),
        (changed(19, 7), "unknown local address"),
        (changed(16, 224), "multicast"),
        (changed(33, ACK), "no flow"),
    ] {
        assert_eq!(kernel.outcome(Ingress, &packet), Err(reason));
    }
}

#[test]
fn a_super_packet_counts_as_its_segments() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    let packet = tcp(Ingress, ACK);
    // `gso_segs` in `struct __sk_buff` (linux/bpf.h).
    let mut context = [0; 192];
    context[164..168].copy_from_slice(&7_u32.to_ne_bytes());
    let options = TestRunOptions {
        data_in: Some(&packet),
        ctx_in: Some(&context),
        ..TestRunOptions::default()
    };
    let before = kernel.dataplane().counters().unwrap().passed[&Ingress];
    let program = kernel.dataplane().program("mesh_in").unwrap();
    assert_eq!(program.test_run(options).unwrap().return_value, u32::MAX);
    let entry = kernel.established().iter().next().unwrap().unwrap().1;
    assert_eq!((entry.packets[0], entry.bytes[0]), (2 + 7, 3 * 40));
    let after = kernel.dataplane().counters().unwrap().passed[&Ingress];
    assert_eq!(after.packets, before.packets + 7);
    assert_eq!(after.bytes, before.bytes + 40);
}

#[test]
fn events_tell_a_flows_life_and_denials_by_count() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, FIN)), PASS);
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, FIN)), PASS);
    let ours = [443, 50_000];
    assert_eq!(
        kernel.outcome(Egress, &tcp_between(PEER, ours, Egress, SYN)),
        PASS
    );
    let denied = tcp_between(PEER, [40_000, 23], Ingress, SYN);
    for _ in 0..5 {
        assert_eq!(kernel.outcome(Ingress, &denied), Err("no rule"));
    }
    let events = kernel.events();
    let told: Vec<_> = events
        .iter()
        .map(|event| (event.kind().unwrap(), event.direction(), event.packets))
        .collect();
    assert_eq!(
        told,
        [
            (Opened, Ingress, [1, 0]),
            (Confirmed, Ingress, [2, 1]),
            (Closed, Ingress, [3, 2]),
            (Opened, Egress, [0, 1]),
            (Denied, Ingress, [1, 0]),
            (Denied, Ingress, [2, 0]),
            (Denied, Ingress, [4, 0]),
        ]
    );
    let closed = events[2];
    assert_eq!(closed.bytes, [120, 80]);
    assert_eq!(closed.key.local_port.get(), 22);
    assert_eq!((closed.rule, closed.peer, closed.reason), (RuleId(1), 2, 0));
    assert_eq!((closed.remote, closed.local), (Identity(18), Identity(16)));
    let denied = events[6];
    assert_eq!(denied.reason().unwrap().name(), "no rule");
    assert_eq!(
        (denied.bytes, denied.tcp, denied.length),
        ([160, 0], SYN, 40)
    );
    assert_eq!(denied.key.remote_port.get(), 40_000);
    // Of another connection, revoked once and denied from then on.
    let ports = [40_001, 22];
    for (direction, flags) in [(Ingress, SYN), (Egress, SYN_ACK), (Ingress, ACK)] {
        assert_eq!(
            kernel.outcome(direction, &tcp_between(PEER, ports, direction, flags)),
            PASS
        );
    }
    kernel.apply(&revoked());
    for _ in 0..2 {
        let packet = tcp_between(PEER, ports, Ingress, ACK);
        assert_eq!(kernel.outcome(Ingress, &packet), Err("revoked"));
    }
    let kinds: Vec<_> = kernel.events().iter().map(|e| e.kind().unwrap()).collect();

    assert_eq!(kinds, [Opened, Confirmed, Revoked, Denied]);
}

#[test]
fn a_rule_counts_the_flows_that_it_admits() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    assert_eq!(kernel.outcome(Ingress, &udp(Ingress)), PASS);
    let rules = kernel.dataplane().counters().unwrap().rules;
    let counts: Vec<_> = rules
        .iter()
        .map(|(rule, count)| (rule.0, count.packets))
        .collect();
    assert_eq!(counts, [(1, 1), (2, 1), (3, 0), (4, 0)]);
}

#[test]
fn an_explanation_says_what_would_happen_and_leaves_no_trace() {
    let mut kernel = kernel();
    let before = kernel.dataplane().counters().unwrap();
    let explain = |kernel: &mut Kernel, packet: &[u8]| {
        let (value, out, _) = kernel.explain("why_in", packet);
        assert_eq!(value, u32::MAX);
        Explanation::from_bytes(&out).unwrap()
    };
    let would = explain(&mut kernel, &tcp(Ingress, SYN));
    assert_eq!((would.reason, would.rule), (0, RuleId(1)));
    assert_eq!(would.flags, Explanation::REMEMBERED);
    let would = explain(&mut kernel, &tcp_between(PEER, [40_000, 23], Ingress, SYN));
    assert_eq!((would.reason, would.rule, would.flags), (23, RuleId(0), 0));
    assert_eq!((would.remote, would.local), (Identity(18), Identity(16)));
    let would = explain(&mut kernel, &tcp(Ingress, 0));
    assert_eq!(would.reason, 10);
    assert_eq!(flows(&kernel), (0, 0));
    assert_eq!(kernel.dataplane().counters().unwrap(), before);
    assert!(kernel.events().is_empty());
    handshake(&mut kernel);
    let would = explain(&mut kernel, &tcp(Ingress, ACK));
    assert_eq!(
        (would.reason, would.rule, would.flags),
        (0, RuleId(1), Explanation::KNOWN)
    );
}
