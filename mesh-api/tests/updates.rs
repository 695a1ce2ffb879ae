//! Signed updates over random netmaps: what arrives is what was sent, or it is refused.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};
use mesh_api::held::Held;
use mesh_api::update::{Refused, Verifier, sign_delta, sign_full};
use mesh_api::v1;
use mesh_core::key::{MachineKey, NodeKey, NodePublic};
use mesh_core::netmap::delta::{diff, since};
use mesh_core::netmap::{
    Action, Entry, EntryKey, Me, Netmap, NodePolicy, Peer, PortRange, Rule, StaleGeneration,
};
use mesh_core::node::{
    Addresses, Epoch, Generation, MeshId, Name, NodeId, Tag, UnixTime, UserName,
};
use mesh_core::world::{Mesh, Pools};
use mesh_core::{Direction, Identity, RuleId};
use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use prost::Message as _;

fn addresses(n: u32) -> Addresses {
    Addresses {
        v4: Ipv4Addr::from(0x6440_0000 | n),
        v6: (0xfd00_u128 << 112 | u128::from(n)).into(),
    }
}

fn key(n: u8) -> NodePublic {
    NodeKey::from_seed([n; 32]).public()
}

fn tags() -> impl Strategy<Value = BTreeSet<Tag>> {
    btree_set(
        "tag:[a-z]{1,4}".prop_map(|text| Tag::parse(&text).unwrap()),
        0..3,
    )
}

fn net() -> impl Strategy<Value = IpNet> {
    (any::<u32>(), 8_u8..=32).prop_map(|(a, len)| Ipv4Net::new_assert(a.into(), len).trunc().into())
}

fn peer(id: NodeId) -> impl Strategy<Value = Peer> {
    let endpoint =
        (any::<[u8; 16]>(), 1_u16..).prop_map(|(a, p)| SocketAddr::new(IpAddr::from(a), p));
    (
        any::<u8>(),
        btree_set(endpoint, 0..3),
        btree_set(net(), 0..2),
        tags(),
        "[a-z]{1,9}",
    )
        .prop_map(move |(seed, endpoints, routes, tags, name)| Peer {
            id,
            name: Name::parse(&name).unwrap(),
            key: key(seed),
            addresses: addresses(id.0 as u32),
            endpoints,
            routes,
            user: tags
                .is_empty()
                .then(|| UserName::parse("a@example.org").unwrap()),
            tags,
        })
}

fn peers() -> impl Strategy<Value = BTreeMap<NodeId, Peer>> {
    btree_set(2_u64..12, 0..6).prop_flat_map(|ids| {
        let peers: Vec<_> = ids.into_iter().map(|id| peer(NodeId(id))).collect();
        peers.prop_map(|peers| peers.into_iter().map(|peer| (peer.id, peer)).collect())
    })
}

fn entry() -> impl Strategy<Value = (EntryKey, Entry)> {
    let proto = prop_oneof![Just(None), Just(Some(6_u8)), Just(Some(17))];
    (1_u32..40, proto, any::<[u16; 2]>(), any::<bool>(), 1_u32..9).prop_map(
        |(remote, proto, ends, out, rule)| {
            let ports = match proto {
                None => PortRange::ALL,
                Some(_) => PortRange {
                    first: ends[0].min(ends[1]),
                    last: ends[0].max(ends[1]),
                },
            };
            let direction = if out {
                Direction::Egress
            } else {
                Direction::Ingress
            };
            let key = EntryKey {
                remote: Identity(remote),
                local: Identity(16),
                direction,
                proto,
                ports,
            };
            let action = if rule % 2 == 0 {
                Action::Deny
            } else {
                Action::Accept
            };
            (
                key,
                Entry {
                    action,
                    rule: RuleId(rule),
                },
            )
        },
    )
}

fn policy() -> impl Strategy<Value = NodePolicy> {
    let identity = (16_u32..40).prop_map(Identity);
    let rule = (1_u32..99, "[ -~]{0,20}").prop_map(|(line, summary)| Rule {
        file: "policy.hujson".into(),
        line,
        summary,
    });
    let rules = btree_map((1_u32..9).prop_map(RuleId), rule, 0..5);
    let entries =
        proptest::collection::vec(entry(), 0..8).prop_map(|all| all.into_iter().collect());
    (btree_map(net(), identity, 0..6), entries, rules).prop_map(|(identities, entries, rules)| {
        NodePolicy {
            identities,
            entries,
            rules,
        }
    })
}

fn netmap(generation: u64) -> impl Strategy<Value = Netmap> {
    (peers(), policy(), tags(), any::<Option<u64>>()).prop_map(
        move |(peers, policy, tags, expires)| Netmap {
            mesh: Mesh {
                id: MeshId([1; 16]),
                domain: "mesh.internal".to_owned(),
                pools: Pools {
                    v4: Pools::default_v4(),
                    v6: Pools::ula([1; 5]),
                },
            },
            epoch: Epoch(1),
            generation: Generation(generation),
            me: Me {
                id: NodeId(1),
                name: Name::parse("me").unwrap(),
                key: key(1),
                addresses: addresses(1),
                tags,
                user: None,
                expires: expires.map(UnixTime),
                expired: false,
            },
            peers,
            policy,
        },
    )
}

fn coordinator() -> MachineKey {
    MachineKey::from_seed([9; 32])
}

fn verifier() -> Verifier {
    Verifier {
        coordinator: coordinator().public(),
        addressee: Some((MeshId([1; 16]), NodeId(1))),
    }
}

proptest! {
    #[test]
    fn a_whole_map_arrives_as_it_was_sent(map in netmap(5)) {
        prop_assert_eq!(verifier().accept(None, &sign_full(&coordinator(), &map)), Ok(map));
    }

    #[test]
    fn a_delta_leads_from_one_map_to_the_other(old in netmap(5), new in netmap(6)) {
        let signed = sign_delta(&coordinator(), old.digest(), &diff(&old, &new), &new);
        prop_assert_eq!(verifier().accept(Some(&old), &signed), Ok(new.clone()));
        prop_assert_eq!(diff(&new, &new).is_empty(), true);
    }

    #[test]
    fn item_digests_alone_give_the_same_delta(old in netmap(5), new in netmap(6)) {
        let held = v1::Held::from(&Held::of(&old));
        let held = Held::try_from(&held).unwrap();
        prop_assert_eq!(held.digest, old.digest());
        prop_assert_eq!(since(&held.items, &new), diff(&old, &new));
    }

    #[test]
    fn a_delta_on_another_map_is_a_gap(old in netmap(5), new in netmap(6), other in netmap(5)) {
        prop_assume!(old.digest() != other.digest());
        let signed = sign_delta(&coordinator(), old.digest(), &diff(&old, &new), &new);
        prop_assert_eq!(verifier().accept(Some(&other), &signed), Err(Refused::Gap));
        prop_assert_eq!(verifier().accept(None, &signed), Err(Refused::Gap));
    }

    #[test]
    fn one_flipped_bit_breaks_the_signature(map in netmap(5), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let mut signed = sign_full(&coordinator(), &map);
        let at = at.index(signed.update.len());
        signed.update[at] ^= 1 << bit;
        prop_assert_eq!(verifier().accept(None, &signed), Err(Refused::Signature));
    }

    #[test]
    fn no_bytes_panic_the_door(update in proptest::collection::vec(any::<u8>(), 0..300)) {
        let signature = coordinator().sign("mesh netmap update v1", &update).0.to_vec();
        let refused = verifier().accept(None, &v1::SignedUpdate { update, signature });
        prop_assert!(refused.is_err());
    }
}

fn sample(generation: u64) -> Netmap {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut map = netmap(generation).new_tree(&mut runner).unwrap().current();
    map.generation = Generation(generation);
    map
}

#[test]
fn an_older_generation_or_epoch_is_refused() {
    let old = sample(5);
    let held = sample(6);
    let refused = verifier().accept(Some(&held), &sign_full(&coordinator(), &old));
    assert!(matches!(
        refused,
        Err(Refused::Stale(StaleGeneration::Backwards { .. }))
    ));

    let restored = Netmap {
        epoch: Epoch(2),
        ..sample(1)
    };
    assert_eq!(
        verifier().accept(Some(&held), &sign_full(&coordinator(), &restored)),
        Ok(restored.clone())
    );
    let refused = verifier().accept(Some(&restored), &sign_full(&coordinator(), &held));
    assert!(matches!(
        refused,
        Err(Refused::Stale(StaleGeneration::Epoch { .. }))
    ));
}

#[test]
fn a_map_for_another_node_is_refused() {
    let mut map = sample(5);
    map.me.id = NodeId(2);
    let signed = sign_full(&coordinator(), &map);
    assert_eq!(verifier().accept(None, &signed), Err(Refused::Misdirected));
}

#[test]
fn a_map_with_a_hostile_name_is_refused_whole() {
    let map = sample(5);
    let honest = sign_full(&coordinator(), &map);
    let mut update = v1::NetmapUpdate::decode(honest.update.as_slice()).unwrap();
    if let Some(v1::netmap_update::Body::Full(map)) = &mut update.body {
        map.me.as_mut().unwrap().name = "../../etc/cron.d/x".to_owned();
    }
    let update = update.encode_to_vec();
    let signature = coordinator()
        .sign("mesh netmap update v1", &update)
        .0
        .to_vec();
    let refused = verifier().accept(None, &v1::SignedUpdate { update, signature });
    assert!(matches!(refused, Err(Refused::Malformed(_))));
}
