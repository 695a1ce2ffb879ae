//! WireGuard in process: boringtun's tunnels between a TUN device and a UDP socket.
//!
//! Three threads, each with buffers of its own and nothing allocated per packet: `outbound` reads
//! the TUN device and encrypts, `inbound` reads the socket and decrypts, `timers` wakes four times
//! a second. A transfer keeps the first two busy, one core each; a peer's tunnel is behind a lock
//! that they rarely meet at. What they share is a snapshot of the peers, replaced whole.
//!
//! boringtun checks that an inner packet's source is in the sender's own list. That list may hold a
//! wider prefix than another peer's address, so a packet is delivered only if the *device-wide*
//! longest match of its source is the sender.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use mesh_core::key::NodeKey;
use mesh_core::wireguard::{DeviceOp, DeviceStatus, PeerStatus};
use rustix::event::{EventfdFlags, eventfd};
use tracing::{debug, info_span, warn};

use super::tun::Tun;
use super::{Filter, Interface, OpenOptions};
use peer::Identity;
use socket::Socket;
use table::{Peers, Table};

mod clock;
mod inbound;
mod offload;
mod outbound;
mod peer;
mod socket;
mod table;
mod timers;
mod uapi;

pub use uapi::is_uapi_request;

/// A running device. Dropping it ends its threads and removes the interface.
pub struct Device {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    tun: Tun,
    /// The longest inner packet that padding may make.
    mtu: usize,
    filter: Option<Filter>,
    /// The writer's side; whoever holds it may publish.
    config: Mutex<Config>,
    /// The readers' side.
    table: RwLock<Arc<Table>>,
    socket: RwLock<Arc<Socket>>,
    identity: RwLock<Option<Arc<inbound::Gate>>>,
    stop: AtomicBool,
    /// Wakes threads out of their waiting, indexed by [`Waker`].
    wake: [OwnedFd; 3],
}

#[derive(Default)]
struct Config {
    key: Option<NodeKey>,
    fwmark: u32,
    peers: Peers,
}

/// Milliseconds that the threads are given to let go of a socket.
const SOCKET_PATIENCE: u32 = 500;

/// Which thread an eventfd wakes.
#[derive(Clone, Copy)]
enum Waker {
    Inbound = 0,
    Outbound = 1,
    Uapi = 2,
}

impl Device {
    /// Creates the interface, down, and starts the threads. There is no key yet: nothing passes.
    pub fn open(options: &OpenOptions) -> anyhow::Result<Self> {
        let tun = Tun::create(&options.name)?;
        let socket = Socket::bind(0, options.fwmark)?;
        let eventfd = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            tun,
            mtu: options.mtu as usize,
            filter: options.filter.clone(),
            config: Mutex::new(Config {
                fwmark: options.fwmark,
                ..Config::default()
            }),
            table: RwLock::default(),
            socket: RwLock::new(Arc::new(socket)),
            identity: RwLock::default(),
            stop: AtomicBool::new(false),
            wake: [eventfd()?, eventfd()?, eventfd()?],
        });
        let mut device = Self {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
        };
        device.spawn("wg-out", outbound::run)?;
        device.spawn("wg-in", inbound::run)?;
        device.spawn("wg-timer", timers::run)?;
        if let Some(dir) = &options.uapi_dir {
            match uapi::Listener::bind(dir, &options.name) {
                Ok(listener) => device.spawn("wg-uapi", move |shared| listener.run(shared))?,
                // Only `wg show` misses it.
                Err(error) => warn!(error = format!("{error:#}"), "no socket for the wg command"),
            }
        }
        Ok(device)
    }

    fn spawn(
        &mut self,
        name: &'static str,
        run: impl FnOnce(&Shared) + Send + 'static,
    ) -> anyhow::Result<()> {
        let shared = Arc::clone(&self.shared);
        let span = info_span!("wireguard", thread = name);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || span.in_scope(|| run(&shared)))
            .with_context(|| format!("start the thread {name}"))?;
        self.threads.push(thread);
        Ok(())
    }

    pub fn interface(&self) -> &Interface {
        self.shared.tun.interface()
    }

    pub fn status(&self) -> DeviceStatus {
        self.shared.status()
    }

    pub fn apply(&self, ops: &[DeviceOp]) -> anyhow::Result<()> {
        self.shared.apply(ops)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for waker in [Waker::Inbound, Waker::Outbound, Waker::Uapi] {
            self.shared.wake(waker);
        }
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A thread that panicked has said so already.
            drop(thread.join());
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("userspace::Device")
            .field(self.interface())
            .finish()
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn wake(&self, which: Waker) {
        // Full means that a wake is pending already.
        let _ = rustix::io::write(&self.wake[which as usize], &1_u64.to_ne_bytes());
    }

    /// Waits until `fd` can be read, or somebody calls [`Shared::wake`].
    fn wait(&self, which: Waker, fd: impl std::os::fd::AsFd) {
        use rustix::event::{PollFd, PollFlags, poll};
        let wake = &self.wake[which as usize];
        let mut fds = [
            PollFd::new(&fd, PollFlags::IN),
            PollFd::new(wake, PollFlags::IN),
        ];
        // An interrupted wait is a short one.
        let _ = poll(&mut fds, None);
        if fds[1].revents().contains(PollFlags::IN) {
            let _ = rustix::io::read(wake, &mut [0; 8]);
        }
    }

    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn socket(&self) -> Arc<Socket> {
        Arc::clone(&self.socket.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn gate(&self) -> Option<Arc<inbound::Gate>> {
        self.identity
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, ops: &[DeviceOp]) -> anyhow::Result<()> {
        let mut config = self.config();
        let result = ops.iter().try_for_each(|op| {
            self.apply_one(&mut config, op)
                .with_context(|| describe(op))
        });
        // Also after an error: what was taken stands.
        self.publish(&config);
        result
    }

    fn publish(&self, config: &Config) {
        let table = Arc::new(config.peers.table());
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table;
    }

    fn apply_one(&self, config: &mut Config, op: &DeviceOp) -> anyhow::Result<()> {
        match op {
            DeviceOp::SetKey(key) => {
                let identity = Identity::new(*key.expose());
                config.peers.remove(&key.public());
                for peer in config.peers.iter() {
                    if let Some(session) = peer.lock().as_mut() {
                        session.restart(&identity)?;
                    }
                }
                config.key = Some(key.clone());
                let gate = Arc::new(inbound::Gate::new(identity));
                *self
                    .identity
                    .write()
                    .unwrap_or_else(PoisonError::into_inner) = Some(gate);
            }
            DeviceOp::SetListenPort(port) => {
                self.replace_socket(Socket::bind(*port, config.fwmark)?);
            }
            DeviceOp::SetFwmark(mark) => {
                self.socket().set_fwmark(*mark)?;
                config.fwmark = *mark;
            }
            DeviceOp::AddPeer(key, _)
                if config.key.as_ref().is_some_and(|k| k.public() == *key) =>
            {
                anyhow::bail!("the device cannot be its own peer");
            }
            op => {
                let gate = self.gate().context("the device has no key yet")?;
                config.peers.apply(op, gate.identity())?;
            }
        }
        Ok(())
    }

    /// Returns when the old socket's port is free again, or at least will be any moment.
    fn replace_socket(&self, new: Socket) {
        let mut current = self.socket.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, Arc::new(new));
        drop(current);
        self.wake(Waker::Inbound);
        self.wake(Waker::Outbound);
        for _ in 0..SOCKET_PATIENCE {
            if Arc::strong_count(&old) == 1 {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        debug!("the old socket is still in use");
    }

    fn status(&self) -> DeviceStatus {
        let config = self.config();
        let mut allowed = config.peers.allowed_ips();
        let mut peers = BTreeMap::new();
        for peer in config.peers.iter() {
            let Some(status) = peer.lock().as_ref().map(|session| PeerStatus {
                endpoint: session.endpoint.map(|endpoint| endpoint.to),
                written_endpoint: session.written_endpoint,
                allowed_ips: allowed.remove(&peer.key).unwrap_or_default(),
                keepalive: session.keepalive(),
                handshake_age: session.handshake_age(),
                rx_bytes: session.rx_bytes,
                tx_bytes: session.tx_bytes,
            }) else {
                continue;
            };
            peers.insert(peer.key, status);
        }
        DeviceStatus {
            key: config.key.as_ref().map(NodeKey::public),
            listen_port: self.socket().port,
            fwmark: config.fwmark,
            peers,
        }
    }
}

/// A step in words, for errors. Keys of peers are public, ours is not printed.
pub(super) fn describe(op: &DeviceOp) -> String {
    match op {
        DeviceOp::SetKey(_) => "set the private key".to_owned(),
        DeviceOp::SetListenPort(port) => format!("listen on UDP port {port}"),
        DeviceOp::SetFwmark(mark) => format!("set fwmark {mark:#x}"),
        DeviceOp::RemovePeer(key) => format!("remove peer {key}"),
        DeviceOp::AddPeer(key, _) => format!("add peer {key}"),
        DeviceOp::SetEndpoint(key, endpoint) => format!("set endpoint {endpoint} of peer {key}"),
        DeviceOp::SetKeepalive(key, _) => format!("set keepalive of peer {key}"),
        DeviceOp::AddAllowedIps(key, _) => format!("add allowed IPs of peer {key}"),
        DeviceOp::ReplaceAllowedIps(key, _) => format!("set allowed IPs of peer {key}"),
    }
}
