//! Rows: prefixes of ports as keys of a hash.
//!
//! A trie of 100,000 rows costs a cache miss for each of its seventeen levels, a hash one for each length
//! that is tried. So that only lengths are tried that there are, the row that speaks for every protocol
//! names those of all rows about the same ends ([`Row::lengths`]), and is there even if it says nothing.

use super::{PolicyEntry, PolicyKey, PolicyPrefix, RuleId};
use crate::Identity;

/// Where the kernel keeps a [`PolicyPrefix`]. In two words, as a program holds few at once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RowKey {
    /// The remote identity above the local one.
    pub ends: u64,
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
            ends: (key.remote.get() as u64) << 32 | key.local.get() as u64,
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
    /// [`PolicyEntry::flags`], and [`Row::lengths`] below them.
    says: u32,
    rule: RuleId,
}

impl Row {
    /// All zero, as the kernel makes a map: what no row is, and what a look-up answers that finds none.
    pub const NOTHING: Self = Self::new(PolicyEntry::NONE, 0);
    /// The bits of all lengths.
    const LENGTHS: u32 = !(PolicyEntry::ACCEPT | PolicyEntry::DENY);

    pub const fn new(entry: PolicyEntry, lengths: u32) -> Self {
        Self {
            says: entry.flags | lengths & Self::LENGTHS,
            rule: entry.rule,
        }
    }

    /// As one number, and back.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        (self.says as u64) << 32 | self.rule.0 as u64
    }

    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self {
            says: (bits >> 32) as u32,
            rule: RuleId(bits as u32),
        }
    }

    /// Every row that is kept does, if only of the lengths of others.
    #[inline(always)]
    pub const fn speaks(&self) -> bool {
        self.says != 0
    }

    #[inline(always)]
    pub const fn entry(&self) -> PolicyEntry {
        PolicyEntry {
            flags: self.says & !Self::LENGTHS,
            rule: self.rule,
        }
    }

    /// Where it speaks for every protocol: a bit for each length of the other rows about the same ends
    /// and direction, bit 0 for [`PolicyPrefix::EXACT`], bit 16 for [`PolicyPrefix::ANY_PORT`]. 0 in
    /// all others.
    #[inline(always)]
    pub const fn lengths(&self) -> u32 {
        self.says & Self::LENGTHS
    }

    /// The bit of rows so long, which is also how many ports they speak for.
    pub const fn length(len: u32) -> u32 {
        1 << (PolicyPrefix::EXACT - len)
    }
}

/// What the longest row around `key` says, or [`PolicyEntry::NONE`]. `row` looks for those of one port and of every
/// protocol, `other` for those of the lengths that there are besides.
#[inline(always)]
pub fn longest(
    key: &PolicyKey,
    row: impl Fn(&RowKey) -> Row,
    other: impl Fn(&RowKey) -> Row,
) -> PolicyEntry {
    let exact = RowKey::exact(key);
    let mut at = RowKey::every_proto(key);
    let every_proto = at.about;
    let one = Row::length(PolicyPrefix::EXACT);
    // Of policies with many rows most speak for one port, and so for one remote: then this is all.
    if key.remote.get() != Identity::ANY.0 {
        at.about = RowKey::ports(exact, one);
        let found = row(&at);
        if found.speaks() {
            return found.entry();
        }
        at.about = every_proto;
    }
    let every_proto = row(&at);
    let mut lengths = every_proto.lengths();
    if key.remote.get() != Identity::ANY.0 {
        lengths &= !one;
    }
    // Of which there are seventeen, as a verifier must be told.
    let mut left = 17;
    while lengths != 0 && left != 0 {
        let longest = lengths & lengths.wrapping_neg();
        at.about = RowKey::ports(exact, longest);
        let found = other(&at);
        if found.speaks() {
            return found.entry();
        }
        lengths ^= longest;
        left -= 1;
    }
    every_proto.entry()
}

const _: () = assert!(size_of::<Row>() == 8);
