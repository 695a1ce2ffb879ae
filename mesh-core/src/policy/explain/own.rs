//! The same questions, answered by a node from its own netmap.
//!
//! A node is told of nothing but the flows that it is an end of, so this answers for those alone,
//! and `None` where the question is about others. What the far end says it cannot know.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::ends::{Service, Unanswerable};
use super::flow::{AtEnd, Explanation, Judged, Reason};
use super::reach::{Reach, Row};
use super::words;
use crate::netmap::{Action, Entry, EntryKey, Netmap, Peer, PortRange, Rule};
use crate::node::{Name, Tag, UserName};
use crate::policy::selector::Selector;
use crate::{Direction, Identity};

/// What a node knows by a name.
enum Known<'a> {
    Me,
    Peer(&'a Peer),
    Address(IpAddr),
}

/// `policy explain`, where this node is one of the ends.
pub fn explain_own(
    netmap: &Netmap,
    src: &str,
    dst: &str,
) -> Result<Option<Explanation>, Unanswerable> {
    let service = Service::parse(dst)?;
    let (Some(from), Some(to)) = (known(netmap, src), known(netmap, service.host)) else {
        return Ok(None);
    };
    let (direction, far) = match (is_me(netmap, &from), is_me(netmap, &to)) {
        (true, true) => {
            return Err(Unanswerable::Malformed(
                "that is this node itself: what it sends to itself is not judged".to_owned(),
            ));
        }
        (true, false) => (Direction::Egress, &to),
        (false, true) => (Direction::Ingress, &from),
        (false, false) => return Ok(None),
    };
    let mut flows: Vec<Judged> = Vec::new();
    for src in addresses(netmap, &from) {
        let same_family = |dst: &IpAddr| dst.is_ipv4() == src.is_ipv4();
        for dst in addresses(netmap, &to).into_iter().filter(same_family) {
            let Some((protocol, port)) = service.in_family(src.is_ipv4()) else {
                continue;
            };
            let (own, turn) = judge(netmap, direction, (src, dst), (protocol, port));
            let elsewhere = AtEnd {
                node: far_end(netmap, far),
                action: own.action,
                reason: Reason::Elsewhere,
            };
            let accepted = own.action == Action::Accept;
            let (egress, ingress) = match direction {
                Direction::Egress => (own, elsewhere),
                Direction::Ingress => (elsewhere, own),
            };
            let next = Judged {
                src: label(netmap, &from),
                dst: label(netmap, &to),
                addresses: vec![(src, dst)],
                service: words::service(protocol, port),
                accepted,
                egress,
                ingress,
                turn,
            };
            match flows.iter_mut().find(|known| known.says_like(&next)) {
                Some(known) => known.addresses.extend(next.addresses),
                None => flows.push(next),
            }
        }
    }
    match flows.is_empty() {
        true => Err(Unanswerable::Malformed(
            "the two share no address family".to_owned(),
        )),
        false => Ok(Some(Explanation { flows })),
    }
}

/// `policy who-can`, where the destination is this node.
pub fn who_can_reach_me(netmap: &Netmap, dst: &str) -> Result<Option<Reach>, Unanswerable> {
    let service = Service::parse(dst)?;
    match known(netmap, service.host) {
        Some(to) if is_me(netmap, &to) => {}
        _ => return Ok(None),
    }
    Ok(Some(reach(
        netmap,
        Direction::Ingress,
        |v4, protocol, ports| {
            let asked = service.in_family(v4);
            asked.is_some_and(|(wanted, port)| wanted == protocol && ports.contains(port))
        },
    )))
}

/// `policy what-can`, where the source is this node.
pub fn what_can_i_reach(netmap: &Netmap, src: &str) -> Option<Reach> {
    match known(netmap, src) {
        Some(from) if is_me(netmap, &from) => {
            Some(reach(netmap, Direction::Egress, |_, _, _| true))
        }
        _ => None,
    }
}

// === whom it knows ===

fn known<'a>(netmap: &'a Netmap, text: &str) -> Option<Known<'a>> {
    let bare = text.trim().trim_start_matches('[').trim_end_matches(']');
    match Selector::parse(bare).ok()? {
        Selector::Prefix(net) if net.prefix_len() == net.max_prefix_len() => {
            Some(Known::Address(net.addr()))
        }
        Selector::Host(text) => {
            let lower = text.trim_end_matches('.').to_ascii_lowercase();
            let name = lower.strip_suffix(&netmap.mesh.domain);
            let name = name.and_then(|name| name.strip_suffix('.'));
            let name = name.unwrap_or(&lower);
            if netmap.me.name.as_str() == name {
                return Some(Known::Me);
            }
            let mut peers = netmap.peers.values();
            let peer = peers.find(|peer| peer.name.as_str() == name);
            peer.map(Known::Peer)
        }
        _ => None,
    }
}

fn is_me(netmap: &Netmap, known: &Known<'_>) -> bool {
    match known {
        Known::Me => true,
        Known::Peer(_) => false,
        Known::Address(address) => netmap.me.addresses.contains(*address),
    }
}

fn addresses(netmap: &Netmap, known: &Known<'_>) -> Vec<IpAddr> {
    match known {
        Known::Me => netmap.me.addresses.each().to_vec(),
        Known::Peer(peer) => peer.addresses.each().to_vec(),
        Known::Address(address) => vec![*address],
    }
}

/// The node's name, with its owner; an address that is no node's stays one.
fn label(netmap: &Netmap, known: &Known<'_>) -> String {
    let named = |name: &Name, tags: &BTreeSet<Tag>, user: &Option<UserName>| {
        let owner = match user {
            Some(user) => user.to_string(),
            None => words::some(tags.iter().map(ToString::to_string)),
        };
        format!("{name} ({owner})")
    };
    let me = &netmap.me;
    match known {
        Known::Me => named(&me.name, &me.tags, &me.user),
        Known::Peer(peer) => named(&peer.name, &peer.tags, &peer.user),
        Known::Address(address) if me.addresses.contains(*address) => {
            named(&me.name, &me.tags, &me.user)
        }
        Known::Address(address) => match peer_of(netmap, *address) {
            Some(peer) => named(&peer.name, &peer.tags, &peer.user),
            None => address.to_string(),
        },
    }
}

/// Who has an address, or routes it.
fn peer_of(netmap: &Netmap, address: IpAddr) -> Option<&Peer> {
    let mut peers = netmap.peers.values();
    peers.find(|peer| peer.addresses.contains(address))
}

fn far_end(netmap: &Netmap, far: &Known<'_>) -> Option<String> {
    let peer = match far {
        Known::Peer(peer) => Some(*peer),
        Known::Address(address) => {
            let routes = netmap.peers.values().flat_map(|peer| {
                let nets = peer.allowed_ips().collect::<Vec<_>>();
                nets.into_iter().map(move |net| (net, peer))
            });
            let holds = routes.filter(|(net, _)| net.contains(address));
            let longest = holds.max_by_key(|(net, _)| net.prefix_len());
            longest.map(|(_, peer)| peer)
        }
        Known::Me => None,
    };
    peer.map(|peer| peer.name.to_string())
}

// === what it was told ===

fn identity(netmap: &Netmap, address: IpAddr) -> Option<Identity> {
    let identities = netmap.policy.identities.iter();
    let holding = identities.filter(|(net, _)| net.contains(&address));
    let longest = holding.max_by_key(|(net, _)| net.prefix_len());
    longest.map(|(_, identity)| *identity)
}

/// Entries between two identities. The compiler made them disjoint, so they need no order.
fn entries(
    netmap: &Netmap,
    direction: Direction,
    remote: Identity,
    local: Identity,
) -> impl Iterator<Item = (&EntryKey, &Entry)> {
    let entries = netmap.policy.entries.iter();
    entries.filter(move |(key, _)| {
        key.direction == direction && key.remote == remote && key.local == local
    })
}

/// This end's own word, and what it can say of how to turn it.
fn judge(
    netmap: &Netmap,
    direction: Direction,
    (src, dst): (IpAddr, IpAddr),
    (protocol, port): (u8, u16),
) -> (AtEnd, Vec<String>) {
    let node = Some(netmap.me.name.to_string());
    let deny = |reason, turn: String| {
        let at_end = AtEnd {
            node: node.clone(),
            action: Action::Deny,
            reason,
        };
        (at_end, vec![turn])
    };
    let (local, remote) = match direction {
        Direction::Egress => (src, dst),
        Direction::Ingress => (dst, src),
    };
    let known = (identity(netmap, remote), identity(netmap, local));
    let (Some(remote), Some(local)) = known else {
        let turn = format!("no rule joins this node and {remote}, so it was told nothing of it");
        return deny(Reason::Unknown, turn);
    };
    let here = || entries(netmap, direction, remote, local);
    let found = here().find(|(key, _)| {
        key.proto.is_none_or(|known| known == protocol) && key.ports.contains(port)
    });
    let rule = found.and_then(|(_, entry)| Some((entry, netmap.policy.rules.get(&entry.rule)?)));
    if let Some((entry, rule)) = rule {
        let place = rule.place();
        let turn = match entry.action {
            Action::Accept => format!("it is allowed by {place}"),
            Action::Deny => format!("the deny at {place} decides"),
        };
        let at_end = AtEnd {
            node,
            action: entry.action,
            reason: Reason::Rule(rule.clone()),
        };
        return (at_end, vec![turn]);
    }
    let mut open = Open::new();
    for (key, entry) in here().filter(|(_, entry)| entry.action == Action::Accept) {
        if let (Some(rule), Some(protocol)) = (netmap.policy.rules.get(&entry.rule), key.proto) {
            open.entry(rule).or_default().insert((protocol, key.ports));
        }
    }
    let nearest = open.into_iter().map(|(rule, services)| {
        let services = words::services(services.into_iter());
        format!("{} allows {services}", rule.place())
    });
    let turn = match words::some(nearest) {
        none if none.is_empty() => "no rule allows anything between the two this way".to_owned(),
        nearest => format!("no rule allows it; nearest: {nearest}"),
    };
    deny(Reason::NoRule, turn)
}

/// What each rule opens.
type Open<'a> = BTreeMap<&'a Rule, BTreeSet<(u8, PortRange)>>;

fn reach(
    netmap: &Netmap,
    direction: Direction,
    asked: impl Fn(bool, u8, &PortRange) -> bool,
) -> Reach {
    // By rule and services; a peer stands once although it has two addresses.
    let mut by_far: BTreeMap<String, Open<'_>> = BTreeMap::new();
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    let own = netmap.me.addresses.each();
    for (net, remote) in &netmap.policy.identities {
        if own.contains(&net.addr()) && net.prefix_len() == net.max_prefix_len() {
            continue;
        }
        let peer = (net.prefix_len() == net.max_prefix_len())
            .then(|| peer_of(netmap, net.addr()))
            .flatten();
        let (far, name) = match peer {
            Some(peer) => (label(netmap, &Known::Peer(peer)), peer.name.to_string()),
            None => (net.to_string(), net.to_string()),
        };
        names.insert(far.clone(), name);
        let v4 = net.addr().is_ipv4();
        let local = own.iter().find(|own| own.is_ipv4() == v4);
        let Some(local) = local.and_then(|local| identity(netmap, *local)) else {
            continue;
        };
        for (key, entry) in entries(netmap, direction, *remote, local) {
            let rule = netmap.policy.rules.get(&entry.rule);
            if let (Action::Accept, Some(rule), Some(protocol)) = (entry.action, rule, key.proto)
                && asked(v4, protocol, &key.ports)
            {
                let rules = by_far.entry(far.clone()).or_default();
                rules.entry(rule).or_default().insert((protocol, key.ports));
            }
        }
    }
    let mut rows: BTreeMap<(Rule, String), Vec<String>> = BTreeMap::new();
    for (far, rules) in by_far {
        for (rule, services) in rules {
            let services = words::services(services.into_iter());
            rows.entry((rule.clone(), services))
                .or_default()
                .push(far.clone());
        }
    }
    let row = |((rule, services), others): ((Rule, String), Vec<String>)| Row {
        names: others
            .iter()
            .filter_map(|far| names.get(far).cloned())
            .collect(),
        services,
        rule,
        others,
    };
    let mut reach = Reach::default();
    reach.add(
        label(netmap, &Known::Me),
        rows.into_iter().map(row).collect(),
    );
    reach
}
