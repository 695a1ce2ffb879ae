//! Node attributes: switches that the policy sets on nodes.
//!
//! What an attribute does is up to those who read it; here it is a name on a node. The one that
//! changes what others are told is `disable-ipv4` ([`CompiledPolicy::allowed_ips`]).

use std::collections::{BTreeMap, BTreeSet};

use super::compile::CompiledPolicy;
use super::resolve::{Resolver, Subjects};
use super::syntax::Document;
use crate::node::NodeId;

/// What `randomizeClientPort` is short for, on every node.
const RANDOMIZE: &str = "randomize-client-port";

pub(super) fn of_all(
    document: &Document,
    resolver: &Resolver<'_>,
    subjects: &Subjects<'_>,
) -> BTreeMap<NodeId, BTreeSet<String>> {
    let mut all: BTreeMap<NodeId, BTreeSet<String>> = BTreeMap::new();
    for clause in &document.node_attributes {
        for target in &clause.target {
            let extent = resolver.extent(&target.value);
            let targets = subjects.nodes.values().filter(|node| extent.covers(node));
            for node in targets {
                let names = all.entry(node.id).or_default();
                names.extend(clause.attributes.iter().cloned());
            }
        }
    }
    if document.randomize_client_port {
        for id in subjects.nodes.keys() {
            all.entry(*id).or_default().insert(RANDOMIZE.to_owned());
        }
    }
    all
}

impl CompiledPolicy {
    /// The names that `nodeAttrs` gives a node.
    pub fn attributes(&self, id: NodeId) -> BTreeSet<String> {
        self.attributes.get(&id).cloned().unwrap_or_default()
    }
}
