//! A model of the device, and what `reconcile` must bring it to.

use proptest::prelude::*;

use super::*;

fn key(n: u8) -> NodePublic {
    NodeKey::from_seed([n; 32]).public()
}

fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn config(peers: &[(u8, PeerConfig)]) -> DeviceConfig {
    DeviceConfig {
        key: NodeKey::from_seed([255; 32]),
        listen_port: 51820,
        fwmark: 7,
        peers: peers.iter().map(|(n, p)| (key(*n), p.clone())).collect(),
    }
}

fn peer(endpoint: Option<&str>, allowed: &[&str]) -> PeerConfig {
    PeerConfig {
        endpoint: endpoint.map(|e| e.parse().unwrap()),
        allowed_ips: nets(allowed),
        keepalive: None,
    }
}

/// Does to `device` what WireGuard does.
fn apply(device: &mut DeviceStatus, ops: &[DeviceOp]) {
    let take = |device: &mut DeviceStatus, nets: &BTreeSet<IpNet>| {
        for peer in device.peers.values_mut() {
            peer.allowed_ips.retain(|net| !nets.contains(net));
        }
    };
    for op in ops {
        match op {
            DeviceOp::SetKey(key) => {
                device.key = Some(key.public());
                device.peers.remove(&key.public());
            }
            DeviceOp::SetListenPort(port) => device.listen_port = *port,
            DeviceOp::SetFwmark(mark) => device.fwmark = *mark,
            DeviceOp::RemovePeer(key) => {
                device.peers.remove(key).expect("a peer that is there");
            }
            DeviceOp::AddPeer(key, config) => {
                take(device, &config.allowed_ips);
                let fresh = PeerStatus {
                    endpoint: config.endpoint,
                    written_endpoint: config.endpoint,
                    allowed_ips: config.allowed_ips.clone(),
                    keepalive: config.keepalive.filter(|s| *s != 0),
                    ..PeerStatus::default()
                };
                assert!(device.peers.insert(*key, fresh).is_none());
            }
            DeviceOp::SetEndpoint(key, endpoint) => {
                let peer = device.peers.get_mut(key).unwrap();
                peer.endpoint = Some(*endpoint);
                peer.written_endpoint = Some(*endpoint);
            }
            DeviceOp::SetKeepalive(key, keepalive) => {
                device.peers.get_mut(key).unwrap().keepalive = *keepalive;
            }
            DeviceOp::AddAllowedIps(key, nets) => {
                take(device, nets);
                device.peers.get_mut(key).unwrap().allowed_ips.extend(nets);
            }
            DeviceOp::ReplaceAllowedIps(key, nets) => {
                take(device, nets);
                device.peers.get_mut(key).unwrap().allowed_ips = nets.clone();
            }
        }
    }
}

fn device(config: &DeviceConfig) -> DeviceStatus {
    let mut device = DeviceStatus::default();
    apply(&mut device, &reconcile(config, &DeviceStatus::default()));
    device
}

#[test]
fn a_roamed_endpoint_stays_until_the_desired_one_changes() {
    let mut wanted = config(&[(1, peer(Some("192.0.2.1:1"), &[]))]);
    let mut device = device(&wanted);
    device.peers.get_mut(&key(1)).unwrap().endpoint = Some("203.0.113.9:9".parse().unwrap());
    assert!(reconcile(&wanted, &device).is_empty());

    wanted.peers.get_mut(&key(1)).unwrap().endpoint = Some("192.0.2.2:2".parse().unwrap());
    let ops = reconcile(&wanted, &device);
    assert!(matches!(ops[..], [DeviceOp::SetEndpoint(..)]), "{ops:?}");
    apply(&mut device, &ops);
    assert!(reconcile(&wanted, &device).is_empty());
}

#[test]
fn an_adopted_endpoint_stays_while_its_session_lives() {
    let wanted = config(&[(1, peer(Some("192.0.2.1:1"), &[]))]);
    let mut device = device(&wanted);
    let adopted = device.peers.get_mut(&key(1)).unwrap();
    adopted.endpoint = Some("203.0.113.9:9".parse().unwrap());
    adopted.written_endpoint = None;
    adopted.handshake_age = Some(Duration::from_secs(100));
    assert!(reconcile(&wanted, &device).is_empty());

    device.peers.get_mut(&key(1)).unwrap().handshake_age = Some(SESSION_LIFETIME);
    assert!(matches!(
        reconcile(&wanted, &device)[..],
        [DeviceOp::SetEndpoint(..)]
    ));
}

#[test]
fn a_moved_prefix_is_never_without_a_holder() {
    let before = config(&[
        (1, peer(None, &["10.0.0.0/8", "100.64.0.1/32"])),
        (2, peer(None, &["100.64.0.2/32"])),
    ]);
    let after = config(&[
        (1, peer(None, &["100.64.0.1/32"])),
        (2, peer(None, &["10.0.0.0/8", "100.64.0.2/32"])),
    ]);
    let mut device = device(&before);
    let ops = reconcile(&after, &device);
    assert!(matches!(ops[..], [DeviceOp::AddAllowedIps(..)]), "{ops:?}");
    apply(&mut device, &ops);
    assert!(reconcile(&after, &device).is_empty());
}

#[test]
fn a_prefix_that_two_peers_claim_settles() {
    let wanted = config(&[
        (1, peer(None, &["10.0.0.0/8"])),
        (2, peer(None, &["10.0.0.0/8"])),
    ]);
    let device = device(&wanted);
    assert!(reconcile(&wanted, &device).is_empty());
    let holders = device.peers.values().filter(|p| !p.allowed_ips.is_empty());
    assert_eq!(holders.count(), 1);
}

#[test]
fn a_device_that_chose_its_port_keeps_it() {
    let mut wanted = config(&[]);
    let device = device(&wanted);
    wanted.listen_port = 0;
    assert!(reconcile(&wanted, &device).is_empty());
}

#[test]
fn the_device_is_never_its_own_peer() {
    let mut wanted = config(&[(1, peer(None, &["10.0.0.0/8"]))]);
    let mut device = device(&wanted);
    wanted.key = NodeKey::from_seed([1; 32]);
    let ops = reconcile(&wanted, &device);
    apply(&mut device, &ops);
    assert!(device.peers.is_empty());
    assert!(reconcile(&wanted, &device).is_empty());
}

// === Properties ===

fn any_net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (0..6_u8, 30..=32_u8)
            .prop_map(|(host, len)| { IpNet::new([100, 64, 0, host].into(), len).unwrap() }),
        (0..4_u16)
            .prop_map(|host| { IpNet::new([0xfd00, 0, 0, 0, 0, 0, 0, host].into(), 128).unwrap() }),
    ]
}

fn any_endpoint() -> impl Strategy<Value = Option<SocketAddr>> {
    prop::option::of((0..3_u8).prop_map(|n| SocketAddr::from(([192, 0, 2, n], 51820))))
}

fn any_config() -> impl Strategy<Value = DeviceConfig> {
    let peer = (
        any_endpoint(),
        prop::collection::btree_set(any_net(), 0..4),
        prop::option::of(0..2_u16),
    );
    let peer = peer.prop_map(|(endpoint, allowed_ips, keepalive)| PeerConfig {
        endpoint,
        allowed_ips,
        keepalive,
    });
    let peers = prop::collection::btree_map((0..5_u8).prop_map(key), peer, 0..5);
    (0..3_u8, 0..3_u16, 0..2_u32, peers).prop_map(|(n, listen_port, fwmark, peers)| DeviceConfig {
        key: NodeKey::from_seed([n; 32]),
        listen_port,
        fwmark,
        peers,
    })
}

/// Peers that both have and that neither key change removes: their sessions must survive.
fn kept(config: &DeviceConfig, before: &DeviceStatus) -> BTreeSet<NodePublic> {
    let desired = config.peers.keys().copied().collect::<BTreeSet<_>>();
    let mut kept = before
        .peers
        .keys()
        .copied()
        .collect::<BTreeSet<_>>()
        .intersection(&desired)
        .copied()
        .collect::<BTreeSet<_>>();
    kept.remove(&config.key.public());
    kept
}

proptest! {
    #[test]
    fn any_device_becomes_any_other_in_one_pass(
        first in any_config(),
        second in any_config(),
        roamed in prop::collection::vec(any_endpoint(), 5),
        adopted: bool,
    ) {
        let mut device = device(&first);
        for (peer, endpoint) in device.peers.values_mut().zip(roamed) {
            peer.endpoint = endpoint.or(peer.endpoint);
            if adopted {
                peer.written_endpoint = None;
            }
        }
        let before = device.clone();
        let ops = reconcile(&second, &device);
        apply(&mut device, &ops);
        prop_assert!(reconcile(&second, &device).is_empty(), "a second pass has nothing to do");

        let mut desired: BTreeSet<NodePublic> = second.peers.keys().copied().collect();
        desired.remove(&second.key.public());
        prop_assert_eq!(device.peers.keys().copied().collect::<BTreeSet<_>>(), desired);
        let claimed: BTreeSet<IpNet> = second
            .peers
            .iter()
            .filter(|(key, _)| **key != second.key.public())
            .flat_map(|(_, peer)| peer.allowed_ips.iter().map(IpNet::trunc))
            .collect();
        let held: Vec<IpNet> = device
            .peers
            .values()
            .flat_map(|peer| peer.allowed_ips.iter().copied())
            .collect();
        prop_assert_eq!(held.len(), claimed.len(), "one holder each");
        prop_assert_eq!(held.into_iter().collect::<BTreeSet<_>>(), claimed);

        let kept = kept(&second, &before);
        for op in &ops {
            if let DeviceOp::RemovePeer(key) | DeviceOp::AddPeer(key, _) = op {
                prop_assert!(!kept.contains(key), "{:?} lost its session", key);
            }
        }
    }
}
