//! What a selector means in a given world: a set of addresses, or a property of nodes.
//!
//! Tags, users and groups mean the nodes' own addresses and never a subnet behind them; hosts and
//! raw addresses mean exactly what is written, one family.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use super::ipset::IpSet;
use super::selector::{Autogroup, Selector};
use super::syntax::Document;
use crate::node::{Node, NodeId, Tag, User, UserId};
use crate::world::{Pools, World};

/// Whom a policy is about.
#[derive(Clone, Copy, Debug)]
pub struct Subjects<'a> {
    pub users: &'a BTreeMap<UserId, Arc<User>>,
    pub nodes: &'a BTreeMap<NodeId, Arc<Node>>,
    pub pools: &'a Pools,
}

impl<'a> From<&'a World> for Subjects<'a> {
    fn from(world: &'a World) -> Self {
        Self {
            users: &world.users,
            nodes: &world.nodes,
            pools: &world.mesh.pools,
        }
    }
}

/// What a selector covers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Extent {
    /// These addresses, whoever has them.
    Addresses(IpSet),
    /// The own addresses of nodes of such an owner.
    Users(BTreeSet<UserId>),
    Tag(Tag),
    Member,
    Tagged,
}

impl Extent {
    /// Whether a node's own addresses are meant, as far as its owner decides that.
    pub(super) fn owns(&self, node: &Node) -> bool {
        match self {
            Self::Addresses(_) => false,
            Self::Users(users) => node.owner.user().is_some_and(|user| users.contains(&user)),
            Self::Tag(tag) => node.owner.tags().any(|own| own == tag),
            Self::Member => node.owner.user().is_some(),
            Self::Tagged => node.owner.user().is_none(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Resolver<'a> {
    document: &'a Document,
    subjects: Subjects<'a>,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(document: &'a Document, subjects: Subjects<'a>) -> Self {
        Self { document, subjects }
    }

    /// As a source; as a destination all but [`Selector::Any`] and `autogroup:self` mean the same.
    pub(super) fn extent(&self, selector: &Selector) -> Extent {
        match selector {
            Selector::Any => Extent::Addresses(self.mesh()),
            Selector::Prefix(net) => Extent::Addresses([*net].into_iter().collect()),
            Selector::Host(name) => {
                let net = self.document.hosts.get(name).map(|host| host.value);
                Extent::Addresses(net.into_iter().collect())
            }
            Selector::User(_) | Selector::Domain(_) => Extent::Users(self.users(selector)),
            Selector::Group(name) => {
                let members = self.document.groups.get(name);
                let users = members.into_iter().flat_map(|members| &members.value);
                Extent::Users(users.flat_map(|user| self.users(&user.value)).collect())
            }
            Selector::Tag(tag) => Extent::Tag(tag.clone()),
            Selector::Autogroup(Autogroup::Member | Autogroup::Own) => Extent::Member,
            Selector::Autogroup(Autogroup::Tagged) => Extent::Tagged,
            Selector::Autogroup(Autogroup::Internet) => Extent::Addresses(self.internet()),
            Selector::Autogroup(Autogroup::DangerAll) => Extent::Addresses(everything()),
            Selector::Autogroup(Autogroup::NonRoot | Autogroup::Role(_))
            | Selector::Idp(_)
            | Selector::IpSet(_) => Extent::Addresses(IpSet::default()),
        }
    }

    /// The users that a user selector names. None or several is the business of `check`.
    pub(super) fn users(&self, selector: &Selector) -> BTreeSet<UserId> {
        let users = self.subjects.users.values();
        match selector {
            Selector::User(name) => users
                .filter(|user| is_called(user, name))
                .map(|user| user.id)
                .collect(),
            Selector::Domain(domain) => users
                .filter(|user| {
                    let at = user.name.as_str().rsplit_once('@');
                    at.is_some_and(|(_, of)| of.eq_ignore_ascii_case(domain))
                })
                .map(|user| user.id)
                .collect(),
            _ => BTreeSet::new(),
        }
    }

    /// `*` as a source: the pools but for what is reserved, and every approved subnet route.
    fn mesh(&self) -> IpSet {
        let mut mesh: IpSet = self.subjects.pools.each().into_iter().collect();
        mesh.remove(Pools::reserved_v4().into());
        for node in self.subjects.nodes.values().filter(|node| !node.expired) {
            for route in node.serving_routes() {
                mesh.insert(route.trunc());
            }
        }
        mesh
    }

    /// What an exit node is asked for: everything but private and mesh addresses.
    pub(super) fn internet(&self) -> IpSet {
        let mut internet: IpSet = nets(&["0.0.0.0/0", "2000::/3"]).collect();
        for private in nets(&PRIVATE) {
            internet.remove(private);
        }
        for pool in self.subjects.pools.each() {
            internet.remove(pool);
        }
        internet
    }
}

/// RFC 1918, RFC 6598 and RFC 3927: never reached through an exit node.
const PRIVATE: [&str; 5] = [
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "169.254.0.0/16",
];

fn nets(texts: &'static [&str]) -> impl Iterator<Item = IpNet> {
    texts.iter().filter_map(|text| text.parse().ok())
}

fn everything() -> IpSet {
    nets(&["0.0.0.0/0", "::/0"]).collect()
}

/// `NAME@` means the user called NAME; anything else is the whole login.
fn is_called(user: &User, selector: &str) -> bool {
    let name = user.name.as_str();
    name.eq_ignore_ascii_case(selector)
        || selector
            .strip_suffix('@')
            .is_some_and(|short| name.eq_ignore_ascii_case(short))
}
