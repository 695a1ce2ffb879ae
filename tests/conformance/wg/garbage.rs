//! Whoever is not a peer gets silence, and whoever talks nonsense an error.

use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;

use super::*;

/// Bytes that look random and are the same in every run (xorshift).
fn noise(seed: u64) -> impl Iterator<Item = u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[0]
    })
}

#[test]
fn garbage_on_the_udp_port_is_met_with_silence() {
    let lab = lab();
    let hosts = ["a", "b", "c"].map(|name| lab.host(name).unwrap());
    let (left, right) = pair(&hosts[0], &hosts[1]);
    assert_reaches(&hosts[0], right.id.v4());

    let stranger = hosts[2]
        .inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap())
        .unwrap();
    stranger.set_nonblocking(true).unwrap();
    for round in 0..2000_u64 {
        let len = [0, 1, 3, 4, 16, 31, 32, 64, 92, 148, 149, 200, 1400][round as usize % 13];
        let mut datagram: Vec<u8> = noise(round).take(len).collect();
        // Mostly of a type that WireGuard knows, so that more than the first check is met.
        if let Some(kind) = datagram.get_mut(..4) {
            kind.copy_from_slice(&[(round % 6) as u8, 0, 0, 0]);
        }
        // The network may be busy; what is not sent is not missed.
        let _ = stranger.send_to(&datagram, right.endpoint());
    }
    assert_reaches(&hosts[0], right.id.v6());
    assert!(stranger.recv(&mut [0; 2048]).is_err(), "an answer");
    let learned = right.peer_status(left.id).endpoint;
    assert_eq!(learned, Some(left.endpoint()));
}

#[test]
fn garbage_on_the_socket_of_wg_is_answered_by_an_error() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (left, right) = pair(&a, &b);
    let path = a.path(&format!("/run/wireguard/{INTERFACE}.sock"));
    if left.backend.kind() == "kernel" {
        assert!(!path.exists(), "wg speaks netlink to the kernel");
        return;
    }
    let ask = |request: &[u8]| {
        let mut stream = UnixStream::connect(&path).unwrap();
        // It may hang up before it has read everything.
        let _ = stream.write_all(request);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    for request in [
        "\n",
        "get=2\n\n",
        "hello\n\n",
        "set=1\nlisten_port=99999\n\n",
        "set=1\npublic_key=00\n\n",
        "set=1\nendpoint=1.2.3.4:5\n\n",
        "get=1\nset=1\n\n",
    ] {
        assert_eq!(ask(request.as_bytes()), "errno=-22\n\n", "{request:?}");
    }
    for seed in 0..50 {
        let request: Vec<u8> = noise(seed).take(300).collect();
        let answer = ask(&request);
        assert!(
            answer.is_empty() || answer.starts_with("errno=-"),
            "{answer:?}"
        );
    }
    // An endless line.
    let mut endless = b"set=1\nprivate_key=".to_vec();
    endless.resize(9 << 20, b'0');
    assert_eq!(ask(&endless), "");
    assert!(ask(b"get=1\n\n").ends_with("errno=0\n\n"));
    assert_reaches(&a, right.id.v4());
}

/// A stranger that knows the public key asks again and again for a session; it hears nothing, and
/// members still shake hands.
#[test]
fn a_stranger_with_the_public_key_hears_nothing() {
    let lab = lab();
    let hosts = ["a", "b", "c"].map(|name| lab.host(name).unwrap());
    let (mut left, mut right) = (Node::new(&hosts[0], 1), Node::new(&hosts[1], 2));
    let mut stranger = Node::new(&hosts[2], 3);
    let target = PeerConfig {
        endpoint: Some(right.endpoint()),
        allowed_ips: right.id.addresses(),
        keepalive: Some(1),
    };
    stranger.config.peers.insert(right.id.public(), target);
    stranger.apply();
    right.peer(left.id, None);
    left.peer(right.id, Some(right.endpoint()));
    assert_reaches(&hosts[0], right.id.v4());
    assert!(!right.status().peers.contains_key(&stranger.id.public()));
    assert_eq!(stranger.peer_status(right.id).rx_bytes, 0, "silence");
}
