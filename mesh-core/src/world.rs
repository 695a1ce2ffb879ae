//! The coordinator's whole truth at one generation.
//!
//! A world is never changed in place: the single writer clones it (nodes are behind [`Arc`]s, so
//! this is cheap), alters the clone and publishes it with the next generation. Whoever holds an
//! older world holds a consistent one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::node::{Epoch, Generation, MeshId, Name, Node, NodeId, User, UserId};

/// What never changes while a mesh lives, and every node must know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mesh {
    pub id: MeshId,
    /// MagicDNS suffix of every node's name, without dots at its ends: `mesh.internal`.
    pub domain: String,
    pub pools: Pools,
}

/// The address ranges that belong to the mesh. Only these are ever routed into it by default.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pools {
    pub v4: Ipv4Net,
    /// A ULA /48 (RFC 4193).
    pub v6: Ipv6Net,
}

impl Pools {
    /// The shared address space of RFC 6598, as the field's other meshes use it.
    pub fn default_v4() -> Ipv4Net {
        Ipv4Net::new_assert([100, 64, 0, 0].into(), 10)
    }

    /// Part of the default pool that no node gets: reserved for services (100.115.92.0/23).
    pub fn reserved_v4() -> Ipv4Net {
        Ipv4Net::new_assert([100, 115, 92, 0].into(), 23)
    }

    /// `fd00::/8` with 40 bits of the caller's randomness (RFC 4193, section 3.2.2).
    pub fn ula(random: [u8; 5]) -> Ipv6Net {
        let [a, b, c, d, e] = random;
        let network = Ipv6Addr::from([0xfd, a, b, c, d, e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        Ipv6Net::new_assert(network, 48)
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.contains(&address),
            IpAddr::V6(address) => self.v6.contains(&address),
        }
    }

    pub fn each(&self) -> [IpNet; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

#[derive(Clone, Debug)]
pub struct World {
    pub mesh: Arc<Mesh>,
    pub epoch: Epoch,
    pub generation: Generation,
    pub users: BTreeMap<UserId, Arc<User>>,
    pub nodes: BTreeMap<NodeId, Arc<Node>>,
}

impl World {
    pub fn names(&self) -> BTreeSet<Name> {
        self.nodes.values().map(|node| node.name.clone()).collect()
    }
}
