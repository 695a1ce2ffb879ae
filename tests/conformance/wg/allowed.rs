//! Cryptokey routing: who may send from an address, and who is sent to.

use std::net::UdpSocket;

use super::*;

/// Where datagrams are counted.
const SINK: u16 = 7777;

fn sink(host: &Host) -> UdpSocket {
    let socket = host.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, SINK)).unwrap());
    let socket = socket.unwrap();
    socket
        .set_read_timeout(Some(mesh_tests::scaled(SOON)))
        .unwrap();
    socket
}

/// Sends one datagram from `source`, which the host is given for the purpose.
fn send_from(host: &Host, source: IpAddr, to: IpAddr, text: &[u8]) {
    host.run(
        "ip",
        &["addr", "replace", &format!("{source}/32"), "dev", INTERFACE],
    )
    .unwrap();
    host.inside(|| {
        let socket = UdpSocket::bind((source, 0)).unwrap();
        socket.send_to(text, (to, SINK)).unwrap();
    })
    .unwrap();
}

/// The next datagram's text and sender.
fn next(sink: &UdpSocket) -> (Vec<u8>, IpAddr) {
    let mut buffer = [0; 64];
    let (len, from) = sink.recv_from(&mut buffer).unwrap();
    (buffer[..len].to_vec(), from.ip())
}

/// ```text
///   victim 100.64.0.1 ──┐
///                       ├── b 100.64.0.2
///   forger 100.64.0.3 ──┘     allows the forger 10.0.0.0/8, the victim 10.1.2.3
/// ```
#[test]
fn a_forged_inner_source_gets_nothing_through() {
    let lab = lab();
    let (b, m) = (lab.host("b").unwrap(), lab.host("m").unwrap());
    let (mut target, mut forger) = (Node::new(&b, 2), Node::new(&m, 3));
    let victim = Id(1);
    target.peer(victim, None);
    target
        .peer_config(victim)
        .allowed_ips
        .insert(net("10.1.2.3/32"));
    target.peer(forger.id, None);
    target
        .peer_config(forger.id)
        .allowed_ips
        .insert(net("10.0.0.0/8"));
    target.apply();
    forger.peer(target.id, Some(target.endpoint()));
    assert_reaches(&m, target.id.v4());

    let sink = sink(&b);
    // The victim's own address, an address that nobody has, and the one that lies in the forger's
    // prefix but belongs to the victim.
    for forged in ["100.64.0.1", "203.0.113.1", "10.1.2.3"] {
        send_from(&m, forged.parse().unwrap(), target.id.v4(), b"forged");
    }
    for own in ["10.9.9.9", "100.64.0.3"] {
        send_from(&m, own.parse().unwrap(), target.id.v4(), b"own");
        assert_eq!(next(&sink), (b"own".to_vec(), own.parse().unwrap()));
    }
}

#[test]
fn a_removed_peer_is_cut_off_and_the_others_keep_their_sessions() {
    let lab = lab();
    let hosts = ["a", "b", "c"].map(|name| lab.host(name).unwrap());
    let [mut a, mut b, mut c] = [1, 2, 3].map(|n| Node::new(&hosts[usize::from(n) - 1], n));
    for other in [&mut b, &mut c] {
        a.peer(other.id, Some(other.endpoint()));
        other.peer(a.id, None);
        assert_reaches(a.host, other.id.v4());
    }
    let before = a.peer_status(c.id);

    a.config.peers.remove(&b.id.public());
    a.apply();
    assert_cut_off(a.host, b.id.v4());
    assert_cut_off(b.host, a.id.v4());
    assert_reaches(c.host, a.id.v4());
    let after = a.peer_status(c.id);
    assert!(
        after.handshake_age > before.handshake_age,
        "no new handshake"
    );
    assert!(after.tx_bytes > before.tx_bytes);
}

#[test]
fn a_prefix_that_moves_takes_its_traffic_along() {
    let lab = lab();
    let hosts = ["a", "b", "c"].map(|name| lab.host(name).unwrap());
    let [mut a, mut b, mut c] = [1, 2, 3].map(|n| Node::new(&hosts[usize::from(n) - 1], n));
    let shared: IpAddr = "10.7.7.7".parse().unwrap();
    for other in [&mut b, &mut c] {
        a.peer(other.id, Some(other.endpoint()));
        other.peer(a.id, None);
        other.routes.addresses.insert(shared.into());
        other.apply_routes();
    }
    a.routes.routes.insert(shared.into());
    a.apply_routes();

    let mut holders = [b.id, c.id, b.id].into_iter();
    let mut holder = holders.next().unwrap();
    a.peer_config(holder).allowed_ips.insert(shared.into());
    a.apply();
    assert_reaches(a.host, shared);
    for next in holders {
        a.peer_config(holder).allowed_ips.remove(&shared.into());
        a.peer_config(next).allowed_ips.insert(shared.into());
        a.apply();
        let quiet = a.peer_status(holder).tx_bytes;
        let busy = a.peer_status(next).tx_bytes;
        assert_reaches(a.host, shared);
        assert!(a.peer_status(next).tx_bytes > busy);
        assert_eq!(a.peer_status(holder).tx_bytes, quiet);
        holder = next;
    }
    a.peer_config(holder).allowed_ips.remove(&shared.into());
    a.apply();
    assert_cut_off(a.host, shared);
}
