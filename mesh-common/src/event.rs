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
