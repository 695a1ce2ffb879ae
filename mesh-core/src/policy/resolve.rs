//! What a selector means in a given world: a set of addresses, or a property of nodes.
//!
//! Tags, users and groups mean the nodes' own addresses and never a subnet behind them; hosts and
//! raw addresses mean exactly what is written, one family.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use super::ipset::IpSet;
use super::ipsets::{self, IpSets};
use super::posture;
use super::selector::{Autogroup, Selector};
use super::syntax::Document;
use crate::node::{HostInfo, Node, NodeId, Tag, User, UserId};
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

/// Whether policy can tell the node from what it was. Where it cannot, nothing changes for anybody.
pub fn tells_apart(old: &Node, new: &Node) -> bool {
    let Node {
        id,
        name: _,
        machine: _,
        key: _,
        owner,
        addresses,
        endpoints: _,
        advertised_routes,
        approved_routes,
        ephemeral: _,
        created,
        expires: _,
        expired,
        host:
            HostInfo {
                hostname: _,
                os,
                os_version,
                kernel,
                agent_version,
                backend: _,
            },
        attributes,
    } = new;
    let same = *id == old.id
        && *owner == old.owner
        && *addresses == old.addresses
        && *advertised_routes == old.advertised_routes
        && *approved_routes == old.approved_routes
        && *created == old.created
        && *expired == old.expired
        && *os == old.host.os
        && *os_version == old.host.os_version
        && *kernel == old.host.kernel
        && *agent_version == old.host.agent_version
        && *attributes == old.attributes;
    !same
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
    /// The own addresses of these nodes.
    Nodes(BTreeSet<NodeId>),
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
            Self::Nodes(nodes) => nodes.contains(&node.id),
        }
    }

    /// Whether the node is meant, by its owner or by one of its addresses.
    pub(super) fn covers(&self, node: &Node) -> bool {
        let mut addresses = node.addresses.prefixes().into_iter();
        self.owns(node) || addresses.any(|address| self.holds(address))
    }

    /// Whether the prefix is meant as such, whoever has it.
    pub(super) fn holds(&self, net: IpNet) -> bool {
        matches!(self, Self::Addresses(set) if set.contains_net(net))
    }
}

#[derive(Debug)]
pub(super) struct Resolver<'a> {
    document: &'a Document,
    subjects: Subjects<'a>,
    /// Users by their logins, lower case.
    logins: BTreeMap<String, BTreeSet<UserId>>,
    ip_sets: IpSets,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(document: &'a Document, subjects: Subjects<'a>) -> Self {
        let mut logins: BTreeMap<String, BTreeSet<UserId>> = BTreeMap::new();
        for user in subjects.users.values() {
            let login = user.name.as_str().to_lowercase();
            logins.entry(login).or_default().insert(user.id);
        }
        Self {
            document,
            subjects,
            logins,
            // `check` says what is wrong with sets that cannot be worked out.
            ip_sets: ipsets::resolve(document).unwrap_or_default(),
        }
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
            Selector::IpSet(name) => {
                Extent::Addresses(self.ip_sets.get(name).cloned().unwrap_or_default())
            }
            Selector::Autogroup(Autogroup::NonRoot | Autogroup::Role(_)) | Selector::Idp(_) => {
                Extent::Users(BTreeSet::new())
            }
        }
    }

    /// The nodes that have a posture: all of its conditions hold.
    pub(super) fn posture(&self, name: &str) -> Extent {
        let Some(conditions) = self.document.postures.get(name) else {
            return Extent::Nodes(BTreeSet::new());
        };
        let holds = |node: &&Arc<Node>| {
            let attributes = posture::attributes(node);
            let mut conditions = conditions.value.iter();
            conditions.all(|condition| condition.holds(&attributes))
        };
        let nodes = self.subjects.nodes.values().filter(holds);
        Extent::Nodes(nodes.map(|node| node.id).collect())
    }

    /// The users that a user selector names; `NAME@` means the user called NAME. None or several is the business of `check`.
    pub(super) fn users(&self, selector: &Selector) -> BTreeSet<UserId> {
        match selector {
            Selector::User(name) => {
                let name = name.to_lowercase();
                let short = name.strip_suffix('@').unwrap_or(&name);
                let known = [name.as_str(), short].map(|name| self.logins.get(name));
                known.into_iter().flatten().flatten().copied().collect()
            }
            Selector::Domain(domain) => self
                .logins
                .iter()
                .filter(|(login, _)| {
                    let of = login.rsplit_once('@').map(|(_, of)| of);
                    of.is_some_and(|of| of.eq_ignore_ascii_case(domain))
                })
                .flat_map(|(_, users)| users.iter().copied())
                .collect(),
            _ => BTreeSet::new(),
        }
    }

    /// `*` as a source: the pools but for what is reserved, and every approved subnet route.
    fn mesh(&self) -> IpSet {
        let mut mesh: IpSet = self.subjects.pools.each().into_iter().collect();
        mesh.remove(Pools::reserved_v4().into());
        let nodes = self.subjects.nodes.values().filter(|node| !node.expired);
        let routes = nodes.flat_map(|node| node.serving_routes().map(IpNet::trunc));
        mesh.alter(routes.collect(), true);
        mesh
    }

    /// What an exit node is asked for: everything but private and mesh addresses.
    pub(super) fn internet(&self) -> IpSet {
        let mut internet: IpSet = nets(&["0.0.0.0/0", "2000::/3"]).collect();
        internet.alter(nets(&PRIVATE).collect(), false);
        internet.alter(self.subjects.pools.each().into(), false);
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
