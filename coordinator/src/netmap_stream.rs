//! One node's session: its netmap down, its reports up.
//!
//! What the node holds is remembered as item digests only, the same form in which a reconnecting
//! node tells it, so one piece of code answers both "what changed since?" questions. Nothing is
//! queued for a slow node: when it is ready again, it gets the difference to the newest world.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh_api::held::Held;
use mesh_api::{update, v1};
use mesh_core::key::{MachineKey, MachinePublic};
use mesh_core::netmap::digest::{ItemDigest, ItemKey};
use mesh_core::netmap::{Digest, Netmap, build, delta};
use mesh_core::node::{Epoch, Generation, HostInfo, NodeId};
use rand_core::{OsRng, RngCore as _};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::{debug, info};

use crate::api::caller::Caller;
use crate::api::error::status;
use crate::metrics::Metrics;
use crate::registry;
use crate::sessions::{End, Seat, Sessions};
use crate::world::{ChangeError, Current, Handle};

/// A node opens its session by saying what it holds; who says nothing is sent away.
const FIRST_MESSAGE: Duration = Duration::from_secs(15);
/// Least time between two updates to one node: storms become one delta, a single edit waits for
/// nothing.
const UPDATE_SPACING: Duration = Duration::from_millis(50);
/// How often a node's map is built although nothing that concerns it changed.
const LOOK: Duration = Duration::from_secs(60);
/// A node that takes nothing for so long is cut off; it will come back and be told the difference.
const SLOW: Duration = Duration::from_secs(30);
/// Least time between two reports that are written; the ones in between are replaced by the last.
const REPORT_SPACING: Duration = Duration::from_secs(1);
/// Reports that may come faster at the start, while a host brings up its interfaces.
const REPORT_BURST: u32 = 8;
/// Updates on their way to one node.
pub const OUTBOX: usize = 2;

/// What every session works with.
#[derive(Debug, Clone)]
pub struct Shared {
    pub world: Handle,
    pub sessions: Sessions,
    pub key: Arc<MachineKey>,
    pub metrics: Arc<Metrics>,
    pub shutdown: CancellationToken,
    pub turns: Turns,
}

/// Takes turns at making maps.
///
/// A map is milliseconds of arithmetic. When all nodes need a new one at once, as many are made at
/// a time as there are processors, and the first are on the wire while the others wait; without
/// turns the first node would get its map when the last one's is made.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        let processors = std::thread::available_parallelism();
        Self(Arc::new(Semaphore::new(processors.map_or(1, usize::from))))
    }
}

impl Turns {
    async fn take(&self) -> Option<SemaphorePermit<'_>> {
        // Never closed; whoever asked would then go on without a turn.
        self.0.acquire().await.ok()
    }
}

pub type Outbox = mpsc::Sender<Result<v1::CoordinatorMessage, Status>>;

/// Runs a session to its end; the last message says why where the node must know.
pub async fn run(
    shared: Shared,
    caller: Caller,
    mut inbound: Streaming<v1::AgentMessage>,
    outbox: Outbox,
) {
    let ending = match session(&shared, &caller, &mut inbound, &outbox).await {
        Ok(notice) => notice.map(|notice| {
            Ok(v1::CoordinatorMessage {
                message: Some(v1::coordinator_message::Message::Notice(notice)),
            })
        }),
        Err(status) => {
            debug!(error = %status.message(), "session refused or broken");
            Some(Err(status))
        }
    };
    if let Some(ending) = ending {
        drop(timeout(Duration::from_secs(1), outbox.send(ending)).await);
    }
}

async fn session(
    shared: &Shared,
    caller: &Caller,
    inbound: &mut Streaming<v1::AgentMessage>,
    outbox: &Outbox,
) -> Result<Option<v1::Notice>, Status> {
    let begin = first(inbound).await?;
    let key = caller.proven_key(begin.node.as_ref())?;
    let host = begin.host.as_ref().map(HostInfo::from);
    let held = begin.held.as_ref().map(Held::try_from).transpose();
    let held = held.map_err(|invalid| Status::invalid_argument(invalid.to_string()))?;

    let Some(id) = node_of(shared, &caller.machine) else {
        return Ok(Some(deleted()));
    };
    let (seat, ended) = shared.sessions.begin(id);
    match shared
        .world
        .change(move |draft| registry::begin(draft, id, key, host))
        .await
    {
        Ok(()) => {}
        // The map can be served from memory; the host's news can wait for the disk.
        Err(ChangeError::Store(_)) if known_key(shared, id) == Some(key) => {}
        Err(error) => return Err(status(error)),
    }
    info!(node = %id, "node connected");
    let mut session = Session {
        shared,
        id,
        outbox,
        seat,
        holds: None,
        seen: shared.world.current(),
        worlds: shared.world.subscribe(),
        next_look: Instant::now() + LOOK,
        next_update: Instant::now(),
        report: None,
        next_report: Instant::now(),
        burst: REPORT_BURST,
    };
    session.greet(held).await?;
    let ending = session.serve(inbound, ended).await;
    info!(node = %id, "node disconnected");
    ending
}

async fn first(inbound: &mut Streaming<v1::AgentMessage>) -> Result<v1::Begin, Status> {
    let first = timeout(FIRST_MESSAGE, inbound.message())
        .await
        .map_err(|_| Status::deadline_exceeded("a session starts with Begin; nothing came"))??;
    match first.and_then(|first| first.message) {
        Some(v1::agent_message::Message::Begin(begin)) => Ok(begin),
        _ => Err(Status::invalid_argument("a session starts with Begin")),
    }
}

fn node_of(shared: &Shared, machine: &MachinePublic) -> Option<NodeId> {
    shared.world.current().node_of(machine).map(|node| node.id)
}

fn known_key(shared: &Shared, id: NodeId) -> Option<mesh_core::key::NodePublic> {
    shared
        .world
        .current()
        .world
        .nodes
        .get(&id)
        .map(|node| node.key)
}

fn deleted() -> v1::Notice {
    v1::Notice {
        kind: v1::notice::Kind::Deleted.into(),
        text: "this machine is not a node of the mesh; `mesh up --auth-key` enrols it".to_owned(),
        retry_after_ms: 0,
    }
}

fn replaced() -> v1::Notice {
    v1::Notice {
        kind: v1::notice::Kind::Replaced.into(),
        text: "another session with this machine key took over: was the state directory copied?"
            .to_owned(),
        retry_after_ms: 0,
    }
}

/// Nodes come back spread over some seconds, not all at once.
fn shutdown() -> v1::Notice {
    v1::Notice {
        kind: v1::notice::Kind::Shutdown.into(),
        text: "the coordinator is shutting down".to_owned(),
        retry_after_ms: 500 + OsRng.next_u32() % 1500,
    }
}

/// A map that a node holds, as digests.
#[derive(Debug)]
struct Holds {
    digest: Digest,
    items: BTreeMap<ItemKey, ItemDigest>,
}

impl Holds {
    fn of(map: &Netmap) -> Self {
        let (digest, items) = map.digests();
        Self { digest, items }
    }
}

struct Session<'a> {
    shared: &'a Shared,
    id: NodeId,
    outbox: &'a Outbox,
    seat: Seat,
    holds: Option<Holds>,
    /// The world that `holds` is up to date with.
    seen: Arc<Current>,
    worlds: watch::Receiver<Arc<Current>>,
    /// When to look without being asked: should ever a change wrongly be taken for none of this
    /// node's business, it is only so for a while.
    next_look: Instant,
    next_update: Instant,
    report: Option<(Vec<SocketAddr>, Vec<IpNet>)>,
    next_report: Instant,
    burst: u32,
}

impl Session<'_> {
    /// The first answer: nothing new, the difference, or everything.
    async fn greet(&mut self, held: Option<Held>) -> Result<(), Status> {
        let current = self.worlds.borrow_and_update().clone();
        let turn = self.shared.turns.take().await;
        let Some(map) = self.build(&current) else {
            return Ok(());
        };
        let comparable = held.filter(|held| held.epoch == map.epoch);
        if let Some(held) = &comparable
            && held.generation > map.generation
        {
            self.shared.sessions.note_ahead(self.id, held.generation);
        }
        let now = Holds::of(&map);
        let signed = match comparable {
            Some(held) if held.digest == now.digest => {
                let unchanged = delta::NetmapDelta {
                    epoch: map.epoch,
                    generation: map.generation,
                    ..delta::NetmapDelta::default()
                };
                self.shared.metrics.unchanged.add(1);
                update::sign_delta_as(&self.shared.key, held.digest, &unchanged, &map, now.digest)
            }
            Some(held) if !held.items.is_empty() => {
                let change = delta::between(&held.items, &now.items, &map);
                self.shared.metrics.deltas.add(1);
                update::sign_delta_as(&self.shared.key, held.digest, &change, &map, now.digest)
            }
            _ => {
                self.shared.metrics.fulls.add(1);
                update::sign_full_as(&self.shared.key, &map, now.digest)
            }
        };
        drop(turn);
        self.holds = Some(now);
        self.seen = current;
        self.send(signed, map.generation).await
    }

    async fn serve(
        &mut self,
        inbound: &mut Streaming<v1::AgentMessage>,
        mut ended: oneshot::Receiver<End>,
    ) -> Result<Option<v1::Notice>, Status> {
        loop {
            let Ok(changed) = self.worlds.has_changed() else {
                return Ok(Some(shutdown()));
            };
            let reported = self.report.is_some();
            tokio::select! {
                biased;
                () = self.shared.shutdown.cancelled() => return Ok(Some(shutdown())),
                _ = &mut ended => return Ok(Some(replaced())),
                () = sleep_until(self.next_update), if changed => {
                    if !self.update().await? {
                        return Ok(Some(deleted()));
                    }
                }
                seen = self.worlds.changed(), if !changed => {
                    // `has_changed` must go on saying so until the update is made.
                    if seen.is_ok() {
                        self.worlds.mark_changed();
                    }
                }
                () = sleep_until(self.next_look) => self.worlds.mark_changed(),
                () = sleep_until(self.next_report), if reported => self.write_report().await?,
                message = inbound.message() => match message? {
                    None => return Ok(None),
                    Some(message) => {
                        if self.handle(message).await? {
                            return Ok(None);
                        }
                    }
                },
            }
        }
    }

    /// Sends what changed for this node, if anything did. `false`: there is no such node any more.
    async fn update(&mut self) -> Result<bool, Status> {
        let turn = self.shared.turns.take().await;
        let current = self.worlds.borrow_and_update().clone();
        let now = Instant::now();
        self.next_update = now + UPDATE_SPACING;
        let looks = now >= self.next_look;
        if looks {
            self.next_look = now + LOOK;
        }
        if !looks && !current.may_concern(self.id, &self.seen) {
            self.seat.looked_at(current.world.generation, false);
            self.seen = current;
            return Ok(true);
        }
        let Some(map) = self.build(&current) else {
            return Ok(false);
        };
        let Some(before) = &self.holds else {
            return Ok(false);
        };
        self.seen = current;
        let now = Holds::of(&map);
        if now.digest == before.digest {
            self.seat.looked_at(map.generation, false);
            return Ok(true);
        }
        let change = delta::between(&before.items, &now.items, &map);
        let key = &self.shared.key;
        let signed = update::sign_delta_as(key, before.digest, &change, &map, now.digest);
        drop(turn);
        self.holds = Some(now);
        self.shared.metrics.deltas.add(1);
        self.send(signed, map.generation).await?;
        Ok(true)
    }

    fn build(&self, current: &Current) -> Option<Netmap> {
        build::build(&current.world, &current.compiled, self.id)
    }

    async fn send(&self, signed: v1::SignedUpdate, generation: Generation) -> Result<(), Status> {
        let message = v1::CoordinatorMessage {
            message: Some(v1::coordinator_message::Message::Update(signed)),
        };
        match timeout(SLOW, self.outbox.send(Ok(message))).await {
            Ok(Ok(())) => {
                self.seat.looked_at(generation, true);
                Ok(())
            }
            Ok(Err(_)) => Err(Status::cancelled("the node is gone")),
            Err(_) => Err(Status::deadline_exceeded(
                "the node does not take its updates",
            )),
        }
    }

    /// `true`: the node leaves.
    async fn handle(&mut self, message: v1::AgentMessage) -> Result<bool, Status> {
        use v1::agent_message::Message;
        match message.message {
            Some(Message::Report(report)) => {
                self.report = Some(read_report(&report)?);
                if self.burst > 0 {
                    self.burst -= 1;
                    self.write_report().await?;
                }
                Ok(false)
            }
            Some(Message::Applied(applied)) => {
                let ours = self.shared.world.current().world.epoch;
                self.seat.applied(
                    ours,
                    Epoch(applied.epoch),
                    Generation(applied.generation),
                    applied
                        .error
                        .chars()
                        .filter(|c| !c.is_control())
                        .take(512)
                        .collect(),
                );
                Ok(false)
            }
            Some(Message::Logout(v1::Logout {})) => {
                let id = self.id;
                let left = self
                    .shared
                    .world
                    .change(move |draft| registry::logout(draft, id));
                left.await.map_err(status)?;
                info!(node = %id, "node logged out");
                Ok(true)
            }
            Some(Message::Begin(_)) => Err(Status::invalid_argument("Begin comes once, and first")),
            // From a newer agent; what it cannot do without, it negotiates in Hello.
            None => Ok(false),
        }
    }

    async fn write_report(&mut self) -> Result<(), Status> {
        self.next_report = Instant::now() + REPORT_SPACING;
        let Some((endpoints, routes)) = self.report.take() else {
            return Ok(());
        };
        let id = self.id;
        let (again_endpoints, again_routes) = (endpoints.clone(), routes.clone());
        let written = self
            .shared
            .world
            .change(move |draft| registry::report(draft, id, &endpoints, &routes))
            .await;
        match written {
            Ok(()) => Ok(()),
            Err(ChangeError::Store(_)) => {
                // Kept, and tried again after the spacing: the node need not know.
                self.report.get_or_insert((again_endpoints, again_routes));
                Ok(())
            }
            // Deleted meanwhile: the next world says so, with the right notice.
            Err(ChangeError::Refused(_)) => Ok(()),
            Err(error) => Err(status(error)),
        }
    }
}

fn read_report(report: &v1::Report) -> Result<(Vec<SocketAddr>, Vec<IpNet>), Status> {
    let endpoints = report.endpoints.iter().map(SocketAddr::try_from).collect();
    let routes = report
        .advertised_routes
        .iter()
        .map(IpNet::try_from)
        .collect();
    let invalid = |invalid: mesh_api::Invalid| Status::invalid_argument(invalid.to_string());
    Ok((
        Result::<_, _>::map_err(endpoints, invalid)?,
        Result::<_, _>::map_err(routes, invalid)?,
    ))
}
