//! The node daemon: it does what mesh-core decides.
//!
//! ```text
//!  mesh ──► local_api ──┐                             ┌─► disk        the state folder
//!                       ▼                             │
//!  coordinator ◄─► control ◄─► eventloop ──watch──────┼─► wg          device, peers
//!                              (core::agent::State)   ├─► net         addresses, routes, rules
//!                       ▲                             ├─► dataplane   eBPF programs and maps
//!                       └──── told ───────────────────┴─► dns         resolver
//! ```
//!
//! The loop never waits; each resource has one actuator, which is told the newest plan and reports
//! what it has applied.

pub mod app;
pub mod cli;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod disk;
pub mod dns;
pub mod eventloop;
pub mod flow_log;
pub mod local_api;
pub mod metrics;
pub mod net;
pub mod snapshot;
pub mod stack;
pub mod state_dir;
pub mod sys;
pub mod underlay;
pub mod wg;

use anyhow::Context as _;
use rustix::process::{DumpableBehavior, Resource, Rlimit};

/// Keeps the keys out of core dumps and of other processes of this user.
pub fn harden() -> anyhow::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(Resource::Core, none).context("turn core dumps off")?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context("make the process undumpable")?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    Ok(())
}

/// A chain of errors in one line that a person can read: the kernel's verifier explains itself in
/// megabytes.
fn brief(error: &anyhow::Error) -> String {
    const LONGEST: usize = 200;
    let texts: Vec<String> = error
        .chain()
        .map(|error| {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            line.chars().take(LONGEST).collect()
        })
        .collect();
    texts.join(": ")
}
