//! Policy entries as the kernel sees them: who, in which direction, over what, says which rule.
//!
//! A port range becomes up to thirty prefixes, and of the rows around a flow the longest speaks. The
//! kernel keeps them in a hash: a trie of 100,000 rows costs a cache miss for each of its seventeen
//! levels. So that only lengths are tried that there are, the row that speaks for every protocol names
//! those of all rows about the same ends ([`Row::lengths`]), and is there even if it says nothing.

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
    /// [`PolicyEntry::DENY`], or nothing for an accept.
    pub flags: u32,
    pub rule: RuleId,
}

impl PolicyEntry {
    pub const DENY: u32 = 1;
    const NO_ROW: u32 = 2;

    /// What a look-up answers that finds no row. Not an `Option`: of an absent one a compiler copies
    /// what it never wrote, and a verifier does not let it.
    pub const NONE: Self = Self {
        flags: Self::NO_ROW,
        rule: RuleId::NONE,
    };

    pub const fn accept(rule: RuleId) -> Self {
        Self { flags: 0, rule }
    }

    pub const fn deny(rule: RuleId) -> Self {
        Self {
            flags: Self::DENY,
            rule,
        }
    }

    #[inline(always)]
    pub const fn is_accept(&self) -> bool {
        self.flags == 0
    }

    #[inline(always)]
    pub const fn is_deny(&self) -> bool {
        self.flags & Self::DENY != 0
    }
}

/// Where the kernel keeps a [`PolicyPrefix`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RowKey {
    pub remote: Be32,
    pub local: Be32,
    /// Bit 25 is the direction; eight bits are the protocol; seventeen are the ports, as their prefix
    /// followed by a one and zeros. Without the one: every protocol.
    pub about: u32,
}

impl RowKey {
    const PROTO: u32 = 17;
    const DIRECTION: u32 = 25;

    /// The row that speaks for every protocol.
    #[inline(always)]
    pub const fn every_proto(key: &PolicyKey) -> Self {
        Self {
            remote: key.remote,
            local: key.local,
            about: (key.direction as u32) << Self::DIRECTION,
        }
    }

    /// The row that speaks for the ports of `exact` and those around it, `alike` of them: a power of two.
    /// `exact` is [`RowKey::about`] of the one port, without the one.
    #[inline(always)]
    const fn ports(exact: u32, alike: u32) -> u32 {
        exact & !(2 * alike - 1) | alike
    }

    #[inline(always)]
    const fn exact(key: &PolicyKey) -> u32 {
        (key.direction as u32) << Self::DIRECTION
            | (key.proto as u32) << Self::PROTO
            | (key.port.get() as u32) << 1
    }

    /// `None` for a prefix that ends within a field, which no policy has.
    pub const fn of(prefix: &PolicyPrefix) -> Option<Self> {
        match prefix.len {
            PolicyPrefix::ANY_PROTO => Some(Self::every_proto(&prefix.key)),
            PolicyPrefix::ANY_PORT..=PolicyPrefix::EXACT => {
                let alike = Row::length(prefix.len);
                Some(Self {
                    about: Self::ports(Self::exact(&prefix.key), alike),
                    ..Self::every_proto(&prefix.key)
                })
            }
            _ => None,
        }
    }
}

/// What the kernel keeps under a [`RowKey`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Row {
    pub entry: PolicyEntry,
    /// Where it speaks for every protocol: a bit for each length of the other rows about the same ends
    /// and direction, bit 0 for [`PolicyPrefix::EXACT`], bit 16 for [`PolicyPrefix::ANY_PORT`]. 0 in
    /// all others.
    pub lengths: u32,
}

impl Row {
    /// The bit of rows so long, which is also how many ports they speak for.
    pub const fn length(len: u32) -> u32 {
        1 << (PolicyPrefix::EXACT - len)
    }
}

/// What the longest row around `key` says, or [`PolicyEntry::NONE`].
#[inline(always)]
pub fn longest<'a>(key: &PolicyKey, row: impl Fn(&RowKey) -> Option<&'a Row>) -> PolicyEntry {
    let exact = RowKey::exact(key);
    let mut at = RowKey::every_proto(key);
    let every_proto = at.about;
    let one = Row::length(PolicyPrefix::EXACT);
    // Of policies with many rows most speak for one port, and so for one remote: then this is all.
    if key.remote.get() != Identity::ANY.0 {
        at.about = RowKey::ports(exact, one);
        if let Some(found) = row(&at) {
            return found.entry;
        }
        at.about = every_proto;
    }
    let Some(every_proto) = row(&at) else {
        return PolicyEntry::NONE;
    };
    let mut lengths = every_proto.lengths;
    if key.remote.get() != Identity::ANY.0 {
        lengths &= !one;
    }
    // Of which there are seventeen, as a verifier must be told.
    let mut left = 17;
    while lengths != 0 && left != 0 {
        let longest = lengths & lengths.wrapping_neg();
        at.about = RowKey::ports(exact, longest);
        if let Some(found) = row(&at) {
            return found.entry;
        }
        lengths ^= longest;
        left -= 1;
    }
    every_proto.entry
}

const _: () = assert!(size_of::<PolicyKey>() == 12);
const _: () = assert!(size_of::<RowKey>() == 12);
const _: () = assert!(size_of::<Row>() == 12);
const _: () = assert!(size_of::<PolicyPrefix>() == 16);
const _: () = assert!(size_of::<PolicyEntry>() == 8);
