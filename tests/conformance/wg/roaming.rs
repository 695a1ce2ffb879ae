//! Addresses change under a tunnel, and it follows.

use super::*;

#[test]
fn a_peer_that_changes_its_address_is_followed() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (left, right) = pair(&a, &b);
    assert_reaches(&a, right.id.v4());

    let new: SocketAddr = SocketAddr::new("198.51.100.200".parse().unwrap(), PORT);
    let add = format!("{}/24", new.ip());
    let del = format!("{}/24", a.v4());
    a.run("ip", &["addr", "add", &add, "dev", "eth0"]).unwrap();
    a.run("ip", &["addr", "del", &del, "dev", "eth0"]).unwrap();
    // Deleting a primary address may take its siblings along.
    a.run("ip", &["addr", "replace", &add, "dev", "eth0"])
        .unwrap();

    assert_reaches(&a, right.id.v4());
    assert_eq!(right.peer_status(left.id).endpoint, Some(new));
    assert_reaches(&b, left.id.v4());
}

#[test]
fn what_roaming_taught_outlives_a_reconciliation() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (left, mut right) = pair(&a, &b);
    // The right one was told an address that leads nowhere; the left one speaks first.
    right.peer_config(left.id).endpoint = Some("198.51.100.77:9".parse().unwrap());
    right.apply();
    assert_reaches(&a, right.id.v4());
    right.apply();
    assert_eq!(right.peer_status(left.id).endpoint, Some(left.endpoint()));
    assert_reaches(&b, left.id.v4());

    // News outranks it.
    let news = Some(left.endpoint_v6());
    right.peer_config(left.id).endpoint = news;
    right.apply();
    assert_eq!(right.peer_status(left.id).endpoint, news);
}

/// The answer must come from the address that was asked, or a NAT in between refuses it.
#[test]
fn a_host_with_several_addresses_answers_from_the_one_that_was_asked() {
    let lab = lab();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let (mut left, right) = pair(&a, &b);
    for second in ["198.51.100.222", "2001:db8:51::222"] {
        let length = if second.contains(':') { 64 } else { 24 };
        let net = format!("{second}/{length}");
        b.run("ip", &["addr", "add", &net, "dev", "eth0"]).unwrap();
        let asked = SocketAddr::new(second.parse().unwrap(), PORT);
        left.peer_config(right.id).endpoint = Some(asked);
        left.apply();
        assert_reaches(&a, right.id.v4());
        assert_reaches(&b, left.id.v4());
        let endpoint = left.peer_status(right.id).endpoint;
        assert_eq!(endpoint, Some(asked), "nothing came from elsewhere");
    }
}
