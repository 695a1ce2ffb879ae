//! Digests of a netmap and of its items.
//!
//! The digest is SHA-256 over the items' own digests in key order. A node that reconnects sends
//! those of its items, shortened; a coordinator that has forgotten what it sent can still answer
//! with exactly the difference ([`super::delta::since`]).
//!
//! Every field is hashed with its length in front, so no two different maps spell the same bytes.
//! The generation is left out: two maps that say the same have the same digest.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

use super::{Action, Entry, EntryKey, Me, Netmap, Peer, Rule};
use crate::node::NodeId;
use crate::world::Mesh;
use crate::{Direction, Identity, RuleId};

/// SHA-256 of a whole map. All zero stands for "no map".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    pub const NONE: Self = Self([0; 32]);
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Digest({}…)", hex::encode(&self.0[..4]))
    }
}

/// Names one item of a map, across its collections.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ItemKey {
    Mesh,
    Me,
    Peer(NodeId),
    Identity(IpNet),
    Entry(EntryKey),
    Rule(RuleId),
}

/// Stands before the items' digests.
const PREFIX: &[u8] = b"mesh netmap v1\0";

/// The first eight bytes of an item's digest: enough to notice a difference, not to prove equality.
pub type ItemDigest = u64;

impl Netmap {
    pub fn digest(&self) -> Digest {
        let mut all = Sha256::new_with_prefix(PREFIX);
        self.for_each_item(|_, digest| all.update(digest));
        Digest(all.finalize().into())
    }

    /// What a node says it holds when it asks for the difference.
    pub fn items(&self) -> BTreeMap<ItemKey, ItemDigest> {
        self.digests().1
    }

    /// [`Netmap::digest`] and [`Netmap::items`] by hashing every item only once.
    pub fn digests(&self) -> (Digest, BTreeMap<ItemKey, ItemDigest>) {
        let mut all = Sha256::new_with_prefix(PREFIX);
        // Put in order at once: a tree that grows item by item takes several times as long.
        let mut items = Vec::with_capacity(self.policy.entries.len());
        self.for_each_item(|key, digest| {
            all.update(digest);
            let short = digest[..8].try_into().expect("eight of thirty-two bytes");
            items.push((key, u64::from_be_bytes(short)));
        });
        (Digest(all.finalize().into()), items.into_iter().collect())
    }

    fn for_each_item(&self, mut each: impl FnMut(ItemKey, [u8; 32])) {
        each(ItemKey::Mesh, mesh(&self.mesh));
        each(ItemKey::Me, me(&self.me));
        for (id, item) in &self.peers {
            each(ItemKey::Peer(*id), peer(item));
        }
        for (net, item) in &self.policy.identities {
            each(ItemKey::Identity(*net), identity(net, *item));
        }
        for (key, item) in &self.policy.entries {
            each(ItemKey::Entry(*key), entry(key, item));
        }
        for (id, item) in &self.policy.rules {
            each(ItemKey::Rule(*id), rule(*id, item));
        }
    }
}

/// A hash of fields, each with its length in front.
struct Fields(Vec<u8>);

impl Fields {
    fn of(kind: u8) -> Self {
        let mut fields = Vec::with_capacity(256);
        fields.push(kind);
        Self(fields)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend((bytes.len() as u64).to_be_bytes());
        self.0.extend(bytes);
        self
    }

    fn text(self, text: &str) -> Self {
        self.bytes(text.as_bytes())
    }

    fn number(self, number: impl Into<u64>) -> Self {
        self.bytes(&number.into().to_be_bytes())
    }

    fn optional<T>(self, value: Option<T>, write: impl FnOnce(Self, T) -> Self) -> Self {
        match value {
            None => self.number(0_u8),
            Some(value) => write(self.number(1_u8), value),
        }
    }

    fn each<T>(
        self,
        items: impl ExactSizeIterator<Item = T>,
        write: impl Fn(Self, T) -> Self,
    ) -> Self {
        let counted = self.number(items.len() as u64);
        items.fold(counted, write)
    }

    fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.bytes(&address.octets()),
            IpAddr::V6(address) => self.bytes(&address.octets()),
        }
    }

    fn net(self, net: &IpNet) -> Self {
        self.address(net.addr()).number(net.prefix_len())
    }

    fn endpoint(self, endpoint: &SocketAddr) -> Self {
        self.address(endpoint.ip()).number(endpoint.port())
    }

    fn done(self) -> [u8; 32] {
        Sha256::digest(&self.0).into()
    }
}

fn mesh(mesh: &Mesh) -> [u8; 32] {
    Fields::of(0)
        .bytes(&mesh.id.0)
        .text(&mesh.domain)
        .net(&mesh.pools.v4.into())
        .net(&mesh.pools.v6.into())
        .done()
}

fn me(me: &Me) -> [u8; 32] {
    Fields::of(1)
        .number(me.id.0)
        .text(me.name.as_str())
        .bytes(&me.key.0)
        .address(me.addresses.v4.into())
        .address(me.addresses.v6.into())
        .each(me.tags.iter(), |f, tag| f.text(tag.as_str()))
        .optional(me.user.as_ref(), |f, user| f.text(user.as_str()))
        .optional(me.expires, |f, at| f.number(at.0))
        .number(me.expired)
        .done()
}

fn peer(peer: &Peer) -> [u8; 32] {
    Fields::of(2)
        .number(peer.id.0)
        .text(peer.name.as_str())
        .bytes(&peer.key.0)
        .address(peer.addresses.v4.into())
        .address(peer.addresses.v6.into())
        .each(peer.endpoints.iter(), Fields::endpoint)
        .each(peer.routes.iter(), Fields::net)
        .each(peer.tags.iter(), |f, tag| f.text(tag.as_str()))
        .optional(peer.user.as_ref(), |f, user| f.text(user.as_str()))
        .done()
}

fn identity(net: &IpNet, identity: Identity) -> [u8; 32] {
    Fields::of(3).net(net).number(identity.0).done()
}

fn entry(key: &EntryKey, entry: &Entry) -> [u8; 32] {
    let direction = match key.direction {
        Direction::Ingress => 0_u8,
        Direction::Egress => 1,
    };
    let action = match entry.action {
        Action::Accept => 0_u8,
        Action::Deny => 1,
    };
    Fields::of(4)
        .number(key.remote.0)
        .number(key.local.0)
        .number(direction)
        .optional(key.proto, Fields::number)
        .number(key.ports.first)
        .number(key.ports.last)
        .number(action)
        .number(entry.rule.0)
        .done()
}

fn rule(id: RuleId, rule: &Rule) -> [u8; 32] {
    Fields::of(5)
        .number(id.0)
        .text(&rule.file)
        .number(rule.line)
        .text(&rule.summary)
        .done()
}
