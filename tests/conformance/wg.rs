//! Devices of the backend under test, each on a host of its own.
//!
//! ```text
//!      a               b               c
//!    mesh0           mesh0           mesh0       100.64.0.N, fd00:64::N
//!     eth0            eth0            eth0       198.51.100.N, 2001:db8:51::N
//!      └────────────── underlay ───────┘
//! ```
//! A device is made by a thread that entered its host's network; its sockets belong there, and the
//! test holds it like any value.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::OnceLock;
use std::time::Duration;

use ipnet::IpNet;
use mesh_agent::net::Net;
use mesh_agent::wg::{Backend, Choice, Filter, OpenOptions};
use mesh_core::key::{NodeKey, NodePublic};
use mesh_core::routes::{self, FWMARK, TABLE};
use mesh_core::wireguard::{DeviceConfig, DeviceStatus, PeerConfig, PeerStatus, reconcile};
use mesh_tests::probe::{Kind, Probe};
use mesh_tests::{Host, Lab};
use tokio::runtime::Runtime;

mod allowed;
mod garbage;
mod interop;
mod many;
mod privileges;
mod reach;
mod roaming;
mod routing;
mod tool;

const INTERFACE: &str = "mesh0";
const PORT: u16 = 51820;
/// For what must happen: a handshake that is lost is repeated after five seconds.
const SOON: Duration = Duration::from_secs(12);
/// For what must not happen: several times what an answer takes here.
const NEVER: Duration = Duration::from_millis(1200);

fn choice() -> Choice {
    match std::env::var("MESH_BACKEND").as_deref() {
        Ok("kernel") => Choice::Kernel,
        Ok("userspace") | Err(_) => Choice::Userspace,
        Ok(other) => panic!("MESH_BACKEND is kernel or userspace, not {other}"),
    }
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::new().unwrap())
}

fn lab() -> Lab {
    Lab::new(&std::env::temp_dir()).unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
    texts.iter().map(|text| net(text)).collect()
}

/// A mesh node by its number: its key and addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Id(u8);

impl Id {
    fn key(self) -> NodeKey {
        NodeKey::from_seed([self.0; 32])
    }

    fn public(self) -> NodePublic {
        self.key().public()
    }

    fn v4(self) -> IpAddr {
        Ipv4Addr::new(100, 64, 0, self.0).into()
    }

    fn v6(self) -> IpAddr {
        Ipv6Addr::new(0xfd00, 0x64, 0, 0, 0, 0, 0, self.0.into()).into()
    }

    fn addresses(self) -> BTreeSet<IpNet> {
        [self.v4().into(), self.v6().into()].into()
    }
}

/// A device under test, up and with its routes.
struct Node<'h> {
    id: Id,
    host: &'h Host,
    backend: Backend,
    net: Net,
    config: DeviceConfig,
    routes: routes::Config,
}

impl<'h> Node<'h> {
    fn new(host: &'h Host, id: u8) -> Self {
        Self::with_backend(host, id, choice())
    }

    fn with_backend(host: &'h Host, id: u8, choice: Choice) -> Self {
        Self::with_filter(host, id, choice, None)
    }

    fn with_filter(host: &'h Host, id: u8, choice: Choice, filter: Option<Filter>) -> Self {
        let node = Self::down(host, id, choice, filter);
        node.apply();
        node.apply_routes();
        node
    }

    /// On a host without IPv6, where a part of the routes cannot stand.
    fn new_v4(host: &'h Host, id: u8) -> Self {
        let node = Self::down(host, id, choice(), None);
        node.apply();
        let interface = node.backend.interface();
        let applied = host.inside(|| runtime().block_on(node.net.apply(&interface, &node.routes)));
        applied.unwrap().unwrap();
        node
    }

    fn down(host: &'h Host, id: u8, choice: Choice, filter: Option<Filter>) -> Self {
        let id = Id(id);
        let options = OpenOptions {
            name: INTERFACE.to_owned(),
            mtu: 1280,
            fwmark: FWMARK,
            filter,
            uapi_dir: Some(host.path("/run/wireguard")),
        };
        let (backend, net) = host
            .inside(|| {
                runtime().block_on(async {
                    let backend = Backend::open(choice, &options).await;
                    (backend.unwrap(), Net::new().await.unwrap())
                })
            })
            .unwrap();
        Self {
            id,
            host,
            backend,
            net,
            config: DeviceConfig {
                key: id.key(),
                listen_port: PORT,
                fwmark: FWMARK,
                peers: BTreeMap::new(),
            },
            routes: routes::Config {
                addresses: id.addresses(),
                mtu: 1280,
                up: true,
                routes: nets(&["100.64.0.0/10", "fd00:64::/48"]),
                only_mesh: nets(&["100.64.0.0/10", "fd00:64::/48"]),
                table: TABLE,
            },
        }
    }

    /// The peer's configuration by default: reached over IPv4, its own addresses and no others.
    fn peer(&mut self, other: Id, endpoint: Option<SocketAddr>) {
        let peer = PeerConfig {
            endpoint,
            allowed_ips: other.addresses(),
            keepalive: None,
        };
        self.config.peers.insert(other.public(), peer);
        self.apply();
    }

    fn peer_config(&mut self, other: Id) -> &mut PeerConfig {
        self.config.peers.get_mut(&other.public()).unwrap()
    }

    /// Brings the device to its configuration, and shows that it stays there.
    fn apply(&self) {
        let ops = reconcile(&self.config, &self.status());
        let applied = self
            .host
            .inside(|| runtime().block_on(self.backend.apply(&ops)));
        applied.unwrap().unwrap();
        let left = reconcile(&self.config, &self.status());
        assert!(left.is_empty(), "still to do: {left:?}");
    }

    fn apply_routes(&self) {
        let interface = self.backend.interface();
        self.host
            .inside(|| {
                runtime().block_on(async {
                    self.net.apply(&interface, &self.routes).await.unwrap();
                    let status = self.net.status(&interface, self.routes.table).await;
                    let left = routes::reconcile(&self.routes, &status.unwrap());
                    assert!(left.is_empty(), "still to do: {left:?}");
                });
            })
            .unwrap();
    }

    fn status(&self) -> DeviceStatus {
        runtime().block_on(self.backend.status()).unwrap()
    }

    fn peer_status(&self, other: Id) -> PeerStatus {
        self.status().peers.remove(&other.public()).unwrap()
    }

    /// Where this node's device is reached over the underlay.
    fn endpoint(&self) -> SocketAddr {
        (self.host.v4(), PORT).into()
    }

    fn endpoint_v6(&self) -> SocketAddr {
        (self.host.v6(), PORT).into()
    }
}

/// Whether `to` answers an echo request of `from` within exactly `limit`.
fn answers(from: &Host, to: IpAddr, limit: Duration) -> bool {
    let kind = Kind::Icmp;
    let probe = Probe { from, to, kind };
    probe.ask(limit).unwrap().is_some()
}

#[track_caller]
fn assert_reaches(from: &Host, to: IpAddr) {
    assert!(
        answers(from, to, mesh_tests::scaled(SOON)),
        "{} does not reach {to}",
        from.name()
    );
}

#[track_caller]
fn assert_cut_off(from: &Host, to: IpAddr) {
    let limit = mesh_tests::silence(NEVER);
    assert!(!answers(from, to, limit), "{} reaches {to}", from.name());
}

/// Two nodes that know each other, the second without knowing where the first is.
fn pair<'h>(a: &'h Host, b: &'h Host) -> (Node<'h>, Node<'h>) {
    let (mut left, mut right) = (Node::new(a, 1), Node::new(b, 2));
    left.peer(right.id, Some(right.endpoint()));
    right.peer(left.id, None);
    (left, right)
}

/// Bytes of a bulk transfer: dozens of the largest packets that TCP hands out, and still quick in
/// an emulated machine.
const BULK: usize = 4 << 20;

/// Sends a stream of known bytes and compares what arrives.
#[track_caller]
fn assert_carries(from: &Host, to: &Host, address: IpAddr) {
    let byte = |at: usize| (at ^ (at >> 8) ^ (at >> 16)) as u8;
    let listener = to.inside(|| TcpListener::bind((address, 0)).unwrap());
    let listener = listener.unwrap();
    let to = listener.local_addr().unwrap();
    let received = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut received = Vec::with_capacity(BULK);
        stream.read_to_end(&mut received).unwrap();
        received
    });
    from.inside(|| {
        let mut stream = TcpStream::connect_timeout(&to, mesh_tests::scaled(SOON)).unwrap();
        let bytes: Vec<u8> = (0..BULK).map(byte).collect();
        stream.write_all(&bytes).unwrap();
    })
    .unwrap();
    let received = received.join().unwrap();
    assert_eq!(received.len(), BULK);
    let wrong = received.iter().enumerate().find(|(at, b)| byte(*at) != **b);
    assert_eq!(wrong, None);
}
