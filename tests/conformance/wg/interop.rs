//! Against implementations that are not ours: wireguard-go everywhere, and the kernel where it has
//! one, both set up by `wg` and `ip` alone.

use super::*;
use mesh_tests::{Process, User};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Implementation {
    WireguardGo,
    Kernel,
}

/// Who meets whom. The kernel is no stranger to our kernel backend, so that one is for ours in
/// process.
fn meetings() -> Vec<(Choice, Implementation)> {
    let mut meetings = vec![(choice(), Implementation::WireguardGo)];
    if runtime().block_on(mesh_agent::wg::kernel::is_supported()) {
        meetings.push((Choice::Userspace, Implementation::Kernel));
    } else {
        assert_eq!(choice(), Choice::Userspace, "this kernel has no WireGuard");
    }
    meetings
}

/// A device of another implementation on a host.
struct Theirs<'h> {
    host: &'h Host,
    id: Id,
    _process: Option<Process>,
}

impl<'h> Theirs<'h> {
    fn start(host: &'h Host, id: u8, implementation: Implementation) -> Self {
        let id = Id(id);
        let process = match implementation {
            Implementation::WireguardGo => Some(wireguard_go(host)),
            Implementation::Kernel => {
                host.run("ip", &["link", "add", INTERFACE, "type", "wireguard"])
                    .unwrap();
                None
            }
        };
        let key = host.folder().join("key");
        // Keys are written alike, be they public or not.
        std::fs::write(&key, NodePublic(*id.key().expose()).to_string()).unwrap();
        let (key, port) = (key.to_str().unwrap(), PORT.to_string());
        let device = ["listen-port", &port, "private-key", key];
        host.run("wg", &[&["set", INTERFACE][..], &device].concat())
            .unwrap();
        for address in id.addresses() {
            let address = address.to_string();
            host.run("ip", &["addr", "add", &address, "dev", INTERFACE])
                .unwrap();
        }
        host.run("ip", &["link", "set", INTERFACE, "up", "mtu", "1280"])
            .unwrap();
        for route in ["100.64.0.0/10", "fd00:64::/48"] {
            host.run("ip", &["route", "add", route, "dev", INTERFACE])
                .unwrap();
        }
        Self {
            host,
            id,
            _process: process,
        }
    }

    fn peer(&self, other: Id, endpoint: Option<SocketAddr>) {
        let (key, allowed) = (
            other.public().to_string(),
            format!("{}/32,{}/128", other.v4(), other.v6()),
        );
        let mut arguments = vec!["set", INTERFACE, "peer", &key, "allowed-ips", &allowed];
        let endpoint = endpoint.map(|endpoint| endpoint.to_string());
        if let Some(endpoint) = &endpoint {
            arguments.extend(["endpoint", endpoint]);
        }
        self.host.run("wg", &arguments).unwrap();
    }
}

fn wireguard_go(host: &Host) -> Process {
    let mut command = host.command(User::Root, "wireguard-go");
    command.args(["--foreground", INTERFACE]);
    let process = host.spawn("wireguard-go", command).unwrap();
    let socket = host.path(&format!("/run/wireguard/{INTERFACE}.sock"));
    mesh_tests::until("wireguard-go", SOON, || socket.exists())
        .expect("it listens: is wireguard-go installed?");
    process
}

#[test]
fn others_answer_our_handshake() {
    for (choice, implementation) in meetings() {
        let lab = lab();
        let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
        let mut ours = Node::with_backend(&a, 1, choice);
        let theirs = Theirs::start(&b, 2, implementation);
        theirs.peer(ours.id, None);
        ours.peer(theirs.id, Some((b.v4(), PORT).into()));
        for to in [theirs.id.v4(), theirs.id.v6()] {
            assert_reaches(&a, to);
        }
        for to in [ours.id.v4(), ours.id.v6()] {
            assert_reaches(&b, to);
        }
        assert_carries(&a, &b, theirs.id.v4());
        assert_carries(&b, &a, ours.id.v6());
    }
}

#[test]
fn we_answer_the_handshake_of_others() {
    for (choice, implementation) in meetings() {
        let lab = lab();
        let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
        let mut ours = Node::with_backend(&a, 1, choice);
        let theirs = Theirs::start(&b, 2, implementation);
        ours.peer(theirs.id, None);
        theirs.peer(ours.id, Some(ours.endpoint_v6()));
        for to in [ours.id.v4(), ours.id.v6()] {
            assert_reaches(&b, to);
        }
        for to in [theirs.id.v4(), theirs.id.v6()] {
            assert_reaches(&a, to);
        }
        assert!(ours.peer_status(theirs.id).is_live());
    }
}

/// Where the kernel has WireGuard, a mesh may hold both of our backends; elsewhere one kind twice.
#[test]
fn our_own_backends_understand_each_other() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let mut one = Node::with_backend(&a, 1, choice());
    let mut userspace = Node::with_backend(&b, 2, Choice::Userspace);
    one.peer(userspace.id, Some(userspace.endpoint()));
    userspace.peer(one.id, None);
    assert_reaches(&a, userspace.id.v4());
    assert_reaches(&b, one.id.v6());
}
