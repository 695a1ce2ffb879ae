//! `demo --check`: the behaviours that the project promises, one after the other.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::mesh::Mesh;
use mesh_tests::scenario::{self, Check, Figure};

pub(super) fn run(mesh: &mut Mesh, up: Duration) -> Result<Vec<Figure>> {
    let mut check = Check::new(|line| println!("{line}"));
    check.seconds("demo_up", up);
    scenario::agent::rights(mesh, &mut check)?;
    scenario::reach::run(mesh, &mut check)?;
    scenario::enrol::run(mesh, &mut check)?;
    scenario::count::run(mesh, &mut check)?;
    scenario::forge::run(mesh, &mut check)?;
    scenario::edit::run(mesh, &mut check)?;
    scenario::keys::crowd(mesh, &mut check)?;
    scenario::keys::bad(mesh, &mut check)?;
    scenario::restart::run(mesh, &mut check)?;
    scenario::agent::killed(mesh, &mut check)?;
    scenario::agent::run(mesh, &mut check)?;
    scenario::damage::database(mesh, &mut check)?;
    scenario::damage::agent_state(mesh, &mut check)?;
    scenario::damage::full_disk(mesh, &mut check)?;
    scenario::garbage::run(mesh, &mut check)?;
    sizes(mesh, &mut check)?;
    println!("\n{} assertions hold", check.held());
    Ok(check.figures().to_vec())
}

const MIB: f64 = 1024.0 * 1024.0;

/// What the daemons weigh, in memory after all of the above, and on disk.
fn sizes(mesh: &Mesh, check: &mut Check) -> Result<()> {
    let agents: Result<Vec<_>> = mesh
        .nodes
        .iter()
        .map(|node| node.agent.resident())
        .collect();
    let agent = agents?.into_iter().max().context("no agent")?;
    let coordinator = mesh.coordinator.process.resident()?;
    check.figure("agent_rss", mebibytes(agent), "MiB");
    check.figure("coordinator_rss", mebibytes(coordinator), "MiB");
    for (name, program) in [
        ("agent_binary", "mesh-agent"),
        ("coordinator_binary", "mesh-coordinator"),
    ] {
        let path = mesh.lab.binaries().join(program);
        let size =
            std::fs::metadata(&path).with_context(|| format!("look at {}", path.display()))?;
        check.figure(name, mebibytes(size.len()), "MiB");
    }
    check.that(
        "daemons are small: 40 MiB for an agent, 60 MiB for the coordinator",
        || {
            ensure!(
                mebibytes(agent) <= 40.0,
                "an agent has {:.1} MiB",
                mebibytes(agent)
            );
            ensure!(
                mebibytes(coordinator) <= 60.0,
                "the coordinator has {:.1} MiB",
                mebibytes(coordinator)
            );
            Ok(())
        },
    )
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / MIB
}
