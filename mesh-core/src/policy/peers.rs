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
        if !self.sees(viewer, router) {
            return BTreeSet::new();
        }
        let (Some(me), Some(them)) = (self.nodes.get(&viewer), self.nodes.get(&router)) else {
            return BTreeSet::new();
        };
        let subnets = them
            .routes
            .iter()
            .filter(|(route, pieces)| self.primary(route) == Some(router) && self.uses(me, pieces));
        subnets
            .map(|(route, _)| *route)
            .chain(them.exits.iter().copied())
            .collect()
    }

    /// The prefixes beyond the node's own that it is told the identities of.
    pub(super) fn remote_places(&self, viewer: NodeId) -> Vec<(IpNet, ClassId)> {
        let mut places = Vec::new();
        for peer in self.peers(viewer) {
            let Some(placed) = self.nodes.get(&peer) else {
                continue;
            };
            places.extend(placed.addresses);
            let routes = self.routes(viewer, peer);
            let given = placed
                .routes
                .iter()
                .filter(|(route, _)| routes.contains(route));
            places.extend(given.flat_map(|(_, pieces)| pieces));
            places.extend(&placed.internet);
        }
        places
    }

    /// Of the routers that are approved for a prefix, the one enrolled first.
    fn primary(&self, route: &IpNet) -> Option<NodeId> {
        self.nodes
            .iter()
            .find(|(_, placed)| placed.routes.contains_key(route))
            .map(|(id, _)| *id)
    }

    /// Whether any of the pieces is something that the node may open to, or be opened to from.
    fn uses(&self, me: &Placed, pieces: &[(IpNet, ClassId)]) -> bool {
        let mine = &self.kinds[me.kind].classes;
        let theirs: BTreeSet<ClassId> = pieces.iter().map(|(_, class)| *class).collect();
        self.joined(mine, &theirs.into_iter().collect::<Vec<_>>())
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
