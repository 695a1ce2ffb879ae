//! Node attributes: switches that the policy sets on nodes.
//!
//! What an attribute does is up to those who read it; here it is a name on a node. The one that
//! changes what others are told is `disable-ipv4` ([`CompiledPolicy::allowed_ips`]).

use std::collections::BTreeSet;

use super::compile::CompiledPolicy;
use super::resolve::{Extent, Resolver};
use super::syntax::Document;
use crate::node::NodeId;

/// What `randomizeClientPort` is short for, on every node.
const RANDOMIZE: &str = "randomize-client-port";

/// Names, and who is given them.
#[derive(Clone, Debug)]
pub(super) struct Given {
    /// `None` is every node.
    targets: Option<Vec<Extent>>,
    names: Vec<String>,
}

pub(super) fn given(document: &Document, resolver: &Resolver<'_>) -> Vec<Given> {
    let clauses = document.node_attributes.iter().map(|clause| Given {
        targets: Some(resolver.extents(clause.target.iter())),
        names: clause.attributes.clone(),
    });
    let randomize = document.randomize_client_port.then(|| Given {
        targets: None,
        names: vec![RANDOMIZE.to_owned()],
    });
    clauses.chain(randomize).collect()
}

impl CompiledPolicy {
    /// The names that `nodeAttrs` gives a node.
    pub fn attributes(&self, id: NodeId) -> BTreeSet<String> {
        let Some(node) = self.known.get(&id) else {
            return BTreeSet::new();
        };
        let user = self.user_of(node);
        let targeted = |given: &&Given| {
            given.targets.as_ref().is_none_or(|targets| {
                let mut targets = targets.iter();
                targets.any(|target| target.covers(node, user, &self.ground))
            })
        };
        let given = self.attributes.iter().filter(targeted);
        given
            .flat_map(|given| given.names.iter().cloned())
            .collect()
    }
}
