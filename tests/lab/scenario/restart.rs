//! The coordinator dies under load and comes back.
//!
//! ```text
//!   operator ══ ping each 10 ms ══► node          coordinator: kill -9 ... start
//!                                                 administrator: writes all the time
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::mesh::{Family, Mesh};
use crate::probe::{Kind, Stream};
use crate::{eventually, scaled};

use super::Check;

const PACE: Duration = Duration::from_millis(10);

/// Agents back off before they knock again.
const BACK: Duration = Duration::from_secs(30);

pub fn run(mesh: &mut Mesh, check: &mut Check) -> Result<()> {
    let to = mesh.node("node").address(Family::V4)?;
    let flow = Stream::start(&mesh.node("operator").host, to, Kind::Icmp, PACE)?;
    let acknowledged = check.that(
        "the coordinator is killed while it writes, and starts again",
        || kill_under_load(mesh),
    )?;
    check.that("no acknowledged write is lost", || {
        let users = mesh.coordinator.admin(&["user", "list"])?.to_string();
        for name in &acknowledged {
            ensure!(
                users.contains(&format!("\"{name}\"")),
                "user {name} is gone"
            );
        }
        ensure!(!acknowledged.is_empty(), "nothing was written");
        Ok(())
    })?;
    check.that(
        "agents come back by themselves, and need no whole netmap",
        || {
            eventually(BACK, || {
                let nodes = mesh.coordinator.nodes()?;
                ensure!(
                    nodes.iter().all(|node| node["connected"] == true),
                    "not all nodes are connected"
                );
                Ok(())
            })?;
            mesh.settle()?;
            let full = mesh.coordinator.metric("netmap_full_total")?;
            ensure!(full == 0, "{full} agents were sent a whole netmap");
            Ok(())
        },
    )?;
    check.that("no tunnel packet is lost meanwhile", || {
        let report = flow.finish()?;
        ensure!(report.lost() == 0, "{report:?}");
        Ok(())
    })
}

/// Kills the coordinator while an administrator writes; the writes that were acknowledged.
fn kill_under_load(mesh: &mut Mesh) -> Result<Vec<String>> {
    let stop = AtomicBool::new(false);
    let coordinator = &mut mesh.coordinator;
    let pid = coordinator.process.pid();
    let acknowledged = std::thread::scope(|scope| {
        let shared = &*coordinator;
        let writing = scope.spawn(|| {
            let mut acknowledged = Vec::new();
            for number in 0.. {
                let name = format!("writer-{pid}-{number}");
                if stop.load(Ordering::Relaxed) || shared.admin(&["user", "create", &name]).is_err()
                {
                    break;
                }
                acknowledged.push(name);
            }
            acknowledged
        });
        std::thread::sleep(scaled(Duration::from_millis(700)));
        let killed = shared.process.signal(rustix::process::Signal::KILL);
        stop.store(true, Ordering::Relaxed);
        let acknowledged = writing.join().map_err(|_| anyhow!("the writer panicked"))?;
        killed.map(|()| acknowledged)
    })?;
    coordinator.kill()?;
    let begun = Instant::now();
    coordinator
        .restart()
        .with_context(|| format!("after {:?}", begun.elapsed()))?;
    Ok(acknowledged)
}
