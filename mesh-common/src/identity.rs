//! Identities: small numbers for "all addresses that policy cannot tell apart".
//!
//! A number says nothing by itself. It has meaning only beside the policy entries of the same
//! netmap, which is why 0 (what an empty map gives) must mean "known to nobody".

use crate::Address;

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

/// Who stands behind an address or a prefix.
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

/// Of everything that a change of policy changes: the one in use, and the other.
pub const SIDES: u32 = 2;

/// The side that is in use at a generation.
#[inline(always)]
pub const fn side(generation: u32) -> u32 {
    generation % SIDES
}

/// What two policies after each other say of an address or a prefix: the value of `id_exact` and `id_cidr`.
///
/// A number means something only beside the policy that it was compiled with, and both are chosen by the
/// generation. The side that is not in use is written for the generation to come.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sides([IdentityEntry; SIDES as usize]);

impl Sides {
    pub const fn both(entry: IdentityEntry) -> Self {
        Self([entry; 2])
    }

    /// `after` from `generation` on, and until then `before`.
    pub const fn turn(generation: u32, before: IdentityEntry, after: IdentityEntry) -> Self {
        match side(generation) {
            0 => Self([after, before]),
            _ => Self([before, after]),
        }
    }

    #[inline(always)]
    pub const fn at(&self, generation: u32) -> &IdentityEntry {
        &self.0[side(generation) as usize]
    }
}

const _: () = assert!(size_of::<Sides>() == 24);

/// What the program `identify` is told: an address that has an entry, and what that is to become.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identified {
    pub address: Address,
    pub sides: Sides,
}

impl Identified {
    /// As it lies in memory.
    pub fn bytes(&self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        let (address, rest) = bytes.split_at_mut(size_of::<Address>());
        address.copy_from_slice(&self.address.octets());
        let entries = self.sides.0.iter();
        let words = entries.flat_map(|entry| [entry.identity.0, entry.flags, entry.peer]);
        for (place, word) in rest.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

const _: () = assert!(size_of::<Identified>() == 40);

/// The generation after `generation`: of the other side, and never 0, which means that no policy was loaded.
pub const fn next_generation(generation: u32) -> u32 {
    match generation.wrapping_add(1) {
        0 => 2,
        next => next,
    }
}
