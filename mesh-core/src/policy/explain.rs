//! What the policy says of one flow, and which rule says it.
//!
//! Answers people and the policy's own tests. Packets are judged from the compiled entries, and
//! the tests hold the two against each other. [`Explainer`] takes what a person writes, a node, a
//! tag, a group, and puts the answer in words.

use std::net::IpAddr;

use ipnet::IpNet;

use super::classes::ClassId;
use super::compile::CompiledPolicy;
use super::entries;
use crate::RuleId;
use crate::netmap::Action;
use crate::node::NodeId;

mod ends;
mod flow;
mod imagine;
mod own;
mod reach;
mod shown;
mod turn;
mod words;

pub(super) use ends::End;
pub use ends::{Explainer, Unanswerable};
pub use flow::{AtEnd, Explanation, Judged, Reason};
pub use imagine::{Question, ask};
pub use own::{explain_own, what_can_i_reach, who_can_reach_me};
pub(super) use reach::Opened;
pub use reach::{Reach, Row};
pub(super) use shown::rule_json;
pub use shown::{Answer, Way};
pub(super) use words::{services, some};

/// The policy's word on a new flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    pub action: Action,
    /// `None` where no rule speaks of the flow: denied by default.
    pub rule: Option<RuleId>,
}

impl Decision {
    const DEFAULT: Self = Self {
        action: Action::Deny,
        rule: None,
    };

    pub fn is_accept(&self) -> bool {
        self.action == Action::Accept
    }
}

impl CompiledPolicy {
    /// May `src` open a flow to `dst`? For ICMP the port is the message type. The receiver is the
    /// node that has `dst`, or the router that the sender was given for it.
    pub fn evaluate(&self, src: IpAddr, dst: IpAddr, protocol: u8, port: u16) -> Decision {
        match self.receiver(src, dst) {
            Some(receiver) => self.evaluate_at(receiver, src, dst, protocol, port),
            None => Decision::DEFAULT,
        }
    }

    /// The same at a given receiver: a prefix may lie behind several routers.
    pub fn evaluate_at(
        &self,
        receiver: NodeId,
        src: IpAddr,
        dst: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Decision {
        let remote = self.known(receiver, src);
        let (Some(local), Some(remote)) = (self.own_class(receiver, dst), remote) else {
            return Decision::DEFAULT;
        };
        let answer = self.answer(remote, local, protocol, port);
        answer.map_or(Decision::DEFAULT, |answer| Decision {
            action: answer.action,
            rule: Some(self.rules.all[answer.rule].id),
        })
    }

    /// What stands between two classes for one protocol and port.
    fn answer(
        &self,
        src: ClassId,
        dst: ClassId,
        protocol: u8,
        port: u16,
    ) -> Option<entries::Answer> {
        self.rules
            .answers(&self.classes[src], &self.classes[dst])
            .into_iter()
            .find(|answer| answer.protocol == protocol && answer.ports.contains(port))
    }

    /// The class of an address that the node answers or routes for.
    fn own_class(&self, node: NodeId, address: IpAddr) -> Option<ClassId> {
        longest(self.nodes.get(&node)?.places(), address)
    }

    /// The node whose own address this is.
    pub fn owner(&self, address: IpAddr) -> Option<NodeId> {
        self.addresses.get(&IpNet::from(address)).copied()
    }

    /// The node that sends what comes from an address: who has it, or routes it.
    fn sender(&self, src: IpAddr) -> Option<NodeId> {
        self.owner(src).or_else(|| self.router(src))
    }

    /// Where a packet of `src` for `dst` ends up in the mesh.
    fn receiver(&self, src: IpAddr, dst: IpAddr) -> Option<NodeId> {
        if let Some(owner) = self.owner(dst) {
            return Some(owner);
        }
        let sender = self.sender(src)?;
        let peers = self.peers(sender).into_iter();
        let routed = peers.flat_map(|peer| {
            let routes = self.routes(sender, peer);
            routes.into_iter().map(move |route| (route, peer))
        });
        longest(routed, dst)
    }

    /// The first router of the subnet that an address lies in.
    fn router(&self, address: IpAddr) -> Option<NodeId> {
        let routes = self
            .nodes
            .iter()
            .rev()
            .flat_map(|(id, placed)| placed.routes.keys().map(|route| (*route, *id)));
        longest(routes, address)
    }
}

/// What stands beside the longest prefix that holds the address; the last of equals.
fn longest<T>(places: impl Iterator<Item = (IpNet, T)>, address: IpAddr) -> Option<T> {
    places
        .filter(|(net, _)| net.contains(&address))
        .max_by_key(|(net, _)| net.prefix_len())
        .map(|(_, found)| found)
}
