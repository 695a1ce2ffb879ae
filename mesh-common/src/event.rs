//! What the packet path tells the agent: what becomes of flows, and what is denied.
//!
//! Denials are counted per [`DenyKey`] and told only now and then, with the count so far, so a flood
//! of them costs the reader a handful of records. Records are copied out of memory that the kernel
//! wrote: numbers in them are numbers, and become enums only where somebody has looked
//! ([`FlowEvent::kind`], [`FlowEvent::reason`]).

use crate::budget::Rate;
use crate::flow::FlowKey;
use crate::policy::RuleId;
use crate::{Address, Be16, Direction, DropReason, Identity};

/// What happened. Each kind has tokens and a counter of losses of its own, so that many of one never
/// silence another.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum EventKind {
    /// A packet opened a flow, or one was picked up; policy allowed it.
    Opened = 0,
    /// The other end has answered: the flow is established.
    Confirmed = 1,
    /// Both ends have ended it, or one has reset it. What ends in silence, the agent's sweep finds.
    Closed = 2,
    /// The policy that stands now denies it.
    Revoked = 3,
    /// Packets were dropped: how many so far under the same [`DenyKey`], and one of them.
    Denied = 4,
}

impl EventKind {
    pub const ALL: [Self; 5] = [
        Self::Opened,
        Self::Confirmed,
        Self::Closed,
        Self::Revoked,
        Self::Denied,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Confirmed => "confirmed",
            Self::Closed => "closed",
            Self::Revoked => "revoked",
            Self::Denied => "denied",
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// Events of one kind on one CPU: the ring buffer holds two seconds of all kinds at this rate.
pub const KIND_RATE: Rate = Rate::new(1_000, 1_000);
/// Events about one peer, so that it drowns nobody's but its own.
pub const PEER_RATE: Rate = Rate::new(100, 200);

/// One record of the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowEvent {
    /// Nanoseconds of the monotonic clock.
    pub time: u64,
    /// When the flow was opened, or the first of the denied packets came.
    pub first: u64,
    /// By [`Direction`], since `first`. Of denied packets only their own direction's are counted.
    pub bytes: [u64; 2],
    pub packets: [u64; 2],
    /// Of the flow, or of the denied packet: zero where that could not be read.
    pub key: FlowKey,
    pub remote: Identity,
    pub local: Identity,
    pub rule: RuleId,
    /// The node at the far end.
    pub peer: u32,
    /// [`EventKind`] as a number.
    pub kind: u8,
    /// Which way the flow was opened, or the denied packet went.
    pub direction: u8,
    /// Why it is denied; 0 for what is allowed.
    pub reason: u8,
    /// TCP flags of the denied packet; of ICMP its type.
    pub tcp: u8,
    /// Its bytes, from its IP header.
    pub length: u32,
}

const _: () = assert!(size_of::<FlowEvent>() == 112);

impl FlowEvent {
    /// From a record of the ring buffer; `None` if it is of another size.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; size_of::<Self>()] = bytes.try_into().ok()?;
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let long = |at: usize| {
            let halves = [word(at), word(at + 4)];
            let [low, high] = if cfg!(target_endian = "little") {
                halves
            } else {
                [halves[1], halves[0]]
            };
            u64::from(high) << 32 | u64::from(low)
        };
        let address =
            |at| Address::from_words([word(at), word(at + 4), word(at + 8), word(at + 12)]);
        let port = |at: usize| Be16::new(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
        Some(Self {
            time: long(0),
            first: long(8),
            bytes: [long(16), long(24)],
            packets: [long(32), long(40)],
            key: FlowKey {
                remote: address(48),
                local: address(64),
                remote_port: port(80),
                local_port: port(82),
                proto: bytes[84],
                pad: 0,
                pad2: 0,
            },
            remote: Identity(word(88)),
            local: Identity(word(92)),
            rule: RuleId(word(96)),
            peer: word(100),
            kind: bytes[104],
            direction: bytes[105],
            reason: bytes[106],
            tcp: bytes[107],
            length: word(108),
        })
    }

    /// `None` for a number that this build does not know.
    pub fn kind(&self) -> Option<EventKind> {
        EventKind::from_number(self.kind)
    }

    /// `None` for what is allowed, and for a number that this build does not know.
    pub fn reason(&self) -> Option<DropReason> {
        DropReason::from_number(self.reason)
    }

    pub fn direction(&self) -> Direction {
        if self.direction == Direction::Egress as u8 {
            Direction::Egress
        } else {
            Direction::Ingress
        }
    }
}

/// Denied packets that an administrator would call the same.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DenyKey {
    pub remote: Identity,
    pub local: Identity,
    /// The node at the far end: one identity may stand for many.
    pub peer: u32,
    /// What policy calls the port.
    pub port: Be16,
    pub proto: u8,
    pub direction: u8,
    pub reason: u8,
    pub pad: u8,
    /// Apart from the other: see [`FlowKey::pad2`].
    pub pad2: u16,
}

/// The value of `deny_agg`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DenyEntry {
    pub packets: u64,
    pub bytes: u64,
    /// Nanoseconds of the monotonic clock, as the next.
    pub first: u64,
    pub last: u64,
    /// When an event last told of it, or would have if there had been a token: in [`DenyEntry::tick`]s.
    pub told: u32,
    /// Which rule denied the last of them.
    pub rule: RuleId,
}

/// A count that goes on is told of again after so many [`DenyEntry::tick`]s, five seconds, and whenever
/// it has doubled.
pub const RETELL: u32 = (5_000_000_000_u64 >> 20) as u32;

impl DenyEntry {
    /// A time of nanoseconds in steps of a millisecond, which a word holds for seven weeks.
    #[inline(always)]
    pub const fn tick(now: u64) -> u32 {
        (now >> 20) as u32
    }

    /// Is the count worth an event, now that it has grown to `packets`?
    #[inline(always)]
    pub const fn is_news(&self, packets: u64, now: u64) -> bool {
        // The highest bit is another.
        packets ^ self.packets > self.packets || Self::tick(now).wrapping_sub(self.told) > RETELL
    }
}

const _: () = assert!(size_of::<DenyKey>() == 20);
const _: () = assert!(size_of::<DenyEntry>() == 40);

/// What a dry run says of a packet: it writes this over the packet's first bytes, and nothing else.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Explanation {
    pub rule: RuleId,
    pub remote: Identity,
    pub local: Identity,
    /// The drop reason; 0 if the packet passes.
    pub reason: u8,
    /// [`Explanation::REMEMBERED`] or nothing.
    pub flags: u8,
    pub pad: u16,
}

const _: () = assert!(size_of::<Explanation>() == 16);

impl Explanation {
    /// The packet would be remembered as a flow.
    pub const REMEMBERED: u8 = 1;

    /// From the head of what a dry run gave back.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; size_of::<Self>()] = bytes.first_chunk()?;
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Some(Self {
            rule: RuleId(word(0)),
            remote: Identity(word(4)),
            local: Identity(word(8)),
            reason: bytes[12],
            flags: bytes[13],
            pad: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_news_when_it_doubles_and_when_it_has_been_long() {
        let now = 3_000_000_000;
        let mut entry = DenyEntry {
            told: DenyEntry::tick(now),
            ..DenyEntry::default()
        };
        let mut told = 0;
        while entry.packets < 1_000 {
            let packets = entry.packets + 1 + entry.packets % 3;
            told += u32::from(entry.is_news(packets, now));
            entry.packets = packets;
        }
        assert_eq!(told, 10);
        assert!(!entry.is_news(entry.packets + 1, now + 4_990_000_000));
        assert!(entry.is_news(entry.packets + 1, now + 5_010_000_000));
    }
}
