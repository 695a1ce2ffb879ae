//! A large mesh on one device.

use super::*;

const PEERS: u16 = 1000;

/// Peers nobody runs, with numbers from 1000 on.
fn crowd() -> BTreeMap<NodePublic, PeerConfig> {
    let peer = |n: u16| {
        let mut seed = [9; 32];
        seed[1..3].copy_from_slice(&n.to_be_bytes());
        let [high, low] = n.to_be_bytes();
        let config = PeerConfig {
            endpoint: Some((Ipv4Addr::new(198, 51, 100, 250), n).into()),
            allowed_ips: nets(&[
                &format!("100.65.{high}.{low}/32"),
                &format!("fd00:64::1:{n:x}/128"),
                &format!("10.{high}.{low}.0/24"),
            ]),
            keepalive: None,
        };
        (NodeKey::from_seed(seed).public(), config)
    };
    (0..PEERS).map(peer).collect()
}

#[test]
fn a_thousand_peers_come_and_go_around_a_session() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (mut left, right) = pair(&a, &b);
    assert_reaches(&a, right.id.v4());
    let before = left.peer_status(right.id);

    let begun = std::time::Instant::now();
    left.config.peers.extend(crowd());
    left.apply();
    assert_eq!(left.status().peers.len(), usize::from(PEERS) + 1);
    let took = begun.elapsed();
    assert!(
        took < mesh_tests::scaled(Duration::from_secs(5)),
        "{took:?}"
    );
    assert_reaches(&a, right.id.v4());

    for peer in left.config.peers.values_mut() {
        peer.allowed_ips.remove(&net("10.1.0.0/24"));
        peer.allowed_ips.insert(net("10.200.0.0/16"));
    }
    // One prefix that everyone claims: somebody has it, and nothing is left to do.
    left.apply();
    let holders = left.status().peers;
    let holders = holders
        .values()
        .filter(|peer| peer.allowed_ips.contains(&net("10.200.0.0/16")));
    assert_eq!(holders.count(), 1);

    left.config.peers.retain(|key, _| *key == right.id.public());
    left.apply();
    assert_reaches(&a, right.id.v4());
    let after = left.peer_status(right.id);
    assert!(
        after.handshake_age > before.handshake_age,
        "no new handshake"
    );
}
