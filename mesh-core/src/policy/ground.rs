//! What the world's addresses say before any rule does: which are the mesh's own, who routes which.
//!
//! `*` as a source takes in every approved subnet, so it is the one selector whose meaning moves
//! with the nodes. It moves only when a subnet appears or disappears, not with who routes it.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::atoms::within;
use super::ipset::IpSet;
use crate::node::{Node, NodeId};
use crate::world::Pools;

#[derive(Clone, Debug)]
pub(super) struct Ground {
    pub(super) pools: Pools,
    /// The routers of each approved subnet, in the order of their enrolment.
    pub(super) routers: BTreeMap<IpNet, BTreeSet<NodeId>>,
    pub(super) exits: BTreeSet<NodeId>,
    /// What exit nodes are asked for.
    pub(super) internet: IpSet,
    /// `*` as a source, and the prefixes that it is made of.
    mesh: IpSet,
    cuts: BTreeSet<IpNet>,
}

impl Ground {
    pub(super) fn new(pools: Pools) -> Self {
        let mut ground = Self {
            pools,
            routers: BTreeMap::new(),
            exits: BTreeSet::new(),
            internet: internet(&pools),
            mesh: IpSet::default(),
            cuts: BTreeSet::new(),
        };
        ground.survey();
        ground
    }

    /// A prefix lies within `*` as a source.
    pub(super) fn holds(&self, net: IpNet) -> bool {
        self.mesh.contains_net(net)
    }

    /// The prefixes within `net` that `*` is made of.
    pub(super) fn cuts(&self, net: IpNet) -> impl Iterator<Item = IpNet> {
        self.cuts.range(within(net)).copied()
    }

    /// All prefixes that `*` is made of.
    pub(super) fn all_cuts(&self) -> &BTreeSet<IpNet> {
        &self.cuts
    }

    /// Takes nodes out, puts nodes in, and says which prefixes `*` has gained or lost by it.
    pub(super) fn change<'a>(
        &mut self,
        gone: impl Iterator<Item = &'a Node>,
        come: impl Iterator<Item = &'a Node>,
    ) -> Vec<IpNet> {
        let before = self.routers.len();
        let mut moved = false;
        for node in gone.filter(|node| !node.expired) {
            self.exits.remove(&node.id);
            for route in node.serving_routes().map(IpNet::trunc) {
                if let Some(routers) = self.routers.get_mut(&route) {
                    routers.remove(&node.id);
                    moved |= routers.is_empty();
                }
            }
        }
        for node in come.filter(|node| !node.expired) {
            if node.is_exit_node() {
                self.exits.insert(node.id);
            }
            for route in node.serving_routes().map(IpNet::trunc) {
                self.routers.entry(route).or_default().insert(node.id);
            }
        }
        self.routers.retain(|_, routers| !routers.is_empty());
        if !moved && self.routers.len() == before {
            return Vec::new();
        }
        let old = std::mem::take(&mut self.cuts);
        self.survey();
        old.symmetric_difference(&self.cuts).copied().collect()
    }

    fn survey(&mut self) {
        self.mesh = self.pools.each().into_iter().collect();
        self.mesh.remove(Pools::reserved_v4().into());
        self.mesh
            .alter(self.routers.keys().copied().collect(), true);
        self.cuts = self.mesh.prefixes().into_iter().collect();
    }
}

/// What an exit node is asked for: everything but private and mesh addresses.
pub(super) fn internet(pools: &Pools) -> IpSet {
    let mut internet: IpSet = nets(&["0.0.0.0/0", "2000::/3"]).collect();
    internet.alter(nets(&PRIVATE).collect(), false);
    internet.alter(pools.each().into(), false);
    internet
}

/// RFC 1918, RFC 6598 and RFC 3927: never reached through an exit node.
const PRIVATE: [&str; 5] = [
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "169.254.0.0/16",
];

pub(super) fn nets(texts: &'static [&str]) -> impl Iterator<Item = IpNet> {
    texts.iter().filter_map(|text| text.parse().ok())
}
