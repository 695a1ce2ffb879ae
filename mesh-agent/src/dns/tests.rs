//! The server and the forwarder over loopback, with an upstream whose manners a test chooses.
//!
//! The mesh here has the pool 127.0.0.0/8, so that a node's own address is one that every machine
//! has. The upstream is then no mesh address only because the tests give it to the server directly.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name as DnsName, RData, Record, RecordType};
use mesh_core::key::NodeKey;
use mesh_core::netmap::{Me, Netmap, NodePolicy};
use mesh_core::node::{Addresses, Epoch, Generation, MeshId, Name, NodeId};
use mesh_core::world::{Mesh, Pools};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn config(name: &str) -> Config {
    let netmap = Netmap {
        mesh: Mesh {
            id: MeshId([0; 16]),
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: "127.0.0.0/8".parse().unwrap(),
                v6: Pools::ula([1, 2, 3, 4, 5]),
            },
        },
        epoch: Epoch(0),
        generation: Generation(1),
        me: Me {
            id: NodeId(1),
            name: Name::parse(name).unwrap(),
            key: NodeKey::from_seed([7; 32]).public(),
            addresses: Addresses {
                v4: Ipv4Addr::LOCALHOST,
                v6: Ipv6Addr::LOCALHOST,
            },
            tags: Default::default(),
            user: None,
            expires: None,
            expired: false,
        },
        peers: Default::default(),
        policy: NodePolicy::default(),
    };
    Config::of(&netmap).unwrap()
}

fn serve(upstreams: &[SocketAddr]) -> Running {
    // The kernel chooses the port for UDP, and another test's TCP may hold it.
    let mut starts = (0..20).map(|_| Running::start(&config("web"), 0));
    let running = starts.find_map(Result::ok).unwrap();
    running.set_upstreams(upstreams.into());
    running
}

fn query(name: &str) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(
        DnsName::from_ascii(name).unwrap(),
        RecordType::A,
    ));
    message
}

async fn ask_udp(server: SocketAddr, query: &Message) -> Message {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await.unwrap();
    socket
        .send_to(&query.to_vec().unwrap(), server)
        .await
        .unwrap();
    let mut buffer = [0; 4096];
    let received = timeout(PATIENCE, socket.recv(&mut buffer)).await;
    Message::from_vec(&buffer[..received.unwrap().unwrap()]).unwrap()
}

async fn ask_tcp(server: SocketAddr, query: &Message) -> Message {
    let mut stream = TcpStream::connect(server).await.unwrap();
    write_framed(&mut stream, &query.to_vec().unwrap()).await;
    let bytes = timeout(PATIENCE, read_framed(&mut stream)).await.unwrap();
    Message::from_vec(&bytes).unwrap()
}

async fn write_framed(stream: &mut TcpStream, bytes: &[u8]) {
    let length = u16::try_from(bytes.len()).unwrap();
    stream.write_u16(length).await.unwrap();
    stream.write_all(bytes).await.unwrap();
}

async fn read_framed(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = vec![0; stream.read_u16().await.unwrap().into()];
    stream.read_exact(&mut bytes).await.unwrap();
    bytes
}

/// An upstream name server that answers every query with 192.0.2.1, after `manners` had its way
/// with the datagrams that go back.
struct Upstream {
    address: SocketAddr,
    asked: Arc<[AtomicUsize; 2]>,
    _tasks: JoinSet<()>,
}

/// The kernel chooses the port for UDP, and another socket's TCP may hold it.
async fn both_on_one_port() -> (UdpSocket, TcpListener) {
    for _ in 0..20 {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
            return (udp, tcp);
        }
    }
    panic!("of twenty ports that UDP had, TCP got none");
}

type Manners = fn(&Message) -> Vec<Vec<u8>>;

impl Upstream {
    async fn start(manners: Manners) -> Self {
        let (udp, tcp) = both_on_one_port().await;
        let address = udp.local_addr().unwrap();
        let asked: Arc<[AtomicUsize; 2]> = Arc::default();
        let mut tasks = JoinSet::new();
        let count = Arc::clone(&asked);
        tasks.spawn(async move {
            let mut buffer = [0; 4096];
            loop {
                let (length, source) = udp.recv_from(&mut buffer).await.unwrap();
                count[0].fetch_add(1, Ordering::Relaxed);
                let query = Message::from_vec(&buffer[..length]).unwrap();
                for datagram in manners(&query) {
                    udp.send_to(&datagram, source).await.unwrap();
                }
            }
        });
        let count = Arc::clone(&asked);
        tasks.spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                count[1].fetch_add(1, Ordering::Relaxed);
                let query = Message::from_vec(&read_framed(&mut stream).await).unwrap();
                write_framed(&mut stream, &answer(&query, 1)).await;
            }
        });
        Self {
            address,
            asked,
            _tasks: tasks,
        }
    }

    /// Times that it was asked by UDP and by TCP.
    fn asked(&self) -> [usize; 2] {
        [0, 1].map(|n| self.asked[n].load(Ordering::Relaxed))
    }
}

fn honest(query: &Message) -> Vec<Vec<u8>> {
    vec![answer(query, 1)]
}

fn answer(query: &Message, last: u8) -> Vec<u8> {
    let mut answer = query.clone().into_response();
    let data = RData::A(A(Ipv4Addr::new(192, 0, 2, last)));
    answer.add_answer(Record::from_rdata(query.queries[0].name.clone(), 60, data));
    answer.to_vec().unwrap()
}

fn assert_is_answer(reply: &Message, name: &str) {
    assert_eq!(reply.metadata.id, 0x1234);
    assert_eq!(reply.queries[0].name.to_ascii(), name);
    assert_eq!(reply.answers.len(), 1, "{reply}");
    assert_eq!(
        reply.answers[0].data,
        RData::A(A(Ipv4Addr::new(192, 0, 2, 1)))
    );
}

#[tokio::test]
async fn names_of_the_mesh_are_answered_on_both_addresses_by_udp_and_tcp() {
    let running = serve(&[]);
    let mesh = query("wEb.mesh.internal.");
    let short = query("web.");
    for server in running.server.addresses() {
        for query in [&mesh, &short] {
            for reply in [ask_udp(*server, query).await, ask_tcp(*server, query).await] {
                assert_eq!(reply.answers[0].data, RData::A(A(Ipv4Addr::LOCALHOST)));
            }
        }
    }
}

#[tokio::test]
async fn a_new_zone_answers_the_next_query() {
    let running = serve(&[]);
    let server = running.server.addresses()[0];
    running.zone.send_replace(Arc::new(config("renamed").zone));
    let old = ask_udp(server, &query("web.mesh.internal.")).await;
    assert_eq!(old.metadata.response_code, ResponseCode::NXDomain);
    let new = ask_udp(server, &query("renamed.mesh.internal.")).await;
    assert_eq!(new.answers.len(), 1);
}

#[tokio::test]
async fn other_names_are_asked_upstream_by_the_same_transport() {
    let upstream = Upstream::start(honest).await;
    let running = serve(&[upstream.address]);
    let server = running.server.addresses()[0];
    let name = "www.eXample.org.";
    assert_is_answer(&ask_udp(server, &query(name)).await, name);
    assert_eq!(upstream.asked(), [1, 0]);
    assert_is_answer(&ask_tcp(server, &query(name)).await, name);
    assert_eq!(upstream.asked(), [1, 1]);
}

#[tokio::test]
async fn a_forger_is_not_believed() {
    // Wrong number, wrong name, no DNS at all, and then the truth.
    let upstream = Upstream::start(|query| {
        let mut number = query.clone();
        number.metadata.id ^= 1;
        let mut name = query.clone();
        name.queries[0].name = DnsName::from_ascii("evil.example.").unwrap();
        vec![
            answer(&number, 66),
            answer(&name, 66),
            vec![0xff; 7],
            answer(query, 1),
        ]
    })
    .await;
    let running = serve(&[upstream.address]);
    let server = running.server.addresses()[0];
    let name = "www.example.org.";
    assert_is_answer(&ask_udp(server, &query(name)).await, name);
    assert_eq!(upstream.asked(), [1, 0]);
}

#[tokio::test]
async fn doubt_about_the_letters_or_many_strays_lead_to_tcp() {
    let lower: Manners = |query| {
        let mut lower = query.clone();
        lower.queries[0].name = lower.queries[0].name.to_lowercase();
        vec![answer(&lower, 66)]
    };
    let flood: Manners = |query| {
        let mut other = query.clone();
        other.metadata.id ^= 1;
        vec![answer(&other, 66); 40]
    };
    for manners in [lower, flood] {
        let upstream = Upstream::start(manners).await;
        let running = serve(&[upstream.address]);
        let server = running.server.addresses()[0];
        // Many letters, so that a random spelling is all but never the lower-case one.
        let name = "a-very-long-name-with-many-letters.example.org.";
        assert_is_answer(&ask_udp(server, &query(name)).await, name);
        assert_eq!(upstream.asked(), [1, 1]);
    }
}

#[tokio::test]
async fn the_next_upstream_is_asked_when_one_is_dead_or_unwilling() {
    let dead = {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.local_addr().unwrap()
    };
    let unwilling = Upstream::start(|query| {
        let mut refusal = query.clone().into_response();
        refusal.metadata.response_code = ResponseCode::Refused;
        vec![refusal.to_vec().unwrap()]
    })
    .await;
    let good = Upstream::start(honest).await;
    let running = serve(&[dead, unwilling.address, good.address]);
    let server = running.server.addresses()[0];
    let name = "www.example.org.";
    assert_is_answer(&ask_udp(server, &query(name)).await, name);
    // The good one is remembered.
    assert_is_answer(&ask_udp(server, &query(name)).await, name);
    assert_eq!((unwilling.asked()[0], good.asked()[0]), (1, 2));

    running.set_upstreams([unwilling.address].into());
    let reply = ask_udp(server, &query(name)).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn without_upstreams_a_query_fails_at_once() {
    let running = serve(&[]);
    let reply = ask_udp(running.server.addresses()[0], &query("example.org.")).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(reply.metadata.id, 0x1234);
}

#[tokio::test]
async fn a_loop_ends_by_itself() {
    // The server is its own upstream, as it is when the host's former resolver now asks us.
    let running = serve(&[]);
    let server = running.server.addresses()[0];
    running.set_upstreams([server].into());
    let reply = ask_udp(server, &query("example.org.")).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
}

#[test]
fn what_belongs_to_the_mesh_is_no_upstream() {
    let zone = config("web").zone;
    let list = [
        "127.0.0.53:53",
        "[::ffff:127.0.0.1]:53",
        "[::1]:53",
        "[fd01:203:405::9]:53",
        "0.0.0.0:53",
        "192.0.2.1:53",
        "[fe80::1%3]:53",
    ];
    let servers = list.iter().map(|text| text.parse().unwrap());
    let usable = usable_upstreams(servers, |address| zone.is_mesh(address));
    let usable: Vec<String> = usable.iter().map(SocketAddr::to_string).collect();
    assert_eq!(usable, ["192.0.2.1:53", "[fe80::1%3]:53"]);
}

#[tokio::test]
async fn garbage_gets_an_error_or_silence_and_the_next_query_its_answer() {
    let running = serve(&[]);
    let server = running.server.addresses()[0];
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for garbage in [&[][..], &[0; 5], &[0xff; 600], &[0x55; 12], &[0; 5000]] {
        socket.send_to(garbage, server).await.unwrap();
    }
    // One frame of nothing, one longer than any query, one that ends early.
    for frame in [&[0, 0][..], &[0xff, 0xff, 1], &[0, 40, 1, 2]] {
        let mut stream = TcpStream::connect(server).await.unwrap();
        stream.write_all(frame).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        let _ = timeout(PATIENCE, stream.read_to_end(&mut rest))
            .await
            .unwrap();
        assert!(rest.is_empty());
    }
    let reply = ask_udp(server, &query("web.mesh.internal.")).await;
    assert_eq!(reply.answers.len(), 1);
}
