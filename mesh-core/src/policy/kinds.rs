//! Kinds: nodes whose places are of the same classes, and which classes they have to do with.
//!
//! Who sees whom is decided here, once per pair of classes by way of the rules that join them, and
//! never per pair of nodes. What is hard: when something changes, to find those whom it concerns,
//! so that all others keep what was worked out for them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use ipnet::IpNet;

use super::bits::Bits;
use super::classes::{ClassId, Classes, Placed};
use super::entries::{Known, Loaded};
use super::rules::Rules;
use super::slab::Slab;
use crate::netmap::Action;
use crate::node::NodeId;

pub(super) type KindId = usize;

#[derive(Clone, Debug, Default)]
pub(super) struct Twins {
    pub(super) classes: Vec<ClassId>,
    /// Classes that something may be opened to.
    reaches: Bits,
    pub(super) nodes: BTreeSet<NodeId>,
    /// Their own addresses.
    pub(super) addresses: Vec<(IpNet, ClassId)>,
    /// What all of them load, made when first asked for.
    pub(super) loaded: OnceLock<Arc<Loaded>>,
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

    fn opens(&self, dst: ClassId, rules: &Rules, classes: &Classes, known: &mut Known) -> bool {
        let dst = &classes[dst];
        let mut mine = self.classes.iter();
        mine.any(|src| rules.opens_among(&classes[*src], dst, known))
    }

    /// All that something may be opened to, found by way of the rules.
    fn find_reach(&self, rules: &Rules, classes: &Classes) -> Bits {
        let mut mine = Bits::default();
        for class in &self.classes {
            mine.union(&classes[*class].src_rules);
        }
        let mut everywhere = false;
        let mut destinations = Bits::default();
        for rule in mine.iter().map(|rule| &rules.all[rule]) {
            if rule.action == Action::Accept {
                everywhere |= rule.is_everywhere();
                for atom in rule.dst() {
                    destinations.insert(atom);
                }
            }
        }
        let mut reach = Bits::default();
        if everywhere {
            reach = classes.iter().map(|(class, _)| class).collect();
        } else {
            for holders in destinations.iter().filter_map(|atom| classes.holders(atom)) {
                reach.union(holders);
            }
        }
        let special = [&rules.denies, &rules.steered, &rules.selfish];
        match special.iter().any(|special| mine.meets(special)) {
            // Not every rule that names a destination holds for it, or a deny leaves nothing open.
            true => {
                let mut known = Known::default();
                let open = |dst: &ClassId| self.opens(*dst, rules, classes, &mut known);
                reach.iter().filter(open).collect()
            }
            false => reach,
        }
    }
}

/// All kinds that some node is of.
#[derive(Clone, Debug, Default)]
pub(super) struct Kinds {
    all: Slab<Arc<Twins>>,
    by_classes: BTreeMap<Vec<ClassId>, KindId>,
    /// The kinds of those who are of a class, by class.
    of_class: Vec<Bits>,
    /// Whom somebody joined or left since the last [`Self::settle`], and the new ones among them.
    touched: BTreeSet<KindId>,
    fresh: BTreeSet<KindId>,
}

impl std::ops::Index<KindId> for Kinds {
    type Output = Twins;

    fn index(&self, kind: KindId) -> &Twins {
        &self.all[kind]
    }
}

/// What became of the kinds when nodes came and went.
#[derive(Debug, Default)]
pub(super) struct Moved {
    fresh: BTreeSet<KindId>,
    gone: Vec<Arc<Twins>>,
}

impl Moved {
    /// Classes that somebody was of who is not of them any more.
    pub(super) fn left(&self) -> impl Iterator<Item = ClassId> {
        self.gone
            .iter()
            .flat_map(|twins| twins.classes.iter().copied())
    }
}

impl Kinds {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Twins> {
        self.all.iter().map(|(_, twins)| twins.as_ref())
    }

    /// Whether somebody is of this class.
    pub(super) fn have(&self, class: ClassId) -> bool {
        self.of_class
            .get(class)
            .is_some_and(|kinds| !kinds.is_empty())
    }

    pub(super) fn join(&mut self, node: NodeId, classes: Vec<ClassId>) -> KindId {
        let kind = match self.by_classes.get(&classes) {
            Some(kind) => *kind,
            None => {
                let kind = self.all.insert(Arc::new(Twins {
                    classes: classes.clone(),
                    ..Twins::default()
                }));
                for class in &classes {
                    if self.of_class.len() <= *class {
                        self.of_class.resize(*class + 1, Bits::default());
                    }
                    self.of_class[*class].insert(kind);
                }
                self.by_classes.insert(classes, kind);
                self.fresh.insert(kind);
                kind
            }
        };
        self.twins(kind).nodes.insert(node);
        self.touched.insert(kind);
        kind
    }

    pub(super) fn leave(&mut self, node: NodeId, kind: KindId) {
        self.twins(kind).nodes.remove(&node);
        self.touched.insert(kind);
    }

    fn twins(&mut self, kind: KindId) -> &mut Twins {
        let twins = self.all.get_mut(kind);
        Arc::make_mut(twins.expect("a node's kind stays as long as the node is of it"))
    }

    /// Lets go of kinds that nobody is of any more, and finds the addresses of the others.
    pub(super) fn settle(&mut self, nodes: &BTreeMap<NodeId, Arc<Placed>>) -> Moved {
        let mut moved = Moved {
            fresh: std::mem::take(&mut self.fresh),
            gone: Vec::new(),
        };
        for kind in std::mem::take(&mut self.touched) {
            let twins = self.twins(kind);
            if !twins.nodes.is_empty() {
                let mine = twins.nodes.iter().filter_map(|id| nodes.get(id));
                let mut addresses: Vec<_> = mine.flat_map(|placed| placed.addresses).collect();
                addresses.sort_unstable();
                twins.addresses = addresses;
            } else if let Some(twins) = self.all.remove(kind) {
                self.by_classes.remove(&twins.classes);
                for class in &twins.classes {
                    self.of_class[*class].remove(kind);
                }
                moved.fresh.remove(&kind);
                moved.gone.push(twins);
            }
        }
        moved
    }

    /// Finds anew who reaches whom, where one of the `judged` classes, or one that is `dead`, has
    /// to do with it; and lets those whom it concerns load again.
    pub(super) fn judge(
        &mut self,
        moved: &Moved,
        judged: &Bits,
        dead: &Bits,
        rules: &Rules,
        classes: &Classes,
    ) {
        for kind in &moved.fresh {
            let reaches = self[*kind].find_reach(rules, classes);
            self.twins(*kind).reaches = reaches;
        }
        let still = moved.fresh.is_empty() && moved.gone.is_empty();
        if still && judged.is_empty() && dead.is_empty() {
            return;
        }
        let old = self.all.iter().map(|(kind, _)| kind);
        let old: Vec<KindId> = old.filter(|kind| !moved.fresh.contains(kind)).collect();
        let mut stale: BTreeSet<KindId> = BTreeSet::new();
        for kind in &old {
            let knew = |gone: &Arc<Twins>| self[*kind].sees(gone);
            if moved.gone.iter().any(knew) {
                stale.insert(*kind);
            }
        }
        for kind in &old {
            let twins = &self[*kind];
            let mut own = twins.classes.iter();
            let reaches = if own.any(|class| judged.contains(*class)) {
                stale.insert(*kind);
                twins.find_reach(rules, classes)
            } else {
                let known = &twins.reaches;
                let mut answers = Known::default();
                let turned = judged.iter().filter(|class| {
                    twins.opens(*class, rules, classes, &mut answers) != known.contains(*class)
                });
                let turned: Vec<ClassId> = turned.chain(known.both(dead)).collect();
                let mut reaches = known.clone();
                for class in turned {
                    match known.contains(class) {
                        true => reaches.remove(class),
                        false => reaches.insert(class),
                    }
                }
                reaches
            };
            if reaches != twins.reaches {
                stale.insert(*kind);
                // To be seen is to see.
                for class in reaches
                    .without(&twins.reaches)
                    .chain(twins.reaches.without(&reaches))
                {
                    stale.extend(self.of_class.get(class).into_iter().flat_map(Bits::iter));
                }
                self.twins(*kind).reaches = reaches;
            }
        }
        for kind in &old {
            let mut fresh = moved.fresh.iter();
            if fresh.any(|fresh| self[*kind].sees(&self[*fresh])) {
                stale.insert(*kind);
            }
        }
        for kind in stale {
            self.twins(kind).loaded = OnceLock::new();
        }
    }

    /// Lets everybody load again.
    pub(super) fn forget(&mut self) {
        let all: Vec<KindId> = self.all.iter().map(|(kind, _)| kind).collect();
        for kind in all {
            self.twins(kind).loaded = OnceLock::new();
        }
    }
}
