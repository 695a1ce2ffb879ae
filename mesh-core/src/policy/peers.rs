//! Who sees whom, and which routes through whom.
//!
//! Two nodes see each other where a rule joins any place of one with any place of the other, in
//! either direction; a place is an own address, an approved route or, for an exit node, the
//! internet. Two nodes that no rule joins do not learn that the other exists.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::compile::{ClassId, CompiledPolicy, Placed};
use crate::netmap::Action;
use crate::node::NodeId;

impl CompiledPolicy {
    /// Everybody whom this node sees, itself left out.
    pub fn peers(&self, id: NodeId) -> BTreeSet<NodeId> {
        let Some(me) = self.nodes.get(&id) else {
            return BTreeSet::new();
        };
        let mine = &self.kinds[me.kind].classes;
        let mut peers: BTreeSet<NodeId> = self
            .kinds
            .iter()
            .filter(|theirs| self.joined(mine, &theirs.classes))
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
        one != other && self.joined(&self.kinds[a.kind].classes, &self.kinds[b.kind].classes)
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

    /// Everything that the viewer may send to through a peer, and hear from: its addresses and
    /// [`Self::routes`]. A node told to `disable-ipv4` shares no IPv4 address with anybody.
    pub fn allowed_ips(&self, viewer: NodeId, peer: NodeId) -> BTreeSet<IpNet> {
        let mut allowed = self.routes(viewer, peer);
        let Some(placed) = self.nodes.get(&peer).filter(|_| self.sees(viewer, peer)) else {
            return allowed;
        };
        let without_v4 = [viewer, peer].iter().any(|node| {
            self.attributes
                .get(node)
                .is_some_and(|attributes| attributes.contains("disable-ipv4"))
        });
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
        let routers = || {
            self.nodes
                .iter()
                .filter_map(|(id, placed)| Some((*id, placed.routes.get(&route)?)))
        };
        let (primary, pieces) = routers().next()?;
        let mut plain = me.routes.contains_key(&route);
        let mut steered = None;
        for (id, pieces) in routers() {
            match self.way(me, pieces) {
                Some(Way::Plain) => plain = true,
                Some(Way::Via) if id != viewer => steered = steered.or(Some(id)),
                Some(Way::Via) | None => {}
            }
        }
        match steered {
            Some(steered) if !plain => Some(steered),
            _ => (plain || self.way_back(me, pieces)).then_some(primary),
        }
    }

    /// The prefixes beyond the node's own that it is told the identities of.
    pub(super) fn remote_places(&self, viewer: NodeId) -> Vec<(IpNet, ClassId)> {
        let Some(me) = self.nodes.get(&viewer) else {
            return Vec::new();
        };
        let mut places = Vec::new();
        for peer in self.peers(viewer) {
            let Some(placed) = self.nodes.get(&peer) else {
                continue;
            };
            places.extend(placed.addresses);
            let routes = self.routes(viewer, peer);
            for (route, pieces) in &placed.routes {
                match me.routes.get(route) {
                    // Behind both: one prefix has one identity, and here it is this node's.
                    Some(mine) => places.extend(mine),
                    None if routes.contains(route) => places.extend(pieces),
                    None => {}
                }
            }
            places.extend(&placed.internet);
        }
        places
    }

    /// How, if at all, rules lead from the node to the pieces of a route.
    fn way(&self, me: &Placed, pieces: &[(IpNet, ClassId)]) -> Option<Way> {
        let mine = &self.kinds[me.kind].classes;
        let mut way = None;
        for &src in mine {
            for (_, dst) in pieces {
                if !self.opens(src, *dst) {
                    continue;
                }
                let mut terms = self.terms_between(&self.classes[src], &self.classes[*dst]);
                if terms.any(|term| !self.terms[term].is_via()) {
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
        pieces
            .iter()
            .any(|(_, src)| mine.iter().any(|dst| self.opens(*src, *dst)))
    }

    fn joined(&self, some: &[ClassId], others: &[ClassId]) -> bool {
        some.iter()
            .any(|&a| others.iter().any(|&b| self.opens(a, b) || self.opens(b, a)))
    }

    /// Whether anything at all is granted from one class to another.
    fn opens(&self, src: ClassId, dst: ClassId) -> bool {
        let (src, dst) = (&self.classes[src], &self.classes[dst]);
        let mut accepts = false;
        let mut denies = false;
        for term in self.terms_between(src, dst).map(|term| &self.terms[term]) {
            match term.action {
                Action::Accept if term.grants_app => return true,
                Action::Accept => accepts = true,
                Action::Deny => denies = true,
            }
        }
        match (accepts, denies) {
            (false, _) => false,
            (true, false) => true,
            (true, true) => {
                let answers = self.answers(src, dst);
                answers.iter().any(|answer| answer.action == Action::Accept)
            }
        }
    }
}

/// By what kind of rule a node reaches a route.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Plain,
    /// By nothing but grants that name the routers to take.
    Via,
}
