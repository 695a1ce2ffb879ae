//! Two flows in one place, which nobody can bring about who does not know the secret.

use std::net::IpAddr;

use mesh_common::flow::{FlowKey, Stage};
use mesh_core::Direction::{Egress, Ingress};

use crate::kernel::Kernel;
use crate::packet::{Body, Packet};
use crate::scene::*;

/// A word counts by its product with the other of its pair: makes that nothing for flows like this one.
fn disregard(kernel: &Kernel, key: &FlowKey, word: usize) {
    let pair = word ^ 1;
    let nothing = 0_u32.wrapping_sub(key.words()[pair]);
    kernel.configure(|config| config.secret.0[pair] = nothing);
}

/// What peer 2 may send from this port, and the key of its flow.
fn datagram(source: u16) -> (Packet, FlowKey) {
    let packet = from_peer(
        true,
        Body::Udp {
            source,
            destination: 53,
        },
    );
    let key = FlowKey {
        remote: packet.source.into(),
        local: packet.destination.into(),
        remote_port: mesh_common::Be16::new(source),
        local_port: mesh_common::Be16::new(53),
        proto: 17,
        ..FlowKey::NONE
    };
    (packet, key)
}

fn answer(to: &Packet) -> Packet {
    let Body::Udp {
        source,
        destination,
    } = to.body
    else {
        panic!("a datagram: {to:?}");
    };
    let body = Body::Udp {
        source: destination,
        destination: source,
    };
    Packet::new(Egress, to.destination, to.source, body)
}

/// The same but for one word of its key, and forbidden.
fn with_another(word: usize, packet: &Packet) -> Packet {
    let mut packet = packet.clone();
    let other = |address: IpAddr, word: usize| match address {
        IpAddr::V6(address) => {
            let flipped = address.to_bits() ^ 1 << (32 * (3 - word));
            IpAddr::from(flipped.to_be_bytes())
        }
        IpAddr::V4(_) => panic!("an IPv4 address has one word"),
    };
    let (source, destination) = (4_000, 53);
    match word {
        0..4 => packet.source = other(packet.source, word),
        4..8 => packet.destination = other(packet.destination, word - 4),
        8 => {
            let destination = 52;
            packet.body = Body::Udp {
                source,
                destination,
            };
        }
        _ => {
            packet.body = Body::Sctp {
                source,
                destination,
            };
        }
    }
    packet
}

#[test]
fn a_flow_is_told_by_every_word_of_its_key_from_one_in_its_place() {
    let (known, key) = datagram(4_000);
    for word in 0..10 {
        for stage in [Stage::HalfOpen, Stage::Established] {
            let mut kernel = kernel();
            disregard(&kernel, &key, word);
            assert_eq!(kernel.outcome(Ingress, &known.bytes()), PASS);
            if stage == Stage::Established {
                assert_eq!(kernel.outcome(Egress, &answer(&known).bytes()), PASS);
            }
            let flow = kernel.flows()[0];
            assert_eq!((flow.stage, flow.key), (stage, key));
            let other = with_another(word, &known);
            let outcome = kernel.outcome(Ingress, &other.bytes());
            assert!(outcome.is_err(), "word {word}, {stage:?}");
        }
    }
}

#[test]
fn who_comes_second_to_a_place_is_not_established_while_the_first_is() {
    let ((first, first_key), (second, second_key)) = (datagram(4_000), datagram(4_001));
    let mut kernel = kernel();
    disregard(&kernel, &first_key, 8);
    let start = kernel.now();
    let stages = |kernel: &Kernel| -> Vec<_> {
        let flows = kernel.flows().into_iter();
        flows.map(|flow| (flow.stage, flow.key)).collect()
    };
    for seconds in 0..4 {
        kernel.at(start + (seconds << 30), |kernel| {
            for packet in [&first, &second] {
                assert_eq!(kernel.outcome(Ingress, &packet.bytes()), PASS);
                assert_eq!(kernel.outcome(Egress, &answer(packet).bytes()), PASS);
            }
        });
        assert_eq!(
            stages(&kernel),
            [
                (Stage::HalfOpen, second_key),
                (Stage::Established, first_key)
            ]
        );
    }
    assert_eq!(kernel.held(2), [1, 0]);
    kernel.ct_est().remove(&first_key).unwrap();
    kernel.at(start + (4 << 30), |kernel| {
        assert_eq!(kernel.outcome(Egress, &answer(&second).bytes()), PASS);
    });
    assert_eq!(stages(&kernel), [(Stage::Established, second_key)]);
}
