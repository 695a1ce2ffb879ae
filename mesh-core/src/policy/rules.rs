//! The rules of a policy, each in a slot that it keeps for as long as its text stays the same.
//!
//! By its slot a rule is known to the selectors that it names and to the classes that it judges.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::atoms::AtomId;
use super::bits::Bits;
use super::classes::{Class, Key};
use super::identity::Numbers;
use super::problem::Span;
use super::slab::Slab;
use super::syntax::{Icmp, Kind};
use crate::RuleId;
use crate::netmap::{self, Action, PortRange};

mod edit;

pub(super) use edit::{Edit, services};

pub(super) type RuleSlot = usize;

/// Capability names, each with its values as JSON.
pub(super) type Apps = Vec<(String, Vec<String>)>;

/// Sources, destinations, and what may or may not be opened between them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Rule {
    pub(super) id: RuleId,
    pub(super) action: Action,
    /// What it grants beside packets; joins nodes even where it opens nothing.
    pub(super) apps: Apps,
    pub(super) src: Vec<AtomId>,
    /// Of which the source must have one, unless there are none.
    postures: Vec<AtomId>,
    /// Of which the destination must lie behind one, unless there are none.
    pub(super) via: Vec<AtomId>,
    /// Says ICMP in so many words, not merely by leaving the protocol out.
    pub(super) names_icmp: bool,
    /// What is opened to whom.
    by_dst: BTreeMap<AtomId, Vec<Opening>>,
    everywhere: Vec<Opening>,
    kind: Kind,
    content: Arc<str>,
    /// How many rules before it say the same.
    occurrence: usize,
    /// The number that it would have if nobody else wanted it.
    wanted: u32,
    summary: String,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Opening {
    pub(super) services: Arc<[Service]>,
    /// Source and destination belong to one user: `autogroup:self`.
    same_owner: bool,
}

/// Ports of one protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Service {
    pub(super) protocol: u8,
    pub(super) ports: PortRange,
}

impl Rule {
    pub(super) fn dst(&self) -> impl Iterator<Item = AtomId> {
        self.by_dst.keys().copied()
    }

    pub(super) fn is_everywhere(&self) -> bool {
        !self.everywhere.is_empty()
    }

    /// Of what it opens, that which it opens between these two.
    fn between<'a>(&'a self, src: &'a Key, dst: &'a Key) -> impl Iterator<Item = &'a Opening> {
        let one_owner = src.owner.is_some() && src.owner == dst.owner;
        let named = dst.atoms.iter().filter_map(|atom| self.by_dst.get(atom));
        named
            .flatten()
            .chain(&self.everywhere)
            .filter(move |opening| one_owner || !opening.same_owner)
    }

    /// Whether it has to do with the two at all.
    pub(super) fn joins(&self, src: &Key, dst: &Key) -> bool {
        self.between(src, dst).next().is_some()
    }

    fn is_selfish(&self) -> bool {
        let mut openings = self.by_dst.values().flatten();
        openings.any(|opening| opening.same_owner)
    }

    fn atoms(&self) -> impl Iterator<Item = AtomId> {
        let named = self.src.iter().chain(&self.postures).chain(&self.via);
        named.copied().chain(self.dst())
    }
}

/// Where a rule stands in the text.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Spot {
    /// Beside its text, what tells it from others.
    kind: Option<Kind>,
    position: usize,
    span: Span,
    line: u32,
}

#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) all: Slab<Arc<Rule>>,
    text: Arc<str>,
    /// What the text is called.
    file: Arc<str>,
    icmp: Icmp,
    default_posture: Vec<String>,
    /// By slot.
    spots: Vec<Spot>,
    order: Vec<RuleSlot>,
    /// Rules that say the same.
    said: BTreeMap<Arc<str>, Vec<RuleSlot>>,
    /// What several rules say, and what new ones say.
    unnamed: BTreeSet<Arc<str>>,
    numbers: Numbers,
    /// By selector.
    sources: Vec<Bits>,
    destinations: Vec<Bits>,
    uses: Vec<usize>,
    everywhere: Bits,
    /// Rules that ask for a posture, for a router, for one owner; and those that forbid.
    postured: Bits,
    pub(super) steered: Bits,
    pub(super) selfish: Bits,
    pub(super) denies: Bits,
}

impl Default for Rules {
    /// No rules at all, under which nobody reaches anybody.
    fn default() -> Self {
        Self {
            all: Slab::default(),
            text: Arc::from(""),
            file: Arc::from(""),
            icmp: Icmp::default(),
            default_posture: Vec::new(),
            spots: Vec::new(),
            order: Vec::new(),
            said: BTreeMap::new(),
            unnamed: BTreeSet::new(),
            numbers: Numbers::default(),
            sources: Vec::new(),
            destinations: Vec::new(),
            uses: Vec::new(),
            everywhere: Bits::default(),
            postured: Bits::default(),
            steered: Bits::default(),
            selfish: Bits::default(),
            denies: Bits::default(),
        }
    }
}

impl Rules {
    /// The rules that apply to whoever satisfies exactly these selectors: as a source, and as a
    /// destination.
    pub(super) fn applying(&self, atoms: &[AtomId]) -> (Bits, Bits) {
        let mut src = Bits::default();
        let mut dst = self.everywhere.clone();
        for atom in atoms {
            if let (Some(sources), Some(destinations)) =
                (self.sources.get(*atom), self.destinations.get(*atom))
            {
                src.union(sources);
                dst.union(destinations);
            }
        }
        let any = |wanted: &[AtomId]| wanted.iter().any(|atom| atoms.binary_search(atom).is_ok());
        let unfit = src.both(&self.postured);
        let unfit = unfit.filter(|rule| !any(&self.all[*rule].postures));
        for rule in unfit.collect::<Vec<_>>() {
            src.remove(rule);
        }
        let elsewhere = dst.both(&self.steered);
        let elsewhere = elsewhere.filter(|rule| !any(&self.all[*rule].via));
        for rule in elsewhere.collect::<Vec<_>>() {
            dst.remove(rule);
        }
        (src, dst)
    }

    /// The rules by which an address of the one class may, or may not, open to one of the other, in
    /// the order of the text, and what each opens.
    pub(super) fn between<'a>(
        &'a self,
        src: &'a Class,
        dst: &'a Class,
    ) -> impl Iterator<Item = (RuleSlot, &'a Rule, Vec<&'a Opening>)> {
        let mut slots: Vec<RuleSlot> = src.src_rules.both(&dst.dst_rules).collect();
        slots.sort_by_key(|slot| self.spots[*slot].position);
        slots.into_iter().filter_map(|slot| {
            let rule: &Rule = &self.all[slot];
            let openings: Vec<&Opening> = rule.between(&src.key, &dst.key).collect();
            (!openings.is_empty()).then_some((slot, rule, openings))
        })
    }

    /// A rule as people are shown it.
    pub(super) fn shown(&self, slot: RuleSlot) -> netmap::Rule {
        netmap::Rule {
            file: Arc::clone(&self.file),
            line: self.spots[slot].line,
            summary: self.all[slot].summary.clone(),
        }
    }

    pub(super) fn span(&self, slot: RuleSlot) -> Span {
        self.spots[slot].span
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = (RuleSlot, &Rule)> {
        self.order
            .iter()
            .map(|slot| (*slot, self.all[*slot].as_ref()))
    }
}
