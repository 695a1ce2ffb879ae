//! The agent's side of `mesh`: a gRPC service on a unix socket.
//!
//! The socket's mode says who may look; who may change anything is asked again, for every call, of
//! the credentials that the kernel took when the caller connected. Nothing here opens a path or a
//! socket that the caller names: a confused agent must have nothing to be confused about.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::v1;
use mesh_api::v1::local_server::{Local, LocalServer};
use mesh_core::agent::Standing;
use mesh_core::health::{Condition, Severity};
use mesh_core::wireguard::{DeviceStatus, PeerStatus};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tonic::{Request, Response, Status};

use crate::control::Asker;
use crate::dataplane::READ_WITHIN;
use crate::eventloop::Command;
use crate::flow_log::FlowLog;
use crate::snapshot::{Family, Snapshot, Whois};
use crate::stack::{Enforcer, Handle};

mod bundle;
mod counters;
mod flows;
mod maps;
pub mod ping;
mod policy;
mod socket;
mod top;
mod why;

pub use socket::{Caller, bind, serve};

/// Longest time that one ping is waited for.
const LONGEST_PING: Duration = Duration::from_secs(30);
/// Pings under way at once: each holds a raw socket, and anybody who may look may ping.
const MOST_PINGS: usize = 32;
/// Readers of the flow log at once.
const MOST_FOLLOWERS: usize = 16;
/// Messages of the user's command are small.
const LARGEST_REQUEST: usize = 64 << 10;

/// Answers `mesh`. Cloned for every connection.
#[derive(Clone, Debug)]
pub struct Service {
    commands: mpsc::Sender<Command>,
    snapshot: watch::Receiver<Snapshot>,
    handle: watch::Receiver<Option<Handle>>,
    asker: Asker,
    flow_log: FlowLog,
    facts: Arc<Facts>,
    pings: Arc<Semaphore>,
    followers: Arc<Semaphore>,
}

/// What does not change while the agent runs.
#[derive(Debug)]
pub struct Facts {
    /// The WireGuard backend that will be taken.
    pub backend: String,
    /// The group that the socket was given to.
    pub socket_group: u32,
    /// For the debug bundle: the settings, without secrets since there are none in them.
    pub settings: String,
}

impl Service {
    pub fn new(
        commands: mpsc::Sender<Command>,
        snapshot: watch::Receiver<Snapshot>,
        handle: watch::Receiver<Option<Handle>>,
        asker: Asker,
        flow_log: FlowLog,
        facts: Facts,
    ) -> Self {
        Self {
            commands,
            snapshot,
            handle,
            asker,
            flow_log,
            facts: Arc::new(facts),
            pings: Arc::new(Semaphore::new(MOST_PINGS)),
            followers: Arc::new(Semaphore::new(MOST_FOLLOWERS)),
        }
    }

    pub fn into_server(self) -> LocalServer<Self> {
        LocalServer::new(self).max_decoding_message_size(LARGEST_REQUEST)
    }

    /// The device and the filter, if they stand.
    fn handle(&self) -> Option<Handle> {
        self.handle.borrow().clone()
    }

    fn raised(&self) -> Result<Handle, Status> {
        self.handle()
            .ok_or_else(|| Status::failed_precondition("nothing is filtered: this node is down"))
    }

    fn filter(&self) -> Result<Arc<Enforcer>, Status> {
        Ok(self.raised()?.enforcer)
    }

    /// What the device says of its peers; empty without a device.
    async fn observe(&self) -> DeviceStatus {
        let Some(handle) = self.handle() else {
            return DeviceStatus::default();
        };
        handle.backend.status().await.unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "read the device");
            DeviceStatus::default()
        })
    }

    async fn status_now(&self) -> (Snapshot, v1::LocalStatus) {
        let look = self.look();
        let backend = match self.handle() {
            Some(handle) => handle.backend.kind().to_owned(),
            None => self.facts.backend.clone(),
        };
        let status = status(&look, backend, &self.observe().await);
        (look, status)
    }

    /// A consistent look at the agent.
    fn look(&self) -> Snapshot {
        self.snapshot.borrow().clone()
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, Status>>) -> Command,
    ) -> Result<Response<T>, Status> {
        let stopping = || Status::unavailable("the agent is stopping");
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?.map(Response::new)
    }
}

/// Refuses a caller who may only look.
fn check_writer<T>(request: &Request<T>, facts: &Facts) -> Result<(), Status> {
    let caller = request.extensions().get::<Caller>();
    if caller.is_some_and(|caller| caller.may_write(facts.socket_group)) {
        return Ok(());
    }
    Err(Status::permission_denied(
        "only root, the agent's own user and members of its group may do this; try sudo, or join the group",
    ))
}

#[tonic::async_trait]
impl Local for Service {
    async fn up(
        &self,
        request: Request<v1::UpRequest>,
    ) -> Result<Response<v1::UpResponse>, Status> {
        check_writer(&request, &self.facts)?;
        let request = request.into_inner();
        self.ask(|reply| Command::Up(request, reply)).await
    }

    async fn down(
        &self,
        request: Request<v1::DownRequest>,
    ) -> Result<Response<v1::DownResponse>, Status> {
        check_writer(&request, &self.facts)?;
        let request = request.into_inner();
        self.ask(|reply| Command::Down(request, reply)).await
    }

    async fn status(
        &self,
        _: Request<v1::LocalStatusRequest>,
    ) -> Result<Response<v1::LocalStatus>, Status> {
        let (_, status) = self.status_now().await;
        Ok(Response::new(status))
    }

    async fn ping(
        &self,
        request: Request<v1::PingRequest>,
    ) -> Result<Response<v1::PingResponse>, Status> {
        let request = request.into_inner();
        let look = self.look();
        let family = if request.v6 { Family::V6 } else { Family::V4 };
        let (who, address) = look
            .resolve(&request.target, family)
            .ok_or_else(|| unknown_node(&look, &request.target))?;
        if self.handle().is_none() {
            return Err(Status::failed_precondition(
                "nothing is sent: this node is down",
            ));
        }
        let timeout = Duration::from_millis(request.timeout_ms.into()).min(LONGEST_PING);
        let _turn = self
            .pings
            .try_acquire()
            .map_err(|_| Status::resource_exhausted("too many pings at once; try again"))?;
        let rtt = ping::once(own_address(&look, address)?, address, timeout).await?;
        let path = match who {
            Whois::Me(_) => "this node".to_owned(),
            Whois::Peer(_, peer) => path(self.observe().await.peers.get(&peer.key)),
        };
        Ok(Response::new(v1::PingResponse {
            name: who.name().to_owned(),
            address: address.to_string(),
            rtt_us: u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX),
            path,
        }))
    }

    async fn whois(
        &self,
        request: Request<v1::WhoisRequest>,
    ) -> Result<Response<v1::WhoisResponse>, Status> {
        let text = request.into_inner().address;
        let look = self.look();
        let (who, _) = look
            .resolve(text.trim(), Family::V4)
            .ok_or_else(|| unknown_node(&look, &text))?;
        Ok(Response::new(who.response()))
    }

    async fn counters(
        &self,
        _: Request<v1::CountersRequest>,
    ) -> Result<Response<v1::CountersResponse>, Status> {
        let look = self.look();
        let counters = self
            .filter()?
            .counters()
            .map_err(|error| Status::internal(format!("{error:#}")))?;
        Ok(Response::new(counters::response(&look, &counters)))
    }

    async fn ask_policy(
        &self,
        request: Request<v1::PolicyQuestion>,
    ) -> Result<Response<v1::PolicyAnswer>, Status> {
        if let Some(answer) = policy::own(&self.look(), request.get_ref())? {
            return Ok(Response::new(answer));
        }
        // The coordinator takes the question for this node's, whoever asked it here.
        check_writer(&request, &self.facts)?;
        let answer = self.asker.ask_policy(request.into_inner()).await;
        answer.map(Response::new).map_err(policy::refused)
    }

    type FlowsStream = flows::Records;

    async fn flows(
        &self,
        request: Request<v1::FlowsRequest>,
    ) -> Result<Response<Self::FlowsStream>, Status> {
        let turn = self.followers.clone().try_acquire_owned();
        let turn =
            turn.map_err(|_| Status::resource_exhausted("too many readers of the flow log"))?;
        let look = self.look();
        let query = flows::query(request.get_ref(), look.netmap.as_deref())?;
        let follow = request.get_ref().follow;
        if !follow {
            // What went before the question belongs into the answer.
            tokio::time::sleep(READ_WITHIN).await;
        }
        let records = flows::records(&self.flow_log, follow, query, turn);
        Ok(Response::new(records))
    }

    async fn why(
        &self,
        request: Request<v1::WhyRequest>,
    ) -> Result<Response<v1::WhyResponse>, Status> {
        let (look, handle) = (self.look(), self.handle());
        why::answer(&look, handle.as_ref(), &request.into_inner()).map(Response::new)
    }

    async fn top(&self, _: Request<v1::TopRequest>) -> Result<Response<v1::TopResponse>, Status> {
        let handle = self.raised()?;
        let top = top::response(&self.look(), &handle).await;
        top.map(Response::new)
    }

    async fn maps(
        &self,
        _: Request<v1::MapsRequest>,
    ) -> Result<Response<v1::MapsResponse>, Status> {
        let filter = self.filter()?;
        maps::response(&filter).map(Response::new)
    }

    async fn debug_bundle(
        &self,
        request: Request<v1::DebugBundleRequest>,
    ) -> Result<Response<v1::DebugBundle>, Status> {
        check_writer(&request, &self.facts)?;
        let (look, status) = self.status_now().await;
        let json = bundle::json(&look, &status, &self.facts.settings);
        Ok(Response::new(v1::DebugBundle { json }))
    }
}

fn unknown_node(look: &Snapshot, target: &str) -> Status {
    let target = crate::cli::safe(target);
    match look.netmap {
        Some(_) => Status::not_found(format!(
            "{target}: no node of that name or address is known here (nodes that no rule of the policy joins do not know each other)"
        )),
        None => Status::failed_precondition("this node has no netmap yet; see `mesh status`"),
    }
}

fn own_address(look: &Snapshot, to: IpAddr) -> Result<IpAddr, Status> {
    let netmap = look
        .netmap
        .as_ref()
        .ok_or_else(|| Status::failed_precondition("this node has no netmap yet"))?;
    let own = netmap.me.addresses;
    Ok(match to {
        IpAddr::V4(_) => own.v4.into(),
        IpAddr::V6(_) => own.v6.into(),
    })
}

/// What `mesh status` shows.
fn status(look: &Snapshot, backend: String, device: &DeviceStatus) -> v1::LocalStatus {
    let state = match look.standing {
        Standing::Stopped => v1::local_status::State::Stopped,
        Standing::Connecting => v1::local_status::State::Connecting,
        Standing::Running => v1::local_status::State::Running,
        Standing::Expired => v1::local_status::State::Expired,
    };
    let netmap = look.netmap.as_deref();
    let peers = netmap.map(|netmap| {
        netmap
            .peers
            .values()
            .map(|peer| {
                let seen = device.peers.get(&peer.key);
                v1::PeerStatus {
                    peer: Some(peer.into()),
                    path: path(seen),
                    handshake_age_seconds: seen
                        .and_then(|seen| seen.handshake_age)
                        .map(|age| age.as_secs()),
                    received_bytes: seen.map_or(0, |seen| seen.rx_bytes),
                    sent_bytes: seen.map_or(0, |seen| seen.tx_bytes),
                }
            })
            .collect()
    });
    v1::LocalStatus {
        state: state.into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        mesh: netmap.map(|netmap| (&netmap.mesh).into()),
        me: netmap.map(|netmap| (&netmap.me).into()),
        backend,
        coordinator_connected: look.connected,
        epoch: netmap.map_or(0, |netmap| netmap.epoch.0),
        generation: netmap.map_or(0, |netmap| netmap.generation.0),
        peers: peers.unwrap_or_default(),
        health: look
            .health
            .iter()
            .map(|(name, condition)| shown_condition(name, condition))
            .collect(),
    }
}

/// Where a peer's packets go now, if a session stands.
fn path(seen: Option<&PeerStatus>) -> String {
    match seen
        .filter(|seen| seen.is_live())
        .and_then(|seen| seen.endpoint)
    {
        Some(endpoint) => format!("direct {endpoint}"),
        None => "idle".to_owned(),
    }
}

fn shown_condition(name: &str, condition: &Condition) -> v1::Condition {
    let severity = match condition.severity {
        Severity::Info => v1::Severity::Info,
        Severity::Warning => v1::Severity::Warning,
        Severity::Error => v1::Severity::Error,
    };
    v1::Condition {
        name: name.to_owned(),
        severity: severity.into(),
        text: condition.text.clone(),
        next_step: condition.next_step.to_owned(),
    }
}
