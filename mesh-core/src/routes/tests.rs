//! A model of the host's routing, and what `reconcile` must bring it to.

use proptest::prelude::*;

use super::*;

fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn config(routes: &[&str]) -> Config {
    Config {
        addresses: nets(&["100.64.0.1/32", "fd00::1/128"]),
        mtu: 1280,
        up: true,
        routes: nets(routes),
        only_mesh: nets(routes),
        table: TABLE,
    }
}

/// Does to `host` what the kernel does; panics where it would refuse.
fn apply(host: &mut Status, ops: &[Op]) {
    for op in ops {
        match op {
            Op::SetMtu(mtu) => host.mtu = *mtu,
            Op::SetUp(up) => {
                assert_ne!(host.up, *up);
                host.up = *up;
                host.routes.clear();
            }
            Op::AddAddress(net) => assert!(host.addresses.insert(*net)),
            Op::RemoveAddress(net) => assert!(host.addresses.remove(net)),
            Op::AddRoute(net) => {
                assert!(host.up, "network is down");
                assert!(host.routes.insert(*net));
            }
            Op::RemoveRoute(net) => assert!(host.routes.remove(net)),
            Op::AddUnreachable(net) => assert!(host.unreachable.insert(*net)),
            Op::RemoveUnreachable(net) => assert!(host.unreachable.remove(net)),
            Op::AddRule(rule) => assert!(host.rules.insert(*rule)),
            Op::RemoveRule(rule) => assert!(host.rules.remove(rule)),
        }
    }
}

fn host(config: &Config) -> Status {
    let mut host = Status::default();
    apply(&mut host, &reconcile(config, &Status::default()));
    host
}

/// Looks `to` up as the kernel does: rules in order, each a longest-prefix match of its table. An
/// unreachable route is an answer like any other.
fn lookup(host: &Status, main: &BTreeSet<IpNet>, to: &str) -> Option<(u32, IpNet)> {
    let to: IpAddr = to.parse().unwrap();
    let matching = |table: &BTreeSet<IpNet>| {
        table
            .iter()
            .filter(|net| net.contains(&to))
            .max_by_key(|net| net.prefix_len())
            .copied()
    };
    let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
    let mut rules: Vec<Rule> = host.rules.iter().copied().collect();
    rules.retain(|rule| rule.family == family);
    rules.sort_by_key(|rule| rule.priority);
    rules.push(Rule {
        family,
        priority: 32766,
        table: TABLE_MAIN,
        suppress: None,
    });
    rules.iter().find_map(|rule| {
        let table = match rule.table {
            TABLE_MAIN => main,
            TABLE => &host.routes,
            _ => &host.unreachable,
        };
        let net = matching(table)?;
        let counts = rule
            .suppress
            .is_none_or(|len| u32::from(net.prefix_len()) > len);
        counts.then_some((rule.table, net))
    })
}

#[test]
fn the_longest_prefix_of_both_tables_wins_and_a_tie_is_the_hosts() {
    let host = host(&config(&[
        "100.64.0.0/10",
        "10.5.0.0/16",
        "192.168.7.0/24",
        "fd00::/48",
    ]));
    let main = nets(&[
        "0.0.0.0/0",
        "10.0.0.0/8",
        "100.64.5.0/24",
        "192.168.7.0/24",
        "::/0",
        "fd00::/64",
    ]);
    let check = |to: &str, table: u32| {
        let (found, net) = lookup(&host, &main, to).unwrap();
        assert_eq!(found, table, "{to} took {net}");
    };
    check("100.64.0.7", TABLE);
    check("100.64.5.1", TABLE_MAIN);
    check("10.5.1.1", TABLE);
    check("10.6.1.1", TABLE_MAIN);
    check("192.168.7.9", TABLE_MAIN);
    check("9.9.9.9", TABLE_MAIN);
    check("fd00:0:0:1::1", TABLE);
    check("fd00::1", TABLE_MAIN);
}

#[test]
fn an_exit_route_beats_the_hosts_default_route_and_nothing_else() {
    let host = host(&config(&["0.0.0.0/0"]));
    let main = nets(&["0.0.0.0/0", "192.168.1.0/24"]);
    assert_eq!(lookup(&host, &main, "9.9.9.9").unwrap().0, TABLE);
    assert_eq!(lookup(&host, &main, "192.168.1.1").unwrap().0, TABLE_MAIN);
}

#[test]
fn an_interface_that_goes_down_leaves_no_rule_behind() {
    let mut wanted = config(&["100.64.0.0/10"]);
    let mut host = host(&wanted);
    wanted.up = false;
    wanted.addresses.clear();
    wanted.only_mesh.clear();
    let ops = reconcile(&wanted, &host);
    apply(&mut host, &ops);
    let empty = Status {
        mtu: 1280,
        ..Status::default()
    };
    assert_eq!(host, empty);
}

#[test]
fn without_its_interface_what_is_for_the_mesh_goes_nowhere() {
    let mut host = host(&config(&["100.64.0.0/10", "fd00::/48"]));
    // What the kernel does when the device dies with the agent.
    host.routes.clear();
    let main = nets(&["0.0.0.0/0", "100.64.0.0/12", "100.64.5.0/24", "::/0"]);
    let check = |to: &str, table: u32| {
        assert_eq!(lookup(&host, &main, to).unwrap().0, table, "{to}");
    };
    check("100.127.0.7", unreachable_table(TABLE));
    check("fd00::7", unreachable_table(TABLE));
    check("100.64.0.7", TABLE_MAIN);
    check("100.64.5.7", TABLE_MAIN);
    check("9.9.9.9", TABLE_MAIN);
}

#[test]
fn an_overlap_says_who_is_out_of_reach() {
    let pools = nets(&["100.64.0.0/10", "fd00::/48"]);
    let on = |net: &str| {
        BTreeSet::from([LocalPrefix {
            interface: "eth0".into(),
            net: net.parse().unwrap(),
        }])
    };
    let check = |net: &str, severity: Severity, text: &str| {
        let condition = overlap(&on(net), &pools).unwrap();
        assert_eq!(
            (condition.severity, condition.text.as_str()),
            (severity, text)
        );
    };
    check(
        "100.64.5.2/24",
        Severity::Warning,
        "100.64.5.0/24 on eth0 overlaps the mesh's 100.64.0.0/10: \
         nodes with an address in 100.64.5.0/24 are out of reach",
    );
    check(
        "100.64.5.2/10",
        Severity::Error,
        "100.64.0.0/10 on eth0 overlaps the mesh's 100.64.0.0/10: \
         nodes with an address in 100.64.0.0/10 are out of reach",
    );
    check(
        "100.64.5.2/8",
        Severity::Warning,
        "100.0.0.0/8 on eth0 overlaps the mesh's 100.64.0.0/10: \
         local hosts with an address in 100.64.0.0/10 are out of reach",
    );
    assert_eq!(overlap(&on("192.168.1.5/24"), &pools), None);
    assert_eq!(overlap(&on("fd01::5/64"), &pools), None);
}

#[test]
fn addresses_that_mean_something_else_elsewhere_are_not_reported() {
    for good in ["192.168.1.2", "100.64.1.1", "2001:db8::1", "fd00::2"] {
        assert!(is_reportable(good.parse().unwrap()), "{good}");
    }
    for bad in [
        "127.0.0.1",
        "169.254.1.1",
        "0.0.0.0",
        "fe80::1",
        "::1",
        "ff02::1",
    ] {
        assert!(!is_reportable(bad.parse().unwrap()), "{bad}");
    }
}

// === Properties ===

fn any_net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (0..4_u8, 0..=32_u8)
            .prop_map(|(b, len)| IpNet::new([100, 64 + b, 0, b].into(), len).unwrap()),
        (0..4_u16, 0..=128_u8).prop_map(|(b, len)| IpNet::new(
            [0xfd00, b, 0, 0, 0, 0, 0, b].into(),
            len
        )
        .unwrap()),
    ]
}

fn any_config() -> impl Strategy<Value = Config> {
    let nets = || prop::collection::btree_set(any_net(), 0..6);
    (nets(), 1280..1282_u32, any::<bool>(), nets(), nets()).prop_map(
        |(addresses, mtu, up, routes, only_mesh)| Config {
            addresses,
            mtu,
            up,
            routes,
            only_mesh,
            table: TABLE,
        },
    )
}

proptest! {
    #[test]
    fn any_host_becomes_any_other_in_one_pass(first in any_config(), second in any_config()) {
        let mut host = host(&first);
        let ops = reconcile(&second, &host);
        apply(&mut host, &ops);
        prop_assert!(reconcile(&second, &host).is_empty());
        prop_assert_eq!(host.up, second.up);
        let nothing = host.routes.is_empty() && host.unreachable.is_empty();
        prop_assert_eq!(host.rules.is_empty(), nothing);
    }

    #[test]
    fn what_two_hosts_send_the_same_way_goes_it_in_between(
        first in any_config(),
        second in any_config(),
        main in prop::collection::btree_set(any_net(), 0..6),
        to in any_net(),
    ) {
        let up = |config| Config { up: true, ..config };
        let (first, second) = (up(first), up(second));
        let main: BTreeSet<IpNet> = main.iter().map(IpNet::trunc).collect();
        let (mut host, after) = (host(&first), host(&second));
        let to = to.addr().to_string();
        let way = |host: &Status| lookup(host, &main, &to).map(|(table, _)| table);
        let before = way(&host);
        if before == way(&after) {
            for op in reconcile(&second, &host) {
                apply(&mut host, &[op]);
                prop_assert_eq!(way(&host), before, "after {:?}", op);
            }
        }
    }

    #[test]
    fn the_rules_are_one_longest_prefix_match(
        routes in prop::collection::btree_set(any_net(), 0..6),
        main in prop::collection::btree_set(any_net(), 0..6),
        to in any_net(),
    ) {
        let mut wanted = config(&[]);
        wanted.routes = routes.iter().map(IpNet::trunc).collect();
        let main: BTreeSet<IpNet> = main.iter().map(IpNet::trunc).collect();
        let host = host(&wanted);
        let best = |table: &BTreeSet<IpNet>| {
            let matching = table.iter().filter(|net| net.contains(&to.addr()));
            matching.map(IpNet::prefix_len).max()
        };
        let (ours, theirs) = (best(&wanted.routes), best(&main));
        let expected = match (ours, theirs) {
            (None, None) => None,
            (Some(ours), Some(theirs)) if theirs >= ours && ours > 0 => Some(TABLE_MAIN),
            (Some(_), Some(0)) => Some(TABLE),
            (Some(ours), Some(theirs)) if theirs > ours => Some(TABLE_MAIN),
            (Some(_), _) => Some(TABLE),
            (None, Some(_)) => Some(TABLE_MAIN),
        };
        let found = lookup(&host, &main, &to.addr().to_string()).map(|(table, _)| table);
        prop_assert_eq!(found, expected);
    }
}
