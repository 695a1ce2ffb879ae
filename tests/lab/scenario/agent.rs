//! The agent dies and comes back, with and without a coordinator.
//!
//! ```text
//!   operator ──► node         node's agent: kill -9 ... start, from what is on its disk
//! ```

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::mesh::{Family, Mesh};
use crate::probe::{Echo, Kind, Stream};
use crate::{eventually, scaled, until};

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

/// How long traffic is watched without an agent.
const ALONE: Duration = Duration::from_secs(2);

/// `kill -9`. With the kernel's WireGuard traffic flows on as policy has it, without an agent; in
/// process it stops, and nothing that is denied passes meanwhile.
pub fn killed(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let kernel = mesh.node("node").status()?["backend"] == "kernel";
    let to = mesh.node("node").address(Family::V4)?;
    let allowed = Stream::start(&mesh.node("operator").host, to, Kind::Icmp, PACE)?;
    until("the allowed flow runs", LIMIT, || {
        allowed.report().received > 10
    })?;
    let denied = Stream::start(&mesh.node("sandbox").host, to, Kind::Udp(9000), PACE)?;
    let _echo = Echo::start(&mesh.node("node").host, &[Kind::Udp(9000)])?;
    mesh.node_mut("node").kill()?;
    std::thread::sleep(scaled(ALONE));
    if kernel {
        check.that(
            "a killed agent's node keeps its allowed traffic, without a loss",
            || {
                let report = allowed.report();
                // The last one may still be on its way.
                ensure!(report.lost() <= 1, "{report:?}");
                Ok(())
            },
        )?;
    }
    let begun = Instant::now();
    mesh.node_mut("node").restart()?;
    check.that(
        "a restarted agent takes over what stands, within two seconds",
        || {
            let received = allowed.report().received;
            until("traffic flows", LIMIT, || {
                allowed.report().received > received
            })?;
            let back = begun.elapsed();
            ensure!(back <= scaled(LIMIT), "traffic is back after {back:?}");
            let report = allowed.finish()?;
            ensure!(!kernel || report.lost() == 0, "{report:?}");
            Ok(())
        },
    )?;
    check.that("and denied traffic stays denied all the time", || {
        let report = denied.finish()?;
        ensure!(report.received == 0, "{report:?}");
        mesh.settle()
    })
}

const PACE: Duration = Duration::from_millis(10);
const LIMIT: Duration = Duration::from_secs(2);

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
