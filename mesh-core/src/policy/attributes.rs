//! Node attributes: switches that the policy sets on nodes.
//!
//! What an attribute does is up to those who read it; here it is a name on a node. No part of the
//! product reads one yet, and [`super::idle`] says so of each.

use std::collections::{BTreeMap, BTreeSet};

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
    /// Line of the text that says so.
    line: u32,
}

pub(super) fn given(document: &Document, resolver: &Resolver<'_>) -> Vec<Given> {
    let clauses = document.node_attributes.iter().map(|clause| Given {
        targets: Some(resolver.extents(clause.target.iter())),
        names: clause.attributes.clone(),
        line: document.lines.line(clause.span),
    });
    let randomize = document.randomize_client_port.then(|| Given {
        targets: None,
        names: vec![RANDOMIZE.to_owned()],
        line: document.lines.line(document.randomize_span),
    });
    clauses.chain(randomize).collect()
}

impl CompiledPolicy {
    /// The names that `nodeAttrs` gives a node.
    pub fn attributes(&self, id: NodeId) -> BTreeSet<String> {
        self.attributes_at(id).into_keys().collect()
    }

    /// The same, each with the first line that gives it.
    pub(super) fn attributes_at(&self, id: NodeId) -> BTreeMap<String, u32> {
        let Some(node) = self.known.get(&id) else {
            return BTreeMap::new();
        };
        let user = self.user_of(node);
        let targeted = |given: &&Given| {
            given.targets.as_ref().is_none_or(|targets| {
                let mut targets = targets.iter();
                targets.any(|target| target.covers(node, user, &self.ground))
            })
        };
        let mut attributes = BTreeMap::new();
        for given in self.attributes.iter().filter(targeted) {
            for name in &given.names {
                let line = attributes.entry(name.clone()).or_insert(given.line);
                *line = given.line.min(*line);
            }
        }
        attributes
    }
}
