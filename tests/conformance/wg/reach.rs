//! What a tunnel is for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use mesh_agent::wg::Judgement;
use mesh_core::Direction;
use mesh_tests::probe::Echo;

#[test]
fn two_devices_reach_each_other_over_ipv4_and_ipv6() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (left, right) = pair(&a, &b);
    for to in [right.id.v4(), right.id.v6()] {
        assert_reaches(&a, to);
    }
    for to in [left.id.v4(), left.id.v6()] {
        assert_reaches(&b, to);
    }
    for (node, other) in [(&left, right.id), (&right, left.id)] {
        let peer = node.peer_status(other);
        assert!(peer.is_live(), "{peer:?}");
        assert!(peer.rx_bytes > 0 && peer.tx_bytes > 0, "{peer:?}");
    }
    let learned = right.peer_status(left.id).endpoint;
    assert_eq!(learned, Some(left.endpoint()));
}

#[test]
fn the_underlay_may_be_ipv6() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (mut left, right) = pair(&a, &b);
    left.peer_config(right.id).endpoint = Some(right.endpoint_v6());
    left.apply();
    assert_reaches(&a, right.id.v4());
    let learned = right.peer_status(left.id).endpoint;
    assert_eq!(learned, Some(left.endpoint_v6()));
}

#[test]
fn a_keepalive_opens_the_tunnel_before_anyone_talks() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (mut left, right) = pair(&a, &b);
    left.peer_config(right.id).keepalive = Some(25);
    left.apply();
    let met = || right.peer_status(left.id).is_live();
    mesh_tests::until("a handshake", SOON, met).unwrap();
}

#[test]
fn a_restart_under_the_same_key_is_answered() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (left, right) = pair(&a, &b);
    assert_reaches(&a, right.id.v4());
    drop(left);
    let mut left = Node::new(&a, 1);
    left.peer(right.id, Some(right.endpoint()));
    assert_reaches(&a, right.id.v4());
}

#[test]
fn a_new_key_of_the_device_needs_no_new_peers() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (mut left, mut right) = pair(&a, &b);
    assert_reaches(&a, right.id.v4());
    let old = left.id.public();
    left.config.key = NodeKey::from_seed([101; 32]);
    left.apply();
    assert_cut_off(&a, right.id.v4());
    let peer = right.config.peers.remove(&old).unwrap();
    right.config.peers.insert(left.config.key.public(), peer);
    right.apply();
    assert_reaches(&a, right.id.v4());
}

#[test]
fn a_bulk_transfer_arrives_byte_for_byte() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (left, right) = pair(&a, &b);
    for (from, to, address) in [
        (&a, &b, right.id.v4()),
        (&b, &a, left.id.v6()),
        (&a, &b, right.id.v6()),
    ] {
        assert_carries(from, to, address);
    }
}

/// The destination port of a UDP packet over IPv4.
fn udp_port(packet: &[u8]) -> Option<u16> {
    let is_udp = *packet.get(9)? == 17;
    let port = packet.get(22..24)?.try_into().ok()?;
    is_udp.then(|| u16::from_be_bytes(port))
}

/// The kernel's device has no filter in process: BPF programs hang on it.
#[test]
fn a_filter_judges_every_packet_both_ways() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let longest = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&longest);
    let filter = Filter::new(move |direction, packet| {
        seen.fetch_max(packet.len(), Ordering::Relaxed);
        match (direction, udp_port(packet)) {
            (Direction::Egress, Some(1001)) | (Direction::Ingress, Some(1002)) => Judgement::Drop,
            _ => Judgement::Pass,
        }
    });
    let mut left = Node::with_filter(&a, 1, Choice::Userspace, Some(filter));
    let mut right = Node::new(&b, 2);
    left.peer(right.id, Some(right.endpoint()));
    right.peer(left.id, Some(left.endpoint()));
    let ports = [1000, 1001, 1002].map(Kind::Udp);
    let _echoes = [&a, &b].map(|host| Echo::start(host, &ports).unwrap());
    let reached = |from, to| {
        ports.map(|kind| {
            let probe = Probe { from, to, kind };
            let limit = if kind == ports[0] {
                mesh_tests::scaled(SOON)
            } else {
                mesh_tests::silence(NEVER)
            };
            probe.ask(limit).unwrap().is_some()
        })
    };
    assert_eq!(reached(&a, right.id.v4()), [true, false, true], "egress");
    assert_eq!(reached(&b, left.id.v4()), [true, true, false], "ingress");
    assert_carries(&a, &b, right.id.v4());
    assert_carries(&b, &a, left.id.v4());
    assert_eq!(longest.load(Ordering::Relaxed), 1280, "judged one by one");
}
