//! A policy applied to a world: the part that is the same for every node.
//!
//! A *term* is one source side and one destination of a clause ([`super::terms`]). A *class* is a
//! set of selectors that some address satisfies ([`super::classes`]). A *kind* is a set of nodes
//! with the same classes ([`super::kinds`]). Which terms join two classes is an intersection of two
//! bit sets, so nothing is ever multiplied out over addresses, or over nodes times nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::classes::{self, Class, ClassId, Classes, Placed, Shared, TermIndex};
use super::identity::{AtomId, Atoms};
use super::kinds::{self, Twins};
use super::resolve::{Resolver, Subjects};
use super::syntax::{Clause, Document};
use super::terms::{self, Clauses, Term};
use super::{attributes, ssh};
use crate::netmap::Rule;
use crate::node::NodeId;
use crate::{Identity, RuleId};

/// A policy applied to a world. Cheap to clone: what nodes share is behind [`Arc`]s.
#[derive(Clone, Debug)]
pub struct CompiledPolicy {
    pub(super) rules: Arc<Vec<(RuleId, Rule)>>,
    /// What each rule grants beside packets: capability names and their JSON values.
    pub(super) apps: Arc<Vec<Apps>>,
    pub(super) terms: Arc<Vec<Term>>,
    pub(super) classes: Arc<Vec<Class>>,
    pub(super) nodes: Arc<BTreeMap<NodeId, Placed>>,
    /// Every own address of a node that is not expired.
    pub(super) addresses: Arc<BTreeMap<IpNet, NodeId>>,
    /// Nodes whose places are of the same classes see the same peers.
    pub(super) kinds: Arc<Vec<Twins>>,
    pub(super) attributes: Arc<BTreeMap<NodeId, BTreeSet<String>>>,
    pub(super) ssh: Arc<Vec<ssh::Compiled>>,
    /// 0.0.0.0/0 and ::/0: sources that no peer stands for, where a rule takes in the whole world.
    pub(super) world: [(IpNet, ClassId); 2],
    /// The routers of each approved subnet, in the order of their enrolment.
    pub(super) routers: Arc<BTreeMap<IpNet, Vec<NodeId>>>,
    pub(super) exits: Arc<Vec<NodeId>>,
    atoms: Arc<Atoms>,
    index: Arc<TermIndex>,
}

/// Capability names, each with its values as JSON.
pub(super) type Apps = Vec<(String, Vec<String>)>;

/// Applies `document`, which [`super::check`] found good, to a world. `prev` is the compile before,
/// from which a later version may take what did not change; the result never depends on it.
pub fn compile(
    document: &Document,
    subjects: &Subjects<'_>,
    prev: Option<&CompiledPolicy>,
) -> CompiledPolicy {
    let _ = prev;
    let resolver = Resolver::new(document, *subjects);
    let clauses = Clauses::of(document);
    let atoms = terms::atoms(&clauses, &resolver, subjects);
    let (rules, terms) = terms::terms(document, &clauses, &atoms, subjects.pools);
    let index = TermIndex::of(&terms);
    let mut found = Classes::default();
    let exit_pieces = classes::exit_pieces(&resolver.internet(), &atoms);
    let mut nodes = BTreeMap::new();
    let mut addresses = BTreeMap::new();
    let mut exits = Vec::new();
    let mut routers: BTreeMap<IpNet, Vec<NodeId>> = BTreeMap::new();
    for node in subjects.nodes.values().filter(|node| !node.expired) {
        let placed = classes::place(node, &atoms, &exit_pieces, &mut found);
        addresses.extend(placed.addresses.map(|(address, _)| (address, node.id)));
        for route in placed.routes.keys() {
            routers.entry(*route).or_default().push(node.id);
        }
        if !placed.exits.is_empty() {
            exits.push(node.id);
        }
        nodes.insert(node.id, placed);
    }
    let world = [Ipv4Net::default().into(), Ipv6Net::default().into()]
        .map(|net| (net, found.class(atoms.of_net(net))));
    let classes = found.finish(&index, &terms, &atoms);
    let kinds = kinds::twins(&mut nodes, &classes, &terms);
    CompiledPolicy {
        rules: Arc::new(rules),
        apps: Arc::new(clauses.iter().map(Clause::apps).collect()),
        terms: Arc::new(terms),
        classes: Arc::new(classes),
        nodes: Arc::new(nodes),
        addresses: Arc::new(addresses),
        kinds: Arc::new(kinds),
        attributes: Arc::new(attributes::of_all(document, &resolver, subjects)),
        ssh: Arc::new(ssh::compile(document, &resolver, subjects)),
        world,
        routers: Arc::new(routers),
        exits: Arc::new(exits),
        atoms: Arc::new(atoms),
        index: Arc::new(index),
    }
}

impl CompiledPolicy {
    /// The atoms that an address satisfies, nobody's included, as far as policy itself decides it.
    pub(super) fn key_of(&self, subjects: &Subjects<'_>, address: IpAddr) -> Vec<AtomId> {
        let net = IpNet::from(address);
        let owner = self.addresses.get(&net);
        match owner.and_then(|id| subjects.nodes.get(id)) {
            Some(node) => self.atoms.of_address(node, net),
            None => self.atoms.of_net(net),
        }
    }

    /// The class of an address that satisfies those atoms.
    pub(super) fn class_of(&self, key: &[AtomId]) -> Class {
        let (terms, atoms) = (&self.terms, &self.atoms);
        let shared = &mut Shared::new();
        self.index
            .class(key, Identity::UNKNOWN, terms, atoms, shared)
    }
}
