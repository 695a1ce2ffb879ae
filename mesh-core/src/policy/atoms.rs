//! The selectors that the rules name, each once, and how an address finds those that it satisfies.
//!
//! What is kept here follows from the text alone. Nobody is listed: a user is looked up by what the
//! login says of him, a node by its tags, an address by its prefixes. So nothing here changes when
//! people and nodes come and go; the one exception, `*`, is kept apart ([`super::ground`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use super::ground::Ground;
use super::ipset::bounds;
use super::posture;
use super::resolve::{Extent, People};
use super::slab::Slab;
use crate::node::{Node, Role, Tag, User};

/// Number of a selector, for as long as some rule names it.
pub(super) type AtomId = usize;

/// One selector, and what it covers.
#[derive(Clone, Debug)]
struct Atom {
    /// Canonical text, the same in every compile.
    text: Arc<str>,
    extent: Extent,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Atoms {
    all: Slab<Atom>,
    by_text: BTreeMap<Arc<str>, AtomId>,
    by_login: BTreeMap<String, Vec<AtomId>>,
    by_domain: BTreeMap<String, Vec<AtomId>>,
    by_idp: BTreeMap<String, Vec<AtomId>>,
    by_role: BTreeMap<Role, Vec<AtomId>>,
    by_tag: BTreeMap<Tag, Vec<AtomId>>,
    /// What lies behind routers of a tag, where `via` names it.
    by_router: BTreeMap<Tag, Vec<AtomId>>,
    member: Vec<AtomId>,
    tagged: Vec<AtomId>,
    postures: Vec<AtomId>,
    /// Every prefix that some set is made of, with those sets.
    cuts: BTreeMap<IpNet, Vec<AtomId>>,
    /// Lengths of those prefixes, by family and length, with how many there are.
    lengths: BTreeMap<(bool, u8), usize>,
    /// `*` as a source.
    any: Vec<AtomId>,
}

impl Atoms {
    pub(super) fn id(&self, text: &str) -> Option<AtomId> {
        self.by_text.get(text).copied()
    }

    pub(super) fn text(&self, atom: AtomId) -> &str {
        &self.all[atom].text
    }

    pub(super) fn extent(&self, atom: AtomId) -> &Extent {
        &self.all[atom].extent
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = AtomId> {
        self.all.iter().map(|(atom, _)| atom)
    }

    /// Whether some rule names `*` as a source.
    pub(super) fn names_any(&self) -> bool {
        !self.any.is_empty()
    }

    pub(super) fn insert(&mut self, text: &str, extent: Extent) -> AtomId {
        let text: Arc<str> = text.into();
        let atom = self.all.insert(Atom {
            text: Arc::clone(&text),
            extent: extent.clone(),
        });
        self.by_text.insert(text, atom);
        self.list(atom, &extent, Listing::Add);
        atom
    }

    pub(super) fn remove(&mut self, atom: AtomId) -> Option<Extent> {
        let Atom { text, extent } = self.all.remove(atom)?;
        self.by_text.remove(&text);
        self.list(atom, &extent, Listing::Remove);
        Some(extent)
    }

    /// The selector means something else from now on; what it meant is returned.
    pub(super) fn redefine(&mut self, atom: AtomId, extent: Extent) -> Option<Extent> {
        let known = self.all.get_mut(atom)?;
        let old = std::mem::replace(&mut known.extent, extent.clone());
        self.list(atom, &old, Listing::Remove);
        self.list(atom, &extent, Listing::Add);
        Some(old)
    }

    fn list(&mut self, atom: AtomId, extent: &Extent, listing: Listing) {
        match extent {
            Extent::Mesh => listing.apply(&mut self.any, atom),
            Extent::Addresses(set) => {
                for prefix in set.prefixes() {
                    listing.at(&mut self.cuts, &prefix, atom);
                    let family = (prefix.addr().is_ipv4(), prefix.prefix_len());
                    let many = self.lengths.entry(family).or_default();
                    match listing {
                        Listing::Add => *many += 1,
                        Listing::Remove => *many -= 1,
                    }
                    if *many == 0 {
                        self.lengths.remove(&family);
                    }
                }
            }
            Extent::People(people) => {
                let People {
                    logins,
                    domains,
                    idp_groups,
                    roles,
                } = people;
                for login in logins {
                    listing.at(&mut self.by_login, login, atom);
                }
                for domain in domains {
                    listing.at(&mut self.by_domain, domain, atom);
                }
                for group in idp_groups {
                    listing.at(&mut self.by_idp, group, atom);
                }
                for role in roles {
                    listing.at(&mut self.by_role, role, atom);
                }
            }
            Extent::Tag(tag) => listing.at(&mut self.by_tag, tag, atom),
            Extent::Behind(tag) => listing.at(&mut self.by_router, tag, atom),
            Extent::Member => listing.apply(&mut self.member, atom),
            Extent::Tagged => listing.apply(&mut self.tagged, atom),
            Extent::Posture(_) => listing.apply(&mut self.postures, atom),
        }
    }

    /// Those that a node's own address satisfies: by its owner, by what it is, and by itself.
    pub(super) fn of_address(
        &self,
        node: &Node,
        user: Option<&User>,
        address: IpNet,
        ground: &Ground,
    ) -> Vec<AtomId> {
        let mut atoms = self.of_net(address, ground);
        match node.owner.user() {
            Some(_) => {
                atoms.extend(&self.member);
                atoms.extend(user.into_iter().flat_map(|user| self.of_user(user)));
            }
            None => {
                atoms.extend(&self.tagged);
                let by_tag = node.owner.tags().filter_map(|tag| self.by_tag.get(tag));
                atoms.extend(by_tag.flatten());
            }
        }
        if !self.postures.is_empty() {
            let attributes = posture::attributes(node);
            let holds = |atom: &&AtomId| {
                matches!(self.extent(**atom), Extent::Posture(conditions)
                    if posture::holds(conditions, &attributes))
            };
            atoms.extend(self.postures.iter().filter(holds));
        }
        atoms.sort_unstable();
        atoms.dedup();
        atoms
    }

    fn of_user(&self, user: &User) -> impl Iterator<Item = AtomId> {
        let login = user.name.as_str().to_lowercase();
        let domain = login.rsplit_once('@').map(|(_, domain)| domain);
        let idp_groups = user.idp_groups.iter();
        let found = [
            self.by_login.get(&login),
            domain.and_then(|domain| self.by_domain.get(domain)),
            self.by_role.get(&user.role),
        ];
        let by_group = idp_groups.filter_map(|group| self.by_idp.get(group));
        let found = found.into_iter().flatten().chain(by_group);
        found.flatten().copied().collect::<Vec<_>>().into_iter()
    }

    /// Those that hold all of `net`. A set's prefixes are the widest that it is made of, so it is
    /// one of them, `net` itself or wider, that does.
    pub(super) fn of_net(&self, net: IpNet, ground: &Ground) -> Vec<AtomId> {
        let family = net.addr().is_ipv4();
        let lengths = self.lengths.range((family, 0)..=(family, net.prefix_len()));
        let mut atoms: Vec<AtomId> = lengths
            .filter_map(|((_, length), _)| {
                self.cuts
                    .get(&IpNet::new(net.addr(), *length).ok()?.trunc())
            })
            .flatten()
            .copied()
            .collect();
        if ground.holds(net) {
            atoms.extend(&self.any);
        }
        atoms.sort_unstable();
        atoms
    }

    /// What `via` grants call all that lies behind a router.
    pub(super) fn behind<'a>(&'a self, router: &'a Node) -> impl Iterator<Item = AtomId> + 'a {
        let tags = router.owner.tags();
        let atoms = tags.filter_map(|tag| self.by_router.get(tag));
        atoms.flatten().copied()
    }

    /// `net` and what policy cuts out of it: looked up by longest prefix, each address has its own.
    pub(super) fn pieces(&self, net: IpNet, ground: &Ground) -> Vec<IpNet> {
        let mut inner: BTreeSet<IpNet> =
            self.cuts.range(within(net)).map(|(cut, _)| *cut).collect();
        if self.names_any() {
            inner.extend(ground.cuts(net));
        }
        inner.remove(&net);
        let mut pieces = vec![net];
        pieces.extend(inner);
        pieces
    }
}

#[derive(Clone, Copy)]
enum Listing {
    Add,
    Remove,
}

impl Listing {
    fn apply(self, list: &mut Vec<AtomId>, atom: AtomId) {
        match self {
            Self::Add => list.push(atom),
            Self::Remove => list.retain(|known| *known != atom),
        }
    }

    fn at<K: Ord + Clone>(self, map: &mut BTreeMap<K, Vec<AtomId>>, key: &K, atom: AtomId) {
        match self {
            Self::Add => map.entry(key.clone()).or_default().push(atom),
            Self::Remove => {
                if let Some(list) = map.get_mut(key) {
                    self.apply(list, atom);
                    if list.is_empty() {
                        map.remove(key);
                    }
                }
            }
        }
    }
}

/// The keys of a map by prefix that lie within `net`: prefixes sort by address, then by length.
pub(super) fn within(net: IpNet) -> impl std::ops::RangeBounds<IpNet> {
    let (_, last) = bounds(net);
    let last = match net {
        IpNet::V4(_) => std::net::Ipv4Addr::from(u32::try_from(last).unwrap_or(u32::MAX)).into(),
        IpNet::V6(_) => std::net::IpAddr::from(std::net::Ipv6Addr::from(last)),
    };
    net..=IpNet::from(last)
}
