//! What a reconnecting node says it holds: a digest of the map, and short digests of its items.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_core::RuleId;
use mesh_core::netmap::digest::{ItemDigest, ItemKey};
use mesh_core::netmap::{Digest, EntryKey, Netmap};
use mesh_core::node::{Epoch, Generation, NodeId};

use crate::convert::Invalid;
use crate::v1;
use crate::v1::held_item::Key;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    pub epoch: Epoch,
    pub generation: Generation,
    pub digest: Digest,
    pub items: BTreeMap<ItemKey, ItemDigest>,
}

impl Held {
    pub fn of(map: &Netmap) -> Self {
        let (digest, items) = map.digests();
        Self {
            epoch: map.epoch,
            generation: map.generation,
            digest,
            items,
        }
    }
}

impl From<&Held> for v1::Held {
    fn from(held: &Held) -> Self {
        Self {
            epoch: held.epoch.0,
            generation: held.generation.0,
            digest: held.digest.0.to_vec(),
            items: held
                .items
                .iter()
                .map(|(key, digest)| item(*key, *digest))
                .collect(),
        }
    }
}

impl TryFrom<&v1::Held> for Held {
    type Error = Invalid;

    fn try_from(held: &v1::Held) -> Result<Self, Invalid> {
        Ok(Self {
            epoch: Epoch(held.epoch),
            generation: Generation(held.generation),
            digest: digest(&held.digest)?,
            items: held.items.iter().map(read_item).collect::<Result<_, _>>()?,
        })
    }
}

pub(crate) fn digest(bytes: &[u8]) -> Result<Digest, Invalid> {
    bytes
        .try_into()
        .map(Digest)
        .map_err(|_| Invalid::Range("digest"))
}

fn item(key: ItemKey, digest: ItemDigest) -> v1::HeldItem {
    let key = match key {
        ItemKey::Mesh => Key::Mesh(true),
        ItemKey::Me => Key::Me(true),
        ItemKey::Peer(id) => Key::Peer(id.0),
        ItemKey::Identity(net) => Key::Identity(net.into()),
        ItemKey::Entry(key) => Key::Entry((&key).into()),
        ItemKey::Rule(id) => Key::Rule(id.0),
    };
    v1::HeldItem {
        key: Some(key),
        digest,
    }
}

fn read_item(item: &v1::HeldItem) -> Result<(ItemKey, ItemDigest), Invalid> {
    let key = match item.key.as_ref().ok_or(Invalid::Missing("key"))? {
        Key::Mesh(_) => ItemKey::Mesh,
        Key::Me(_) => ItemKey::Me,
        Key::Peer(id) => ItemKey::Peer(NodeId(*id)),
        Key::Identity(prefix) => ItemKey::Identity(IpNet::try_from(prefix)?),
        Key::Entry(key) => ItemKey::Entry(EntryKey::try_from(key)?),
        Key::Rule(id) => ItemKey::Rule(RuleId(*id)),
    };
    Ok((key, item.digest))
}
