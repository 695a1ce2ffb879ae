//! What a neighbour sends by way of an address that is no secret, on a host that heeds source routes.

use std::net::IpAddr;

use mesh_tests::Lab;
use mesh_tests::mesh::{Family, Mesh};

use super::field::{backend, policy};
use super::wire::{Neighbour, datagram};

const HEED: &str = "\
ip address add 172.31.0.9/24 dev lan
ip address add fd31::9/64 dev lan nodad
for of in all lan; do
    echo 1 > /proc/sys/net/ipv4/conf/$of/accept_source_route
    echo 1 > /proc/sys/net/ipv6/conf/$of/seg6_enabled
done
";

#[test]
fn no_source_route_takes_a_packet_past_the_guard() {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::of_roles(lab, &policy(), backend()).unwrap();
    let node = mesh.node("node");
    let neighbour = Neighbour::of(node);
    node.host.run("sh", &["-ec", HEED]).unwrap();
    for (family, from, way, other) in [
        (Family::V4, "172.31.0.2", "172.31.0.1", "172.31.0.9"),
        (Family::V6, "fd31::2", "fd31::1", "fd31::9"),
    ] {
        let [from, way, other]: [IpAddr; 3] = [from, way, other].map(|text| text.parse().unwrap());
        let arrives = |to: IpAddr| {
            let text = format!("by way of {way} to {to}");
            neighbour.sends(&[], &datagram(from, to, Some(way), &text), &text)
        };
        assert!(arrives(other), "the host heeds the route of {family:?}");
        let before = node.dropped("guarded", "ingress").unwrap();
        assert!(!arrives(node.address(family).unwrap()), "{family:?}");
        assert_eq!(node.dropped("guarded", "ingress").unwrap(), before + 1);
    }
}
