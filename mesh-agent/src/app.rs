//! Builds the agent and runs it: the one place where the parts are named together.
//!
//! What can be wrong at a start is sorted here. Wrong settings end the process. A state that cannot
//! be used does not: the agent stays up, unhealthy, and says so, because a supervisor that restarts
//! it in a circle hides the reason, and because nothing but a person may decide to give up a node's
//! identity.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use mesh_core::agent::{Memory, State};
use mesh_core::health::{Condition, Severity};
use mesh_core::node::HostInfo;
use rand_core::RngCore as _;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

use crate::config::{BackendChoice, Config};
use crate::control::{self, Client};
use crate::eventloop::{Clock, Command, EventLoop, Inlets, Outlets, host_info};
use crate::flow_log::{self, FlowLog};
use crate::local_api::{self, Facts, Service};
use crate::snapshot::Snapshot;
use crate::stack::{self, Handle, Ports};
use crate::state_dir::{Loaded, StateDir, Unusable};
use crate::{disk, dns, metrics, underlay, wg};

/// Commands and reports that may wait for the loop, which is never long away.
const QUEUE: usize = 64;
/// An agent that was killed keeps its state until the kernel is through with it.
const DYING: Duration = Duration::from_secs(2);

/// The agent, built and not yet running.
#[derive(Debug)]
pub struct Agent {
    config: Config,
    folder: StateDir,
    state: Result<Loaded, Unusable>,
    socket: (UnixListener, u32),
    metrics: Option<tokio::net::TcpListener>,
    /// Held while the agent lives: two agents on one state would evict each other.
    lock: File,
    signals: Signals,
}

impl Agent {
    /// Opens everything that a start can fail on.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let signals = Signals::listen()?;
        let folder = StateDir::open(&config.state_dir)?;
        let lock = lock(&config.state_dir).await?;
        let state = folder.load(|| free_port(config.listen_port));
        if let Err(Unusable::Io { .. }) = &state {
            return Err(state.err().map_or_else(unexpected, Into::into));
        }
        let socket = local_api::bind(&config.socket, &config.socket_group).await?;
        let metrics = match config.metrics {
            Some(address) => Some(metrics::bind(address).await?),
            None => None,
        };
        Ok(Self {
            config,
            folder,
            state,
            socket,
            metrics,
            lock,
            signals,
        })
    }

    /// Runs until SIGTERM or SIGINT. An interface of the kernel's stays as it is: only `mesh down` removes it.
    pub async fn run(self) -> anyhow::Result<()> {
        let Self {
            config,
            folder,
            state,
            socket: (socket, socket_group),
            metrics,
            lock,
            mut signals,
        } = self;
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let (commands, command_inbox) = mpsc::channel(QUEUE);
        let facts = Facts {
            backend: expected_backend(choice(config.backend)).await.to_owned(),
            socket_group,
            settings: format!("{config:#?}"),
        };

        let (snapshot, looks) = match &state {
            Ok(_) => watch::channel(Snapshot::default()),
            Err(unusable) => watch::channel(Snapshot::broken("StateCorrupt", corrupt(unusable))),
        };
        let (handle, handles) = watch::channel(None);
        let host = host_info(&facts.backend);
        let (line, asker) = control::asker();
        let flow_log = FlowLog::default();
        let service = Service::new(
            commands,
            looks.clone(),
            handles.clone(),
            asker,
            flow_log.clone(),
            facts,
        );
        tasks.spawn(local_api::serve(socket, service, stop.clone()));
        if let Some(listener) = metrics {
            tasks.spawn(metrics::serve(listener, looks, handles, stop.clone()));
        }
        match state {
            Ok(loaded) => {
                let parts = Parts {
                    config,
                    folder,
                    host,
                    snapshot,
                    handle,
                    line,
                    commands: command_inbox,
                    flow_log,
                };
                let running = healthy(parts, loaded, stop.clone(), tasks.clone());
                tasks.spawn(Box::pin(running));
            }
            Err(unusable) => {
                tracing::error!(error = %unusable, "the state cannot be used");
                tasks.spawn(refuse(command_inbox, unusable.to_string(), snapshot));
            }
        }

        signals.wait().await;
        tracing::info!("stopping; an interface of the kernel's stays as it is");
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        drop(lock);
        Ok(())
    }
}

/// What the running agent is made of, besides its state.
struct Parts {
    config: Config,
    folder: StateDir,
    host: HostInfo,
    snapshot: watch::Sender<Snapshot>,
    handle: watch::Sender<Option<Handle>>,
    line: watch::Sender<control::Line>,
    commands: mpsc::Receiver<Command>,
    flow_log: FlowLog,
}

fn choice(choice: BackendChoice) -> wg::Choice {
    match choice {
        BackendChoice::Auto => wg::Choice::Auto,
        BackendChoice::Kernel => wg::Choice::Kernel,
        BackendChoice::Userspace => wg::Choice::Userspace,
    }
}

/// The backend that a first `mesh up` will take, as far as one can tell before.
async fn expected_backend(choice: wg::Choice) -> &'static str {
    let kernel = match choice {
        wg::Choice::Auto => wg::kernel::is_supported().await,
        wg::Choice::Kernel => true,
        wg::Choice::Userspace => false,
    };
    if kernel { "kernel" } else { "userspace" }
}

fn stack_settings(config: &Config) -> stack::Settings {
    stack::Settings {
        backend: choice(config.backend),
        interface: config.interface.clone(),
        pin_dir: config.pin_dir.clone(),
        guard_numbers: config.state_dir.join("guards"),
        ebpf_object: config.ebpf_object.clone(),
        uapi_dir: Some(wg::UAPI_DIR.into()),
        dns: config.dns.then(|| dns::Options {
            interface: config.interface.clone(),
            port: 53,
            helper: Some(config.dns_helper.clone()),
            upstreams: None,
        }),
    }
}

/// The agent with a state that holds.
async fn healthy(parts: Parts, loaded: Loaded, stop: CancellationToken, tasks: TaskTracker) {
    let Parts {
        config,
        folder,
        host,
        snapshot,
        handle,
        line,
        commands,
        flow_log,
    } = parts;
    let Loaded {
        identity,
        memory,
        damage,
        remembered,
    } = loaded;
    let clock = Clock::start();
    let (reports, control) = mpsc::channel(QUEUE);
    let (teller, told) = mpsc::channel(QUEUE);
    let (desired, plans) = watch::channel(None);
    let (around, surroundings) = watch::channel(());
    let (links, link_changes) = watch::channel(());
    let (memories, memory_inbox) = watch::channel::<Memory>(memory.clone());
    let listen_port = match config.listen_port {
        0 => identity.listen_port,
        chosen => chosen,
    };
    let mut state = State::new(
        identity.keys.clone(),
        listen_port,
        memory,
        rand_core::OsRng.next_u64(),
        clock.now(),
    );
    for text in damage {
        tracing::warn!(reason = text, "part of the state is damaged");
        state.handle_condition("StateDamaged", Some(damaged(text)));
    }
    tasks.spawn(disk::run(folder, remembered, memory_inbox, teller.clone()));
    tasks.spawn(underlay::run(
        config.interface.clone(),
        listen_port,
        teller.clone(),
        around,
        links,
        stop.clone(),
    ));
    if let Some(path) = config.flow_log.clone() {
        let (log, told) = (flow_log.clone(), teller.clone());
        tasks.spawn(flow_log::write(path, log, told, stop.clone()));
    }
    let ports = Ports {
        plans,
        around: surroundings,
        links: link_changes,
        told: teller,
        handle,
        flow_log,
    };
    tasks.spawn(stack::supervise(
        stack_settings(&config),
        ports,
        stop.clone(),
    ));
    let outlets = Outlets {
        desired,
        memory: memories,
        snapshot,
    };
    let inlets = Inlets {
        control,
        commands,
        told,
    };
    let client = Client::new(identity.keys, line, reports);
    EventLoop::new(state, client, clock, host, config.name, outlets)
        .run(inlets, stop)
        .await;
}

/// An agent whose state is corrupt answers every command with the reason.
async fn refuse(
    mut commands: mpsc::Receiver<Command>,
    reason: String,
    _snapshot: watch::Sender<Snapshot>,
) {
    while let Some(command) = commands.recv().await {
        let status = Status::failed_precondition(reason.clone());
        match command {
            Command::Up(_, reply) => drop(reply.send(Err(status))),
            Command::Down(_, reply) => drop(reply.send(Err(status))),
        }
    }
}

fn corrupt(unusable: &Unusable) -> Condition {
    Condition {
        severity: Severity::Error,
        text: unusable.to_string(),
        next_step: "restore the state folder, or move it away to enroll this machine as a new node",
    }
}

fn damaged(text: String) -> Condition {
    Condition {
        severity: Severity::Warning,
        text,
        next_step: "heals with the next netmap; check the disk",
    }
}

fn unexpected() -> anyhow::Error {
    anyhow::anyhow!("the state cannot be read")
}

/// Two agents with one identity would take each other's session away for ever.
async fn lock(folder: &Path) -> anyhow::Result<File> {
    let file = File::open(folder).context("open the state folder")?;
    let mut left = DYING;
    while let Err(error) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        let says = || format!("another agent uses the state folder {}", folder.display());
        if error != Errno::AGAIN || left.is_zero() {
            return Err(error).with_context(says);
        }
        tokio::time::sleep(DYING / 20).await;
        left = left.saturating_sub(DYING / 20);
    }
    Ok(file)
}

/// A UDP port that is free now, to be remembered for good.
fn free_port(chosen: u16) -> u16 {
    if chosen != 0 {
        return chosen;
    }
    std::net::UdpSocket::bind((std::net::Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)))
        .and_then(|socket| socket.local_addr())
        .map_or(0, |address| address.port())
}

/// Who asks us to stop. Listened to before anybody can know that we are there: until then a signal kills.
#[derive(Debug)]
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
