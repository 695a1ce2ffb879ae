//! Services, owners and places, as answers say them.

use std::collections::{BTreeMap, BTreeSet};

use super::ends::{End, Explainer};
use crate::netmap::PortRange;
use crate::node::{Node, NodeId, Owner};
use crate::policy::ports;

/// Names that are written out before the rest is counted.
const SHOWN: usize = 4;

/// `tcp/22`, `ping`: of a packet, whose addresses say the family.
pub(super) fn service(protocol: u8, port: u16) -> String {
    if matches!((protocol, port), (ports::ICMP, 8) | (ports::ICMPV6, 128)) {
        return "ping".to_owned();
    }
    let one = PortRange {
        first: port,
        last: port,
    };
    services(std::iter::once((protocol, one)))
}

/// `tcp/22,443 udp/53`: ascending, each protocol once.
pub(in crate::policy) fn services(items: impl Iterator<Item = (u8, PortRange)>) -> String {
    let mut by_protocol: BTreeMap<u8, Vec<PortRange>> = BTreeMap::new();
    for (protocol, ports) in items {
        by_protocol.entry(protocol).or_default().push(ports);
    }
    let whole = |ports: &Vec<PortRange>| ports[..] == [PortRange::ALL];
    let default = ports::DEFAULT_PROTOCOLS;
    if default
        .iter()
        .all(|p| by_protocol.get(p).is_some_and(whole))
    {
        by_protocol.retain(|protocol, _| !default.contains(protocol));
        let rest = written(&by_protocol);
        return ["any tcp, udp and icmp".to_owned()]
            .into_iter()
            .chain(rest)
            .collect::<Vec<_>>()
            .join(" ");
    }
    let rest = written(&by_protocol);
    rest.join(" ")
}

fn written(by_protocol: &BTreeMap<u8, Vec<PortRange>>) -> Vec<String> {
    let mut words = Vec::new();
    // Behind what people look for, and once for both families.
    let mut messages: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    for (&protocol, ranges) in by_protocol {
        if let Some(word) = icmp(protocol, ranges) {
            messages.entry(word).or_default().push(protocol);
            continue;
        }
        let name = ports::protocol_name(protocol);
        let whole = ranges[..] == [PortRange::ALL];
        let ranges: Vec<String> = ranges.iter().map(range).collect();
        words.push(match (whole, ports::has_ports(Some(protocol))) {
            (true, true) => format!("{name}/*"),
            (true, false) => name,
            (false, _) => format!("{name}/{}", ranges.join(",")),
        });
    }
    words.extend(messages.iter().map(|(word, of)| match of[..] {
        [ports::ICMP] => format!("{word} (IPv4)"),
        [ports::ICMPV6] => format!("{word} (IPv6)"),
        _ => (*word).to_owned(),
    }));
    words
}

/// What people call such types of ICMP, if there is a word.
fn icmp(protocol: u8, types: &[PortRange]) -> Option<&'static str> {
    let echo = match protocol {
        ports::ICMP => 8,
        ports::ICMPV6 => 128,
        _ => return None,
    };
    let range = |first, last| PortRange { first, last };
    if types == [PortRange::ALL] {
        Some("icmp")
    } else if types == [range(echo, echo)] {
        Some("ping")
    } else if types == [range(0, echo - 1), range(echo + 1, u16::MAX)] {
        Some("icmp but ping")
    } else {
        None
    }
}

fn range(range: &PortRange) -> String {
    match range.first == range.last {
        true => range.first.to_string(),
        false => format!("{}-{}", range.first, range.last),
    }
}

/// The first few, and how many more.
pub(in crate::policy) fn some(items: impl Iterator<Item = String>) -> String {
    let items: Vec<String> = items.collect();
    let shown = items[..items.len().min(SHOWN)].join(", ");
    match items.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

impl Explainer<'_> {
    /// `alice@example.com`, `tag:db`: whose a node is.
    pub(super) fn owner(&self, node: &Node) -> String {
        match &node.owner {
            Owner::User(id) => match self.subjects.users.get(id) {
                Some(user) => user.name.to_string(),
                None => format!("user {id}"),
            },
            Owner::Tags(tags) => some(tags.iter().map(ToString::to_string)),
        }
    }

    pub(super) fn names(&self, end: &End) -> Vec<String> {
        let nodes = end.nodes.iter().filter_map(|id| self.node(*id));
        nodes.map(|node| node.name.to_string()).collect()
    }

    /// `db-1, db-2 and 7 more (tag:db)`, or an address, or what lies behind a router.
    pub(super) fn label(&self, end: &End) -> String {
        let Some(first) = end.nodes.first().and_then(|id| self.node(*id)) else {
            return match (end.net, end.addresses.first()) {
                (Some(net), _) if net.prefix_len() == net.max_prefix_len() => {
                    net.addr().to_string()
                }
                (Some(net), _) => net.to_string(),
                (None, Some(address)) => address.to_string(),
                (None, None) => String::new(),
            };
        };
        let owner = self.owner(first);
        let mut nodes = end.nodes.iter().filter_map(|id| self.node(*id));
        let names = some(self.names(end).into_iter());
        match nodes.all(|node| self.owner(node) == owner) {
            true => format!("{names} ({owner})"),
            false => names,
        }
    }
}

impl Explainer<'_> {
    /// How many nodes each owner has.
    pub(in crate::policy) fn owners(&self) -> BTreeMap<String, usize> {
        let mut owners = BTreeMap::new();
        for node in self.ids().filter_map(|id| self.node(id)) {
            *owners.entry(self.owner(node)).or_default() += 1;
        }
        owners
    }

    /// Several ends at once: an owner where all of the owner's nodes are among them, else the nodes.
    pub(in crate::policy) fn described(
        &self,
        ends: &[End],
        which: &BTreeSet<usize>,
        owners: &BTreeMap<String, usize>,
    ) -> Vec<String> {
        let mut words = Vec::new();
        let mut nodes: BTreeMap<String, BTreeSet<NodeId>> = BTreeMap::new();
        for end in which.iter().filter_map(|index| ends.get(*index)) {
            words.extend(end.net.map(|net| net.to_string()));
            for node in end.nodes.iter().filter_map(|id| self.node(*id)) {
                nodes.entry(self.owner(node)).or_default().insert(node.id);
            }
        }
        let mut owned = Vec::new();
        for (owner, among) in nodes {
            if owners.get(&owner) == Some(&among.len()) {
                owned.push(owner);
            } else {
                let names = among.iter().filter_map(|id| self.node(*id));
                owned.extend(names.map(|node| node.name.to_string()));
            }
        }
        owned.extend(words);
        owned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_short() {
        let range = |first, last| PortRange { first, last };
        let check = |items: &[(u8, PortRange)], text: &str| {
            assert_eq!(services(items.iter().copied()), text);
        };
        check(&[(6, range(22, 22)), (6, range(80, 443))], "tcp/22,80-443");
        check(
            &[(1, range(8, 8)), (6, range(22, 22)), (58, range(128, 128))],
            "tcp/22 ping",
        );
        let all = [1, 6, 17, 58].map(|protocol| (protocol, PortRange::ALL));
        check(&all, "any tcp, udp and icmp");
        check(&[(47, PortRange::ALL), (17, PortRange::ALL)], "udp/* gre");
        check(
            &[(1, range(0, 7)), (1, range(9, 65535)), (6, range(1, 2))],
            "tcp/1-2 icmp but ping (IPv4)",
        );
        let both = [(1, PortRange::ALL), (58, PortRange::ALL)];
        check(&both, "icmp");
        check(&both[..1], "icmp (IPv4)");
        check(&[both[1], (1, range(8, 8))], "icmp (IPv6) ping (IPv4)");
        assert_eq!(service(6, 22), "tcp/22");
        assert_eq!(service(1, 8), "ping");
    }
}
