//! What a person calls the two ends of a flow, and which addresses that means.
//!
//! A tag may mean a thousand nodes. Policy judges nodes of one kind alike, so one of each stands
//! for the others and is asked about.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::node::{Node, NodeId, User};
use crate::policy::classes::ClassId;
use crate::policy::compile::CompiledPolicy;
use crate::policy::kinds::KindId;
use crate::policy::ports;
use crate::policy::resolve::{Extent, Resolver, Subjects};
use crate::policy::selector::{Autogroup, Selector};
use crate::policy::ssh::SshRule;
use crate::policy::syntax::Document;
use crate::world::World;

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unanswerable {
    #[error("{0}")]
    Malformed(String),
    /// It names nobody.
    #[error("{0}")]
    Unknown(String),
}

/// Answers questions about a policy in a world.
#[derive(Debug)]
pub struct Explainer<'a> {
    pub(in crate::policy) document: &'a Document,
    pub(in crate::policy) compiled: &'a CompiledPolicy,
    pub(in crate::policy) subjects: Subjects<'a>,
    pub(super) resolver: Resolver<'a>,
    domain: &'a str,
}

/// One end of a flow: nodes that policy judges alike, or an address that is no node's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::policy) struct End {
    /// The first stands for all.
    pub(in crate::policy) nodes: Vec<NodeId>,
    /// Of the first node; what was asked about where it was an address.
    pub(in crate::policy) addresses: Vec<IpAddr>,
    /// What lies behind a router, where the end is no node.
    pub(in crate::policy) net: Option<IpNet>,
}

/// `DST:PORT/PROTO`, taken apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Service<'a> {
    pub(super) host: &'a str,
    pub(super) protocol: u8,
    /// The type of an ICMP message.
    pub(super) port: u16,
}

/// How many pairs of ends one question may be about.
pub(super) const MOST_PAIRS: usize = 4096;

impl<'a> Explainer<'a> {
    pub fn new(world: &'a World, document: &'a Document, compiled: &'a CompiledPolicy) -> Self {
        let subjects = Subjects::from(world);
        Self {
            document,
            compiled,
            subjects,
            resolver: Resolver::new(document, subjects.pools),
            domain: &world.mesh.domain,
        }
    }

    pub(in crate::policy) fn node(&self, id: NodeId) -> Option<&'a Arc<Node>> {
        self.subjects.nodes.get(&id)
    }

    pub(super) fn user(&self, node: &Node) -> Option<&'a User> {
        let user = self.subjects.users.get(&node.owner.user()?)?;
        Some(user)
    }

    /// A node, an address, a tag, a user, a group, a host.
    pub(super) fn ends(&self, text: &str) -> Result<Vec<End>, Unanswerable> {
        let text = text.trim();
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        let selector = Selector::parse(bare).map_err(Unanswerable::Malformed)?;
        let ends = match &selector {
            Selector::Host(name) => match self.named(name) {
                Some(node) if node.expired => {
                    return Err(Unanswerable::Unknown(format!(
                        "{} has expired: nobody sees it, and it sees nobody",
                        node.name
                    )));
                }
                Some(node) => vec![self.of_nodes(vec![node.id])],
                None => self.of_extent(&self.resolver.extent(&selector)),
            },
            Selector::Prefix(net) if net.prefix_len() == net.max_prefix_len() => {
                vec![self.of_address(net.addr())]
            }
            Selector::Autogroup(Autogroup::Own | Autogroup::NonRoot | Autogroup::DangerAll) => {
                return Err(Unanswerable::Malformed(format!(
                    "{selector} is no node: name a node, an address, a tag, a user, a group or a host"
                )));
            }
            selector => self.of_extent(&self.resolver.extent(selector)),
        };
        match ends.is_empty() {
            true => Err(Unanswerable::Unknown(self.nobody(&selector))),
            false => Ok(ends),
        }
    }

    fn nobody(&self, selector: &Selector) -> String {
        match selector {
            Selector::Host(name) => {
                format!("no node and no host of the policy is called {name:?}")
            }
            Selector::Tag(tag) if !self.document.tag_owners.contains_key(tag) => {
                format!("no node has {tag}, and the policy does not define it")
            }
            Selector::Tag(tag) => format!("no node has {tag}"),
            Selector::User(_) | Selector::Domain(_) | Selector::Idp(_) => {
                format!("{selector} has no node")
            }
            Selector::Group(name) if !self.document.groups.contains_key(name) => {
                format!("the policy has no {name}")
            }
            Selector::Group(name) => match self.document.groups[name].value.is_empty() {
                true => format!("{name} has no members"),
                false => format!("nobody of {name} has a node"),
            },
            Selector::Autogroup(Autogroup::Member | Autogroup::Role(_)) => {
                format!("nobody of {selector} has a node")
            }
            Selector::IpSet(name) if !self.document.ip_sets.contains_key(name) => {
                format!("the policy has no {name}")
            }
            selector => format!("{selector} means no node and no route of this mesh"),
        }
    }

    /// By name, with or without the mesh's domain, or by number.
    fn named(&self, text: &str) -> Option<&'a Arc<Node>> {
        let lower = text.trim_end_matches('.').to_ascii_lowercase();
        let name = lower
            .strip_suffix(self.domain)
            .and_then(|name| name.strip_suffix('.'))
            .unwrap_or(&lower);
        let mut nodes = self.subjects.nodes.values();
        let by_number = || self.node(NodeId(name.parse().ok()?));
        nodes
            .find(|node| node.name.as_str() == name)
            .or_else(by_number)
    }

    pub(in crate::policy) fn of_nodes(&self, nodes: Vec<NodeId>) -> End {
        let first = nodes.first().and_then(|id| self.node(*id));
        End {
            addresses: first.map_or_else(Vec::new, |node| node.addresses.each().to_vec()),
            nodes,
            net: None,
        }
    }

    fn of_address(&self, address: IpAddr) -> End {
        End {
            nodes: self.compiled.owner(address).into_iter().collect(),
            addresses: vec![address],
            net: None,
        }
    }

    fn of_extent(&self, extent: &Extent) -> Vec<End> {
        let nodes = self.subjects.nodes.values();
        let covered = nodes.filter(|node| {
            !node.expired && extent.covers(node, self.user(node), &self.compiled.ground)
        });
        let mut ends = self.alike(covered.map(|node| node.id));
        let Extent::Addresses(set) = extent else {
            return ends;
        };
        let prefixes = set.prefixes();
        let pieces = self.pieces().into_keys();
        let inside = pieces.flat_map(|net| {
            let overlap = move |prefix: &&IpNet| net.contains(*prefix) || prefix.contains(&net);
            let overlaps = prefixes.iter().filter(overlap);
            overlaps.map(move |prefix| if prefix.contains(&net) { net } else { *prefix })
        });
        ends.extend(End::behind(&inside.collect()));
        if ends.is_empty()
            && let [only] = prefixes[..]
        {
            ends.push(self.of_address(only.addr()));
        }
        ends
    }

    /// What lies behind routers and exit nodes, each piece once, with who routes it first.
    pub(in crate::policy) fn pieces(&self) -> BTreeMap<IpNet, NodeId> {
        let mut pieces = BTreeMap::new();
        for (id, placed) in self.compiled.nodes.iter() {
            let behind = placed.routes.values().flatten().chain(&placed.internet);
            for (net, _) in behind {
                pieces.entry(*net).or_insert(*id);
            }
        }
        pieces
    }

    /// Nodes sorted into ends: whom policy cannot tell apart stands together.
    pub(super) fn alike(&self, nodes: impl Iterator<Item = NodeId>) -> Vec<End> {
        let mut kinds: BTreeMap<_, Vec<NodeId>> = BTreeMap::new();
        for id in nodes {
            kinds.entry(self.kind(id)).or_default().push(id);
        }
        let mut ends: Vec<End> = kinds.into_values().map(|ids| self.of_nodes(ids)).collect();
        ends.sort_by_key(|end| end.nodes.first().copied());
        ends
    }

    /// What policy sees of a node; the same for whom it cannot tell apart.
    pub(in crate::policy) fn kind(&self, id: NodeId) -> Option<(KindId, [ClassId; 2])> {
        let placed = self.compiled.nodes.get(&id)?;
        Some((placed.kind, placed.addresses.map(|(_, class)| class)))
    }

    /// One end for each owner.
    pub(in crate::policy) fn by_owner(&self) -> Vec<End> {
        let mut owners: BTreeMap<String, Vec<NodeId>> = BTreeMap::new();
        for node in self.ids().filter_map(|id| self.node(id)) {
            owners.entry(self.owner(node)).or_default().push(node.id);
        }
        owners.into_values().map(|ids| self.of_nodes(ids)).collect()
    }

    pub(in crate::policy) fn logins(&self, node: NodeId) -> Vec<SshRule> {
        self.compiled.ssh(node)
    }

    pub(in crate::policy) fn file(&self) -> Arc<str> {
        Arc::clone(&self.document.file)
    }

    /// Everybody who is not expired.
    pub(in crate::policy) fn ids(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.compiled.nodes.keys().copied()
    }

    pub(super) fn everybody(&self) -> Vec<End> {
        self.alike(self.ids())
    }
}

impl End {
    /// One end for each prefix, with an address that is in none of the narrower ones.
    pub(in crate::policy) fn behind(nets: &BTreeSet<IpNet>) -> Vec<Self> {
        let end = |net: &IpNet| {
            let narrower = nets
                .iter()
                .filter(|other| *other != net && net.contains(*other));
            let mut holes: Vec<IpNet> = narrower.copied().collect();
            holes.sort();
            let mut address = net.addr();
            for hole in holes {
                if hole.contains(&address) {
                    address = after(hole)?;
                }
            }
            net.contains(&address).then(|| Self {
                nodes: Vec::new(),
                addresses: vec![address],
                net: Some(*net),
            })
        };
        nets.iter().filter_map(end).collect()
    }
}

/// The address behind the last of a prefix.
fn after(net: IpNet) -> Option<IpAddr> {
    match net.broadcast() {
        IpAddr::V4(last) => u32::from(last)
            .checked_add(1)
            .map(|next| IpAddr::V4(next.into())),
        IpAddr::V6(last) => u128::from(last)
            .checked_add(1)
            .map(|next| IpAddr::V6(next.into())),
    }
}

impl<'a> Service<'a> {
    /// `HOST:PORT`, `HOST:PORT/PROTO`, `HOST/icmp`; TCP where no protocol is given.
    pub(super) fn parse(text: &'a str) -> Result<Self, Unanswerable> {
        let text = text.trim();
        let wrong = |why: &str| {
            Unanswerable::Malformed(format!(
                "{text:?}: {why}; write DST:PORT/PROTO, such as db:5432/tcp, [fd7a::1]:53/udp or web/icmp"
            ))
        };
        // A slash may also belong to a prefix: 10.0.0.0/8:22.
        let (place, protocol) = match text.rsplit_once('/') {
            Some((place, name)) if !name.contains([':', ']']) => {
                let protocol = ports::parse_protocol(name).map_err(|error| wrong(&error))?;
                (place, protocol.unwrap_or(ports::TCP))
            }
            _ => (text, ports::TCP),
        };
        let (host, port) = split_port(place);
        let port = match port {
            Some(port) if port != "*" => match port.parse() {
                Ok(port) => port,
                Err(_) => return Err(wrong("a port is a number from 1 to 65535")),
            },
            _ if ports::has_ports(Some(protocol)) => return Err(wrong("it names no port")),
            _ => echo(protocol),
        };
        Ok(Self {
            host,
            protocol,
            port,
        })
    }

    /// The same in the other family: a ping is a ping.
    pub(super) fn in_family(&self, v4: bool) -> Option<(u8, u16)> {
        match self.protocol {
            ports::ICMP if !v4 && self.port == echo(ports::ICMP) => {
                Some((ports::ICMPV6, echo(ports::ICMPV6)))
            }
            ports::ICMP if !v4 => None,
            ports::ICMPV6 if v4 => None,
            protocol => Some((protocol, self.port)),
        }
    }
}

/// `HOST` and `PORT`, where there is a port.
fn split_port(place: &str) -> (&str, Option<&str>) {
    let whole = (place, None);
    if place.parse::<IpAddr>().is_ok() {
        return whole;
    }
    match place.rsplit_once(':') {
        Some(("tag" | "group" | "autogroup" | "ipset" | "idp", _)) => whole,
        Some((host, port)) if port == "*" || port.bytes().all(|byte| byte.is_ascii_digit()) => {
            (host, Some(port))
        }
        _ => whole,
    }
}

/// ICMP type of an echo request (RFC 792; RFC 4443, section 4.1); nothing of other protocols.
fn echo(protocol: u8) -> u16 {
    match protocol {
        ports::ICMP => 8,
        ports::ICMPV6 => 128,
        _ => 0,
    }
}
