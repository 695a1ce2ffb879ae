//! What the policy in force says of each pair, by mesh-core's own evaluation.
//!
//! For the live table only, which must follow whatever policy is set by hand; `--check` has its
//! expectations written down.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use mesh_core::key::{MachineKey, NodeKey};
use mesh_core::node::{Addresses, Name, Node, NodeId, Owner, Tag};
use mesh_core::policy::{CompiledPolicy, Document, Subjects, compile};
use mesh_core::world::Pools;
use mesh_tests::mesh::Mesh;
use mesh_tests::probe::Kind;
use serde_json::Value;

#[derive(Debug)]
pub(super) struct Expected {
    policy: CompiledPolicy,
    addresses: BTreeMap<String, Addresses>,
}

impl Expected {
    pub(super) fn of(mesh: &Mesh) -> Result<Self> {
        let nodes: Vec<Node> = mesh
            .coordinator
            .nodes()?
            .iter()
            .map(|row| node(row).with_context(|| format!("understand {row}")))
            .collect::<Result<_>>()?;
        let addresses = nodes
            .iter()
            .map(|n| (n.name.to_string(), n.addresses))
            .collect();
        let text = mesh.coordinator.policy()?;
        let document = Document::parse(&text).map_err(|problems| anyhow!("{problems:?}"))?;
        let pools = Pools {
            v4: Pools::default_v4(),
            v6: Pools::ula([0; 5]),
        };
        let nodes = nodes.into_iter().map(|n| (n.id, Arc::new(n))).collect();
        let subjects = Subjects {
            users: &BTreeMap::new(),
            nodes: &nodes,
            pools: &pools,
        };
        Ok(Self {
            policy: compile(&document, &subjects, None),
            addresses,
        })
    }

    pub(super) fn is_open(&self, from: &str, to: &str, kind: Kind) -> bool {
        let (Some(from), Some(to)) = (self.addresses.get(from), self.addresses.get(to)) else {
            return false;
        };
        let (protocol, port) = match kind {
            // Numbers of IANA; an echo request is ICMP's type 8.
            Kind::Icmp => (1, 8),
            Kind::Tcp(port) => (6, port),
            Kind::Udp(port) => (17, port),
        };
        self.policy
            .evaluate(from.v4.into(), to.v4.into(), protocol, port)
            .is_accept()
    }
}

/// A node as policy sees it; of keys it takes no notice.
fn node(row: &Value) -> Result<Node> {
    let texts = |field: &str| {
        let list = row[field].as_array();
        list.map(|list| list.iter().filter_map(Value::as_str).collect::<Vec<_>>())
            .with_context(|| format!("no {field}"))
    };
    let addresses: Vec<IpAddr> = texts("addresses")?
        .iter()
        .filter_map(|a| a.parse().ok())
        .collect();
    let (mut v4, mut v6) = (None, None);
    for address in addresses {
        match address {
            IpAddr::V4(address) => v4 = Some(address),
            IpAddr::V6(address) => v6 = Some(address),
        }
    }
    let tags: BTreeSet<_> = texts("tags")?
        .into_iter()
        .map(|tag| Tag::parse(tag).context("a tag"))
        .collect::<Result<_>>()?;
    let addresses = Addresses {
        v4: v4.context("no IPv4 address")?,
        v6: v6.context("no IPv6 address")?,
    };
    Ok(Node::new(
        NodeId(row["id"].as_u64().context("no id")?),
        Name::parse(row["name"].as_str().context("no name")?).context("a name")?,
        MachineKey::from_seed([0; 32]).public(),
        NodeKey::from_seed([0; 32]).public(),
        Owner::Tags(tags),
        addresses,
    ))
}
