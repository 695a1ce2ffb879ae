//! What would become of a flow that does not exist: its first packet, and the policy's own word on it.
//!
//! The packet is for the packet path, to be judged by the tables as they are. The policy's word is
//! taken from the netmap's entries, not from the rows that were made of them: where the two differ,
//! something between text and kernel has gone wrong.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_common::packet::is_extension;
use mesh_common::verdict::{outcome, prevailing};
use mesh_common::{Address, Direction, DropReason, PolicyEntry};

use super::Tables;
use crate::netmap::{Action, EntryKey, NodePolicy};
use crate::{Identity, RuleId};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const ICMPV6: u8 = 58;

/// A flow that somebody might open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub proto: u8,
    /// For ICMP the message type.
    pub port: u16,
}

/// Which way a flow goes, and what is said of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    /// `None`: the flow may be opened.
    pub drop: Option<DropReason>,
    pub rule: RuleId,
}

/// Why there is no such flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoFlow {
    #[error("one end is IPv4 and the other IPv6")]
    Families,
    #[error("ICMPv6 goes over IPv6 only: name the nodes, or their IPv6 addresses")]
    Icmpv6,
    #[error("protocol {0} is an extension header of IPv6, which no flow consists of")]
    Extension(u8),
}

/// Why a node cannot answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotJudged {
    #[error(
        "both ends are this node: its packets to itself never enter the mesh, and nothing filters them"
    )]
    Within,
    #[error("this node judges only flows of which it is one end: ask on the node at either end")]
    Elsewhere,
}

impl Question {
    /// What is meant: an IPv4 address may be written as IPv6, ICMP over IPv6 is ICMPv6, and what has no
    /// ports is asked of without one. `port` is, for ICMP, the message type, and any other than echo's is
    /// taken as it is.
    pub fn new(source: IpAddr, destination: IpAddr, proto: u8, port: u16) -> Result<Self, NoFlow> {
        let (source, destination) = (source.to_canonical(), destination.to_canonical());
        let (proto, port) = match (source.is_ipv4(), destination.is_ipv4()) {
            (true, true) if proto == ICMPV6 => return Err(NoFlow::Icmpv6),
            (true, true) => (proto, port),
            (false, false) => match (proto, port) {
                (ICMP, 8) => (ICMPV6, 128),
                (extension, _) if is_extension(extension) => {
                    return Err(NoFlow::Extension(extension));
                }
                of_v6 => of_v6,
            },
            _ => return Err(NoFlow::Families),
        };
        let port = match proto {
            ICMP | TCP | UDP | SCTP | ICMPV6 => port,
            _ => 0,
        };
        Ok(Self {
            source,
            destination,
            proto,
            port,
        })
    }

    /// Which way its packets go at the node of these tables.
    pub fn direction(&self, tables: &Tables) -> Result<Direction, NotJudged> {
        let is_ours = |address| {
            let entry = tables.identity(address);
            entry.is_known() && entry.peer == 0
        };
        match (is_ours(self.source), is_ours(self.destination)) {
            (true, false) => Ok(Direction::Egress),
            (false, true) => Ok(Direction::Ingress),
            (true, true) => Err(NotJudged::Within),
            (false, false) => Err(NotJudged::Elsewhere),
        }
    }

    /// The packet that would open the flow, from `source_port` where the protocol has ports. Its
    /// checksums are left out: nobody sends it.
    pub fn packet(&self, source_port: u16) -> Vec<u8> {
        let [high, low] = self.port.to_be_bytes();
        let [from_high, from_low] = source_port.to_be_bytes();
        let body = match self.proto {
            // A SYN: header of five words, a window.
            TCP => {
                let mut segment = vec![from_high, from_low, high, low];
                segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, 2, 0xff, 0xff, 0, 0, 0, 0]);
                segment
            }
            UDP => vec![from_high, from_low, high, low, 0, 8, 0, 0],
            // Ports, verification tag, checksum (RFC 9260, section 3.1).
            SCTP => vec![from_high, from_low, high, low, 0, 0, 0, 1, 0, 0, 0, 0],
            ICMP | ICMPV6 => vec![low, 0, 0, 0, from_high, from_low, 0, 1],
            _ => vec![0; 8],
        };
        let length = (body.len() as u16).to_be_bytes();
        let mut packet = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let total = (20 + body.len() as u16).to_be_bytes();
                let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, self.proto];
                header.extend([0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                header
            }
            (source, destination) => {
                let mut header = vec![0x60, 0, 0, 0, length[0], length[1], self.proto, 64];
                header.extend(wide(source));
                header.extend(wide(destination));
                header
            }
        };
        packet.extend(body);
        packet
    }

    /// What the policy says, at the node that it was compiled for.
    pub fn ask(&self, policy: &NodePolicy, direction: Direction) -> Answer {
        let (remote, local) = match direction {
            Direction::Ingress => (self.source, self.destination),
            Direction::Egress => (self.destination, self.source),
        };
        let refused = |reason| Answer {
            drop: Some(reason),
            rule: RuleId::NONE,
        };
        // Before anybody asks who it is.
        if [remote, local]
            .map(Address::from)
            .iter()
            .any(|address| address.is_multicast())
        {
            return refused(DropReason::Multicast);
        }
        let Some(remote) = identity(policy, remote) else {
            return refused(DropReason::UnknownIdentity);
        };
        let Some(local) = identity(policy, local) else {
            return refused(DropReason::UnknownLocal);
        };
        let said = |remote| {
            let about = |key: &EntryKey| {
                key.remote == remote
                    && key.local == local
                    && key.direction == direction
                    && key.proto.is_none_or(|proto| proto == self.proto)
                    && key.ports.contains(self.port)
            };
            let entries = policy.entries.iter().filter(|(key, _)| about(key));
            let first = entries.map(|(_, entry)| entry).min_by_key(|entry| {
                let rule = policy.rules.get(&entry.rule);
                let line = rule.map_or(u32::MAX, |rule| rule.line);
                (entry.action == Action::Accept, line, entry.rule)
            });
            match first {
                Some(entry) if entry.action == Action::Accept => PolicyEntry::accept(entry.rule),
                Some(entry) => PolicyEntry::deny(entry.rule),
                None => PolicyEntry::NONE,
            }
        };
        let (drop, rule) = outcome(prevailing(said(remote), said(Identity::ANY)));
        Answer { drop, rule }
    }
}

fn wide(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn identity(policy: &NodePolicy, address: IpAddr) -> Option<Identity> {
    let around = std::iter::successors(Some(IpNet::from(address)), IpNet::supernet);
    around
        .filter_map(|net| policy.identities.get(&net).copied())
        .next()
}

#[cfg(test)]
mod tests {
    use mesh_common::IdentityEntry;
    use mesh_common::addr::Prefix;
    use mesh_common::packet::{Kind, Slice, parse};

    use super::*;

    fn question(addresses: [&str; 2], proto: u8, port: u16) -> Question {
        let [source, destination] = addresses.map(|address| address.parse().unwrap());
        Question::new(source, destination, proto, port).unwrap()
    }

    #[test]
    fn a_question_is_asked_as_it_was_meant() {
        let (v4, v6) = (["100.64.0.2", "100.64.0.1"], ["fd00::2", "fd00::1"]);
        let meant = |addresses, proto, port| {
            let question = question(addresses, proto, port);
            (question.proto, question.port)
        };
        assert_eq!(meant(v6, ICMP, 8), (ICMPV6, 128));
        assert_eq!(meant(v4, 47, 22), (47, 0));
        assert_eq!(meant(["::ffff:100.64.0.2", v4[1]], TCP, 22), (TCP, 22));
        let refused = |addresses: [&str; 2], proto| {
            let [source, destination] = addresses.map(|address| address.parse().unwrap());
            Question::new(source, destination, proto, 0).unwrap_err()
        };
        assert_eq!(refused([v4[0], v6[1]], TCP), NoFlow::Families);
        assert_eq!(refused(v6, 44), NoFlow::Extension(44));
        assert_eq!(refused(v4, ICMPV6), NoFlow::Icmpv6);
    }

    #[test]
    fn whoever_has_both_ends_is_not_sent_to_either() {
        let [own, served, peer, stranger] = ["100.64.0.1", "10.0.0.1", "100.64.0.2", "192.0.2.1"];
        let entry = |address: &str, peer| {
            let address = address.parse::<IpAddr>().unwrap().into();
            let identity = Identity(7);
            let flags = 0;
            let entry = IdentityEntry {
                identity,
                flags,
                peer,
            };
            (Prefix { len: 128, address }, entry)
        };
        let tables = Tables {
            identities: [entry(own, 0), entry(served, 0), entry(peer, 2)].into(),
            ..Tables::default()
        };
        let direction = |ends| question(ends, TCP, 22).direction(&tables);
        assert_eq!(direction([own, peer]), Ok(Direction::Egress));
        assert_eq!(direction([stranger, served]), Ok(Direction::Ingress));
        assert_eq!(direction([own, own]), Err(NotJudged::Within));
        assert_eq!(direction([own, served]), Err(NotJudged::Within));
        assert_eq!(direction([stranger, peer]), Err(NotJudged::Elsewhere));
    }

    #[test]
    fn the_policy_says_of_groups_what_the_packet_path_says() {
        for destination in ["224.0.0.251", "255.255.255.255", "ff02::fb"] {
            let source = if destination.contains(':') {
                "fd00::1"
            } else {
                "100.64.0.1"
            };
            let question = question([source, destination], UDP, 5_353);
            let answer = question.ask(&NodePolicy::default(), Direction::Egress);
            assert_eq!(answer.drop, Some(DropReason::Multicast));
        }
    }

    #[test]
    fn the_packet_path_reads_the_packet_as_it_was_meant() {
        let v4 = ["100.64.0.2", "100.64.0.1"];
        let v6 = ["fd00::2", "fd00::1"];
        for (addresses, proto, port, kind) in [
            (v4, TCP, 22, Kind::Tcp),
            (v6, TCP, 22, Kind::Tcp),
            (v4, UDP, 53, Kind::Datagram),
            (v6, UDP, 53, Kind::Datagram),
            (v4, ICMP, 8, Kind::EchoRequest),
            (v6, ICMPV6, 128, Kind::EchoRequest),
            (v4, SCTP, 5_060, Kind::Datagram),
            (v4, 47, 0, Kind::Datagram),
        ] {
            let question = question(addresses, proto, port);
            let packet = question.packet(1_000);
            let facts = parse(&Slice(&packet), Direction::Ingress);
            let facts = facts.unwrap_or_else(|reason| panic!("{question:?}: {reason}"));
            assert_eq!(facts.kind, kind, "{question:?}");
            assert_eq!(facts.port, port, "{question:?}");
            assert_eq!(IpAddr::from(facts.remote), question.source);
        }
    }
}
