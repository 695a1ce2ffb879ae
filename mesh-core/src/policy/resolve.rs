//! What a selector means: a set of addresses, or a property of nodes and of the people who own them.
//!
//! Tags, users and groups mean the nodes' own addresses and never a subnet behind them; hosts and
//! raw addresses mean exactly what is written, one family.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use super::ground::{self, Ground, nets};
use super::ipset::IpSet;
use super::ipsets::{self, IpSets};
use super::posture::Condition;
use super::problem::Spanned;
use super::selector::{Autogroup, Selector};
use super::syntax::Document;
use crate::node::{HostInfo, Node, NodeId, Owner, Role, Tag, User, UserId};
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

/// What a selector covers, as far as the text says it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Extent {
    /// `*` as a source: the pools but for what is reserved, and every approved subnet route.
    Mesh,
    /// These addresses, whoever has them.
    Addresses(IpSet),
    /// The own addresses of nodes of such an owner.
    People(People),
    Tag(Tag),
    Member,
    Tagged,
    /// What lies behind the routers of a tag.
    Behind(Tag),
    /// The own addresses of nodes of which all of this holds.
    Posture(Vec<Condition>),
}

/// Users by what is known of them. Logins and domains are in lower case.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct People {
    pub(super) logins: BTreeSet<String>,
    pub(super) domains: BTreeSet<String>,
    pub(super) idp_groups: BTreeSet<String>,
    pub(super) roles: BTreeSet<Role>,
}

impl People {
    pub(super) fn hold(&self, user: &User) -> bool {
        let login = user.name.as_str().to_lowercase();
        let domain = login.rsplit_once('@').map(|(_, domain)| domain);
        self.logins.contains(&login)
            || domain.is_some_and(|domain| self.domains.contains(domain))
            || !self.idp_groups.is_disjoint(&user.idp_groups)
            || self.roles.contains(&user.role)
    }

    /// Takes in whom a selector of people names; `NAME@` means the user called NAME.
    fn name(&mut self, selector: &Selector) {
        match selector {
            Selector::User(name) => {
                let name = name.to_lowercase();
                if let Some(short) = name.strip_suffix('@') {
                    self.logins.insert(short.to_owned());
                }
                self.logins.insert(name);
            }
            Selector::Domain(domain) => drop(self.domains.insert(domain.to_lowercase())),
            Selector::Idp(name) => {
                let name = name.strip_prefix("idp:").unwrap_or(name);
                self.idp_groups.insert(name.to_owned());
            }
            Selector::Autogroup(Autogroup::Role(role)) => drop(self.roles.insert(*role)),
            _ => {}
        }
    }
}

impl Extent {
    /// Whether the own addresses of an owner's nodes are meant, as far as that decides it.
    pub(super) fn owns(&self, owner: &Owner, user: Option<&User>) -> bool {
        match self {
            Self::Mesh | Self::Addresses(_) | Self::Behind(_) | Self::Posture(_) => false,
            Self::People(people) => user.is_some_and(|user| people.hold(user)),
            Self::Tag(tag) => owner.tags().any(|own| own == tag),
            Self::Member => owner.user().is_some(),
            Self::Tagged => owner.user().is_none(),
        }
    }

    /// Whether the node is meant, by its owner or by one of its addresses.
    pub(super) fn covers(&self, node: &Node, user: Option<&User>, ground: &Ground) -> bool {
        let mut addresses = node.addresses.prefixes().into_iter();
        self.owns(&node.owner, user) || addresses.any(|address| self.holds(address, ground))
    }

    /// Whether the prefix is meant as such, whoever has it.
    pub(super) fn holds(&self, net: IpNet, ground: &Ground) -> bool {
        match self {
            Self::Mesh => ground.holds(net),
            Self::Addresses(set) => set.contains_net(net),
            _ => false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Resolver<'a> {
    document: &'a Document,
    ip_sets: IpSets,
    internet: IpSet,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(document: &'a Document, pools: &Pools) -> Self {
        Self {
            document,
            // `check` says what is wrong with sets that cannot be worked out.
            ip_sets: ipsets::resolve(document, pools).unwrap_or_default(),
            internet: ground::internet(pools),
        }
    }

    /// As a source; as a destination all but [`Selector::Any`] and `autogroup:self` mean the same.
    pub(super) fn extent(&self, selector: &Selector) -> Extent {
        match selector {
            Selector::Any => Extent::Mesh,
            Selector::Prefix(net) => Extent::Addresses([*net].into_iter().collect()),
            Selector::Host(name) => {
                let net = self.document.hosts.get(name).map(|host| host.value);
                Extent::Addresses(net.into_iter().collect())
            }
            Selector::User(_)
            | Selector::Domain(_)
            | Selector::Idp(_)
            | Selector::Autogroup(Autogroup::Role(_)) => {
                let mut people = People::default();
                people.name(selector);
                Extent::People(people)
            }
            Selector::Group(name) => {
                let mut people = People::default();
                let members = self.document.groups.get(name);
                for member in members.into_iter().flat_map(|members| &members.value) {
                    people.name(&member.value);
                }
                Extent::People(people)
            }
            Selector::Tag(tag) => Extent::Tag(tag.clone()),
            Selector::Autogroup(Autogroup::Member | Autogroup::Own) => Extent::Member,
            Selector::Autogroup(Autogroup::Tagged) => Extent::Tagged,
            Selector::Autogroup(Autogroup::Internet) => Extent::Addresses(self.internet.clone()),
            Selector::Autogroup(Autogroup::DangerAll) => {
                Extent::Addresses(nets(&["0.0.0.0/0", "::/0"]).collect())
            }
            Selector::IpSet(name) => {
                Extent::Addresses(self.ip_sets.get(name).cloned().unwrap_or_default())
            }
            // Logins of `ssh`; and people of other meshes, of whom there are none here.
            Selector::Autogroup(Autogroup::NonRoot | Autogroup::Shared) => {
                Extent::People(People::default())
            }
        }
    }

    pub(super) fn extents<'b>(
        &self,
        selectors: impl Iterator<Item = &'b Spanned<Selector>>,
    ) -> Vec<Extent> {
        selectors
            .map(|selector| self.extent(&selector.value))
            .collect()
    }

    /// The nodes that have a posture: all of its conditions hold. One that nobody defined holds of none.
    pub(super) fn posture(&self, name: &str) -> Extent {
        match self.document.postures.get(name) {
            Some(conditions) => Extent::Posture(conditions.value.clone()),
            None => Extent::People(People::default()),
        }
    }

    /// What a selector means that the text defines elsewhere; `None` for all others.
    pub(super) fn defined(&self, text: &str) -> Option<Extent> {
        if let Some(name) = text.strip_prefix(POSTURE) {
            return Some(self.posture(name));
        }
        match Selector::parse(text) {
            Ok(named @ (Selector::Group(_) | Selector::IpSet(_) | Selector::Host(_))) => {
                Some(self.extent(&named))
            }
            _ => None,
        }
    }
}

/// What a posture's name follows among selectors, none of which can look like that.
pub(super) const POSTURE: &str = "if ";
