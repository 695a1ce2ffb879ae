//! Netmaps and their deltas on the wire.
//!
//! A repeated field stands for a map, so the same key twice is an error and not a last-one-wins:
//! the digest of what was sent and of what was understood must be over the same items.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_core::netmap::{
    Action, Entry, EntryKey, Me, Netmap, NetmapDelta, NodePolicy, Peer, PortRange, Rule,
};
use mesh_core::node::{Epoch, Generation, NodeId};
use mesh_core::world::Mesh;
use mesh_core::{Direction, Identity, RuleId};

use crate::convert::Invalid;
use crate::v1;

// === whole maps ===

impl From<&Netmap> for v1::Netmap {
    fn from(map: &Netmap) -> Self {
        Self {
            mesh: Some((&map.mesh).into()),
            me: Some((&map.me).into()),
            peers: map.peers.values().map(v1::Peer::from).collect(),
            identities: map.policy.identities.iter().map(identity_of).collect(),
            entries: map.policy.entries.iter().map(policy_entry).collect(),
            rules: map.policy.rules.iter().map(policy_rule).collect(),
        }
    }
}

/// Reads a whole map; epoch and generation stand in the update around it.
pub fn full(map: &v1::Netmap, epoch: Epoch, generation: Generation) -> Result<Netmap, Invalid> {
    Ok(Netmap {
        mesh: Mesh::try_from(map.mesh.as_ref().ok_or(Invalid::Missing("mesh"))?)?,
        epoch,
        generation,
        me: Me::try_from(map.me.as_ref().ok_or(Invalid::Missing("me"))?)?,
        peers: unique(&map.peers, "peers", |peer| {
            Ok((NodeId(peer.id), Peer::try_from(peer)?))
        })?,
        policy: NodePolicy {
            identities: unique(&map.identities, "identities", read_identity)?,
            entries: unique(&map.entries, "entries", read_entry)?,
            rules: unique(&map.rules, "rules", read_rule)?,
        },
    })
}

// === deltas ===

impl From<&NetmapDelta> for v1::NetmapDelta {
    fn from(delta: &NetmapDelta) -> Self {
        Self {
            mesh: delta.mesh.as_ref().map(v1::Mesh::from),
            me: delta.me.as_ref().map(v1::Me::from),
            peers: delta.peers.values().flatten().map(v1::Peer::from).collect(),
            peers_removed: removed(&delta.peers).map(|id| id.0).collect(),
            identities: upserts(&delta.identities).map(identity_of).collect(),
            identities_removed: removed(&delta.identities)
                .map(|net| (*net).into())
                .collect(),
            entries: upserts(&delta.entries).map(policy_entry).collect(),
            entries_removed: removed(&delta.entries).map(v1::EntryKey::from).collect(),
            rules: upserts(&delta.rules).map(policy_rule).collect(),
            rules_removed: removed(&delta.rules).map(|id| id.0).collect(),
        }
    }
}

pub fn delta(
    delta: &v1::NetmapDelta,
    epoch: Epoch,
    generation: Generation,
) -> Result<NetmapDelta, Invalid> {
    Ok(NetmapDelta {
        epoch,
        generation,
        mesh: delta.mesh.as_ref().map(Mesh::try_from).transpose()?,
        me: delta.me.as_ref().map(Me::try_from).transpose()?,
        peers: change(
            unique(&delta.peers, "peers", |peer| {
                Ok((NodeId(peer.id), Peer::try_from(peer)?))
            })?,
            delta.peers_removed.iter().map(|id| Ok(NodeId(*id))),
            "peers",
        )?,
        identities: change(
            unique(&delta.identities, "identities", read_identity)?,
            delta.identities_removed.iter().map(IpNet::try_from),
            "identities",
        )?,
        entries: change(
            unique(&delta.entries, "entries", read_entry)?,
            delta.entries_removed.iter().map(EntryKey::try_from),
            "entries",
        )?,
        rules: change(
            unique(&delta.rules, "rules", read_rule)?,
            delta.rules_removed.iter().map(|id| Ok(RuleId(*id))),
            "rules",
        )?,
    })
}

fn upserts<K, V>(changes: &BTreeMap<K, Option<V>>) -> impl Iterator<Item = (&K, &V)> {
    changes
        .iter()
        .filter_map(|(key, value)| value.as_ref().map(|value| (key, value)))
}

fn removed<K, V>(changes: &BTreeMap<K, Option<V>>) -> impl Iterator<Item = &K> {
    changes
        .iter()
        .filter(|(_, value)| value.is_none())
        .map(|(key, _)| key)
}

fn change<K: Ord, V>(
    upserts: BTreeMap<K, V>,
    removed: impl Iterator<Item = Result<K, Invalid>>,
    field: &'static str,
) -> Result<BTreeMap<K, Option<V>>, Invalid> {
    let mut changes: BTreeMap<K, Option<V>> = upserts
        .into_iter()
        .map(|(key, value)| (key, Some(value)))
        .collect();
    for key in removed {
        if changes.insert(key?, None).is_some() {
            return Err(Invalid::Duplicate(field));
        }
    }
    Ok(changes)
}

fn unique<T, K: Ord, V>(
    items: &[T],
    field: &'static str,
    read: impl Fn(&T) -> Result<(K, V), Invalid>,
) -> Result<BTreeMap<K, V>, Invalid> {
    let read: Vec<(K, V)> = items.iter().map(read).collect::<Result<_, _>>()?;
    let map: BTreeMap<K, V> = read.into_iter().collect();
    if map.len() < items.len() {
        return Err(Invalid::Duplicate(field));
    }
    Ok(map)
}

// === policy ===

fn identity_of((net, identity): (&IpNet, &Identity)) -> v1::IdentityOf {
    v1::IdentityOf {
        prefix: Some((*net).into()),
        identity: identity.0,
    }
}

fn read_identity(item: &v1::IdentityOf) -> Result<(IpNet, Identity), Invalid> {
    let net = IpNet::try_from(item.prefix.as_ref().ok_or(Invalid::Missing("prefix"))?)?;
    let identity = Identity(item.identity);
    if identity < Identity::FIRST {
        return Err(Invalid::Range("identity"));
    }
    Ok((net, identity))
}

impl From<&EntryKey> for v1::EntryKey {
    fn from(key: &EntryKey) -> Self {
        let direction = match key.direction {
            Direction::Ingress => v1::Direction::Ingress,
            Direction::Egress => v1::Direction::Egress,
        };
        Self {
            remote: key.remote.0,
            local: key.local.0,
            direction: direction.into(),
            proto: key.proto.map(u32::from),
            first_port: u32::from(key.ports.first),
            last_port: u32::from(key.ports.last),
        }
    }
}

impl TryFrom<&v1::EntryKey> for EntryKey {
    type Error = Invalid;

    fn try_from(key: &v1::EntryKey) -> Result<Self, Invalid> {
        let port = |port: u32| u16::try_from(port).map_err(|_| Invalid::Range("port"));
        let proto = key
            .proto
            .map(u8::try_from)
            .transpose()
            .map_err(|_| Invalid::Range("proto"))?;
        let ports = PortRange {
            first: port(key.first_port)?,
            last: port(key.last_port)?,
        };
        if ports.first > ports.last || (proto.is_none() && ports != PortRange::ALL) {
            return Err(Invalid::Range("port"));
        }
        let direction = match v1::Direction::try_from(key.direction) {
            Ok(v1::Direction::Ingress) => Direction::Ingress,
            Ok(v1::Direction::Egress) => Direction::Egress,
            Err(_) => return Err(Invalid::Range("direction")),
        };
        Ok(Self {
            remote: Identity(key.remote),
            local: Identity(key.local),
            direction,
            proto,
            ports,
        })
    }
}

fn policy_entry((key, entry): (&EntryKey, &Entry)) -> v1::PolicyEntry {
    let action = match entry.action {
        Action::Accept => v1::Action::Accept,
        Action::Deny => v1::Action::Deny,
    };
    v1::PolicyEntry {
        key: Some(key.into()),
        action: action.into(),
        rule: entry.rule.0,
    }
}

fn read_entry(item: &v1::PolicyEntry) -> Result<(EntryKey, Entry), Invalid> {
    let key = EntryKey::try_from(item.key.as_ref().ok_or(Invalid::Missing("key"))?)?;
    let action = match v1::Action::try_from(item.action) {
        Ok(v1::Action::Accept) => Action::Accept,
        Ok(v1::Action::Deny) => Action::Deny,
        Err(_) => return Err(Invalid::Range("action")),
    };
    Ok((
        key,
        Entry {
            action,
            rule: RuleId(item.rule),
        },
    ))
}

fn policy_rule((id, rule): (&RuleId, &Rule)) -> v1::PolicyRule {
    v1::PolicyRule {
        id: id.0,
        file: rule.file.to_string(),
        line: rule.line,
        summary: rule.summary.clone(),
    }
}

fn read_rule(item: &v1::PolicyRule) -> Result<(RuleId, Rule), Invalid> {
    Ok((
        RuleId(item.id),
        Rule {
            file: item.file.as_str().into(),
            line: item.line,
            summary: item.summary.clone(),
        },
    ))
}
