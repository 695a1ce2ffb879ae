//! The nodes' listener: TCP, then TLS with raw public keys, then HTTP/2.
//!
//! Everything up to a finished handshake is work for strangers, so it is bounded in number, per
//! source and in time, and no failure of it, the kernel's own "too many files" included, may stop
//! the loop. A key that belongs to no node gets a minute to enrol.

use std::collections::BTreeMap;
use std::future::Future as _;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use mesh_api::channel;
use mesh_core::key::{MachinePublic, NodeKey};
use rand_core::{OsRng, RngCore as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::api::caller::Caller;
use crate::metrics::Metrics;
use crate::world::Handle;

/// Channels at a time: every node of a large mesh, and some who are just coming back.
const CONNECTIONS: usize = 16_384;
/// Handshakes at a time, and of them from one source (an IPv4 address or an IPv6 /64).
const HANDSHAKES: usize = 2048;
const HANDSHAKES_PER_SOURCE: usize = 512;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a key that belongs to no node may stay.
const STRANGER: Duration = Duration::from_secs(60);
/// Wait after a failed accept: file descriptors do not come back any faster.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the accept loop needs.
#[derive(Clone)]
pub struct Listener {
    pub tls: TlsAcceptor,
    pub world: Handle,
    pub metrics: Arc<Metrics>,
    pub shutdown: CancellationToken,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").finish_non_exhaustive()
    }
}

impl Listener {
    /// Accepts until shut down; channels that are through their handshake go to `ready`.
    pub async fn run(self, tcp: TcpListener, ready: mpsc::Sender<io::Result<Channel>>) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        let sources = Sources::default();
        loop {
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => return,
                accepted = tcp.accept() => accepted,
            };
            let (stream, remote) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // One line in a hundred: a lack of descriptors repeats itself.
                    if self.metrics.accept_errors.value().is_multiple_of(100) {
                        warn!(%error, "accept a connection");
                    }
                    self.metrics.accept_errors.add(1);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let permits = (
                connections.clone().try_acquire_owned(),
                handshakes.clone().try_acquire_owned(),
                sources.enter(remote.ip()),
            );
            let (Ok(connection), Ok(handshake), Some(source)) = permits else {
                // Dropped without a word: whoever waits will come again.
                self.metrics.connections_refused.add(1);
                continue;
            };
            let (listener, ready) = (self.clone(), ready.clone());
            tokio::spawn(async move {
                let channel = listener.handshake(stream, remote, connection).await;
                drop((handshake, source));
                match channel {
                    Ok(channel) => {
                        listener.metrics.connections.add(1);
                        drop(ready.send(Ok(channel)).await);
                    }
                    Err(error) => {
                        listener.metrics.handshakes_failed.add(1);
                        debug!(%remote, %error, "handshake failed");
                    }
                }
            });
        }
    }

    async fn handshake(
        &self,
        stream: TcpStream,
        remote: SocketAddr,
        permit: OwnedSemaphorePermit,
    ) -> io::Result<Channel> {
        stream.set_nodelay(true)?;
        let accepted = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.tls.accept(stream)).await;
        let stream = accepted.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let connection = stream.get_ref().1;
        if connection.alpn_protocol() != Some(channel::ALPN) {
            return Err(io::Error::other("the client does not speak mesh/1"));
        }
        let machine = channel::peer_key(connection).map_err(io::Error::other)?;
        let exporter = channel::exporter(connection).map_err(io::Error::other)?;
        let mut seed = [0; 32];
        OsRng.fill_bytes(&mut seed);
        let caller = Caller {
            machine,
            remote,
            exporter,
            challenge: Arc::new(NodeKey::from_seed(seed)),
            enrolments: Arc::default(),
        };
        Ok(Channel {
            stream,
            caller,
            world: self.world.clone(),
            stranger: Box::pin(tokio::time::sleep(STRANGER)),
            _permit: permit,
        })
    }
}

/// How many handshakes each source has under way.
#[derive(Debug, Default, Clone)]
struct Sources(Arc<Mutex<BTreeMap<IpAddr, usize>>>);

#[derive(Debug)]
struct Entered {
    sources: Sources,
    source: IpAddr,
}

impl Sources {
    fn enter(&self, address: IpAddr) -> Option<Entered> {
        let source = match address.to_canonical() {
            IpAddr::V6(v6) => {
                let [a, b, c, d, ..] = v6.segments();
                IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
            }
            v4 => v4,
        };
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = sources.entry(source).or_default();
        if *count >= HANDSHAKES_PER_SOURCE {
            return None;
        }
        *count += 1;
        drop(sources);
        Some(Entered {
            sources: self.clone(),
            source,
        })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut sources = self
            .sources
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

/// A channel that is through its handshake.
#[derive(Debug)]
pub struct Channel {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    world: Handle,
    /// When to ask again whether the key belongs to a node.
    stranger: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl Channel {
    fn is_node(&self, machine: &MachinePublic) -> bool {
        self.world.current().node_of(machine).is_some()
    }
}

impl Connected for Channel {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Channel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.stranger.as_mut().poll(context).is_ready() {
            if !self.is_node(&self.caller.machine) {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.stranger.as_mut().reset(Instant::now() + STRANGER);
        }
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Channel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
