//! Identities: small numbers for "all addresses that policy cannot tell apart".
//!
//! A number says nothing by itself. It has meaning only beside the policy entries of the same
//! netmap, which is why 0 (what an empty map gives) must mean "known to nobody".

/// One identity, as the policy maps spell it.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Identity(pub u32);

impl Identity {
    /// No entry names this address: dropped, and never matched against [`Identity::ANY`].
    pub const UNKNOWN: Self = Self(0);
    /// In a policy entry's remote field: whoever is known.
    pub const ANY: Self = Self(1);
    /// First number that a policy compiler may hand out; those below are reserved.
    pub const FIRST: Self = Self(16);
}
