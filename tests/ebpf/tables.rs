//! The tables under the programs: put in force as a whole, bounded, reviewed, asked without a trace.

use aya::programs::SchedClassifier;
use mesh_agent::dataplane::Only;
use mesh_common::addr::Prefix;
use mesh_common::flow::{FlowEntry, FlowKey};
use mesh_common::identity::Identified;
use mesh_common::policy::PolicyPrefix;
use mesh_common::{
    Address, Be16, Be32, DropReason, IdentityEntry, PolicyEntry, PolicyKey, Sides, maps,
    next_generation,
};
use mesh_core::dataplane::why::Question;
use mesh_core::dataplane::{Tables, reconcile};
use mesh_core::{Direction, Identity, RuleId};

use crate::kernel::{Kernel, Table};
use crate::life::layout;
use crate::packet::{Body, Packet};
use crate::scene::*;

/// So many peers may each open one port here: a row, an identity and a rule for each.
fn crowd(peers: u32) -> Tables {
    let mut tables = tables();
    let me = Identity(16);
    for number in 0..peers {
        let identity = Identity(1_000 + number);
        let rule = RuleId(1_000 + number);
        let key = PolicyKey::new(identity, me, Direction::Ingress, 6, 22);
        let prefix = PolicyPrefix {
            len: PolicyPrefix::EXACT,
            key,
        };
        tables.rows.insert(prefix, PolicyEntry::accept(rule));
        tables.rules.insert(rule);
    }
    tables
}

#[test]
fn a_full_table_keeps_the_policy_before_and_says_the_number() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables());
    handshake(&mut kernel);
    let mut rows = crowd(maps::POLICY_CAPACITY);
    rows.rules.clear();
    let rules = crowd(maps::RULE_CAPACITY);
    let mut hosts = tables();
    let mut nets = tables();
    let entry = IdentityEntry {
        identity: Identity(18),
        ..IdentityEntry::UNKNOWN
    };
    for number in 0..=maps::ID_EXACT_CAPACITY {
        let address = std::net::Ipv6Addr::from(u128::from(number) << 8 | 0xfd << 120);
        let address = Address::from(std::net::IpAddr::from(address));
        hosts.identities.insert(Prefix { len: 128, address }, entry);
        if number <= maps::ID_CIDR_CAPACITY {
            nets.identities.insert(Prefix { len: 120, address }, entry);
        }
    }
    for (tables, what, capacity) in [
        (&rows, "rows of policy", maps::POLICY_CAPACITY),
        (&rules, "rules", maps::RULE_CAPACITY),
        (&hosts, "addresses of nodes", maps::ID_EXACT_CAPACITY),
        (&nets, "routes", maps::ID_CIDR_CAPACITY),
    ] {
        let error = kernel.dataplane().apply(tables).unwrap_err().to_string();
        assert!(
            error.contains(what) && error.contains(&capacity.to_string()),
            "{error}"
        );
        let ack = tcp(Direction::Egress, ACK);
        assert!(
            kernel.run(Direction::Egress, &ack).0,
            "the old policy stands"
        );
    }
    // What is new is not let in by halves: nobody of the crowd has an identity.
    kernel.apply(&revoked());
    let ack = tcp(Direction::Egress, ACK);
    assert!(
        !kernel.run(Direction::Egress, &ack).0,
        "and the next that fits is taken"
    );
}

/// Here because somebody else's entries fill the map.
#[test]
fn a_change_that_fails_half_way_changes_nothing_and_may_be_made_again() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables());
    let host = |number: u32| {
        let address = std::net::Ipv6Addr::from(u128::from(number) | 0xfe << 120);
        Address::from(std::net::IpAddr::from(address))
    };
    let mut exact: Table<Address, Sides> = kernel.pinned(maps::ID_EXACT);
    let strays = maps::ROOM * maps::ID_EXACT_CAPACITY - 5 - 2;
    for number in 0..strays {
        exact.insert(host(number), Sides::default(), 0).unwrap();
    }
    let mut more = tables();
    for number in 0..4 {
        let entry = IdentityEntry {
            identity: Identity(18),
            flags: 0,
            peer: 2,
        };
        let prefix = Prefix {
            len: 128,
            address: host(u32::MAX - number),
        };
        more.identities.insert(prefix, entry);
    }
    // In the second one everybody has another number.
    let mut renamed = more.clone();
    for entry in renamed.identities.values_mut() {
        entry.identity.0 += 100;
    }
    renamed.rows = renamed
        .rows
        .into_iter()
        .map(|(mut prefix, entry)| {
            let shifted = |number: Be32| Be32::new(number.get() + 100);
            prefix.key.remote = shifted(prefix.key.remote);
            prefix.key.local = shifted(prefix.key.local);
            (prefix, entry)
        })
        .collect();
    let syn = |port| tcp_between(PEER, [port, 22], Direction::Ingress, SYN);
    for port in 1..4 {
        for tables in [&more, &renamed] {
            let error = kernel.dataplane().apply(tables).unwrap_err();
            assert_eq!(error.to_string(), "write who stands behind a prefix");
        }
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(port)), PASS);
    }
    // What was before fits still, and is taken.
    kernel.apply(&tables());
    assert_eq!(kernel.outcome(Direction::Ingress, &syn(4)), PASS);
    for number in 0..strays {
        exact.remove(&host(number)).unwrap();
    }
    for (port, tables) in [(5, &renamed), (6, &more), (7, &tables())] {
        kernel.apply(tables);
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(port)), PASS);
        let held = tables.identities.keys().filter(|prefix| prefix.len == 128);
        kernel.dataplane().sweep().unwrap();
        assert_eq!(exact.keys().count(), held.count());
    }
}

#[test]
fn a_small_change_of_a_large_policy_is_small_work() {
    let mut kernel = Kernel::new();
    let large = crowd(10_000);
    let time = |kernel: &mut Kernel, tables: &Tables| {
        let begun = std::time::Instant::now();
        kernel.apply(tables);
        begun.elapsed()
    };
    let first = time(&mut kernel, &large);
    let mut changed = large;
    let row = *changed.rows.keys().next().unwrap();
    let steps = |from: &Tables, to: &Tables| reconcile(from, to).len();
    let mut quickest = std::time::Duration::MAX;
    for round in 0..9_u32 {
        let entry = match round % 2 {
            0 => PolicyEntry::deny(RuleId(1_000)),
            _ => PolicyEntry::accept(RuleId(1_000)),
        };
        let before = changed.clone();
        changed.rows.insert(row, entry);
        assert!(steps(&before, &changed) <= 2);
        quickest = quickest.min(time(&mut kernel, &changed));
    }
    println!("figure: 10,000 rows applied in {first:?}, one of them changed in {quickest:?}");
    assert!(quickest * 2 < first, "{quickest:?} of {first:?}");
}

/// Two policies that call two peers by each other's numbers. One of the two may never open anything;
/// whoever met the one's identities beside the other's rows would let it in. The other always may.
#[test]
fn no_packet_meets_half_a_policy() {
    let named = |allowed: u32, denied: u32| {
        let mut tables = tables();
        let host = |address: [u8; 4]| Prefix {
            len: 128,
            address: Address::from(std::net::IpAddr::from(address)),
        };
        let known = |identity, peer| IdentityEntry {
            identity: Identity(identity),
            flags: 0,
            peer,
        };
        tables.identities.insert(host(PEER), known(allowed, 2));
        tables.identities.insert(host(OTHER), known(denied, 3));
        let key = PolicyKey::new(Identity(allowed), Identity(16), Direction::Ingress, 6, 22);
        let prefix = PolicyPrefix {
            len: PolicyPrefix::EXACT,
            key,
        };
        tables.rows = [(prefix, PolicyEntry::accept(RuleId(1)))].into();
        tables
    };
    let policies = [named(20, 21), named(21, 20)];
    let mut kernel = Kernel::new();
    kernel.apply(&policies[0]);
    let folder = kernel.options().pin_dir.join(layout());
    let pins = std::fs::read_dir(folder)
        .unwrap()
        .map(|pin| pin.unwrap().path());
    let pin = pins
        .into_iter()
        .find(|pin| pin.to_string_lossy().contains("prog_in_"))
        .unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    // Each from a port of its own, as a flow that stands is not asked about.
    let try_as = |who: [u8; 4]| {
        let program = SchedClassifier::from_pin(&pin).unwrap();
        let (mut passed, mut asked) = (0_u32, 0_u32);
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            let port = 1_024 + (asked % 60_000) as u16;
            let packet = tcp_between(who, [port, 22], Direction::Ingress, SYN);
            let run = aya::TestRunOptions {
                data_in: Some(&packet),
                repeat: 1,
                ..Default::default()
            };
            let verdict = aya::TestRun::test_run(&program, run).unwrap().return_value;
            passed += u32::from(verdict != 2);
            asked += 1;
        }
        (passed, asked)
    };
    let (intruder, guest) = std::thread::scope(|scope| {
        let intruder = scope.spawn(|| try_as(OTHER));
        let guest = scope.spawn(|| try_as(PEER));
        for round in 1..=100 {
            kernel.apply(&policies[round % 2]);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        (intruder.join().unwrap(), guest.join().unwrap())
    });
    println!("figure: {intruder:?} of the intruder, {guest:?} of the guest passed");
    assert!(
        intruder.1 > 1_000 && guest.1 > 1_000,
        "{intruder:?} {guest:?}"
    );
    assert_eq!(intruder.0, 0, "of {} packets", intruder.1);
    assert_eq!(guest.0, guest.1);
}

/// Where entries were replaced instead, a few of a million packets met another address's, in the moment between
/// finding and reading it.
#[test]
fn who_is_behind_an_address_is_written_where_it_lies() {
    let mut kernel = Kernel::new();
    let tables = tables();
    kernel.apply(&tables);
    let told = |address: Address, entry: &IdentityEntry| {
        let mut packet = [0; 64];
        let sides = Sides::both(*entry);
        let told = Identified { address, sides }.bytes();
        packet[..told.len()].copy_from_slice(&told);
        packet
    };
    let hosts = tables.identities.iter();
    let hosts = hosts.filter(|(prefix, _)| prefix.len == 128);
    let hosts: Vec<_> = hosts
        .map(|(prefix, entry)| told(prefix.address, entry))
        .collect();
    assert!(hosts.len() > 2);
    let nobody = Address::from(std::net::IpAddr::from([192, 0, 2, 9]));
    let asked = told(nobody, &IdentityEntry::UNKNOWN);
    assert_eq!(kernel.explain("identify", &asked).0, 2, "of no entry");

    let runner = kernel.runner();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (passed, asked) = std::thread::scope(|scope| {
        let judged = scope.spawn(|| {
            let (mut passed, mut asked) = (0_u32, 0_u32);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // Each from a port of its own, as a flow that stands is not asked about.
                let port = 1_024 + (asked % 60_000) as u16;
                let syn = tcp_between(PEER, [port, 22], Direction::Ingress, SYN);
                passed += u32::from(runner.passes(Direction::Ingress, &syn));
                asked += 1;
            }
            (passed, asked)
        });
        let begun = std::time::Instant::now();
        while begun.elapsed() < std::time::Duration::from_secs(2) {
            for told in &hosts {
                assert_eq!(kernel.run_program("identify", told, 1).0, u32::MAX);
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        judged.join().unwrap()
    });
    println!("figure: {passed} of {asked} packets passed");
    assert_eq!(passed, asked);
}

#[test]
fn a_review_ends_idle_flows_and_tells_of_each_once() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables());
    handshake(&mut kernel);
    let review = |kernel: &mut Kernel, tables| kernel.dataplane().review(&tables).unwrap();
    assert_eq!(review(&mut kernel, tables()), []);
    kernel.apply(&revoked());
    let ended = review(&mut kernel, revoked());
    assert_eq!(ended.len(), 1);
    let (key, entry) = ended[0];
    assert_eq!((key.local_port.get(), key.remote_port.get()), (22, 40_000));
    assert_eq!(kernel.ct_est().get(&key).unwrap(), entry);
    assert_eq!(review(&mut kernel, revoked()), []);
    assert!(!passes(&kernel, Direction::Egress, ACK));
    // Who reverts in time has cut nothing for good.
    kernel.apply(&tables());
    assert!(passes(&kernel, Direction::Egress, ACK));
}

/// A program keeps what it was told of the address on this side for as long as the generation lasts.
#[test]
fn who_is_on_this_side_is_asked_anew_when_that_changes() {
    let mut kernel = Kernel::new();
    let own = Address::from(std::net::IpAddr::from(ME));
    let other = |identity| {
        let mut tables = tables();
        let own = Prefix {
            len: 128,
            address: own,
        };
        tables.identities.get_mut(&own).unwrap().identity = Identity(identity);
        tables
    };
    let syn = |port| tcp_between(PEER, [port, 22], Direction::Ingress, SYN);
    for (port, identity, outcome) in [
        (1, 16, PASS),
        (2, 99, Err("no rule")),
        (3, 0, Err("unknown local address")),
        (4, 16, PASS),
    ] {
        kernel.apply(&other(identity));
        for port in [port, port + 100] {
            assert_eq!(kernel.outcome(Direction::Ingress, &syn(port)), outcome);
        }
    }
    // Addresses that take turns.
    let elsewhere = packet(
        PEER,
        Direction::Egress,
        Body::Tcp {
            source: 22,
            destination: 1,
            flags: SYN,
        },
    );
    let from_elsewhere = Packet {
        source: std::net::IpAddr::from([100, 64, 0, 9]),
        ..elsewhere
    };
    for port in 5..10 {
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(port)), PASS);
        let outcome = kernel.outcome(Direction::Egress, &from_elsewhere.bytes());
        assert_eq!(outcome, Err("unknown local address"));
    }
}

/// What it had begun is not in use, and its successor keeps none of it.
#[test]
fn an_agent_that_dies_while_it_writes_changes_nothing() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables());
    let own = Address::from(std::net::IpAddr::from(ME));
    let mut exact: Table<Address, Sides> = kernel.pinned(maps::ID_EXACT);
    let next = next_generation(kernel.config().generation);
    let entry = *exact.get(&own, 0).unwrap().at(next + 1);
    let half = Sides::turn(next, entry, IdentityEntry::UNKNOWN);
    exact.insert(own, half, 0).unwrap();
    let stray = Address::from(std::net::IpAddr::from([100, 64, 0, 77]));
    let begun = Sides::turn(next, IdentityEntry::UNKNOWN, entry);
    exact.insert(stray, begun, 0).unwrap();
    let syn = |port| tcp_between(PEER, [port, 22], Direction::Ingress, SYN);
    assert_eq!(kernel.outcome(Direction::Ingress, &syn(1)), PASS);
    kernel.kill();
    kernel.start();
    assert_eq!(kernel.outcome(Direction::Ingress, &syn(2)), PASS);
    for port in 3..6 {
        kernel.apply(&tables());
        assert_eq!(kernel.outcome(Direction::Ingress, &syn(port)), PASS);
    }
    kernel.dataplane().sweep().unwrap();
    assert_eq!(exact.get(&own, 0).unwrap(), Sides::both(entry));
    assert!(exact.get(&stray, 0).is_err());
}

#[test]
fn a_dry_run_says_what_would_be_and_leaves_no_trace() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables());
    let agreed = |kernel: &mut Kernel, question: Question, direction| {
        let packet = question.packet(40_000);
        let said = kernel.dataplane().explain(direction, &packet).unwrap();
        let policy = question.ask(&netmap().policy, direction);
        let kernel = (DropReason::from_number(said.reason), said.rule);
        assert_eq!(kernel, (policy.drop, policy.rule), "{question:?}");
        kernel
    };
    let ask = |kernel: &mut Kernel, port| {
        let question = Question::new(PEER.into(), ME.into(), 6, port).unwrap();
        agreed(kernel, question, Direction::Ingress)
    };
    let before = kernel.dataplane().counters().unwrap();
    assert_eq!(ask(&mut kernel, 22), (None, RuleId(1)));
    assert_eq!(
        ask(&mut kernel, 23),
        (Some(DropReason::NoRule), RuleId::NONE)
    );
    for (me, other, proto) in [
        ("100.64.0.1", "224.0.0.251", 17),
        ("100.64.0.1", "255.255.255.255", 17),
        ("100.64.0.1", "192.0.2.1", 47),
        ("fd00:a:b:c:d:e:f:1", "ff02::fb", 17),
        ("fd00:a:b:c:d:e:f:1", "fd00:a:b:c:d:e:f:2", 1),
        ("fd00:a:b:c:d:e:f:1", "fd00:a:b:c:d:e:f:9", 132),
        ("fd00:a:b:c:d:e:f:1", "fd00:a:b:c:d:e:f:2", 50),
    ] {
        let (me, other) = (me.parse().unwrap(), other.parse().unwrap());
        for (source, destination, direction) in [
            (me, other, Direction::Egress),
            (other, me, Direction::Ingress),
        ] {
            let question = Question::new(source, destination, proto, 8).unwrap();
            agreed(&mut kernel, question, direction);
        }
    }
    assert_eq!(kernel.dataplane().counters().unwrap(), before);
    assert_eq!(kernel.dataplane().denials().unwrap(), []);
    assert_eq!(kernel.established().len(), 0);
}

#[test]
fn maps_tell_how_full_they_are() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables());
    handshake(&mut kernel);
    let usage = kernel.dataplane().usage().unwrap();
    let of = |name| *usage.iter().find(|usage| usage.map == name).unwrap();
    assert_eq!(of(maps::CT_EST).entries, 1);
    assert!(of(maps::CT_EST).capacity >= u64::from(maps::FLOW_CAPACITY));
    assert_eq!(of(maps::ID_EXACT).entries, 5);
    assert_eq!(usage.len(), maps::PINNED.len());
    // Taken at the start: a key and a value for each, and what the kernel adds since 6.2 it says too.
    let least = of(maps::CT_EST).capacity * 112;
    assert!(of(maps::CT_EST).memory_bytes >= least, "{usage:?}");
}

#[test]
fn a_review_of_a_full_table_ends_every_flow() {
    let mut kernel = Kernel::new();
    kernel.apply(&tables());
    const MANY: u16 = 60_000;
    let flows = kernel.dataplane().kernel().established();
    let mut key = FlowKey {
        remote: Address::from(std::net::IpAddr::from(PEER)),
        local: Address::from(std::net::IpAddr::from(ME)),
        local_port: Be16::new(22),
        proto: 6,
        ..FlowKey::NONE
    };
    for port in 0..MANY {
        key.remote_port = Be16::new(port);
        flows.put(key, FlowEntry::default(), Only::New).unwrap();
    }
    let flows = flows.flows().unwrap().len();
    kernel.apply(&revoked());
    let begun = std::time::Instant::now();
    let ended = kernel.dataplane().review(&revoked()).unwrap();
    println!(
        "figure: {flows} flows reviewed and ended in {:?}",
        begun.elapsed()
    );
    assert_eq!((ended.len(), flows), (MANY.into(), MANY.into()));
}
