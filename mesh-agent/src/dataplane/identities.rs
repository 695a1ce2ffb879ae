//! Who is behind an address or a network, written while packets ask.
//!
//! An entry tells both sides, and the generation chooses. So an entry may be written at any time, but not
//! replaced: the kernel gives a replaced element of a hash to the next entry at once, and a program that stands
//! still between looking it up and reading it would take somebody's packet for another's.

use std::collections::BTreeMap;
use std::io;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData, MapError};
use aya::programs::SchedClassifier;
use mesh_common::addr::Prefix;
use mesh_common::identity::{Identified, IdentityEntry};
use mesh_common::{Address, Sides, maps};

use super::dry;
use super::entries::{ONLY_NEW, ignore_missing, is_there, take};
use super::error::{ApplyError, AttachError};

/// The program that writes an entry of `id_exact` where it lies.
pub(super) const IDENTIFY: &str = "identify";

/// Nodes by their addresses, and what lies behind subnet routers.
pub(super) struct Identities {
    exact: HashMap<MapData, Address, Sides>,
    cidr: LpmTrie<MapData, Address, Sides>,
}

impl Identities {
    pub(super) fn open(ebpf: &mut Ebpf) -> Result<Self, AttachError> {
        Ok(Self {
            exact: take(ebpf, maps::ID_EXACT)?,
            cidr: take(ebpf, maps::ID_CIDR)?,
        })
    }

    /// What holds in a generation.
    pub(super) fn read(
        &self,
        generation: u32,
    ) -> Result<BTreeMap<Prefix, IdentityEntry>, MapError> {
        let mut identities = BTreeMap::new();
        for entry in &self.exact {
            let (address, sides) = entry?;
            identities.insert(Prefix { len: 128, address }, *sides.at(generation));
        }
        for entry in &self.cidr {
            let (key, sides) = entry?;
            let (len, address) = (key.prefix_len(), key.data());
            identities.insert(Prefix { len, address }, *sides.at(generation));
        }
        Ok(identities)
    }

    /// `identify` is the program [`IDENTIFY`]. A trie's entry is replaced, and kept until nobody reads it
    /// (`kfree_rcu`).
    pub(super) fn write(
        &mut self,
        prefix: &Prefix,
        sides: Sides,
        identify: &SchedClassifier,
    ) -> Result<(), ApplyError> {
        let address = prefix.address;
        let written = if prefix.len == 128 {
            match self.exact.insert(address, sides, ONLY_NEW) {
                Err(error) if is_there(&error) => {
                    // As long as newer kernels want a packet to be.
                    let mut packet = [0; 64];
                    let told = Identified { address, sides }.bytes();
                    packet[..told.len()].copy_from_slice(&told);
                    let run = dry::run(identify, &packet, &mut [0; 64]);
                    run.map_err(|error| MapError::IoError(io::Error::other(error)))
                }
                result => result,
            }
        } else {
            self.cidr.insert(&Key::new(prefix.len, address), sides, 0)
        };
        written.map_err(ApplyError::at("write who stands behind a prefix"))
    }

    /// No other entry may be made until no program holds this one: [`crate::sys::maps::wait_for_programs`].
    pub(super) fn forget(&mut self, prefix: &Prefix) -> Result<(), ApplyError> {
        let removed = if prefix.len == 128 {
            self.exact.remove(&prefix.address)
        } else {
            self.cidr.remove(&Key::new(prefix.len, prefix.address))
        };
        ignore_missing(removed).map_err(ApplyError::at("forget who stood behind a prefix"))
    }
}
