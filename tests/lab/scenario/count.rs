//! The counters say why a packet was dropped, and which rule let one pass.
//!
//! ```text
//!   developer ──✗── sandbox     do not know each other: dropped where it is sent
//!   sandbox ──22──✗ node        know each other, no rule for the port: dropped by both
//! ```

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::mesh::{Family, Mesh, Node};
use crate::probe::{Echo, Kind, Probe};
use crate::{scaled, silence};

use super::Check;

const LIMIT: Duration = Duration::from_millis(600);

pub fn run(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let (node, operator) = (mesh.node("node"), mesh.node("operator"));
    let (sandbox, developer) = (mesh.node("sandbox"), mesh.node("developer"));
    let _echo = Echo::start(&node.host, &[Kind::Tcp(22)])?;
    check.that(
        "a packet for a stranger is counted as `unknown identity` at its sender",
        || {
            counts(developer, "unknown identity", "egress", || {
                ask(developer, sandbox, Kind::Tcp(22), false)
            })
        },
    )?;
    check.that(
        "a packet that no rule allows is counted as `no rule` at its sender",
        || {
            counts(sandbox, "no rule", "egress", || {
                ask(sandbox, node, Kind::Tcp(22), false)
            })
        },
    )?;
    check.that(
        "the rule that lets a flow in is counted by its line in the policy",
        || {
            let policy = mesh.coordinator.policy()?;
            let line = policy
                .lines()
                .position(|line| line.contains("tag:node:22,"))
                .context("the example policy has changed")?;
            let line = u64::try_from(line + 1).context("a line number")?;
            let before = node.counted_by_line(line)?;
            ask(operator, node, Kind::Tcp(22), true)?;
            let after = node.counted_by_line(line)?;
            ensure!(after > before, "line {line} counted {before}, then {after}");
            Ok(())
        },
    )?;
    receiver(mesh, check)?;
    // Arms them again.
    let sandbox = mesh.node_mut("sandbox");
    sandbox.kill()?;
    sandbox.restart()
}

/// Disarms the programs of a sender, as a hostile root would: now the receiver decides.
fn receiver(mesh: &Mesh, check: &mut Check) -> Result<()> {
    let (node, sandbox) = (mesh.node("node"), mesh.node("sandbox"));
    check.that(
        "a sender with disarmed programs is refused by the receiver",
        || {
            sandbox.disarm()?;
            counts(node, "no rule", "ingress", || {
                ask(sandbox, node, Kind::Tcp(22), false)
            })
        },
    )
}

fn ask(from: &Node, to: &Node, kind: Kind, expected: bool) -> Result<()> {
    for family in Family::BOTH {
        let probe = Probe {
            from: &from.host,
            to: to.address(family)?,
            kind,
        };
        let limit = if expected {
            scaled(LIMIT)
        } else {
            silence(LIMIT)
        };
        let reached = probe.ask(limit)?.is_some();
        ensure!(
            reached == expected,
            "{} reaches {} over {kind} {family:?}: {reached}",
            from.name(),
            to.name()
        );
    }
    Ok(())
}

fn counts(
    at: &Node,
    reason: &str,
    direction: &str,
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let before = at.dropped(reason, direction)?;
    work()?;
    let after = at.dropped(reason, direction)?;
    ensure!(
        after > before,
        "{} counted {before} packets for `{reason}` ({direction}), then {after}",
        at.name()
    );
    Ok(())
}
