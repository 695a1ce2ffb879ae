//! The MSS option of a SYN: found wherever it stands, lowered to what fits, and left alone otherwise.

use std::net::IpAddr;

use mesh_core::Direction::{self, Egress, Ingress};
use mesh_core::desired::MTU;

use crate::packet::{Body, Packet};
use crate::scene::*;

/// A packet of the connection that peer 2 opens, with these options and a checksum that is right but
/// for the addresses, which do not change.
fn with_options(v6: bool, direction: Direction, flags: u8, options: &[u8]) -> Vec<u8> {
    let (far, near): (IpAddr, IpAddr) = if v6 {
        (
            "fd00:a:b:c:d:e:f:2".parse().unwrap(),
            "fd00:a:b:c:d:e:f:1".parse().unwrap(),
        )
    } else {
        (PEER.into(), ME.into())
    };
    let (source, destination, ports) = match direction {
        Ingress => (far, near, [40_000, 22]),
        Egress => (near, far, [22, 40_000]),
    };
    let body = Body::Tcp {
        source: ports[0],
        destination: ports[1],
        flags,
    };
    let packet = Packet::new(direction, source, destination, body);
    let at = packet.header();
    let mut bytes = packet.bytes();
    bytes[at + 12] = ((20 + options.len()) / 4 * 16) as u8;
    bytes.extend(options);
    // Data, in which no option is looked for.
    bytes.extend([2, 4, 0x7f, 0xff]);
    let sum = checksum(&bytes[at..]);
    bytes[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
    bytes
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// An MSS of 1460 after these options, padded.
fn after(options: &[u8]) -> (Vec<u8>, usize) {
    let mut all = options.to_vec();
    all.extend([2, 4, 0x05, 0xb4]);
    while !all.len().is_multiple_of(4) {
        all.push(1);
    }
    (all, options.len() + 2)
}

#[test]
fn a_syn_gets_an_mss_that_fits_the_mesh_wherever_the_option_stands() {
    let kernel = kernel();
    for v6 in [false, true] {
        let (header, most) = if v6 { (40, MTU - 60) } else { (20, MTU - 40) };
        for before in [
            &[][..],
            &[1],
            &[1, 1],
            &[1, 1, 1],
            &[4, 2],
            &[4, 2, 4, 2],
            &[4, 8, 1, 1, 1, 1, 1, 1],
            &[3, 3, 7],
            &[8, 10, 2, 4, 9, 9, 2, 4, 9, 9],
            &[1; 11],
            &[3, 3, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        ] {
            let (options, at) = after(before);
            let at = header + 20 + at;
            for (direction, flags) in [(Ingress, SYN), (Egress, SYN_ACK)] {
                let packet = with_options(v6, direction, flags, &options);
                let (passes, out) = kernel.run(direction, &packet);
                assert!(passes);
                let value = u16::from_be_bytes([out[at], out[at + 1]]);
                assert_eq!(value, most, "{v6} {before:?}");
                assert_eq!(checksum(&out[header..]), 0, "{v6} {before:?}");
                // Nothing else has changed.
                let mut again = out;
                again[at..at + 2].copy_from_slice(&packet[at..at + 2]);
                let sum = header + 16..header + 18;
                again[sum.clone()].copy_from_slice(&packet[sum]);
                assert_eq!(again, packet, "{v6} {before:?}");
            }
        }
    }
}

#[test]
fn behind_a_longer_ip_header_a_syn_gets_such_an_mss_too() {
    let kernel = kernel();
    let (options, at) = after(&[]);
    for v6 in [false, true] {
        let mut packet = with_options(v6, Ingress, SYN, &options);
        let (header, most) = if v6 {
            packet[6] = 60;
            packet.splice(40..40, [6, 0, 1, 4, 0, 0, 0, 0]);
            (48, MTU - 60)
        } else {
            packet[0] = 0x46;
            packet.splice(20..20, [1; 4]);
            (24, MTU - 40)
        };
        let (passes, out) = kernel.run(Ingress, &packet);
        assert!(passes);
        let at = header + 20 + at;
        let value = u16::from_be_bytes([out[at], out[at + 1]]);
        assert_eq!(value, most, "{v6}");
        assert_eq!(checksum(&out[header..]), 0, "{v6}");
    }
}

#[test]
fn what_is_no_mss_that_is_too_great_is_left_alone() {
    let kernel = kernel();
    for v6 in [false, true] {
        let [high, low] = (if v6 { MTU - 60 } else { MTU - 40 }).to_be_bytes();
        for (what, options) in [
            ("none", vec![]),
            ("one that fits", vec![2, 4, high, low]),
            ("a small one", vec![2, 4, 2, 0x18]),
            ("behind the end", vec![0, 2, 4, 0x7f, 0xff, 0, 0, 0]),
            ("of another length", vec![2, 5, 0x7f, 0xff, 0x7f, 1, 1, 1]),
            ("of length 2", vec![2, 2, 2, 5, 0x7f, 0xff, 1, 1]),
            (
                "an option without length",
                vec![9, 0, 2, 4, 0x7f, 0xff, 1, 1],
            ),
            ("an option of length 1", vec![9, 1, 2, 4, 0x7f, 0xff, 1, 1]),
            ("an option that is too long", vec![9, 8, 2, 4]),
            ("of which the end is missing", vec![1, 1, 2, 4]),
            ("behind twelve others", after(&[1; 12]).0),
        ] {
            let packet = with_options(v6, Ingress, SYN, &options);
            let (passes, out) = kernel.run(Ingress, &packet);
            assert!(passes, "{what}");
            assert_eq!(out, packet, "{what}");
        }
    }
    // One more than fits, in a SYN; and in a packet that is none.
    let [high, low] = (MTU - 39).to_be_bytes();
    let packet = with_options(false, Ingress, SYN, &[2, 4, high, low]);
    let (_, out) = kernel.run(Ingress, &packet);
    assert_eq!(u16::from_be_bytes([out[42], out[43]]), MTU - 40);
    assert!(passes(&kernel, Egress, SYN_ACK));
    let packet = with_options(false, Ingress, ACK, &[2, 4, 0x7f, 0xff]);
    assert_eq!(kernel.run(Ingress, &packet), (true, packet));
}

#[test]
fn without_a_greatest_mss_none_is_changed() {
    let kernel = kernel();
    kernel.configure(|config| config.mss_v4 = 0);
    let (options, at) = after(&[]);
    let packet = with_options(false, Ingress, SYN, &options);
    assert_eq!(kernel.run(Ingress, &packet), (true, packet));
    let packet = with_options(true, Ingress, SYN, &options);
    let (_, out) = kernel.run(Ingress, &packet);
    assert_eq!(u16::from_be_bytes([out[60 + at], out[61 + at]]), MTU - 60);
    // One that is all but none.
    kernel.configure(|config| config.mss_v4 = 1);
    let packet = with_options(false, Ingress, SYN, &options);
    let (_, out) = kernel.run(Ingress, &packet);
    assert_eq!(u16::from_be_bytes([out[40 + at], out[41 + at]]), 1);
}
