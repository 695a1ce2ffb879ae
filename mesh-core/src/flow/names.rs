//! Names for as long as a record may speak of them.
//!
//! Numbers mean something only beside the netmap that they came with, and what the log tells of may be
//! older than the newest: what has just been revoked, and a flow that rests while one policy follows
//! another. So what a netmap no longer has is kept until no known flow speaks of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::FlowLog;
use crate::netmap::{Me, Netmap, Peer, Rule};
use crate::node::{Addresses, NodeId};
use crate::{Identity, RuleId};

/// The newest netmap, and of those before it what is still spoken of.
#[derive(Debug, Default)]
pub struct Names {
    newest: Option<Arc<Netmap>>,
    rules: BTreeMap<RuleId, Former<Rule>>,
    peers: BTreeMap<NodeId, Former<Peer>>,
}

#[derive(Debug)]
struct Former<T> {
    value: T,
    /// A whole walk has passed since the netmap lost it, so events of that time have been told.
    has_rested: bool,
}

impl Names {
    pub fn take(&mut self, netmap: &Arc<Netmap>) {
        if self
            .newest
            .as_ref()
            .is_some_and(|known| Arc::ptr_eq(known, netmap))
        {
            return;
        }
        let Some(before) = self.newest.replace(netmap.clone()) else {
            return;
        };
        self.rules
            .retain(|id, _| !netmap.policy.rules.contains_key(id));
        self.peers.retain(|id, _| !netmap.peers.contains_key(id));
        for (id, rule) in &before.policy.rules {
            if !netmap.policy.rules.contains_key(id) {
                self.rules.insert(*id, Former::new(rule));
            }
        }
        for (id, peer) in &before.peers {
            if !netmap.peers.contains_key(id) {
                self.peers.insert(*id, Former::new(peer));
            }
        }
    }

    /// Forgets what is spoken of no more. To be called after each walk.
    pub fn handle_walked(&mut self, log: &FlowLog) {
        if self.rules.is_empty() && self.peers.is_empty() {
            return;
        }
        let (rules, peers) = log.mentioned();
        let is_kept = |has_rested: &mut bool, is_mentioned| {
            is_mentioned || !std::mem::replace(has_rested, true)
        };
        self.rules
            .retain(|id, rule| is_kept(&mut rule.has_rested, rules.contains(id)));
        let peers: BTreeSet<_> = peers.into_iter().map(node).collect();
        self.peers
            .retain(|id, peer| is_kept(&mut peer.has_rested, peers.contains(id)));
    }

    pub(super) fn me(&self) -> Option<&Me> {
        self.newest.as_ref().map(|netmap| &netmap.me)
    }

    /// Who a node with these addresses is to the policy.
    pub(super) fn identity(&self, addresses: &Addresses) -> Option<Identity> {
        let netmap = self.newest.as_ref()?;
        let own = IpAddr::from(addresses.v4);
        netmap.policy.identities.get(&own.into()).copied()
    }

    pub(super) fn rule(&self, id: RuleId) -> Option<&Rule> {
        let newest = self.newest.as_ref();
        let known = newest.and_then(|netmap| netmap.policy.rules.get(&id));
        known.or_else(|| self.rules.get(&id).map(|former| &former.value))
    }

    /// The node of this number at the far end of a flow.
    pub fn peer(&self, number: u32) -> Option<&Peer> {
        let id = node(number);
        let newest = self.newest.as_ref();
        let known = newest.and_then(|netmap| netmap.peers.get(&id));
        known.or_else(|| self.peers.get(&id).map(|former| &former.value))
    }

    /// Whether a node is no peer any more.
    pub fn is_former(&self, number: u32) -> bool {
        self.peers.contains_key(&node(number))
    }

    /// The node that has an address.
    pub(super) fn peer_at(&self, address: IpAddr) -> Option<&Peer> {
        let newest = self.newest.iter().flat_map(|netmap| netmap.peers.values());
        let former = self.peers.values().map(|former| &former.value);
        newest
            .chain(former)
            .find(|peer| peer.addresses.contains(address))
    }
}

impl<T: Clone> Former<T> {
    fn new(value: &T) -> Self {
        Self {
            value: value.clone(),
            has_rested: false,
        }
    }
}

/// The kernel tells peers apart by the low 32 bits of their numbers.
fn node(number: u32) -> NodeId {
    NodeId(number.into())
}
