//! What is said of packets: events in their order, counters, the log, explanations.

use aya::maps::RingBuf;
use mesh_agent::dataplane::EventKind::{Closed, Confirmed, Denied, Opened, Revoked};
use mesh_common::DropReason;
use mesh_common::event::Explanation;
use mesh_common::maps::Config;
use mesh_core::Direction::{Egress, Ingress};
use mesh_core::{Identity, RuleId};

use crate::kernel::Kernel;
use crate::scene::*;

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
    let counts = |kernel: &mut Kernel| -> Vec<(u32, u64)> {
        let rules = kernel.dataplane().counters().unwrap().rules;
        let counts = rules.iter().map(|(rule, count)| (rule.0, count.packets));
        counts.collect()
    };
    assert_eq!(counts(&mut kernel), [(1, 1), (2, 1), (3, 0), (4, 0)]);
    // Once more what was revoked: by a packet, whichever way, and no packet after it.
    kernel.apply(&revoked());
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), Err("revoked"));
    assert_eq!(counts(&mut kernel), [(4, 0)]);
    kernel.apply(&tables());
    for direction in [Egress, Ingress] {
        assert_eq!(kernel.outcome(direction, &tcp(direction, ACK)), PASS);
        assert_eq!(counts(&mut kernel), [(1, 1), (2, 0), (3, 0), (4, 0)]);
    }
}

#[test]
fn an_explanation_says_what_would_happen_and_leaves_no_trace() {
    let mut kernel = kernel();
    let before = kernel.dataplane().counters().unwrap();
    let ask = |kernel: &mut Kernel, program, packet: &[u8]| {
        let (value, out, _) = kernel.explain(program, packet);
        assert_eq!(value, u32::MAX);
        assert_eq!(out[14..16], [0; 2]);
        assert_eq!(out[16..], packet[16..]);
        Explanation::from_bytes(&out).unwrap()
    };
    let explain = |kernel: &mut Kernel, packet: &[u8]| ask(kernel, "why_in", packet);
    let would = explain(&mut kernel, &tcp(Ingress, SYN));
    assert_eq!((would.reason, would.rule), (0, RuleId(1)));
    assert_eq!(would.flags, Explanation::REMEMBERED);
    let would = explain(&mut kernel, &tcp_between(PEER, [40_000, 23], Ingress, SYN));
    assert_eq!((would.reason, would.rule, would.flags), (23, RuleId(0), 0));
    assert_eq!((would.remote, would.local), (Identity(18), Identity(16)));
    let would = explain(&mut kernel, &tcp(Ingress, 0));
    assert_eq!(would.reason, 10);
    // The other way, another rule speaks.
    for (port, reason, rule) in [(443, 0, RuleId(4)), (22, 23, RuleId(0))] {
        let packet = tcp_between(PEER, [port, 50_000], Egress, SYN);
        let would = ask(&mut kernel, "why_eg", &packet);
        assert_eq!((would.reason, would.rule), (reason, rule));
        assert_eq!((would.remote, would.local), (Identity(18), Identity(16)));
    }
    assert_eq!(flows(&kernel), (0, 0));
    assert_eq!(kernel.dataplane().counters().unwrap(), before);
    assert!(kernel.events().is_empty());
    // Of the very flow that it asks about it knows nothing, in either table.
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, SYN)), PASS);
    for flow_is in [(1, 0), (0, 1)] {
        assert_eq!(flows(&kernel), flow_is);
        let would = explain(&mut kernel, &tcp(Ingress, SYN));
        assert_eq!((would.reason, would.rule), (0, RuleId(1)));
        assert_eq!(would.flags, Explanation::REMEMBERED);
        let answer = tcp_between(PEER, [40_000, 22], Egress, SYN);
        assert_eq!(ask(&mut kernel, "why_eg", &answer).reason, 23);
        handshake(&mut kernel);
    }
}

#[test]
fn only_who_asks_for_a_log_gets_one() {
    let mut kernel = kernel();
    let denied = tcp_between(OTHER, [40_000, 22], Ingress, SYN);
    for (flags, expected) in [(0, [0, 0, 0, 0]), (Config::LOG, [1, 0, 0, 1])] {
        kernel.configure(|config| config.flags = flags);
        kernel.set_flows(&[]);
        let lines = |kernel: &mut Kernel, direction, packet: &[u8]| {
            kernel.run(direction, packet);
            let map = kernel.dataplane().object().map_mut("AYA_LOGS").unwrap();
            let mut ring = RingBuf::try_from(map).unwrap();
            let mut lines = 0;
            while ring.next().is_some() {
                lines += 1;
            }
            lines
        };
        let told = [
            lines(&mut kernel, Ingress, &tcp(Ingress, SYN)),
            lines(&mut kernel, Egress, &tcp(Egress, SYN_ACK)),
            lines(&mut kernel, Ingress, &tcp(Ingress, ACK)),
            lines(&mut kernel, Ingress, &denied),
        ];
        assert_eq!(told, expected);
    }
}

#[test]
fn whoever_only_looks_on_drops_nothing() {
    let mut kernel = kernel();
    kernel.configure(|config| config.flags = Config::OBSERVE);
    let denied = tcp_between(OTHER, [40_000, 22], Ingress, SYN);
    let before = kernel.dataplane().counters().unwrap().dropped;
    assert!(kernel.run(Ingress, &denied).0);
    let after = kernel.dataplane().counters().unwrap().dropped;
    let slot = (Ingress, DropReason::NoRule);
    assert_eq!((before.get(&slot), after[&slot].packets), (None, 1));
}

#[test]
fn a_frame_is_judged_by_what_it_carries() {
    let mut kernel = kernel();
    for name in ["mesh_in_l2", "mesh_eg_l2"] {
        kernel.load_program(name);
    }
    let frame = |protocol: [u8; 2], packet: &[u8]| {
        let mut frame = vec![0; 12];
        frame.extend(protocol);
        frame.extend(packet);
        frame
    };
    let (ipv4, arp) = ([0x08, 0x00], [0x08, 0x06]);
    let denied = tcp_between(OTHER, [40_000, 22], Ingress, SYN);
    for (name, frame, passes) in [
        ("mesh_in_l2", frame(ipv4, &tcp(Ingress, SYN)), true),
        ("mesh_eg_l2", frame(ipv4, &tcp(Egress, SYN_ACK)), true),
        ("mesh_in_l2", frame(ipv4, &denied), false),
        ("mesh_in_l2", frame(arp, &denied), true),
        ("mesh_eg_l2", frame(arp, &denied), true),
    ] {
        let (value, _, _) = kernel.run_program(name, &frame, 1);
        assert_eq!(value, if passes { u32::MAX } else { 2 }, "{name}");
    }
    let entry = kernel.half_open()[0].1;
    assert_eq!(entry.bytes, [40, 40], "from the IP header");
}

#[test]
fn a_dry_run_without_room_for_an_answer_says_so() {
    let mut kernel = kernel();
    let cut = &tcp(Ingress, SYN)[..15];
    assert_eq!(kernel.explain("why_in", cut).0, 2);
}
