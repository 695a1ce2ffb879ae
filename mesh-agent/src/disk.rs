//! The state folder's actuator: brings the files to the newest memory, and keeps trying.
//!
//! A full disk costs nothing but readiness: the files before stay good, and the newest memory is
//! written as soon as there is room.

use std::io;
use std::time::Duration;

use mesh_core::agent::Memory;
use mesh_core::health::{Condition, Severity};
use tokio::sync::{mpsc, watch};

use crate::eventloop::Told;
use crate::state_dir::{Remembered, StateDir};

/// Until the next attempt. A full disk must heal within five seconds of getting room.
const RETRY: Duration = Duration::from_secs(2);

/// Runs until the sender of `memory` is gone, writing its last value before it ends.
pub async fn run(
    folder: StateDir,
    mut remembered: Remembered,
    mut memory: watch::Receiver<Memory>,
    told: mpsc::Sender<Told>,
) {
    loop {
        let newest = memory.borrow_and_update().clone();
        let written = tokio::task::block_in_place(|| folder.remember(&newest, &mut remembered));
        let failed = written.is_err();
        report(&told, written).await;
        let ended = match failed {
            true => match tokio::time::timeout(RETRY, memory.changed()).await {
                Ok(changed) => changed.is_err(),
                Err(_) => false,
            },
            false => memory.changed().await.is_err(),
        };
        if ended {
            // What was sent last may not have been seen.
            let newest = memory.borrow().clone();
            if let Err(error) = folder.remember(&newest, &mut remembered) {
                tracing::warn!(%error, "write the state at the end");
            }
            return;
        }
    }
}

async fn report(told: &mpsc::Sender<Told>, written: io::Result<()>) {
    let condition = match written {
        Ok(()) => {
            // The netmap in place is a fresh one.
            let _ = told.send(Told::Condition("StateDamaged", None)).await;
            None
        }
        Err(error) => {
            tracing::warn!(%error, "write the state");
            let full = matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            );
            Some(match full {
                true => Condition {
                    severity: Severity::Error,
                    text: format!("the state cannot be written: {error}"),
                    next_step: "make room on the disk of the state folder; the agent then heals by itself",
                },
                false => Condition {
                    severity: Severity::Error,
                    text: format!("the state cannot be written: {error}"),
                    next_step: "check that the state folder is writable for the agent's user",
                },
            })
        }
    };
    let _ = told.send(Told::Condition("DiskFull", condition)).await;
}
