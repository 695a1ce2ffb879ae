//! The short way of established flows: who goes on it, and that nobody else does.
//!
//! It says what the long way would say, so only time tells them apart: the same packet with an option in
//! its IP header, or an extension header, goes the long way through the same flow.

use std::net::IpAddr;

use mesh_core::Direction::{self, Egress, Ingress};

use crate::kernel::Kernel;
use crate::packet::{Body, Extension, Packet};
use crate::scene::*;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sort {
    Tcp,
    Udp,
    Echo,
}

const SORTS: [Sort; 3] = [Sort::Tcp, Sort::Udp, Sort::Echo];

impl Sort {
    /// Bytes of its header without options.
    fn header(self) -> usize {
        match self {
            Self::Tcp => 20,
            Self::Udp | Self::Echo => 8,
        }
    }
}

/// A packet between peer 2 and this node, of a flow that the peer has opened.
fn of_flow(v6: bool, direction: Direction, sort: Sort) -> Packet {
    let (far, near): (IpAddr, IpAddr) = if v6 {
        (
            "fd00:a:b:c:d:e:f:2".parse().unwrap(),
            "fd00:a:b:c:d:e:f:1".parse().unwrap(),
        )
    } else {
        (PEER.into(), ME.into())
    };
    let port = if sort == Sort::Tcp { 22 } else { 53 };
    let ((source, destination), ports) = match direction {
        Ingress => ((far, near), [40_000, port]),
        Egress => ((near, far), [port, 40_000]),
    };
    let [from, to] = ports;
    let body = match sort {
        Sort::Tcp => Body::Tcp {
            source: from,
            destination: to,
            flags: ACK,
        },
        Sort::Udp => Body::Udp {
            source: from,
            destination: to,
        },
        Sort::Echo => Body::Echo {
            request: direction == Ingress,
            id: 7,
        },
    };
    Packet::new(direction, source, destination, body)
}

/// Nanoseconds of the quickest of many runs.
fn quickest(kernel: &Kernel, direction: Direction, packet: &[u8]) -> u128 {
    let name = match direction {
        Ingress => "mesh_in",
        Egress => "mesh_eg",
    };
    let runs = (0..40).map(|_| kernel.run_program(name, packet, 2_000));
    runs.map(|(value, _, time)| {
        assert_eq!(value, u32::MAX);
        time
    })
    .min()
    .expect("more than none")
}

/// A flow of each sort in both families, established.
fn established() -> Kernel {
    let mut kernel = kernel();
    for v6 in [false, true] {
        for sort in SORTS {
            let mut steps = vec![(Ingress, SYN), (Egress, SYN_ACK), (Ingress, ACK)];
            if sort != Sort::Tcp {
                steps.pop();
            }
            for (direction, sent) in steps {
                let mut packet = of_flow(v6, direction, sort);
                if let Body::Tcp { flags, .. } = &mut packet.body {
                    *flags = sent;
                }
                assert_eq!(kernel.outcome(direction, &packet.bytes()), PASS);
            }
        }
    }
    assert_eq!(flows(&kernel), (0, 6));
    kernel
}

#[test]
fn packets_of_established_flows_take_the_short_way() {
    let kernel = established();
    for v6 in [false, true] {
        for sort in SORTS {
            for direction in [Ingress, Egress] {
                let packet = of_flow(v6, direction, sort);
                let mut around = packet.clone();
                if v6 {
                    around.extensions = vec![Extension::Destination];
                } else {
                    around.options = 4;
                }
                // No more than the headers.
                let mut short = packet.bytes();
                short.truncate(packet.header() + sort.header());
                let long = quickest(&kernel, direction, &around.bytes());
                let short = quickest(&kernel, direction, &short);
                println!("{v6} {sort:?} {direction:?}: {short} ns, the long way {long} ns");
                assert!(short * 3 < long * 2, "{short} ns of {long} ns");
            }
        }
    }
}

#[test]
fn nothing_else_takes_the_short_way() {
    let mut kernel = established();
    let v4 = of_flow(false, Ingress, Sort::Tcp).bytes();
    let udp = of_flow(false, Ingress, Sort::Udp).bytes();
    let echo = of_flow(false, Ingress, Sort::Echo).bytes();
    let echo_v6 = of_flow(true, Ingress, Sort::Echo).bytes();
    let changed = |packet: &[u8], at: usize, byte: u8| {
        let mut packet = packet.to_vec();
        packet[at] = byte;
        packet
    };
    let mapped = |ends: &[(usize, [u8; 4])]| {
        let mut packet = of_flow(true, Ingress, Sort::Tcp).bytes();
        for (at, address) in ends {
            packet[*at..at + 16].fill(0);
            packet[at + 10..at + 12].fill(0xff);
            packet[at + 12..at + 16].copy_from_slice(address);
        }
        packet
    };
    let (from, to) = ((8, PEER), (24, ME));
    let before = kernel.flows();
    for (what, packet, reason) in [
        ("IPv4 in IPv6", mapped(&[from, to]), "mapped address"),
        ("from IPv4 to IPv6", mapped(&[from]), "mapped address"),
        ("from IPv6 to IPv4", mapped(&[to]), "mapped address"),
        ("another version", changed(&v4, 0, 0x75), "not ip"),
        (
            "a header too short",
            changed(&v4, 0, 0x44),
            "malformed header",
        ),
        (
            "a later fragment",
            changed(&udp, 7, 3),
            "fragment without first",
        ),
        (
            "a late fragment",
            changed(&udp, 6, 0x10),
            "fragment without first",
        ),
        ("a tiny fragment", changed(&v4, 7, 2), "tiny fragment"),
        (
            "a TCP header too short",
            changed(&v4, 32, 0x4f),
            "malformed header",
        ),
        ("TCP without flags", changed(&v4, 33, 0), "tcp flags"),
        ("TCP without an end", v4[..35].to_vec(), "truncated"),
        ("UDP without an end", udp[..27].to_vec(), "truncated"),
        ("an echo without an end", echo[..27].to_vec(), "truncated"),
        (
            "an answer to our question",
            changed(&echo, 20, 0),
            "no flow",
        ),
        ("the same over IPv6", changed(&echo_v6, 40, 129), "no flow"),
        ("a redirect", changed(&echo, 20, 5), "icmp refused"),
        (
            "an ICMP error",
            changed(&echo, 20, 3),
            "icmp error malformed",
        ),
        ("another port", changed(&v4, 23, 23), "no rule"),
        (
            "a responder that asks",
            changed(&v4, 33, SYN_ACK),
            "tcp out of state",
        ),
    ] {
        let packet = if reason == "no rule" {
            changed(&packet, 33, SYN)
        } else {
            packet
        };
        assert_eq!(kernel.outcome(Ingress, &packet), Err(reason), "{what}");
    }
    assert_eq!(kernel.flows(), before);
    // A first fragment passes, and leaves its ports.
    assert_eq!(kernel.outcome(Ingress, &changed(&udp, 6, 0x20)), PASS);
    assert_eq!(kernel.fragments().keys().count(), 1);
    // Without a policy there is none to go on under, whatever a flow says.
    let mut flows = kernel.flows();
    for flow in &mut flows {
        flow.entry.state.generation = 0;
    }
    kernel.set_flows(&flows);
    kernel.configure(|config| config.generation = 0);
    assert_eq!(kernel.outcome(Ingress, &v4), Err("no policy"));
    assert_eq!(kernel.outcome(Ingress, &udp), Err("no policy"));
}
