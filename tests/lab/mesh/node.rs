//! A node of a laboratory: the agent as its unprivileged user, and `mesh` as its user's command.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::{Array, Map, MapData};
use mesh_common::maps::{CFG, Config, LAYOUT_VERSION};
use serde_json::Value;

use crate::host::AGENT_ID;
use crate::{Host, Process, User, eventually, scaled, until};

use super::{Family, json, number};

/// Which WireGuard the agents use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    Auto,
    Kernel,
    Userspace,
}

#[derive(Debug)]
pub struct Node {
    pub agent: Process,
    /// The root helper that may write resolv.conf.
    pub helper: Process,
    pub host: Host,
    backend: Backend,
    user: User,
}

/// WireGuard's port of every node.
pub const WIREGUARD_PORT: u16 = 51_820;

/// From the start of the agent to its first answer.
const START: Duration = Duration::from_secs(5);

impl Node {
    /// An agent that belongs to no mesh yet.
    pub fn start(host: Host, backend: Backend) -> Result<Self> {
        Self::start_as(User::Agent, host, backend)
    }

    /// Likewise, with these rights.
    pub fn start_as(user: User, host: Host, backend: Backend) -> Result<Self> {
        let helper = Self::launch_helper(&host)?;
        let agent = Self::launch(&host, backend, user)?;
        let mut node = Self {
            agent,
            helper,
            host,
            backend,
            user,
        };
        node.wait_until_ready()?;
        Ok(node)
    }

    fn launch_helper(host: &Host) -> Result<Process> {
        let mut command = host.command(User::Root, "mesh-dns-helper");
        command
            .args([
                "--socket",
                "/run/mesh-dns-helper.sock",
                "--user",
                &AGENT_ID.to_string(),
            ])
            .arg("--state")
            .arg(host.folder().join("dns-helper"));
        let helper = host.spawn("mesh-dns-helper", command)?;
        // The agent reports a missing helper at once, as it should; so the helper goes first.
        let socket = host.path("/run/mesh-dns-helper.sock");
        until("the helper listens", START, || socket.exists())?;
        Ok(helper)
    }

    fn launch(host: &Host, backend: Backend, user: User) -> Result<Process> {
        let mut command = host.command(user, "mesh-agent");
        command.arg("--state-dir").arg(host.folder().join("agent"));
        command.args(["--listen-port", &WIREGUARD_PORT.to_string()]);
        command.args([
            "--backend",
            match backend {
                Backend::Auto => "auto",
                Backend::Kernel => "kernel",
                Backend::Userspace => "userspace",
            },
        ]);
        host.spawn("mesh-agent", command)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        // A program that has ended will not answer, however long one waits.
        let answer = eventually(START, || match self.agent.check_running() {
            Ok(()) => self.status().map(drop),
            Err(_) => Ok(()),
        });
        self.agent.check_running()?;
        answer.with_context(|| format!("wait for the agent of {}", self.name()))
    }

    pub fn name(&self) -> &str {
        self.host.name()
    }

    /// `mesh` with these arguments and `--json`.
    pub fn mesh(&self, arguments: &[&str]) -> Result<Value> {
        json(&self.host, "mesh", arguments)
    }

    pub fn up(&self, join: &str, key: &str) -> Result<()> {
        match self.mesh(&["up", "--join", join, "--auth-key", key]) {
            // It waits as long as a person would. An emulated machine verifies programs for longer;
            // the agent keeps trying, and whoever needs the mesh settled waits for it.
            Err(error) if scaled(START) > START && format!("{error:#}").contains("not up yet") => {
                Ok(())
            }
            up => up.map(drop),
        }
    }

    pub fn status(&self) -> Result<Value> {
        self.mesh(&["status"])
    }

    /// Its address in the mesh.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        let status = self.status()?;
        let addresses: Vec<IpAddr> = status
            .pointer("/me/addresses")
            .and_then(Value::as_array)
            .with_context(|| format!("{} has no addresses", self.name()))?
            .iter()
            .filter_map(|address| address.as_str()?.parse().ok())
            .collect();
        family.of(&addresses)
    }

    /// `kill -9`, at once.
    pub fn kill(&mut self) -> Result<()> {
        self.agent.kill()
    }

    /// Starts the agent again after it has ended, whatever the reason.
    pub fn restart(&mut self) -> Result<()> {
        self.agent = Self::launch(&self.host, self.backend, self.user)?;
        self.wait_until_ready()
    }

    /// Packets dropped for a reason, in a direction.
    pub fn dropped(&self, reason: &str, direction: &str) -> Result<u64> {
        let counters = self.mesh(&["counters"])?;
        let reasons = counters.pointer("/reasons").and_then(Value::as_array);
        reasons
            .with_context(|| format!("no reasons in {counters}"))?
            .iter()
            .filter(|row| row["reason"] == reason && row["direction"] == direction)
            .map(|row| number(row, "/packets"))
            .sum()
    }

    /// Packets that a rule decided, by the line of the policy that it stands on.
    pub fn counted_by_line(&self, line: u64) -> Result<u64> {
        let counters = self.mesh(&["counters"])?;
        let rules = counters.pointer("/rules").and_then(Value::as_array);
        rules
            .with_context(|| format!("no rules in {counters}"))?
            .iter()
            .filter(|row| number(row, "/line").is_ok_and(|found| found == line))
            .map(|row| number(row, "/packets"))
            .sum()
    }

    /// Lets the node's own programs look on and drop nothing, as a hostile root could. A restart of
    /// the agent sets them right.
    pub fn disarm(&self) -> Result<()> {
        let path = format!("/sys/fs/bpf/mesh-agent/v{LAYOUT_VERSION}/{CFG}");
        let pinned =
            MapData::from_pin(self.host.path(&path)).context("open the programs' settings")?;
        let mut settings: Array<_, Config> = Map::Array(pinned).try_into()?;
        let mut config = settings.get(&0, 0)?;
        config.flags |= Config::OBSERVE;
        settings
            .set(0, config, 0)
            .context("write the programs' settings")
    }
}
