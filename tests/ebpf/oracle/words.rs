//! What a packet says by itself: who it claims to be about, and whether anybody may send such a thing.

use std::net::IpAddr;

use mesh_core::Direction;

use crate::packet::{Body, Extension, Packet};

pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 16;

/// Why a packet is dropped, in the words of the counters; `Ok` if it passes.
pub(crate) type Outcome = Result<(), &'static str>;

/// What both ends of a flow have in common.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Name {
    pub(super) far: IpAddr,
    pub(super) near: IpAddr,
    pub(super) proto: u8,
    pub(super) far_port: u16,
    pub(super) near_port: u16,
    /// For echo: who asks. Both ends may ask under one identifier.
    pub(super) asker: Option<Direction>,
}

/// What the fragments of one packet have in common: ends, identifier, protocol, direction.
pub(super) type FragmentName = (IpAddr, IpAddr, u16, u8, Direction);

/// What policy calls the port of a flow.
pub(super) fn service(name: &Name, opened: Direction) -> u16 {
    match (name.proto, opened) {
        (1, _) => 8,
        (58, _) => 128,
        (_, Direction::Ingress) => name.near_port,
        (_, Direction::Egress) => name.far_port,
    }
}

/// The flow that it would belong to, by its own headers.
pub(super) fn own_name(packet: &Packet) -> Name {
    let (source, destination, asker) = match &packet.body {
        Body::Tcp {
            source,
            destination,
            ..
        }
        | Body::Udp {
            source,
            destination,
        }
        | Body::Sctp {
            source,
            destination,
        } => (*source, *destination, None),
        Body::Echo { request, id } => {
            let asker = if *request {
                packet.direction
            } else {
                packet.direction.reverse()
            };
            (*id, *id, Some(asker))
        }
        _ => (0, 0, None),
    };
    let near_is_source = packet.direction == Direction::Egress;
    let ((near, near_port), (far, far_port)) = if near_is_source {
        ((packet.source, source), (packet.destination, destination))
    } else {
        ((packet.destination, destination), (packet.source, source))
    };
    Name {
        far,
        near,
        proto: packet.proto(),
        far_port,
        near_port,
        asker,
    }
}

pub(super) fn fragment_key(packet: &Packet, id: u16) -> FragmentName {
    // Of IPv6 only the first fragment says which protocol it is.
    let proto = if packet.is_v4() { packet.proto() } else { 0 };
    (
        packet.source,
        packet.destination,
        id,
        proto,
        packet.direction,
    )
}

/// Can it be read at all, and may anybody send such a thing?
pub(super) fn readable(packet: &Packet) -> Outcome {
    if let (IpAddr::V6(source), IpAddr::V6(destination)) = (packet.source, packet.destination)
        && (source.to_ipv4_mapped().is_some() || destination.to_ipv4_mapped().is_some())
    {
        return Err("mapped address");
    }
    let tiny = packet
        .fragment
        .is_some_and(|f| f.offset > 0 && f.offset < 3);
    if packet.is_v4() && tiny {
        return Err("tiny fragment");
    }
    if !packet.is_v4() {
        for (walked, extension) in packet.extensions.iter().enumerate() {
            match extension {
                _ if walked >= 4 => return Err("too many extension headers"),
                Extension::Routing(0) => return Err("routing header"),
                Extension::Mobility => return Err("unknown extension header"),
                _ => {}
            }
        }
        if packet.fragment.is_some() && packet.extensions.len() >= 4 {
            return Err("too many extension headers");
        }
        if tiny {
            return Err("tiny fragment");
        }
    }
    if packet.is_later_fragment() {
        return Ok(());
    }
    match &packet.body {
        Body::Tcp { flags, .. } => {
            let none = flags & (SYN | ACK | RST) == 0;
            if none || (flags & SYN != 0 && flags & (FIN | RST) != 0) {
                return Err("tcp flags");
            }
        }
        Body::Icmp(kind) => {
            let refused: &[u8] = if packet.is_v4() {
                &[5, 9, 10]
            } else {
                &[133, 134, 135, 136, 137, 141, 142, 148, 149, 151, 152, 153]
            };
            if refused.contains(kind) {
                return Err("icmp refused");
            }
        }
        Body::IcmpError { quoted, .. } => {
            let strange = quoted.is_later_fragment()
                || matches!(quoted.body, Body::Icmp(_) | Body::IcmpError { .. })
                || quoted.source != packet.destination;
            if strange {
                return Err("icmp error malformed");
            }
        }
        _ => {}
    }
    Ok(())
}

pub(super) fn opens_tcp(flags: u8) -> bool {
    flags & (SYN | ACK | RST | FIN) == SYN
}

/// Could it be the first packet of a flow?
pub(super) fn can_open(packet: &Packet) -> bool {
    !packet.is_later_fragment()
        && match packet.body {
            Body::Tcp { flags, .. } => opens_tcp(flags),
            Body::Echo { request, .. } => request,
            Body::IcmpError { .. } => false,
            _ => true,
        }
}

pub(super) fn is_multicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_multicast() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_multicast(),
    }
}
