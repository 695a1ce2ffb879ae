//! The `wg` command on our device.

use super::*;

/// `wg show INTERFACE dump`: a line for the device, then one for each peer, columns by tabs.
fn dump(host: &Host) -> Vec<Vec<String>> {
    let text = host.run("wg", &["show", INTERFACE, "dump"]).unwrap();
    let columns = |line: &str| line.split('\t').map(str::to_owned).collect();
    text.lines().map(columns).collect()
}

#[test]
fn wg_shows_what_the_device_holds() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (mut left, right) = pair(&a, &b);
    left.peer_config(right.id).keepalive = Some(25);
    left.apply();
    assert_reaches(&a, right.id.v4());

    let shown = dump(&a);
    let [device, peer] = &shown[..] else {
        panic!("one peer: {shown:?}");
    };
    assert_eq!(device[1], left.id.public().to_string());
    assert_eq!(device[2], PORT.to_string());
    assert_eq!(device[3], format!("{FWMARK:#x}"));
    assert_eq!(peer[0], right.id.public().to_string());
    assert_eq!(peer[1], "(none)");
    assert_eq!(peer[2], right.endpoint().to_string());
    let allowed: BTreeSet<IpNet> = peer[3].split(',').map(net).collect();
    assert_eq!(allowed, right.id.addresses());
    let handshake: u64 = peer[4].parse().unwrap();
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(now.abs_diff(handshake) < 60, "{handshake} is not {now}");
    assert!(peer[5].parse::<u64>().unwrap() > 0 && peer[6].parse::<u64>().unwrap() > 0);
    assert_eq!(peer[7], "25");

    let words = a.run("wg", &["show"]).unwrap();
    assert!(words.contains("latest handshake"), "{words}");
}

#[test]
fn what_wg_sets_is_seen_and_put_right() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (left, right) = pair(&a, &b);
    let key = right.id.public().to_string();
    let stranger = Id(9).public().to_string();
    for arguments in [
        vec!["set", INTERFACE, "peer", &key, "allowed-ips", "10.3.0.0/16"],
        vec!["set", INTERFACE, "peer", &key, "persistent-keepalive", "7"],
        vec!["set", INTERFACE, "peer", &key, "endpoint", "192.0.2.1:7"],
        vec![
            "set",
            INTERFACE,
            "peer",
            &stranger,
            "allowed-ips",
            "10.4.0.0/16",
        ],
        vec!["set", INTERFACE, "listen-port", "51999"],
    ] {
        a.run("wg", &arguments).unwrap();
    }
    let status = left.status();
    assert_eq!(status.listen_port, 51999);
    assert!(status.peers.contains_key(&Id(9).public()));
    let peer = left.peer_status(right.id);
    assert_eq!(peer.allowed_ips, nets(&["10.3.0.0/16"]));
    assert_eq!(peer.keepalive, Some(7));

    left.apply();
    a.run(
        "wg",
        &[
            "set",
            INTERFACE,
            "peer",
            &key,
            "endpoint",
            &right.endpoint().to_string(),
        ],
    )
    .unwrap();
    assert_reaches(&a, right.id.v4());

    a.run("wg", &["set", INTERFACE, "peer", &key, "remove"])
        .unwrap();
    assert_cut_off(&a, right.id.v4());
    left.apply();
    assert_reaches(&a, right.id.v4());
}

#[test]
fn a_preshared_key_must_be_the_same_at_both_ends() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (left, right) = pair(&a, &b);
    let set = |host: &Host, peer: Id, preshared_key: &str| {
        let file = host.folder().join("preshared-key");
        std::fs::write(&file, preshared_key).unwrap();
        let (peer, file) = (peer.public().to_string(), file.to_str().unwrap());
        host.run(
            "wg",
            &["set", INTERFACE, "peer", &peer, "preshared-key", file],
        )
        .unwrap();
    };
    let (one, other) = (Id(70).public().to_string(), Id(71).public().to_string());
    set(&a, right.id, &one);
    set(&b, left.id, &other);
    assert_cut_off(&a, right.id.v4());
    assert_eq!(dump(&a)[1][1], one);
    set(&b, left.id, &one);
    assert_reaches(&a, right.id.v4());
}
