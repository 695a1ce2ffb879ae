//! What this node's kernel should hold, planned from the netmap: plain values, compared by `==`.
//!
//! Each part belongs to one actuator, which is told the newest plan and brings its resource there.
//! A plan says nothing of how, and nothing of what was there before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::key::{NodeKey, NodePublic};
use crate::netmap::{Netmap, NodePolicy, Peer};
use crate::node::{Epoch, Generation};
use crate::routes::LocalPrefix;
use crate::wireguard::PeerConfig;
use crate::{dataplane, dns, routes, wireguard};

#[cfg(test)]
mod tests;

/// MTU of the mesh's interface: the least that IPv6 allows (RFC 8200, section 5), so that tunnel
/// packets fit through every underlay.
pub const MTU: u16 = 1280;
/// Keeps the NAT mapping of an idle tunnel alive. RFC 4787, section 4.3, asks NATs for two minutes;
/// many home routers forget after thirty seconds.
const KEEPALIVE_SECONDS: u16 = 25;

/// Whether the node may still talk to its peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Granted,
    /// The node key has expired: the plan holds no peers and no entries, whatever the map says.
    Expired,
}

/// What the plan needs to know of this machine.
#[derive(Clone, Debug)]
pub struct Local<'a> {
    pub key: &'a NodeKey,
    pub listen_port: u16,
    /// Prefixes of the machine's own interfaces.
    pub underlay: &'a BTreeSet<LocalPrefix>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Desired {
    /// Grows by one with every plan that differs from the one before.
    pub revision: u64,
    pub epoch: Epoch,
    pub generation: Generation,
    pub access: Access,
    /// What the plan was made from, cut down by `access`.
    pub netmap: Arc<Netmap>,
    pub wireguard: wireguard::DeviceConfig,
    pub routes: routes::Config,
    pub dataplane: dataplane::Tables,
    /// `None` when the mesh's domain cannot be served.
    pub dns: Option<dns::Config>,
}

/// The plan for `netmap`.
pub fn plan(netmap: &Arc<Netmap>, access: Access, local: &Local<'_>, revision: u64) -> Desired {
    let netmap = match access {
        Access::Granted => netmap.clone(),
        Access::Expired => Arc::new(without_peers(netmap)),
    };
    let routes: BTreeSet<IpNet> = netmap
        .mesh
        .pools
        .each()
        .into_iter()
        .chain(netmap.peers.values().flat_map(subnet_routes))
        .collect();
    Desired {
        revision,
        epoch: netmap.epoch,
        generation: netmap.generation,
        access,
        wireguard: wireguard::DeviceConfig {
            key: local.key.clone(),
            listen_port: local.listen_port,
            fwmark: routes::FWMARK,
            peers: peers(&netmap, local.underlay),
        },
        routes: routes::Config {
            addresses: netmap.me.addresses.prefixes().into(),
            mtu: MTU.into(),
            up: true,
            only_mesh: routes.clone(),
            routes,
            table: routes::TABLE,
        },
        dataplane: dataplane::Tables::of(&netmap, MTU),
        dns: dns::Config::of(&netmap).ok(),
        netmap,
    }
}

/// The map with nobody in it: the node keeps its name and addresses, and drops all traffic.
fn without_peers(netmap: &Netmap) -> Netmap {
    let mut alone = netmap.clone();
    alone.peers.clear();
    alone.policy = NodePolicy::default();
    alone
}

fn peers(netmap: &Netmap, underlay: &BTreeSet<LocalPrefix>) -> BTreeMap<NodePublic, PeerConfig> {
    let config = |peer: &Peer| PeerConfig {
        endpoint: endpoint(peer, underlay),
        allowed_ips: peer
            .addresses
            .prefixes()
            .into_iter()
            .chain(subnet_routes(peer))
            .collect(),
        keepalive: Some(KEEPALIVE_SECONDS),
    };
    netmap
        .peers
        .values()
        .filter(|peer| peer.key != netmap.me.key)
        .map(|peer| (peer.key, config(peer)))
        .collect()
}

/// Exit routes (0.0.0.0/0, ::/0) are left out: a node sends its internet traffic through another one
/// only when its own user says so, and nothing lets the user say so yet.
fn subnet_routes(peer: &Peer) -> impl Iterator<Item = IpNet> {
    let routes = peer.routes.iter().copied();
    routes.filter(|net| net.prefix_len() > 0)
}

/// Where to try a peer first: in a network that we share, else over IPv4, which more hosts have.
/// Once the peer answers, WireGuard's roaming knows better.
fn endpoint(peer: &Peer, underlay: &BTreeSet<LocalPrefix>) -> Option<SocketAddr> {
    let rank = |at: &SocketAddr| {
        // Two hosts that both have 172.17.0.1 do not reach each other there.
        let ours = underlay.iter().any(|prefix| prefix.net.addr() == at.ip());
        let shared = underlay
            .iter()
            .filter(|prefix| prefix.net.contains(&at.ip()))
            .map(|prefix| prefix.net.prefix_len())
            .max();
        (!ours, shared, at.is_ipv4())
    };
    peer.endpoints
        .iter()
        // An endpoint among the peer's own mesh addresses would be a tunnel inside itself.
        .filter(|at| at.port() != 0 && !peer.addresses.contains(at.ip()))
        .max_by_key(|at| rank(at))
        .copied()
}
