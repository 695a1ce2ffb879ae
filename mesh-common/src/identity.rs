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

/// Who stands behind an address or a prefix: the value of `id_exact` and `id_cidr`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct IdentityEntry {
    pub identity: Identity,
    /// [`IdentityEntry::LOCAL`] or nothing.
    pub flags: u32,
    /// The node that sends from the address, 0 for this node itself.
    pub peer: u32,
}

impl IdentityEntry {
    /// What every address has that no entry names.
    pub const UNKNOWN: Self = Self {
        identity: Identity::UNKNOWN,
        flags: 0,
        peer: 0,
    };
    /// The address is this node's own: a packet from the mesh never has it as its source.
    pub const LOCAL: u32 = 1;

    #[inline(always)]
    pub const fn is_known(&self) -> bool {
        self.identity.0 != Identity::UNKNOWN.0
    }

    #[inline(always)]
    pub const fn is_local(&self) -> bool {
        self.flags & Self::LOCAL != 0
    }
}

const _: () = assert!(size_of::<IdentityEntry>() == 12);
