//! The server on this node's own mesh addresses, UDP and TCP.
//!
//! Built on hickory-proto over sockets of our own, not on hickory-server: that one spawns a task
//! for every datagram without a bound, reserves room for as many questions as a header claims,
//! and logs each name that is looked up at INFO. Here every resource is counted: forwarded
//! queries by [`Forwarder`], connections below, and a query that needs no upstream costs no task.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use mesh_core::dns::wire::{MAX_QUERY, Outcome, Transport};
use mesh_core::dns::{Zone, wire};
use rustix::net::{AddressFamily, SocketType, sockopt};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{Instrument as _, debug, debug_span, warn};

use super::forward::Forwarder;

/// Connections at a time. A host's resolver library opens one when an answer was cut, and closes
/// it; this many at once are a fault or an attack.
const MAX_CONNECTIONS: usize = 64;

/// How long a connection may say nothing (RFC 7766, section 6.2.3 asks for seconds, not minutes).
const IDLE: Duration = Duration::from_secs(10);

/// Pause after a failed accept: out of descriptors, most likely, and spinning makes none.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What every socket of the server answers from.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The zone is swapped whole; each query is answered from one netmap.
    pub zone: watch::Receiver<Arc<Zone>>,
    pub forwarder: Arc<Forwarder>,
}

/// A running server. Dropping it closes its sockets.
#[derive(Debug)]
pub struct Server {
    addresses: Vec<SocketAddr>,
    _tasks: JoinSet<()>,
}

impl Server {
    /// Binds UDP and TCP on every address. The addresses need not be there yet: they are the mesh
    /// device's, which other actuators set up in their own time.
    ///
    /// # Errors
    /// An address is in use, or the port is privileged and CAP_NET_BIND_SERVICE is missing.
    pub fn bind(addresses: &[IpAddr], port: u16, shared: &Shared) -> anyhow::Result<Self> {
        let mut tasks = JoinSet::new();
        let mut bound = Vec::new();
        for address in addresses {
            let wanted = SocketAddr::new(*address, port);
            let context = || format!("listen for DNS on {wanted}");
            let udp = bind_udp(wanted).with_context(context)?;
            let local = udp.local_addr().with_context(context)?;
            let tcp = bind_tcp(local).with_context(context)?;
            let span = debug_span!("dns", %local);
            tasks.spawn(serve_udp(udp, shared.clone()).instrument(span.clone()));
            tasks.spawn(serve_tcp(tcp, shared.clone()).instrument(span));
            bound.push(local);
        }
        Ok(Self {
            addresses: bound,
            _tasks: tasks,
        })
    }

    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }
}

fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = bound_socket(address, SocketType::DGRAM)?;
    UdpSocket::from_std(socket.into())
}

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = bound_socket(address, SocketType::STREAM)?;
    rustix::net::listen(&socket, 64)?;
    TcpListener::from_std(socket.into())
}

fn bound_socket(address: SocketAddr, kind: SocketType) -> io::Result<std::os::fd::OwnedFd> {
    use rustix::net::SocketFlags;

    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    // Bind before the address exists (ip(7), IP_FREEBIND).
    match address {
        SocketAddr::V4(_) => sockopt::set_ip_freebind(&socket, true)?,
        SocketAddr::V6(_) => sockopt::set_ipv6_freebind(&socket, true)?,
    }
    if kind == SocketType::STREAM {
        // Else a restarted agent waits a minute for its own old connections.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

// === UDP ===

async fn serve_udp(socket: UdpSocket, shared: Shared) {
    let socket = Arc::new(socket);
    let mut forwards = JoinSet::new();
    // One octet more than the longest query, so that a longer one is seen to be longer.
    let mut buffer = vec![0; MAX_QUERY + 1];
    loop {
        while forwards.try_join_next().is_some() {}
        let (length, source) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // An ICMP error about an earlier answer; the socket itself stays well.
                debug!(%error, "receive a query");
                continue;
            }
        };
        let query = &buffer[..length];
        match decide(&shared, source, Transport::Udp, query) {
            Outcome::Drop => {}
            Outcome::Reply(reply) => send(&socket, &reply, source).await,
            Outcome::Forward { limit } => {
                let Some(permit) = shared.forwarder.admit(query) else {
                    if let Some(reply) = wire::server_failure(query) {
                        send(&socket, &reply, source).await;
                    }
                    continue;
                };
                let query = query.to_vec();
                let socket = Arc::clone(&socket);
                let forwarder = Arc::clone(&shared.forwarder);
                let task = async move {
                    let reply = forwarder.ask(permit, &query, Transport::Udp, limit).await;
                    if let Some(reply) = reply {
                        send(&socket, &reply, source).await;
                    }
                };
                forwards.spawn(task.in_current_span());
            }
        }
    }
}

async fn send(socket: &UdpSocket, reply: &[u8], to: SocketAddr) {
    if let Err(error) = socket.send_to(reply, to).await {
        debug!(%error, "send an answer");
    }
}

// === TCP ===

async fn serve_tcp(listener: TcpListener, shared: Shared) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, source) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "accept a DNS connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            debug!("refuse a DNS connection: too many are open");
            continue;
        };
        let shared = shared.clone();
        let task = async move {
            if let Err(error) = serve_connection(stream, source, &shared).await {
                debug!(%error, "end a DNS connection");
            }
            drop(permit);
        };
        connections.spawn(task.in_current_span());
    }
}

/// One query after another, each with its length in front (RFC 1035, section 4.2.2).
async fn serve_connection(
    mut stream: TcpStream,
    source: SocketAddr,
    shared: &Shared,
) -> io::Result<()> {
    loop {
        let length = match timeout(IDLE, stream.read_u16()).await? {
            Ok(length) => usize::from(length),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        if !(wire::HEADER..=MAX_QUERY).contains(&length) {
            return Err(io::Error::other("a query of impossible length"));
        }
        let mut query = vec![0; length];
        timeout(IDLE, stream.read_exact(&mut query)).await??;
        let reply = match decide(shared, source, Transport::Tcp, &query) {
            Outcome::Drop => None,
            Outcome::Reply(reply) => Some(reply),
            Outcome::Forward { limit } => match shared.forwarder.admit(&query) {
                Some(permit) => {
                    let asked = shared.forwarder.ask(permit, &query, Transport::Tcp, limit);
                    asked.await
                }
                None => wire::server_failure(&query),
            },
        };
        let Some(reply) = reply else {
            return Ok(());
        };
        let length = u16::try_from(reply.len()).map_err(io::Error::other)?;
        let framed = [&length.to_be_bytes()[..], &reply].concat();
        timeout(IDLE, stream.write_all(&framed)).await??;
    }
}

fn decide(shared: &Shared, source: SocketAddr, transport: Transport, query: &[u8]) -> Outcome {
    // Nothing can answer to port 0 (RFC 6335, section 6).
    if source.port() == 0 {
        return Outcome::Drop;
    }
    let zone = Arc::clone(&shared.zone.borrow());
    zone.respond(zone.asker(source.ip()), transport, query)
}
