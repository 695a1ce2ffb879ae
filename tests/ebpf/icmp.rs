//! ICMP: what each type is, and the errors, which speak of flows that are not their own.

use std::net::IpAddr;

use mesh_common::budget::PeerLoad;
use mesh_common::policy::PolicyPrefix;
use mesh_common::{PolicyEntry, PolicyKey};
use mesh_core::Direction::{self, Egress, Ingress};
use mesh_core::{Identity, RuleId};

use crate::oracle::Strain;
use crate::packet::{Body, Fragment, Packet};
use crate::scene::*;

#[test]
fn an_icmp_error_passes_for_a_flow_that_stands_by_its_far_end_and_not_too_often() {
    let mut kernel = kernel();
    assert_eq!(
        kernel.outcome(Ingress, &error(PEER, 3, 1)),
        Err("icmp error without flow")
    );
    assert_eq!(
        kernel.outcome(Ingress, &error(PEER, 3, 4)),
        Err("icmp error without flow")
    );
    handshake(&mut kernel);
    let before = kernel.load(2).errors;
    assert_eq!(kernel.outcome(Ingress, &error(PEER, 3, 1)), PASS);
    assert_ne!(kernel.load(2).errors, before);
    assert_eq!(
        kernel.outcome(Ingress, &error(OTHER, 3, 1)),
        Err("icmp error from a third node")
    );
    assert_eq!(
        kernel.outcome(Ingress, &error(OTHER, 3, 4)),
        PASS,
        "too big, whoever noticed"
    );
    kernel.strain(2, Ingress, Some(Strain::Errors));
    assert_eq!(
        kernel.outcome(Ingress, &error(PEER, 11, 0)),
        Err("icmp error rate")
    );
    assert_eq!(kernel.outcome(Ingress, &error(PEER, 3, 4)), PASS);
    assert_eq!(flows(&kernel), (0, 1), "none opens or ends a flow");
}

#[test]
fn icmp_is_what_its_type_says() {
    let mut kernel = kernel();
    for v6 in [false, true] {
        for kind in 0..=255_u8 {
            let expected = match (v6, kind) {
                (false, 8) | (true, 128) => PASS,
                (false, 0) | (true, 129) => NO_FLOW,
                (false, 3 | 4 | 11 | 12) | (true, 1..=4) => Err("icmp error malformed"),
                (false, 5 | 9 | 10) | (true, 133..=137 | 141 | 142 | 148 | 149 | 151..=153) => {
                    Err("icmp refused")
                }
                _ => PASS,
            };
            let remembered = matches!((v6, kind), (false, 8) | (true, 128));
            kernel.set_flows(&[]);
            let packet = from_peer(v6, Body::Icmp(kind)).bytes();
            assert_eq!(kernel.outcome(Ingress, &packet), expected, "{v6} {kind}");
            let flows = usize::from(remembered);
            assert_eq!(kernel.flows().len(), flows, "{v6} {kind}");
        }
    }
}

#[test]
fn an_icmp_error_speaks_of_what_it_quotes() {
    let mut kernel = kernel();
    let mut tables = tables();
    for proto in [132, 47] {
        let row = PolicyKey::new(Identity(18), Identity(16), Ingress, proto, 0);
        let prefix = PolicyPrefix {
            len: PolicyPrefix::ANY_PORT,
            key: row,
        };
        tables.rows.insert(prefix, PolicyEntry::accept(RuleId(9)));
    }
    kernel.apply(&tables);
    let tcp = Body::Tcp {
        source: 40_000,
        destination: 22,
        flags: SYN,
    };
    let sctp = Body::Sctp {
        source: 5_000,
        destination: 7,
    };
    let echo = Body::Echo {
        request: true,
        id: 7,
    };
    let malformed = Err("icmp error malformed");
    let unknown = Err("icmp error without flow");
    for v6 in [false, true] {
        let error = |quoted: &[u8]| {
            let mut packet = from_peer(v6, Body::Icmp(if v6 { 1 } else { 3 })).bytes();
            packet.extend(quoted);
            packet
        };
        for body in [
            tcp.clone(),
            UDP,
            sctp.clone(),
            echo.clone(),
            Body::Other(47),
        ] {
            kernel.set_load(2, PeerLoad::default());
            kernel.set_flows(&[]);
            let opens = from_peer(v6, body.clone());
            // What we have answered, as the one who could not deliver it quotes it.
            let mut answer = opens.clone();
            (answer.source, answer.destination) = (opens.destination, opens.source);
            match &mut answer.body {
                Body::Tcp {
                    source,
                    destination,
                    ..
                }
                | Body::Udp {
                    source,
                    destination,
                }
                | Body::Sctp {
                    source,
                    destination,
                } => std::mem::swap(source, destination),
                Body::Echo { request, .. } => *request = false,
                _ => {}
            }
            let header = answer.header();
            let plain = answer.bytes();
            let mut fragmented = answer.clone();
            fragmented.fragment = Some(Fragment {
                id: 1,
                offset: 0,
                more: true,
            });
            let mut later = answer.clone();
            later.fragment = Some(Fragment {
                id: 1,
                offset: 8,
                more: true,
            });
            let mut foreign = answer.clone();
            foreign.source = opens.source;
            // As much as a quotation must have: 8 bytes behind the header; and less.
            let mut another = plain.clone();
            another[header + 1] ^= 1;
            if matches!(body, Body::Echo { .. }) {
                another = plain.clone();
                another[header + 5] ^= 1;
            }
            let ported = !matches!(body, Body::Other(_));
            let quotes: [(&str, Vec<u8>, _); 7] = [
                ("plain", plain.clone(), PASS),
                ("shortest", plain[..header + 8].to_vec(), PASS),
                (
                    "no more than its header",
                    plain[..header].to_vec(),
                    if ported { malformed } else { PASS },
                ),
                ("first fragment", fragmented.bytes(), PASS),
                ("later fragment", later.bytes(), malformed),
                ("foreign", foreign.bytes(), malformed),
                ("another", another, if ported { unknown } else { PASS }),
            ];
            assert_eq!(
                kernel.outcome(Ingress, &error(&plain)),
                unknown,
                "{v6} {body:?}"
            );
            assert_eq!(kernel.outcome(Ingress, &opens.bytes()), PASS);
            for (what, quote, expected) in quotes {
                let outcome = kernel.outcome(Ingress, &error(&quote));
                assert_eq!(outcome, expected, "{v6} {body:?}, {what}");
            }
            let mut wrong = plain.clone();
            wrong[0] ^= 0x10;
            assert_eq!(kernel.outcome(Ingress, &error(&wrong)), malformed);
            if ported {
                let cut = match body {
                    Body::Echo { .. } => 7,
                    _ => 3,
                };
                let cut = error(&plain[..header + cut]);
                assert_eq!(kernel.outcome(Ingress, &cut), malformed, "{v6} {body:?}");
            }
            if v6 {
                continue;
            }
            let mut options = answer.clone();
            options.options = 8;
            assert_eq!(kernel.outcome(Ingress, &error(&options.bytes())), PASS);
            let mut short = plain.clone();
            short[0] = 0x44;
            assert_eq!(kernel.outcome(Ingress, &error(&short)), malformed);
        }
        // Of a message that neither asks nor answers, and of an error.
        for kind in if v6 { [130, 1] } else { [13, 3] } {
            let mut quoted = from_peer(v6, Body::Icmp(kind));
            (quoted.source, quoted.destination) = (quoted.destination, quoted.source);
            let outcome = kernel.outcome(Ingress, &error(&quoted.bytes()));
            assert_eq!(outcome, malformed, "{v6} {kind}");
        }
    }
}

#[test]
fn an_icmp_error_that_goes_out_speaks_of_what_came_in() {
    let mut kernel = kernel();
    let came = from_peer(false, UDP);
    assert_eq!(kernel.outcome(Ingress, &came.bytes()), PASS);
    let body = Body::IcmpError {
        kind: 3,
        code: 3,
        quoted: Box::new(came),
    };
    let ours = packet(PEER, Egress, body);
    kernel.strain(2, Ingress, Some(Strain::Errors));
    assert_eq!(
        kernel.outcome(Egress, &ours.bytes()),
        PASS,
        "ours are not counted"
    );
    let elsewhere = packet(OTHER, Egress, ours.body);
    assert_eq!(
        kernel.outcome(Egress, &elsewhere.bytes()),
        Err("icmp error malformed")
    );
}

#[test]
fn icmp_is_judged_by_its_type_whenever_it_is_judged() {
    let mut kernel = kernel();
    for v6 in [false, true] {
        let (proto, ask, answer) = if v6 { (58, 128, 129) } else { (1, 8, 0) };
        let only = |port| {
            let mut tables = revoked();
            let row = PolicyKey::new(Identity(18), Identity(16), Ingress, proto, port);
            let prefix = PolicyPrefix {
                len: PolicyPrefix::EXACT,
                key: row,
            };
            tables.rows.insert(prefix, PolicyEntry::accept(RuleId(3)));
            tables
        };
        let echo = |direction: Direction, request: bool| {
            let (far, near): (IpAddr, IpAddr) = if v6 {
                (
                    "fd00:a:b:c:d:e:f:2".parse().unwrap(),
                    "fd00:a:b:c:d:e:f:1".parse().unwrap(),
                )
            } else {
                (PEER.into(), ME.into())
            };
            let (source, destination) = match direction {
                Ingress => (far, near),
                Egress => (near, far),
            };
            let body = Body::Echo { request, id: 7 };
            Packet::new(direction, source, destination, body).bytes()
        };
        kernel.set_flows(&[]);
        kernel.apply(&only(answer));
        assert_eq!(
            kernel.outcome(Ingress, &echo(Ingress, true)),
            Err("no rule")
        );
        kernel.apply(&only(ask));
        assert_eq!(kernel.outcome(Ingress, &echo(Ingress, true)), PASS);
        kernel.apply(&only(ask));
        assert_eq!(kernel.outcome(Egress, &echo(Egress, false)), PASS);
        kernel.apply(&only(ask + 1));
        assert_eq!(kernel.outcome(Egress, &echo(Egress, false)), Err("revoked"));
    }
}
