//! The difference between two netmaps of one node, and its application.
//!
//! The law that everything else leans on: `a.apply(diff(&a, &b)) == b`, and a delta that does not
//! start at the very map held is refused, never half applied.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::digest::{ItemDigest, ItemKey};
use super::{Digest, Entry, EntryKey, Me, Netmap, Peer, Rule};
use crate::changes::changes;
use crate::node::{Epoch, Generation, NodeId};
use crate::world::Mesh;
use crate::{Identity, RuleId};

/// Upserts carry the whole new item; removals only its key.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NetmapDelta {
    pub epoch: Epoch,
    pub generation: Generation,
    pub mesh: Option<Mesh>,
    pub me: Option<Me>,
    pub peers: BTreeMap<NodeId, Option<Peer>>,
    pub identities: BTreeMap<IpNet, Option<Identity>>,
    pub entries: BTreeMap<EntryKey, Option<Entry>>,
    pub rules: BTreeMap<RuleId, Option<Rule>>,
}

impl NetmapDelta {
    /// Nothing but the generation moved.
    pub fn is_empty(&self) -> bool {
        let Self {
            epoch: _,
            generation: _,
            mesh,
            me,
            peers,
            identities,
            entries,
            rules,
        } = self;
        mesh.is_none()
            && me.is_none()
            && peers.is_empty()
            && identities.is_empty()
            && entries.is_empty()
            && rules.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StaleGeneration {
    #[error("update of generation {got} does not follow generation {have}")]
    Backwards { have: Generation, got: Generation },
    #[error("update of epoch {got} does not follow epoch {have}")]
    Epoch { have: Epoch, got: Epoch },
    #[error("the update does not lead to the map that it announces")]
    Digest,
}

/// What turns `old` into `new`.
pub fn diff(old: &Netmap, new: &Netmap) -> NetmapDelta {
    NetmapDelta {
        epoch: new.epoch,
        generation: new.generation,
        mesh: (old.mesh != new.mesh).then(|| new.mesh.clone()),
        me: (old.me != new.me).then(|| new.me.clone()),
        peers: owned(&old.peers, &new.peers),
        identities: owned(&old.policy.identities, &new.policy.identities),
        entries: owned(&old.policy.entries, &new.policy.entries),
        rules: owned(&old.policy.rules, &new.policy.rules),
    }
}

/// What turns the map that somebody says to hold into `new`, from the digests of its items alone.
pub fn since(held: &BTreeMap<ItemKey, ItemDigest>, new: &Netmap) -> NetmapDelta {
    between(held, &new.items(), new)
}

/// As [`since`], where `now` is known to be [`Netmap::items`] of `new`.
pub fn between(
    held: &BTreeMap<ItemKey, ItemDigest>,
    now: &BTreeMap<ItemKey, ItemDigest>,
    new: &Netmap,
) -> NetmapDelta {
    let mut delta = NetmapDelta {
        epoch: new.epoch,
        generation: new.generation,
        ..NetmapDelta::default()
    };
    for (key, _) in changes(held, now) {
        match key {
            ItemKey::Mesh => delta.mesh = Some(new.mesh.clone()),
            ItemKey::Me => delta.me = Some(new.me.clone()),
            ItemKey::Peer(id) => drop(delta.peers.insert(*id, new.peers.get(id).cloned())),
            ItemKey::Identity(net) => {
                delta
                    .identities
                    .insert(*net, new.policy.identities.get(net).copied());
            }
            ItemKey::Entry(key) => {
                delta
                    .entries
                    .insert(*key, new.policy.entries.get(key).copied());
            }
            ItemKey::Rule(id) => drop(delta.rules.insert(*id, new.policy.rules.get(id).cloned())),
        }
    }
    delta
}

impl Netmap {
    /// The map that `delta` leads to, if it leads to `digest`. `self` stays what it is.
    pub fn apply(&self, delta: NetmapDelta, digest: Digest) -> Result<Self, StaleGeneration> {
        if delta.epoch != self.epoch {
            return Err(StaleGeneration::Epoch {
                have: self.epoch,
                got: delta.epoch,
            });
        }
        if delta.generation < self.generation {
            return Err(StaleGeneration::Backwards {
                have: self.generation,
                got: delta.generation,
            });
        }
        let mut next = self.clone();
        next.generation = delta.generation;
        if let Some(mesh) = delta.mesh {
            next.mesh = mesh;
        }
        if let Some(me) = delta.me {
            next.me = me;
        }
        change(&mut next.peers, delta.peers);
        change(&mut next.policy.identities, delta.identities);
        change(&mut next.policy.entries, delta.entries);
        change(&mut next.policy.rules, delta.rules);
        if next.digest() == digest {
            Ok(next)
        } else {
            Err(StaleGeneration::Digest)
        }
    }
}

fn owned<K: Ord + Clone, V: PartialEq + Clone>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
) -> BTreeMap<K, Option<V>> {
    changes(old, new)
        .map(|(key, value)| (key.clone(), value.cloned()))
        .collect()
}

fn change<K: Ord, V>(map: &mut BTreeMap<K, V>, changes: BTreeMap<K, Option<V>>) {
    for (key, value) in changes {
        match value {
            Some(value) => drop(map.insert(key, value)),
            None => drop(map.remove(&key)),
        }
    }
}
