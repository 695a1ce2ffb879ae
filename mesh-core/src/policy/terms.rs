//! Clauses broken into terms: one source side, one destination, what may be opened between them.
//!
//! A term names its ends by *atoms*, the selectors that the policy's rules use, each once. Beside
//! those that are written there are atoms for what the text implies: whose node it is (for
//! `autogroup:self`), which router a prefix lies behind (for `via`), a posture.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::identity::{self, Atom, AtomId, Atoms};
use super::ports::{self, Ports, Protocol};
use super::problem::Spanned;
use super::resolve::{Extent, Resolver, Subjects};
use super::selector::{Autogroup, Selector};
use super::syntax::{Clause, Document, Icmp, Kind, Services};
use crate::RuleId;
use crate::netmap::{Action, PortRange, Rule};
use crate::node::{Tag, UserId};
use crate::world::Pools;

/// Sources, one destination, and what may or may not be opened between them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Term {
    /// Index into the policy's rules, which is in the order of the text.
    pub(super) rule: usize,
    pub(super) action: Action,
    pub(super) services: Arc<[Service]>,
    /// Source and destination belong to one user: `autogroup:self`.
    pub(super) same_owner: bool,
    /// Grants capabilities: joins nodes even where it opens nothing.
    pub(super) grants_app: bool,
    pub(super) src: Arc<[AtomId]>,
    /// Of which the source must have one, unless there are none.
    pub(super) postures: Arc<[AtomId]>,
    pub(super) dst: Destination,
    pub(super) via: Arc<[AtomId]>,
}

impl Term {
    /// Holds only through the routers that it names.
    pub(super) fn is_via(&self) -> bool {
        !self.via.is_empty()
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Destination {
    Everything,
    One(AtomId),
}

/// Ports of one protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Service {
    pub(super) protocol: u8,
    pub(super) ports: PortRange,
}

/// The clauses of a document, or the one that stands for having none.
pub(super) struct Clauses<'a> {
    default_posture: &'a [Spanned<String>],
    clauses: Vec<Cow<'a, Clause>>,
}

impl<'a> Clauses<'a> {
    pub(super) fn of(document: &'a Document) -> Self {
        let written = document.clauses.iter().map(Cow::Borrowed);
        let implied = document
            .unrestricted
            .then(|| Cow::Owned(Clause::allow_all()));
        Self {
            default_posture: &document.default_posture,
            clauses: implied.into_iter().chain(written).collect(),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Clause> {
        self.clauses.iter().map(AsRef::as_ref)
    }

    /// One of these is asked of the source. To be denied takes none.
    fn postures<'b>(&'b self, clause: &'b Clause) -> &'b [Spanned<String>] {
        match clause.kind {
            Kind::Deny => &[],
            Kind::Acl | Kind::Grant => clause.posture.as_deref().unwrap_or(self.default_posture),
        }
    }
}

/// What tells the nodes of one user from those of another.
fn owner_text(user: UserId) -> String {
    format!("owner:{user}")
}

/// What tells the prefixes behind a router from the same prefixes behind another.
pub(super) fn via_text(tag: &Tag) -> String {
    format!("via:{tag}")
}

pub(super) fn atoms(
    clauses: &Clauses<'_>,
    resolver: &Resolver<'_>,
    subjects: &Subjects<'_>,
) -> Atoms {
    let mut extents: BTreeMap<String, Extent> = BTreeMap::new();
    let mut same_owner = false;
    for name in clauses.iter().flat_map(|clause| clauses.postures(clause)) {
        extents
            .entry(name.value.clone())
            .or_insert_with(|| resolver.posture(&name.value));
    }
    for clause in clauses.iter() {
        let dst = clause.dst.iter().map(|target| &target.value.selector);
        for selector in clause.src.iter().map(|src| &src.value).chain(dst.clone()) {
            extents
                .entry(selector.to_string())
                .or_insert_with(|| resolver.extent(selector));
        }
        same_owner |= dst
            .clone()
            .any(|dst| *dst == Selector::Autogroup(Autogroup::Own));
        for tag in &clause.via {
            // No address satisfies it by itself: `place` adds it to what lies behind the router.
            let nobody = Extent::Users(BTreeSet::new());
            extents.insert(via_text(&tag.value), nobody);
        }
    }
    if same_owner {
        for user in subjects.users.keys() {
            extents.insert(owner_text(*user), Extent::Users([*user].into()));
        }
    }
    Atoms::new(
        extents
            .into_iter()
            .map(|(text, extent)| Atom { text, extent })
            .collect(),
    )
}

pub(super) fn terms(
    document: &Document,
    clauses: &Clauses<'_>,
    atoms: &Atoms,
    pools: &Pools,
) -> (Vec<(RuleId, Rule)>, Vec<Term>) {
    let mut rules = Vec::new();
    let mut terms = Vec::new();
    let mut said: BTreeMap<String, usize> = BTreeMap::new();
    for (index, clause) in clauses.iter().enumerate() {
        let content = clause.content();
        let occurrence = said.entry(content.clone()).or_default();
        let id = identity::rule_id(&content, *occurrence);
        *occurrence += 1;
        let summary = clause.summary(pools);
        let line = document.lines.line(clause.span);
        rules.push((id, Rule { line, summary }));
        let src: Arc<[AtomId]> = clause
            .src
            .iter()
            .filter_map(|src| atoms.id(&src.value.to_string()))
            .collect();
        let via: Arc<[AtomId]> = clause
            .via
            .iter()
            .filter_map(|tag| atoms.id(&via_text(&tag.value)))
            .collect();
        let postures: Arc<[AtomId]> = clauses
            .postures(clause)
            .iter()
            .filter_map(|name| atoms.id(&name.value))
            .collect();
        let action = match clause.kind {
            Kind::Deny => Action::Deny,
            Kind::Acl | Kind::Grant => Action::Accept,
        };
        // The items of a grant are the same for all of its destinations.
        let mut last: Option<(&Services, Arc<[Service]>)> = None;
        for target in &clause.dst {
            let items = &target.value.services;
            let same = match last.take() {
                Some((before, same)) if Arc::ptr_eq(before, items) => same,
                _ => services(items, action, document.icmp).into(),
            };
            last = Some((items, Arc::clone(&same)));
            let selector = &target.value.selector;
            let dst = match selector {
                Selector::Any => Some(Destination::Everything),
                _ => atoms.id(&selector.to_string()).map(Destination::One),
            };
            let Some(dst) = dst else { continue };
            terms.push(Term {
                rule: index,
                action,
                services: same,
                same_owner: *selector == Selector::Autogroup(Autogroup::Own),
                grants_app: !clause.app.is_empty(),
                src: src.clone(),
                postures: postures.clone(),
                dst,
                via: via.clone(),
            });
        }
    }
    (rules, terms)
}

/// ICMP type of an echo request: RFC 792 and RFC 4443, section 4.1.
const ECHO: [(u8, u16); 2] = [(ports::ICMP, 8), (ports::ICMPV6, 128)];

/// Protocol by protocol, what the items of a rule are about.
fn services(items: &[(Protocol, Ports)], action: Action, icmp: Icmp) -> Vec<Service> {
    let mut services = BTreeSet::new();
    for (protocol, ports) in items {
        match protocol {
            Some(protocol) => {
                services.extend(ports.ranges().iter().map(|&ports| Service {
                    protocol: *protocol,
                    ports,
                }));
            }
            None => {
                for protocol in ports::DEFAULT_PROTOCOLS {
                    let portless = !ports::has_ports(Some(protocol));
                    // To deny a port says nothing of protocols that have none.
                    if portless && action == Action::Deny && !ports.is_all() {
                        continue;
                    }
                    let ranges = if portless {
                        &[PortRange::ALL]
                    } else {
                        ports.ranges()
                    };
                    services.extend(ranges.iter().map(|&ports| Service { protocol, ports }));
                }
            }
        }
    }
    if action == Action::Accept && icmp == Icmp::AnyRule && !services.is_empty() {
        services.extend(ECHO.map(|(protocol, kind)| Service {
            protocol,
            ports: PortRange {
                first: kind,
                last: kind,
            },
        }));
    }
    services.into_iter().collect()
}
