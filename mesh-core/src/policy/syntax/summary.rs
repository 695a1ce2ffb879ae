//! A clause in one line: in full to know it again, in short to show it.
//!
//! The short line travels to every node that the rule concerns. It names roles and not addresses
//! of the mesh, since a rule may well list nodes that the reader is not to know of, and it is cut
//! after a few names, since a rule may list thousands.

use std::fmt::Write as _;
use std::sync::Arc;

use ipnet::IpNet;

use super::super::ports;
use super::super::selector::Selector;
use super::rules::{Clause, Kind, Services};
use crate::world::Pools;

/// Names that are shown of a list before the rest is counted.
const SHOWN: usize = 4;

impl Clause {
    /// All that the clause says, the same for the same meaning.
    pub(in crate::policy) fn content(&self) -> String {
        let mut text = self.verb().to_owned();
        for src in &self.src {
            let _ = write!(text, " {}", src.value);
        }
        text.push_str(" ->");
        let mut last: Option<&Services> = None;
        for dst in &self.dst {
            let _ = write!(text, " {}", dst.value.selector);
            let services = &dst.value.services;
            if !last.is_some_and(|last| Arc::ptr_eq(last, services)) {
                for (protocol, ports) in services.iter() {
                    let _ = write!(text, ":{protocol:?}/{ports}");
                }
            }
            last = Some(services);
        }
        for via in &self.via {
            let _ = write!(text, " via {}", via.value);
        }
        for (name, values) in &self.app {
            let _ = write!(text, " app {}={}", name.value, values.join(","));
        }
        for posture in self.posture.iter().flatten() {
            let _ = write!(text, " if {}", posture.value);
        }
        text
    }

    /// For people: `accept tag:operator -> tag:node:tcp/22`.
    pub(in crate::policy) fn summary(&self, pools: &Pools) -> String {
        let src = self.src.iter().map(|src| shown(&src.value, pools));
        let dst = self.dst.iter().map(|dst| {
            let selector = shown(&dst.value.selector, pools);
            match dst.value.services.is_empty() {
                true => selector,
                false => format!("{selector}:{}", shown_services(&dst.value.services)),
            }
        });
        let mut text = format!("{} {} -> {}", self.verb(), some(src), some(dst));
        if !self.via.is_empty() {
            let via = self.via.iter().map(|tag| tag.value.to_string());
            let _ = write!(text, " via {}", some(via));
        }
        if !self.app.is_empty() {
            let names = self.app.iter().map(|(name, _)| name.value.clone());
            let _ = write!(text, " app {}", some(names));
        }
        if let Some(postures) = &self.posture {
            let names = postures.iter().map(|name| name.value.clone());
            let _ = write!(text, " if {}", some(names));
        }
        text
    }

    fn verb(&self) -> &'static str {
        match self.kind {
            Kind::Deny => "deny",
            Kind::Acl | Kind::Grant => "accept",
        }
    }
}

fn shown(selector: &Selector, pools: &Pools) -> String {
    match selector {
        Selector::Prefix(net)
            if net.prefix_len() == net.max_prefix_len() && pools.contains(net.addr()) =>
        {
            "(an address)".to_owned()
        }
        Selector::Prefix(net @ IpNet::V6(_)) => format!("[{net}]"),
        selector => selector.to_string(),
    }
}

/// `tcp/22,80`, `udp/53`; without a protocol only the ports.
fn shown_services(services: &Services) -> String {
    some(services.iter().map(|(protocol, ports)| match protocol {
        Some(protocol) => format!("{}/{ports}", ports::protocol_name(*protocol)),
        None => ports.to_string(),
    }))
}

fn some(items: impl ExactSizeIterator<Item = String>) -> String {
    let rest = items.len().saturating_sub(SHOWN);
    let shown: Vec<String> = items.take(SHOWN).collect();
    match rest {
        0 => shown.join(","),
        rest => format!("{} and {rest} more", shown.join(",")),
    }
}
