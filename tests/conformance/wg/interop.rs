//! Against implementations that are not ours.

use super::*;
use mesh_tests::{Process, User};

/// wireguard-go on a host, configured by `wg` and `ip`.
struct WireguardGo<'h> {
    host: &'h Host,
    id: Id,
    _process: Process,
}

impl<'h> WireguardGo<'h> {
    fn start(host: &'h Host, id: u8) -> Self {
        assert!(
            has_program("wireguard-go") && has_program("wg"),
            "wireguard-go or wg is missing: apt-get install wireguard-go wireguard-tools"
        );
        let id = Id(id);
        let mut command = host.command(User::Root, "wireguard-go");
        command.args(["--foreground", INTERFACE]);
        let process = host.spawn("wireguard-go", command).unwrap();
        let socket = host.path(&format!("/run/wireguard/{INTERFACE}.sock"));
        mesh_tests::until("wireguard-go", SOON, || socket.exists()).unwrap();
        let key = host.folder().join("key");
        std::fs::write(&key, base64(id.key().expose())).unwrap();
        host.run(
            "wg",
            &[
                "set",
                INTERFACE,
                "listen-port",
                "51820",
                "private-key",
                key.to_str().unwrap(),
            ],
        )
        .unwrap();
        for address in id.addresses() {
            host.run(
                "ip",
                &["addr", "add", &address.to_string(), "dev", INTERFACE],
            )
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

fn base64(key: &[u8; 32]) -> String {
    // Every key is written alike.
    NodePublic(*key).to_string()
}

#[test]
fn wireguard_go_answers_our_handshake() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (mut ours, theirs) = (Node::new(&a, 1), WireguardGo::start(&b, 2));
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

#[test]
fn we_answer_the_handshake_of_wireguard_go() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (mut ours, theirs) = (Node::new(&a, 1), WireguardGo::start(&b, 2));
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

/// Where the kernel has WireGuard, both of our backends are in one mesh.
#[test]
fn our_own_backends_understand_each_other() {
    if !runtime().block_on(mesh_agent::wg::kernel::is_supported()) {
        assert_eq!(choice(), Choice::Userspace, "this kernel has no WireGuard");
        return;
    }
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let mut kernel = Node::with_backend(&a, 1, Choice::Kernel);
    let mut userspace = Node::with_backend(&b, 2, Choice::Userspace);
    kernel.peer(userspace.id, Some(userspace.endpoint()));
    userspace.peer(kernel.id, None);
    assert_reaches(&a, userspace.id.v4());
    assert_reaches(&b, kernel.id.v6());
}
