//! A mesh in the laboratory: a coordinator and nodes, each on a host, by their real programs.
//!
//! ```text
//!   coordinator      node       operator      sandbox      developer
//!        └─────────────┴────────────┴────────────┴────────────┘
//!                              underlay
//! ```

mod coordinator;
mod node;
mod stranger;

pub use coordinator::{Coordinator, Key};
pub use node::{Backend, Node, WIREGUARD_PORT};
pub use stranger::Stranger;

use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{Host, Lab, User};

/// The roles of the example policy; each is a node's name, and `tag:` before it its tag.
pub const ROLES: [&str; 4] = ["node", "operator", "sandbox", "developer"];

/// A running mesh. Its parts end before the underlay does.
#[derive(Debug)]
pub struct Mesh {
    pub nodes: Vec<Node>,
    pub coordinator: Coordinator,
    pub lab: Lab,
    /// Which WireGuard all its nodes use.
    pub backend: Backend,
    /// A one-off key that has made a node.
    pub used_key: String,
}

impl Mesh {
    /// A coordinator, and no node yet.
    pub fn new(lab: Lab, backend: Backend) -> Result<Self> {
        let coordinator = Coordinator::start(lab.host("coordinator")?)?;
        Ok(Self {
            nodes: Vec::new(),
            coordinator,
            lab,
            backend,
            used_key: String::new(),
        })
    }

    /// Four nodes, one of each role, connected and with the policy enforced.
    pub fn of_roles(lab: Lab, policy: &str, backend: Backend) -> Result<Self> {
        Self::of_users(lab, policy, backend, |_| User::Agent)
    }

    /// Likewise, the sandbox alone with programs in the kernel: the others may not load any, and
    /// judge in process. They have the sandbox's packets judged even when its programs are disarmed.
    pub fn in_process(lab: Lab, policy: &str) -> Result<Self> {
        Self::of_users(lab, policy, Backend::Auto, |role| match role {
            "sandbox" => User::Agent,
            _ => User::AgentWithoutBpf,
        })
    }

    fn of_users(
        lab: Lab,
        policy: &str,
        backend: Backend,
        user: impl Fn(&str) -> User,
    ) -> Result<Self> {
        let mut mesh = Self::new(lab, backend)?;
        mesh.nodes = ROLES
            .iter()
            .map(|role| Node::start_as(user(role), mesh.lab.host(role)?, backend))
            .collect::<Result<_>>()?;
        for node in &mesh.nodes {
            let key = mesh.coordinator.key(&Key::one_off().tag(node.name()))?;
            node.up(mesh.coordinator.join(), &key)?;
            mesh.used_key = key;
        }
        // Now only: the policy's own tests need nodes of every role.
        mesh.coordinator.set_policy(policy)?;
        mesh.settle()?;
        Ok(mesh)
    }

    pub fn node(&self, name: &str) -> &Node {
        self.nodes
            .iter()
            .find(|node| node.name() == name)
            .unwrap_or_else(|| panic!("the mesh has no node {name}"))
    }

    pub fn node_mut(&mut self, name: &str) -> &mut Node {
        self.nodes
            .iter_mut()
            .find(|node| node.name() == name)
            .unwrap_or_else(|| panic!("the mesh has no node {name}"))
    }

    /// The ends of all programs' logs, for whoever looks for a fault.
    pub fn logs(&self) -> String {
        let agents = self.nodes.iter().map(|node| (node.name(), &node.agent));
        let coordinator = ("coordinator", &self.coordinator.process);
        agents
            .chain([coordinator])
            .map(|(name, process)| format!("--- {name}\n{}\n", process.log_tail()))
            .collect()
    }

    /// Waits until every node enforces what the coordinator holds.
    pub fn settle(&mut self) -> Result<()> {
        let nodes = &self.nodes;
        let coordinator = &self.coordinator;
        let settled = crate::eventually(SETTLE, || {
            let generation = coordinator.generation()?;
            let known = coordinator.nodes()?;
            for node in nodes {
                let row = known.iter().find(|row| row["name"] == node.name());
                let row = row.with_context(|| format!("{} is no node", node.name()))?;
                let error = text(row, "/apply_error").unwrap_or_default();
                ensure!(error.is_empty(), "{} cannot apply: {error}", node.name());
                let own = number(row, "/applied_generation")?;
                ensure!(
                    own >= generation,
                    "{} is at {own} of {generation}",
                    node.name()
                );
            }
            Ok(())
        });
        if settled.is_err() {
            for node in &mut self.nodes {
                node.agent.check_running()?;
            }
            self.coordinator.process.check_running()?;
        }
        settled.context("wait for all nodes to enforce the newest generation")
    }
}

/// Connection, netmap and programs of four nodes on a loaded machine.
const SETTLE: std::time::Duration = std::time::Duration::from_secs(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub fn of(self, addresses: &[IpAddr]) -> Result<IpAddr> {
        addresses
            .iter()
            .copied()
            .find(|address| address.is_ipv4() == (self == Self::V4))
            .with_context(|| format!("no {self:?} address in {addresses:?}"))
    }
}

/// What a program prints with `--json`. Its complaint, when it has one, is the error.
fn json(host: &Host, program: &str, arguments: &[&str]) -> Result<Value> {
    let mut command = host.command(User::Root, program);
    command.args(arguments).arg("--json");
    // Without values: one of them may be a secret.
    let words: Vec<_> = arguments.iter().take(2).copied().collect();
    let line = format!("{program} {} on {}", words.join(" "), host.name());
    let text = crate::host::output(command).with_context(|| line.clone())?;
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&text).with_context(|| format!("{line} printed no JSON: {text}"))
}

/// A text in an answer, by JSON pointer.
fn text<'a>(value: &'a Value, pointer: &str) -> Result<&'a str> {
    match value.pointer(pointer).and_then(Value::as_str) {
        Some(text) => Ok(text),
        None => bail!("no text at {pointer} in {value}"),
    }
}

/// A number in an answer, by JSON pointer; 64-bit numbers may come as texts.
fn number(value: &Value, pointer: &str) -> Result<u64> {
    let found = value.pointer(pointer);
    match found.and_then(|n| n.as_u64().or_else(|| n.as_str()?.parse().ok())) {
        Some(number) => Ok(number),
        None => bail!("no number at {pointer} in {value}"),
    }
}
