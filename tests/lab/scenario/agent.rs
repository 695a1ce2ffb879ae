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

/// `kill -9`. With the kernel's WireGuard the flows that policy allows go on without an agent, and
/// under the next one; in process they stop. Nothing that is denied passes at any time.
///
/// ```text
///   operator ══ ICMP, TCP 22 ══► node        both allowed, both running all the time
///   sandbox  ── UDP 9000 ──────✗ node        the sender's own programs are disarmed: node alone decides
/// ```
pub fn killed(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let (node, operator, sandbox) = (
        mesh.node("node"),
        mesh.node("operator"),
        mesh.node("sandbox"),
    );
    let kernel = node.status()?["backend"] == "kernel";
    let (to, peer) = (node.address(Family::V4)?, operator.address(Family::V4)?);
    let _open = Echo::start(&node.host, &[Kind::Tcp(22)])?;
    let closed = Echo::start(&node.host, &[Kind::Udp(9000)])?;
    let allowed = [Kind::Icmp, Kind::Tcp(22)]
        .into_iter()
        .map(|kind| Stream::start(&operator.host, to, kind, PACE))
        .collect::<Result<Vec<_>>>()?;
    sandbox.disarm()?;
    let refused = node.dropped("no rule", "ingress")?;
    let denied = Stream::start(&sandbox.host, to, Kind::Udp(9000), PACE)?;
    until("all flows run", LIMIT, || {
        allowed.iter().all(|flow| flow.report().received > 10) && denied.report().sent > 10
    })?;

    mesh.node_mut("node").kill()?;
    std::thread::sleep(ALONE);
    if kernel {
        check.that("flows that run outlive a killed agent", || {
            for flow in &allowed {
                let received = flow.report().received;
                until("it goes on", LIMIT, || flow.report().received > received)?;
            }
            Ok(())
        })?;
    }
    if !kernel {
        check.that(
            "a killed agent's node sends nothing for the mesh in the clear",
            || {
                let host = &mesh.node("node").host;
                host.run("ip", &["route", "add", "default", "dev", "eth0"])?;
                let clear = host.run("ip", &["route", "get", &peer.to_string()]);
                host.run("ip", &["route", "del", "default", "dev", "eth0"])?;
                ensure!(clear.is_err(), "{clear:?}");
                Ok(())
            },
        )?;
    }
    let begun = Instant::now();
    mesh.node_mut("node").restart()?;
    check.that(
        "a restarted agent takes over what stands, within two seconds",
        || {
            let received = allowed[0].report().received;
            until("traffic flows", LIMIT, || {
                allowed[0].report().received > received
            })?;
            let back = begun.elapsed();
            ensure!(back <= scaled(LIMIT), "traffic is back after {back:?}");
            mesh.settle()
        },
    )?;
    if kernel {
        check.that("and not one allowed packet was lost meanwhile", || {
            for flow in allowed {
                let report = flow.finish()?;
                ensure!(report.lost() == 0, "{report:?}");
            }
            Ok(())
        })?;
    }
    check.that("nor did one denied packet arrive", || {
        let sent = denied.finish()?.sent;
        ensure!(closed.heard() == 0, "{} of {sent}", closed.heard());
        let now = mesh.node("node").dropped("no rule", "ingress")?;
        ensure!(now > refused, "none of {sent} reached the node at all");
        Ok(())
    })?;
    // Arms them again.
    let sandbox = mesh.node_mut("sandbox");
    sandbox.kill()?;
    sandbox.restart()
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
