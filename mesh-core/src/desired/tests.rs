//! Which endpoint a peer is tried at.

use super::*;
use crate::node::{Addresses, Name, NodeId};

fn peer(endpoints: &[&str]) -> Peer {
    Peer {
        id: NodeId(4),
        name: Name::parse("peer").unwrap(),
        key: NodePublic([4; 32]),
        addresses: Addresses {
            v4: [100, 64, 0, 4].into(),
            v6: [0xfd01, 0, 0, 0, 0, 0, 0, 4].into(),
        },
        endpoints: endpoints.iter().map(|at| at.parse().unwrap()).collect(),
        routes: BTreeSet::new(),
        tags: BTreeSet::new(),
        user: None,
    }
}

#[test]
fn a_shared_network_is_tried_first_and_ipv4_before_ipv6() {
    let underlay: BTreeSet<LocalPrefix> = ["10.0.0.7/8", "10.2.0.7/16", "172.17.0.1/16"]
        .map(|net| LocalPrefix {
            interface: "eth0".to_owned(),
            net: net.parse().unwrap(),
        })
        .into();
    let check = |endpoints: &[&str], first: Option<&str>| {
        let first = first.map(|at| at.parse().unwrap());
        assert_eq!(
            endpoint(&peer(endpoints), &underlay),
            first,
            "{endpoints:?}"
        );
    };
    check(&[], None);
    check(&["192.0.2.1:0"], None);
    check(&["100.64.0.4:7"], None);
    check(&["[2001:db8::1]:7", "192.0.2.1:7"], Some("192.0.2.1:7"));
    check(&["[2001:db8::1]:7"], Some("[2001:db8::1]:7"));
    check(
        &["10.9.0.1:7", "10.2.0.1:7", "192.0.2.1:7"],
        Some("10.2.0.1:7"),
    );
    // Our own address on the other side is another host's bridge.
    check(&["172.17.0.1:7", "192.0.2.1:7"], Some("192.0.2.1:7"));
}
