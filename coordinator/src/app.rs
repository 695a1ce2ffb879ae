//! The wiring: from a configuration to running parts, and back to nothing within five seconds.
//!
//! Order matters twice. At the start nothing listens before the world is loaded and verified; at the
//! end nodes are told first, connections close, and the store closes last, when nobody can ask it
//! for anything any more.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_api::v1::admin_server::AdminServer;
use mesh_api::v1::control_server::ControlServer;
use mesh_api::{Join, channel};
use mesh_core::key::MachineKey;
use mesh_core::node::MeshId;
use mesh_core::world::{Mesh, Pools};
use rand_core::{OsRng, RngCore as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tracing::{info, warn};

use crate::api::admin::{Admin, Admins};
use crate::api::control::Control;
use crate::clock::Clock;
use crate::config::Config;
use crate::janitor::Janitor;
use crate::listener::Listener;
use crate::metrics::{self, Metrics};
use crate::netmap_stream::{Shared, Turns};
use crate::sessions::Sessions;
use crate::state_dir::StateDir;
use crate::store::{Founding, Loaded, OpenError, Store};
use crate::world::{Handle, Writer};

/// How long sessions may take to say goodbye, then connections to close, then the store.
const GOODBYE: Duration = Duration::from_millis(1500);
const CLOSING: Duration = Duration::from_millis(1500);
const STORING: Duration = Duration::from_millis(1500);
/// HTTP/2 streams that one node may have open: it needs one session and now and then a call.
const STREAMS: u32 = 64;

/// A coordinator that serves.
#[derive(Debug)]
pub struct Running {
    pub node_address: SocketAddr,
    pub metrics_address: SocketAddr,
    pub socket: PathBuf,
    pub joins: Vec<Join>,
    pub clock: Clock,
    pub world: Handle,
    shutdown: CancellationToken,
    stop_writer: CancellationToken,
    sessions: TaskTracker,
    parts: Vec<JoinHandle<()>>,
    writer: JoinHandle<()>,
}

/// Starts every part. When this returns, nodes and operators are being served.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    let state = StateDir::open(&config.state_dir)?;
    let clock = Clock::start();
    let (key, store, loaded) = open(&config, &state, &clock).await?;
    let key = Arc::new(key);

    let tcp = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listen on {} for nodes", config.listen))?;
    let node_address = tcp.local_addr()?;
    let metrics_tcp = TcpListener::bind(config.metrics)
        .await
        .with_context(|| format!("listen on {} for metrics", config.metrics))?;
    let metrics_address = metrics_tcp.local_addr()?;
    let admins = admins(config.admin_group.as_deref())?;
    let admin_socket = bind_socket(&config.socket, &admins)?;
    let joins = joins(&config, node_address, &key);

    let shutdown = CancellationToken::new();
    let stop_writer = CancellationToken::new();
    let sessions = Sessions::new(loaded.last_seen.clone(), clock.clone());
    let (writer, world) = Writer::new(store, loaded, state, clock.clone())?;
    let writer = tokio::spawn(writer.run(stop_writer.clone()));
    let tasks = TaskTracker::new();
    let metrics = Arc::new(Metrics::default());

    let control = Control {
        shared: Shared {
            world: world.clone(),
            sessions: sessions.clone(),
            key: key.clone(),
            metrics: metrics.clone(),
            shutdown: shutdown.clone(),
            turns: Turns::default(),
        },
        clock: clock.clone(),
        tasks: tasks.clone(),
    };
    let admin = Admin {
        world: world.clone(),
        sessions: sessions.clone(),
        clock: clock.clone(),
        joins: joins.clone(),
        state_dir: config.state_dir.clone(),
    };
    let (ready, channels) = mpsc::channel(64);
    let listener = Listener {
        tls: TlsAcceptor::from(Arc::new(channel::server(&key).context("prepare TLS")?)),
        world: world.clone(),
        metrics: metrics.clone(),
        shutdown: shutdown.clone(),
    };
    let janitor = Janitor {
        world: world.clone(),
        sessions: sessions.clone(),
        clock: clock.clone(),
        ephemeral_grace: config.ephemeral_grace,
    };
    let parts = vec![
        tokio::spawn(listener.run(tcp, ready)),
        tokio::spawn(serve_nodes(
            control,
            ReceiverStream::new(channels),
            shutdown.clone(),
        )),
        tokio::spawn(serve_admins(admin, admins, admin_socket, shutdown.clone())),
        tokio::spawn(janitor.run(shutdown.clone())),
        tokio::spawn(metrics::serve(
            metrics_tcp,
            metrics,
            world.clone(),
            sessions,
            shutdown.clone(),
        )),
    ];
    info!(listen = %node_address, socket = %config.socket.display(), "coordinator serves");
    Ok(Running {
        node_address,
        metrics_address,
        socket: config.socket,
        joins,
        clock,
        world,
        shutdown,
        stop_writer,
        sessions: tasks,
        parts,
        writer,
    })
}

impl Running {
    /// Waits for a part to fail, which none ever should.
    pub async fn failed(&mut self) -> anyhow::Error {
        match (&mut self.writer).await {
            Ok(()) => anyhow::anyhow!("the writer stopped by itself"),
            Err(error) => anyhow::Error::new(error).context("the writer failed"),
        }
    }

    /// Tells the nodes, closes every door, then the store. Takes five seconds at most.
    pub async fn stop(self) {
        self.shutdown.cancel();
        self.sessions.close();
        if tokio::time::timeout(GOODBYE, self.sessions.wait())
            .await
            .is_err()
        {
            warn!("some nodes did not take their goodbye");
        }
        let deadline = tokio::time::Instant::now() + CLOSING;
        for mut part in self.parts {
            if tokio::time::timeout_at(deadline, &mut part).await.is_err() {
                part.abort();
            }
        }
        self.stop_writer.cancel();
        if tokio::time::timeout(STORING, self.writer).await.is_err() {
            warn!("the database did not close in time; its log is read at the next start");
        }
        drop(std::fs::remove_file(&self.socket));
        info!("coordinator stopped");
    }
}

// === state ===

async fn open(
    config: &Config,
    state: &StateDir,
    clock: &Clock,
) -> anyhow::Result<(MachineKey, Store, Loaded)> {
    // Without marker and database nobody depends on a key yet.
    let fresh = state.marker()?.is_none() && !state.database().exists();
    let key = state.key(fresh)?;
    let founding = || {
        let mut random = [0; 21];
        OsRng.fill_bytes(&mut random);
        let [id @ .., a, b, c, d, e] = random;
        Founding {
            mesh: Mesh {
                id: MeshId(id),
                domain: config.founding_domain(),
                pools: Pools {
                    v4: config.pool_v4.unwrap_or_else(Pools::default_v4),
                    v6: Pools::ula([a, b, c, d, e]),
                },
            },
            coordinator: key.public(),
            now: clock.now(),
        }
    };
    let (store, loaded) = Store::open(state, founding).await.map_err(explain)?;
    if loaded.coordinator != key.public() {
        return Err(explain(OpenError::OtherKey));
    }
    let mesh = &loaded.mesh;
    if let Some(domain) = &config.domain
        && *domain != mesh.domain
    {
        bail!(
            "the mesh's domain is {} since its first start and cannot become {domain}",
            mesh.domain
        );
    }
    if let Some(pool) = config.pool_v4
        && pool != mesh.pools.v4
    {
        bail!(
            "the mesh's IPv4 pool is {} since its first start and cannot become {pool}",
            mesh.pools.v4
        );
    }
    Ok((key, store, loaded))
}

/// The error with the operator's next step behind it.
pub fn explain(error: OpenError) -> anyhow::Error {
    match error.restore_hint() {
        Some(hint) => anyhow::anyhow!("{error}; {hint}"),
        None => error.into(),
    }
}

fn joins(config: &Config, listening: SocketAddr, key: &MachineKey) -> Vec<Join> {
    let pins = vec![key.public().pin()];
    if config.advertise.is_empty() {
        return vec![Join {
            host: listening.ip().to_string(),
            port: listening.port(),
            pins,
        }];
    }
    let with_pin = |join: &Join| Join {
        pins: pins.clone(),
        ..join.clone()
    };
    config.advertise.iter().map(with_pin).collect()
}

// === doors ===

async fn serve_nodes(
    control: Control,
    channels: ReceiverStream<io::Result<crate::listener::Channel>>,
    shutdown: CancellationToken,
) {
    // Against floods of resets, headers and silence (CVE-2023-44487, RUSTSEC-2024-0003, -0332).
    let served = Server::builder()
        .max_concurrent_streams(STREAMS)
        .http2_max_pending_accept_reset_streams(Some(20))
        .http2_max_local_error_reset_streams(Some(1024))
        .http2_max_header_list_size(16 * 1024)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .serve_with_incoming_shutdown(
            ControlServer::new(control),
            channels,
            shutdown.cancelled_owned(),
        )
        .await;
    if let Err(error) = served {
        warn!(%error, "serve nodes");
    }
}

async fn serve_admins(
    admin: Admin,
    admins: Admins,
    socket: UnixListener,
    shutdown: CancellationToken,
) {
    let service = InterceptedService::new(AdminServer::new(admin), move |request| {
        admins.check(request)
    });
    let served = Server::builder()
        .max_concurrent_streams(STREAMS)
        .http2_max_header_list_size(16 * 1024)
        .serve_with_incoming_shutdown(
            service,
            UnixListenerStream::new(socket),
            shutdown.cancelled_owned(),
        )
        .await;
    if let Err(error) = served {
        warn!(%error, "serve operators");
    }
}

fn admins(group: Option<&str>) -> anyhow::Result<Admins> {
    let group = match group {
        None => None,
        Some(name) => {
            let groups = std::fs::read_to_string("/etc/group").context("read /etc/group")?;
            let users = std::fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
            let found = group_of(&groups, &users, name);
            Some(found.with_context(|| format!("no group is called {name:?} (--admin-group)"))?)
        }
    };
    Ok(Admins {
        own_uid: rustix::process::geteuid().as_raw(),
        group,
    })
}

/// A group's number and its members' (group(5), passwd(5)).
fn group_of(groups: &str, users: &str, name: &str) -> Option<(u32, Vec<u32>)> {
    let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
    let group = groups
        .lines()
        .map(fields)
        .find(|group| group.first().is_some_and(|first| first == name))?;
    let gid = group.get(2)?.parse().ok()?;
    let names: Vec<&str> = group.get(3).map_or("", |names| names).split(',').collect();
    let members = users.lines().map(fields).filter_map(|user| {
        let listed = names.contains(&user.first()?.as_str());
        listed.then(|| user.get(2)?.parse().ok())?
    });
    Some((gid, members.collect()))
}

/// Binds the admin socket, 0660. A socket that nobody answers at is left over and replaced.
fn bind_socket(path: &Path, admins: &Admins) -> anyhow::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            bail!(
                "{} is in the admin socket's place and is no socket",
                path.display()
            );
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            bail!(
                "another coordinator answers at {}; give --socket",
                path.display()
            );
        }
        Ok(_) => std::fs::remove_file(path).context("remove the old admin socket")?,
        Err(_) => {}
    }
    let socket = UnixListener::bind(path)
        .with_context(|| format!("listen on {} for operators", path.display()))?;
    if let Some((gid, _)) = &admins.group {
        let gid = rustix::fs::Gid::from_raw(*gid);
        rustix::fs::chown(path, None, Some(gid)).context("give the admin socket to its group")?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_groups_members_are_found_by_number() {
        let groups = "root:x:0:\nmesh:x:990:alice,bob\nempty:x:991:\n";
        let users =
            "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/:/bin/sh\nbob:x:1001:1001::/:\n";
        assert_eq!(
            group_of(groups, users, "mesh"),
            Some((990, vec![1000, 1001]))
        );
        assert_eq!(group_of(groups, users, "empty"), Some((991, vec![])));
        assert_eq!(group_of(groups, users, "wheel"), None);
    }
}
