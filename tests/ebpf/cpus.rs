//! Several CPUs on one flow at once: what is counted is counted once, and nothing is lost.

use mesh_core::Direction;

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
