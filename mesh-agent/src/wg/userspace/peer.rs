//! One peer: boringtun's tunnel, where the peer is, and what was seen of it.
//!
//! The traps are boringtun's. It panics when the clock stands before 1970 and never looks at it
//! again afterwards; it cannot change keepalive or pre-shared key of a living tunnel; a tunnel that
//! gave up stays silent until somebody sends; its packet queue turns in circles when it is drained
//! before a session stands; and its counter arithmetic overflows at the very end of its range.
//! Each is met here, where the tunnel is called.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::bail;
use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use mesh_core::key::NodePublic;
use std::sync::Arc;
use tracing::trace;

use super::clock::uptime;
use super::socket::{Endpoint, Outbox};

/// Packets that wait in a tunnel for its handshake. The kernel keeps 128; with a thousand peers
/// that are away, and a program that scans the mesh, this bounds the waste at 80 MB.
const MAX_STAGED: usize = 64;

/// Data messages with a counter beyond this are refused: REJECT_AFTER_MESSAGES of the WireGuard
/// paper, section 6.1. boringtun would overflow.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// Forward steps of the wall clock that are not worth a new tunnel.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(1);

/// What of the device's own identity every tunnel needs.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) secret: x25519::StaticSecret,
    pub(super) public: x25519::PublicKey,
    /// Never under load: the device's own limiter has judged before (see `inbound`).
    pub(super) unlimited: Arc<RateLimiter>,
}

impl Identity {
    pub(super) fn new(secret: [u8; 32]) -> Self {
        let secret = x25519::StaticSecret::from(secret);
        let public = x25519::PublicKey::from(&secret);
        Self {
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
            secret,
            public,
        }
    }
}

pub(super) struct Peer {
    pub(super) key: NodePublic,
    /// The upper 24 bits of every receiver index that this peer's messages carry.
    pub(super) index: u32,
    session: Mutex<Option<Session>>,
}

impl Peer {
    /// `index` has 24 bits.
    pub(super) fn new(key: NodePublic, index: u32, identity: &Identity) -> anyhow::Result<Self> {
        Ok(Self {
            key,
            index,
            session: Mutex::new(Some(Session::new(key, index, identity)?)),
        })
    }

    /// The session, or `None` once the peer was removed. A thread that still holds the peer from a
    /// table of a moment ago can do nothing with it.
    pub(super) fn lock(&self) -> SessionGuard<'_> {
        // A panic elsewhere must not take the tunnel down with it.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the session for good, keys wiped.
    pub(super) fn remove(&self) {
        *self.lock() = None;
    }
}

pub(super) type SessionGuard<'a> = MutexGuard<'a, Option<Session>>;

pub(super) struct Session {
    tunn: Tunn,
    key: NodePublic,
    index: u32,
    pub(super) endpoint: Option<Endpoint>,
    pub(super) written_endpoint: Option<SocketAddr>,
    keepalive: Option<u16>,
    /// To be greeted with the next tick: see [`Self::write_endpoint`].
    greet: bool,
    preshared_key: Option<[u8; 32]>,
    pub(super) rx_bytes: u64,
    pub(super) tx_bytes: u64,
    /// Uptime at which the last handshake was complete at both ends.
    handshake: Option<Duration>,
    /// As responder: our index of the session that the initiator has not used yet.
    unconfirmed: Option<u32>,
    /// Packets queued in the tunnel.
    staged: usize,
    /// Anything authenticated passed since the last tick.
    active: bool,
    last_active: Duration,
    /// Wall clock minus uptime when the tunnel was made: boringtun stamps handshakes with it.
    clock: Duration,
}

/// An inner packet that came out of a message, and who wrote it.
pub(super) struct Decrypted<'a> {
    pub(super) packet: &'a mut [u8],
    pub(super) source: IpAddr,
}

impl Session {
    fn new(key: NodePublic, index: u32, identity: &Identity) -> anyhow::Result<Self> {
        Ok(Self {
            tunn: tunnel(key, index, None, identity),
            key,
            index,
            endpoint: None,
            written_endpoint: None,
            keepalive: None,
            greet: false,
            preshared_key: None,
            rx_bytes: 0,
            tx_bytes: 0,
            handshake: None,
            unconfirmed: None,
            staged: 0,
            active: false,
            last_active: uptime(),
            clock: wall_clock_offset()?,
        })
    }

    pub(super) fn keepalive(&self) -> Option<u16> {
        self.keepalive
    }

    pub(super) fn preshared_key(&self) -> Option<[u8; 32]> {
        self.preshared_key
    }

    pub(super) fn handshake_age(&self) -> Option<Duration> {
        Some(uptime().saturating_sub(self.handshake?))
    }

    /// A peer that we have no session with is greeted once. It may have one with us, of before we
    /// were restarted, and would send into it for fifteen seconds before it tries a new one
    /// (REKEY_TIMEOUT + KEEPALIVE_TIMEOUT, WireGuard paper §6.2).
    pub(super) fn write_endpoint(&mut self, to: SocketAddr) {
        self.greet = self.handshake.is_none();
        self.endpoint = Some(Endpoint::new(to));
        self.written_endpoint = Some(to);
    }

    /// The first keepalive goes out with the next tick: a mapping is opened when it is asked for.
    pub(super) fn set_keepalive(&mut self, seconds: Option<u16>) {
        self.keepalive = seconds.filter(|s| *s > 0);
        self.last_active = Duration::ZERO;
    }

    /// Starts over with another pre-shared key; boringtun's tunnel cannot change it.
    pub(super) fn set_preshared_key(
        &mut self,
        key: Option<[u8; 32]>,
        identity: &Identity,
    ) -> anyhow::Result<()> {
        self.preshared_key = key.filter(|key| *key != [0; 32]);
        self.restart(identity)
    }

    /// Starts over as another device, or by another clock. The handshake that was is forgotten.
    pub(super) fn restart(&mut self, identity: &Identity) -> anyhow::Result<()> {
        self.clock = wall_clock_offset()?;
        self.tunn = tunnel(self.key, self.index, self.preshared_key, identity);
        (self.staged, self.unconfirmed, self.handshake) = (0, None, None);
        Ok(())
    }

    /// Encrypts `packet` to the outbox, or queues it and starts a handshake.
    ///
    /// Without an endpoint there is nowhere to send to, and a queued packet would only come late.
    pub(super) fn encrypt(&mut self, packet: &[u8], outbox: &mut Outbox) {
        let Some(endpoint) = self.endpoint else {
            return;
        };
        let stands = self.tunn.time_since_last_handshake().is_some();
        let result = if stands || (self.staged < MAX_STAGED && !packet.is_empty()) {
            self.staged += usize::from(!stands);
            self.tunn.encapsulate(packet, outbox.room())
        } else {
            self.tunn.format_handshake_initiation(outbox.room(), false)
        };
        self.post(written(&result), endpoint, outbox);
    }

    /// Takes a message that came `from` an address `to` one of ours.
    ///
    /// Nothing but an authenticated message changes the session or moves the endpoint.
    pub(super) fn decrypt<'a>(
        &mut self,
        message: &[u8],
        from: Endpoint,
        scratch: &'a mut [u8],
        outbox: &mut Outbox,
    ) -> Option<Decrypted<'a>> {
        let kind = *message.first()?;
        if kind != DATA {
            self.handshake_message(kind, message, from, outbox);
            return None;
        }
        if counter(message)? >= REJECT_AFTER_MESSAGES {
            return None;
        }
        let decrypted = match self.tunn.decapsulate(None, message, scratch) {
            TunnResult::Done => None,
            TunnResult::WriteToTunnelV4(packet, source) => Some(Decrypted {
                packet,
                source: source.into(),
            }),
            TunnResult::WriteToTunnelV6(packet, source) => Some(Decrypted {
                packet,
                source: source.into(),
            }),
            TunnResult::WriteToNetwork(_) => None,
            TunnResult::Err(error) => {
                trace!(peer = %self.key, ?error, "data refused");
                return None;
            }
        };
        self.heard(message.len(), from);
        if self.unconfirmed.is_some() && self.unconfirmed == receiver(message) {
            self.unconfirmed = None;
            self.handshake = Some(uptime());
        }
        if self.staged > 0 {
            self.drain(outbox);
        }
        decrypted
    }

    fn handshake_message(&mut self, kind: u8, message: &[u8], from: Endpoint, outbox: &mut Outbox) {
        let result = self.tunn.decapsulate(None, message, outbox.room());
        let answer = match result {
            TunnResult::WriteToNetwork(answer) => answer,
            // A cookie was taken; it proves nothing of where the peer is.
            TunnResult::Done => return,
            TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => return,
            TunnResult::Err(error) => {
                trace!(peer = %self.key, ?error, "handshake refused");
                return;
            }
        };
        let (len, ours) = (answer.len(), sender(answer));
        self.heard(message.len(), from);
        self.post(Some(len), from, outbox);
        match kind {
            INITIATION => self.unconfirmed = ours,
            _ => {
                self.unconfirmed = None;
                self.handshake = Some(uptime());
                self.drain(outbox);
            }
        }
    }

    /// What time asks for; to be called a few times a second.
    pub(super) fn tick(&mut self, identity: &Identity, outbox: &mut Outbox) -> anyhow::Result<()> {
        let now = uptime();
        if std::mem::take(&mut self.active) {
            self.last_active = now;
        }
        let result = self.tunn.update_timers(outbox.room());
        let gave_up = matches!(result, TunnResult::Err(WireGuardError::ConnectionExpired));
        let len = written(&result);
        match self.endpoint {
            Some(endpoint) => self.post(len, endpoint, outbox),
            None => trace!(peer = %self.key, "no endpoint"),
        }
        if gave_up {
            (self.staged, self.unconfirmed) = (0, None);
            // The peer keeps the greatest timestamp that it has seen of us. If the clock was set
            // right since this tunnel was made, only a new tunnel will ever be answered.
            if wall_clock_offset()? > self.clock + CLOCK_TOLERANCE {
                self.restart(identity)?;
            }
        }
        let due = self
            .keepalive
            .is_some_and(|seconds| now >= self.last_active + Duration::from_secs(seconds.into()));
        let greet = std::mem::take(&mut self.greet) && self.handshake.is_none();
        if due || greet {
            self.encrypt(&[], outbox);
            self.last_active = now;
        }
        Ok(())
    }

    /// Sends what was queued; only with a session, or the queue turns in circles.
    fn drain(&mut self, outbox: &mut Outbox) {
        let Some(endpoint) = self.endpoint else {
            return;
        };
        while self.staged > 0 && !outbox.is_full() {
            let result = self.tunn.decapsulate(None, &[], outbox.room());
            let Some(len) = written(&result) else {
                self.staged = 0;
                return;
            };
            self.staged -= 1;
            self.post(Some(len), endpoint, outbox);
        }
    }

    fn post(&mut self, len: Option<usize>, endpoint: Endpoint, outbox: &mut Outbox) {
        if let Some(len) = len {
            self.tx_bytes += len as u64;
            self.active = true;
            outbox.push(len, endpoint);
        }
    }

    fn heard(&mut self, len: usize, from: Endpoint) {
        self.rx_bytes += len as u64;
        self.active = true;
        self.endpoint = Some(from);
    }
}

fn tunnel(key: NodePublic, index: u32, psk: Option<[u8; 32]>, identity: &Identity) -> Tunn {
    Tunn::new(
        identity.secret.clone(),
        x25519::PublicKey::from(key.0),
        psk,
        None,
        index,
        Some(Arc::clone(&identity.unlimited)),
    )
}

/// Seconds of wall clock at uptime zero. boringtun panics on a clock before 1970.
fn wall_clock_offset() -> anyhow::Result<Duration> {
    let Ok(now) = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) else {
        bail!("the clock stands before 1970: WireGuard stamps its handshakes with it, set it");
    };
    Ok(now.saturating_sub(uptime()))
}

fn written(result: &TunnResult<'_>) -> Option<usize> {
    match result {
        TunnResult::WriteToNetwork(message) => Some(message.len()),
        TunnResult::Done
        | TunnResult::Err(_)
        | TunnResult::WriteToTunnelV4(..)
        | TunnResult::WriteToTunnelV6(..) => None,
    }
}

// === Message headers (WireGuard paper, section 5.4) ===

pub(super) const INITIATION: u8 = 1;
pub(super) const RESPONSE: u8 = 2;
pub(super) const COOKIE: u8 = 3;
pub(super) const DATA: u8 = 4;

fn sender(message: &[u8]) -> Option<u32> {
    word(message, 4)
}

fn word(message: &[u8], at: usize) -> Option<u32> {
    let bytes = message.get(at..at + 4)?;
    bytes.try_into().ok().map(u32::from_le_bytes)
}

fn counter(message: &[u8]) -> Option<u64> {
    let bytes = message.get(8..16)?;
    bytes.try_into().ok().map(u64::from_le_bytes)
}

/// Whose index a message is addressed to; initiations carry none.
pub(super) fn receiver(message: &[u8]) -> Option<u32> {
    match *message.first()? {
        RESPONSE => word(message, 8),
        COOKIE | DATA => word(message, 4),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
