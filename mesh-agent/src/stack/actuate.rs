//! The actuators: one per kernel resource, each told the newest plan and keeping it so.
//!
//! All have one loop. A plan that could not be applied is tried again; one that was, is looked after:
//! what others change is changed back.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::agent::Actuator;
use mesh_core::backoff::Backoff;
use mesh_core::dataplane::Tables;
use mesh_core::desired::Desired;
use mesh_core::health::{Condition, Severity};
use mesh_core::wireguard;
use rand_core::RngCore as _;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::log_flows::Ended;
use super::{Door, Enforcer, Plans};
use crate::brief;
use crate::dns;
use crate::eventloop::Told;
use crate::net::Net;
use crate::wg::{Backend, Interface};

/// How often flows are swept.
const FILTER_TICK: Duration = Duration::from_secs(5);
/// Of the packet path's clock, or more.
const TICK: Duration = Duration::from_millis(10);
/// How often the device is compared with its plan, in case somebody ran `wg set`.
const PEERS_TICK: Duration = Duration::from_secs(30);

/// One kernel resource.
pub(super) trait Actuate: Send {
    /// Brings the resource to the plan. May be told the same plan again.
    fn apply(&mut self, plan: &Desired) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Returns when the resource may have left its plan.
    fn disturbed(&mut self) -> impl Future<Output = ()> + Send;

    /// What must go on while a plan that failed waits for its turn. Need not return.
    fn meanwhile(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

/// What an actuator is told, and whom it tells.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) which: Actuator,
    pub(super) plans: Plans,
    pub(super) told: mpsc::Sender<Told>,
}

/// Runs until there is no plan. `first` becomes true with the first plan that was applied.
pub(super) async fn actuate(
    mut resource: impl Actuate,
    control: Control,
    first: Option<watch::Sender<bool>>,
) {
    let Control {
        which,
        mut plans,
        told,
    } = control;
    let mut backoff = Backoff::new(rand_core::OsRng.next_u64());
    loop {
        let newest = plans.borrow_and_update().clone();
        let Some(plan) = newest else { return };
        let applied = resource.apply(&plan).await;
        let failed = applied.is_err();
        if let (Ok(()), Some(first)) = (&applied, &first) {
            first.send_replace(true);
        }
        let report = applied.map_err(|error| brief(&error));
        let report = Told::Actuator(which, plan.revision, report);
        if told.send(report).await.is_err() {
            return;
        }
        let pause = async {
            if failed {
                tokio::select! {
                    () = tokio::time::sleep(backoff.next_wait()) => {}
                    () = resource.meanwhile() => {}
                }
            } else {
                backoff.reset();
                resource.disturbed().await;
            }
        };
        tokio::select! {
            changed = plans.changed() => if changed.is_err() { return },
            () = pause => {}
        }
    }
}

/// `task`, once `ready` is true.
pub(super) async fn after(mut ready: watch::Receiver<bool>, task: impl Future<Output = ()>) {
    if ready.wait_for(|ready| *ready).await.is_ok() {
        task.await;
    }
}

// === the filter ===

pub(super) struct Filter {
    enforcer: Arc<Enforcer>,
    links: watch::Receiver<()>,
    interface: String,
    loaded: Option<Tables>,
    /// Whom to tell of flows that a change has ended.
    ended: mpsc::Sender<Ended>,
    told: mpsc::Sender<Told>,
    /// What was last said of the room for flows.
    is_full: Option<bool>,
    sweep_at: Instant,
}

impl Filter {
    pub(super) fn new(
        enforcer: Arc<Enforcer>,
        links: watch::Receiver<()>,
        interface: &Interface,
        ended: mpsc::Sender<Ended>,
        told: mpsc::Sender<Told>,
    ) -> Self {
        Self {
            enforcer,
            links,
            interface: interface.name.clone(),
            loaded: None,
            ended,
            told,
            is_full: None,
            sweep_at: Instant::now() + FILTER_TICK,
        }
    }

    async fn tell_room(&mut self, is_full: bool) {
        if self.is_full == Some(is_full) {
            return;
        }
        let condition = is_full.then(|| Condition {
            severity: Severity::Warning,
            text: "the table of established flows is full: new ones are judged packet by packet, and \
                   answers to this node's own may be dropped"
                .to_owned(),
            next_step: "`mesh top` shows who holds them; more memory gives more room (docs/dataplane.md, \"Maps\")",
        });
        let _ = self
            .told
            .send(Told::Condition("FlowTableFull", condition))
            .await;
        self.is_full = Some(is_full);
    }

    /// Guards the interfaces that are there now.
    fn guard(&mut self) -> anyhow::Result<()> {
        self.links.mark_unchanged();
        self.enforcer.guard(&self.interface)
    }

    /// Returns when interfaces have changed. Sweeps when it is time, however often that is.
    async fn sweep_until_changed(&mut self) {
        loop {
            tokio::select! {
                changed = self.links.changed() => match changed {
                    Ok(()) => return,
                    Err(_) => std::future::pending().await,
                },
                () = tokio::time::sleep_until(self.sweep_at) => {
                    let swept = self.enforcer.sweep();
                    self.sweep_at = Instant::now() + FILTER_TICK;
                    match swept {
                        Ok(is_full) => self.tell_room(is_full).await,
                        Err(error) => tracing::warn!(error = brief(&error), "sweep the flows"),
                    }
                }
            }
        }
    }

    /// Loads what is not loaded, and ends what it no longer allows.
    async fn load(&mut self, tables: &Tables) -> anyhow::Result<()> {
        if self.loaded.as_ref() == Some(tables) {
            return Ok(());
        }
        // Forgotten first: after an error nobody knows what is loaded, or reviewed.
        self.loaded = None;
        // A tick before: packets are stamped by one that began at another moment.
        let since = self.enforcer.clock().saturating_sub(TICK);
        self.enforcer.apply(tables)?;
        let flows = self.enforcer.review(tables)?;
        self.loaded = Some(tables.clone());
        tracing::debug!(flows = flows.len(), "flows that the policy ends");
        let between = [since, self.enforcer.clock()];
        let ended = Ended { between, flows };
        // Without a reader nobody wants to know.
        let _ = self.ended.send(ended).await;
        Ok(())
    }
}

impl Actuate for Filter {
    async fn apply(&mut self, plan: &Desired) -> anyhow::Result<()> {
        let loaded = self.load(&plan.dataplane).await;
        // A policy that cannot be loaded leaves no interface open.
        let guarded = self.guard();
        loaded.and(guarded)
    }

    /// New interfaces are guarded here, for the whole way through a plan that already stands is
    /// longer; it is taken when that fails, and then it is told.
    async fn disturbed(&mut self) {
        loop {
            self.sweep_until_changed().await;
            if self.guard().is_err() {
                return;
            }
        }
    }

    /// Flows are over and interfaces appear whatever became of the policy, which waits for its turn.
    async fn meanwhile(&mut self) {
        loop {
            self.sweep_until_changed().await;
            if let Err(error) = self.guard() {
                tracing::warn!(error = brief(&error), "guard the other interfaces");
            }
        }
    }
}

// === WireGuard's peers ===

pub(super) struct Peers(pub(super) Arc<Backend>);

impl Actuate for Peers {
    async fn apply(&mut self, plan: &Desired) -> anyhow::Result<()> {
        let status = self.0.status().await?;
        let steps = wireguard::reconcile(&plan.wireguard, &status);
        if steps.is_empty() {
            return Ok(());
        }
        self.0.apply(&steps).await
    }

    async fn disturbed(&mut self) {
        tokio::time::sleep(PEERS_TICK).await;
    }
}

// === addresses, routes, rules ===

pub(super) struct Place {
    net: Arc<Net>,
    interface: Interface,
    around: watch::Receiver<()>,
    door: watch::Receiver<Door>,
}

impl Place {
    pub(super) fn new(
        net: Arc<Net>,
        interface: Interface,
        around: watch::Receiver<()>,
        door: watch::Receiver<Door>,
    ) -> Self {
        Self {
            net,
            interface,
            around,
            door,
        }
    }
}

impl Actuate for Place {
    async fn apply(&mut self, plan: &Desired) -> anyhow::Result<()> {
        self.around.mark_unchanged();
        let door = *self.door.borrow_and_update();
        match door {
            Door::Open => self.net.apply(&self.interface, &plan.routes).await,
            // Whoever closed it keeps it down; what hangs on it comes back with it.
            Door::Closed => Ok(()),
        }
    }

    async fn disturbed(&mut self) {
        let changed = tokio::select! {
            changed = self.around.changed() => changed,
            changed = self.door.changed() => changed,
        };
        if changed.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

// === names ===

pub(super) struct Names(pub(super) dns::Actuator);

impl Actuate for Names {
    async fn apply(&mut self, plan: &Desired) -> anyhow::Result<()> {
        self.0.apply(plan.dns.as_ref()).await
    }

    async fn disturbed(&mut self) {
        self.0.disturbed().await;
    }
}
