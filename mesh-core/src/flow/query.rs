//! Which records somebody wants to see.

use std::net::IpAddr;

use super::{Described, End};

/// Every part that is set must hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Query {
    /// A node's name, a tag, a user or an address, at either end.
    pub peer: Option<String>,
    /// A line of the policy.
    pub rule: Option<u32>,
    /// `allowed`, `denied`, or a drop reason.
    pub verdict: Option<String>,
    /// The destination's port.
    pub port: Option<u16>,
    /// IP protocol number.
    pub proto: Option<u8>,
}

impl Query {
    pub fn matches(&self, record: &Described) -> bool {
        let peer = self.peer.as_deref();
        let line = record.rule.as_ref().and_then(|(_, rule)| rule.as_ref());
        peer.is_none_or(|who| is(&record.source, who) || is(&record.destination, who))
            && self
                .rule
                .is_none_or(|wanted| line.is_some_and(|rule| rule.line == wanted))
            && self.verdict.as_deref().is_none_or(|verdict| match verdict {
                "allowed" => record.kind.is_allowed(),
                "denied" => !record.kind.is_allowed(),
                reason => record.reason == Some(reason),
            })
            && self.port.is_none_or(|port| record.destination.port == port)
            && self.proto.is_none_or(|proto| record.proto == proto)
    }
}

fn is(end: &End, who: &str) -> bool {
    let address = who.parse::<IpAddr>().ok();
    (address.is_some() && end.address == address)
        || end.node.as_deref() == Some(who)
        || end.user.as_deref() == Some(who)
        || end.tags.iter().any(|tag| tag == who)
}
