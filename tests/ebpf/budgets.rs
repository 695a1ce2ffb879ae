//! Flows that nobody remembers: of before the programs came, or of a peer that has used what it may.

use mesh_agent::dataplane::Only;
use mesh_common::Be16;
use mesh_common::budget::{Bucket, ICMP_ERRORS, NEW_FLOWS, PeerLoad, Rate};
use mesh_common::flow::{FlowEntry, FlowKey, FlowState, flags};
use mesh_common::maps::FLOW_CAPACITY;
use mesh_core::Direction::{self, Egress, Ingress};

use crate::kernel::{Kernel, full_at};
use crate::oracle::Strain;
use crate::scene::*;

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
    assert_eq!(load.errors, Bucket::default());
    assert_ne!(load.new[0], Bucket::default());
    assert_eq!(load.new[1], Bucket::default());
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
    assert_ne!(load.new[1], Bucket::default());
    assert_eq!(kernel.held(2), [0, 1]);
    // The sweep counts what is there, and takes away what is over.
    kernel.age(9_000);
    assert_eq!(kernel.dataplane().sweep().unwrap(), 0);
    assert_eq!(kernel.held(2), [0, 0]);
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
fn a_full_table_costs_no_peer_the_flows_that_it_may_have() {
    const FULL: u16 = (FLOW_CAPACITY / 16 * 15) as u16;
    let mut kernel = kernel();
    let flow = |kernel: &mut Kernel, port: u16, flags: &[(Direction, u8)]| {
        for (direction, flags) in flags {
            let packet = tcp_between(PEER, [port, 22], *direction, *flags);
            assert_eq!(kernel.outcome(*direction, &packet), PASS);
        }
    };
    // Somebody else's, of many peers.
    let other = |n| FlowKey {
        remote_port: Be16::new(n),
        proto: 6,
        ..FlowKey::NONE
    };
    let state = FlowState {
        last_seen: kernel.now(),
        flags: flags::CONFIRMED | flags::REPLIED,
        peer: 3,
        ..FlowState::default()
    };
    let entry = FlowEntry {
        state,
        ..FlowEntry::default()
    };
    let mut established = kernel.ct_est();
    for n in 0..FULL {
        established.put(other(n), entry, Only::New).unwrap();
    }
    let unknown = tcp_between(PEER, [9, 22], Ingress, ACK);
    assert_eq!(kernel.outcome(Ingress, &unknown), NO_FLOW);
    kernel.dataplane().sweep().unwrap();
    assert!(kernel.dataplane().is_full());
    let handshake = [(Ingress, SYN), (Egress, SYN_ACK), (Ingress, ACK)];
    flow(&mut kernel, 1, &handshake);
    assert_eq!(kernel.half_open().len(), 1);
    // Nor is there room for a peer of which nothing is known: it holds nothing and has its tokens back.
    kernel.set_load(2, PeerLoad::default());
    kernel.dataplane().sweep().unwrap();
    assert!(!kernel.is_known(2));
    // One that a crowd has pushed out goes on, both ways, by the policy alone.
    flow(&mut kernel, 9, &[(Ingress, ACK), (Egress, ACK)]);
    // With some room, what comes is taken in again.
    for n in 0..=FULL / 15 {
        established.remove(&other(n)).unwrap();
    }
    kernel.dataplane().sweep().unwrap();
    assert!(!kernel.dataplane().is_full());
    let before = kernel.established().len();
    flow(&mut kernel, 2, &handshake);
    assert_eq!(kernel.established().len(), before + 1);
}

/// SYN of a flow that the peer, or this node, may open.
fn first(opened: Direction) -> Vec<u8> {
    let ports = match opened {
        Ingress => [40_000, 22],
        Egress => [443, 50_000],
    };
    tcp_between(PEER, ports, opened, SYN)
}

/// What a full bucket gives at once, but for its last token, in nanoseconds.
fn tolerance(rate: u64, burst: u64) -> u64 {
    1_000_000_000 / rate * (burst - 1)
}

#[test]
fn a_peer_has_exactly_so_many_tokens() {
    let mut kernel = kernel();
    for (opened, rate) in [(Ingress, 4_096), (Egress, 16_384)] {
        let way = opened as usize;
        let burst = tolerance(rate, rate);
        let remembered = |kernel: &mut Kernel, ahead: u64| {
            kernel.at_once(|kernel, now| {
                let mut load = PeerLoad::default();
                load.new[way] = full_at(now + ahead);
                kernel.set_load(2, load);
                kernel.set_flows(&[]);
                assert!(kernel.run(opened, &first(opened)).0);
                let taken = full_at(now + ahead).taken(now, &Rate::new(rate, rate));
                let after = kernel.load(2).new;
                (flows(kernel).0, after[way] == taken, after[1 - way])
            })
        };
        let other = Bucket::default();
        assert_eq!(remembered(&mut kernel, burst), (1, true, other), "the last");
        assert_eq!(remembered(&mut kernel, burst + 1), (0, false, other));
        assert_eq!(remembered(&mut kernel, 1_000), (1, true, other));
    }
    // A bucket that was full long ago is no fuller now.
    let (after, now) = kernel.at_once(|kernel, now| {
        kernel.set_load(2, PeerLoad::default());
        kernel.set_flows(&[]);
        assert!(kernel.run(Ingress, &first(Ingress)).0);
        (kernel.load(2).new[0], now)
    });
    assert_eq!(after, full_at(now + 1_000_000_000 / 4_096));
    assert_eq!(
        (NEW_FLOWS[0], NEW_FLOWS[1]),
        (Rate::new(4_096, 4_096), Rate::new(16_384, 16_384))
    );
}

#[test]
fn tokens_are_low_when_fewer_than_half_are_there() {
    let mut kernel = kernel();
    for (opened, rate) in [(Ingress, 4_096), (Egress, 16_384)] {
        let half = tolerance(rate, rate) / 2;
        // Of a connection that is not remembered: answers pass while tokens are low.
        let ports = match opened {
            Ingress => [40_000, 22],
            Egress => [443, 50_000],
        };
        let running = tcp_between(PEER, ports, opened, ACK);
        for (ahead, expected) in [(half, false), (half + 1, true)] {
            let passes = kernel.at_once(|kernel, now| {
                let mut load = PeerLoad::default();
                load.new[opened as usize] = full_at(now + ahead);
                kernel.set_load(2, load);
                kernel.set_flows(&[]);
                kernel.run(opened, &running).0
            });
            assert_eq!(passes, expected, "{opened:?}, {ahead} ns ahead");
        }
    }
}

#[test]
fn a_peer_reports_exactly_so_often() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    let burst = tolerance(1_000, 50);
    for (ahead, expected) in [(burst, true), (burst + 1, false)] {
        let (passes, taken) = kernel.at_once(|kernel, now| {
            let load = PeerLoad {
                errors: full_at(now + ahead),
                ..PeerLoad::default()
            };
            kernel.set_load(2, load);
            let passes = kernel.run(Ingress, &error(PEER, 3, 1)).0;
            let taken = load.errors.taken(now, &Rate::new(1_000, 50));
            (passes, kernel.load(2).errors == taken)
        });
        assert_eq!((passes, taken), (expected, expected), "{ahead} ns ahead");
    }
    assert_eq!(ICMP_ERRORS, Rate::new(1_000, 50));
    // What tells of a path's MTU costs nothing, nor does what we report.
    kernel.set_load(2, PeerLoad::default());
    assert!(kernel.run(Ingress, &error(PEER, 3, 4)).0);
    assert_eq!(kernel.load(2).errors, Bucket::default());
}

#[test]
fn a_peer_holds_exactly_its_share() {
    for (opened, ports) in [(Ingress, [40_000, 22]), (Egress, [443, 50_000])] {
        let mut kernel = kernel();
        let share = kernel.config().peer_flows;
        let way = opened as usize;
        let open = |kernel: &mut Kernel, added: u32, freed: Option<u32>| {
            let mut load = PeerLoad::default();
            load.added[way] = added;
            load.added[1 - way] = 7;
            kernel.set_load(2, load);
            if let Some(freed) = freed {
                let mut sweep = [0, 0];
                sweep[way] = freed;
                kernel.free(2, sweep);
            }
            kernel.set_flows(&[]);
            for (direction, flags) in [(opened, SYN), (opened.reverse(), SYN_ACK), (opened, ACK)] {
                let packet = tcp_between(PEER, ports, direction, flags);
                assert_eq!(kernel.outcome(direction, &packet), PASS);
            }
            let after = kernel.load(2).added;
            assert_eq!(after[1 - way], 7);
            (flows(kernel), after[way].wrapping_sub(added))
        };
        let (kept, refused) = (((0, 1), 1), ((1, 0), 0));
        assert_eq!(open(&mut kernel, share - 1, None), kept, "{opened:?}");
        assert_eq!(open(&mut kernel, share, None), refused, "{opened:?}");
        assert_eq!(open(&mut kernel, share, Some(1)), kept, "{opened:?}");
        assert_eq!(open(&mut kernel, share + 1, Some(1)), refused, "{opened:?}");
        // A sweep may count out what the packet path has not counted in yet.
        assert_eq!(open(&mut kernel, 3, Some(5)), kept, "{opened:?}");
        assert_eq!(open(&mut kernel, 2, Some(u32::MAX)), kept, "{opened:?}");
        assert_eq!(
            open(&mut kernel, u32::MAX, Some(u32::MAX - 5)),
            kept,
            "{opened:?}"
        );
    }
}

#[test]
fn a_closed_connection_that_the_other_end_opens_anew_is_held_by_nobody() {
    let mut kernel = kernel();
    let send = |kernel: &mut Kernel, direction, flags| {
        let packet = tcp_between(PEER, [443, 22], direction, flags);
        assert_eq!(kernel.outcome(direction, &packet), PASS);
    };
    for (direction, flags) in [(Ingress, SYN), (Egress, SYN_ACK), (Ingress, ACK)] {
        send(&mut kernel, direction, flags);
    }
    assert_eq!((flows(&kernel), kernel.held(2)), ((0, 1), [1, 0]));
    send(&mut kernel, Ingress, RST);
    send(&mut kernel, Egress, SYN);
    assert_eq!((flows(&kernel), kernel.held(2)), ((1, 0), [0, 0]));
}

#[test]
fn a_flow_without_room_asks_again_about_once_a_second() {
    let mut kernel = kernel();
    kernel.strain(2, Ingress, Some(Strain::Share));
    handshake(&mut kernel);
    let waiting = kernel.flows();
    assert_eq!(flows(&kernel), (1, 0));
    kernel.strain(2, Ingress, None);
    // Seconds of 2^30 ns, odd or even: within one it does not ask.
    let next = (kernel.now() >> 30) + 1;
    for second in [next, next + 1] {
        let (begins, ends) = (second << 30, (second + 1) << 30);
        for (last, now, expected) in [(begins, ends - 1, false), (begins - 1, begins, true)] {
            let mut flow = waiting.clone();
            flow[0].entry.state.last_seen = last;
            kernel.set_flows(&flow);
            kernel.at(now, |kernel| assert!(passes(kernel, Ingress, ACK)));
            assert_eq!(flows(&kernel) == (0, 1), expected, "{last} {now}");
        }
    }
}

#[test]
fn an_answer_passes_to_nobody_who_is_not_known() {
    let mut kernel = kernel();
    for peer in [0, 2, 3] {
        kernel.strain(peer, Ingress, Some(Strain::Empty));
    }
    let stranger = [100, 64, 0, 9];
    for (to, expected) in [(PEER, PASS), (OTHER, NO_FLOW), (stranger, NO_FLOW)] {
        let answer = tcp_between(to, [40_000, 22], Egress, ACK);
        assert_eq!(kernel.outcome(Egress, &answer), expected);
    }
    assert_eq!(kernel.outcome(Egress, &udp(Egress)), PASS);
}
