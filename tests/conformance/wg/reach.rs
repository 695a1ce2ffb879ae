//! What a tunnel is for.

use super::*;

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
