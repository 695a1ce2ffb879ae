//! Who is a peer and what belongs to whom: one writer, many readers.
//!
//! Readers take a snapshot per batch and never wait for a configuration; the writer builds the next
//! snapshot beside the old one. Peers themselves are shared between snapshots, so that a change to
//! one leaves every other session alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use anyhow::Context as _;
use ipnet::IpNet;
use mesh_core::key::NodePublic;
use mesh_core::wireguard::{AllowedIps, DeviceOp};
use rand_core::{OsRng, RngCore as _};

use super::peer::{Identity, Peer};

/// What a packet is judged by.
#[derive(Default)]
pub(super) struct Table {
    pub(super) by_key: HashMap<NodePublic, Arc<Peer>>,
    pub(super) by_index: HashMap<u32, Arc<Peer>>,
    pub(super) allowed: AllowedIps<Arc<Peer>>,
}

/// What the table is built from.
#[derive(Default)]
pub(super) struct Peers {
    peers: BTreeMap<NodePublic, Arc<Peer>>,
    /// Every prefix has one holder, by construction.
    held: BTreeMap<IpNet, NodePublic>,
}

impl Peers {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.peers.values()
    }

    pub(super) fn contains(&self, key: &NodePublic) -> bool {
        self.peers.contains_key(key)
    }

    pub(super) fn peer(&self, key: &NodePublic) -> anyhow::Result<&Arc<Peer>> {
        self.peers
            .get(key)
            .with_context(|| format!("no peer {key}"))
    }

    /// Each peer's allowed IPs.
    pub(super) fn allowed_ips(&self) -> BTreeMap<NodePublic, BTreeSet<IpNet>> {
        let mut all: BTreeMap<NodePublic, BTreeSet<IpNet>> = BTreeMap::new();
        for (net, key) in &self.held {
            all.entry(*key).or_default().insert(*net);
        }
        all
    }

    /// Takes a step that is about one peer.
    pub(super) fn apply(&mut self, op: &DeviceOp, identity: &Identity) -> anyhow::Result<()> {
        match op {
            DeviceOp::RemovePeer(key) => self.remove(key),
            DeviceOp::AddPeer(key, config) => {
                let peer = self.add(*key, identity)?;
                if let Some(session) = peer.lock().as_mut() {
                    session.set_keepalive(config.keepalive);
                    if let Some(endpoint) = config.endpoint {
                        session.write_endpoint(endpoint);
                    }
                }
                self.hold(*key, &config.allowed_ips);
            }
            DeviceOp::SetEndpoint(key, endpoint) => {
                if let Some(session) = self.peer(key)?.lock().as_mut() {
                    session.write_endpoint(*endpoint);
                }
            }
            DeviceOp::SetKeepalive(key, keepalive) => {
                if let Some(session) = self.peer(key)?.lock().as_mut() {
                    session.set_keepalive(*keepalive);
                }
            }
            DeviceOp::AddAllowedIps(key, nets) => {
                self.peer(key)?;
                self.hold(*key, nets);
            }
            DeviceOp::ReplaceAllowedIps(key, nets) => {
                self.peer(key)?;
                self.held.retain(|_, holder| holder != key);
                self.hold(*key, nets);
            }
            DeviceOp::SetKey(_) | DeviceOp::SetListenPort(_) | DeviceOp::SetFwmark(_) => {}
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, key: &NodePublic) {
        if let Some(peer) = self.peers.remove(key) {
            peer.remove();
        }
        self.held.retain(|_, holder| holder != key);
    }

    fn add(&mut self, key: NodePublic, identity: &Identity) -> anyhow::Result<&Arc<Peer>> {
        let peer = Arc::new(Peer::new(key, self.free_index(), identity)?);
        self.remove(&key);
        Ok(self.peers.entry(key).or_insert(peer))
    }

    fn hold(&mut self, key: NodePublic, nets: &BTreeSet<IpNet>) {
        self.held.extend(nets.iter().map(|net| (net.trunc(), key)));
    }

    /// A number that no peer has. Random, so that it tells an observer nothing.
    fn free_index(&self) -> u32 {
        loop {
            let index = OsRng.next_u32() >> 8;
            if self.iter().all(|peer| peer.index != index) {
                return index;
            }
        }
    }

    pub(super) fn table(&self) -> Table {
        let by_key = self
            .peers
            .iter()
            .map(|(key, peer)| (*key, Arc::clone(peer)));
        let by_index = self.iter().map(|peer| (peer.index, Arc::clone(peer)));
        let allowed = self
            .held
            .iter()
            .filter_map(|(net, key)| Some((*net, Arc::clone(self.peers.get(key)?))));
        Table {
            by_key: by_key.collect(),
            by_index: by_index.collect(),
            allowed: allowed.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::wireguard::PeerConfig;

    fn key(n: u8) -> NodePublic {
        NodePublic([n; 32])
    }

    fn add(n: u8, nets: &[&str]) -> DeviceOp {
        let allowed_ips = nets.iter().map(|net| net.parse().unwrap()).collect();
        let config = PeerConfig {
            allowed_ips,
            ..PeerConfig::default()
        };
        DeviceOp::AddPeer(key(n), config)
    }

    #[test]
    fn a_prefix_belongs_to_whom_it_was_given_last() {
        let identity = Identity::new([7; 32]);
        let mut peers = Peers::default();
        for op in [add(1, &["10.0.0.0/8"]), add(2, &["10.0.0.0/8"])] {
            peers.apply(&op, &identity).unwrap();
        }
        let table = peers.table();
        let holder = table.allowed.longest_match("10.1.1.1".parse().unwrap());
        assert_eq!(holder.unwrap().key, key(2));
        assert_eq!(peers.allowed_ips().len(), 1);

        peers
            .apply(&DeviceOp::RemovePeer(key(2)), &identity)
            .unwrap();
        let table = peers.table();
        let holder = table.allowed.longest_match("10.1.1.1".parse().unwrap());
        assert!(holder.is_none());
        assert!(!table.by_key.contains_key(&key(2)));
    }

    #[test]
    fn a_removed_peer_is_dead_in_every_snapshot() {
        let identity = Identity::new([7; 32]);
        let mut peers = Peers::default();
        peers.apply(&add(1, &[]), &identity).unwrap();
        let old = peers.table();
        peers
            .apply(&DeviceOp::RemovePeer(key(1)), &identity)
            .unwrap();
        assert!(old.by_key[&key(1)].lock().is_none());
    }

    #[test]
    fn other_peers_are_the_same_after_a_change() {
        let identity = Identity::new([7; 32]);
        let mut peers = Peers::default();
        peers.apply(&add(1, &[]), &identity).unwrap();
        let before = Arc::clone(peers.peer(&key(1)).unwrap());
        peers.apply(&add(2, &[]), &identity).unwrap();
        assert!(Arc::ptr_eq(&before, peers.peer(&key(1)).unwrap()));
    }
}
