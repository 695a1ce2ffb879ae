//! Kinds: nodes whose places are of the same classes, and which classes they have to do with.
//!
//! Who sees whom is decided here, once per pair of classes by way of the terms that join them, and
//! never per pair of nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use ipnet::IpNet;

use super::bits::Bits;
use super::classes::{Class, ClassId, Placed};
use super::entries::{self, Loaded};
use super::terms::Term;
use crate::netmap::Action;
use crate::node::NodeId;

#[derive(Clone, Debug)]
pub(super) struct Twins {
    pub(super) classes: Vec<ClassId>,
    /// Classes that something may be opened to, or from.
    pub(super) joined: Bits,
    pub(super) nodes: BTreeSet<NodeId>,
    /// Their own addresses.
    pub(super) addresses: Vec<(IpNet, ClassId)>,
    /// What all of them load, made when first asked for.
    pub(super) loaded: OnceLock<Loaded>,
}

impl Twins {
    /// Whether nodes of this kind and of the other know each other.
    pub(super) fn sees(&self, other: &Self) -> bool {
        let mut classes = other.classes.iter();
        classes.any(|class| self.joined.contains(*class))
    }
}

/// Sorts the nodes into kinds and tells each its own.
pub(super) fn twins(
    nodes: &mut BTreeMap<NodeId, Placed>,
    classes: &[Class],
    terms: &[Term],
) -> Vec<Twins> {
    let mut by_classes: BTreeMap<Vec<ClassId>, BTreeSet<NodeId>> = BTreeMap::new();
    for (id, placed) in nodes.iter() {
        let classes: BTreeSet<ClassId> = placed.places().map(|(_, class)| class).collect();
        by_classes
            .entry(classes.into_iter().collect())
            .or_default()
            .insert(*id);
    }
    let neighbours = neighbours(classes, terms);
    let mut kinds = Vec::new();
    for (kind, (classes, twins)) in by_classes.into_iter().enumerate() {
        let mut addresses = Vec::new();
        for id in &twins {
            if let Some(placed) = nodes.get_mut(id) {
                placed.kind = kind;
                addresses.extend(placed.addresses);
            }
        }
        addresses.sort_unstable();
        let mut joined = Bits::default();
        for class in &classes {
            joined.union(&neighbours[*class]);
        }
        kinds.push(Twins {
            classes,
            joined,
            nodes: twins,
            addresses,
            loaded: OnceLock::new(),
        });
    }
    kinds
}

/// Of each class, those that it may open something to, or that may open something to it.
fn neighbours(classes: &[Class], terms: &[Term]) -> Vec<Bits> {
    let mut reached_by = vec![Bits::default(); terms.len()];
    let mut owned: BTreeMap<usize, Bits> = BTreeMap::new();
    for (id, class) in classes.iter().enumerate() {
        for term in class.dst_terms.iter() {
            reached_by[term].insert(id);
        }
        if let Some(owner) = class.owner {
            owned.entry(owner).or_default().insert(id);
        }
    }
    let denies: Bits = (0..terms.len())
        .filter(|&term| terms[term].action == Action::Deny)
        .collect();
    let mut neighbours = vec![Bits::default(); classes.len()];
    for (id, class) in classes.iter().enumerate() {
        let mut reached = Bits::default();
        for term in class.src_terms.iter() {
            if terms[term].action == Action::Deny {
                continue;
            }
            if terms[term].same_owner {
                let own = class.owner.and_then(|owner| owned.get(&owner));
                let own = own.into_iter().flat_map(|own| own.both(&reached_by[term]));
                own.for_each(|dst| reached.insert(dst));
            } else {
                reached.union(&reached_by[term]);
            }
        }
        for dst in reached.iter() {
            let touched = class
                .src_terms
                .both(&classes[dst].dst_terms)
                .any(|term| denies.contains(term));
            // A deny that leaves nothing open leaves nothing to see either.
            if !touched || entries::opens(class, &classes[dst], terms) {
                neighbours[id].insert(dst);
                neighbours[dst].insert(id);
            }
        }
    }
    neighbours
}
