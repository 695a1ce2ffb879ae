//! The one `select!`: inputs → [`mesh_core::agent::State`] → outputs.
//!
//! Everything here is quick; whatever waits (a channel, a disk, a device) is a task of its own that
//! reports back. Tasks are told the newest value by `watch` and so can be slow without falling
//! behind.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_api::v1;
use mesh_core::agent::{Actuator, Memory, Output, Prefs, Standing, State};
use mesh_core::control::{Enroll, Event, Failure, Refused, Transmit};
use mesh_core::desired::Desired;
use mesh_core::health::Condition;
use mesh_core::node::{HostInfo, Name};
use mesh_core::routes::LocalPrefix;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::control::{Client, Numbered, Report, Target, accept, parse_join};
use crate::snapshot::Snapshot;

mod clock;

pub use clock::Clock;

/// How long `mesh up` waits for the node to be connected and its policy to be enforced.
const UP_TIMEOUT: Duration = Duration::from_secs(25);
/// Longest sleep. After a suspend the uptime has jumped, which no timer notices.
const TICK: Duration = Duration::from_secs(15);
/// More routes than anybody advertises.
const MOST_ROUTES: usize = 256;

/// What the user's command asks of the loop.
#[derive(Debug)]
pub enum Command {
    Up(
        v1::UpRequest,
        oneshot::Sender<Result<v1::UpResponse, Status>>,
    ),
    Down(
        v1::DownRequest,
        oneshot::Sender<Result<v1::DownResponse, Status>>,
    ),
}

/// What the tasks around the loop tell it.
#[derive(Debug)]
pub enum Told {
    /// An actuator reached the plan of this revision, or failed to.
    Actuator(Actuator, u64, Result<(), String>),
    /// A condition stands, or stands no more.
    Condition(&'static str, Option<Condition>),
    /// Where this node may be reached, and the networks that it is connected to.
    Underlay {
        endpoints: BTreeSet<SocketAddr>,
        prefixes: BTreeSet<LocalPrefix>,
    },
    /// The interface is gone, as the plan asked.
    TornDown,
}

/// What the loop tells others.
#[derive(Debug)]
pub struct Outlets {
    pub desired: watch::Sender<Option<Arc<Desired>>>,
    pub memory: watch::Sender<Memory>,
    pub snapshot: watch::Sender<Snapshot>,
}

/// What others tell the loop.
#[derive(Debug)]
pub struct Inlets {
    pub control: mpsc::Receiver<Numbered>,
    pub commands: mpsc::Receiver<Command>,
    pub told: mpsc::Receiver<Told>,
}

#[derive(Debug)]
struct Waiting {
    deadline: Instant,
    reply: oneshot::Sender<Result<v1::UpResponse, Status>>,
}

#[derive(Debug)]
pub struct EventLoop {
    pub state: State,
    pub client: Client,
    pub clock: Clock,
    pub host: HostInfo,
    /// Wanted name from the settings.
    pub name: Option<String>,
    pub outlets: Outlets,
    /// What each actuator failed with last.
    failing: BTreeMap<Actuator, String>,
    /// Why there is no session, as it was last logged.
    away: Option<String>,
    waiting: Vec<Waiting>,
    leaving: Vec<oneshot::Sender<Result<v1::DownResponse, Status>>>,
}

impl EventLoop {
    pub fn new(
        state: State,
        client: Client,
        clock: Clock,
        host: HostInfo,
        name: Option<String>,
        outlets: Outlets,
    ) -> Self {
        Self {
            state,
            client,
            clock,
            host,
            name,
            outlets,
            failing: BTreeMap::new(),
            away: None,
            waiting: Vec::new(),
            leaving: Vec::new(),
        }
    }

    /// Runs until `stop`.
    pub async fn run(mut self, mut inlets: Inlets, stop: CancellationToken) {
        loop {
            self.settle();
            let wake = self.wake_in();
            tokio::select! {
                () = stop.cancelled() => break,
                Some(numbered) = inlets.control.recv() => self.hear(numbered),
                Some(command) = inlets.commands.recv() => self.command(command),
                Some(told) = inlets.told.recv() => self.told(told),
                () = tokio::time::sleep(wake) => {}
            }
            // Whatever else has arrived meanwhile is settled together.
            while let Ok(told) = inlets.told.try_recv() {
                self.told(told);
            }
        }
        self.client.close();
    }

    fn now(&self) -> Instant {
        self.clock.now()
    }

    fn wake_in(&self) -> Duration {
        let now = self.now();
        let waiting = self.waiting.iter().map(|waiting| waiting.deadline);
        self.state
            .poll_timeout()
            .into_iter()
            .chain(waiting)
            .min()
            .map_or(TICK, |at| at.saturating_duration_since(now))
            .min(TICK)
    }

    // === in ===

    fn hear(&mut self, numbered: Numbered) {
        if !self.client.is_current(&numbered) {
            return;
        }
        let now = self.now();
        match numbered.report {
            Report::CoordinatorKey(key) => self.state.handle_coordinator_key(key),
            Report::Hello(hello) => self.state.handle_hello(hello, now),
            Report::Enrolled(membership) => self.state.handle_enrolled(membership, now),
            Report::Update(signed) => {
                let membership = self.state.memory(now).membership;
                let coordinator = self.state.prefs().coordinator;
                let verify = |held: Option<&_>| match coordinator {
                    Some(key) => accept(&key, membership, held, &signed),
                    None => Err(Refused::Untrusted(
                        "the coordinator's key is not known".to_owned(),
                    )),
                };
                self.state.handle_update(verify, now);
            }
            Report::Notice(notice) => self.state.handle_notice(notice, now),
            Report::Failed(failure) => self.state.handle_failure(failure, now),
        }
    }

    fn told(&mut self, told: Told) {
        let now = self.now();
        match told {
            Told::Actuator(actuator, revision, result) => {
                match &result {
                    // A retry that fails the same way is no news.
                    Err(error) if self.failing.get(&actuator) != Some(error) => {
                        tracing::warn!(?actuator, error, "apply the plan");
                        self.failing.insert(actuator, error.clone());
                    }
                    Err(_) => {}
                    Ok(()) => drop(self.failing.remove(&actuator)),
                }
                self.state.handle_actuator(actuator, revision, result, now);
            }
            Told::Condition(name, condition) => self.state.handle_condition(name, condition),
            Told::Underlay {
                endpoints,
                prefixes,
            } => self.state.handle_underlay(endpoints, prefixes, now),
            Told::TornDown => {
                for reply in self.leaving.drain(..) {
                    let _ = reply.send(Ok(v1::DownResponse {}));
                }
            }
        }
    }

    fn command(&mut self, command: Command) {
        let now = self.now();
        match command {
            Command::Up(request, reply) => match self.prepare(request) {
                Ok((prefs, enroll)) => {
                    tracing::info!("up");
                    // Whoever still waits for the way down has been overtaken.
                    self.told(Told::TornDown);
                    self.state.handle_up(prefs, enroll, now);
                    let deadline = now + UP_TIMEOUT;
                    self.waiting.push(Waiting { deadline, reply });
                }
                Err(status) => drop(reply.send(Err(status))),
            },
            Command::Down(request, reply) => {
                tracing::info!(logout = request.logout, "down");
                self.state.handle_down(request.logout, now);
                self.leaving.push(reply);
                // Nothing to tear down is reported by nobody.
                if self.outlets.desired.borrow().is_none() {
                    self.told(Told::TornDown);
                }
            }
        }
    }

    /// What `mesh up` asks for, checked and laid over what was set before.
    fn prepare(&self, request: v1::UpRequest) -> Result<(Prefs, Option<Enroll>), Status> {
        let invalid = |error: &dyn std::fmt::Display| Status::invalid_argument(error.to_string());
        let mut prefs = self.state.prefs().clone();
        let memory = self.state.memory(self.now());
        if !request.join.is_empty() {
            let join = parse_join(&request.join).map_err(|error| invalid(&format!("{error:#}")))?;
            if let Ok(old) = parse_join(&prefs.join)
                && memory.membership.is_some()
                && !old.pins.iter().any(|pin| join.pins.contains(pin))
            {
                return Err(Status::failed_precondition(
                    "this machine is a node of another coordinator's mesh; run `mesh down --logout` first",
                ));
            }
            if let Some(known) = prefs.coordinator
                && !join.pins.contains(&known.pin())
            {
                prefs.coordinator = None;
            }
            prefs.join = join.to_string();
        } else if prefs.join.is_empty() {
            return Err(Status::failed_precondition(
                "no coordinator is known yet; run `mesh up --join mesh://… --auth-key …`",
            ));
        }
        // A bare `mesh up` resumes; one that says anything says everything.
        let bare =
            request.join.is_empty() && request.auth_key.is_empty() && request.name.is_empty();
        if !bare || !request.advertise_routes.is_empty() {
            if request.advertise_routes.len() > MOST_ROUTES {
                return Err(invalid(&format!("more than {MOST_ROUTES} routes")));
            }
            prefs.advertised_routes = request
                .advertise_routes
                .iter()
                .map(|prefix| {
                    prefix
                        .try_into()
                        .map_err(|error: mesh_api::Invalid| invalid(&error))
                })
                .collect::<Result<_, _>>()?;
        }
        let name = match request.name.as_str() {
            "" => self.name.clone().unwrap_or_default(),
            wanted => Name::parse(wanted)
                .map_err(|error| invalid(&error))?
                .to_string(),
        };
        let enroll = (!request.auth_key.is_empty()).then(|| Enroll {
            auth_key: request.auth_key.trim().to_owned(),
            name,
        });
        if enroll.is_none() && memory.membership.is_none() {
            return Err(Status::failed_precondition(
                "this machine is not a node yet; run `mesh up --join mesh://… --auth-key KEY` with a pre-auth key",
            ));
        }
        Ok((prefs, enroll))
    }

    // === out ===

    fn settle(&mut self) {
        let now = self.now();
        self.state.handle_timeout(now);
        while let Some(output) = self.state.poll_output() {
            match output {
                Output::Desired(desired) => {
                    self.outlets.desired.send_replace(desired);
                }
                Output::Remember => {
                    self.outlets.memory.send_replace(self.state.memory(now));
                }
                Output::Told(event) => self.log(&event),
            }
        }
        while let Some(transmit) = self.state.poll_transmit() {
            self.transmit(transmit);
        }
        let snapshot = Snapshot::of(&self.state, now);
        self.answer(&snapshot, now);
        self.outlets.snapshot.send_replace(snapshot);
    }

    fn transmit(&mut self, transmit: Transmit) {
        match transmit {
            Transmit::Connect => {
                let prefs = self.state.prefs();
                match parse_join(&prefs.join) {
                    Ok(join) => self.client.connect(Target {
                        join,
                        coordinator: prefs.coordinator,
                        host: self.host.clone(),
                    }),
                    Err(error) => {
                        let failure = Failure::Unreachable(format!("{error:#}"));
                        self.state.handle_failure(failure, self.clock.now());
                    }
                }
            }
            Transmit::Close => self.client.close(),
            step => {
                if !self.client.step(step) {
                    let text = "the channel to the coordinator is stuck".to_owned();
                    self.state
                        .handle_failure(Failure::Unreachable(text), self.clock.now());
                }
            }
        }
    }

    /// Answers those who wait for `mesh up`.
    fn answer(&mut self, snapshot: &Snapshot, now: Instant) {
        if let Some(netmap) = &snapshot.netmap
            && snapshot.connected
            && snapshot.is_ready()
        {
            for waiting in self.waiting.drain(..) {
                let _ = waiting.reply.send(Ok(v1::UpResponse {
                    name: netmap.me.name.to_string(),
                    addresses: netmap
                        .me
                        .addresses
                        .each()
                        .iter()
                        .map(ToString::to_string)
                        .collect(),
                }));
            }
        }
        let late = self
            .waiting
            .extract_if(.., |waiting| waiting.deadline <= now);
        let late: Vec<Waiting> = late.collect();
        for waiting in late {
            let _ = waiting.reply.send(Err(self.why_not(snapshot)));
        }
    }

    /// What keeps `mesh up` waiting, in the words of the health report.
    fn why_not(&self, snapshot: &Snapshot) -> Status {
        let worst = snapshot
            .health
            .iter()
            .max_by_key(|(_, condition)| condition.severity);
        let reason = if let Some(reason) = self.state.disconnected() {
            format!("no session with the coordinator: {reason}")
        } else if let Some((name, condition)) = worst {
            format!("{name}: {}; {}", condition.text, condition.next_step)
        } else if snapshot.standing == Standing::Connecting {
            "no netmap from the coordinator yet".to_owned()
        } else {
            "the plan is not applied yet".to_owned()
        };
        Status::deadline_exceeded(format!("not up yet, the agent keeps trying: {reason}"))
    }

    fn log(&mut self, event: &Event) {
        match event {
            Event::Clock(_) => {}
            Event::Connected => {
                self.away = None;
                tracing::info!("connected to the coordinator");
            }
            Event::Disconnected(failure) => {
                // A retry that fails the same way is no news.
                if self.away.as_deref() != Some(failure.text()) {
                    tracing::info!(error = failure.text(), "no session with the coordinator");
                    self.away = Some(failure.text().to_owned());
                }
                if let Failure::Denied(text) = failure {
                    for waiting in self.waiting.drain(..) {
                        let _ = waiting.reply.send(Err(Status::failed_precondition(text)));
                    }
                }
            }
            Event::Enrolled(membership) => {
                tracing::info!(node = %membership.node, "enrolled");
            }
            Event::Netmap(chain) => {
                let netmap = chain.netmap();
                tracing::info!(
                    generation = %netmap.generation,
                    peers = netmap.peers.len(),
                    "netmap received"
                );
            }
            Event::Refused(refused) => {
                tracing::warn!(error = %refused, "refused an update of the coordinator");
            }
            Event::Deleted(text) => tracing::warn!(reason = text, "this node left the mesh"),
            Event::Replaced(text) => {
                tracing::warn!(reason = text, "another session uses this node's keys");
            }
        }
    }
}

/// What this machine says of itself.
pub fn host_info(backend: &str) -> HostInfo {
    let uname = rustix::system::uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    let os_version = std::fs::read_to_string("/etc/os-release")
        .ok()
        .and_then(|release| {
            let line = release
                .lines()
                .find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
            Some(line.trim_matches('"').to_owned())
        })
        .unwrap_or_default();
    HostInfo {
        hostname: text(uname.nodename()),
        os: "linux".to_owned(),
        os_version,
        kernel: text(uname.release()),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        backend: backend.to_owned(),
    }
}
