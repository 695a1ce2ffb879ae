//! Who reaches whom, by which protocol: asked with real packets, all at once.
//!
//! A probe asks again until it is answered or time is up, because a first packet may wait for a
//! WireGuard handshake; so a denied pair costs the whole limit, and all pairs are asked in
//! parallel. Sockets are made in the host's network by a thread that entered it.

mod echo;
mod icmp;
mod stream;

pub use echo::Echo;
pub use stream::{Report, Stream};

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::Host;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Echo request and reply.
    Icmp,
    /// A connection to this port.
    Tcp(u16),
    /// A datagram to this port, and its echo.
    Udp(u16),
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Icmp => write!(f, "icmp"),
            Self::Tcp(port) => write!(f, "tcp/{port}"),
            Self::Udp(port) => write!(f, "udp/{port}"),
        }
    }
}

/// One question: does `from` reach `to`?
#[derive(Debug, Clone, Copy)]
pub struct Probe<'a> {
    pub from: &'a Host,
    pub to: IpAddr,
    pub kind: Kind,
}

impl Probe<'_> {
    /// The time to the first answer; `None` when there was none within the limit.
    pub fn ask(&self, limit: Duration) -> Result<Option<Duration>> {
        self.from
            .inside(|| ask(self.to, self.kind, limit))?
            .with_context(|| {
                format!(
                    "probe {} over {} from {}",
                    self.to,
                    self.kind,
                    self.from.name()
                )
            })
    }
}

/// Answers in the order of the questions. Takes little longer than the limit, however many.
pub fn ask_all(probes: &[Probe<'_>], limit: Duration) -> Result<Vec<Option<Duration>>> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = probes
            .iter()
            .map(|probe| scope.spawn(move || probe.ask(limit)))
            .collect();
        asked
            .into_iter()
            .map(|answer| {
                answer
                    .join()
                    .map_err(|_| anyhow::anyhow!("a probe panicked"))?
            })
            .collect()
    })
}

fn ask(to: IpAddr, kind: Kind, limit: Duration) -> Result<Option<Duration>> {
    let begun = Instant::now();
    let deadline = begun + limit;
    let answered = match kind {
        Kind::Icmp => {
            let Some(socket) = open(deadline, || icmp::Socket::to(to)) else {
                return Ok(None);
            };
            (0..)
                .take_while(|_| Instant::now() < deadline)
                .any(|number| {
                    socket.send(number);
                    socket.receive(RETRY).is_some()
                })
        }
        Kind::Udp(port) => {
            let Some(socket) = open(deadline, || udp(to, port)) else {
                return Ok(None);
            };
            let mut answer = [0; 4];
            (0_u32..)
                .take_while(|_| Instant::now() < deadline)
                .any(|number| {
                    // What cannot be sent is as good as lost.
                    let _ = socket.send(&number.to_be_bytes());
                    socket.recv(&mut answer).is_ok()
                })
        }
        Kind::Tcp(port) => {
            let to = SocketAddr::new(to, port);
            // The kernel repeats a lost SYN after a second only; a new attempt is quicker.
            std::iter::from_fn(|| (Instant::now() < deadline).then_some(())).any(|()| {
                let connected = TcpStream::connect_timeout(&to, RETRY);
                if connected.is_err() {
                    std::thread::sleep(PAUSE);
                }
                connected.is_ok()
            })
        }
    };
    Ok(answered.then(|| begun.elapsed()))
}

/// A socket, as soon as there is a way to its other end.
fn open<T>(deadline: Instant, make: impl Fn() -> Result<T>) -> Option<T> {
    loop {
        match make() {
            Ok(socket) => return Some(socket),
            Err(_) if Instant::now() >= deadline => return None,
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

const PAUSE: Duration = Duration::from_millis(20);

/// A probe asks so often.
const RETRY: Duration = Duration::from_millis(200);

fn udp(to: IpAddr, port: u16) -> Result<UdpSocket> {
    let any: IpAddr = match to {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).context("make a socket")?;
    socket
        .set_read_timeout(Some(RETRY))
        .context("limit waiting")?;
    socket
        .connect((to, port))
        .with_context(|| format!("find a way to {to}"))?;
    Ok(socket)
}
