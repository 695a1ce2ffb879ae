//! A record's numbers in words: names of nodes, the rule's place in the policy.
//!
//! Numbers mean something only beside the netmap that they came with, and a record may be older than
//! the newest: above all of what has just been revoked. So several are asked, the newest first, and
//! what none of them knows stays a number.

use std::net::IpAddr;
use std::time::Duration;

use super::{Kind, Record};
use crate::netmap::{Netmap, Rule};
use crate::node::{Addresses, NodeId};
use crate::{Direction, Identity};

/// A record for people, who think in sources and destinations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Described {
    pub kind: Kind,
    /// Since 1970, as the next.
    pub time: Duration,
    pub start: Duration,
    /// IP protocol number.
    pub proto: u8,
    pub direction: Direction,
    /// Who opened the flow, or sent the denied packets.
    pub source: End,
    pub destination: End,
    /// Why it is denied.
    pub reason: Option<&'static str>,
    pub rule: Option<(u32, Option<Rule>)>,
    /// From the source, and back.
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
}

/// One end of a flow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct End {
    /// `None` where the packet path kept no address.
    pub address: Option<IpAddr>,
    pub port: u16,
    pub identity: Identity,
    /// The node's name, its tags, its user.
    pub node: Option<String>,
    pub tags: Vec<String>,
    pub user: Option<String>,
}

impl Record {
    /// `epoch`: what to add to the packet path's clock to get the time since 1970.
    pub fn describe(&self, netmaps: &[&Netmap], epoch: Duration) -> Described {
        let remote = End {
            address: address(self.key.remote.into()),
            port: self.key.remote_port.get(),
            identity: self.remote,
            node: None,
            tags: Vec::new(),
            user: None,
        };
        let local = End {
            address: address(self.key.local.into()),
            port: self.key.local_port.get(),
            identity: self.local,
            ..remote.clone()
        };
        let remote = name(remote, netmaps, (self.peer != 0).then_some(self.peer));
        let local = name(local, netmaps, None);
        let (source, destination, [forth, back]) = match self.direction {
            Direction::Ingress => (remote, local, [0, 1]),
            Direction::Egress => (local, remote, [1, 0]),
        };
        let rule = (self.rule.0 != 0).then(|| {
            let mut rules = netmaps.iter().map(|netmap| &netmap.policy.rules);
            let rule = rules.find_map(|rules| rules.get(&self.rule));
            (self.rule.0, rule.cloned())
        });
        Described {
            kind: self.kind,
            time: epoch + Duration::from_nanos(self.time),
            start: epoch + Duration::from_nanos(self.first),
            proto: self.key.proto,
            direction: self.direction,
            source,
            destination,
            reason: self.reason.map(|reason| reason.name()),
            rule,
            packets: [self.packets[forth], self.packets[back]],
            bytes: [self.bytes[forth], self.bytes[back]],
        }
    }
}

fn address(address: IpAddr) -> Option<IpAddr> {
    (!address.is_unspecified()).then_some(address)
}

/// The node behind an end: the peer whose number it is, or whoever has the address.
fn name(end: End, netmaps: &[&Netmap], peer: Option<u32>) -> End {
    let has = |addresses: &Addresses| {
        end.address
            .is_some_and(|address| addresses.contains(address))
    };
    let find = |netmap: &&Netmap| {
        let found = match peer {
            // The kernel tells peers apart by the low 32 bits.
            Some(number) => netmap.peers.get(&NodeId(number.into())),
            None => netmap.peers.values().find(|peer| has(&peer.addresses)),
        };
        let me = &netmap.me;
        match found {
            Some(peer) => Some((peer.name.clone(), peer.tags.clone(), peer.user.clone())),
            None if has(&me.addresses) => Some((me.name.clone(), me.tags.clone(), me.user.clone())),
            None => None,
        }
    };
    let Some((node, tags, user)) = netmaps.iter().find_map(find) else {
        return end;
    };
    End {
        node: Some(node.to_string()),
        tags: tags.iter().map(ToString::to_string).collect(),
        user: user.map(|user| user.to_string()),
        ..end
    }
}
