//! Rows and their checksums.
//!
//! A row is a list of values in the order of its columns, and its sum is over exactly that list,
//! kinds and lengths included, so the sum that was written can be computed again from what SQLite
//! gives back, before anything is decoded.

mod columns;
mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use mesh_core::node::{
    Addresses, AttributeName, AttributeValue, HostInfo, Name, Node, NodeId, Role, UnixTime, User,
    UserId, UserName,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub(super) use self::columns::{Columns, Unreadable};
pub(super) use self::tables::{KEY, NODE, POLICY, POLICY_HISTORY, Table, USER};
use super::PolicyText;
use crate::preauth::{KeyId, PreAuthKey};

pub(super) type Sum = [u8; 32];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Null,
    Int(i64),
    Text(String),
    Blob(Vec<u8>),
}

/// SHA-256 over the table's name and every value, each with its kind and length in front.
pub(super) fn sum(table: &str, values: &[Value]) -> Sum {
    let mut hash = Sha256::new();
    let mut part = |kind: u8, bytes: &[u8]| {
        hash.update([kind]);
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    };
    part(0, table.as_bytes());
    for value in values {
        match value {
            Value::Null => part(1, &[]),
            Value::Int(n) => part(2, &n.to_be_bytes()),
            Value::Text(text) => part(3, text.as_bytes()),
            Value::Blob(bytes) => part(4, bytes),
        }
    }
    hash.finalize().into()
}

/// Adds a row to the root sum, or takes it away: XOR does both.
pub(super) fn toggle(root: &mut Sum, sum: &Sum) {
    for (a, b) in root.iter_mut().zip(sum) {
        *a ^= b;
    }
}

// === writing ===

/// SQLite's integers are signed; ids and times stay far below the limit.
pub(super) fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

pub(super) fn int(n: u64) -> Value {
    Value::Int(signed(n))
}

fn optional(n: Option<u64>) -> Value {
    n.map_or(Value::Null, int)
}

fn flag(yes: bool) -> Value {
    Value::Int(i64::from(yes))
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> Value {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    Value::Text(serde_json::to_string(&items).expect("strings are JSON"))
}

pub(super) fn user(user: &User) -> Vec<Value> {
    vec![
        int(user.id.0),
        Value::Text(user.name.to_string()),
        Value::Text(user.display_name.clone()),
        int(user.created.0),
        match user.role {
            Role::Member => Value::Null,
            role => Value::Text(role.to_string()),
        },
        match user.idp_groups.is_empty() {
            true => Value::Null,
            false => list(&user.idp_groups),
        },
    ]
}

pub(super) fn node(node: &Node) -> Vec<Value> {
    let host = Host::from(&node.host);
    vec![
        int(node.id.0),
        Value::Text(node.name.to_string()),
        Value::Blob(node.machine.0.to_vec()),
        Value::Blob(node.key.0.to_vec()),
        optional(node.owner.user().map(|user| user.0)),
        list(node.owner.tags()),
        Value::Text(node.addresses.v4.to_string()),
        Value::Text(node.addresses.v6.to_string()),
        list(&node.endpoints),
        list(&node.advertised_routes),
        list(&node.approved_routes),
        flag(node.ephemeral),
        int(node.created.0),
        optional(node.expires.map(|at| at.0)),
        flag(node.expired),
        Value::Text(serde_json::to_string(&host).expect("strings are JSON")),
        attributes(&node.attributes),
    ]
}

fn attributes(attributes: &BTreeMap<AttributeName, AttributeValue>) -> Value {
    if attributes.is_empty() {
        return Value::Null;
    }
    let values = attributes.iter().map(|(name, value)| {
        let value = match value {
            AttributeValue::Text(text) => text.as_str().into(),
            AttributeValue::Number(number) => (*number).into(),
            AttributeValue::Bool(flag) => (*flag).into(),
        };
        (name.to_string(), value)
    });
    let object: serde_json::Map<String, serde_json::Value> = values.collect();
    Value::Text(serde_json::Value::from(object).to_string())
}

pub(super) fn key(key: &PreAuthKey) -> Vec<Value> {
    vec![
        int(key.id.0),
        Value::Text(key.prefix.clone()),
        Value::Blob(key.hash.to_vec()),
        flag(key.reusable),
        flag(key.ephemeral),
        optional(key.owner.user().map(|user| user.0)),
        list(key.owner.tags()),
        int(key.created.0),
        int(key.expires.0),
        flag(key.revoked),
        int(key.uses),
        optional(key.last_node.map(|node| node.0)),
    ]
}

pub(super) fn policy(policy: &PolicyText) -> Vec<Value> {
    vec![
        int(policy.version),
        Value::Text(policy.text.clone()),
        int(policy.changed.0),
        said(&policy.file),
        said(&policy.author),
    ]
}

/// Nothing is null.
fn said(text: &str) -> Value {
    match text {
        "" => Value::Null,
        text => Value::Text(text.to_owned()),
    }
}

// === reading ===

pub(super) fn read_user(row: &mut Columns) -> Result<User, Unreadable> {
    Ok(User {
        id: UserId(row.int("id")?),
        name: UserName::parse(&row.text("name")?).map_err(|_| Unreadable("name"))?,
        display_name: row.text("display_name")?,
        created: UnixTime(row.int("created")?),
        role: match row.said("role")?.as_str() {
            "" => Role::Member,
            role => Role::parse(role).map_err(|_| Unreadable("role"))?,
        },
        idp_groups: match row.said("idp_groups")?.as_str() {
            "" => BTreeSet::new(),
            list => serde_json::from_str(list).map_err(|_| Unreadable("idp_groups"))?,
        },
    })
}

pub(super) fn read_node(row: &mut Columns) -> Result<Node, Unreadable> {
    Ok(Node {
        id: NodeId(row.int("id")?),
        name: Name::parse(&row.text("name")?).map_err(|_| Unreadable("name"))?,
        machine: mesh_core::key::MachinePublic(row.blob("machine")?),
        key: mesh_core::key::NodePublic(row.blob("key")?),
        owner: row.owner()?,
        addresses: Addresses {
            v4: row.parse("v4")?,
            v6: row.parse("v6")?,
        },
        endpoints: row.list("endpoints", |item| item.parse().ok())?,
        advertised_routes: row.list("advertised", |item| item.parse().ok())?,
        approved_routes: row.list("approved", |item| item.parse().ok())?,
        ephemeral: row.flag("ephemeral")?,
        created: UnixTime(row.int("created")?),
        expires: row.optional("expires")?.map(UnixTime),
        expired: row.flag("expired")?,
        host: serde_json::from_str::<Host>(&row.text("host")?)
            .map_err(|_| Unreadable("host"))?
            .into(),
        attributes: row.attributes("attributes")?,
    })
}

pub(super) fn read_key(row: &mut Columns) -> Result<PreAuthKey, Unreadable> {
    Ok(PreAuthKey {
        id: KeyId(row.int("id")?),
        prefix: row.text("prefix")?,
        hash: row.blob("hash")?,
        reusable: row.flag("reusable")?,
        ephemeral: row.flag("ephemeral")?,
        owner: row.owner()?,
        created: UnixTime(row.int("created")?),
        expires: UnixTime(row.int("expires")?),
        revoked: row.flag("revoked")?,
        uses: row.int("uses")?,
        last_node: row.optional("last_node")?.map(NodeId),
    })
}

pub(super) fn read_policy(row: &mut Columns) -> Result<PolicyText, Unreadable> {
    Ok(PolicyText {
        version: row.int("version")?,
        text: row.text("text")?,
        changed: UnixTime(row.int("changed")?),
        file: row.said("file")?,
        author: row.said("author")?,
    })
}

/// The one row of `instance`.
#[derive(Debug, Clone)]
pub(super) struct Instance {
    pub(super) mesh: mesh_core::world::Mesh,
    pub(super) coordinator: mesh_core::key::MachinePublic,
    pub(super) created: UnixTime,
    pub(super) epoch: u64,
    pub(super) generation: u64,
    pub(super) next_id: u64,
    pub(super) root: Sum,
}

/// Columns of `instance` before `sum`.
pub(super) const INSTANCE_COLUMNS: usize = 11;

pub(super) fn instance(row: &Instance) -> Vec<Value> {
    vec![
        int(1),
        Value::Blob(row.mesh.id.0.to_vec()),
        Value::Text(row.mesh.domain.clone()),
        Value::Text(row.mesh.pools.v4.to_string()),
        Value::Text(row.mesh.pools.v6.to_string()),
        Value::Blob(row.coordinator.0.to_vec()),
        int(row.created.0),
        int(row.epoch),
        int(row.generation),
        int(row.next_id),
        Value::Blob(row.root.to_vec()),
    ]
}

pub(super) fn read_instance(row: &mut Columns) -> Result<Instance, Unreadable> {
    row.int("id")?;
    Ok(Instance {
        mesh: mesh_core::world::Mesh {
            id: mesh_core::node::MeshId(row.blob("mesh")?),
            domain: row.text("domain")?,
            pools: mesh_core::world::Pools {
                v4: row.parse("pool_v4")?,
                v6: row.parse("pool_v6")?,
            },
        },
        coordinator: mesh_core::key::MachinePublic(row.blob("coordinator")?),
        created: UnixTime(row.int("created")?),
        epoch: row.int("epoch")?,
        generation: row.int("generation")?,
        next_id: row.int("next_id")?,
        root: row.blob("root")?,
    })
}

#[derive(Serialize, Deserialize)]
struct Host {
    hostname: String,
    os: String,
    os_version: String,
    kernel: String,
    agent_version: String,
    backend: String,
}

impl From<&HostInfo> for Host {
    fn from(host: &HostInfo) -> Self {
        Self {
            hostname: host.hostname.clone(),
            os: host.os.clone(),
            os_version: host.os_version.clone(),
            kernel: host.kernel.clone(),
            agent_version: host.agent_version.clone(),
            backend: host.backend.clone(),
        }
    }
}

impl From<Host> for HostInfo {
    fn from(host: Host) -> Self {
        Self {
            hostname: host.hostname,
            os: host.os,
            os_version: host.os_version,
            kernel: host.kernel,
            agent_version: host.agent_version,
            backend: host.backend,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::node::{Owner, Tag};

    #[test]
    fn a_sum_tells_kinds_and_borders_apart() {
        let text = |s: &str| Value::Text(s.to_owned());
        let sums = [
            sum("t", &[text("ab"), text("c")]),
            sum("t", &[text("a"), text("bc")]),
            sum("t", &[Value::Blob(b"ab".to_vec()), text("c")]),
            sum("u", &[text("ab"), text("c")]),
            sum("t", &[text("ab"), text("c"), Value::Null]),
            sum("t", &[]),
        ];
        let distinct: BTreeSet<_> = sums.iter().collect();
        assert_eq!(distinct.len(), sums.len());
    }

    #[test]
    fn a_row_from_before_a_column_was_added_keeps_its_sum() {
        let old = [
            int(1),
            Value::Text("ann".to_owned()),
            Value::Text(String::new()),
            int(2),
        ];
        let new = |role| [&old[..], &[role, Value::Null]].concat();
        assert_eq!(USER.sum(&new(Value::Null)), sum("user", &old));
        assert_ne!(
            USER.sum(&new(Value::Text("admin".to_owned()))),
            sum("user", &old)
        );
        assert_eq!(USER.sum(&old[..3]), sum("user", &old[..3]));
    }

    #[test]
    fn a_user_reads_back_as_it_was_written() {
        let written = User {
            id: UserId(1),
            name: UserName::parse("ann@example.com").unwrap(),
            display_name: "Ann".to_owned(),
            created: UnixTime(3),
            role: Role::NetworkAdmin,
            idp_groups: BTreeSet::from(["ops".to_owned(), "a b".to_owned()]),
        };
        let values = user(&written);
        assert_eq!(values.len(), USER.columns);
        assert_eq!(read_user(&mut Columns::new(values)), Ok(written));
    }

    #[test]
    fn a_node_reads_back_as_it_was_written() {
        let name = |text| AttributeName::parse(text).unwrap();
        let written = Node {
            id: NodeId(7),
            name: Name::sanitize("gpu-1"),
            machine: mesh_core::key::MachinePublic([1; 32]),
            key: mesh_core::key::NodePublic([2; 32]),
            owner: Owner::Tags(BTreeSet::from([Tag::parse("tag:node").unwrap()])),
            addresses: Addresses {
                v4: "100.64.0.1".parse().unwrap(),
                v6: "fd00::1".parse().unwrap(),
            },
            endpoints: BTreeSet::from(["192.0.2.1:41641".parse().unwrap()]),
            advertised_routes: BTreeSet::from(["10.0.0.0/8".parse().unwrap()]),
            approved_routes: BTreeSet::new(),
            ephemeral: true,
            created: UnixTime(1),
            expires: Some(UnixTime(2)),
            expired: false,
            host: HostInfo {
                hostname: "gpu \"1\"".to_owned(),
                ..HostInfo::default()
            },
            attributes: BTreeMap::from([
                (name("custom:tier"), AttributeValue::Text("gold".to_owned())),
                (name("custom:score"), AttributeValue::Number(-7)),
                (name("custom:managed"), AttributeValue::Bool(true)),
            ]),
        };
        let values = node(&written);
        assert_eq!(values.len(), NODE.columns);
        assert_eq!(read_node(&mut Columns::new(values)), Ok(written));
    }
}
