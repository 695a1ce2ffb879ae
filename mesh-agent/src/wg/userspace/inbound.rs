//! From the socket to the TUN device: find the peer, authenticate, check the inner source, deliver.
//!
//! This is the door to the underlay, where anyone may knock. Order matters: what costs nothing is
//! checked first (length, type, a known index), a handshake's MAC before its elliptic curves, and
//! under load the sender must first show that it receives at its address (cookie), of which each
//! address then gets a few a second. Whoever fails is met with silence.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, TunnResult};
use mesh_core::Direction;
use mesh_core::key::NodePublic;
use tracing::{debug, trace};

use super::clock::uptime;
use super::offload::{Header, Joiner};
use super::peer::{DATA, Decrypted, Identity, Peer, receiver};
use super::socket::{Endpoint, MAX_MESSAGE, Outbox, Socket};
use super::table::Table;
use super::{Shared, Waker};
use crate::sys::udp::RecvBatch;
use crate::wg::{Filter, Judgement};

/// Handshake messages a second that are answered without asking for a cookie: about a twentieth of
/// a core, and more than a thousand peers re-keying every two minutes need.
const UNHINDERED: u32 = 250;

/// Under load, handshakes a second of one address (an IPv6 /64), and how many may come at once:
/// the kernel's figures (ratelimiter.c).
const PER_SOURCE: u32 = 20;
const BURST: u32 = 5;

/// Addresses that are counted at a time; further ones must wait. The kernel's figure.
const MAX_SOURCES: usize = 8192;

/// Datagrams received at a time: each has a buffer of its own.
const RECEIVE: usize = 32;

/// The device's own identity, and who may talk to it how often.
pub(super) struct Gate {
    identity: Identity,
    /// Asks for cookies.
    limiter: RateLimiter,
    /// Handshake messages since the last second began.
    count: AtomicU32,
}

impl Gate {
    pub(super) fn new(identity: Identity) -> Self {
        Self {
            limiter: RateLimiter::new(&identity.public, UNHINDERED.into()),
            identity,
            count: AtomicU32::new(0),
        }
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// To be called at least once a second.
    pub(super) fn tick(&self) {
        self.limiter.reset_count();
        let count = self.count.load(Ordering::Relaxed);
        // A quarter of what is allowed in a second, as this is called four times in one.
        let less = count.saturating_sub(UNHINDERED / 4);
        self.count.store(less, Ordering::Relaxed);
    }

    fn is_under_load(&self) -> bool {
        self.count.fetch_add(1, Ordering::Relaxed) >= UNHINDERED
    }
}

pub(super) fn run(shared: &Shared) {
    let mut inbound = Inbound::new();
    let mut batch = RecvBatch::new(RECEIVE, MAX_MESSAGE);
    while !shared.stopped() {
        let socket = shared.socket();
        match batch.receive(&socket.fd) {
            Ok(()) => inbound.take(shared, &socket, &batch),
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    debug!(%error, "receive");
                }
                shared.wait(Waker::Inbound, &socket.fd);
            }
        }
    }
}

struct Inbound {
    scratch: Vec<u8>,
    outbox: Outbox,
    joiner: Joiner,
    sources: Sources,
}

impl Inbound {
    fn new() -> Self {
        Self {
            scratch: vec![0; MAX_MESSAGE],
            outbox: Outbox::new(),
            joiner: Joiner::new(),
            sources: Sources::default(),
        }
    }

    fn take(&mut self, shared: &Shared, socket: &Socket, batch: &RecvBatch) {
        let Some(gate) = shared.gate() else {
            return;
        };
        let table = shared.table();
        for datagram in batch.iter() {
            let from = Endpoint {
                to: datagram.from,
                source: datagram.to,
            };
            for message in datagram.bytes.chunks(datagram.segment) {
                if self.outbox.is_full() {
                    self.outbox.flush(socket);
                }
                self.message(shared, &gate, &table, message, from);
            }
        }
        self.outbox.flush(socket);
        self.joiner
            .flush(|header, packet| write(shared, header, packet));
    }

    fn message(
        &mut self,
        shared: &Shared,
        gate: &Gate,
        table: &Table,
        message: &[u8],
        from: Endpoint,
    ) {
        let known = receiver(message).and_then(|index| table.by_index.get(&(index >> 8)));
        let peer = match message.first() {
            Some(&DATA) => known,
            Some(_) => self
                .admit(gate, message, from)
                .and_then(|sender| sender.map_or(known, |key| table.by_key.get(&key))),
            None => None,
        };
        let Some(peer) = peer else {
            return;
        };
        let mut session = peer.lock();
        let Some(session) = session.as_mut() else {
            return;
        };
        let decrypted = session.decrypt(message, from, &mut self.scratch, &mut self.outbox);
        let Some(Decrypted { packet, source }) = decrypted else {
            return;
        };
        if may_pass(shared, table, peer, packet, source) {
            self.joiner
                .push(packet, |header, packet| write(shared, header, packet));
        }
    }

    /// Judges a handshake message. `Some(Some(key))` is an initiation by `key`, `Some(None)` a
    /// message for the peer that its index names, `None` is refused.
    fn admit(&mut self, gate: &Gate, message: &[u8], from: Endpoint) -> Option<Option<NodePublic>> {
        let mut cookie = [0; 64];
        let address = from.to.ip();
        let packet = match gate
            .limiter
            .verify_packet(Some(address), message, &mut cookie)
        {
            Ok(packet) => packet,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                trace!("under load, a cookie is asked for");
                self.outbox.room()[..cookie.len()].copy_from_slice(cookie);
                self.outbox.push(cookie.len(), from);
                return None;
            }
            Err(_) => return None,
        };
        match packet {
            Packet::HandshakeInit(initiation) => {
                if gate.is_under_load() && !self.sources.allow(address, uptime()) {
                    return None;
                }
                let Identity { secret, public, .. } = &gate.identity;
                let half = parse_handshake_anon(secret, public, &initiation).ok()?;
                Some(Some(NodePublic(half.peer_static_public)))
            }
            Packet::HandshakeResponse(_) => {
                if gate.is_under_load() && !self.sources.allow(address, uptime()) {
                    return None;
                }
                Some(None)
            }
            Packet::PacketCookieReply(_) => Some(None),
            Packet::PacketData(_) => None,
        }
    }
}

/// Whether an inner packet is the peer's to send, and policy lets it in.
fn may_pass(
    shared: &Shared,
    table: &Table,
    peer: &Arc<Peer>,
    packet: &mut [u8],
    source: IpAddr,
) -> bool {
    let owner = table.allowed.longest_match(source);
    if !owner.is_some_and(|owner| Arc::ptr_eq(owner, peer)) {
        trace!(peer = %peer.key, "inner source belongs to another");
        return false;
    }
    let judge = |filter: &Filter| filter.judge(Direction::Ingress, packet);
    shared.filter.as_ref().map(judge) != Some(Judgement::Drop)
}

/// An interface that is down takes nothing; that is no event.
fn write(shared: &Shared, header: &Header, packet: &[u8]) {
    if let Err(error) = shared.tun.write(&header.encode(), packet) {
        trace!(%error, "deliver");
    }
}

/// A token bucket for each source address.
#[derive(Default)]
struct Sources(HashMap<IpAddr, Bucket>);

struct Bucket {
    /// When the bucket will be full again; it holds one handshake less per `1 / PER_SOURCE` s.
    full_at: Duration,
}

impl Sources {
    fn allow(&mut self, address: IpAddr, now: Duration) -> bool {
        let cost = Duration::from_secs(1) / PER_SOURCE;
        if self.0.len() >= MAX_SOURCES {
            self.0.retain(|_, bucket| bucket.full_at > now);
        }
        let source = network(address);
        if self.0.len() >= MAX_SOURCES && !self.0.contains_key(&source) {
            return false;
        }
        let bucket = self.0.entry(source).or_insert(Bucket { full_at: now });
        let full_at = bucket.full_at.max(now) + cost;
        let allowed = full_at <= now + cost * BURST;
        if allowed {
            bucket.full_at = full_at;
        }
        allowed
    }
}

/// Whoever has an IPv6 address has its /64.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boringtun::noise::Tunn;
    use boringtun::x25519::StaticSecret;

    /// An initiation that `gate` may not refuse for its form.
    fn initiation(gate: &Gate) -> Vec<u8> {
        let secret = StaticSecret::from([9; 32]);
        let mut tunnel = Tunn::new(secret, gate.identity.public, None, None, 7, None);
        let mut message = vec![0; 148];
        tunnel.format_handshake_initiation(&mut message, false);
        message
    }

    #[test]
    fn under_load_a_stranger_is_asked_for_a_cookie_and_costs_no_curve() {
        let gate = Gate::new(Identity::new([7; 32]));
        let mut inbound = Inbound::new();
        let message = initiation(&gate);
        let from = Endpoint::new("192.0.2.1:9".parse().unwrap());
        let mut admit = || inbound.admit(&gate, &message, from).is_some();
        let admitted = (0..2 * UNHINDERED).filter(|_| admit()).count();
        assert_eq!(admitted, UNHINDERED as usize);
        for (answer, to) in inbound.outbox.take_messages() {
            assert!(answer.len() < message.len(), "no amplification");
            assert_eq!(to, from);
        }
    }

    #[test]
    fn an_initiation_for_another_key_is_met_with_silence() {
        let gate = Gate::new(Identity::new([7; 32]));
        let other = Gate::new(Identity::new([8; 32]));
        let mut inbound = Inbound::new();
        let from = Endpoint::new("192.0.2.1:9".parse().unwrap());
        for _ in 0..2 * UNHINDERED {
            assert!(inbound.admit(&gate, &initiation(&other), from).is_none());
        }
        assert!(inbound.outbox.take_messages().is_empty());
    }

    #[test]
    fn one_source_gets_a_burst_and_then_its_rate() {
        let mut sources = Sources::default();
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let start = Duration::from_secs(100);
        let taken = (0..100).filter(|_| sources.allow(address, start)).count();
        assert_eq!(taken, BURST as usize);
        let later = start + Duration::from_secs(1) / PER_SOURCE;
        assert!(sources.allow(address, later));
        assert!(!sources.allow(address, later));
        assert!(sources.allow("192.0.2.2".parse().unwrap(), later));
    }

    #[test]
    fn the_addresses_of_one_ipv6_network_share_a_bucket() {
        let mut sources = Sources::default();
        let taken = (0..100_u16)
            .filter(|n| sources.allow([0x2001, 0xdb8, 0, 7, 0, 0, 0, *n].into(), Duration::ZERO))
            .count();
        assert_eq!(taken, BURST as usize);
    }

    #[test]
    fn counted_sources_are_bounded_and_forgotten() {
        let mut sources = Sources::default();
        for n in 0..2 * MAX_SOURCES as u32 {
            sources.allow(IpAddr::V4(n.into()), Duration::from_secs(1));
        }
        assert_eq!(sources.0.len(), MAX_SOURCES);
        assert!(sources.allow([9, 9, 9, 9].into(), Duration::from_secs(2)));
    }
}
