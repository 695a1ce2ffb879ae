//! What a neighbour sends in VLAN tags, and the kernel takes out of them behind the guard.
//!
//! A tag of the VLAN 0 names no network, only a priority, so any interface takes such frames, and any number
//! of such tags: one comes off before programs see the packet, the others after. No address family of ours
//! sends them, so the frames are made by hand.

use std::net::IpAddr;

use mesh_tests::Lab;
use mesh_tests::mesh::{Family, Mesh};

use super::field::{backend, policy};
use super::wire::{Neighbour, datagram};

const Q: u16 = 0x8100;
const AD: u16 = 0x88a8;

#[test]
fn no_tags_take_a_packet_past_the_guard() {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::of_roles(lab, &policy(), backend()).unwrap();
    let node = mesh.node("node");
    let neighbour = Neighbour::of(node);
    let arrives = |tags: &[u16], from: IpAddr, to: IpAddr| {
        let text = format!("{tags:x?} to {to}");
        neighbour.sends(tags, &datagram(from, to, None, &text), &text)
    };
    for (family, outside, from) in [
        (Family::V4, "172.31.0.1", "172.31.0.2"),
        (Family::V6, "fd31::1", "fd31::2"),
    ] {
        let (outside, from): (IpAddr, IpAddr) = (outside.parse().unwrap(), from.parse().unwrap());
        let inside = node.address(family).unwrap();
        for tags in [&[][..], &[Q], &[Q, Q], &[AD, Q], &[Q, Q, Q], &[Q; 5]] {
            assert!(arrives(tags, from, outside), "{tags:x?}");
            let before = node.dropped("guarded", "ingress").unwrap();
            assert!(!arrives(tags, from, inside), "{tags:x?}");
            let after = node.dropped("guarded", "ingress").unwrap();
            assert_eq!(after, before + 1, "{tags:x?}");
        }
        // One more than anybody reads through.
        assert!(!arrives(&[Q; 6], from, outside));
    }
}
