//! From clauses to terms to classes: the part of a policy that is the same for every node.
//!
//! A *term* is one source side and one destination of a clause. A *class* is a set of selectors
//! that some address satisfies. Which terms join two classes is an intersection of two bit sets, so
//! nothing here is ever multiplied out over addresses, or over nodes times nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::attributes;
use super::bits::Bits;
use super::identity::{self, Atom, AtomId, Atoms};
use super::ports::{self, Ports, Protocol};
use super::problem::Spanned;
use super::resolve::{Extent, Resolver, Subjects};
use super::selector::{Autogroup, Selector};
use super::ssh;
use super::syntax::{Clause, Document, Icmp, Kind, Services};
use crate::netmap::{Action, PortRange, Rule};
use crate::node::{Node, NodeId, UserId};
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
    atoms: Arc<Atoms>,
}

/// Capability names, each with its values as JSON.
pub(super) type Apps = Vec<(String, Vec<String>)>;

/// Index into [`CompiledPolicy::classes`].
pub(super) type ClassId = usize;

/// Sources, one destination, and what may or may not be opened between them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Term {
    /// Index into [`CompiledPolicy::rules`], which is in the order of the text.
    pub(super) rule: usize,
    pub(super) action: Action,
    pub(super) services: Arc<[Service]>,
    /// Source and destination belong to one user: `autogroup:self`.
    pub(super) same_owner: bool,
    /// Grants capabilities: joins nodes even where it opens nothing.
    pub(super) grants_app: bool,
    src: Arc<[AtomId]>,
    /// Of which the source must have one, unless there are none.
    postures: Arc<[AtomId]>,
    dst: Destination,
    via: Arc<[AtomId]>,
}

impl Term {
    /// Holds only through the routers that it names.
    pub(super) fn is_via(&self) -> bool {
        !self.via.is_empty()
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Destination {
    Everything,
    One(AtomId),
}

/// Ports of one protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Service {
    pub(super) protocol: u8,
    pub(super) ports: PortRange,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Class {
    pub(super) identity: Identity,
    /// Which user's nodes these are, where a rule asks.
    pub(super) owner: Option<AtomId>,
    /// Terms that it is a source of, and a destination of.
    pub(super) src_terms: Bits,
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

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Twins {
    pub(super) classes: Vec<ClassId>,
    pub(super) nodes: BTreeSet<NodeId>,
}

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
    let atoms = atoms(&clauses, &resolver, subjects);
    let (rules, terms) = terms(document, &clauses, &atoms);
    let mut classes = Classes::default();
    let internet = resolver.internet();
    let exit_pieces = exit_pieces(&internet, &atoms);
    let mut nodes = BTreeMap::new();
    let mut addresses = BTreeMap::new();
    for node in subjects.nodes.values().filter(|node| !node.expired) {
        let placed = place(node, &atoms, &exit_pieces, &mut classes);
        addresses.extend(placed.addresses.map(|(address, _)| (address, node.id)));
        nodes.insert(node.id, placed);
    }
    let kinds = twins(&mut nodes);
    let world = [Ipv4Net::default().into(), Ipv6Net::default().into()]
        .map(|net| (net, classes.class(atoms.of_net(net))));
    let apps = clauses.iter().map(Clause::apps).collect();
    CompiledPolicy {
        apps: Arc::new(apps),
        attributes: Arc::new(attributes::of_all(document, &resolver, subjects)),
        ssh: Arc::new(ssh::compile(document, &resolver, subjects)),
        world,
        classes: Arc::new(classes.finish(&terms, &atoms)),
        rules: Arc::new(rules),
        terms: Arc::new(terms),
        nodes: Arc::new(nodes),
        addresses: Arc::new(addresses),
        kinds: Arc::new(kinds),
        atoms: Arc::new(atoms),
    }
}

impl CompiledPolicy {
    /// The class of any address, nobody's included, as far as policy itself decides it.
    pub(super) fn class_of(&self, subjects: &Subjects<'_>, address: IpAddr) -> Class {
        let net = IpNet::from(address);
        let node = self
            .addresses
            .get(&net)
            .and_then(|id| subjects.nodes.get(id));
        let key = match node {
            Some(node) => self.atoms.of_address(node, net),
            None => self.atoms.of_net(net),
        };
        TermIndex::of(&self.terms).class(&key, Identity::UNKNOWN, &self.terms, &self.atoms)
    }
}

/// The clauses of a document, or the one that stands for having none.
struct Clauses<'a> {
    default_posture: &'a [Spanned<String>],
    clauses: Vec<std::borrow::Cow<'a, Clause>>,
}

impl<'a> Clauses<'a> {
    fn of(document: &'a Document) -> Self {
        let written = document.clauses.iter().map(std::borrow::Cow::Borrowed);
        let implied = document
            .unrestricted
            .then(|| std::borrow::Cow::Owned(Clause::allow_all()));
        Self {
            default_posture: &document.default_posture,
            clauses: implied.into_iter().chain(written).collect(),
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Clause> {
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
fn via_text(tag: &crate::node::Tag) -> String {
    format!("via:{tag}")
}

fn atoms(clauses: &Clauses<'_>, resolver: &Resolver<'_>, subjects: &Subjects<'_>) -> Atoms {
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

fn terms(
    document: &Document,
    clauses: &Clauses<'_>,
    atoms: &Atoms,
) -> (Vec<(RuleId, Rule)>, Vec<Term>) {
    let mut rules = Vec::new();
    let mut terms = Vec::new();
    let mut said: BTreeMap<String, usize> = BTreeMap::new();
    for (index, clause) in clauses.iter().enumerate() {
        let summary = clause.summary();
        let occurrence = said.entry(summary.clone()).or_default();
        let id = identity::rule_id(&summary, *occurrence);
        *occurrence += 1;
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

fn exit_pieces(internet: &super::ipset::IpSet, atoms: &Atoms) -> Vec<IpNet> {
    let blocks = internet.prefixes();
    blocks
        .into_iter()
        .flat_map(|net| atoms.pieces(net))
        .collect()
}

fn place(node: &Node, atoms: &Atoms, exit_pieces: &[IpNet], classes: &mut Classes) -> Placed {
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
struct Classes {
    by_key: BTreeMap<Vec<AtomId>, ClassId>,
}

impl Classes {
    fn class(&mut self, key: Vec<AtomId>) -> ClassId {
        let next = self.by_key.len();
        *self.by_key.entry(key).or_insert(next)
    }

    fn finish(self, terms: &[Term], atoms: &Atoms) -> Vec<Class> {
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
        let index = TermIndex::of(terms);
        by_class
            .into_iter()
            .zip(identity::number(&texts))
            .map(|((_, key), identity)| index.class(&key, identity, terms, atoms))
            .collect()
    }
}

/// Terms by the selectors that they name.
#[derive(Default)]
struct TermIndex {
    everything: Bits,
    src: BTreeMap<AtomId, Bits>,
    dst: BTreeMap<AtomId, Bits>,
}

impl TermIndex {
    fn of(terms: &[Term]) -> Self {
        let mut index = Self::default();
        for (id, term) in terms.iter().enumerate() {
            for &src in term.src.iter() {
                index.src.entry(src).or_default().insert(id);
            }
            match term.dst {
                Destination::Everything => index.everything.insert(id),
                Destination::One(dst) => index.dst.entry(dst).or_default().insert(id),
            }
        }
        index
    }

    fn class(&self, key: &[AtomId], identity: Identity, terms: &[Term], atoms: &Atoms) -> Class {
        let mut src_terms = Bits::default();
        let mut dst_terms = self.everything.clone();
        for atom in key {
            if let Some(terms) = self.src.get(atom) {
                src_terms.union(terms);
            }
            if let Some(terms) = self.dst.get(atom) {
                dst_terms.union(terms);
            }
        }
        let any =
            |atoms: &[AtomId]| atoms.is_empty() || atoms.iter().any(|atom| key.contains(atom));
        let through = |id: &usize| any(&terms[*id].via);
        let fit = |id: &usize| any(&terms[*id].postures);
        let owner = key
            .iter()
            .copied()
            .find(|&atom| atoms.text(atom).starts_with("owner:"));
        Class {
            identity,
            owner,
            src_terms: src_terms.iter().filter(fit).collect(),
            dst_terms: dst_terms.iter().filter(through).collect(),
        }
    }
}

fn twins(nodes: &mut BTreeMap<NodeId, Placed>) -> Vec<Twins> {
    let mut by_classes: BTreeMap<Vec<ClassId>, BTreeSet<NodeId>> = BTreeMap::new();
    for (id, placed) in nodes.iter() {
        let classes: BTreeSet<ClassId> = placed.places().map(|(_, class)| class).collect();
        by_classes
            .entry(classes.into_iter().collect())
            .or_default()
            .insert(*id);
    }
    let kinds: Vec<Twins> = by_classes
        .into_iter()
        .map(|(classes, nodes)| Twins { classes, nodes })
        .collect();
    for (kind, twins) in kinds.iter().enumerate() {
        for id in &twins.nodes {
            if let Some(placed) = nodes.get_mut(id) {
                placed.kind = kind;
            }
        }
    }
    kinds
}
