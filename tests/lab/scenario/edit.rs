//! A policy edit, while traffic flows.
//!
//! ```text
//!   operator ══ running flow, TCP 22 ══► node        the edit takes the rule away
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::mesh::{Family, Mesh};
use crate::probe::{Echo, Kind, Stream};
use crate::{scaled, silence, until};

use super::{Check, reach};

const PACE: Duration = Duration::from_millis(10);

/// How soon an edit must cut a running flow.
const CUT: Duration = Duration::from_secs(1);

/// Silence after which a flow counts as cut.
const SILENCE: Duration = Duration::from_millis(500);

/// Does an edited policy what it says, at once; and a refused one nothing?
pub fn run(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let policy = mesh.coordinator.policy()?;
    let cut = cut(mesh, &policy, check);
    mesh.coordinator.set_policy(&policy)?;
    mesh.settle()?;
    let cut = cut?;
    check.seconds("policy_edit_to_cut", cut);
    refusal(mesh, &policy, check)
}

fn cut(mesh: &mut Mesh, policy: &str, check: &mut Check) -> Result<Duration> {
    let wide = policy.replacen(
        "\"acls\": [",
        "\"acls\": [{\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"*:*\"]},",
        1,
    );
    ensure!(wide != policy, "the example policy has no acls");
    check.that(
        "an edit that opens everything opens it for everybody",
        || {
            mesh.coordinator.set_policy(&without_tests(&wide))?;
            mesh.settle()?;
            let cells = reach::measure(mesh, &reach::KINDS, scaled(reach::LIMIT))?;
            reach::compare(&cells, |_| true)
        },
    )?;
    check.that(
        "an edit that closes cuts running flows within a second",
        || {
            let kinds = [Kind::Icmp, Kind::Tcp(22), Kind::Udp(9000)];
            let (from, to) = (mesh.node("developer"), mesh.node("sandbox"));
            let _echo = Echo::start(&to.host, &kinds)?;
            let mut flows = Vec::new();
            for family in Family::BOTH {
                for kind in kinds {
                    flows.push((
                        kind,
                        Stream::start(&from.host, to.address(family)?, kind, PACE)?,
                    ));
                }
            }
            until("all flows run", scaled(CUT), || {
                flows.iter().all(|(_, flow)| flow.report().received > 10)
            })?;
            let begun = Instant::now();
            mesh.coordinator.set_policy(policy)?;
            until("all flows are silent", scaled(3 * CUT), || {
                flows.iter().all(|(_, flow)| {
                    flow.report()
                        .last
                        .is_some_and(|last| last.elapsed() > silence(SILENCE))
                })
            })?;
            let mut slowest = Duration::ZERO;
            for (kind, flow) in flows {
                let last = flow.finish()?.last.context("a flow never ran")?;
                let cut = last.saturating_duration_since(begun);
                if cut > scaled(CUT) {
                    bail!("{kind} was cut after {cut:?}");
                }
                slowest = slowest.max(cut);
            }
            Ok(slowest)
        },
    )
}

fn refusal(mesh: &Mesh, policy: &str, check: &mut Check) -> Result<()> {
    check.that(
        "a refused policy names line and column, and changes nothing",
        || {
            let _echo = Echo::start(&mesh.node("node").host, &[Kind::Tcp(22)])?;
            let to = mesh.node("node").address(Family::V4)?;
            let flow = Stream::start(&mesh.node("operator").host, to, Kind::Tcp(22), PACE)?;
            let generation = mesh.coordinator.generation()?;
            let broken = policy.replacen("tag:operator\"]", "tag:nobody\"]", 1);
            let failing = policy.replacen("tag:node:22,6443,10250", "tag:node:23", 1);
            let garbled = policy.replacen("\"acls\": [", "\"acls\": {", 1);
            for (bad, what) in [
                (&*broken, "an unknown tag"),
                (&*failing, "a failing test"),
                (&*garbled, "bad syntax"),
                ("\0\u{1}garbage", "garbage"),
            ] {
                ensure!(*bad != *policy, "{what}: the example policy has changed");
                let Err(error) = mesh.coordinator.set_policy(bad) else {
                    bail!("{what} was accepted");
                };
                let words = format!("{error:#}");
                let located = words
                    .split(':')
                    .any(|part| part.trim().parse::<u32>().is_ok());
                ensure!(
                    located,
                    "{what} is refused without line and column: {words}"
                );
            }
            ensure!(
                mesh.coordinator.policy()? == policy,
                "the policy has changed"
            );
            ensure!(
                mesh.coordinator.generation()? == generation,
                "the generation has changed"
            );
            let report = flow.finish()?;
            ensure!(
                report.lost() == 0,
                "the running flow lost packets: {report:?}"
            );
            Ok(())
        },
    )
}

/// The policy's own tests deny what the edit opens.
fn without_tests(policy: &str) -> String {
    match policy.find("\"tests\"") {
        Some(at) => format!("{}}}", &policy[..at]),
        None => policy.to_owned(),
    }
}
