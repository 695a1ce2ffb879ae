//! The state as a whole: what it plans, remembers, acknowledges and complains about.

use std::collections::BTreeMap;

use super::*;
use crate::control::Kind;
use crate::key::{MachineKey, NodePublic};
use crate::netmap::{Me, NodePolicy, Peer};
use crate::node::{Addresses, MeshId, Name, NodeId};
use crate::world::{Mesh, Pools};

const ME: Membership = Membership {
    mesh: MeshId([7; 16]),
    node: NodeId(3),
};
const EXPIRES: UnixTime = UnixTime(10_000);

fn keys() -> Keys {
    Keys {
        machine: MachineKey::from_seed([1; 32]),
        node: NodeKey::from_seed([2; 32]),
    }
}

#[expect(clippy::disallowed_methods, reason = "a base for virtual time")]
fn start() -> Instant {
    Instant::now()
}

fn addresses(host: u8) -> Addresses {
    Addresses {
        v4: [100, 64, 0, host].into(),
        v6: [0xfd01, 0, 0, 0, 0, 0, 0, u16::from(host)].into(),
    }
}

fn netmap(generation: u64) -> Netmap {
    let peer = Peer {
        id: NodeId(4),
        name: Name::parse("peer").unwrap(),
        key: NodePublic([4; 32]),
        addresses: addresses(4),
        endpoints: ["192.0.2.4:41641".parse().unwrap()].into(),
        routes: ["10.4.0.0/16".parse().unwrap()].into(),
        tags: BTreeSet::new(),
        user: None,
    };
    Netmap {
        mesh: Mesh {
            id: ME.mesh,
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([1; 5]),
            },
        },
        epoch: Epoch(0),
        generation: Generation(generation),
        me: Me {
            id: ME.node,
            name: Name::parse("me").unwrap(),
            key: keys().node.public(),
            addresses: addresses(3),
            tags: BTreeSet::new(),
            user: None,
            expires: Some(EXPIRES),
            expired: false,
        },
        peers: BTreeMap::from([(peer.id, peer)]),
        policy: NodePolicy::default(),
    }
}

fn accepted(netmap: Netmap) -> Accepted {
    Accepted {
        netmap,
        kind: Kind::Full,
        signed: Arc::from(&b"signed"[..]),
    }
}

fn prefs() -> Prefs {
    Prefs {
        up: true,
        join: "mesh://h".to_owned(),
        ..Prefs::default()
    }
}

/// A node that was enrolled before and starts again.
fn restarted(clock: u64, now: Instant) -> State {
    let memory = Memory {
        prefs: prefs(),
        membership: Some(ME),
        chain: Some(Chain::after(None, accepted(netmap(5))).unwrap()),
        clock: Some(UnixTime(clock)),
    };
    State::new(keys(), 41_641, memory, 1, now)
}

fn hello() -> Hello {
    Hello {
        challenge: NodeKey::from_seed([9; 32]).public(),
        exporter: [5; 32],
        now: UnixTime(1_000),
        node: Some(ME.node),
    }
}

/// The plans that were made, in order.
fn plans(state: &mut State) -> Vec<Option<Arc<Desired>>> {
    std::iter::from_fn(|| state.poll_output())
        .filter_map(|output| match output {
            Output::Desired(desired) => Some(desired),
            Output::Remember | Output::Told(_) => None,
        })
        .collect()
}

fn names(state: &State) -> Vec<&'static str> {
    state.health().iter().map(|(name, _)| name).collect()
}

fn applied(state: &mut State) -> Vec<Applied> {
    std::iter::from_fn(|| state.poll_transmit())
        .filter_map(|transmit| match transmit {
            Transmit::Applied(applied) => Some(applied),
            _ => None,
        })
        .collect()
}

#[test]
fn a_restarted_node_plans_from_disk_before_the_coordinator_answers() {
    let mut state = restarted(1_000, start());
    let plans = plans(&mut state);
    let [Some(plan)] = &plans[..] else {
        panic!("{plans:?}");
    };
    assert_eq!(plan.generation, Generation(5));
    let peer = &plan.wireguard.peers[&NodePublic([4; 32])];
    assert_eq!(peer.endpoint, Some("192.0.2.4:41641".parse().unwrap()));
    assert_eq!(peer.allowed_ips.len(), 3);
    assert!(plan.routes.routes.contains(&"10.4.0.0/16".parse().unwrap()));
    assert_eq!(state.standing(start()), Standing::Running);
}

#[test]
fn a_stopped_node_plans_nothing_until_it_is_told_to() {
    let now = start();
    let mut memory = restarted(1_000, now).memory(now);
    memory.prefs.up = false;
    let mut state = State::new(keys(), 41_641, memory, 1, now);
    assert!(matches!(plans(&mut state)[..], [None]));
    assert!(state.poll_transmit().is_none());
    state.handle_up(prefs(), None, now);
    assert!(matches!(plans(&mut state)[..], [Some(_)]));
    state.handle_down(false, now);
    assert!(matches!(plans(&mut state)[..], [None]));
    assert!(state.memory(now).chain.is_some());
    state.handle_down(true, now);
    assert!(state.memory(now).chain.is_none());
}

#[test]
fn an_expired_key_is_given_up_without_the_coordinator_and_only_once() {
    let now = start();
    let mut state = restarted(9_000, now);
    plans(&mut state);
    let expiry = now + Duration::from_secs(1_000);
    assert!(state.poll_timeout().unwrap() <= expiry);
    state.handle_timeout(expiry - Duration::from_secs(1));
    assert!(plans(&mut state).is_empty());
    state.handle_timeout(expiry);
    let [Some(plan)] = &plans(&mut state)[..] else {
        panic!("no plan without peers");
    };
    assert!(plan.wireguard.peers.is_empty());
    assert!(plan.netmap.policy.entries.is_empty());
    assert_eq!(state.standing(expiry), Standing::Expired);
    assert!(names(&state).contains(&"NodeKeyExpired"));
    let next = state.poll_timeout();
    assert!(next.is_none_or(|next| next > expiry), "the loop would spin");
}

#[test]
fn the_coordinators_clock_decides_not_ours() {
    let now = start();
    let mut state = restarted(20_000, now);
    assert_eq!(state.standing(now), Standing::Expired);
    state.handle_hello(hello(), now);
    assert_eq!(state.standing(now), Standing::Running);
}

#[test]
fn the_coordinator_hears_of_a_plan_when_everything_that_enforces_applied_it() {
    let now = start();
    let mut state = restarted(1_000, now);
    state.handle_hello(hello(), now);
    let revision = state.desired().unwrap().revision;
    state.handle_actuator(Actuator::WireGuard, revision, Ok(()), now);
    state.handle_actuator(Actuator::Routes, revision, Ok(()), now);
    state.handle_actuator(Actuator::Dataplane, revision - 1, Ok(()), now);
    assert!(applied(&mut state).is_empty());
    state.handle_actuator(Actuator::Dataplane, revision, Ok(()), now);
    let sent = applied(&mut state);
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].generation, &sent[0].error), (Generation(5), &None));

    state.handle_update(|_| Ok(accepted(netmap(6))), now);
    assert_eq!(state.applied(), None);
    let error = Err("no room in the map".to_owned());
    state.handle_actuator(Actuator::Dataplane, revision + 1, error, now);
    let sent = applied(&mut state);
    assert_eq!(sent[0].error.as_deref(), Some("no room in the map"));
    assert!(names(&state).contains(&"PolicyNotEnforced"));
    for actuator in Actuator::ALL {
        state.handle_actuator(actuator, revision + 1, Ok(()), now);
    }
    assert_eq!(applied(&mut state)[0].generation, Generation(6));
    assert!(names(&state).is_empty(), "{:?}", names(&state));
}

#[test]
fn up_is_no_news_to_a_node_that_is_connected() {
    let now = start();
    let mut state = restarted(1_000, now);
    state.handle_hello(hello(), now);
    assert!(state.is_connected());
    let routes = ["10.9.0.0/16".parse().unwrap()].into();
    let prefs = Prefs {
        advertised_routes: routes,
        ..prefs()
    };
    state.handle_up(prefs, None, now);
    assert!(state.is_connected());
    assert_eq!(state.disconnected(), None);
    state.handle_timeout(now + UNREACHABLE_AFTER);
    assert!(names(&state).is_empty(), "{:?}", names(&state));
}

#[test]
fn an_unreachable_coordinator_is_told_after_a_while_and_takes_nothing_away() {
    let now = start();
    let mut state = restarted(1_000, now);
    state.handle_failure(Failure::Unreachable("refused".to_owned()), now);
    assert!(names(&state).is_empty());
    let later = now + UNREACHABLE_AFTER;
    state.handle_timeout(later);
    assert_eq!(names(&state), ["CoordinatorUnreachable"]);
    state.handle_timeout(now + STALE_AFTER);
    assert!(names(&state).contains(&"NetmapStale"));
    assert_eq!(plans(&mut state).len(), 1);
    let back = now + STALE_AFTER * 2;
    state.handle_timeout(back);
    state.handle_hello(hello(), back);
    assert!(names(&state).is_empty());
}

#[test]
fn a_deleted_node_takes_everything_down_and_says_so() {
    let now = start();
    let mut state = restarted(1_000, now);
    state.handle_hello(hello(), now);
    plans(&mut state);
    state.handle_notice(Notice::Deleted("by an admin".to_owned()), now);
    assert!(matches!(plans(&mut state)[..], [None]));
    assert_eq!(names(&state), ["NodeDeleted"]);
    assert_eq!(state.standing(now), Standing::Stopped);
}

#[test]
fn a_pool_that_the_underlay_uses_itself_is_noticed() {
    let now = start();
    let mut state = restarted(1_000, now);
    let local = LocalPrefix {
        interface: "eth0".to_owned(),
        net: "100.64.3.7/24".parse().unwrap(),
    };
    state.handle_underlay(BTreeSet::new(), [local].into(), now);
    assert_eq!(names(&state), [routes::POOL_OVERLAP]);
    state.handle_underlay(BTreeSet::new(), BTreeSet::new(), now);
    assert!(names(&state).is_empty());
}

#[test]
fn a_plan_that_says_the_same_is_not_made_again() {
    let now = start();
    let mut state = restarted(1_000, now);
    plans(&mut state);
    let local = LocalPrefix {
        interface: "eth0".to_owned(),
        net: "198.51.100.7/24".parse().unwrap(),
    };
    state.handle_underlay(BTreeSet::new(), [local].into(), now);
    state.handle_timeout(now + Duration::from_secs(1));
    assert!(plans(&mut state).is_empty());
}

#[test]
fn nothing_makes_the_loop_spin() {
    let mut now = start();
    let mut state = restarted(1_000, now);
    for _ in 0..200 {
        while state.poll_transmit().is_some() {}
        while state.poll_output().is_some() {}
        let Some(at) = state.poll_timeout() else {
            break;
        };
        let before = state.poll_timeout();
        now = now.max(at);
        state.handle_timeout(now);
        let after = state.poll_timeout();
        assert!(after > before || after.is_none(), "{before:?} {after:?}");
    }
}

#[test]
fn an_exit_route_is_not_taken_unasked() {
    let mut map = netmap(1);
    let peer = map.peers.get_mut(&NodeId(4)).unwrap();
    let everything: [IpNet; 2] = ["0.0.0.0/0", "::/0"].map(|net| net.parse().unwrap());
    peer.routes.extend(everything);
    let local = Local {
        key: &keys().node,
        listen_port: 41641,
        underlay: &BTreeSet::new(),
    };
    let plan = desired::plan(&Arc::new(map), Access::Granted, &local, 1);
    let subnet = "10.4.0.0/16".parse().unwrap();
    let allowed = &plan.wireguard.peers[&NodePublic([4; 32])].allowed_ips;
    assert!(plan.routes.routes.contains(&subnet) && allowed.contains(&subnet));
    for net in everything {
        assert!(!plan.routes.routes.contains(&net) && !allowed.contains(&net));
    }
}
