//! The transport header, and the flow that it makes of a packet.

use super::network::Network;
use super::{Bytes, Fragment, Kind};
use crate::flow::FlowKey;
use crate::policy::Direction;
use crate::{Be16, DropReason, proto, tcp};

/// Where the transport header lies; the constants let it be read by [`Bytes::words`].
pub(super) trait Transport {
    fn load<B: Bytes, const N: usize>(&self, bytes: &B) -> Option<[u32; N]>;
    fn start(&self) -> usize;
}

pub(super) struct Fixed<const AT: usize>;
pub(super) struct Variable(pub(super) usize);

impl<const AT: usize> Transport for Fixed<AT> {
    #[inline(always)]
    fn load<B: Bytes, const N: usize>(&self, bytes: &B) -> Option<[u32; N]> {
        bytes.words::<AT, N>()
    }

    #[inline(always)]
    fn start(&self) -> usize {
        AT
    }
}

impl Transport for Variable {
    #[inline(always)]
    fn load<B: Bytes, const N: usize>(&self, bytes: &B) -> Option<[u32; N]> {
        bytes.words_at::<N>(self.0)
    }

    #[inline(always)]
    fn start(&self) -> usize {
        self.0
    }
}

/// The transport header, whichever protocol. Refusals are a field and no `Result`: of an absent value
/// a compiler may compute with what it never wrote, and a verifier does not let it.
#[derive(Clone, Copy)]
pub(super) struct Upper {
    pub(super) refused: Option<DropReason>,
    pub(super) kind: Kind,
    pub(super) tcp: u8,
    /// What policy calls the port.
    pub(super) port: u16,
    /// Source port, or the identifier of an echo.
    pub(super) source: u16,
    pub(super) destination: u16,
}

impl Upper {
    pub(super) const fn of(kind: Kind) -> Self {
        Self {
            refused: None,
            kind,
            tcp: 0,
            port: 0,
            source: 0,
            destination: 0,
        }
    }

    const fn refused(reason: DropReason) -> Self {
        Self {
            refused: Some(reason),
            ..Self::of(Kind::Single)
        }
    }

    /// With the ports as they lie in the first word of TCP, UDP and SCTP.
    #[inline(always)]
    pub(super) const fn with_ports(kind: Kind, word: u32) -> Self {
        let word = u32::from_be(word);
        Self {
            port: word as u16,
            source: (word >> 16) as u16,
            destination: word as u16,
            ..Self::of(kind)
        }
    }

    /// With the identifier of an echo as it lies in the second word of ICMP.
    #[inline(always)]
    pub(super) const fn with_identifier(kind: Kind, word: u32) -> Self {
        Self {
            source: (u32::from_be(word) >> 16) as u16,
            ..Self::of(kind)
        }
    }
}

#[inline(always)]
pub(super) fn transport<B: Bytes, T: Transport>(
    bytes: &B,
    network: &Network,
    icmp: u8,
    at: &T,
) -> Upper {
    if matches!(network.fragment, Fragment::Later) {
        return Upper::of(Kind::LaterFragment);
    }
    if network.proto == proto::TCP {
        let Some(header) = at.load::<B, 4>(bytes) else {
            return Upper::refused(DropReason::Truncated);
        };
        let word = u32::from_be(header[3]);
        let tcp = (word >> 16) as u8;
        if word >> 28 < 5 {
            return Upper::refused(DropReason::MalformedHeader);
        }
        if !bytes.has(at.start() + (word >> 28) as usize * 4) {
            return Upper::refused(DropReason::Truncated);
        }
        if tcp::is_nonsense(tcp) {
            return Upper::refused(DropReason::TcpFlags);
        }
        return Upper {
            tcp,
            ..Upper::with_ports(Kind::Tcp, header[0])
        };
    }
    let is_icmp = network.proto == icmp;
    if !is_icmp && network.proto != proto::UDP && network.proto != proto::SCTP {
        return Upper::of(Kind::Datagram);
    }
    let Some([word, rest]) = at.load::<B, 2>(bytes) else {
        return Upper::refused(DropReason::Truncated);
    };
    if !is_icmp {
        return Upper::with_ports(Kind::Datagram, word);
    }
    let word = u32::from_be(word);
    match icmp_kind(icmp, (word >> 24) as u8, (word >> 16) as u8) {
        Some(kind) => Upper {
            port: (word >> 24) as u16,
            ..Upper::with_identifier(kind, rest)
        },
        None => Upper::refused(DropReason::IcmpRefused),
    }
}

/// The flow of a packet that goes in `direction`.
///
/// An echo flow is its identifier and who asks: both ends may ask under the same identifier, and a
/// question must never pass for the answer to another.
#[inline(always)]
pub(super) fn key(direction: Direction, network: &Network, upper: &Upper) -> FlowKey {
    let (source, destination) = match upper.kind {
        Kind::EchoRequest => (upper.source, direction as u16),
        Kind::EchoReply => (upper.source, direction.reverse() as u16),
        // No flow has this key: an echo's near port is a direction.
        Kind::Single => (0, u16::MAX),
        _ => (upper.source, upper.destination),
    };
    let has_ports = !matches!(
        upper.kind,
        Kind::EchoRequest | Kind::EchoReply | Kind::Single
    );
    let (remote, local) = match direction {
        Direction::Ingress => (network.source, network.destination),
        Direction::Egress => (network.destination, network.source),
    };
    let (remote_port, local_port) = match direction {
        Direction::Egress if has_ports => (destination, source),
        _ => (source, destination),
    };
    FlowKey {
        remote,
        local,
        remote_port: Be16::new(remote_port),
        local_port: Be16::new(local_port),
        proto: network.proto,
        pad: 0,
        pad2: 0,
    }
}

/// RFC 792, RFC 4443. `None`: nothing in a mesh may send it.
#[inline(always)]
pub(super) const fn icmp_kind(icmp: u8, message: u8, code: u8) -> Option<Kind> {
    if icmp == proto::ICMP {
        match message {
            8 => Some(Kind::EchoRequest),
            0 => Some(Kind::EchoReply),
            3 if code == 4 => Some(Kind::PacketTooBig),
            3 | 4 | 11 | 12 => Some(Kind::IcmpError),
            // Redirect, router advertisement and solicitation: nobody in the mesh is a router of ours.
            5 | 9 | 10 => None,
            _ => Some(Kind::Single),
        }
    } else {
        match message {
            128 => Some(Kind::EchoRequest),
            129 => Some(Kind::EchoReply),
            2 => Some(Kind::PacketTooBig),
            1 | 3 | 4 => Some(Kind::IcmpError),
            // Router and neighbour discovery, redirect, also their inverse (RFC 3122), secure (RFC 3971) and
            // multicast (RFC 4286) kinds: the mesh has no link to discover.
            133..=137 | 141 | 142 | 148 | 149 | 151..=153 => None,
            _ => Some(Kind::Single),
        }
    }
}
