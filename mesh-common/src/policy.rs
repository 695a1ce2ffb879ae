//! Policy entries as the kernel sees them: who, in which direction, over what, says which rule.
//!
//! A port range becomes up to thirty prefixes, and of those around a flow the longest speaks
//! ([`longest`]); the kernel finds them in [`Bucket`]s, which the agent fills as a [`Table`].

mod bucket;
mod row;
mod table;

pub use bucket::{Bucket, find, near};
pub use row::{Row, RowKey, longest};
pub use table::{NoRoom, Table};

use crate::{Be16, Be32, Identity};

/// Which way a packet goes, or a flow was opened, seen from the node that judges it.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Direction {
    /// A peer opens towards this node.
    Ingress = 0,
    /// This node opens towards a peer.
    Egress = 1,
}

impl Direction {
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    #[inline(always)]
    pub const fn reverse(self) -> Self {
        match self {
            Self::Ingress => Self::Egress,
            Self::Egress => Self::Ingress,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// Names one rule of the policy text, stable while that rule's own text stays the same.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct RuleId(pub u32);

impl RuleId {
    /// No rule decided: the default denied.
    pub const NONE: Self = Self(0);
}

/// What a new flow asks of the policy.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PolicyKey {
    pub remote: Be32,
    pub local: Be32,
    /// [`Direction`] as a number.
    pub direction: u8,
    /// IP protocol number.
    pub proto: u8,
    /// Destination port; for ICMP the message type; 0 where the protocol has neither.
    pub port: Be16,
}

impl PolicyKey {
    #[inline(always)]
    pub const fn new(
        remote: Identity,
        local: Identity,
        direction: Direction,
        proto: u8,
        port: u16,
    ) -> Self {
        Self {
            remote: Be32::new(remote.0),
            local: Be32::new(local.0),
            direction: direction as u8,
            proto,
            port: Be16::new(port),
        }
    }

    /// The same asked about everybody.
    #[inline(always)]
    pub const fn of_anybody(self) -> Self {
        Self {
            remote: Be32::new(Identity::ANY.0),
            ..self
        }
    }
}

/// A [`PolicyKey`] of which the first `len` bits count.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PolicyPrefix {
    pub len: u32,
    pub key: PolicyKey,
}

impl PolicyPrefix {
    /// Remote, local and direction: every protocol.
    pub const ANY_PROTO: u32 = 72;
    /// The protocol too: every port.
    pub const ANY_PORT: u32 = 80;
    /// All of the key.
    pub const EXACT: u32 = 96;
}

/// What a row of the policy says, and which rule says it, or that there is none.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PolicyEntry {
    /// [`PolicyEntry::ACCEPT`], [`PolicyEntry::DENY`], or nothing where no row speaks.
    pub flags: u32,
    pub rule: RuleId,
}

impl PolicyEntry {
    pub const ACCEPT: u32 = 1 << 30;
    pub const DENY: u32 = 1 << 31;

    /// What a look-up answers that finds no row. Not an `Option`: of an absent one a compiler copies
    /// what it never wrote, and a verifier does not let it.
    pub const NONE: Self = Self {
        flags: 0,
        rule: RuleId::NONE,
    };

    pub const fn accept(rule: RuleId) -> Self {
        Self {
            flags: Self::ACCEPT,
            rule,
        }
    }

    pub const fn deny(rule: RuleId) -> Self {
        Self {
            flags: Self::DENY,
            rule,
        }
    }

    #[inline(always)]
    pub const fn is_accept(&self) -> bool {
        self.flags & Self::ACCEPT != 0
    }

    #[inline(always)]
    pub const fn is_deny(&self) -> bool {
        self.flags & Self::DENY != 0
    }
}

const _: () = assert!(size_of::<PolicyKey>() == 12);
const _: () = assert!(size_of::<PolicyPrefix>() == 16);
const _: () = assert!(size_of::<PolicyEntry>() == 8);
