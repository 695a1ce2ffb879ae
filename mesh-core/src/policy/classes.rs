//! Classes: the sets of selectors that addresses satisfy, and the rules that follow from each.
//!
//! A class is found once per *place*, a prefix that a node answers or routes for. What lies behind
//! a router is cut where some rule's prefix begins or ends, so that every address of a piece is of
//! one class when pieces are looked up by longest prefix.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use super::atoms::{AtomId, Atoms};
use super::bits::Bits;
use super::ground::Ground;
use super::identity::{self, Numbers};
use super::rules::Rules;
use super::slab::Slab;
use crate::Identity;
use crate::node::{Node, User, UserId};

/// Number of a class, for as long as somebody is of it.
pub(super) type ClassId = usize;

/// What an address is judged by.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Key {
    /// The selectors that it satisfies, ascending.
    pub(super) atoms: Vec<AtomId>,
    /// Whose node has it, where a rule asks.
    pub(super) owner: Option<UserId>,
}

impl Key {
    /// The same in every compile: the number of the class comes from it.
    fn text(&self, atoms: &Atoms) -> String {
        let owner = self.owner.map(|user| format!("owner:{user}"));
        let named = self.atoms.iter().map(|atom| atoms.text(*atom));
        let mut texts: Vec<&str> = named.chain(owner.as_deref()).collect();
        texts.sort_unstable();
        texts.join("\n")
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Class {
    pub(super) key: Arc<Key>,
    pub(super) identity: Identity,
    /// The number that it would have if nobody else wanted it.
    wanted: u32,
    /// Rules that it is a source of, and a destination of.
    pub(super) src_rules: Arc<Bits>,
    pub(super) dst_rules: Arc<Bits>,
}

impl Class {
    /// Of an address that nobody is told of.
    pub(super) fn unlisted(key: Key, rules: &Rules) -> Self {
        let (src_rules, dst_rules) = rules.applying(&key.atoms);
        Self {
            key: Arc::new(key),
            identity: Identity::UNKNOWN,
            wanted: 0,
            src_rules: Arc::new(src_rules),
            dst_rules: Arc::new(dst_rules),
        }
    }
}

/// All classes that somebody is of.
#[derive(Clone, Debug, Default)]
pub(super) struct Classes {
    all: Slab<Class>,
    by_key: BTreeMap<Arc<Key>, ClassId>,
    /// The classes of those who satisfy a selector, by selector.
    holders: Vec<Bits>,
    numbers: Numbers,
    /// Found since the last [`Self::judge`].
    fresh: Vec<ClassId>,
}

impl std::ops::Index<ClassId> for Classes {
    type Output = Class;

    fn index(&self, class: ClassId) -> &Class {
        &self.all[class]
    }
}

impl Classes {
    pub(super) fn iter(&self) -> impl Iterator<Item = (ClassId, &Class)> {
        self.all.iter()
    }

    /// The classes of those who satisfy a selector.
    pub(super) fn holders(&self, atom: AtomId) -> Option<&Bits> {
        self.holders.get(atom)
    }

    pub(super) fn class(&mut self, key: Key) -> ClassId {
        if let Some(class) = self.by_key.get(&key) {
            return *class;
        }
        let key = Arc::new(key);
        let nothing = Arc::new(Bits::default());
        let class = self.all.insert(Class {
            key: Arc::clone(&key),
            identity: Identity::UNKNOWN,
            wanted: 0,
            src_rules: Arc::clone(&nothing),
            dst_rules: nothing,
        });
        for atom in &key.atoms {
            if self.holders.len() <= *atom {
                self.holders.resize(*atom + 1, Bits::default());
            }
            self.holders[*atom].insert(class);
        }
        self.by_key.insert(key, class);
        self.fresh.push(class);
        class
    }

    /// Lets go of classes that nobody is of any more.
    pub(super) fn remove(&mut self, gone: &Bits) {
        for id in gone.iter() {
            let Some(class) = self.all.remove(id) else {
                continue;
            };
            self.by_key.remove(&class.key);
            for atom in &class.key.atoms {
                self.holders[*atom].remove(id);
            }
            self.numbers.remove(class.wanted);
        }
    }

    /// Finds the rules of new classes and of those in `stale`; both together are returned.
    pub(super) fn judge(&mut self, mut stale: Bits, rules: &Rules, atoms: &Atoms) -> Bits {
        let mut same: BTreeSet<Arc<Bits>> = BTreeSet::new();
        let fresh = std::mem::take(&mut self.fresh);
        for id in &fresh {
            stale.insert(*id);
        }
        for id in stale.iter() {
            let Some(class) = self.all.get_mut(id) else {
                continue;
            };
            // What many classes have in common is kept once.
            let (src, dst) = rules.applying(&class.key.atoms);
            [class.src_rules, class.dst_rules] = [src, dst].map(|bits| match same.get(&bits) {
                Some(known) => Arc::clone(known),
                None => {
                    let bits = Arc::new(bits);
                    same.insert(Arc::clone(&bits));
                    bits
                }
            });
        }
        for id in fresh {
            if let Some(class) = self.all.get_mut(id) {
                class.wanted = identity::wanted_by_class(&class.key.text(atoms));
                class.identity = Identity(class.wanted);
                self.numbers.add(class.wanted);
            }
        }
        stale
    }

    /// Settles who has which number. Tells whether somebody lost his to another, or got it back.
    pub(super) fn number(&mut self, clashed: bool, atoms: &Atoms) -> bool {
        if !clashed && !self.numbers.clash() {
            return false;
        }
        let mut wanted: Vec<(String, u32, ClassId)> = self
            .all
            .iter()
            .map(|(id, class)| (class.key.text(atoms), class.wanted, id))
            .collect();
        wanted.sort();
        let numbers = wanted.iter().map(|(_, wanted, _)| *wanted);
        let numbers = identity::settle(numbers, Identity::FIRST.0);
        for ((_, _, id), number) in wanted.into_iter().zip(numbers) {
            if let Some(class) = self.all.get_mut(id) {
                class.identity = Identity(number);
            }
        }
        true
    }

    pub(super) fn clash(&self) -> bool {
        self.numbers.clash()
    }
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

    /// The classes of its places, ascending.
    pub(super) fn classes(&self) -> Vec<ClassId> {
        let mut classes: Vec<ClassId> = self.places().map(|(_, class)| class).collect();
        classes.sort_unstable();
        classes.dedup();
        classes
    }
}

/// What places are found by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lookup<'a> {
    pub(super) atoms: &'a Atoms,
    pub(super) ground: &'a Ground,
    pub(super) users: &'a BTreeMap<UserId, Arc<User>>,
    /// Some rule asks whose node it is.
    pub(super) selfish: bool,
}

impl Lookup<'_> {
    /// Of a node's own address.
    pub(super) fn own_key(&self, node: &Node, address: IpNet) -> Key {
        let owner = node.owner.user();
        let user = owner.and_then(|owner| self.users.get(&owner));
        let user = user.map(AsRef::as_ref);
        Key {
            atoms: self.atoms.of_address(node, user, address, self.ground),
            // A user whom nobody knows owns nothing.
            owner: owner.filter(|_| self.selfish && user.is_some()),
        }
    }

    /// Of a prefix that is no node's own.
    pub(super) fn key(&self, net: IpNet) -> Key {
        Key {
            atoms: self.atoms.of_net(net, self.ground),
            owner: None,
        }
    }

    pub(super) fn exit_pieces(&self) -> Vec<IpNet> {
        let blocks = self.ground.internet.prefixes().into_iter();
        blocks
            .flat_map(|net| self.atoms.pieces(net, self.ground))
            .collect()
    }

    pub(super) fn place(
        &self,
        node: &Node,
        exit_pieces: &[IpNet],
        classes: &mut Classes,
    ) -> Placed {
        let routed_by: Vec<AtomId> = self.atoms.behind(node).collect();
        let mut behind = |net: IpNet| {
            let mut key = self.key(net);
            key.atoms.extend(&routed_by);
            key.atoms.sort_unstable();
            (net, classes.class(key))
        };
        let routes = node
            .serving_routes()
            .map(|route| {
                let pieces = self.atoms.pieces(route.trunc(), self.ground);
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
            .map(|address| (address, classes.class(self.own_key(node, address))));
        Placed {
            addresses,
            routes,
            exits,
            internet,
            owner: node.owner.user(),
            kind: 0,
        }
    }
}
