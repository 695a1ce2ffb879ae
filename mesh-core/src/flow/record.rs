//! What the flow log says, in the kernel's numbers: [`describe`](super::describe) gives them names.

use mesh_common::flow::FlowKey;
use mesh_common::{Direction, DropReason};

use crate::{Identity, RuleId};

/// What a record says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// A packet opened a flow.
    Opened,
    /// The other end answered.
    Confirmed,
    /// The flow has carried something since it was last told of.
    Active,
    /// Its ends closed it.
    Closed,
    /// It ended in silence.
    Idle,
    /// The policy that stands now denies it.
    Revoked,
    /// Packets that were dropped, so many so far.
    Denied,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Confirmed => "confirmed",
            Self::Active => "active",
            Self::Closed => "closed",
            Self::Idle => "idle",
            Self::Revoked => "revoked",
            Self::Denied => "denied",
        }
    }

    /// Whether the policy lets such packets pass.
    pub const fn is_allowed(self) -> bool {
        !matches!(self, Self::Revoked | Self::Denied)
    }
}

/// One line of the flow log, in the kernel's numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    pub kind: Kind,
    /// Nanoseconds of the packet path's clock, as the next.
    pub time: u64,
    /// When the flow was opened, or the first of the denied packets came.
    pub first: u64,
    /// Of a denial that was only counted, the ports and addresses are zero; of many that are told as one, the
    /// protocol is too.
    pub key: FlowKey,
    /// What policy calls the port: the service's, or the type of ICMP.
    pub port: u16,
    /// Which way the flow was opened, or the denied packets went.
    pub direction: Direction,
    pub remote: Identity,
    pub local: Identity,
    pub rule: RuleId,
    /// The node at the far end; 0 for nobody known.
    pub peer: u32,
    /// Why packets are dropped; `None` for what is allowed, and for a reason that this build does not
    /// know.
    pub reason: Option<DropReason>,
    /// By [`Direction`], since `first`.
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
}
