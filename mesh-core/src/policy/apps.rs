//! Application capabilities: what a grant tells a service about the peer that connects to it.
//!
//! The mesh does not act on them; the service asks its agent who is there (`whois`) and reads what
//! that peer was granted here.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::classes::Class;
use super::compile::CompiledPolicy;
use crate::node::NodeId;

/// Capabilities by name, each with the JSON values of every grant that gives it, in the order of
/// the text; `None` where it is held by itself.
pub type Capabilities = BTreeMap<String, Option<Vec<String>>>;

/// Who may use the first has the second in the eyes of whom it is granted on, without values.
const COMPANIONS: [(&str, &str); 2] = [
    ("tailscale.com/cap/drive", "tailscale.com/cap/drive-sharer"),
    ("tailscale.com/cap/relay", "tailscale.com/cap/relay-target"),
];

impl CompiledPolicy {
    /// What a connection from `source` may claim on a node's own addresses.
    pub fn capabilities(&self, node: NodeId, source: IpAddr) -> Capabilities {
        let mut capabilities = Capabilities::new();
        let Some(me) = self.nodes.get(&node) else {
            return capabilities;
        };
        let same_family = |(net, _): &&(IpNet, _)| net.addr().is_ipv4() == source.is_ipv4();
        let mine = me.addresses.iter().find(same_family);
        let (Some((_, mine)), Some(theirs)) = (mine, self.known(node, source)) else {
            return capabilities;
        };
        let (mine, theirs) = (&self.classes[*mine], &self.classes[theirs]);
        for (name, values) in self.granted(theirs, mine) {
            let held = capabilities.entry(name.clone()).or_default();
            held.get_or_insert_default().extend(values.iter().cloned());
        }
        for (name, _) in self.granted(mine, theirs) {
            let companion = COMPANIONS.iter().find(|(of, _)| of == name);
            if let Some((_, companion)) = companion {
                capabilities.entry((*companion).to_owned()).or_default();
            }
        }
        capabilities
    }

    fn granted<'a>(
        &'a self,
        src: &'a Class,
        dst: &'a Class,
    ) -> impl Iterator<Item = &'a (String, Vec<String>)> {
        let rules = self.rules.between(src, dst);
        rules.flat_map(|(_, rule, openings)| openings.into_iter().flat_map(|_| &rule.apps))
    }
}
