//! What the packet path tells the agent through the ring buffer.
//!
//! Records are copied out of memory that the kernel wrote: numbers in them are numbers, and become
//! enums only where somebody has looked ([`DropEvent::reason`]).

use crate::policy::RuleId;
use crate::{Address, Be16, Direction, DropReason, Identity};

/// One dropped packet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DropEvent {
    /// Nanoseconds of the monotonic clock.
    pub time: u64,
    pub remote: Address,
    pub local: Address,
    pub remote_port: Be16,
    pub local_port: Be16,
    pub proto: u8,
    pub direction: u8,
    pub reason: u8,
    pub tcp: u8,
    pub remote_identity: Identity,
    pub local_identity: Identity,
    pub rule: RuleId,
    /// Bytes of the packet, from its IP header.
    pub length: u32,
}

const _: () = assert!(size_of::<DropEvent>() == 64);

impl DropEvent {
    /// From a record of the ring buffer; `None` if it is of another size.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 64] = bytes.try_into().ok()?;
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let address =
            |at| Address::from_words([word(at), word(at + 4), word(at + 8), word(at + 12)]);
        let port = |at: usize| Be16::new(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
        let (low, high) = if cfg!(target_endian = "little") {
            (0, 4)
        } else {
            (4, 0)
        };
        Some(Self {
            time: u64::from(word(high)) << 32 | u64::from(word(low)),
            remote: address(8),
            local: address(24),
            remote_port: port(40),
            local_port: port(42),
            proto: bytes[44],
            direction: bytes[45],
            reason: bytes[46],
            tcp: bytes[47],
            remote_identity: Identity(word(48)),
            local_identity: Identity(word(52)),
            rule: RuleId(word(56)),
            length: word(60),
        })
    }

    /// `None` for a number that this build does not know.
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
