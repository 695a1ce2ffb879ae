//! From bytes to [`Facts`]: the one parser of the packet path, for the kernel and for user space.
//!
//! A verifier follows every branch, so nothing here indexes by data. Headers that lie at a constant
//! offset, as nearly all do, are read by [`Bytes::words`]; what IP options, extension headers and
//! ICMP errors push to a variable one is read by [`Bytes::words_at`], which may cost more.

use crate::flow::{FlowKey, FragmentKey};
use crate::policy::Direction;
use crate::tcp;
use crate::{Address, Be16, Be32, DropReason};

/// A packet that starts at its IP header, read in words as they lie in memory.
pub trait Bytes {
    /// `N` words at the constant offset `AT`, a multiple of four; `None` past the end.
    fn words<const AT: usize, const N: usize>(&self) -> Option<[u32; N]>;
    /// `N` words at any offset; `None` past the end.
    fn words_at<const N: usize>(&self, at: usize) -> Option<[u32; N]>;
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
}

/// IP protocol numbers that the packet path treats by name.
pub mod proto {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
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

    /// Of a packet that [`usual`] could read, as [`parse`] would give them if it does not refuse its
    /// addresses or TCP flags.
    #[inline(always)]
    pub const fn usual(key: &FlowKey, direction: Direction, kind: Kind, tcp: u8) -> Self {
        let port = match direction {
            Direction::Ingress => key.local_port,
            Direction::Egress => key.remote_port,
        };
        Self {
            key: *key,
            remote: key.remote,
            direction,
            kind,
            tcp,
            fragment: Fragment::Whole,
            port: port.get(),
            transport: if key.remote.is_mapped() { 20 } else { 40 },
            fragment_id: 0,
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

/// Reads a packet as most are: IPv4 without options and whole, or IPv6 without extension headers, and
/// in it TCP or UDP. Asks `then` about its flow, its kind and its TCP flags as [`parse`] would give
/// them. False for any other packet, which only [`parse`] can tell apart.
///
/// Both families ask for themselves: where their ways met, a compiler would have to keep two addresses
/// in more registers than BPF has.
#[inline(always)]
pub fn usual<B: Bytes>(
    bytes: &B,
    direction: Direction,
    then: impl Fn(&FlowKey, Kind, u8) -> bool,
) -> bool {
    let Some([first]) = bytes.words::<0, 1>() else {
        return false;
    };
    match u32::from_be(first) >> 24 {
        0x45 => {
            let Some(h) = bytes.words::<0, 6>() else {
                return false;
            };
            if u32::from_be(h[1]) & 0x3fff != 0 {
                return false;
            }
            let network = Network {
                source: Address::from_v4_word(h[3]),
                destination: Address::from_v4_word(h[4]),
                proto: (u32::from_be(h[2]) >> 16) as u8,
                fragment: Fragment::Whole,
                fragment_id: 0,
            };
            usual_transport::<B, 24, 32>(bytes, direction, &network, h[5], then)
        }
        0x60..=0x6f => {
            let Some(h) = bytes.words::<0, 11>() else {
                return false;
            };
            let network = Network {
                source: Address::from_words([h[2], h[3], h[4], h[5]]),
                destination: Address::from_words([h[6], h[7], h[8], h[9]]),
                proto: (u32::from_be(h[1]) >> 8) as u8,
                fragment: Fragment::Whole,
                fragment_id: 0,
            };
            // A flow's ends are of one family, so that one tells.
            if network.source.is_mapped() {
                return false;
            }
            usual_transport::<B, 44, 52>(bytes, direction, &network, h[10], then)
        }
        _ => false,
    }
}

/// `LENGTH` is where UDP has its length, `FLAGS` where TCP has the word with its flags.
#[inline(always)]
fn usual_transport<B: Bytes, const LENGTH: usize, const FLAGS: usize>(
    bytes: &B,
    direction: Direction,
    network: &Network,
    ports: u32,
    then: impl Fn(&FlowKey, Kind, u8) -> bool,
) -> bool {
    let (kind, tcp) = match network.proto {
        proto::TCP => {
            let Some([word]) = bytes.words::<FLAGS, 1>() else {
                return false;
            };
            let word = u32::from_be(word);
            if word >> 28 < 5 {
                return false;
            }
            (Kind::Tcp, (word >> 16) as u8)
        }
        proto::UDP if bytes.words::<LENGTH, 1>().is_some() => (Kind::Datagram, 0),
        _ => return false,
    };
    let upper = Upper::with_ports(kind, ports);
    let (remote, local, remote_port, local_port) = match direction {
        Direction::Ingress => (
            network.source,
            network.destination,
            upper.source,
            upper.destination,
        ),
        Direction::Egress => (
            network.destination,
            network.source,
            upper.destination,
            upper.source,
        ),
    };
    let key = FlowKey {
        remote,
        local,
        remote_port: Be16::new(remote_port),
        local_port: Be16::new(local_port),
        proto: network.proto,
        pad: 0,
        pad2: 0,
    };
    then(&key, kind, tcp)
}

/// Where the transport header lies; the constants let it be read by [`Bytes::words`].
trait Transport {
    fn load<B: Bytes, const N: usize>(&self, bytes: &B) -> Option<[u32; N]>;
}

struct Fixed<const AT: usize>;
struct Variable(usize);

impl<const AT: usize> Transport for Fixed<AT> {
    #[inline(always)]
    fn load<B: Bytes, const N: usize>(&self, bytes: &B) -> Option<[u32; N]> {
        bytes.words::<AT, N>()
    }
}

impl Transport for Variable {
    #[inline(always)]
    fn load<B: Bytes, const N: usize>(&self, bytes: &B) -> Option<[u32; N]> {
        bytes.words_at::<N>(self.0)
    }
}

/// The network header, whichever family.
struct Network {
    source: Address,
    destination: Address,
    proto: u8,
    fragment: Fragment,
    fragment_id: u32,
}

/// Shortest distance of a later fragment from the first byte, in units of eight: TCP's fixed header
/// and a little. Nearer ones exist only to overwrite what a filter has read (RFC 3128).
const MIN_FRAGMENT_OFFSET: u32 = 3;

/// The header, and where the next one starts.
#[inline(always)]
fn v4<B: Bytes>(bytes: &B) -> Result<(Network, usize), DropReason> {
    let header = bytes.words::<0, 5>().ok_or(DropReason::Truncated)?;
    let length = ((u32::from_be(header[0]) >> 24) & 0xf) as usize * 4;
    if length < 20 {
        return Err(DropReason::MalformedHeader);
    }
    let second = u32::from_be(header[1]);
    let offset = second & 0x1fff;
    if offset != 0 && offset < MIN_FRAGMENT_OFFSET {
        return Err(DropReason::TinyFragment);
    }
    let network = Network {
        source: Address::from_v4_word(header[3]),
        destination: Address::from_v4_word(header[4]),
        proto: (u32::from_be(header[2]) >> 16) as u8,
        fragment: fragment(offset, second & 0x2000 != 0),
        fragment_id: second >> 16,
    };
    Ok((network, length))
}

/// The fixed header; extension headers follow it.
#[inline(always)]
fn v6<B: Bytes>(bytes: &B) -> Result<Network, DropReason> {
    let h = bytes.words::<0, 10>().ok_or(DropReason::Truncated)?;
    let network = Network {
        source: Address::from_words([h[2], h[3], h[4], h[5]]),
        destination: Address::from_words([h[6], h[7], h[8], h[9]]),
        proto: (u32::from_be(h[1]) >> 8) as u8,
        fragment: Fragment::Whole,
        fragment_id: 0,
    };
    if network.source.is_mapped() || network.destination.is_mapped() {
        return Err(DropReason::MappedAddress);
    }
    Ok(network)
}

#[inline(always)]
const fn fragment(offset: u32, more: bool) -> Fragment {
    match (offset, more) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    }
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// Extension headers that we walk, and those of which we only know that they are one (mobility, HIP,
/// Shim6, the two for experiments: RFC 7045, section 4).
#[inline(always)]
const fn is_extension(proto: u8) -> bool {
    matches!(
        proto,
        HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION | 135 | 139 | 140 | 253 | 254
    )
}

/// More than anybody sends, few enough for a verifier.
const MAX_EXTENSIONS: usize = 4;

/// Walks the extension headers from `at`; leaves the protocol and the fragment in `network`.
#[inline(always)]
fn extensions<B: Bytes>(
    bytes: &B,
    network: &mut Network,
    mut at: usize,
) -> Result<usize, DropReason> {
    for _ in 0..MAX_EXTENSIONS {
        match network.proto {
            HOP_BY_HOP | ROUTING | DESTINATION => {
                let [word] = bytes.words_at::<1>(at).ok_or(DropReason::Truncated)?;
                let word = u32::from_be(word);
                // Type 0 lets a sender bounce packets between nodes (RFC 5095).
                if network.proto == ROUTING && (word >> 8) & 0xff == 0 {
                    return Err(DropReason::RoutingHeader);
                }
                network.proto = (word >> 24) as u8;
                at += (((word >> 16) & 0xff) as usize + 1) * 8;
            }
            FRAGMENT => {
                let [word, id] = bytes.words_at::<2>(at).ok_or(DropReason::Truncated)?;
                let word = u32::from_be(word);
                let offset = (word & 0xffff) >> 3;
                if offset != 0 && offset < MIN_FRAGMENT_OFFSET {
                    return Err(DropReason::TinyFragment);
                }
                network.proto = (word >> 24) as u8;
                network.fragment = fragment(offset, word & 1 != 0);
                network.fragment_id = u32::from_be(id);
                at += 8;
                if network.fragment == Fragment::Later {
                    return Ok(at);
                }
            }
            other if is_extension(other) => return Err(DropReason::UnknownExtension),
            _ => return Ok(at),
        }
    }
    if is_extension(network.proto) {
        Err(DropReason::TooManyExtensions)
    } else {
        Ok(at)
    }
}

/// The transport header, whichever protocol. Refusals are a field and no `Result`: of an absent value
/// a compiler may compute with what it never wrote, and a verifier does not let it.
#[derive(Clone, Copy)]
struct Upper {
    refused: Option<DropReason>,
    kind: Kind,
    tcp: u8,
    /// What policy calls the port.
    port: u16,
    /// Source port, or the identifier of an echo.
    source: u16,
    destination: u16,
}

impl Upper {
    const fn of(kind: Kind) -> Self {
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
    const fn with_ports(kind: Kind, word: u32) -> Self {
        let word = u32::from_be(word);
        Self {
            port: word as u16,
            source: (word >> 16) as u16,
            destination: word as u16,
            ..Self::of(kind)
        }
    }
}

#[inline(always)]
fn transport<B: Bytes, T: Transport>(bytes: &B, network: &Network, icmp: u8, at: &T) -> Upper {
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
            source: (u32::from_be(rest) >> 16) as u16,
            ..Upper::of(kind)
        },
        None => Upper::refused(DropReason::IcmpRefused),
    }
}

/// The flow of a packet that goes in `direction`.
///
/// An echo flow is its identifier and who asks: both ends may ask under the same identifier, and a
/// question must never pass for the answer to another.
#[inline(always)]
fn key(direction: Direction, network: &Network, upper: &Upper) -> FlowKey {
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
const fn icmp_kind(icmp: u8, message: u8, code: u8) -> Option<Kind> {
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
            // Router and neighbour discovery, redirect: the mesh has no link to discover.
            133..=137 => None,
            _ => Some(Kind::Single),
        }
    }
}

/// The flow of the packet that an ICMP error quotes from `at`, seen from this node.
///
/// An error goes to the sender of what it quotes, so the quoted packet went the other way, and a
/// quoted source that is not the error's destination is a forgery.
#[inline(always)]
fn embedded<B: Bytes>(
    bytes: &B,
    direction: Direction,
    destination: &Address,
    icmp: u8,
    at: usize,
) -> Result<FlowKey, DropReason> {
    const BAD: DropReason = DropReason::IcmpErrorMalformed;
    let (network, at) = quoted(bytes, icmp, at).ok_or(BAD)?;
    if network.source != *destination || !matches!(network.fragment, Fragment::Whole) {
        return Err(BAD);
    }
    let upper = if matches!(network.proto, proto::TCP | proto::UDP | proto::SCTP) {
        let [word] = bytes.words_at::<1>(at).ok_or(BAD)?;
        Upper::with_ports(Kind::Datagram, word)
    } else if network.proto == icmp {
        let [word, rest] = bytes.words_at::<2>(at).ok_or(BAD)?;
        match icmp_kind(icmp, (u32::from_be(word) >> 24) as u8, 0) {
            Some(kind @ (Kind::EchoRequest | Kind::EchoReply)) => Upper {
                source: (u32::from_be(rest) >> 16) as u16,
                ..Upper::of(kind)
            },
            _ => return Err(BAD),
        }
    } else {
        Upper::of(Kind::Datagram)
    };
    Ok(key(direction.reverse(), &network, &upper))
}

/// The network header at `at`, and where the next one starts.
#[inline(always)]
fn quoted<B: Bytes>(bytes: &B, icmp: u8, at: usize) -> Option<(Network, usize)> {
    if icmp == proto::ICMP {
        let header = bytes.words_at::<5>(at)?;
        let first = u32::from_be(header[0]);
        let length = ((first >> 24) & 0xf) as usize * 4;
        if first >> 28 != 4 || length < 20 {
            return None;
        }
        let network = Network {
            source: Address::from_v4_word(header[3]),
            destination: Address::from_v4_word(header[4]),
            proto: (u32::from_be(header[2]) >> 16) as u8,
            fragment: quoted_fragment(u32::from_be(header[1]) & 0x1fff),
            fragment_id: 0,
        };
        return Some((network, at + length));
    }
    let h = bytes.words_at::<10>(at)?;
    if u32::from_be(h[0]) >> 28 != 6 {
        return None;
    }
    let mut network = Network {
        source: Address::from_words([h[2], h[3], h[4], h[5]]),
        destination: Address::from_words([h[6], h[7], h[8], h[9]]),
        proto: (u32::from_be(h[1]) >> 8) as u8,
        fragment: Fragment::Whole,
        fragment_id: 0,
    };
    // What our own nodes send carries a fragment header at most; an error about more exotic packets
    // is not worth a second walk to the verifier.
    if network.proto != FRAGMENT {
        return Some((network, at + 40));
    }
    let [word] = bytes.words_at::<1>(at + 40)?;
    network.proto = (u32::from_be(word) >> 24) as u8;
    network.fragment = quoted_fragment((u32::from_be(word) & 0xffff) >> 3);
    Some((network, at + 48))
}

/// Quoted first fragments have their ports, as whole packets do.
#[inline(always)]
const fn quoted_fragment(offset: u32) -> Fragment {
    if offset == 0 {
        Fragment::Whole
    } else {
        Fragment::Later
    }
}
