//! A policy applied to a world: the part that is the same for every node, and how it is kept current.
//!
//! A *class* is a set of selectors that some address satisfies ([`super::classes`]). A *kind* is a
//! set of nodes with the same classes ([`super::kinds`]). Which rules join two classes is an
//! intersection of two bit sets, so nothing is ever multiplied out over addresses, or over nodes
//! times nodes.
//!
//! There is one way to compile, the change from what was compiled before; at first that is nothing.
//! A change is followed forward: which rules came or went, which selectors mean something else,
//! whose nodes satisfy others than before, which classes are judged by other rules, which kinds
//! reach or load anything else by it. What none of that leads to is shared with the compile before.
//! The numbers of things (slots) depend on the history; nothing that is ever shown does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::atoms::Atoms;
use super::attributes;
use super::bits::Bits;
use super::classes::{Class, ClassId, Classes, Key, Lookup, Placed};
use super::ground::Ground;
use super::ipset::IpSet;
use super::kinds::Kinds;
use super::posture;
use super::resolve::{Extent, Resolver, Subjects, tells_apart};
use super::rules::{Edit, Rules};
use super::ssh;
use super::syntax::Document;
use crate::node::{Node, NodeId, User, UserId};
use crate::world::Pools;

/// A policy applied to a world. Cheap to clone: everything is behind [`Arc`]s.
#[derive(Clone, Debug)]
pub struct CompiledPolicy {
    pub(super) rules: Arc<Rules>,
    atoms: Arc<Atoms>,
    pub(super) classes: Arc<Classes>,
    /// Nodes whose places are of the same classes see the same peers.
    pub(super) kinds: Arc<Kinds>,
    pub(super) nodes: Arc<BTreeMap<NodeId, Arc<Placed>>>,
    /// Every own address of a node that is not expired.
    pub(super) addresses: Arc<BTreeMap<IpNet, NodeId>>,
    pub(super) ground: Arc<Ground>,
    /// 0.0.0.0/0 and ::/0: sources that no peer stands for, where a rule takes in the whole world.
    pub(super) world: [(IpNet, ClassId); 2],
    /// Of an address of the mesh's own that no node has, as far as one is told: it is not the world.
    pub(super) nobody: ClassId,
    exit_pieces: Arc<Vec<IpNet>>,
    pub(super) attributes: Arc<Vec<attributes::Given>>,
    pub(super) ssh: Arc<Vec<ssh::Compiled>>,
    /// The world as policy saw it last.
    pub(super) users: Arc<BTreeMap<UserId, Arc<User>>>,
    pub(super) known: Arc<BTreeMap<NodeId, Arc<Node>>>,
}

/// Applies `document`, which [`super::check`] found good, to a world.
///
/// `prev` is any compile before, of whatever policy and world: what did not change since is taken
/// from it, so that the work is in proportion to what did. The result is the same without it.
/// Nodes and users that are the very same values behind their [`Arc`]s are not looked at.
pub fn compile(
    document: &Document,
    subjects: &Subjects<'_>,
    prev: Option<&CompiledPolicy>,
) -> CompiledPolicy {
    let prev = prev.filter(|prev| prev.ground.pools == *subjects.pools);
    let mut next = prev
        .cloned()
        .unwrap_or_else(|| CompiledPolicy::empty(*subjects.pools));
    next.update(document, subjects);
    next
}

impl CompiledPolicy {
    /// No rules and nobody to obey them.
    fn empty(pools: Pools) -> Self {
        let ground = Ground::new(pools);
        let mut classes = Classes::default();
        let nobody = classes.class(Key {
            atoms: Vec::new(),
            owner: Some(NOBODY),
        });
        Self {
            rules: Arc::default(),
            atoms: Arc::default(),
            classes: Arc::new(classes),
            kinds: Arc::default(),
            nodes: Arc::default(),
            addresses: Arc::default(),
            exit_pieces: Arc::new(ground.internet.prefixes()),
            ground: Arc::new(ground),
            world: WORLD.map(|net| (net, nobody)),
            nobody,
            attributes: Arc::default(),
            ssh: Arc::default(),
            users: Arc::default(),
            known: Arc::default(),
        }
    }

    fn update(&mut self, document: &Document, subjects: &Subjects<'_>) {
        let was_selfish = self.is_selfish();
        let mut change = Change {
            users: changed(&self.users, subjects.users, User::ne),
            nodes: changed(&self.known, subjects.nodes, tells_apart),
            ..Change::default()
        };
        let read = !self.rules.are_of(document);
        if read {
            let resolver = Resolver::new(document, subjects.pools);
            let rules = Arc::make_mut(&mut self.rules);
            change.edit = rules.read(document, &resolver, &mut self.atoms, subjects.pools);
            self.attributes = Arc::new(attributes::given(document, &resolver));
            self.ssh = Arc::new(ssh::compile(document, &resolver));
        }
        change.owners = was_selfish != self.is_selfish();
        let known = Arc::clone(&self.known);
        if !change.users.is_empty() {
            self.users = Arc::new(subjects.users.clone());
        }
        if !change.nodes.is_empty() {
            self.known = Arc::new(subjects.nodes.clone());
            self.survey(&known, &mut change);
        }
        if !read {
            self.renew_ssh(&known, &change);
        }
        let dirty = self.concerned(&change);
        self.place(&dirty, &change);
    }

    fn is_selfish(&self) -> bool {
        !self.rules.selfish.is_empty()
    }

    /// Follows nodes to the routes that they serve.
    fn survey(&mut self, before: &BTreeMap<NodeId, Arc<Node>>, change: &mut Change) {
        let of = |nodes: &'_ BTreeMap<NodeId, Arc<Node>>| -> Vec<Arc<Node>> {
            let changed = change.nodes.iter();
            changed.filter_map(|id| nodes.get(id).cloned()).collect()
        };
        let (gone, come) = (of(before), of(&self.known));
        let routes = gone
            .iter()
            .chain(&come)
            .any(|node| !node.approved_routes.is_empty());
        if routes {
            let gone = gone.iter().map(AsRef::as_ref);
            let come = come.iter().map(AsRef::as_ref);
            change.mesh = Arc::make_mut(&mut self.ground).change(gone, come);
        }
    }

    /// The nodes that may have to be placed anew.
    fn concerned(&self, change: &Change) -> BTreeSet<NodeId> {
        let mut dirty = change.nodes.clone();
        let mut users = change.users.clone();
        let mut owned: Vec<(Option<&Extent>, Option<&Extent>)> = Vec::new();
        for (old, new) in &change.edit.meanings {
            match (old, new) {
                (
                    Some(Extent::Addresses(_) | Extent::Mesh) | None,
                    Some(Extent::Addresses(_) | Extent::Mesh),
                )
                | (Some(Extent::Addresses(_) | Extent::Mesh), None) => {}
                (Some(Extent::People(_)) | None, Some(Extent::People(_)))
                | (Some(Extent::People(_)), None) => {
                    let hold = |extent: &Option<Extent>, user: &User| matches!(extent, Some(Extent::People(people)) if people.hold(user));
                    let turned = self.users.values();
                    let turned = turned.filter(|user| hold(old, user) != hold(new, user));
                    users.extend(turned.map(|user| user.id));
                }
                (old, new) => owned.push((old.as_ref(), new.as_ref())),
            }
        }
        let prefixes = self.moved_prefixes(change);
        let quiet = users.is_empty() && owned.is_empty() && !change.owners;
        if quiet && prefixes == IpSet::default() {
            return dirty;
        }
        let concerned = |node: &&Arc<Node>| {
            let owner = node.owner.user();
            owner.is_some_and(|owner| change.owners || users.contains(&owner))
                || owned
                    .iter()
                    .any(|(old, new)| self.means(*old, node) != self.means(*new, node))
                || node
                    .addresses
                    .prefixes()
                    .into_iter()
                    .any(|net| prefixes.overlaps(net))
                || node.serving_routes().any(|net| prefixes.overlaps(*net))
        };
        let live = self.known.values().filter(|node| !node.expired);
        dirty.extend(live.filter(concerned).map(|node| node.id));
        dirty
    }

    fn means(&self, extent: Option<&Extent>, node: &Node) -> bool {
        match extent {
            None => false,
            Some(Extent::Behind(tag)) => node.owner.tags().any(|own| own == tag),
            Some(Extent::Posture(conditions)) => {
                posture::holds(conditions, &posture::attributes(node))
            }
            Some(extent) => extent.owns(&node.owner, self.user_of(node)),
        }
    }

    /// The prefixes that some selector begins or ceases to be made of.
    fn moved_prefixes(&self, change: &Change) -> IpSet {
        let mut moved: Vec<IpNet> = Vec::new();
        let mut turned = false;
        for (old, new) in &change.edit.meanings {
            let [old, new] = [old, new].map(|extent| match extent {
                Some(Extent::Addresses(set)) => set.prefixes().into_iter().collect(),
                _ => BTreeSet::new(),
            });
            moved.extend(old.symmetric_difference(&new));
        }
        for (old, new) in &change.edit.meanings {
            turned |= matches!(
                (old, new),
                (Some(Extent::Mesh), _) | (_, Some(Extent::Mesh))
            );
        }
        if turned {
            moved.extend(self.ground.all_cuts());
        }
        if turned || self.atoms.names_any() {
            moved.extend(&change.mesh);
        }
        moved.into_iter().collect()
    }

    /// Finds the places of nodes again, and follows what comes of it to classes and kinds.
    fn place(&mut self, dirty: &BTreeSet<NodeId>, change: &Change) {
        let prefixes = self.moved_prefixes(change);
        let mut dirty = dirty.clone();
        let mut internet = self.ground.internet.prefixes().into_iter();
        if internet.any(|net| prefixes.overlaps(net)) {
            self.exit_pieces = Arc::new(self.lookup().exit_pieces());
            dirty.extend(&self.ground.exits);
        }
        let classes = Arc::make_mut(&mut self.classes);
        let clashed = classes.clash();
        let lookup = Lookup {
            atoms: &self.atoms,
            ground: &self.ground,
            users: &self.users,
            selfish: !self.rules.selfish.is_empty(),
        };
        let old_world = self.world;
        self.world = WORLD.map(|net| (net, classes.class(lookup.key(net))));
        let mut moved = Default::default();
        if !dirty.is_empty() {
            let nodes = Arc::make_mut(&mut self.nodes);
            let addresses = Arc::make_mut(&mut self.addresses);
            let kinds = Arc::make_mut(&mut self.kinds);
            for id in &dirty {
                if let Some(placed) = nodes.remove(id) {
                    for (address, _) in &placed.addresses {
                        addresses.remove(address);
                    }
                    kinds.leave(*id, placed.kind);
                }
            }
            for id in &dirty {
                let Some(node) = self.known.get(id).filter(|node| !node.expired) else {
                    continue;
                };
                let mut placed = lookup.place(node, &self.exit_pieces, classes);
                placed.kind = kinds.join(*id, placed.classes());
                addresses.extend(placed.addresses.map(|(address, _)| (address, *id)));
                nodes.insert(*id, Arc::new(placed));
            }
            moved = kinds.settle(nodes);
        }
        let left = moved.left().chain(old_world.map(|(_, class)| class));
        let world = self.world.map(|(_, class)| class);
        let in_use = |class: &ClassId| {
            self.kinds.have(*class) || world.contains(class) || *class == self.nobody
        };
        let dead: Bits = left.filter(|class| !in_use(class)).collect();
        classes.remove(&dead);
        let edit = &change.edit;
        let stale: Bits = if edit.everybody {
            classes.iter().map(|(class, _)| class).collect()
        } else {
            let mut stale = Bits::default();
            for holders in edit.judged.iter().filter_map(|atom| classes.holders(atom)) {
                stale.union(holders);
            }
            stale
        };
        let judged = classes.judge(stale, &self.rules, &self.atoms);
        let renumbered = classes.number(clashed, &self.atoms);
        let kinds = Arc::make_mut(&mut self.kinds);
        kinds.judge(&moved, &judged, &dead, &self.rules, classes);
        if renumbered || self.world != old_world {
            kinds.forget();
        }
    }

    /// Sources of SSH rules are found when asked for; those that can have changed are asked again.
    fn renew_ssh(&mut self, before: &BTreeMap<NodeId, Arc<Node>>, change: &Change) {
        let everybody = !change.users.is_empty() || !change.mesh.is_empty();
        if self.ssh.is_empty() || (!everybody && change.nodes.is_empty()) {
            return;
        }
        let ids = change.nodes.iter();
        let nodes: Vec<&Arc<Node>> = ids
            .flat_map(|id| [before.get(id), self.known.get(id)])
            .flatten()
            .collect();
        let concerns = |clause: &ssh::Compiled| {
            everybody
                || nodes
                    .iter()
                    .any(|node| clause.names(node, self.user_of(node), &self.ground))
        };
        let renewed = self.ssh.iter().map(|clause| match concerns(clause) {
            true => clause.anew(),
            false => clause.clone(),
        });
        self.ssh = Arc::new(renewed.collect());
    }

    pub(super) fn user_of(&self, node: &Node) -> Option<&User> {
        let user = self.users.get(&node.owner.user()?)?;
        Some(user)
    }

    fn lookup(&self) -> Lookup<'_> {
        Lookup {
            atoms: &self.atoms,
            ground: &self.ground,
            users: &self.users,
            selfish: self.is_selfish(),
        }
    }

    /// What an address is judged by, nobody's included, as far as policy itself decides it.
    pub(super) fn key_of(&self, address: IpAddr) -> Key {
        let net = IpNet::from(address);
        let owner = self.addresses.get(&net);
        match owner.and_then(|id| self.known.get(id)) {
            Some(node) => self.lookup().own_key(node, net),
            None => self.lookup().key(net),
        }
    }

    pub(super) fn class_of(&self, key: &Key) -> Class {
        Class::unlisted(key.clone(), &self.rules)
    }
}

const WORLD: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::UNSPECIFIED, 0)),
    IpNet::V6(Ipv6Net::new_assert(std::net::Ipv6Addr::UNSPECIFIED, 0)),
];

/// No user: they count up from one.
const NOBODY: UserId = UserId(u64::MAX);

/// What is otherwise than at the compile before.
#[derive(Debug, Default)]
struct Change {
    edit: Edit,
    users: BTreeSet<UserId>,
    nodes: BTreeSet<NodeId>,
    /// Prefixes that `*` as a source gained or lost.
    mesh: Vec<IpNet>,
    /// Rules begin or cease to ask whose nodes they join.
    owners: bool,
}

/// The keys of values that came, went, or differ by `differ`.
fn changed<K: Ord + Copy, V>(
    old: &BTreeMap<K, Arc<V>>,
    new: &BTreeMap<K, Arc<V>>,
    differ: impl Fn(&V, &V) -> bool,
) -> BTreeSet<K> {
    let mut changed = BTreeSet::new();
    let mut old = old.iter().peekable();
    for (key, value) in new {
        while let Some((gone, _)) = old.next_if(|(known, _)| *known < key) {
            changed.insert(*gone);
        }
        match old.next_if(|(known, _)| *known == key) {
            Some((_, known)) if Arc::ptr_eq(known, value) || !differ(known, value) => {}
            _ => drop(changed.insert(*key)),
        }
    }
    changed.extend(old.map(|(gone, _)| *gone));
    changed
}
