//! Source routes that lead past the guard: hosts that heed them make the next stop the destination.

use mesh_common::DropReason;
use mesh_core::Direction::Ingress;

use crate::kernel::Kernel;
use crate::scene::*;

const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;

const OURS: [u8; 4] = [100, 64, 0, 1];
const OTHERS: [u8; 4] = [100, 64, 0, 2];

fn v6(text: &str) -> [u8; 16] {
    text.parse::<std::net::Ipv6Addr>().unwrap().octets()
}

/// From one neighbour to the node's address on that network, with options.
fn v4(options: &[u8]) -> Vec<u8> {
    let header = 20 + options.len();
    let mut frame = vec![0; 12];
    frame.extend([0x08, 0, 0x40 | (header / 4) as u8, 0]);
    frame.extend((header as u16 + 8).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend([192, 168, 1, 2, 192, 168, 1, 1]);
    frame.extend(options);
    frame.extend([0; 8]);
    frame
}

/// The same of IPv6, with headers of these kinds, which say themselves what is next.
fn with(first: u8, headers: &[&[u8]]) -> Vec<u8> {
    let headers = headers.concat();
    let mut frame = vec![0; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((headers.len() as u16 + 8).to_be_bytes());
    frame.extend([first, 64]);
    frame.extend(v6("2001:db8::2"));
    frame.extend(v6("2001:db8::1"));
    frame.extend(headers);
    frame.extend([0; 8]);
    frame
}

/// A routing header of a type, with so many stops left of these.
fn routing(next: u8, kind: u8, left: u8, stops: &[[u8; 16]]) -> Vec<u8> {
    let mut header = vec![next, stops.len() as u8 * 2, kind, left, 0, 0, 0, 0];
    header.extend(stops.concat());
    header
}

fn check(kernel: &Kernel, frame: &[u8], expected: u32, what: &str) {
    let outcome = kernel.run_program("guard", frame, 1).0;
    assert_eq!(outcome, expected, "{what}");
}

#[test]
fn options_that_name_us_anywhere_are_dropped() {
    let kernel = kernel();
    // Loose and strict source routes, a route to be recorded, time stamps.
    for kind in [131, 137, 7, 68] {
        for before in 0..=3 {
            for stops in 1..=(9 - usize::from(before > 0)) {
                for at in 0..stops {
                    let mut options = vec![1; before];
                    options.extend([kind, 3 + 4 * stops as u8, 4]);
                    let first = options.len();
                    options.extend(OTHERS.repeat(stops));
                    options.resize(options.len().next_multiple_of(4), 0);
                    check(&kernel, &v4(&options), NEXT, "somebody else's");
                    options[first + 4 * at..][..4].copy_from_slice(&OURS);
                    check(&kernel, &v4(&options), DROP, "ours");
                }
            }
        }
    }
    check(&kernel, &v4(&[0; 40]), NEXT, "padding");
    let what = "before anybody has told it ours";
    check(&Kernel::new(), &v4(&[0; 40]), NEXT, what);
    // In the payload it is nobody's business.
    let mut frame = v4(&[1; 4]);
    frame[14 + 24..][..4].copy_from_slice(&OURS);
    check(&kernel, &frame, NEXT, "behind the header");
    // Half an address is none, and what is cut off is for the kernel to refuse.
    let mut options = vec![131, 7, 4];
    options.extend(OURS);
    options.push(0);
    let frame = v4(&options);
    for cut in 14 + 20..14 + 20 + 7 {
        check(&kernel, &frame[..cut], NEXT, "cut");
    }
}

#[test]
fn routing_headers_that_lead_to_us_are_dropped() {
    let kernel = kernel();
    let (ours, others) = (v6("fd00:a:b:c:d:e:f:1"), v6("fd00:a:b:c:d:e:f:2"));
    // RFC 5095, 6275, 8754.
    for kind in [0, 2, 4] {
        for stops in 1..=16 {
            let mut route = vec![others; stops];
            let left = stops as u8;
            let frame = with(43, &[&routing(17, kind, left, &route)]);
            check(&kernel, &frame, NEXT, "to somebody else");
            for at in [0, stops / 2, stops - 1] {
                route.fill(others);
                route[at] = ours;
                let frame = with(43, &[&routing(17, kind, left, &route)]);
                check(&kernel, &frame, DROP, "to us");
                let frame = with(43, &[&routing(17, kind, 0, &route)]);
                check(&kernel, &frame, NEXT, "the route is over");
            }
        }
    }
    let mut frame = with(43, &[&routing(17, 4, 1, &[others])]);
    frame.extend([0; 8]);
    frame[14 + 40 + 24..].copy_from_slice(&ours);
    check(&kernel, &frame, NEXT, "behind the header");
    // Compressed, or longer than we read.
    let frame = with(43, &[&routing(17, 3, 1, &[others])]);
    check(&kernel, &frame, DROP, "compressed");
    check(
        &kernel,
        &with(43, &[&routing(17, 3, 0, &[others])]),
        NEXT,
        "over",
    );
    let frame = with(43, &[&routing(17, 4, 1, &[others; 17])]);
    check(&kernel, &frame, DROP, "seventeen stops");
    for stop in [others, [0; 16]] {
        let frame = with(43, &[&routing(17, 4, 1, &[stop])]);
        let what = "before anybody has told it ours";
        check(&Kernel::new(), &frame, NEXT, what);
    }
}

#[test]
fn a_routing_header_is_found_behind_others() {
    let mut kernel = kernel();
    let ours = v6("fd00:a:b:c:d:e:f:1");
    let others = v6("fd00:a:b:c:d:e:f:2");
    let options = |next: u8, units: u8| {
        let mut header = vec![next, units, 1, 4, 0, 0, 0, 0];
        header.resize(8 + usize::from(units) * 8, 0);
        header
    };
    let fragment = |next: u8, offset: u16| {
        let [high, low] = (offset << 3 | 1).to_be_bytes();
        [next, 9, high, low, 0, 0, 0, 7]
    };
    let route = |to| routing(17, 4, 1, &[to]);
    for (to, expected) in [(ours, DROP), (others, NEXT)] {
        for headers in [
            (0, vec![options(43, 0), route(to)]),
            (60, vec![options(43, 2), route(to)]),
            (0, vec![options(60, 1), options(43, 0), route(to)]),
            (44, vec![fragment(43, 0).to_vec(), route(to)]),
            (43, vec![routing(43, 4, 0, &[others]), route(to)]),
            (
                60,
                [vec![options(60, 0); 4], vec![options(43, 0), route(to)]].concat(),
            ),
        ] {
            let (first, headers) = headers;
            let parts: Vec<&[u8]> = headers.iter().map(Vec::as_slice).collect();
            let frame = with(first, &parts);
            check(&kernel, &frame, expected, &format!("{first}: {headers:x?}"));
        }
    }
    let later = with(44, &[&fragment(43, 1), &route(ours)]);
    check(&kernel, &later, NEXT, "a later fragment has no headers");
    let later = with(44, &[&fragment(43, 32), &route(ours)]);
    check(&kernel, &later, NEXT, "a later fragment has no headers");
    let payload = with(17, &[&route(ours)]);
    check(&kernel, &payload, NEXT, "what looks like a header");
    for (more, expected) in [(5, NEXT), (6, DROP)] {
        let many = [vec![options(60, 0); more], vec![options(17, 0)]].concat();
        let parts: Vec<&[u8]> = many.iter().map(Vec::as_slice).collect();
        check(
            &kernel,
            &with(60, &parts),
            expected,
            "what is behind so many?",
        );
    }
    let whole = with(43, &[&route(ours)]);
    for cut in 14 + 40..14 + 40 + 24 {
        check(&kernel, &whole[..cut], NEXT, "cut");
    }
    // It is counted and told as any other for us.
    let slot = (Ingress, DropReason::Guarded);
    let before = kernel.dataplane().counters().unwrap().dropped[&slot].packets;
    kernel.events();
    check(&kernel, &whole, DROP, "again");
    let counters = kernel.dataplane().counters().unwrap();
    assert_eq!(counters.dropped[&slot].packets, before + 1);
    let denials = kernel.denials();
    assert!(denials.keys().any(|key| key.unwrap().proto == 43));
}
