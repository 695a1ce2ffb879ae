//! Who sees whom, and which routes through whom.
//!
//! Two nodes see each other where a rule joins any place of one with any place of the other, in
//! either direction; a place is an own address, an approved route or, for an exit node, the
//! internet. Two nodes that no rule joins do not learn that the other exists.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::classes::{ClassId, Placed};
use super::compile::CompiledPolicy;
use crate::node::NodeId;

impl CompiledPolicy {
    /// Everybody whom this node sees, itself left out.
    pub fn peers(&self, id: NodeId) -> BTreeSet<NodeId> {
        let Some(me) = self.nodes.get(&id) else {
            return BTreeSet::new();
        };
        let mine = &self.kinds[me.kind];
        let visible = self.kinds.iter().filter(|theirs| mine.sees(theirs));
        let mut peers: BTreeSet<NodeId> = visible
            .flat_map(|theirs| theirs.nodes.iter().copied())
            .collect();
        peers.remove(&id);
        peers
    }

    /// Whether two nodes know each other.
    pub fn sees(&self, one: NodeId, other: NodeId) -> bool {
        let (Some(a), Some(b)) = (self.nodes.get(&one), self.nodes.get(&other)) else {
            return false;
        };
        one != other && self.kinds[a.kind].sees(&self.kinds[b.kind])
    }

    /// Which of the router's prefixes, exit routes included, the viewer is given.
    pub fn routes(&self, viewer: NodeId, router: NodeId) -> BTreeSet<IpNet> {
        let mut given = BTreeSet::new();
        if !self.sees(viewer, router) {
            return given;
        }
        let (Some(me), Some(them)) = (self.nodes.get(&viewer), self.nodes.get(&router)) else {
            return given;
        };
        given.extend(&them.exits);
        let subnets = them.routes.keys().copied();
        given.extend(subnets.filter(|route| self.elected(viewer, me, *route) == Some(router)));
        given
    }

    /// Everything that the reference lets the viewer send to through a peer, and hear from: its
    /// addresses and [`Self::routes`], where a node told to `disable-ipv4` shares no IPv4 address
    /// with anybody. A netmap holds both addresses of every node, whatever its attributes.
    pub fn allowed_ips(&self, viewer: NodeId, peer: NodeId) -> BTreeSet<IpNet> {
        let mut allowed = self.routes(viewer, peer);
        let Some(placed) = self.nodes.get(&peer).filter(|_| self.sees(viewer, peer)) else {
            return allowed;
        };
        let without_v4 = [viewer, peer]
            .iter()
            .any(|node| self.attributes(*node).contains("disable-ipv4"));
        let own = placed.addresses.iter().map(|(address, _)| *address);
        allowed.extend(own.filter(|address| !without_v4 || address.addr().is_ipv6()));
        allowed
    }

    /// The router that the viewer is given for a prefix, if any.
    ///
    /// As a rule it is the one enrolled first. Where only `via` grants lead the viewer there, it is
    /// the first of the routers that they name. Who serves the prefix too sees the first in any
    /// case: that is how a standby knows its primary.
    fn elected(&self, viewer: NodeId, me: &Placed, route: IpNet) -> Option<NodeId> {
        let routers = self.ground.routers.get(&route)?;
        let pieces = |router: &NodeId| Some((*router, self.nodes.get(router)?.routes.get(&route)?));
        let (primary, first) = pieces(routers.first()?)?;
        let mut plain = me.routes.contains_key(&route);
        let mut steered = None;
        for (id, pieces) in routers.iter().filter_map(pieces) {
            match self.way(me, pieces) {
                Some(Way::Plain) => plain = true,
                Some(Way::Via) if id != viewer => steered = steered.or(Some(id)),
                Some(Way::Via) | None => {}
            }
        }
        match steered {
            Some(steered) if !plain => Some(steered),
            _ => (plain || self.way_back(me, first)).then_some(primary),
        }
    }

    /// Who stands behind which address, as a node is told it: longest prefix wins.
    pub(super) fn table(&self, viewer: NodeId) -> BTreeMap<IpNet, ClassId> {
        let Some(me) = self.nodes.get(&viewer) else {
            return BTreeMap::new();
        };
        let mine = &self.kinds[me.kind];
        let visible = self.kinds.iter().filter(|theirs| mine.sees(theirs));
        let own = visible.flat_map(|theirs| &theirs.addresses);
        // Made in one go: a map that grows one by one costs several times as much.
        let mut table: BTreeMap<IpNet, ClassId> = own.chain(&me.addresses).copied().collect();
        for (net, class) in self.behind(viewer) {
            table.entry(net).or_insert(class);
        }
        table
    }

    /// The part of [`Self::table`] that is not nodes' own addresses.
    ///
    /// Where two routers' prefixes overlap, the longer route takes its packets, so its pieces say
    /// what they are; of a prefix that this node routes too, it knows best itself.
    fn behind(&self, viewer: NodeId) -> BTreeMap<IpNet, ClassId> {
        let Some(me) = self.nodes.get(&viewer) else {
            return BTreeMap::new();
        };
        let mut table: BTreeMap<IpNet, ClassId> = BTreeMap::new();
        let mine = &self.kinds[me.kind].classes;
        for (net, class) in self.world {
            let world = &self.classes[class];
            let mut local = mine.iter().map(|local| &self.classes[*local]);
            if local.any(|local| self.rules.opens(world, local)) {
                table.insert(net, class);
                // Whom this node is not told of is nobody to it, and not the world either: it may
                // well be that rules forbid him what they allow the world.
                let pools = self.ground.pools.each().into_iter();
                table.extend(pools.map(|pool| (pool, self.nobody)));
            }
        }
        let exits = self
            .ground
            .exits
            .iter()
            .filter(|exit| self.sees(viewer, **exit));
        for exit in exits.chain([&viewer]) {
            let internet = self.nodes.get(exit).map(|placed| &placed.internet);
            table.extend(internet.into_iter().flatten().copied());
        }
        let mut routes: Vec<(u8, &[(IpNet, ClassId)])> = Vec::new();
        for route in self.ground.routers.keys() {
            let router = match me.routes.contains_key(route) {
                true => Some(viewer),
                false => self.elected(viewer, me, *route),
            };
            let visible = router.filter(|router| *router == viewer || self.sees(viewer, *router));
            if let Some(pieces) = visible.and_then(|id| self.nodes.get(&id)?.routes.get(route)) {
                routes.push((route.prefix_len(), pieces));
            }
        }
        routes.sort_by_key(|(length, _)| *length);
        for (_, pieces) in routes {
            table.extend(pieces.iter().copied());
        }
        table
    }

    /// The class of an address as a node knows it.
    pub(super) fn known(&self, viewer: NodeId, address: IpAddr) -> Option<ClassId> {
        let owner = self.owner(address);
        let visible = owner.filter(|owner| *owner == viewer || self.sees(viewer, *owner));
        if let Some(owner) = visible.and_then(|owner| self.nodes.get(&owner)) {
            let mut own = owner.addresses.iter();
            let own = own.find(|(net, _)| net.contains(&address));
            return own.map(|(_, class)| *class);
        }
        self.behind(viewer)
            .into_iter()
            .filter(|(net, _)| net.contains(&address))
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, class)| class)
    }

    /// How, if at all, rules lead from the node to the pieces of a route.
    fn way(&self, me: &Placed, pieces: &[(IpNet, ClassId)]) -> Option<Way> {
        let mut way = None;
        for src in &self.kinds[me.kind].classes {
            for (_, dst) in pieces {
                let (src, dst) = (&self.classes[*src], &self.classes[*dst]);
                if !self.rules.opens(src, dst) {
                    continue;
                }
                let mut rules = self.rules.between(src, dst);
                if rules.any(|(_, rule, _)| rule.via.is_empty()) {
                    return Some(Way::Plain);
                }
                way = Some(Way::Via);
            }
        }
        way
    }

    /// Whether rules lead from the pieces of a route to the node: replies must find back.
    fn way_back(&self, me: &Placed, pieces: &[(IpNet, ClassId)]) -> bool {
        let mine = &self.kinds[me.kind].classes;
        pieces.iter().any(|(_, src)| {
            let mut local = mine.iter().map(|local| &self.classes[*local]);
            local.any(|local| self.rules.opens(&self.classes[*src], local))
        })
    }
}

/// By what kind of rule a node reaches a route.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Plain,
    /// By nothing but grants that name the routers to take.
    Via,
}
