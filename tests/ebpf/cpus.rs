//! Several CPUs on one flow at once: what is counted is counted once, and nothing is lost.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};

use mesh_core::Direction;

use crate::packet::Body;
use crate::scene::*;

const THREADS: u32 = 4;
const RUNS: u32 = 100_000;

#[test]
fn packets_of_one_flow_on_every_cpu_are_all_counted() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    let packet = tcp(Direction::Ingress, ACK);
    let runner = kernel.runner();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| runner.repeat(Direction::Ingress, &packet, RUNS));
        }
    });
    let flows: Vec<_> = kernel.established();
    let [(_, entry)] = flows.as_slice() else {
        panic!("one flow: {flows:?}");
    };
    // The SYN and the ACK before.
    let packets = u64::from(THREADS * RUNS) + 2;
    assert_eq!(u64::from(entry.packets[0]), packets);
    assert_eq!(entry.bytes[0], packets * packet.len() as u64);
    assert_eq!(entry.packets[1], 1);
    let counters = kernel.dataplane().counters().unwrap();
    assert_eq!(counters.passed[&Direction::Ingress].packets, packets);
}

/// Whichever answer comes first establishes the flow, and no other leaves it behind in the other table too.
#[test]
fn a_flow_that_is_confirmed_on_every_cpu_at_once_lies_in_one_table() {
    const FLOWS: u16 = 200;
    let mut kernel = kernel();
    let datagrams = |direction| {
        (1..=FLOWS).map(move |port| {
            let (source, destination) = match direction {
                Direction::Ingress => (port, 53),
                Direction::Egress => (53, port),
            };
            let body = Body::Udp {
                source,
                destination,
            };
            packet(PEER, direction, body).bytes()
        })
    };
    for datagram in datagrams(Direction::Ingress) {
        assert_eq!(kernel.outcome(Direction::Ingress, &datagram), PASS);
    }
    let (runner, barrier) = (kernel.runner(), Barrier::new(THREADS as usize));
    let dropped = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for answer in datagrams(Direction::Egress) {
                    barrier.wait();
                    // Not asserted here: whoever panics lets the others wait for ever.
                    if !runner.passes(Direction::Egress, &answer) {
                        dropped.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert_eq!(dropped.into_inner(), 0);
    assert_eq!(flows(&kernel), (0, usize::from(FLOWS)));
    assert_eq!(kernel.held(2), [FLOWS.into(), 0]);
}
