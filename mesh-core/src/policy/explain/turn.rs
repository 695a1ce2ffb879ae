//! What would have to change for a verdict to be the other one.
//!
//! Looked for in the text and not in what it compiles to, since a rule that missed by its port has
//! left no trace there. A clause misses a flow by its sources, its destinations, its services, its
//! posture or its routers; one that misses by a single thing comes near.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::ends::Explainer;
use super::words;
use crate::netmap::Action;
use crate::node::{Node, NodeId};
use crate::policy::posture;
use crate::policy::problem::Spanned;
use crate::policy::rules;
use crate::policy::selector::{Autogroup, Selector};
use crate::policy::syntax::{Clause, Kind};

/// Nearest rules that are named.
const SHOWN: usize = 3;

/// What keeps a clause from being about a flow, the easiest to change first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Miss {
    Posture,
    Service,
    Via,
    Source,
    Destination,
}

/// One flow, and the nodes at its ends.
struct Flow<'a> {
    src: IpAddr,
    dst: IpAddr,
    /// Whose own address it is; a router is not meant by what lies behind it.
    from: Option<&'a Node>,
    to: Option<&'a Node>,
    receiver: Option<&'a Node>,
    protocol: u8,
    port: u16,
}

impl Explainer<'_> {
    pub(super) fn turn(
        &self,
        src: IpAddr,
        dst: IpAddr,
        (sender, receiver): (Option<NodeId>, Option<NodeId>),
        (protocol, port): (u8, u16),
    ) -> Vec<String> {
        let mut lines = Vec::new();
        for (end, address) in [(sender, src), (receiver, dst)] {
            if end.is_none() {
                lines.push(format!(
                    "no node has {address}, and there is no router for it that the other end is given"
                ));
            }
        }
        let placed = lines.is_empty();
        let node = |id: Option<NodeId>| id.and_then(|id| self.node(id)).map(AsRef::as_ref);
        let flow = Flow {
            src,
            dst,
            from: node(self.compiled.owner(src)),
            to: node(self.compiled.owner(dst)),
            receiver: node(receiver),
            protocol,
            port,
        };
        let implied = self.document.unrestricted.then(Clause::allow_all);
        let clauses = implied.iter().chain(&self.document.clauses);
        let mut accepts = Vec::new();
        let mut denies = Vec::new();
        let mut near: Vec<(Miss, String)> = Vec::new();
        for clause in clauses {
            let missed = self.missed(clause, &flow);
            let place = self.place_of(clause);
            match (clause.kind, &missed[..]) {
                (Kind::Deny, []) => denies.push(place),
                (_, []) => accepts.push(place),
                (Kind::Deny, _) => {}
                (_, [miss]) => near.push((*miss, self.near(clause, *miss, &flow))),
                _ => {}
            }
        }
        if let [first, more @ ..] = &denies[..] {
            let decide = match more {
                [] => format!("the deny at {first} decides; without it"),
                more => format!(
                    "the deny at {first} decides, and {} as well; without them",
                    more.join(", ")
                ),
            };
            lines.push(match accepts.first() {
                Some(accept) => format!("{decide} {accept} would allow it"),
                None => format!("{decide} no rule would allow it either"),
            });
        } else if let [first, more @ ..] = &accepts[..] {
            lines.push(match more {
                _ if !placed => format!("{first} would allow it"),
                [] => format!(
                    "it is allowed by {first} alone: take it from there, or add it to \"denies\""
                ),
                more => format!(
                    "without {first}, {} would still allow it; an entry of \"denies\" stops it",
                    more.join(", ")
                ),
            });
        }
        if accepts.is_empty() {
            lines.push(format!(
                "no rule has {} as source and {} to {} as destination",
                self.whose(src, flow.from),
                words::service(protocol, port),
                self.whose(dst, flow.to),
            ));
            near.sort();
            lines.extend(near.into_iter().take(SHOWN).map(|(_, words)| words));
        }
        lines
    }

    /// An owner, as a rule would say it, else the address.
    fn whose(&self, address: IpAddr, node: Option<&Node>) -> String {
        match node {
            Some(node) => self.owner(node),
            None => address.to_string(),
        }
    }

    fn missed(&self, clause: &Clause, flow: &Flow<'_>) -> Vec<Miss> {
        let mut missed = Vec::new();
        let mut src = clause.src.iter();
        if !src.any(|src| self.means(&src.value, flow.src, flow.from)) {
            missed.push(Miss::Source);
        }
        let postures = self.postures(clause);
        if !postures.is_empty() && !postures.iter().any(|name| self.has(flow.from, name)) {
            missed.push(Miss::Posture);
        }
        if !clause.via.is_empty() {
            let tags: BTreeSet<_> = flow.receiver.iter().flat_map(|n| n.owner.tags()).collect();
            if !clause.via.iter().any(|via| tags.contains(&via.value)) {
                missed.push(Miss::Via);
            }
        }
        // Of its destinations the one that comes nearest.
        let mut nearest: Option<Vec<Miss>> = None;
        for target in &clause.dst {
            let mut of_target = Vec::new();
            if !self.targets(&target.value.selector, flow) {
                of_target.push(Miss::Destination);
            }
            let action = action(clause);
            let services = rules::services(&target.value.services, action, self.document.icmp);
            let open = services.iter().any(|service| {
                service.protocol == flow.protocol && service.ports.contains(flow.port)
            });
            if !open {
                of_target.push(Miss::Service);
            }
            if nearest.as_ref().is_none_or(|best| of_target < *best) {
                nearest = Some(of_target);
            }
        }
        missed.extend(nearest.unwrap_or_else(|| vec![Miss::Destination, Miss::Service]));
        missed
    }

    fn means(&self, selector: &Selector, address: IpAddr, node: Option<&Node>) -> bool {
        let extent = self.resolver.extent(selector);
        node.is_some_and(|node| extent.owns(&node.owner, self.user(node)))
            || extent.holds(IpNet::from(address), &self.compiled.ground)
    }

    fn targets(&self, selector: &Selector, flow: &Flow<'_>) -> bool {
        match selector {
            Selector::Any => true,
            Selector::Autogroup(Autogroup::Own) => {
                let owner = |node: Option<&Node>| node.and_then(|node| node.owner.user());
                owner(flow.from).is_some() && owner(flow.from) == owner(flow.to)
            }
            selector => self.means(selector, flow.dst, flow.to),
        }
    }

    fn has(&self, node: Option<&Node>, name: &Spanned<String>) -> bool {
        let conditions = self.document.postures.get(&name.value);
        let held = |node| {
            let conditions = conditions.map(|conditions| &conditions.value);
            conditions.is_some_and(|all| posture::holds(all, &posture::attributes(node)))
        };
        node.is_some_and(held)
    }

    /// What a clause lacks, in words.
    fn near(&self, clause: &Clause, miss: Miss, flow: &Flow<'_>) -> String {
        let place = self.place_of(clause);
        let service = words::service(flow.protocol, flow.port);
        match miss {
            Miss::Source => {
                let src = clause.src.iter().map(|src| src.value.to_string());
                format!("nearest: {place} allows it to {}", words::some(src))
            }
            Miss::Destination => {
                let dst = clause.dst.iter().map(|dst| dst.value.selector.to_string());
                format!("nearest: {place} allows {service} to {}", words::some(dst))
            }
            Miss::Service => {
                let near = clause.dst.iter();
                let near = near.filter(|dst| self.targets(&dst.value.selector, flow));
                let services = near.flat_map(|dst| {
                    let action = action(clause);
                    rules::services(&dst.value.services, action, self.document.icmp)
                });
                let services: BTreeSet<_> = services.collect();
                let shown = words::services(services.iter().map(|s| (s.protocol, s.ports)));
                match shown.as_str() {
                    "" => format!("nearest: {place} grants capabilities and opens nothing"),
                    shown => format!("nearest: {place} allows {shown} there, not {service}"),
                }
            }
            Miss::Via => {
                let via = clause.via.iter().map(|via| via.value.to_string());
                format!("nearest: {place} leads through {} alone", words::some(via))
            }
            Miss::Posture => {
                let postures = self.postures(clause);
                let names = postures.iter().map(|name| name.value.clone());
                let node = match flow.from {
                    Some(node) => node.name.to_string(),
                    None => flow.src.to_string(),
                };
                let failing = postures
                    .iter()
                    .flat_map(|name| self.failing(&name.value, flow.from));
                format!(
                    "nearest: {place} asks for {}, which {node} has not: {}",
                    words::some(names),
                    words::some(failing),
                )
            }
        }
    }

    fn place_of(&self, clause: &Clause) -> String {
        let line = self.document.lines.line(clause.span);
        format!("{}:{line}", self.document.file())
    }

    /// One of these is asked of the source. To be denied takes none.
    fn postures<'b>(&'b self, clause: &'b Clause) -> &'b [Spanned<String>] {
        match clause.kind {
            Kind::Deny => &[],
            Kind::Acl | Kind::Grant => {
                let own = clause.posture.as_deref();
                own.unwrap_or(&self.document.default_posture)
            }
        }
    }

    /// The conditions of a posture that do not hold, each with what was reported.
    fn failing(&self, posture: &str, node: Option<&Node>) -> Vec<String> {
        let conditions = self.document.postures.get(posture);
        let conditions = conditions
            .into_iter()
            .flat_map(|conditions| &conditions.value);
        match node {
            None => vec!["it is no node".to_owned()],
            Some(node) => {
                let attributes = posture::attributes(node);
                conditions
                    .filter_map(|condition| condition.failing(&attributes))
                    .collect()
            }
        }
    }
}

fn action(clause: &Clause) -> Action {
    match clause.kind {
        Kind::Deny => Action::Deny,
        Kind::Acl | Kind::Grant => Action::Accept,
    }
}
