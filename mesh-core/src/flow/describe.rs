//! A record's numbers in words: names of nodes, the rule's place in the policy.
//!
//! The far end is whose number the packet path found, the near end this node, even where an address is
//! not theirs but somebody's behind them. What nobody knows a name for stays a number.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use super::{Kind, Names, Record, is_icmp};
use crate::netmap::{Peer, Rule};
use crate::node::{Addresses, Name, Tag, UserName};
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
    /// Of ICMP, the source's is the identifier of an echo, the destination's the type; 0 where the packet
    /// path kept none.
    pub port: u16,
    pub identity: Identity,
    /// The node's name, its tags, its user.
    pub node: Option<String>,
    /// It is not the node itself that is at this end, but somebody whom it routes for.
    pub is_behind: bool,
    pub tags: Vec<String>,
    pub user: Option<String>,
}

impl Record {
    /// `epoch`: what to add to the packet path's clock to get the time since 1970.
    pub fn describe(&self, names: &Names, epoch: Duration) -> Described {
        let remote = End {
            address: address(self.key.remote.into()),
            port: 0,
            identity: self.remote,
            node: None,
            is_behind: false,
            tags: Vec::new(),
            user: None,
        };
        let local = End {
            address: address(self.key.local.into()),
            identity: self.local,
            ..remote.clone()
        };
        let remote = far(remote, self.peer, names);
        let local = near(local, names);
        let (mut source, mut destination, [forth, back]) = match self.direction {
            Direction::Ingress => (remote, local, [0, 1]),
            Direction::Egress => (local, remote, [1, 0]),
        };
        destination.port = self.port;
        source.port = match self.direction {
            Direction::Egress if !is_icmp(self.key.proto) => self.key.local_port.get(),
            _ => self.key.remote_port.get(),
        };
        let rule = (self.rule.0 != 0).then(|| (self.rule.0, names.rule(self.rule).cloned()));
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

/// The peer whose number it is, or whoever has the address.
fn far(end: End, number: u32, names: &Names) -> End {
    let peer = match number {
        0 => end.address.and_then(|address| names.peer_at(address)),
        number => names.peer(number),
    };
    match peer {
        Some(peer) => named(end, peer, names),
        None => end,
    }
}

/// This node, unless it only passes on what comes from another.
fn near(end: End, names: &Names) -> End {
    if let Some(peer) = end.address.and_then(|address| names.peer_at(address)) {
        return named(end, peer, names);
    }
    match names.me() {
        Some(me) => of(end, &me.name, &me.tags, &me.user, &me.addresses, names),
        None => end,
    }
}

fn named(end: End, peer: &Peer, names: &Names) -> End {
    of(
        end,
        &peer.name,
        &peer.tags,
        &peer.user,
        &peer.addresses,
        names,
    )
}

fn of(
    end: End,
    name: &Name,
    tags: &BTreeSet<Tag>,
    user: &Option<UserName>,
    addresses: &Addresses,
    names: &Names,
) -> End {
    let is_behind = match end.address {
        Some(address) => !addresses.contains(address),
        // Who is behind a node has another identity than the node.
        None => {
            let own = names.identity(addresses);
            end.identity != Identity::UNKNOWN && own.is_some_and(|own| own != end.identity)
        }
    };
    End {
        node: Some(name.to_string()),
        is_behind,
        tags: tags.iter().map(ToString::to_string).collect(),
        user: user.as_ref().map(ToString::to_string),
        ..end
    }
}
