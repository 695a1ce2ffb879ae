//! From bytes to [`Facts`]: the one parser of the packet path, for the kernel and for user space.
//!
//! A verifier follows every branch, so nothing here indexes by data. Headers that lie at a constant
//! offset, as nearly all do, are read by [`Bytes::words`]; what IP options, extension headers and
//! ICMP errors push to a variable one is read by [`Bytes::words_at`], which may cost more.

mod network;
mod quoted;
mod transport;
mod usual;

pub use usual::usual;

use self::network::{extensions, has_source_route, v4, v6, whole};

pub use self::network::{FRAGMENT, ROUTING, is_extension};
use self::quoted::embedded;
use self::transport::{Fixed, Variable, key, transport};
use crate::flow::{FlowKey, FragmentKey};
use crate::policy::Direction;
use crate::{Address, Be16, Be32, DropReason, proto};

/// A packet that starts at its IP header, read in words as they lie in memory.
pub trait Bytes {
    /// `N` words at the constant offset `AT`, a multiple of four; `None` past the end.
    fn words<const AT: usize, const N: usize>(&self) -> Option<[u32; N]>;
    /// `N` words at any offset; `None` past the end.
    fn words_at<const N: usize>(&self, at: usize) -> Option<[u32; N]>;
    /// Whether the packet has so many bytes.
    fn has(&self, length: usize) -> bool;
}

/// A packet in user space.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a>(pub &'a [u8]);

impl Bytes for Slice<'_> {
    fn words<const AT: usize, const N: usize>(&self) -> Option<[u32; N]> {
        self.words_at(AT)
    }

    fn words_at<const N: usize>(&self, at: usize) -> Option<[u32; N]> {
        let bytes = self.0.get(at..at.checked_add(N * 4)?)?;
        let mut words = [0; N];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        }
        Some(words)
    }

    fn has(&self, length: usize) -> bool {
        self.0.len() >= length
    }
}

/// What sort of flow a packet can open, continue, or speak of.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Tcp,
    /// UDP, and every protocol that we know no handshake of: any packet opens, any reply confirms.
    Datagram,
    EchoRequest,
    EchoReply,
    /// An ICMP error; [`Facts::key`] is the flow that it speaks of.
    IcmpError,
    /// The ICMP error that a path's MTU is found by.
    PacketTooBig,
    /// ICMP that neither asks nor reports: judged one by one, never remembered.
    Single,
    /// A fragment without ports of its own; decided by what its first fragment left behind.
    LaterFragment,
}

impl Kind {
    #[inline(always)]
    pub const fn is_error(self) -> bool {
        matches!(self, Self::IcmpError | Self::PacketTooBig)
    }
}

/// Whether, and how, a packet is a part of a greater one.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fragment {
    Whole,
    First,
    Later,
}

/// What one packet says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    pub key: FlowKey,
    /// The far end of the packet itself: [`FlowKey::remote`] but for ICMP errors.
    pub remote: Address,
    pub direction: Direction,
    pub kind: Kind,
    /// TCP flags as in the header's fourteenth byte, 0 for everything else.
    pub tcp: u8,
    pub fragment: Fragment,
    /// What policy calls the port: the destination's, or the ICMP type.
    pub port: u16,
    /// Where the transport header starts.
    pub transport: u16,
    pub fragment_id: u32,
}

impl Facts {
    /// Of a packet of which nobody can say whose it is.
    #[inline(always)]
    pub const fn unreadable(direction: Direction) -> Self {
        Self {
            key: FlowKey::NONE,
            remote: FlowKey::NONE.remote,
            direction,
            kind: Kind::Single,
            tcp: 0,
            fragment: Fragment::Whole,
            port: 0,
            transport: 0,
            fragment_id: 0,
        }
    }

    /// Of a packet that [`parse`] refused: its ends and its protocol, if it has a header that says so.
    #[inline(always)]
    pub fn refused<B: Bytes>(bytes: &B, direction: Direction) -> Self {
        let mut facts = Self::unreadable(direction);
        let Some([first]) = bytes.words::<0, 1>() else {
            return facts;
        };
        let (source, destination, proto) = match u32::from_be(first) >> 28 {
            4 => match bytes.words::<0, 5>() {
                Some(h) => (
                    Address::from_v4_word(h[3]),
                    Address::from_v4_word(h[4]),
                    u32::from_be(h[2]) >> 16,
                ),
                None => return facts,
            },
            6 => match v6(bytes) {
                Ok(network) => (network.source, network.destination, network.proto.into()),
                Err(_) => return facts,
            },
            _ => return facts,
        };
        (facts.key.remote, facts.key.local) = match direction {
            Direction::Ingress => (source, destination),
            Direction::Egress => (destination, source),
        };
        facts.key.proto = proto as u8;
        facts.remote = facts.key.remote;
        facts
    }

    /// Of a packet that [`usual`] could read, as [`parse`] would give them if it does not refuse its
    /// addresses or TCP flags.
    #[inline(always)]
    pub const fn usual(key: &FlowKey, direction: Direction, kind: Kind, tcp: u8) -> Self {
        let is_v4 = key.remote.is_mapped();
        let port = match (kind, direction) {
            (Kind::EchoRequest, _) if is_v4 => 8,
            (Kind::EchoReply, _) if is_v4 => 0,
            (Kind::EchoRequest, _) => 128,
            (Kind::EchoReply, _) => 129,
            (_, Direction::Ingress) => key.local_port.get(),
            (_, Direction::Egress) => key.remote_port.get(),
        };
        Self {
            key: *key,
            remote: key.remote,
            direction,
            kind,
            tcp,
            fragment: Fragment::Whole,
            port,
            transport: if is_v4 { 20 } else { 40 },
            fragment_id: 0,
        }
    }

    /// Puts the ICMP error itself, and who is its far end, in the place of the flow that it speaks of: who refuses
    /// it tells of that. The near end stays the flow's, which is its own unless it comes from a router.
    #[inline(always)]
    pub const fn forget_quoted(&mut self) {
        if self.kind.is_error() {
            self.key.remote = self.remote;
            self.key.remote_port = Be16::new(0);
            self.key.local_port = Be16::new(0);
            self.key.proto = if self.remote.is_mapped() {
                proto::ICMP
            } else {
                proto::ICMPV6
            };
        }
    }

    /// Under which the first fragment leaves its ports, and later ones look for them.
    #[inline(always)]
    pub fn fragment_key(&self) -> FragmentKey {
        FragmentKey {
            remote: self.key.remote,
            local: self.key.local,
            id: Be32::new(self.fragment_id),
            // Of IPv6 only the first fragment names the protocol (RFC 8200, section 4.5).
            proto: if self.remote.is_mapped() {
                self.key.proto
            } else {
                0
            },
            direction: self.direction as u8,
            pad: [0; 2],
        }
    }
}

/// Reads one packet. The reason of a refusal says which part of it could not be read.
#[inline(always)]
pub fn parse<B: Bytes>(bytes: &B, direction: Direction) -> Result<Facts, DropReason> {
    let [first] = bytes.words::<0, 1>().ok_or(DropReason::Truncated)?;
    let (network, upper, icmp, at) = match u32::from_be(first) >> 28 {
        4 => {
            let (network, at) = v4(bytes)?;
            let upper = if at == 20 {
                transport(bytes, &network, proto::ICMP, &Fixed::<20>)
            } else {
                whole(bytes, at)?;
                if has_source_route(bytes, at) {
                    return Err(DropReason::SourceRoute);
                }
                transport(bytes, &network, proto::ICMP, &Variable(at))
            };
            (network, upper, proto::ICMP, at)
        }
        6 => {
            let mut network = v6(bytes)?;
            if is_extension(network.proto) {
                let at = extensions(bytes, &mut network, 40)?;
                let upper = transport(bytes, &network, proto::ICMPV6, &Variable(at));
                (network, upper, proto::ICMPV6, at)
            } else {
                let upper = transport(bytes, &network, proto::ICMPV6, &Fixed::<40>);
                (network, upper, proto::ICMPV6, 40)
            }
        }
        _ => return Err(DropReason::NotIp),
    };
    if let Some(reason) = upper.refused {
        return Err(reason);
    }
    let own = key(direction, &network, &upper);
    let mut facts = Facts {
        key: own,
        remote: own.remote,
        direction,
        kind: upper.kind,
        tcp: upper.tcp,
        fragment: network.fragment,
        port: upper.port,
        transport: at as u16,
        fragment_id: network.fragment_id,
    };
    if upper.kind.is_error() {
        facts.key = embedded(bytes, direction, &network.destination, icmp, at + 8)?;
    }
    Ok(facts)
}
