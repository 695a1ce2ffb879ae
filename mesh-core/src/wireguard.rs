//! The WireGuard device: what it should hold, what it holds, and the steps between.
//!
//! The hard part is to touch nothing that works: a peer that is removed and added again loses its
//! session, and an endpoint that WireGuard learned from an authenticated packet (roaming) knows
//! more than the one that we were told. So steps are as small as the difference, and a desired
//! endpoint is written only when it is news.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::key::{NodeKey, NodePublic};

pub mod allowed;

pub use allowed::AllowedIps;

/// How long a session may carry data after its handshake: REJECT_AFTER_TIME of the WireGuard
/// paper, section 6.1. An older handshake says nothing about the endpoint that stands.
pub const SESSION_LIFETIME: Duration = Duration::from_secs(180);

/// What the device should hold.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    pub key: NodeKey,
    /// UDP port; 0 leaves the choice to the device, and then stays with what it chose.
    pub listen_port: u16,
    /// Mark of every encrypted packet, which keeps it out of the mesh's own routes; 0 is none.
    pub fwmark: u32,
    pub peers: BTreeMap<NodePublic, PeerConfig>,
}

impl PartialEq for DeviceConfig {
    fn eq(&self, other: &Self) -> bool {
        self.key.public() == other.key.public()
            && self.listen_port == other.listen_port
            && self.fwmark == other.fwmark
            && self.peers == other.peers
    }
}

impl Eq for DeviceConfig {}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PeerConfig {
    /// Where to send until the peer has been heard; `None` waits for it to speak first.
    pub endpoint: Option<SocketAddr>,
    /// What the peer may send from and is sent to.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Seconds between keepalives on an idle session; `None` sends none.
    pub keepalive: Option<u16>,
}

/// What the device holds, as observed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeviceStatus {
    /// The public half of the device's key, if it has one.
    pub key: Option<NodePublic>,
    pub listen_port: u16,
    pub fwmark: u32,
    pub peers: BTreeMap<NodePublic, PeerStatus>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PeerStatus {
    /// Where packets go now: configured, or learned by roaming.
    pub endpoint: Option<SocketAddr>,
    /// What this process last wrote as the endpoint; `None` for a device that was adopted.
    pub written_endpoint: Option<SocketAddr>,
    pub allowed_ips: BTreeSet<IpNet>,
    pub keepalive: Option<u16>,
    /// Time since the last completed handshake.
    pub handshake_age: Option<Duration>,
    /// Encrypted bytes, handshakes and keepalives included.
    pub rx_bytes: u64,
    pub tx_bytes: u64,
}

impl PeerStatus {
    /// Whether a session stands that the peer was proved to hold the other end of.
    pub fn is_live(&self) -> bool {
        self.handshake_age.is_some_and(|age| age < SESSION_LIFETIME)
    }
}

/// One step. Steps are applied in order.
#[derive(Clone, Debug)]
pub enum DeviceOp {
    SetKey(NodeKey),
    SetListenPort(u16),
    SetFwmark(u32),
    RemovePeer(NodePublic),
    AddPeer(NodePublic, PeerConfig),
    SetEndpoint(NodePublic, SocketAddr),
    SetKeepalive(NodePublic, Option<u16>),
    /// Adds to what the peer holds, taking each prefix from the peer that holds it.
    AddAllowedIps(NodePublic, BTreeSet<IpNet>),
    /// Leaves the peer with exactly these.
    ReplaceAllowedIps(NodePublic, BTreeSet<IpNet>),
}

/// The steps from `status` to `config`, none if it is there.
///
/// A prefix that `config` gives to several peers goes to the one with the lowest key, whatever the
/// device holds: the result does not depend on history.
pub fn reconcile(config: &DeviceConfig, status: &DeviceStatus) -> Vec<DeviceOp> {
    let mut ops = Vec::new();
    // The device refuses a peer that is itself, and it removes one when it is given the key.
    let me = config.key.public();
    if status.key != Some(me) {
        ops.push(DeviceOp::SetKey(config.key.clone()));
    }
    if config.listen_port != status.listen_port && config.listen_port != 0 {
        ops.push(DeviceOp::SetListenPort(config.listen_port));
    }
    if config.fwmark != status.fwmark {
        ops.push(DeviceOp::SetFwmark(config.fwmark));
    }

    let desired = owners(config);
    // Follows what each step does to the holders, so that no step is taken twice.
    let mut held: BTreeMap<IpNet, NodePublic> = BTreeMap::new();
    for (key, peer) in &status.peers {
        if *key != me && config.peers.contains_key(key) {
            held.extend(peer.allowed_ips.iter().map(|net| (*net, *key)));
        } else if *key != me || status.key == Some(me) {
            ops.push(DeviceOp::RemovePeer(*key));
        }
    }

    for (key, peer) in config.peers.iter().filter(|(key, _)| **key != me) {
        let allowed = desired.get(key).cloned().unwrap_or_default();
        let Some(observed) = status.peers.get(key) else {
            held.extend(allowed.iter().map(|net| (*net, *key)));
            let peer = PeerConfig {
                allowed_ips: allowed,
                ..peer.clone()
            };
            ops.push(DeviceOp::AddPeer(*key, peer));
            continue;
        };
        if let Some(endpoint) = peer.endpoint
            && endpoint_is_news(endpoint, observed)
        {
            ops.push(DeviceOp::SetEndpoint(*key, endpoint));
        }
        if peer.keepalive.filter(|s| *s != 0) != observed.keepalive {
            ops.push(DeviceOp::SetKeepalive(
                *key,
                peer.keepalive.filter(|s| *s != 0),
            ));
        }
        let missing: BTreeSet<IpNet> = allowed
            .iter()
            .filter(|net| held.get(net) != Some(key))
            .copied()
            .collect();
        if !missing.is_empty() {
            held.extend(missing.iter().map(|net| (*net, *key)));
            ops.push(DeviceOp::AddAllowedIps(*key, missing));
        }
    }

    // Last, so that a prefix which moves is never without a holder.
    let surplus: BTreeSet<NodePublic> = held
        .iter()
        .filter(|(net, key)| !desired.get(key).is_some_and(|nets| nets.contains(net)))
        .map(|(_, key)| *key)
        .collect();
    for key in surplus {
        let allowed = desired.get(&key).cloned().unwrap_or_default();
        ops.push(DeviceOp::ReplaceAllowedIps(key, allowed));
    }
    ops
}

/// Each peer's allowed IPs, every prefix with one holder.
fn owners(config: &DeviceConfig) -> BTreeMap<NodePublic, BTreeSet<IpNet>> {
    let me = config.key.public();
    let mut taken = BTreeSet::new();
    let mut owners: BTreeMap<NodePublic, BTreeSet<IpNet>> = BTreeMap::new();
    for (key, peer) in config.peers.iter().filter(|(key, _)| **key != me) {
        for net in &peer.allowed_ips {
            // The device keeps prefixes without their host bits.
            let net = net.trunc();
            if taken.insert(net) {
                owners.entry(*key).or_default().insert(net);
            }
        }
    }
    owners
}

fn endpoint_is_news(desired: SocketAddr, observed: &PeerStatus) -> bool {
    match (observed.endpoint, observed.written_endpoint) {
        (Some(now), _) if now == desired => false,
        (None, _) => true,
        (Some(_), Some(written)) => written != desired,
        // Adopted: nobody remembers what was written, so let a session that works speak.
        (Some(_), None) => !observed.is_live(),
    }
}

#[cfg(test)]
mod tests;
