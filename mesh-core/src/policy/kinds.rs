//! Kinds: nodes whose places are of the same classes, and which classes they have to do with.
//!
//! Who sees whom is decided here, once per pair of classes by way of the terms that join them, and
//! never per pair of nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use ipnet::IpNet;

use super::bits::Bits;
use super::classes::{Class, ClassId, Placed};
use super::entries::{self, Loaded};
use super::identity::AtomId;
use super::terms::Term;
use crate::netmap::Action;
use crate::node::NodeId;

#[derive(Clone, Debug)]
pub(super) struct Twins {
    pub(super) classes: Vec<ClassId>,
    /// Classes that something may be opened to.
    reaches: Bits,
    pub(super) nodes: BTreeSet<NodeId>,
    /// Their own addresses.
    pub(super) addresses: Vec<(IpNet, ClassId)>,
    /// What all of them load, made when first asked for.
    pub(super) loaded: OnceLock<Loaded>,
}

impl Twins {
    /// Whether nodes of this kind and of the other know each other.
    pub(super) fn sees(&self, other: &Self) -> bool {
        let reaches = |one: &Self, other: &Self| {
            let mut classes = other.classes.iter();
            classes.any(|class| one.reaches.contains(*class))
        };
        reaches(self, other) || reaches(other, self)
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
    let mut reached = Reached::new(classes, terms);
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
        let mut reaches = Bits::default();
        for class in &classes {
            reaches.union(reached.from(*class));
        }
        kinds.push(Twins {
            classes,
            reaches,
            nodes: twins,
            addresses,
            loaded: OnceLock::new(),
        });
    }
    kinds
}

/// Which classes each class may open something to.
struct Reached<'a> {
    classes: &'a [Class],
    terms: &'a [Term],
    /// Of each term, the classes that are its destination.
    by_term: Vec<Bits>,
    owned: BTreeMap<AtomId, Bits>,
    denies: bool,
    /// Classes with the same terms and owner reach the same; found by the set's place in memory.
    known: BTreeMap<(usize, Option<AtomId>), Bits>,
}

impl<'a> Reached<'a> {
    fn new(classes: &'a [Class], terms: &'a [Term]) -> Self {
        let mut by_term = vec![Bits::default(); terms.len()];
        let mut owned: BTreeMap<AtomId, Bits> = BTreeMap::new();
        for (id, class) in classes.iter().enumerate() {
            for term in class.dst_terms.iter() {
                by_term[term].insert(id);
            }
            if let Some(owner) = class.owner {
                owned.entry(owner).or_default().insert(id);
            }
        }
        Self {
            classes,
            terms,
            by_term,
            owned,
            denies: terms.iter().any(|term| term.action == Action::Deny),
            known: BTreeMap::new(),
        }
    }

    fn from(&mut self, class: ClassId) -> &Bits {
        let class = &self.classes[class];
        let key = (Arc::as_ptr(&class.src_terms) as usize, class.owner);
        if !self.known.contains_key(&key) {
            let reached = self.find(class);
            self.known.insert(key, reached);
        }
        &self.known[&key]
    }

    fn find(&self, class: &Class) -> Bits {
        let mut reached = Bits::default();
        for id in class.src_terms.iter() {
            let term = &self.terms[id];
            match (term.action, term.same_owner) {
                (Action::Deny, _) => {}
                (Action::Accept, false) => reached.union(&self.by_term[id]),
                (Action::Accept, true) => {
                    let own = class.owner.and_then(|owner| self.owned.get(&owner));
                    let own = own.into_iter().flat_map(|own| own.both(&self.by_term[id]));
                    reached.union(&own.collect());
                }
            }
        }
        if !self.denies {
            return reached;
        }
        // A deny that leaves nothing open leaves nothing to see either.
        let open = |dst: &usize| entries::opens(class, &self.classes[*dst], self.terms);
        reached.iter().filter(open).collect()
    }
}
