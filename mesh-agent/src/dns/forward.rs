//! Asks the servers that the host had before us.
//!
//! The message goes on as it came, but for what makes an answer hard to forge
//! ([`mesh_core::dns::forward`]): we have no cache to poison and no records to misread. What is
//! hard is not to go round in circles: an upstream may be a resolver that asks us again. Mesh
//! addresses are never upstreams, and one question is only so often under way at a time.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_core::dns::forward::{self, Outgoing, Rejected};
use mesh_core::dns::wire::{self, Transport};
use rand_core::{OsRng, RngCore as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, trace};

/// Queries under way at a time, all together.
const MAX_IN_FLIGHT: usize = 256;

/// The same question under way at a time. Several programs may well ask one thing at once; a loop
/// asks it for ever, and stops here.
const MAX_SAME_QUESTION: usize = 8;

/// How long one upstream may take before the next is asked. Resolver libraries give up after five
/// seconds (resolv.conf(5), `timeout`), so two tries fit.
const UDP_PATIENCE: Duration = Duration::from_secs(2);
const TCP_PATIENCE: Duration = Duration::from_secs(4);

/// How long a query may be under way in all.
const PATIENCE: Duration = Duration::from_secs(5);

/// Datagrams that are no answer to us, before we take the exchange to TCP, where a forger who
/// cannot see our packets has to guess a sequence number as well.
const MAX_STRAYS: usize = 16;

/// Asks upstream. The list of upstreams is swapped whole.
#[derive(Debug)]
pub struct Forwarder {
    upstreams: watch::Receiver<Arc<[SocketAddr]>>,
    /// Where the last good answer came from: a dead first server costs one query, not each.
    preferred: AtomicUsize,
    in_flight: Arc<InFlight>,
}

#[derive(Debug, Default)]
struct InFlight {
    /// Lower-cased questions, and how often each is under way.
    questions: Mutex<BTreeMap<Vec<u8>, usize>>,
}

/// The right to ask one question. Dropping it makes room for the next.
#[derive(Debug)]
pub struct Permit {
    in_flight: Arc<InFlight>,
    question: Vec<u8>,
}

impl Forwarder {
    pub fn new(upstreams: watch::Receiver<Arc<[SocketAddr]>>) -> Self {
        Self {
            upstreams,
            preferred: AtomicUsize::new(0),
            in_flight: Arc::default(),
        }
    }

    /// `None` when too much is under way, or too much of the same.
    pub fn admit(&self, query: &[u8]) -> Option<Permit> {
        let question = forward::question(query)?.to_ascii_lowercase();
        let mut questions = self.in_flight.lock();
        if questions.values().sum::<usize>() >= MAX_IN_FLIGHT {
            return None;
        }
        let same = questions.entry(question.clone()).or_default();
        if *same >= MAX_SAME_QUESTION {
            return None;
        }
        *same += 1;
        drop(questions);
        Some(Permit {
            in_flight: Arc::clone(&self.in_flight),
            question,
        })
    }

    /// The answer to send back: an upstream's, or a server failure. `None` for what is no query.
    pub async fn ask(
        &self,
        permit: Permit,
        query: &[u8],
        transport: Transport,
        limit: u16,
    ) -> Option<Vec<u8>> {
        let upstreams = Arc::clone(&self.upstreams.borrow());
        let answer = timeout(
            PATIENCE,
            self.ask_in_turn(&upstreams, query, transport, limit),
        );
        let answer = answer.await.ok().flatten();
        drop(permit);
        answer.or_else(|| wire::server_failure(query))
    }

    async fn ask_in_turn(
        &self,
        upstreams: &[SocketAddr],
        query: &[u8],
        transport: Transport,
        limit: u16,
    ) -> Option<Vec<u8>> {
        let first = self.preferred.load(Ordering::Relaxed);
        let mut unwilling = None;
        for turn in 0..upstreams.len() {
            let at = (first + turn) % upstreams.len();
            let upstream = upstreams[at];
            match exchange(upstream, query, transport, limit).await {
                Ok(answer) if is_unwilling(&answer) => unwilling = Some(answer),
                Ok(answer) => {
                    self.preferred.store(at, Ordering::Relaxed);
                    return Some(answer);
                }
                Err(error) => debug!(%upstream, %error, "ask an upstream name server"),
            }
        }
        unwilling
    }
}

impl InFlight {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Vec<u8>, usize>> {
        // A panic elsewhere leaves a count too high at worst.
        self.questions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut questions = self.in_flight.lock();
        match questions.get_mut(&self.question) {
            Some(same) if *same > 1 => *same -= 1,
            _ => {
                questions.remove(&self.question);
            }
        }
    }
}

/// Which of the servers that a host had may be asked: none that is part of the mesh, or nowhere.
pub fn usable_upstreams(
    servers: impl IntoIterator<Item = SocketAddr>,
    is_mesh: impl Fn(IpAddr) -> bool,
) -> Arc<[SocketAddr]> {
    let usable = |server: &SocketAddr| {
        let address = server.ip().to_canonical();
        !address.is_unspecified() && !address.is_multicast() && !is_mesh(address)
    };
    servers.into_iter().filter(usable).collect()
}

/// SERVFAIL, NOTIMP, REFUSED: another server may be of more help, as glibc's resolver has it.
fn is_unwilling(answer: &[u8]) -> bool {
    answer
        .get(3)
        .is_some_and(|b| [2, 4, 5].contains(&(b & 0x0f)))
}

async fn exchange(
    upstream: SocketAddr,
    query: &[u8],
    transport: Transport,
    limit: u16,
) -> io::Result<Vec<u8>> {
    let mut randomness = [0; 34];
    OsRng.fill_bytes(&mut randomness);
    let [a, b, cases @ ..] = randomness;
    let outgoing = Outgoing::new(query, u16::from_be_bytes([a, b]), cases)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    if transport == Transport::Udp {
        match timeout(UDP_PATIENCE, exchange_udp(upstream, &outgoing, limit)).await? {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => trace!(%upstream, "take a doubtful exchange to TCP"),
            Err(error) => return Err(error),
        }
    }
    timeout(TCP_PATIENCE, exchange_tcp(upstream, &outgoing, limit)).await?
}

/// `None` when what came back may be forged and TCP should decide.
async fn exchange_udp(
    upstream: SocketAddr,
    outgoing: &Outgoing,
    limit: u16,
) -> io::Result<Option<Vec<u8>>> {
    let any: IpAddr = match upstream {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // A fresh socket for each query: the kernel picks its port at random, and once connected it
    // lets in nothing but datagrams of the upstream.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(outgoing.bytes()).await?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    for _ in 0..MAX_STRAYS {
        let length = socket.recv(&mut buffer).await?;
        match outgoing.accept(&buffer[..length], limit) {
            Ok(answer) => return Ok(Some(answer)),
            Err(Rejected::OtherCase) => return Ok(None),
            Err(Rejected::Malformed | Rejected::NotOurs) => {}
        }
    }
    Ok(None)
}

async fn exchange_tcp(
    upstream: SocketAddr,
    outgoing: &Outgoing,
    limit: u16,
) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream).await?;
    let length = u16::try_from(outgoing.bytes().len()).map_err(io::Error::other)?;
    let framed = [&length.to_be_bytes()[..], outgoing.bytes()].concat();
    stream.write_all(&framed).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    outgoing
        .accept_any_case(&answer, limit)
        .map_err(io::Error::other)
}
