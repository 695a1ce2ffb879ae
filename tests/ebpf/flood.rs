//! One peer floods: what others have, and what they open meanwhile, stays.

use std::net::IpAddr;
use std::time::Duration;

use aya::maps::{Map, MapData, RingBuf};
use mesh_agent::dataplane::{EventKind, FlowEvent};
use mesh_common::maps;
use mesh_core::Direction;
use mesh_core::dataplane::Tables;
use mesh_core::desired::MTU;
use mesh_core::netmap::{Action, Entry, EntryKey, NodePolicy, PortRange};
use mesh_core::{Identity, RuleId};

use crate::kernel::{Kernel, Runner};
use crate::packet::{Body, Packet};
use crate::random::{self, Random};

const ME: [u8; 4] = [100, 64, 0, 1];
/// It floods.
const LOUD: [u8; 4] = [100, 64, 0, 5];
/// These have flows, and open some.
const HONEST: [[u8; 4]; 3] = [[100, 64, 0, 2], [100, 64, 0, 3], [100, 64, 0, 4]];

const SYN: u8 = 2;
const SYN_ACK: u8 = 18;
const ACK: u8 = 16;

/// Whoever is known may open TCP to any port here but 9.
fn tables() -> Tables {
    let mut netmap = random::netmap(&mut Random(1));
    let key = |first, last| EntryKey {
        remote: Identity::ANY,
        local: Identity(16),
        direction: Direction::Ingress,
        proto: Some(6),
        ports: PortRange { first, last },
    };
    let accept = Entry {
        action: Action::Accept,
        rule: RuleId(1),
    };
    let peers = HONEST.iter().chain([&LOUD]);
    netmap.policy = NodePolicy {
        identities: peers
            .map(|peer| (IpAddr::from(*peer).into(), Identity(18)))
            .chain([(IpAddr::from(ME).into(), Identity(16))])
            .collect(),
        entries: [(key(0, 8), accept), (key(10, 65_535), accept)].into(),
        ..NodePolicy::default()
    };
    Tables::of(&netmap, MTU)
}

fn tcp(peer: [u8; 4], ports: [u16; 2], direction: Direction, flags: u8) -> Vec<u8> {
    let (source, destination, ports) = match direction {
        Direction::Ingress => (peer, ME, ports),
        Direction::Egress => (ME, peer, [ports[1], ports[0]]),
    };
    let body = Body::Tcp {
        source: ports[0],
        destination: ports[1],
        flags,
    };
    Packet::new(direction, source.into(), destination.into(), body).bytes()
}

/// The handshake as far as our answer, and the rest of it.
fn open(runner: &Runner<'_>, peer: [u8; 4], ports: [u16; 2]) -> bool {
    runner.passes(
        Direction::Ingress,
        &tcp(peer, ports, Direction::Ingress, SYN),
    ) && runner.passes(
        Direction::Egress,
        &tcp(peer, ports, Direction::Egress, SYN_ACK),
    )
}

fn confirm(runner: &Runner<'_>, peer: [u8; 4], ports: [u16; 2]) -> bool {
    runner.passes(
        Direction::Ingress,
        &tcp(peer, ports, Direction::Ingress, ACK),
    )
}

const FLOWS: u32 = 20_000;
const FLOOD: u32 = 1_000_000;
/// One flow is opened by an honest peer in so many of the flood.
const EVERY: u32 = 1_000;
/// Packets of the flood within a handshake.
const HANDSHAKE: u32 = 200;

#[test]
fn a_million_new_flows_of_one_peer_cost_nobody_else_anything() {
    let mut kernel = Kernel::for_floods(65_536);
    kernel.apply(&tables());
    let runner = kernel.runner();
    let flow = |n: u32| {
        let peer = HONEST[n as usize % 3];
        (peer, [1_024 + (n / 3) as u16, 443])
    };
    for n in 0..FLOWS {
        if n % 10_000 == 0 {
            // The honest have a budget too: a second fills it.
            std::thread::sleep(Duration::from_secs(1));
        }
        let (peer, ports) = flow(n);
        assert!(
            open(&runner, peer, ports) && confirm(&runner, peer, ports),
            "flow {n}"
        );
    }
    assert_eq!(kernel.established().len(), FLOWS as usize);
    let mut flood = tcp(LOUD, [0, 0], Direction::Ingress, SYN);
    let (mut passed, mut admitted, mut asked) = (0_u32, 0_u32, 0_u32);
    for n in 0..FLOOD {
        // Every port of this node, from every port: some finish their handshake, and so fill what the
        // peer may hold.
        let ports = [(n >> 4) as u16, 10 + (n & 15) as u16];
        flood[20..22].copy_from_slice(&ports[0].to_be_bytes());
        flood[22..24].copy_from_slice(&ports[1].to_be_bytes());
        passed += u32::from(runner.passes(Direction::Ingress, &flood));
        if n % 16 == 0 {
            let answer = tcp(LOUD, ports, Direction::Egress, SYN_ACK);
            assert!(
                runner.passes(Direction::Egress, &answer),
                "our answer to {ports:?}"
            );
            assert!(confirm(&runner, LOUD, ports), "the end of its handshake");
        }
        let honest = (HONEST[n as usize % 3], [50_000 + (n / EVERY) as u16, 80]);
        if n % EVERY == 0 {
            asked += 1;
            assert!(open(&runner, honest.0, honest.1));
        }
        if n % EVERY == HANDSHAKE {
            let opened = (HONEST[(n - HANDSHAKE) as usize % 3], honest.1);
            admitted += u32::from(confirm(&runner, opened.0, opened.1));
        }
        // Half of the flows are slow: a packet each in 400,000 of the flood. The others are idle.
        if n % 40 == 0 {
            let (peer, ports) = flow(n / 40 % (FLOWS / 2) * 2);
            assert!(confirm(&runner, peer, ports), "a slow flow");
        }
    }
    let mut kept = 0;
    for n in 0..FLOWS {
        let (peer, ports) = flow(n);
        kept += u32::from(confirm(&runner, peer, ports));
    }
    let held: u32 = kernel
        .established()
        .iter()
        .map(|(_, entry)| u32::from(entry.state.peer == 5))
        .sum();
    println!(
        "{kept} of {FLOWS} established flows kept, {admitted} of {asked} new flows of others \
         admitted, {passed} of {FLOOD} packets of the flood passed, {held} of its flows held"
    );
    assert_eq!(kept, FLOWS);
    assert!(admitted * 100 >= asked * 99);
    assert_eq!(
        passed, FLOOD,
        "what is over its budget is judged, not dropped"
    );
    assert!(held <= 65_536 / 4, "{held} flows of one peer");
}

#[test]
fn one_honest_denial_is_told_of_in_a_flood_of_others() {
    let mut kernel = Kernel::for_floods(65_536);
    kernel.apply(&tables());
    let runner = kernel.runner();
    let mut denied = tcp(LOUD, [0, 9], Direction::Ingress, SYN);
    // UDP is allowed nowhere: a scan of all ports, over and over.
    denied[9] = 17;
    for n in 0..200_000_u32 {
        denied[20..22].copy_from_slice(&((n >> 8) as u16).to_be_bytes());
        denied[22..24].copy_from_slice(&(n as u16).to_be_bytes());
        assert!(!runner.passes(Direction::Ingress, &denied));
        if n == 150_000 {
            let honest = tcp(HONEST[0], [40_000, 9], Direction::Ingress, SYN);
            assert!(!runner.passes(Direction::Ingress, &honest));
        }
    }
    let data = MapData::from_pin(kernel.pin(maps::EVENTS)).unwrap();
    let mut ring = RingBuf::try_from(Map::RingBuf(data)).unwrap();
    let mut told = 0;
    let mut honest = 0;
    while let Some(record) = ring.next() {
        let event = FlowEvent::from_bytes(&record).unwrap();
        assert_eq!(event.kind(), Some(EventKind::Denied));
        told += 1;
        if event.peer == 2 {
            assert_eq!(event.key.local_port.get(), 9);
            assert_eq!(event.packets, [1, 0]);
            honest += 1;
        }
    }
    let lost = kernel.dataplane().counters().unwrap().events_lost[&EventKind::Denied];
    println!("{told} events of 200,001 denials, {lost} lost; {honest} of the 1 honest denial told");
    assert_eq!(honest, 1);
    assert!(told > 200, "{told}");
    assert!(lost > 10_000, "the loss is counted: {lost}");
}
