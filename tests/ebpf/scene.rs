//! The small world that most tests play in: this node, a peer that may do something, one that may not.

use std::net::IpAddr;

use mesh_core::Direction::{self, Egress, Ingress};
use mesh_core::dataplane::Tables;
use mesh_core::desired::MTU;
use mesh_core::netmap::{Action, Entry, EntryKey, Netmap, NodePolicy, PortRange};
use mesh_core::{Identity, RuleId};

use crate::kernel::Kernel;
use crate::oracle::Outcome;
use crate::packet::{Body, Packet};
use crate::random::{self, Random};

pub(crate) const ME: [u8; 4] = [100, 64, 0, 1];
pub(crate) const PEER: [u8; 4] = [100, 64, 0, 2];
pub(crate) const OTHER: [u8; 4] = [100, 64, 0, 3];

pub(crate) const FIN: u8 = 17;
pub(crate) const SYN: u8 = 2;
pub(crate) const SYN_ACK: u8 = 18;
pub(crate) const ACK: u8 = 16;
pub(crate) const RST: u8 = 4;

pub(crate) const PASS: Outcome = Ok(());
pub(crate) const NO_FLOW: Outcome = Err("no flow");

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
            (address("fd00:a:b:c:d:e:f:1/128"), me),
            (address("100.64.0.2/32"), peer),
            (address("fd00:a:b:c:d:e:f:2/128"), peer),
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

pub(crate) fn tables() -> Tables {
    Tables::of(&netmap(), MTU)
}

/// With a rule that denies all TCP that peer 2 opens here.
pub(crate) fn denying(rule: RuleId) -> Tables {
    let mut netmap = netmap();
    let key = EntryKey {
        remote: Identity(18),
        local: Identity(16),
        direction: Ingress,
        proto: Some(6),
        ports: PortRange::ALL,
    };
    let denies = Entry {
        action: Action::Deny,
        rule,
    };
    netmap.policy.entries.insert(key, denies);
    Tables::of(&netmap, MTU)
}

/// The same without a rule for what comes in.
pub(crate) fn revoked() -> Tables {
    let mut netmap = netmap();
    netmap
        .policy
        .entries
        .retain(|key, _| key.direction == Egress);
    Tables::of(&netmap, MTU)
}

pub(crate) fn kernel() -> Kernel {
    let mut kernel = Kernel::with_flows(65_536);
    kernel.apply(&tables());
    kernel
}

pub(crate) fn packet(peer: [u8; 4], direction: Direction, body: Body) -> Packet {
    let (source, destination) = match direction {
        Ingress => (peer, ME),
        Egress => (ME, peer),
    };
    Packet::new(direction, source.into(), destination.into(), body)
}

pub(crate) fn tcp_between(
    peer: [u8; 4],
    ports: [u16; 2],
    direction: Direction,
    flags: u8,
) -> Vec<u8> {
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

pub(crate) fn udp(direction: Direction) -> Vec<u8> {
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

pub(crate) fn echo(direction: Direction, request: bool) -> Vec<u8> {
    packet(PEER, direction, Body::Echo { request, id: 7 }).bytes()
}

/// About the connection, by its far end or by another.
pub(crate) fn error(from: [u8; 4], kind: u8, code: u8) -> Vec<u8> {
    let body = Body::Tcp {
        source: 22,
        destination: 40_000,
        flags: ACK,
    };
    let quoted = Box::new(packet(PEER, Egress, body));
    packet(from, Ingress, Body::IcmpError { kind, code, quoted }).bytes()
}

/// Half-open and established flows.
pub(crate) fn flows(kernel: &Kernel) -> (usize, usize) {
    (kernel.half_open().len(), kernel.established().len())
}

pub(crate) fn handshake(kernel: &mut Kernel) {
    for (direction, flags) in [(Ingress, SYN), (Egress, SYN_ACK), (Ingress, ACK)] {
        assert_eq!(kernel.outcome(direction, &tcp(direction, flags)), PASS);
    }
}

/// Whether a packet of that connection passes, whatever the reason if it does not.
pub(crate) fn passes(kernel: &Kernel, direction: Direction, flags: u8) -> bool {
    kernel.run(direction, &tcp(direction, flags)).0
}

/// From peer 2, over either family.
pub(crate) fn from_peer(v6: bool, body: Body) -> Packet {
    let (source, destination): (IpAddr, IpAddr) = if v6 {
        (
            "fd00:a:b:c:d:e:f:2".parse().unwrap(),
            "fd00:a:b:c:d:e:f:1".parse().unwrap(),
        )
    } else {
        (PEER.into(), ME.into())
    };
    Packet::new(Ingress, source, destination, body)
}

/// Of the datagrams that peer 2 may send.
pub(crate) const UDP: Body = Body::Udp {
    source: 4_000,
    destination: 53,
};
