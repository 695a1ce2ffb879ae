//! Looks after the filter's programs, and closes the device when they are not where they should be.
//!
//! The kernel tells nobody of a program that is attached to TCX before ours, so it is asked five times a
//! second, and whenever it reports a change of interfaces. Closing does not wait for the routes'
//! actuator, which may be busy; it only keeps that one from opening again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::dataplane::vigil::{GUARD_BYPASSED, GuardVigil, Standing, Step, Vigil};
use mesh_core::health::{Condition, Severity};
use tokio::sync::{mpsc, watch};

use super::{Door, Enforcer, index_of};
use crate::brief;
use crate::eventloop::Told;
use crate::net::Net;
use crate::wg::Interface;

/// A good part of the second within which a foreign program must be noticed is for closing.
const LOOK: Duration = Duration::from_millis(200);
/// While something has to be put right.
const SOON: Duration = Duration::from_millis(100);

/// What was seen on one device after the other: it is told for longer than a device may last.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    device: watch::Sender<Vigil>,
    guards: watch::Sender<GuardVigil>,
}

impl Seen {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            device: watch::Sender::new(Vigil::new(None, now)),
            guards: watch::Sender::new(GuardVigil::new(now)),
        }
    }

    /// There is another device. `found` is where an earlier agent's programs were, if it left any on it.
    pub(super) fn begin(&self, found: Option<Standing>) {
        let now = Instant::now();
        self.device
            .send_modify(|vigil| *vigil = vigil.next(found, now));
        self.guards.send_modify(|vigil| *vigil = vigil.next(now));
    }
}

/// Runs until it is dropped; what was seen is for the next device then.
pub(super) async fn run(
    enforcer: Arc<Enforcer>,
    net: Arc<Net>,
    interface: Interface,
    mut around: watch::Receiver<()>,
    told: mpsc::Sender<Told>,
    door: watch::Sender<Door>,
    Seen { device, guards }: Seen,
) {
    let mut conditions = Conditions {
        told,
        stand: BTreeMap::new(),
    };
    let mut pause = LOOK;
    let mut failing = None;
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = around.changed() => if changed.is_err() { return },
        }
        let asked = Instant::now();
        let standing = enforcer.standing();
        // Without the interface nothing passes, and others notice. Asked last: an interface that goes
        // meanwhile takes the programs with it, which nobody is to be told of for an hour.
        if index_of(&interface.name) != Some(interface.index) {
            continue;
        }
        let mut step = Step::Nothing;
        device.send_modify(|vigil| step = vigil.handle_standing(standing, asked, Instant::now()));
        pause = if step == Step::Nothing { LOOK } else { SOON };
        let mut failure = None;
        match step {
            Step::Nothing => {}
            Step::Close => {
                door.send_replace(Door::Closed);
                match net.close(&interface).await {
                    Ok(()) => device.send_modify(|vigil| vigil.handle_closed(Instant::now())),
                    Err(error) => failure = Some(brief(&error)),
                }
            }
            Step::Hang => {
                failure = enforcer.hang().err().map(|error| brief(&error));
            }
            Step::Open => drop(door.send_replace(Door::Open)),
        }
        if let Some(error) = &failure {
            pause = LOOK;
            // A retry that fails the same way is no news.
            if failing.as_ref() != Some(error) {
                tracing::error!(error, ?step, "put the filter right");
            }
        }
        failing = failure;
        let told = device.borrow().conditions(&interface.name, Instant::now());
        for (name, condition) in told {
            conditions.set(name, condition).await;
        }
        let asked = Instant::now();
        let (lapses, mended) = enforcer.mend_guards();
        let now = Instant::now();
        guards.send_modify(|guards| guards.handle_lapses(&lapses, asked, now));
        let told = guards.borrow().conditions(now);
        for (name, condition) in told {
            let failed = mended.as_ref().err().filter(|_| name == GUARD_BYPASSED);
            let condition = condition.or_else(|| failed.map(unasked));
            conditions.set(name, condition).await;
        }
        let pinned = enforcer.keep_pinned();
        conditions
            .set("FilterNotPinned", pinned.err().map(not_pinned))
            .await;
    }
}

/// Tells of changes only: the state compares nothing by itself.
struct Conditions {
    told: mpsc::Sender<Told>,
    stand: BTreeMap<&'static str, Option<Condition>>,
}

impl Conditions {
    async fn set(&mut self, name: &'static str, condition: Option<Condition>) {
        // The first time even of nothing: an earlier watch may have left something.
        if self.stand.get(name) == Some(&condition) {
            return;
        }
        if let Some(condition) = &condition {
            tracing::warn!(condition = name, reason = condition.text, "condition");
        }
        self.stand.insert(name, condition.clone());
        let _ = self.told.send(Told::Condition(name, condition)).await;
    }
}

fn unasked(error: &anyhow::Error) -> Condition {
    Condition {
        severity: Severity::Warning,
        text: format!("the guards of other interfaces: {}", brief(error)),
        next_step: "a neighbour there may reach this node's mesh addresses past the policy (CVE-2019-14899)",
    }
}

fn not_pinned(error: anyhow::Error) -> Condition {
    Condition {
        severity: Severity::Warning,
        text: format!(
            "the filter stands, but the next agent could not take it over: {}",
            brief(&error)
        ),
        next_step: "mount a BPF file system in which the agent may write; it is pinned there by itself",
    }
}
