//! Flows: the keys, and what is remembered of each.
//!
//! A flow is keyed by far and near end, not by source and destination, so both directions meet in
//! one entry without sorting. Entries of hash maps can be recycled for another key while a program
//! still holds a pointer to them: so whatever grants something (the generation above all) is only
//! ever written by inserting a whole entry in its place, never through such a pointer.

use crate::policy::{Direction, RuleId};
use crate::{Address, Be16, Be32, Identity, proto};

/// A bidirectional 5-tuple, seen from this node. Aligned so that two are compared in five steps.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FlowKey {
    pub remote: Address,
    pub local: Address,
    /// For ICMP echo the identifier.
    pub remote_port: Be16,
    /// For ICMP echo the direction of the question.
    pub local_port: Be16,
    pub proto: u8,
    pub pad: u8,
    /// Apart from the other: three bytes at once become a call of memset, and on Linux 6.1 each
    /// call takes at least 32 of the 512 bytes of stack.
    pub pad2: u16,
}

impl FlowKey {
    /// Of a packet that could not be read.
    pub const NONE: Self = Self {
        remote: Address::from_words([0; 4]),
        local: Address::from_words([0; 4]),
        remote_port: Be16::new(0),
        local_port: Be16::new(0),
        proto: 0,
        pad: 0,
        pad2: 0,
    };

    /// The whole of it, as numbers of this host.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 10] {
        let [r0, r1, r2, r3] = self.remote.words();
        let [l0, l1, l2, l3] = self.local.words();
        let ports = (self.remote_port.word() as u32) << 16 | self.local_port.word() as u32;
        let rest = (self.proto as u32) << 24 | (self.pad as u32) << 16 | self.pad2 as u32;
        [r0, r1, r2, r3, l0, l1, l2, l3, ports, rest]
    }

    /// As it lies in memory.
    pub fn bytes(&self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        bytes[..16].copy_from_slice(&self.remote.octets());
        bytes[16..32].copy_from_slice(&self.local.octets());
        bytes[32..34].copy_from_slice(&self.remote_port.get().to_be_bytes());
        bytes[34..36].copy_from_slice(&self.local_port.get().to_be_bytes());
        bytes[36] = self.proto;
        bytes
    }

    /// `==`, for where a call of memcmp may not be.
    #[inline(always)]
    pub const fn is_same(&self, other: &Self) -> bool {
        let (a, b) = (self.words(), other.words());
        let mut differ = 0;
        let mut word = 0;
        while word < a.len() {
            differ |= a[word] ^ b[word];
            word += 1;
        }
        differ == 0
    }
}

/// What decides over a flow's next packet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FlowState {
    /// Nanoseconds of the monotonic clock.
    pub last_seen: u64,
    /// Policy generation under which the flow was last judged. Less than now: judge again.
    pub generation: u32,
    /// Bits of [`flags`].
    pub flags: u32,
    pub remote: Identity,
    pub local: Identity,
    pub rule: RuleId,
    /// The node at the far end ([`crate::IdentityEntry::peer`]).
    pub peer: u32,
}

/// Bits of [`FlowState::flags`].
pub mod flags {
    /// This node opened the flow ([`crate::Direction::Egress`]).
    pub const OPENED_EGRESS: u32 = 1;
    /// The other end has answered; for TCP, with a SYN-ACK.
    pub const REPLIED: u32 = 2;
    pub const FIN_OPENER: u32 = 4;
    pub const FIN_RESPONDER: u32 = 8;
    pub const RESET: u32 = 16;
    /// A tombstone: judged again under [`super::FlowState::generation`], and denied.
    pub const DENIED: u32 = 32;
    /// Established, wherever it found room: [`super::Stage`] says which table holds it.
    pub const CONFIRMED: u32 = 64;
}

/// What is remembered of a flow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FlowEntry {
    pub state: FlowState,
    /// By [`Direction`]; GSO super-packets count as their segments.
    pub packets: [u32; 2],
    pub bytes: [u64; 2],
    /// When the flow was opened, in nanoseconds of the monotonic clock.
    pub opened: u64,
}

/// The value of `ct_est`, and what lies in `ct_new`. With its key, as another flow may have the same place.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    pub key: FlowKey,
    pub entry: FlowEntry,
}

/// Of a half-open flow that has come to an end: what its tombstone says.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Revocation {
    pub key: FlowKey,
    pub remote: Identity,
    pub local: Identity,
    pub rule: RuleId,
    pub peer: u32,
}

impl Revocation {
    pub const fn new(key: FlowKey, tombstone: &FlowState) -> Self {
        Self {
            key,
            remote: tombstone.remote,
            local: tombstone.local,
            rule: tombstone.rule,
            peer: tombstone.peer,
        }
    }

    /// As it lies in memory.
    pub fn bytes(&self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        let (key, rest) = bytes.split_at_mut(size_of::<FlowKey>());
        key.copy_from_slice(&self.key.bytes());
        let words = [self.remote.0, self.local.0, self.rule.0, self.peer];
        for (place, word) in rest.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// Under which a first fragment leaves its ports.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FragmentKey {
    pub remote: Address,
    pub local: Address,
    pub id: Be32,
    pub proto: u8,
    pub direction: u8,
    pub pad: [u8; 2],
}

/// What a first fragment leaves: the rest of the flow's key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FragmentEntry {
    pub last_seen: u64,
    pub remote_port: Be16,
    pub local_port: Be16,
    pub proto: u8,
    pub pad: [u8; 3],
}

const _: () = assert!(size_of::<FlowKey>() == 40);
const _: () = assert!(size_of::<FlowState>() == 32);
const _: () = assert!(size_of::<FlowEntry>() == 64);
const _: () = assert!(size_of::<Flow>() == 104);
const _: () = assert!(size_of::<Revocation>() == 56);
const _: () = assert!(size_of::<FragmentKey>() == 40);
const _: () = assert!(size_of::<FragmentEntry>() == 16);

/// Which table holds a flow: `ct_new` until it is confirmed, `ct_est` after, if there is room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    HalfOpen,
    Established,
}

const SECOND: u64 = 1_000_000_000;

/// How long after programs came to a host without any flow they take running connections for granted,
/// if policy allows them. Clients that are quiet for longer connect again.
pub const PICKUP: u64 = 60 * SECOND;

/// Linux waits 2 h before the first keepalive and gives up 11 min later (tcp(7)); an idle connection
/// must outlive both.
pub const TCP_IDLE: u64 = 8_000 * SECOND;
/// A SYN is repeated after 1, 3, 7 and 15 s.
pub const TCP_NEW: u64 = 20 * SECOND;
/// Both ends have said FIN; what remains is a repeated last ACK.
pub const TCP_CLOSED: u64 = 30 * SECOND;
pub const TCP_RESET: u64 = 10 * SECOND;
pub const DATAGRAM_NEW: u64 = 30 * SECOND;
/// RFC 4787, section 4.3 asks for two minutes.
pub const DATAGRAM_IDLE: u64 = 120 * SECOND;
pub const ECHO: u64 = 10 * SECOND;
/// How long a packet's fragments may trickle in: Linux gives up reassembly after the same time.
pub const FRAGMENT: u64 = 30 * SECOND;

impl FlowState {
    #[inline(always)]
    pub const fn opened(&self) -> Direction {
        if self.flags & flags::OPENED_EGRESS != 0 {
            Direction::Egress
        } else {
            Direction::Ingress
        }
    }

    /// TCP that was closed by both ends or reset: the same ports may open anew.
    #[inline(always)]
    pub const fn is_closing(&self) -> bool {
        const BOTH: u32 = flags::FIN_OPENER | flags::FIN_RESPONDER;
        self.flags & flags::RESET != 0 || self.flags & BOTH == BOTH
    }

    /// Nanoseconds without a packet after which the flow is forgotten.
    #[inline(always)]
    pub const fn timeout(&self, key_proto: u8) -> u64 {
        let is_confirmed = self.flags & flags::CONFIRMED != 0;
        match key_proto {
            proto::TCP if self.flags & flags::RESET != 0 => TCP_RESET,
            proto::TCP if self.is_closing() => TCP_CLOSED,
            proto::TCP if is_confirmed => TCP_IDLE,
            proto::TCP => TCP_NEW,
            proto::ICMP | proto::ICMPV6 => ECHO,
            _ if is_confirmed => DATAGRAM_IDLE,
            _ => DATAGRAM_NEW,
        }
    }

    #[inline(always)]
    pub const fn is_expired(&self, key_proto: u8, now: u64) -> bool {
        is_older(now, self.last_seen, self.timeout(key_proto))
    }
}

/// Whether more than `timeout` lies between two times of one clock. By a signed difference, because
/// another CPU may have seen the flow a moment after our `now`.
#[inline(always)]
pub const fn is_older(now: u64, then: u64, timeout: u64) -> bool {
    now.wrapping_sub(then).cast_signed() > timeout.cast_signed()
}
