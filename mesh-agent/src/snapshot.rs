//! What the agent looks like now, published by the event loop to all who only look.
//!
//! Cheap to take and consistent in itself: readers never wait for the loop, nor it for them.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use mesh_core::agent::{Standing, State};
use mesh_core::desired::Desired;
use mesh_core::health::{Condition, Health};
use mesh_core::netmap::{Netmap, Peer};
use mesh_core::node::{Epoch, Generation};

#[derive(Clone, Debug)]
pub struct Snapshot {
    pub standing: Standing,
    pub connected: bool,
    pub netmap: Option<Arc<Netmap>>,
    pub desired: Option<Arc<Desired>>,
    /// What every enforcing actuator has applied.
    pub applied: Option<(Epoch, Generation)>,
    /// Updates of the coordinator that were refused.
    pub refused: u64,
    pub health: Health,
}

impl Default for Snapshot {
    /// An agent that has just started.
    fn default() -> Self {
        Self {
            standing: Standing::Stopped,
            connected: false,
            netmap: None,
            desired: None,
            applied: None,
            refused: 0,
            health: Health::default(),
        }
    }
}

impl Snapshot {
    pub fn of(state: &State, now: Instant) -> Self {
        Self {
            standing: state.standing(now),
            connected: state.is_connected(),
            netmap: state.netmap().cloned(),
            desired: state.desired().cloned(),
            applied: state.applied(),
            refused: state.refused(),
            health: state.health().clone(),
        }
    }

    /// An agent that cannot use its state: it stays up to say so.
    pub fn broken(name: &'static str, condition: Condition) -> Self {
        let mut look = Self::default();
        look.health.raise(name, condition);
        look
    }

    /// Whether this node enforces what it was told, with or without the coordinator.
    pub fn is_ready(&self) -> bool {
        self.standing == Standing::Running && self.applied.is_some()
    }

    /// The node that holds `address`, be it this one.
    pub fn whois(&self, address: IpAddr) -> Option<Whois<'_>> {
        let netmap = self.netmap.as_deref()?;
        if netmap.me.addresses.contains(address) {
            return Some(Whois::Me(netmap));
        }
        netmap
            .peers
            .values()
            .find(|peer| peer.addresses.contains(address))
            .map(|peer| Whois::Peer(netmap, peer))
    }

    /// An address of the mesh, or a node by name, with or without the mesh's domain.
    pub fn resolve(&self, target: &str, family: Family) -> Option<(Whois<'_>, IpAddr)> {
        if let Ok(address) = target.parse() {
            return Some((self.whois(address)?, address));
        }
        let netmap = self.netmap.as_deref()?;
        let target = target.trim_end_matches('.').to_ascii_lowercase();
        let name = target
            .strip_suffix(&netmap.mesh.domain)
            .and_then(|name| name.strip_suffix('.'))
            .unwrap_or(&target);
        let who = if netmap.me.name.as_str() == name {
            Whois::Me(netmap)
        } else {
            let peer = netmap
                .peers
                .values()
                .find(|peer| peer.name.as_str() == name)?;
            Whois::Peer(netmap, peer)
        };
        let addresses = who.addresses();
        Some(match family {
            Family::V4 => (who, addresses.v4.into()),
            Family::V6 => (who, addresses.v6.into()),
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    V4,
    V6,
}

/// A node of the netmap, this one or another.
#[derive(Clone, Copy, Debug)]
pub enum Whois<'a> {
    Me(&'a Netmap),
    Peer(&'a Netmap, &'a Peer),
}

impl Whois<'_> {
    pub fn name(&self) -> &str {
        match self {
            Self::Me(netmap) => netmap.me.name.as_str(),
            Self::Peer(_, peer) => peer.name.as_str(),
        }
    }

    pub fn addresses(&self) -> mesh_core::node::Addresses {
        match self {
            Self::Me(netmap) => netmap.me.addresses,
            Self::Peer(_, peer) => peer.addresses,
        }
    }

    pub fn response(&self) -> mesh_api::v1::WhoisResponse {
        let (netmap, id, tags, user) = match self {
            Self::Me(netmap) => (netmap, netmap.me.id, &netmap.me.tags, &netmap.me.user),
            Self::Peer(netmap, peer) => (netmap, peer.id, &peer.tags, &peer.user),
        };
        let addresses = self.addresses();
        let [host, _] = addresses.prefixes();
        let identity = netmap.policy.identities.get(&host);
        mesh_api::v1::WhoisResponse {
            node_id: id.0,
            name: self.name().to_owned(),
            tags: tags.iter().map(ToString::to_string).collect(),
            user: user.as_ref().map(ToString::to_string),
            addresses: addresses.each().iter().map(ToString::to_string).collect(),
            identity: identity.map_or(0, |identity| identity.0),
        }
    }
}
