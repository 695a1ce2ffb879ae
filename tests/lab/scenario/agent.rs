//! The agent dies and comes back, with and without a coordinator.
//!
//! ```text
//!   operator ──► node         node's agent: kill -9 ... start, from what is on its disk
//! ```

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::mesh::Mesh;
use crate::{eventually, scaled};

use super::{Check, reach};

/// From the agent's start to traffic, with everything on disk.
const BACK: Duration = Duration::from_secs(5);

pub fn run(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    mesh.coordinator.stop()?;
    let outcome = check.that(
        "agents start again from their disk, without a coordinator",
        || {
            for node in &mut mesh.nodes {
                node.kill()?;
            }
            for node in &mut mesh.nodes {
                node.restart()?;
            }
            eventually(BACK, || {
                let cells = reach::measure(mesh, &reach::KINDS, scaled(reach::LIMIT))?;
                reach::compare(&cells, |cell| reach::is_open(cell.from, cell.to, cell.kind))
            })
        },
    );
    mesh.coordinator.restart()?;
    outcome?;
    check.that("and find the coordinator when it is there again", || {
        eventually(Duration::from_secs(30), || {
            let nodes = mesh.coordinator.nodes()?;
            ensure!(
                nodes.iter().all(|node| node["connected"] == true),
                "not all are connected"
            );
            Ok(())
        })
    })
}

/// The agent runs without root's rights, and in so much memory.
pub fn rights(mesh: &Mesh, check: &mut Check) -> Result<()> {
    check.that(
        "agents are not root: an own user, five capabilities",
        || {
            for node in &mesh.nodes {
                let path = format!("/proc/{}/status", node.agent.pid());
                let status = std::fs::read_to_string(path)?;
                let field = |name: &str| {
                    let line = status.lines().find_map(|line| line.strip_prefix(name));
                    line.unwrap_or_default().trim().to_owned()
                };
                ensure!(
                    field("Uid:").split_whitespace().all(|uid| uid != "0"),
                    "it is root"
                );
                ensure!(
                    field("CapEff:") == "000000c000003400",
                    "capabilities {}",
                    field("CapEff:")
                );
                ensure!(field("NoNewPrivs:") == "1", "it may gain privileges");
            }
            Ok(())
        },
    )
}
