//! What the host forwards into and out of the mesh is judged like the node's own traffic.
//!
//! ```text
//!   container 172.30.0.2 ── bridge ── node ══ mesh0 ══ operator        sandbox
//!                                      │
//!                          underlay ── neighbour (no node of the mesh)
//! ```
//! The node masquerades what its container sends into the mesh, and hands two of its ports on: one of
//! its mesh address to the container, one of its underlay address to the operator.

use std::fs::File;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use mesh_tests::mesh::{Family, Mesh};
use mesh_tests::probe::{Echo, Kind};
use mesh_tests::{Host, Lab, until};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::field::{SOON, backend};

/// Operators reach port 9000 of nodes, nodes port 9001 of operators. Sandboxes reach a port that nobody
/// serves, so that they are peers at all.
const POLICY: &str = r#"{
    "tagOwners": {"tag:operator": [], "tag:node": [], "tag:developer": [], "tag:sandbox": []},
    "acls": [
        {"action": "accept", "proto": "udp", "src": ["tag:operator"], "dst": ["tag:node:9000"]},
        {"action": "accept", "proto": "udp", "src": ["tag:node"], "dst": ["tag:operator:9001"]},
        {"action": "accept", "proto": "udp", "src": ["tag:sandbox"], "dst": ["tag:node:9003"]},
    ],
}"#;

const CONTAINER: &str = "\
ip netns add box
ip link add cbr0 type bridge
ip link add veth0 type veth peer name eth0 netns box
ip link set veth0 master cbr0
ip address add 172.30.0.1/24 dev cbr0
ip link set cbr0 up
ip link set veth0 up
ip -n box address add 172.30.0.2/24 dev eth0
ip -n box link set eth0 up
ip -n box route add default via 172.30.0.1
echo 1 > /proc/sys/net/ipv4/ip_forward
";

fn rules(operator: IpAddr) -> String {
    format!(
        "table ip forward {{
            chain in {{
                type nat hook prerouting priority -100;
                iifname mesh0 udp dport 9000 dnat to 172.30.0.2
                iifname eth0 udp dport 7001 dnat to {operator}:9001
                iifname eth0 udp dport 7002 dnat to {operator}:9002
            }}
            chain out {{
                type nat hook postrouting priority 100;
                oifname mesh0 masquerade
            }}
        }}"
    )
}

/// Work in the network of the host's container `box`.
pub(super) fn in_container<T: Send>(host: &Host, work: impl FnOnce() -> T + Send) -> T {
    let box_ = File::open(host.path("/run/netns/box")).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(box_.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

/// Whether somebody answers a datagram within a second. A socket asks one question: the answer to an
/// earlier one may come late.
fn is_answered(socket: &UdpSocket, to: IpAddr, port: u16) -> bool {
    socket
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    (0..10).any(|_| {
        let _ = socket.send_to(b"ping", (to, port));
        socket.recv_from(&mut [0; 16]).is_ok()
    })
}

fn socket(host: &Host) -> UdpSocket {
    host.inside(|| UdpSocket::bind(("0.0.0.0", 0)))
        .unwrap()
        .unwrap()
}

#[test]
fn what_is_forwarded_is_judged_and_what_is_allowed_works() {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::of_roles(lab, POLICY, backend()).unwrap();
    let neighbour = mesh.lab.host("neighbour").unwrap();
    let (node, operator) = (mesh.node("node"), mesh.node("operator"));
    let address = |name| mesh.node(name).address(Family::V4).unwrap();
    let host = &node.host;
    let ports = [Kind::Udp(9001), Kind::Udp(9002)];
    let _echo = Echo::start(&operator.host, &ports).unwrap();
    host.run("sh", &["-ec", CONTAINER]).unwrap();
    host.run("nft", &[&rules(address("operator"))]).unwrap();

    // Out of the container, as the node.
    let inside = || in_container(host, || UdpSocket::bind(("0.0.0.0", 0)).unwrap());
    let works = until("the container reaches what the node may", SOON, || {
        is_answered(&inside(), address("operator"), 9001)
    });
    works.unwrap_or_else(|error| panic!("{error:#}\n{}", mesh.logs()));
    let before = node.dropped("no rule", "egress").unwrap();
    assert!(
        !is_answered(&inside(), address("operator"), 9002),
        "nobody may open this"
    );
    assert!(node.dropped("no rule", "egress").unwrap() > before);

    // Into the container, through the node's mesh address.
    let served = AtomicU32::new(0);
    let stop = AtomicBool::new(false);
    let server = in_container(host, || UdpSocket::bind(("0.0.0.0", 9000)).unwrap());
    server
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 64];
            while !stop.load(Ordering::Relaxed) {
                if let Ok((length, from)) = server.recv_from(&mut buffer) {
                    served.fetch_add(1, Ordering::Relaxed);
                    let _ = server.send_to(&buffer[..length], from);
                }
            }
        });
        let ask = |name, port| is_answered(&socket(&mesh.node(name).host), address("node"), port);
        let allowed = ask("operator", 9000);
        let count = served.load(Ordering::Relaxed);
        mesh.node("sandbox").disarm().unwrap();
        let before = node.dropped("no rule", "ingress").unwrap();
        let denied = ask("sandbox", 9000);
        let refused = node.dropped("no rule", "ingress").unwrap() - before;
        stop.store(true, Ordering::Relaxed);
        assert!(allowed, "an operator reaches the container");
        assert!(
            !denied && served.load(Ordering::Relaxed) == count,
            "a sandbox reaches it"
        );
        assert!(refused > 0, "the node did not refuse it");
    });

    // From a neighbour on the underlay, by the ports that the node hands on.
    let outside = |port| is_answered(&socket(&neighbour), host.v4().into(), port);
    assert!(outside(7001), "handed on");
    assert!(!outside(7002), "not allowed");

    // And not past the mesh to the node's own mesh address.
    let route = format!("{}/32", address("node"));
    let via = host.v4().to_string();
    neighbour
        .run("ip", &["route", "add", &route, "via", &via])
        .unwrap();
    let before = node.dropped("guarded", "ingress").unwrap();
    assert!(!is_answered(&socket(&neighbour), address("node"), 9000));
    assert!(node.dropped("guarded", "ingress").unwrap() > before);
}

const BEHIND: &str = "\
ip -6 address add fd99::1/64 dev cbr0 nodad
ip -n box -6 address add fd99::2/64 dev eth0 nodad
ip -n box -6 route add default via fd99::1
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
";

/// What it sends as the node would be the node's, wherever it is judged. Over IPv4 the kernel itself takes
/// no packet from one of its own addresses.
#[test]
fn nobody_behind_a_node_passes_for_it() {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::of_roles(lab, POLICY, backend()).unwrap();
    let (node, operator) = (mesh.node("node"), mesh.node("operator"));
    let address = |name| mesh.node(name).address(Family::V6).unwrap();
    let (own, to) = (address("node"), address("operator"));
    let host = &node.host;
    let served = operator
        .host
        .inside(|| UdpSocket::bind((to, 9001)).unwrap());
    let served = served.unwrap();
    served
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let arrived = |from: &dyn Fn()| {
        (0..20).any(|_| {
            from();
            served.recv_from(&mut [0; 16]).is_ok()
        })
    };
    let ours = host.inside(|| UdpSocket::bind((own, 0)).unwrap()).unwrap();
    until("the node itself may", SOON, || {
        arrived(&|| drop(ours.send_to(b"node", (to, 9001))))
    })
    .unwrap();

    host.run("sh", &["-ec", CONTAINER]).unwrap();
    host.run("sh", &["-ec", BEHIND]).unwrap();
    let behind = |source: IpAddr| {
        let socket = in_container(host, || UdpSocket::bind((source, 0)).unwrap());
        arrived(&|| drop(socket.send_to(b"box", (to, 9001))))
    };
    let before = node.dropped("unknown local address", "egress").unwrap();
    assert!(!behind("fd99::2".parse().unwrap()));
    assert!(node.dropped("unknown local address", "egress").unwrap() > before);
    let add = format!("ip -n box -6 address add {own}/128 dev eth0 nodad");
    host.run("sh", &["-ec", &add]).unwrap();
    let before = node.dropped("guarded", "ingress").unwrap();
    assert!(!behind(own));
    assert!(node.dropped("guarded", "ingress").unwrap() > before);
}

/// Who listens on all of the host's addresses takes a mesh address for what WireGuard has proved.
#[test]
fn nobody_outside_the_mesh_passes_for_a_peer() {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::of_roles(lab, POLICY, backend()).unwrap();
    let node = mesh.node("node");
    let host = &node.host;
    host.run("sh", &["-ec", CONTAINER]).unwrap();
    host.run("sh", &["-ec", BEHIND]).unwrap();
    // Else the kernel itself would ask for the way back, of IPv4.
    let trusting = "for way in all cbr0; do echo 0 > /proc/sys/net/ipv4/conf/$way/rp_filter; done";
    host.run("sh", &["-ec", trusting]).unwrap();

    for (family, here, there) in [
        (Family::V4, "172.30.0.1", "172.30.0.2"),
        (Family::V6, "fd99::1", "fd99::2"),
    ] {
        let [here, there]: [IpAddr; 2] = [here, there].map(|address| address.parse().unwrap());
        let served = host.inside(|| UdpSocket::bind((here, 9100)).unwrap());
        let served = served.unwrap();
        served
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let arrives = |source: IpAddr| {
            let socket = in_container(host, || UdpSocket::bind((source, 0)).unwrap());
            (0..20).any(|_| {
                drop(socket.send_to(b"box", (here, 9100)));
                served.recv_from(&mut [0; 16]).is_ok()
            })
        };
        assert!(arrives(there), "{family:?}: the container may");
        let peer = mesh.node("sandbox").address(family).unwrap();
        let flags = if peer.is_ipv6() { "nodad" } else { "" };
        let add = format!("ip -n box address add {peer} dev eth0 {flags}");
        host.run("sh", &["-ec", &add]).unwrap();
        let before = node.dropped("guarded", "ingress").unwrap();
        assert!(!arrives(peer), "{family:?}: as a peer");
        let after = node.dropped("guarded", "ingress").unwrap();
        assert_eq!(after, before + 20, "{family:?}");
    }
}
