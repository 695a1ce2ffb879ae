//! Policy entries as the kernel sees them: who, in which direction, over what, says which rule.
//!
//! The key is read by a longest-prefix match, so its fields stand from the least to the most
//! specific question and a port range becomes up to thirty prefixes.

/// Which way a flow was opened, seen from the node that judges it.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Direction {
    /// A peer opens towards this node.
    Ingress = 0,
    /// This node opens towards a peer.
    Egress = 1,
}

/// Names one rule of the policy text, stable while that rule's own text stays the same.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct RuleId(pub u32);

impl RuleId {
    /// No rule decided: the default denied.
    pub const NONE: Self = Self(0);
}
