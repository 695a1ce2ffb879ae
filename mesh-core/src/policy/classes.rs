//! Classes: the sets of atoms that addresses satisfy, and the terms that follow from each.
//!
//! A class is found once per *place*, a prefix that a node answers or routes for. What lies behind
//! a router is cut where some rule's prefix begins or ends, so that every address of a piece is of
//! one class when pieces are looked up by longest prefix.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use ipnet::IpNet;

use super::bits::Bits;
use super::identity::{self, AtomId, Atoms};
use super::ipset::IpSet;
use super::terms::{Destination, Term, via_text};
use crate::Identity;
use crate::node::{Node, UserId};

/// Index into the policy's classes.
pub(super) type ClassId = usize;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Class {
    pub(super) identity: Identity,
    /// Which user's nodes these are, where a rule asks.
    pub(super) owner: Option<AtomId>,
    /// Terms that it is a source of, and a destination of.
    pub(super) src_terms: Arc<Bits>,
    pub(super) dst_terms: Bits,
}

/// A node's prefixes with their classes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Placed {
    pub(super) addresses: [(IpNet, ClassId); 2],
    /// Approved subnet routes, each cut into what policy tells apart.
    pub(super) routes: BTreeMap<IpNet, Vec<(IpNet, ClassId)>>,
    /// 0.0.0.0/0 and ::/0 as approved, and the pieces of the internet behind them.
    pub(super) exits: BTreeSet<IpNet>,
    pub(super) internet: Vec<(IpNet, ClassId)>,
    pub(super) owner: Option<UserId>,
    pub(super) kind: usize,
}

impl Placed {
    /// Every prefix that the node answers or routes for.
    pub(super) fn places(&self) -> impl Iterator<Item = (IpNet, ClassId)> + '_ {
        self.addresses
            .iter()
            .chain(self.routes.values().flatten())
            .chain(&self.internet)
            .copied()
    }
}

pub(super) fn exit_pieces(internet: &IpSet, atoms: &Atoms) -> Vec<IpNet> {
    let blocks = internet.prefixes();
    blocks
        .into_iter()
        .flat_map(|net| atoms.pieces(net))
        .collect()
}

pub(super) fn place(
    node: &Node,
    atoms: &Atoms,
    exit_pieces: &[IpNet],
    classes: &mut Classes,
) -> Placed {
    let routed_by: Vec<AtomId> = node
        .owner
        .tags()
        .filter_map(|tag| atoms.id(&via_text(tag)))
        .collect();
    let mut behind = |net: IpNet| {
        let mut key = atoms.of_net(net);
        key.extend(&routed_by);
        key.sort_unstable();
        (net, classes.class(key))
    };
    let routes = node
        .serving_routes()
        .map(|route| {
            let pieces = atoms.pieces(route.trunc());
            (route.trunc(), pieces.into_iter().map(&mut behind).collect())
        })
        .collect();
    let exits: BTreeSet<IpNet> = node
        .approved_routes
        .intersection(&node.advertised_routes)
        .filter(|route| route.prefix_len() == 0)
        .copied()
        .collect();
    let same_family = |net: &&IpNet| exits.iter().any(|exit| exit.contains(*net));
    let internet = exit_pieces
        .iter()
        .filter(same_family)
        .copied()
        .map(behind)
        .collect();
    let addresses = node
        .addresses
        .prefixes()
        .map(|address| (address, classes.class(atoms.of_address(node, address))));
    Placed {
        addresses,
        routes,
        exits,
        internet,
        owner: node.owner.user(),
        kind: 0,
    }
}

/// Hands out classes by their keys.
#[derive(Default)]
pub(super) struct Classes {
    by_key: BTreeMap<Vec<AtomId>, ClassId>,
}

impl Classes {
    pub(super) fn class(&mut self, key: Vec<AtomId>) -> ClassId {
        let next = self.by_key.len();
        *self.by_key.entry(key).or_insert(next)
    }

    pub(super) fn finish(self, index: &TermIndex, terms: &[Term], atoms: &Atoms) -> Vec<Class> {
        let mut by_class: Vec<(ClassId, Vec<AtomId>)> = self
            .by_key
            .into_iter()
            .map(|(key, class)| (class, key))
            .collect();
        by_class.sort();
        let texts: Vec<String> = by_class
            .iter()
            .map(|(_, key)| {
                let texts: Vec<&str> = key.iter().map(|&atom| atoms.text(atom)).collect();
                texts.join("\n")
            })
            .collect();
        let mut shared = Shared::new();
        by_class
            .into_iter()
            .zip(identity::number(&texts))
            .map(|((_, key), identity)| index.class(&key, identity, terms, atoms, &mut shared))
            .collect()
    }
}

/// Rules and terms by the selectors that they name.
#[derive(Debug, Default)]
pub(super) struct TermIndex {
    everything: Bits,
    /// Rules by their sources: all terms of a rule have the same.
    src: BTreeMap<AtomId, Bits>,
    dst: BTreeMap<AtomId, Bits>,
    rules: Vec<Range<usize>>,
}

/// What many classes have in common: the terms that follow from the same rules.
pub(super) type Shared = BTreeMap<Vec<usize>, Arc<Bits>>;

impl TermIndex {
    pub(super) fn of(terms: &[Term]) -> Self {
        let mut index = Self::default();
        for (id, term) in terms.iter().enumerate() {
            match term.dst {
                Destination::Everything => index.everything.insert(id),
                Destination::One(dst) => index.dst.entry(dst).or_default().insert(id),
            }
            if index.rules.len() <= term.rule {
                index.rules.resize(term.rule + 1, id..id);
                for &src in term.src.iter() {
                    index.src.entry(src).or_default().insert(term.rule);
                }
                index.rules[term.rule].start = id;
            }
            index.rules[term.rule].end = id + 1;
        }
        index
    }

    /// The class of an address that satisfies exactly the atoms of `key`.
    pub(super) fn class(
        &self,
        key: &[AtomId],
        identity: Identity,
        terms: &[Term],
        atoms: &Atoms,
        shared: &mut Shared,
    ) -> Class {
        let mut rules = Bits::default();
        let mut dst_terms = self.everything.clone();
        for atom in key {
            if let Some(more) = self.src.get(atom) {
                rules.union(more);
            }
            if let Some(terms) = self.dst.get(atom) {
                dst_terms.union(terms);
            }
        }
        let any = |atoms: &[AtomId]| {
            atoms.is_empty() || atoms.iter().any(|atom| key.binary_search(atom).is_ok())
        };
        let fit = |rule: &usize| any(&terms[self.rules[*rule].start].postures);
        let rules: Vec<usize> = rules.iter().filter(fit).collect();
        let src_terms = shared.entry(rules).or_insert_with_key(|rules| {
            let terms = rules.iter().flat_map(|rule| self.rules[*rule].clone());
            Arc::new(terms.collect())
        });
        let through = |term: &usize| any(&terms[*term].via);
        let owner = key
            .iter()
            .copied()
            .find(|&atom| atoms.text(atom).starts_with("owner:"));
        Class {
            identity,
            owner,
            src_terms: Arc::clone(src_terms),
            dst_terms: dst_terms.iter().filter(through).collect(),
        }
    }
}
