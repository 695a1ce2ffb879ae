//! Which records somebody wants to see.

use std::net::IpAddr;

use mesh_common::DropReason;
use mesh_common::proto;

use super::{Described, End};
use crate::netmap::{Netmap, Rule};

/// Every part that is set must hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Query {
    /// At either end.
    pub peer: Option<Who>,
    pub rule: Option<Place>,
    pub verdict: Option<Verdict>,
    /// The destination's port.
    pub port: Option<u16>,
    /// IP protocol number; that of ICMP stands for the one of IPv6 too.
    pub proto: Option<u8>,
}

/// A line of the policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// `None`: whatever the file was called.
    pub file: Option<String>,
    pub line: u32,
}

impl Place {
    fn is(&self, rule: &Rule) -> bool {
        let file = self.file.as_ref();
        rule.line == self.line && file.is_none_or(|file| *file == *rule.file)
    }
}

/// A node's name, a tag, a user or an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Who {
    text: String,
    address: Option<IpAddr>,
    /// The node that has the address: some records know no more than that.
    node: Option<String>,
}

impl Who {
    /// `netmap` is asked whose an address is, and for the domain that a node's name may end with.
    pub fn new(text: &str, netmap: Option<&Netmap>) -> Self {
        let text = text.trim_end_matches('.').to_ascii_lowercase();
        let address = text.parse::<IpAddr>().ok();
        let name = netmap
            .and_then(|netmap| text.strip_suffix(&netmap.mesh.domain))
            .and_then(|name| name.strip_suffix('.'));
        Self {
            node: netmap.zip(address).and_then(|(netmap, address)| {
                let mut peers = netmap.peers.values();
                let peer = peers.find(|peer| peer.addresses.contains(address));
                let is_mine = netmap.me.addresses.contains(address);
                let me = is_mine.then_some(&netmap.me.name);
                me.or_else(|| peer.map(|peer| &peer.name))
                    .map(ToString::to_string)
            }),
            address,
            text: name.unwrap_or(&text).to_owned(),
        }
    }

    fn is(&self, end: &End) -> bool {
        let is = |name: &String| name.eq_ignore_ascii_case(&self.text);
        match (self.address, end.address) {
            (Some(wanted), Some(address)) => wanted == address,
            (Some(_), None) => !end.is_behind && end.node.is_some() && end.node == self.node,
            (None, _) => {
                end.node.as_ref().is_some_and(is)
                    || end.user.as_ref().is_some_and(is)
                    || end.tags.iter().any(is)
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Allowed,
    Denied,
    /// Denied, and why.
    For(DropReason),
}

impl Verdict {
    /// The words for all of them.
    pub fn words() -> impl Iterator<Item = &'static str> {
        let reasons = DropReason::ALL.iter().map(|reason| reason.name());
        ["allowed", "denied"].into_iter().chain(reasons)
    }

    /// `None` for any other word; in any case.
    pub fn from_word(word: &str) -> Option<Self> {
        let word = word.to_ascii_lowercase();
        match word.as_str() {
            "allowed" => Some(Self::Allowed),
            "denied" => Some(Self::Denied),
            reason => DropReason::ALL
                .iter()
                .find(|known| known.name() == reason)
                .map(|known| Self::For(*known)),
        }
    }
}

impl Query {
    pub fn matches(&self, record: &Described) -> bool {
        let rule = record.rule.as_ref().and_then(|(_, rule)| rule.as_ref());
        self.peer
            .as_ref()
            .is_none_or(|who| who.is(&record.source) || who.is(&record.destination))
            && self
                .rule
                .as_ref()
                .is_none_or(|place| rule.is_some_and(|rule| place.is(rule)))
            && self.verdict.is_none_or(|verdict| match verdict {
                Verdict::Allowed => record.kind.is_allowed(),
                Verdict::Denied => !record.kind.is_allowed(),
                Verdict::For(reason) => record.reason == Some(reason.name()),
            })
            && self.port.is_none_or(|port| record.destination.port == port)
            && self.proto.is_none_or(|wanted| {
                wanted == record.proto || (wanted == proto::ICMP && record.proto == proto::ICMPV6)
            })
    }
}
