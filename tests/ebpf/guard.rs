//! The guard on every other interface: nobody outside the mesh talks to its addresses.

use std::net::IpAddr;

use mesh_common::flow::FlowKey;
use mesh_common::{Address, Be16, DropReason};

use mesh_core::Direction::Ingress;
use mesh_core::dataplane::Tables;
use mesh_core::desired::MTU;
use mesh_core::{Identity, RuleId};

use crate::kernel::Kernel;
use crate::packet::{Body, Packet};
use crate::scene::*;

const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;

/// On Ethernet.
fn frame(source: &str, destination: &str) -> Vec<u8> {
    let body = Body::Udp {
        source: 1,
        destination: 2,
    };
    let (source, destination): (IpAddr, IpAddr) =
        (source.parse().unwrap(), destination.parse().unwrap());
    let packet = Packet::new(Ingress, source, destination, body);
    let protocol: [u8; 2] = if packet.is_v4() {
        [0x08, 0x00]
    } else {
        [0x86, 0xdd]
    };
    let mut frame = vec![0; 12];
    frame.extend(protocol);
    frame.extend(packet.bytes());
    frame
}

#[test]
fn the_guard_lets_nothing_in_to_our_mesh_addresses() {
    let kernel = kernel();
    let guard = |frame: &[u8]| kernel.run_program("guard", frame, 1).0;
    for (source, destination, expected) in [
        ("192.168.1.2", "100.64.0.1", DROP),
        ("100.64.0.2", "100.64.0.1", DROP),
        ("192.168.1.2", "100.64.0.2", NEXT),
        ("192.168.1.2", "192.168.1.1", NEXT),
        // Nor may anybody pass for this node, to others of the mesh above all.
        ("100.64.0.1", "100.64.0.2", DROP),
        ("2001:db8::1", "fd00:a:b:c:d:e:f:1", DROP),
        ("2001:db8::1", "fd00:a:b:c:d:e:f:2", NEXT),
        ("2001:db8::1", "fd00:a:b:c:d:e:f:9", NEXT),
        ("fd00:a:b:c:d:e:f:1", "fd00:a:b:c:d:e:f:2", DROP),
        ("::ffff:100.64.0.1", "2001:db8::1", DROP),
        ("::", "ff02::1", NEXT),
        // A translator on the host might make IPv4 of it.
        ("2001:db8::1", "::ffff:100.64.0.1", DROP),
    ] {
        let outcome = guard(&frame(source, destination));
        assert_eq!(outcome, expected, "{source} to {destination}");
    }
    // Of nothing but a header.
    for (frame, header) in [
        (frame("192.168.1.2", "100.64.0.1"), 20),
        (frame("2001:db8::1", "fd00:a:b:c:d:e:f:1"), 40),
    ] {
        assert_eq!(guard(&frame[..14 + header]), DROP);
    }
    let mut arp = frame("192.168.1.2", "100.64.0.1");
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    assert_eq!(guard(&arp), NEXT);
}

/// Who listens on the host's other addresses would take it for what the peer has sent. But the pool may be a
/// network's besides, and the host routes for others.
#[test]
fn the_guard_lets_nobody_pass_for_a_peer() {
    let mut kernel = kernel();
    let mut netmap = netmap();
    let routes = ["10.1.0.7/32", "fd99::7/128"].map(|net| net.parse().unwrap());
    for route in routes {
        netmap.policy.identities.insert(route, Identity(18));
    }
    let check = |kernel: &Kernel, peer| {
        for (source, expected) in [
            ("100.64.0.2", peer),
            ("100.64.0.3", DROP),
            ("100.64.0.99", NEXT),
            ("100.63.0.2", NEXT),
            ("100.128.0.2", NEXT),
            ("10.1.0.7", NEXT),
            ("fd00:a:b:c:d:e:f:2", peer),
            ("fd00:a:b:c:d:e:f:99", NEXT),
            ("fd00:a:c:c:d:e:f:2", NEXT),
            ("fd01:a:b:c:d:e:f:2", NEXT),
            ("fd99::7", NEXT),
        ] {
            let destination = if source.contains(':') {
                "2001:db8::1"
            } else {
                "192.168.1.1"
            };
            let outcome = kernel
                .run_program("guard", &frame(source, destination), 1)
                .0;
            assert_eq!(outcome, expected, "{source} to {destination}");
        }
    };
    kernel.apply(&Tables::of(&netmap, MTU));
    check(&kernel, DROP);
    kernel.kill();
    kernel.start();
    check(&kernel, DROP);
    netmap.policy.identities.retain(|_, of| *of != Identity(18));
    kernel.apply(&Tables::of(&netmap, MTU));
    check(&kernel, NEXT);
}

/// The kernel takes tags of the VLAN 0 off behind the guard, one after the other.
#[test]
fn the_guard_reads_through_tags() {
    let mut kernel = kernel();
    let tagged = |tags: &[u16], source: &str, destination: &str| {
        let mut frame = frame(source, destination);
        for tag in tags.iter().rev() {
            let [high, low] = tag.to_be_bytes();
            // Priority 7, which says nothing of the VLAN.
            frame.splice(12..12, [high, low, 0xe0, 0]);
        }
        frame
    };
    for tags in [
        &[0x8100][..],
        &[0x88a8],
        &[0x88a8, 0x8100],
        &[0x8100, 0x88a8, 0x8100],
        &[0x8100; 4],
    ] {
        for (source, destination, expected) in [
            ("192.168.1.2", "100.64.0.1", DROP),
            ("192.168.1.2", "100.64.0.2", NEXT),
            ("100.64.0.1", "100.64.0.2", DROP),
            ("2001:db8::1", "fd00:a:b:c:d:e:f:1", DROP),
            ("2001:db8::1", "fd00:a:b:c:d:e:f:2", NEXT),
            ("fd00:a:b:c:d:e:f:1", "2001:db8::1", DROP),
        ] {
            let frame = tagged(tags, source, destination);
            let outcome = kernel.run_program("guard", &frame, 1).0;
            assert_eq!(outcome, expected, "{tags:x?}: {source} to {destination}");
        }
        let mut arp = tagged(tags, "192.168.1.2", "100.64.0.1");
        arp[12 + 4 * tags.len() + 1] = 0x06;
        assert_eq!(kernel.run_program("guard", &arp, 1).0, NEXT);
        // Neither does the kernel find anything behind half a tag, or half a header.
        let frame = tagged(tags, "192.168.1.2", "100.64.0.1");
        for cut in 14..14 + 4 * tags.len() + 20 {
            assert_eq!(kernel.run_program("guard", &frame[..cut], 1).0, NEXT);
        }
    }
    kernel.events();
    // Who can say what is in there?
    let hidden = tagged(&[0x8100; 5], "192.168.1.2", "192.168.1.1");
    let slot = (Ingress, DropReason::Guarded);
    let bytes = |kernel: &mut Kernel| kernel.dataplane().counters().unwrap().dropped[&slot].bytes;
    let before = bytes(&mut kernel);
    assert_eq!(kernel.run_program("guard", &hidden, 1).0, DROP);
    assert_eq!(bytes(&mut kernel), before + hidden.len() as u64);
    let denials = kernel.denials();
    assert!(denials.keys().any(|key| key.unwrap().proto == 0));
    let [event] = kernel.events()[..] else {
        panic!("one event");
    };
    assert_eq!(event.key, FlowKey::NONE);
}

/// It asks whether an address is anybody's, as neighbour discovery does.
#[test]
fn the_guard_lets_an_address_be_tried_out_before_it_knows_ours() {
    let kernel = Kernel::new();
    let tried = frame("::", "ff02::1");
    assert_eq!(kernel.run_program("guard", &tried, 1).0, NEXT);
}

#[test]
fn the_guard_knows_the_addresses_that_the_node_has_now() {
    let mut kernel = kernel();
    let mut moved = netmap();
    moved.me.addresses.v4 = [100, 64, 0, 9].into();
    moved.me.addresses.v6 = "fd00:a:b:c:d:e:f:9".parse().unwrap();
    kernel.apply(&Tables::of(&moved, MTU));
    let check = |kernel: &Kernel| {
        for (source, destination, expected) in [
            ("192.168.1.2", "100.64.0.1", NEXT),
            ("192.168.1.2", "100.64.0.9", DROP),
            ("2001:db8::1", "fd00:a:b:c:d:e:f:1", NEXT),
            ("2001:db8::1", "fd00:a:b:c:d:e:f:9", DROP),
        ] {
            let outcome = kernel
                .run_program("guard", &frame(source, destination), 1)
                .0;
            assert_eq!(outcome, expected, "{source} to {destination}");
        }
    };
    check(&kernel);
    // The next agent has not heard of its coordinator yet.
    kernel.kill();
    kernel.start();
    check(&kernel);
}

#[test]
fn what_the_guard_drops_is_counted_and_told() {
    let mut kernel = kernel();
    for (number, (source, destination)) in [
        ("192.168.1.2", "100.64.0.1"),
        ("2001:db8::1", "fd00:a:b:c:d:e:f:1"),
    ]
    .into_iter()
    .enumerate()
    {
        let frame = frame(source, destination);
        let before = kernel.dataplane().counters().unwrap();
        assert_eq!(kernel.run_program("guard", &frame, 1).0, DROP);
        let after = kernel.dataplane().counters().unwrap();
        let slot = (Ingress, DropReason::Guarded);
        let old = before.dropped.get(&slot).copied().unwrap_or_default();
        assert_eq!(after.dropped.len(), 1);
        assert_eq!(after.dropped[&slot].packets, old.packets + 1);
        let length = frame.len() as u64 - 14;
        assert_eq!(after.dropped[&slot].bytes, old.bytes + length);
        assert_eq!(after.passed, before.passed);
        let [event] = kernel.events()[..] else {
            // The second is told of with the first: one kind of denial.
            assert_eq!(number, 1);
            continue;
        };
        let key = FlowKey {
            remote: Address::from(source.parse::<IpAddr>().unwrap()),
            local: Address::from(destination.parse::<IpAddr>().unwrap()),
            remote_port: Be16::new(0),
            local_port: Be16::new(0),
            proto: 17,
            pad: 0,
            pad2: 0,
        };
        assert_eq!(event.key, key);
        assert_eq!(event.reason(), Some(DropReason::Guarded));
        assert_eq!(event.direction(), Ingress);
        assert_eq!((event.remote, event.local), (Identity(0), Identity(0)));
        assert_eq!((event.rule, event.peer, event.tcp), (RuleId(0), 0, 0));
        assert_eq!((event.bytes[1], event.length), (0, length as u32));
    }
    let keys: Vec<_> = kernel.denials().keys().map(Result::unwrap).collect();
    assert_eq!(keys.len(), 1);
    assert_eq!((keys[0].port.get(), keys[0].proto), (0, 17));
}

/// By what is in its segments: the header of the link is in none.
#[test]
fn a_super_packet_counts_as_its_segments_at_the_guard() {
    let mut kernel = kernel();
    let mut packet = frame("192.168.1.2", "100.64.0.1");
    let length = 80 + 100;
    packet.resize(14 + length, 0);
    packet[16..18].copy_from_slice(&(length as u16).to_be_bytes());
    assert_eq!(kernel.run_super_packet("guard", &packet, 0, 100), DROP);
    let counters = kernel.dataplane().counters().unwrap();
    let guarded = counters.dropped[&(Ingress, DropReason::Guarded)];
    assert_eq!((guarded.packets, guarded.bytes), (1, length as u64));
}
