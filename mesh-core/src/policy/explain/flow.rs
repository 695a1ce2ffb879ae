//! One flow, judged at both of its ends.
//!
//! Sender and receiver judge by what each was told, so the answer says both, and why: the rule that
//! decided, or that none did, or that the two do not even know each other.

use std::net::IpAddr;

use super::ends::{End, Explainer, MOST_PAIRS, Service, Unanswerable};
use crate::netmap::{Action, Rule};
use crate::node::NodeId;
use crate::policy::rules::RuleSlot;

/// Why an end says what it says.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reason {
    Rule(Rule),
    /// The two know each other, and no rule speaks of this flow.
    NoRule,
    /// The far address is not in what this end was told: no rule joins the two.
    Unknown,
    /// There is no such end in the mesh.
    Nobody,
    /// The far end judges by what it was told, which this node does not know.
    Elsewhere,
}

/// The word of one end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct AtEnd {
    /// Who judges: the node itself, or the router before it.
    pub node: Option<String>,
    pub action: Action,
    pub reason: Reason,
}

/// What policy says of flows that it does not tell apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Judged {
    /// Names, or the addresses where nobody has one.
    pub src: String,
    pub dst: String,
    /// The flows that were looked at: IPv4 and IPv6 as a rule.
    pub addresses: Vec<(IpAddr, IpAddr)>,
    /// `tcp/22`.
    pub service: String,
    /// Accepted by both ends.
    pub accepted: bool,
    pub egress: AtEnd,
    pub ingress: AtEnd,
    /// What would have to change for the answer to be the other one.
    pub turn: Vec<String>,
}

/// The answer to `policy explain`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Explanation {
    pub flows: Vec<Judged>,
}

impl Explainer<'_> {
    /// May `src` open a flow to `dst`, which is written `DST:PORT/PROTO`?
    pub fn explain(&self, src: &str, dst: &str) -> Result<Explanation, Unanswerable> {
        let service = Service::parse(dst)?;
        let (src, dst) = (self.ends(src)?, self.ends(service.host)?);
        if src.len() * dst.len() > MOST_PAIRS {
            return Err(Unanswerable::Malformed(format!(
                "that is {} kinds of sources times {} of destinations: name something narrower",
                src.len(),
                dst.len()
            )));
        }
        let mut flows: Vec<Judged> = Vec::new();
        for src in &src {
            for dst in &dst {
                for judged in self.pair(src, dst, &service) {
                    merge(&mut flows, judged);
                }
            }
        }
        if flows.is_empty() {
            return Err(Unanswerable::Malformed(
                "the two share no address family, or are the same node: nothing between them is judged"
                    .to_owned(),
            ));
        }
        Ok(Explanation { flows })
    }

    fn pair(&self, src: &End, dst: &End, service: &Service<'_>) -> Vec<Judged> {
        // A node's flows to itself never meet the mesh: of a kind, another one stands for the end.
        let other = dst
            .nodes
            .iter()
            .find(|id| Some(*id) != src.nodes.first())
            .and_then(|id| self.node(*id));
        let same = !dst.nodes.is_empty() && dst.nodes.first() == src.nodes.first();
        let targets = match (same, other) {
            (false, _) => dst.addresses.clone(),
            (true, Some(other)) => other.addresses.each().to_vec(),
            (true, None) => return Vec::new(),
        };
        let mut found: Vec<Judged> = Vec::new();
        for &from in &src.addresses {
            for &to in targets.iter().filter(|to| to.is_ipv4() == from.is_ipv4()) {
                let Some((protocol, port)) = service.in_family(from.is_ipv4()) else {
                    continue;
                };
                let judged = Judged {
                    src: self.label(src),
                    dst: self.label(dst),
                    addresses: vec![(from, to)],
                    ..self.judge(from, to, protocol, port)
                };
                merge(&mut found, judged);
            }
        }
        found
    }

    fn judge(&self, src: IpAddr, dst: IpAddr, protocol: u8, port: u16) -> Judged {
        let sender = self.compiled.sender(src);
        let receiver = self.compiled.receiver(src, dst);
        let egress = self.at_end(sender, src, dst, src, protocol, port);
        let ingress = self.at_end(receiver, src, dst, dst, protocol, port);
        let accepted = [&egress, &ingress]
            .iter()
            .all(|end| end.action == Action::Accept);
        Judged {
            src: String::new(),
            dst: String::new(),
            addresses: Vec::new(),
            service: super::words::service(protocol, port),
            accepted,
            turn: self.turn(src, dst, (sender, receiver), (protocol, port)),
            egress,
            ingress,
        }
    }

    /// What `node` says, of whose own side `local` is.
    fn at_end(
        &self,
        node: Option<NodeId>,
        src: IpAddr,
        dst: IpAddr,
        local: IpAddr,
        protocol: u8,
        port: u16,
    ) -> AtEnd {
        let compiled = self.compiled;
        let far = if local == src { dst } else { src };
        let deny = |reason| (Action::Deny, reason);
        let (action, reason) = match node {
            None => deny(Reason::Nobody),
            Some(id) => match (compiled.own_class(id, local), compiled.known(id, far)) {
                (None, _) => deny(Reason::Nobody),
                (_, None) => deny(Reason::Unknown),
                (Some(mine), Some(theirs)) => {
                    let (from, to) = if local == src {
                        (mine, theirs)
                    } else {
                        (theirs, mine)
                    };
                    match compiled.answer(from, to, protocol, port) {
                        Some(answer) => (answer.action, Reason::Rule(self.rule_at(answer.rule))),
                        None => deny(Reason::NoRule),
                    }
                }
            },
        };
        let name = node.and_then(|id| self.node(id));
        AtEnd {
            node: name.map(|node| node.name.to_string()),
            action,
            reason,
        }
    }

    pub(in crate::policy) fn rule_at(&self, slot: RuleSlot) -> Rule {
        self.compiled.rules.shown(slot)
    }
}

impl Judged {
    /// Whether it differs by its addresses and protocol family alone.
    pub(super) fn says_like(&self, other: &Self) -> bool {
        let said = |it: &Self| {
            (
                (it.src.clone(), it.dst.clone(), it.accepted),
                (it.egress.clone(), it.ingress.clone(), it.turn.clone()),
            )
        };
        said(self) == said(other)
    }
}

/// Flows with the same answer are one.
fn merge(flows: &mut Vec<Judged>, judged: Judged) {
    match flows.iter_mut().find(|known| known.says_like(&judged)) {
        Some(known) => known.addresses.extend(judged.addresses),
        None => flows.push(judged),
    }
}
