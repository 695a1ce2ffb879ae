//! What packets may look like: fragments, extension headers, ICMP errors, and what nobody can read.

use mesh_common::flow::{FragmentEntry, FragmentKey};
use mesh_common::{Be16, Be32};
use mesh_core::Direction::{Egress, Ingress};

use crate::kernel::Kernel;
use crate::packet::{Body, Extension, Fragment, Packet};
use crate::scene::*;

#[test]
fn fragments_follow_their_first() {
    let mut kernel = kernel();
    let body = Body::Udp {
        source: 4_000,
        destination: 53,
    };
    let fragment = |offset, more| {
        let mut packet = packet(PEER, Ingress, body.clone());
        packet.fragment = Some(Fragment {
            id: 5,
            offset,
            more,
        });
        packet.bytes()
    };
    let lost = Err("fragment without first");
    assert_eq!(kernel.outcome(Ingress, &fragment(100, false)), lost);
    assert_eq!(kernel.outcome(Ingress, &fragment(0, true)), PASS);
    assert_eq!(kernel.outcome(Ingress, &fragment(100, true)), PASS);
    assert_eq!(kernel.outcome(Ingress, &fragment(200, false)), PASS);
    assert_eq!(
        kernel.outcome(Ingress, &fragment(2, false)),
        Err("tiny fragment")
    );
    kernel.age(31);
    assert_eq!(kernel.outcome(Ingress, &fragment(100, false)), lost);
}

#[test]
fn four_extension_headers_are_walked_and_no_more() {
    use Extension::{Destination, HopByHop, Mobility, Routing};
    for (extensions, expected) in [
        (vec![HopByHop, Destination, Routing(4), Destination], PASS),
        (vec![Destination; 5], Err("too many extension headers")),
        (vec![Routing(0)], Err("routing header")),
        (vec![Mobility], Err("unknown extension header")),
    ] {
        let mut kernel = kernel();
        let body = Body::Tcp {
            source: 40_000,
            destination: 22,
            flags: SYN,
        };
        let (source, destination) = (
            "fd00:a:b:c:d:e:f:2".parse().unwrap(),
            "fd00:a:b:c:d:e:f:1".parse().unwrap(),
        );
        let mut packet = Packet::new(Ingress, source, destination, body);
        packet.extensions = extensions.clone();
        assert_eq!(
            kernel.outcome(Ingress, &packet.bytes()),
            expected,
            "{extensions:?}"
        );
    }
}

#[test]
fn every_packet_that_cannot_be_read_has_a_reason_of_its_own() {
    let mut kernel = kernel();
    let changed = |at: usize, byte: u8| {
        let mut packet = tcp(Ingress, SYN);
        packet[at] = byte;
        packet
    };
    let refused = |kind| packet(PEER, Ingress, Body::Icmp(kind)).bytes();
    let mut foreign_quote = error(PEER, 3, 1);
    foreign_quote[28 + 15] = 9;
    for (packet, reason) in [
        (changed(0, 0x55), "not ip"),
        (changed(0, 0x44), "malformed header"),
        (changed(32, 4 << 4), "malformed header"),
        (tcp(Ingress, SYN)[..30].to_vec(), "truncated"),
        (changed(33, 3), "tcp flags"),
        (changed(33, 0), "tcp flags"),
        (refused(5), "icmp refused"),
        (foreign_quote, "icmp error malformed"),
        (changed(15, 9), "unknown identity"),
        (changed(15, 1), "own address"),
        (changed(19, 7), "unknown local address"),
        (changed(16, 224), "multicast"),
        (changed(33, ACK), "no flow"),
    ] {
        assert_eq!(kernel.outcome(Ingress, &packet), Err(reason));
    }
}

/// To a port that the peer may ask.
fn question() -> Body {
    Body::Udp {
        source: 4_000,
        destination: 53,
    }
}

/// A host that was told to heed them would send the packet on, where the policy was not asked about.
#[test]
fn source_routes_with_a_stop_left_are_refused() {
    let mut kernel = kernel();
    for (options, expected) in [
        (&[131, 7, 4, 172, 20, 0, 9, 0][..], Err("source route")),
        (&[137, 7, 4, 172, 20, 0, 9, 0], Err("source route")),
        (&[1, 131, 7, 4, 172, 20, 0, 9], Err("source route")),
        (
            &[1, 1, 131, 11, 8, 10, 0, 0, 1, 172, 20, 9],
            Err("source route"),
        ),
        (
            &[148, 4, 0, 0, 137, 7, 4, 172, 20, 0, 9, 1],
            Err("source route"),
        ),
        // At its end, and what is none: a list of hosts that were passed.
        (&[131, 7, 8, 172, 20, 0, 9, 0], PASS),
        (&[131, 7, 7, 172, 20, 0, 9, 0], PASS),
        (&[131, 7, 3, 172, 20, 0, 9, 0], PASS),
        (&[7, 7, 4, 0, 0, 0, 0, 0], PASS),
        (&[148, 4, 0, 0], PASS),
        (&[1; 40], PASS),
    ] {
        let mut packet = packet(PEER, Ingress, question());
        packet.options = options.len();
        let mut bytes = packet.bytes();
        bytes[20..20 + options.len()].copy_from_slice(options);
        assert_eq!(kernel.outcome(Ingress, &bytes), expected, "{options:?}");
        // The same bytes are data behind the header.
        let mut data = self::packet(PEER, Ingress, question()).bytes();
        data.extend(options);
        assert_eq!(kernel.outcome(Ingress, &data), PASS);
    }
    // Nor are ports that follow options: 131, 7, 4.
    let body = Body::Udp {
        source: 131 << 8 | 7,
        destination: 4 << 8,
    };
    let mut ports = packet(PEER, Ingress, body);
    ports.options = 4;
    assert_eq!(kernel.outcome(Ingress, &ports.bytes()), Err("no rule"));
    // At whichever byte it begins.
    for before in 0..8 {
        let mut options = vec![1; before];
        options.extend([131, 7, 4, 172, 20, 0, 9]);
        options.resize(options.len().next_multiple_of(4), 0);
        let mut packet = packet(PEER, Ingress, question());
        packet.options = options.len();
        let mut bytes = packet.bytes();
        bytes[20..20 + options.len()].copy_from_slice(&options);
        assert_eq!(
            kernel.outcome(Ingress, &bytes),
            Err("source route"),
            "{before}"
        );
    }
    // At the end of the longest header.
    let mut packet = packet(PEER, Ingress, question());
    packet.options = 40;
    let mut bytes = packet.bytes();
    bytes[53..60].copy_from_slice(&[131, 7, 4, 172, 20, 0, 9]);
    assert_eq!(kernel.outcome(Ingress, &bytes), Err("source route"));
    for kind in [1, 2, 3, 4, 253] {
        for (left, expected) in [
            (0, PASS),
            (1, Err("source route")),
            (255, Err("source route")),
        ] {
            let mut packet = from_peer(true, question());
            packet.extensions = vec![Extension::HopByHop, Extension::Routing(kind)];
            let mut bytes = packet.bytes();
            bytes[40 + 8 + 3] = left;
            assert_eq!(kernel.outcome(Ingress, &bytes), expected, "{kind} {left}");
        }
    }
}

/// Its options too, which nobody reads here: whoever does reads past the end.
#[test]
fn a_tcp_header_must_be_there_to_its_end() {
    for v6 in [false, true] {
        let mut kernel = kernel();
        let syn = |flags| {
            let body = Body::Tcp {
                source: 40_000,
                destination: 22,
                flags,
            };
            from_peer(v6, body)
        };
        let at = syn(SYN).header();
        let whole = syn(SYN).bytes();
        // Of no flow yet, and of one that stands, which goes the short way.
        for round in 0..2 {
            for cut in at + 14..at + 20 {
                let outcome = kernel.outcome(Ingress, &whole[..cut]);
                assert_eq!(outcome, Err("truncated"), "{v6} {round} {cut}");
            }
            for words in 6..=15_u8 {
                let mut longer = whole.clone();
                longer[at + 12] = words << 4;
                assert_eq!(kernel.outcome(Ingress, &longer), Err("truncated"));
                longer.resize(at + usize::from(words) * 4 - 1, 0);
                assert_eq!(kernel.outcome(Ingress, &longer), Err("truncated"));
            }
            let mut longest = whole.clone();
            longest[at + 12] = 15 << 4;
            longest.resize(at + 60, 0);
            assert_eq!(kernel.outcome(Ingress, &longest), PASS);
            assert_eq!(kernel.outcome(Ingress, &whole), PASS);
        }
    }
}

#[test]
fn a_protocol_without_a_header_needs_no_more_than_that_of_ip() {
    let mut kernel = kernel();
    for v6 in [false, true] {
        let gre = from_peer(v6, Body::Other(47));
        let bytes = gre.bytes();
        for (length, reason) in [(gre.header(), "no rule"), (gre.header() - 1, "truncated")] {
            let outcome = kernel.outcome(Ingress, &bytes[..length]);
            assert_eq!(outcome, Err(reason), "{v6} {length}");
        }
    }
}

#[test]
fn a_header_must_be_there_to_its_end_though_nobody_reads_it() {
    let mut kernel = kernel();
    let gre = |v6| from_peer(v6, Body::Other(47));
    let mut packets = vec![Packet {
        options: 8,
        ..gre(false)
    }];
    for extension in [
        Extension::HopByHop,
        Extension::Routing(4),
        Extension::Destination,
    ] {
        packets.push(Packet {
            extensions: vec![Extension::HopByHop, extension],
            ..gre(true)
        });
    }
    for packet in packets {
        let bytes = packet.bytes();
        for (length, reason) in [
            (packet.header(), "no rule"),
            (packet.header() - 1, "truncated"),
        ] {
            let outcome = kernel.outcome(Ingress, &bytes[..length]);
            assert_eq!(outcome, Err(reason), "{length} of {packet:?}");
        }
    }
}

#[test]
fn what_is_fragmented_may_begin_with_an_extension_header() {
    let mut kernel = kernel();
    let fragment = |offset: u8, id| {
        let mut packet = from_peer(true, Body::Other(44)).bytes();
        packet.truncate(40);
        packet.extend([60, 0, 0, offset << 3 | 1, 0, 0, 0, id]);
        packet.extend([17, 0, 1, 0, 0, 0, 0, 0]);
        packet.extend([0x0f, 0xa0, 0, 53, 0, 8, 0, 0]);
        packet
    };
    assert_eq!(kernel.outcome(Ingress, &fragment(0, 1)), PASS);
    let keys: Vec<_> = kernel.flows().iter().map(|flow| flow.key).collect();
    assert_eq!((keys[0].local_port.get(), keys[0].proto), (53, 17));
    assert_eq!(kernel.outcome(Ingress, &fragment(9, 1)), PASS);
    let lost = Err("fragment without first");
    assert_eq!(kernel.outcome(Ingress, &fragment(9, 2)), lost);
}

#[test]
fn fragments_are_told_apart_by_all_that_they_have() {
    let mut kernel = kernel();
    let lost = Err("fragment without first");
    for v6 in [false, true] {
        let fragment = |id, offset, more| {
            let mut packet = from_peer(v6, UDP);
            packet.fragment = Some(Fragment { id, offset, more });
            packet
        };
        let keys: Vec<_> = kernel.fragments().keys().map(Result::unwrap).collect();
        for key in keys {
            kernel.fragments().remove(&key).unwrap();
        }
        let first = fragment(4, 0, true);
        let now = kernel.at_once(|kernel, now| {
            assert!(kernel.run(Ingress, &first.bytes()).0);
            now
        });
        let left: Vec<_> = kernel.fragments().iter().map(Result::unwrap).collect();
        let key = FragmentKey {
            remote: first.source.into(),
            local: first.destination.into(),
            id: Be32::new(4),
            proto: if v6 { 0 } else { 17 },
            direction: 0,
            pad: [0; 2],
        };
        let entry = FragmentEntry {
            last_seen: now,
            remote_port: Be16::new(4_000),
            local_port: Be16::new(53),
            proto: 17,
            pad: [0; 3],
        };
        assert_eq!(left, [(key, entry)]);
        assert_eq!(
            kernel.outcome(Ingress, &fragment(5, 9, false).bytes()),
            lost
        );
        assert_eq!(kernel.outcome(Ingress, &fragment(4, 9, true).bytes()), PASS);
        assert_eq!(kernel.outcome(Ingress, &fragment(4, 3, true).bytes()), PASS);
        for offset in [1, 2] {
            let near = fragment(4, offset, true).bytes();
            assert_eq!(kernel.outcome(Ingress, &near), Err("tiny fragment"));
        }
        let mut back = fragment(4, 9, false);
        back.direction = Egress;
        (back.source, back.destination) = (first.destination, first.source);
        assert_eq!(kernel.outcome(Egress, &back.bytes()), lost);
        let mut sctp = fragment(4, 9, false);
        sctp.body = Body::Other(132);
        // Of IPv6 only the first fragment says which protocol it is, whatever later ones say.
        let expected = if v6 { PASS } else { lost };
        assert_eq!(kernel.outcome(Ingress, &sctp.bytes()), expected);
        // A whole packet and one that is refused leave nothing.
        let keys = |kernel: &Kernel| kernel.fragments().keys().count();
        let whole = from_peer(v6, UDP);
        let mut longer = whole.clone();
        if v6 {
            longer.extensions = vec![Extension::Destination];
        } else {
            longer.options = 4;
        }
        for whole in [whole, longer, fragment(6, 0, false)] {
            assert_eq!(kernel.outcome(Ingress, &whole.bytes()), PASS);
        }
        let mut denied = fragment(6, 0, true);
        denied.body = Body::Udp {
            source: 4_000,
            destination: 54,
        };
        assert_eq!(kernel.outcome(Ingress, &denied.bytes()), Err("no rule"));
        assert_eq!(keys(&kernel), 1);
        // A first fragment that comes again begins anew.
        let again = kernel.at_once(|kernel, now| {
            let old = FragmentEntry {
                last_seen: now.wrapping_sub(1),
                remote_port: Be16::new(1),
                ..entry
            };
            kernel.fragments().insert(key, old, 0).unwrap();
            assert!(kernel.run(Ingress, &first.bytes()).0);
            let entry = FragmentEntry {
                last_seen: now,
                ..entry
            };
            kernel.fragments().get(&key, 0).unwrap() == entry
        });
        assert!(again);
        // To the nanosecond.
        for (age, expected) in [(30_000_000_000, true), (30_000_000_001, false)] {
            let later = fragment(4, 9, true).bytes();
            let passes = kernel.at_once(|kernel, now| {
                let entry = FragmentEntry {
                    last_seen: now.wrapping_sub(age),
                    ..entry
                };
                kernel.fragments().insert(key, entry, 0).unwrap();
                kernel.run(Ingress, &later).0
            });
            assert_eq!(passes, expected, "{age} ns");
        }
    }
}

#[test]
fn every_kind_of_extension_header_is_known_by_its_number() {
    let mut kernel = kernel();
    for number in 0..=255_u8 {
        let mut packet = from_peer(true, Body::Other(number)).bytes();
        // What it would be the header of: of length 8, before a UDP header.
        packet.truncate(40);
        packet.extend([17, 0, 1, 0, 0, 0, 0, 0]);
        packet.extend([0x0f, 0xa0, 0, 53, 0, 8, 0, 0]);
        kernel.set_flows(&[]);
        let expected = match number {
            0 | 43 | 60 => PASS,
            44 => Err("fragment without first"),
            135 | 139 | 140 | 253 | 254 => Err("unknown extension header"),
            6 => Err("malformed header"),
            // Policy knows both ICMPs by their numbers alone.
            1 | 58 => PASS,
            _ => Err("no rule"),
        };
        assert_eq!(kernel.outcome(Ingress, &packet), expected, "{number}");
    }
}

#[test]
fn extension_headers_are_as_long_as_they_say() {
    let mut kernel = kernel();
    let udp = [0x0f, 0xa0, 0, 53, 0, 8, 0, 0];
    for (number, length) in [(0, 1), (60, 3), (43, 2), (60, 0)] {
        let mut packet = from_peer(true, Body::Other(number)).bytes();
        packet.truncate(40);
        packet.extend([17, length, 1, 0, 0, 0, 0, 0]);
        packet.extend(vec![0; 8 * usize::from(length)]);
        packet.extend(udp);
        kernel.set_flows(&[]);
        assert_eq!(kernel.outcome(Ingress, &packet), PASS, "{number}");
        let keys: Vec<_> = kernel.flows().iter().map(|flow| flow.key).collect();
        assert_eq!((keys[0].local_port.get(), keys[0].proto), (53, 17));
        packet.pop();
        assert_eq!(kernel.outcome(Ingress, &packet), Err("truncated"));
    }
    // Of routing headers, type 0 alone bounces packets.
    for kind in 0..=255_u8 {
        let mut packet = from_peer(true, UDP);
        packet.extensions = vec![Extension::Routing(kind)];
        let expected = if kind == 0 {
            Err("routing header")
        } else {
            PASS
        };
        assert_eq!(kernel.outcome(Ingress, &packet.bytes()), expected, "{kind}");
    }
    // A fragment header may be the fourth, not the fifth.
    for (before, expected) in [(3, PASS), (4, Err("too many extension headers"))] {
        let mut packet = from_peer(true, UDP);
        packet.extensions = vec![Extension::Destination; before];
        packet.fragment = Some(Fragment {
            id: 1,
            offset: 0,
            more: true,
        });
        assert_eq!(kernel.outcome(Ingress, &packet.bytes()), expected);
        packet.fragment = Some(Fragment {
            id: 1,
            offset: 7,
            more: false,
        });
        assert_eq!(kernel.outcome(Ingress, &packet.bytes()), expected);
    }
}
