//! MagicDNS on the node's own mesh address, and the host's resolver pointed at it.
//!
//! One actuator for three things that must agree: the [`server`] that answers, the [`forward`]er
//! that asks whom the host asked before, and the [`system`] configuration that makes the host ask
//! us. The order is what is hard: a host must never be pointed at a server that does not listen
//! yet, nor left pointing at one that has gone. So the server binds first and goes last, and the
//! root helper takes the pointing back when our connection to it ends, for whatever reason.
//!
//! [`host`] and [`protocol`] are the helper's side, which `mesh-dns-helper` runs as root.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::dns::{Config, Zone};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::info;

pub mod forward;
pub mod host;
pub mod protocol;
pub mod resolv_conf;
pub mod server;
pub mod system;

use forward::{Forwarder, usable_upstreams};
use protocol::{Mode, Setting};
use server::{Server, Shared};
use system::System;

/// How long a DHCP client that rewrites resolv.conf keeps the mesh's names away. To look costs the
/// helper one read of the file.
const RECHECK: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
pub struct Options {
    /// The mesh device, as resolvers that tell interfaces apart must know it.
    pub interface: String,
    /// 53, but in tests.
    pub port: u16,
    /// The root helper's socket. Without one the host's configuration stays as it is.
    pub helper: Option<PathBuf>,
    /// Whom to forward to, instead of whom the host asked before.
    pub upstreams: Option<Vec<SocketAddr>>,
}

/// What MagicDNS is doing, for `mesh status` and health.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    pub listening: Vec<SocketAddr>,
    /// How the host was told to ask us.
    pub mode: Mode,
    pub upstreams: Vec<SocketAddr>,
}

/// The single writer of the host's resolver configuration. Level-triggered: told what should be,
/// as often as one likes.
#[derive(Debug)]
pub struct Actuator {
    options: Options,
    system: Option<System>,
    running: Option<Running>,
    mode: Mode,
}

/// Lives as long as the server does.
#[derive(Debug)]
struct Running {
    servers: [IpAddr; 2],
    zone: watch::Sender<Arc<Zone>>,
    upstreams: watch::Sender<Arc<[SocketAddr]>>,
    server: Server,
}

impl Actuator {
    pub fn new(options: Options) -> Self {
        let system = options.helper.clone().map(System::new);
        Self {
            options,
            system,
            running: None,
            mode: Mode::None,
        }
    }

    /// Serves `desired` and points the host at it, or, on `None`, neither.
    ///
    /// # Errors
    /// The port is taken, or the helper cannot be reached or refuses. What could be done is done;
    /// say it again later.
    pub async fn apply(&mut self, desired: Option<&Config>) -> anyhow::Result<()> {
        let Some(desired) = desired else {
            let restored = match &mut self.system {
                Some(system) => system.restore().await,
                None => Ok(()),
            };
            self.mode = Mode::None;
            self.running = None;
            return restored;
        };
        let running = match self.running.take() {
            Some(running) if running.servers == desired.servers => running,
            old => {
                // Its sockets may be in the way of the new ones.
                drop(old);
                Running::start(desired, self.options.port)?
            }
        };
        let running = self.running.insert(running);
        running.zone.send_if_modified(|zone| {
            let changed = **zone != desired.zone;
            if changed {
                *zone = Arc::new(desired.zone.clone());
            }
            changed
        });

        let is_mesh = |address| desired.zone.is_mesh(address);
        if let Some(fixed) = &self.options.upstreams {
            let usable = usable_upstreams(fixed.iter().copied(), is_mesh);
            running.set_upstreams(usable);
        }
        let Some(system) = &mut self.system else {
            if self.options.upstreams.is_none() {
                running.set_upstreams(usable_upstreams(system::host_servers(), is_mesh));
            }
            return Ok(());
        };
        let learn = |report: &protocol::Report| {
            if self.options.upstreams.is_none() {
                let servers = system::socket_addresses(&report.upstreams);
                running.set_upstreams(usable_upstreams(servers, is_mesh));
            }
        };
        // First whom to ask, then to be asked: no query falls between the two.
        match system.status().await {
            Ok(report) => learn(&report),
            Err(error) => {
                // Who asks us by themselves, as `dig @` does, is served without the helper too.
                let servers = usable_upstreams(system::host_servers(), is_mesh);
                if self.options.upstreams.is_none() && running.upstreams.borrow().is_empty() {
                    running.set_upstreams(servers);
                }
                return Err(error);
            }
        }
        let report = system
            .set(&setting(&self.options.interface, desired)?)
            .await?;
        learn(&report);
        if self.mode != report.mode {
            info!(mode = %report.mode, "the host resolves names through the mesh");
            self.mode = report.mode;
        }
        Ok(())
    }

    /// Returns when what was applied may hold no more: the helper went away, and took the
    /// configuration back; or so much time has passed that somebody else may have written theirs.
    /// Apply again then.
    pub async fn disturbed(&mut self) {
        match &mut self.system {
            Some(system) => {
                if timeout(RECHECK, system.lost()).await.is_ok() {
                    self.mode = Mode::None;
                }
            }
            None => std::future::pending().await,
        }
    }

    pub fn status(&self) -> Status {
        let running = self.running.as_ref();
        Status {
            listening: running.map_or_else(Vec::new, |r| r.server.addresses().to_vec()),
            mode: self.mode,
            upstreams: running.map_or_else(Vec::new, |r| r.upstreams.borrow().to_vec()),
        }
    }
}

impl Running {
    fn start(desired: &Config, port: u16) -> anyhow::Result<Self> {
        let (zone, zones) = watch::channel(Arc::new(desired.zone.clone()));
        let (upstreams, upstream_lists) = watch::channel(Arc::from([]));
        let shared = Shared {
            zone: zones,
            forwarder: Arc::new(Forwarder::new(upstream_lists)),
        };
        let server = Server::bind(&desired.servers, port, &shared)?;
        Ok(Self {
            servers: desired.servers,
            zone,
            upstreams,
            server,
        })
    }

    fn set_upstreams(&self, list: Arc<[SocketAddr]>) {
        self.upstreams.send_if_modified(|current| {
            let changed = *current != list;
            *current = list;
            changed
        });
    }
}

fn setting(interface: &str, desired: &Config) -> Result<Setting, protocol::Refused> {
    let routing = desired.routing.iter();
    Ok(Setting {
        interface: protocol::Interface::parse(interface)?,
        domain: desired.domain.clone(),
        servers: desired.servers.to_vec(),
        routing: routing
            .map(|zone| protocol::ZoneName::parse(zone))
            .collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
mod tests;
