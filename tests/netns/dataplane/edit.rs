//! What both policies allow passes at every moment of an edit, also where the edit gives its ends other numbers.
//!
//! ```text
//!   operator ── UDP 9000, a port of its own for each datagram ──► node
//!   operator ── UDP 9000, flows that send now and then ─────────► node
//! ```

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesh_tests::mesh::{Family, Mesh};
use mesh_tests::{Lab, scaled, until};

use super::field::{PORT, SOON, backend};

const EDITS: usize = 20;
const PAUSE: Duration = Duration::from_millis(150);
const PACE: Duration = Duration::from_millis(4);
/// Each sends a datagram in turn: one every 160 ms, so that many a one sends first while an edit is made.
const STANDING: usize = 40;

/// Another rule, of other nodes: everybody is named by it, so no group of addresses stays what it was.
fn policy(other: &str) -> String {
    format!(
        r#"{{
    "tagOwners": {{"tag:operator": [], "tag:node": [], "tag:developer": [], "tag:sandbox": []}},
    "acls": [
        {{"action": "accept", "proto": "udp", "src": ["tag:operator"], "dst": ["tag:node:{PORT}"]}},
        {other}
    ],
}}"#
    )
}

const OTHER: &str =
    r#"{"action": "accept", "proto": "udp", "src": ["*"], "dst": ["tag:developer:9200"]},"#;

#[test]
fn an_edit_costs_nobody_a_packet_whom_both_policies_allow() {
    let lab = Lab::of_release_build().unwrap();
    let mesh = Mesh::of_roles(lab, &policy(""), backend()).unwrap();
    let (node, operator) = (mesh.node("node"), mesh.node("operator"));
    let to = (node.address(Family::V4).unwrap(), PORT);
    let open = || UdpSocket::bind(("0.0.0.0", 0)).unwrap();
    let standing = operator.host.inside(|| [(); STANDING].map(|()| open()));
    let standing = standing.unwrap();
    let sink = node.host.inside(|| UdpSocket::bind(("0.0.0.0", PORT)));
    let sink = sink.unwrap().unwrap();
    sink.set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    until("datagrams arrive", SOON, || {
        standing[0].send_to(&u32::MAX.to_be_bytes(), to).unwrap();
        sink.recv_from(&mut [0; 4]).is_ok()
    })
    .unwrap();

    let stop = AtomicBool::new(false);
    let (sent, arrived) = std::thread::scope(|scope| {
        let source = scope.spawn(|| {
            operator.host.inside(|| {
                let mut sent = 0_u32;
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    open().send_to(&sent.to_be_bytes(), to).unwrap();
                    let turn = sent as usize / 2 % STANDING;
                    let next = (sent + 1).to_be_bytes();
                    standing[turn].send_to(&next, to).unwrap();
                    sent += 2;
                    std::thread::sleep(scaled(PACE).saturating_sub(begun.elapsed()));
                }
                sent
            })
        });
        let arrived = scope.spawn(|| {
            let mut arrived = BTreeSet::new();
            let mut number = [0; 4];
            // Until nothing more comes.
            while sink.recv_from(&mut number).is_ok() || !stop.load(Ordering::Relaxed) {
                arrived.insert(u32::from_be_bytes(number));
            }
            arrived
        });
        for edit in 0..EDITS {
            let other = if edit % 2 == 0 { OTHER } else { "" };
            mesh.coordinator.set_policy(&policy(other)).unwrap();
            std::thread::sleep(scaled(PAUSE));
        }
        stop.store(true, Ordering::Relaxed);
        (source.join().unwrap().unwrap(), arrived.join().unwrap())
    });
    let lost: Vec<u32> = (0..sent)
        .filter(|number| !arrived.contains(number))
        .collect();
    println!("figure: {} of {sent} lost over {EDITS} edits", lost.len());
    assert!(sent > 500, "{sent}");
    assert!(
        lost.is_empty(),
        "of {sent}, even numbers of new flows: {lost:?}"
    );
    let text = node
        .host
        .run("mesh", &["flows", "--verdict", "denied"])
        .unwrap();
    assert!(!text.contains("operator"), "{text}");
}
