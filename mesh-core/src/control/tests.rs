//! The session against a coordinator played by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::key::{MachineKey, NodeKey};
use crate::netmap::{Me, NodePolicy};
use crate::node::{Addresses, Epoch, Generation, MeshId, Name, NodeId, UnixTime};
use crate::world::{Mesh, Pools};

const MESH: MeshId = MeshId([7; 16]);
const ME: Membership = Membership {
    mesh: MESH,
    node: NodeId(3),
};

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

fn netmap(epoch: u64, generation: u64) -> Netmap {
    Netmap {
        mesh: Mesh {
            id: MESH,
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([1; 5]),
            },
        },
        epoch: Epoch(epoch),
        generation: Generation(generation),
        me: Me {
            id: ME.node,
            name: Name::parse("me").unwrap(),
            key: keys().node.public(),
            addresses: Addresses {
                v4: [100, 64, 0, 1].into(),
                v6: [0xfd01, 0, 0, 0, 0, 0, 0, 1].into(),
            },
            tags: BTreeSet::new(),
            user: None,
            expires: None,
            expired: false,
        },
        peers: BTreeMap::new(),
        policy: NodePolicy::default(),
    }
}

fn accepted(kind: Kind, netmap: Netmap) -> Accepted {
    Accepted {
        netmap,
        kind,
        signed: Arc::from(&b"signed"[..]),
    }
}

fn hello(node: Option<NodeId>) -> Hello {
    Hello {
        challenge: NodeKey::from_seed([9; 32]).public(),
        exporter: [5; 32],
        now: UnixTime(1_000),
        node,
    }
}

fn transmits(session: &mut Session) -> Vec<Transmit> {
    std::iter::from_fn(|| session.poll_transmit()).collect()
}

fn events(session: &mut Session) -> Vec<Event> {
    std::iter::from_fn(|| session.poll_event()).collect()
}

/// A session of an enrolled node, streaming, with `chain` held.
fn streaming(chain: Option<Chain>, now: Instant) -> Session {
    let mut session = Session::new(keys(), Some(ME), chain, 1);
    session.handle_up(None, now);
    session.handle_hello(hello(Some(ME.node)), now);
    assert!(session.is_connected());
    transmits(&mut session);
    events(&mut session);
    session
}

fn chain(epoch: u64, generation: u64) -> Chain {
    Chain::after(None, accepted(Kind::Full, netmap(epoch, generation))).unwrap()
}

#[test]
fn a_new_machine_enrolls_and_begins_with_nothing_held() {
    let now = start();
    let mut session = Session::new(keys(), None, None, 1);
    let enroll = Enroll {
        auth_key: "secret".to_owned(),
        name: String::new(),
    };
    session.handle_up(Some(enroll.clone()), now);
    assert!(matches!(transmits(&mut session)[..], [Transmit::Connect]));

    session.handle_hello(hello(None), now);
    let sent = transmits(&mut session);
    let [
        Transmit::Enroll {
            enroll: sent,
            proof,
        },
    ] = &sent[..]
    else {
        panic!("{sent:?}");
    };
    assert_eq!(*sent, enroll);
    let machine = keys().machine.public();
    let context = ProofContext {
        exporter: &[5; 32],
        machine: &machine,
        node: &keys().node.public(),
    };
    assert!(proof.verify(&NodeKey::from_seed([9; 32]), &context));

    session.handle_enrolled(ME, now);
    assert!(matches!(
        transmits(&mut session)[..],
        [Transmit::Begin { held: None, .. }, Transmit::Report(_)]
    ));
    session.handle_update(|_| Ok(accepted(Kind::Full, netmap(0, 1))), now);
    assert!(matches!(
        events(&mut session)[..],
        [
            Event::Clock(UnixTime(1_000)),
            Event::Enrolled(ME),
            Event::Connected,
            Event::Netmap(_)
        ]
    ));
}

#[test]
fn a_refused_key_is_not_tried_again() {
    let now = start();
    let mut session = Session::new(keys(), None, None, 1);
    let enroll = Enroll {
        auth_key: "spent".to_owned(),
        name: String::new(),
    };
    session.handle_up(Some(enroll), now);
    session.handle_hello(hello(None), now);
    session.handle_failure(Failure::Denied("the key was used".to_owned()), now);
    assert!(session.is_off());
    assert_eq!(session.poll_timeout(), None);
    let heard = events(&mut session);
    assert!(
        matches!(&heard[..], [_, Event::Disconnected(Failure::Denied(text))] if text == "the key was used")
    );
}

#[test]
fn an_unreachable_coordinator_is_tried_again_with_growing_waits() {
    let mut now = start();
    let mut session = Session::new(keys(), Some(ME), Some(chain(0, 5)), 1);
    session.handle_up(None, now);
    let mut waits = Vec::new();
    for _ in 0..10 {
        session.handle_failure(Failure::Unreachable("refused".to_owned()), now);
        let until = session.poll_timeout().unwrap();
        waits.push(until - now);
        now = until;
        transmits(&mut session);
        session.handle_timeout(now);
        assert!(matches!(transmits(&mut session)[..], [Transmit::Connect]));
    }
    assert!(waits[9] > waits[0] * 10, "{waits:?}");
    assert_eq!(session.chain().unwrap().position().1, Generation(5));
}

#[test]
fn a_reconnecting_node_says_what_it_holds() {
    let now = start();
    let mut session = Session::new(keys(), Some(ME), Some(chain(0, 5)), 1);
    session.handle_up(None, now);
    transmits(&mut session);
    session.handle_hello(hello(Some(ME.node)), now);
    let sent = transmits(&mut session);
    assert!(
        matches!(&sent[0], Transmit::Begin { held: Some(held), .. } if held.generation == Generation(5))
    );
}

#[test]
fn older_generations_and_epochs_are_refused_and_a_new_epoch_is_taken() {
    let now = start();
    let mut session = streaming(Some(chain(1, 5)), now);
    let check = |session: &mut Session, kind, epoch, generation, taken: bool| {
        session.handle_update(|_| Ok(accepted(kind, netmap(epoch, generation))), now);
        let heard = events(session);
        let was_taken = matches!(heard[..], [Event::Netmap(_)]);
        assert_eq!(was_taken, taken, "{epoch} {generation}: {heard:?}");
    };
    check(&mut session, Kind::Full, 1, 4, false);
    check(&mut session, Kind::Full, 0, 9, false);
    check(&mut session, Kind::Delta, 1, 4, false);
    check(&mut session, Kind::Delta, 1, 6, true);
    check(&mut session, Kind::Full, 2, 1, true);
    check(&mut session, Kind::Full, 1, 7, false);
    assert_eq!(
        session.chain().unwrap().position(),
        (Epoch(2), Generation(1))
    );
}

#[test]
fn a_gap_asks_for_a_full_map() {
    let mut now = start();
    let mut session = streaming(Some(chain(0, 5)), now);
    session.handle_update(|_| Err(Refused::Gap), now);
    assert!(!session.is_connected());
    now = session.poll_timeout().unwrap();
    session.handle_timeout(now);
    session.handle_hello(hello(Some(ME.node)), now);
    let sent = transmits(&mut session);
    assert!(
        sent.iter()
            .any(|sent| matches!(sent, Transmit::Begin { held: None, .. })),
        "{sent:?}"
    );
}

#[test]
fn an_update_for_another_node_is_refused() {
    let now = start();
    let mut session = streaming(None, now);
    let mut foreign = netmap(0, 1);
    foreign.me.id = NodeId(4);
    session.handle_update(|_| Ok(accepted(Kind::Full, foreign)), now);
    assert!(session.chain().is_none());
    assert!(matches!(
        events(&mut session)[..],
        [Event::Refused(Refused::Untrusted(_))]
    ));
}

#[test]
fn a_deleted_node_forgets_its_map_and_stays_off() {
    let now = start();
    let mut session = streaming(Some(chain(0, 5)), now);
    session.handle_notice(Notice::Deleted("deleted by an admin".to_owned()), now);
    assert!(session.is_off());
    assert!(session.chain().is_none());
    assert_eq!(session.membership(), None);
}

#[test]
fn two_clones_do_not_evict_each_other_in_a_loop() {
    let now = start();
    let mut session = streaming(Some(chain(0, 5)), now);
    session.handle_notice(Notice::Replaced("from another address".to_owned()), now);
    assert!(session.poll_timeout().unwrap() >= now + REPLACED_WAIT / 2);
    assert!(session.chain().is_some());
}

#[test]
fn a_long_chain_is_replaced_by_a_full_map() {
    let now = start();
    let mut session = streaming(Some(chain(0, 0)), now);
    let mut generation = 0;
    let mut update = |session: &mut Session, now| {
        generation += 1;
        assert!(generation < 1_000, "the chain grows without end");
        session.handle_update(|_| Ok(accepted(Kind::Delta, netmap(0, generation))), now);
    };
    while session.poll_timeout().is_none() {
        update(&mut session, now);
    }
    // What came is applied first; and however much follows, it is put off no further.
    let then = now + SHORTEN_AFTER;
    update(&mut session, then - Duration::from_millis(1));
    assert_eq!(session.poll_timeout(), Some(then));
    assert!(session.is_connected());
    session.handle_timeout(then);
    transmits(&mut session);
    session.handle_hello(hello(Some(ME.node)), now);
    assert!(matches!(
        transmits(&mut session)[0],
        Transmit::Begin { held: None, .. }
    ));
    session.handle_update(
        |_| Ok(accepted(Kind::Full, netmap(0, generation))),
        now + Duration::from_secs(1),
    );
    assert_eq!(session.chain().unwrap().links().len(), 1);
}

#[test]
fn deltas_smaller_than_the_full_map_do_not_make_a_chain_long() {
    let of = |kind, generation, bytes: usize| Accepted {
        signed: vec![0; bytes].into(),
        ..accepted(kind, netmap(0, generation))
    };
    let full = Chain::after(None, of(Kind::Full, 0, 3 << 20)).unwrap();
    let after = |held, generation, bytes| {
        Chain::after(Some(held), of(Kind::Delta, generation, bytes)).unwrap()
    };
    let second = after(&full, 1, 2 << 20);
    assert!(!second.is_long());
    assert!(after(&second, 2, 2 << 20).is_long());
    let small = Chain::after(None, of(Kind::Full, 0, 1)).unwrap();
    assert!(!after(&small, 1, 1 << 20).is_long());
    assert!(after(&small, 1, (1 << 20) + 1).is_long());
}

#[test]
fn an_expired_node_enrolls_again_with_a_fresh_key_only() {
    let now = start();
    let mut expired = netmap(0, 5);
    expired.me.expired = true;
    let chain = Chain::after(None, accepted(Kind::Full, expired)).unwrap();
    let mut session = streaming(Some(chain), now);
    session.handle_up(None, now);
    assert!(session.is_connected());

    let enroll = Enroll {
        auth_key: "fresh".to_owned(),
        name: String::new(),
    };
    session.handle_up(Some(enroll), now);
    session.handle_hello(hello(Some(ME.node)), now);
    assert!(matches!(
        transmits(&mut session).last(),
        Some(Transmit::Enroll { .. })
    ));
    session.handle_enrolled(ME, now);
    session.handle_update(|_| Ok(accepted(Kind::Full, netmap(0, 6))), now);
    assert!(!session.must_enroll_again());
}

#[test]
fn a_session_that_is_off_ignores_what_comes_late() {
    let now = start();
    let mut session = streaming(Some(chain(0, 5)), now);
    session.handle_down(false);
    transmits(&mut session);
    session.handle_failure(Failure::Unreachable("closed".to_owned()), now);
    session.handle_update(|_| panic!("nobody asks"), now);
    session.handle_hello(hello(None), now);
    session.handle_enrolled(ME, now);
    session.handle_timeout(now + Duration::from_secs(1_000));
    assert!(session.is_off());
    assert!(transmits(&mut session).is_empty());
}
