//! The mesh as a guest in the host's routing.

use super::*;
use mesh_agent::net::monitor;
use mesh_core::health::Severity;

/// The interface that `host` sends to `to` through.
fn device(host: &Host, to: &str, mark: u32) -> String {
    let mark = mark.to_string();
    let mut arguments = vec!["route", "get", to];
    if mark != "0" {
        arguments.extend(["mark", &mark]);
    }
    let route = host.run("ip", &arguments).unwrap();
    let mut words = route.split_whitespace();
    words.find(|word| *word == "dev").unwrap();
    words.next().unwrap().to_owned()
}

#[test]
fn encrypted_packets_never_enter_the_mesh() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (mut left, right) = pair(&a, &b);
    // The right one routes the very address that it is reached at.
    let endpoint = b.v4().to_string();
    let route = net(&format!("{endpoint}/32"));
    left.peer_config(right.id).allowed_ips.insert(route);
    left.apply();
    left.routes.routes.insert(route);
    left.apply_routes();
    assert_eq!(device(&a, &endpoint, 0), INTERFACE);
    assert_eq!(device(&a, &endpoint, FWMARK), "eth0");
    assert_reaches(&a, right.id.v4());
    assert_reaches(&a, b.v4().into());
}

/// ```text
///  a ── 100.64.5.0/24 ── b
/// ```
#[test]
fn an_underlay_inside_the_pool_keeps_working_and_is_reported() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    for (host, address) in [(&a, "100.64.5.1/24"), (&b, "100.64.5.2/24")] {
        let old = format!("{}/24", host.v4());
        host.run("ip", &["addr", "del", &old, "dev", "eth0"])
            .unwrap();
        host.run("ip", &["addr", "add", address, "dev", "eth0"])
            .unwrap();
    }
    let (mut left, right) = pair(&a, &b);
    let endpoint = SocketAddr::new("100.64.5.2".parse().unwrap(), PORT);
    left.peer_config(right.id).endpoint = Some(endpoint);
    left.apply();
    assert_reaches(&a, right.id.v4());
    assert_eq!(device(&a, "100.64.5.2", 0), "eth0");
    assert_eq!(device(&a, "100.64.9.9", 0), INTERFACE);
    assert_reaches(&a, endpoint.ip());

    let local = runtime().block_on(left.net.local_prefixes(&left.backend.interface()));
    let condition = routes::overlap(&local.unwrap(), &left.routes.routes).unwrap();
    assert_eq!(condition.severity, Severity::Warning);
    assert!(
        condition.text.starts_with("100.64.5.0/24 on eth0"),
        "{condition:?}"
    );
}

#[test]
fn the_interface_goes_down_without_leaving_anything() {
    let lab = lab();
    let a = lab.host("a").unwrap();
    let list = |what: &str| {
        ["-4", "-6"].map(|family| {
            a.run("ip", &[family, what, "show", "table", "all"])
                .unwrap()
        })
    };
    let rules = || ["-4", "-6"].map(|family| a.run("ip", &[family, "rule"]).unwrap());
    settle(&a);
    let before = (list("route"), rules());
    let mut left = Node::new(&a, 1);
    assert_ne!(before, (list("route"), rules()));
    left.routes.up = false;
    left.routes.addresses.clear();
    left.routes.only_mesh.clear();
    left.apply_routes();
    assert_eq!(before.1, rules());
    assert_eq!(before.0, list("route"));
}

/// ```text
///  a ── eth0, default route ── the world
/// ```
#[test]
fn without_its_device_the_mesh_is_unreachable_and_not_in_the_clear() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    for (family, gateway) in [("-4", b.v4().to_string()), ("-6", b.v6().to_string())] {
        a.run("ip", &[family, "route", "add", "default", "via", &gateway])
            .unwrap();
    }
    a.run("ip", &["route", "add", "100.64.5.0/24", "dev", "eth0"])
        .unwrap();
    let left = Node::new(&a, 1);
    for to in ["100.64.0.9", "fd00:64::9"] {
        assert_eq!(device(&a, to, 0), INTERFACE);
    }
    // As when the agent of a userspace device is killed.
    a.run("ip", &["link", "del", INTERFACE]).unwrap();
    for to in ["100.64.0.9", "fd00:64::9"] {
        let route = a.run("ip", &["route", "get", to]);
        assert!(route.is_err(), "{to}: {route:?}");
        assert_eq!(device(&a, to, FWMARK), "eth0", "encrypted packets pass");
    }
    for to in ["100.64.5.9", "192.0.2.9", "2001:db8:99::9"] {
        assert_eq!(device(&a, to, 0), "eth0");
    }
    drop(left);
}

#[test]
fn what_others_break_is_repaired() {
    let lab = lab();
    let a = lab.host("a").unwrap();
    let left = Node::new(&a, 1);
    let table = TABLE.to_string();
    a.run("ip", &["route", "flush", "table", &table]).unwrap();
    // Of the pool, 100.64.0.0/10.
    for priority in [routes::first_of(10), routes::LAST_PRIORITY] {
        a.run("ip", &["rule", "del", "priority", &priority.to_string()])
            .unwrap();
    }
    let table = routes::unreachable_table(TABLE).to_string();
    a.run("ip", &["route", "flush", "table", &table]).unwrap();
    a.run("ip", &["addr", "flush", "dev", INTERFACE]).unwrap();
    a.run("ip", &["link", "set", INTERFACE, "mtu", "1400"])
        .unwrap();
    left.apply_routes();
    a.run("ip", &["link", "set", INTERFACE, "down"]).unwrap();
    left.apply_routes();
    assert_eq!(device(&a, "100.64.0.9", 0), INTERFACE);
}

#[test]
fn a_host_without_ipv6_gets_the_ipv4_half() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let off = |of: &str| format!("echo 1 > /proc/sys/net/ipv6/conf/{of}/disable_ipv6");
    for of in ["all", "default"] {
        // In the host's own network, which a program enters.
        a.run("sh", &["-c", &off(of)]).unwrap();
    }
    let (mut left, right) = (Node::new_v4(&a, 1), Node::new(&b, 2));
    left.peer(right.id, Some(right.endpoint()));
    let mut right = right;
    right.peer(left.id, None);
    assert_reaches(&a, right.id.v4());
}

#[test]
fn local_addresses_are_the_underlays_and_changes_are_noticed() {
    let lab = lab();
    let a = lab.host("a").unwrap();
    let left = Node::new(&a, 1);
    let interface = left.backend.interface();
    let local = || {
        let addresses = runtime().block_on(left.net.local_addresses(&interface));
        addresses.unwrap()
    };
    let own: BTreeSet<IpAddr> = a.underlay_addresses().into();
    assert_eq!(local(), own);
    settle(&a);

    let mut monitor = a
        .inside(|| runtime().block_on(async { monitor().unwrap() }))
        .unwrap();
    a.run("ip", &["addr", "add", "198.51.100.99/24", "dev", "eth0"])
        .unwrap();
    let limit = mesh_tests::scaled(Duration::from_secs(1));
    runtime()
        .block_on(async { tokio::time::timeout(limit, monitor.changed()).await })
        .unwrap()
        .unwrap();
    assert!(local().contains(&"198.51.100.99".parse().unwrap()));
    let quiet = runtime()
        .block_on(async { tokio::time::timeout(Duration::from_secs(1), monitor.changed()).await });
    assert!(quiet.is_err(), "reported once");
}

/// Waits for the underlay's link-local address: once it is no longer on trial (RFC 4862, section 5.4)
/// it has a route of its own, and the kernel tells of both.
fn settle(host: &Host) {
    mesh_tests::until("the underlay is settled", SOON, || {
        let on_trial = host.run("ip", &["-6", "addr", "show", "tentative"]);
        on_trial.unwrap().trim().is_empty()
    })
    .unwrap();
}
