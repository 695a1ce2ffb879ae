//! Laws of the policy compiler, held against random meshes and rules.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::dataplane::Tables;
use mesh_core::netmap::{Action, NodePolicy, build};
use mesh_core::node::{NodeId, UserId};
use mesh_core::policy::{CompiledPolicy, Document, check, compile};
use mesh_core::{Direction, Identity, RuleId};
use proptest::prelude::*;

mod history;
mod oracle;
mod scene;
#[path = "../support/mod.rs"]
mod support;

use history::{Step, history};
use scene::{Scene, Verb, rule, scene};

/// Ports where rules begin and end, and a few protocols, one of them in no rule.
const PROBES: [(u8, u16); 14] = [
    (6, 1),
    (6, 5),
    (6, 9),
    (6, 40000),
    (17, 3),
    (17, 11),
    (17, 17),
    (132, 5),
    (47, 0),
    (1, 8),
    (1, 13),
    (58, 128),
    (58, 1),
    (50, 0),
];

fn compiled(scene: &Scene) -> CompiledPolicy {
    let document = Document::parse(&scene.text()).unwrap();
    compile(&document, &scene.mesh.subjects(), None)
}

fn live(scene: &Scene) -> impl Iterator<Item = NodeId> {
    let nodes = scene.mesh.nodes.values().filter(|node| !node.expired);
    nodes.map(|node| node.id)
}

/// Every pair of nodes, in both families.
fn pairs(scene: &Scene) -> Vec<(NodeId, IpAddr, NodeId, IpAddr)> {
    let mut pairs = Vec::new();
    for src in live(scene) {
        for dst in live(scene).filter(|dst| *dst != src) {
            let mesh = &scene.mesh;
            pairs.push((src, mesh.v4(src), dst, mesh.v4(dst)));
            pairs.push((src, mesh.v6(src), dst, mesh.v6(dst)));
        }
    }
    pairs
}

/// Addresses behind routers, each a representative of what rules can tell apart.
const BEHIND: [&str; 9] = [
    "10.1.0.9",
    "10.1.2.9",
    "10.1.2.200",
    "10.1.3.1",
    "10.9.0.1",
    "fd99::7",
    "8.8.8.8",
    "198.51.100.1",
    "2001:db8::1",
];

/// The look-up that the packet path promises to equal.
fn looked_up(
    policy: &NodePolicy,
    remote: IpAddr,
    local: IpAddr,
    direction: Direction,
    (proto, port): (u8, u16),
) -> (Action, Option<RuleId>) {
    let identity = |address: IpAddr| {
        let holders = policy
            .identities
            .iter()
            .filter(|(net, _)| net.contains(&address));
        let longest = holders.max_by_key(|(net, _)| net.prefix_len());
        longest.map_or(Identity::UNKNOWN, |(_, identity)| *identity)
    };
    let (remote, local) = (identity(remote), identity(local));
    if remote == Identity::UNKNOWN {
        return (Action::Deny, None);
    }
    let mut found = policy.entries.iter().filter(|(key, _)| {
        (key.remote == remote || key.remote == Identity::ANY)
            && key.local == local
            && key.direction == direction
            && key.proto.is_none_or(|wanted| wanted == proto)
            && key.ports.contains(port)
    });
    let first = found
        .next()
        .map(|(_, entry)| (entry.action, Some(entry.rule)));
    assert!(found.next().is_none(), "two entries answer for one flow");
    first.unwrap_or((Action::Deny, None))
}

/// Everything that two compiles can be asked.
fn same(scene: &Scene, one: &CompiledPolicy, two: &CompiledPolicy) -> Result<(), TestCaseError> {
    let nodes: Vec<NodeId> = scene.mesh.nodes.keys().copied().collect();
    for &id in &nodes {
        prop_assert_eq!(one.node(id), two.node(id), "{} in\n{}", id, scene.text());
        prop_assert_eq!(one.peers(id), two.peers(id));
        prop_assert_eq!(one.ssh(id), two.ssh(id));
        prop_assert_eq!(one.attributes(id), two.attributes(id));
        for &other in &nodes {
            prop_assert_eq!(one.routes(id, other), two.routes(id, other));
            prop_assert_eq!(one.allowed_ips(id, other), two.allowed_ips(id, other));
            let source = scene.mesh.v4(other);
            prop_assert_eq!(one.capabilities(id, source), two.capabilities(id, source));
        }
        for behind in BEHIND {
            let behind: IpAddr = behind.parse().unwrap();
            let own = if behind.is_ipv4() {
                scene.mesh.v4(id)
            } else {
                scene.mesh.v6(id)
            };
            for (proto, port) in PROBES {
                prop_assert_eq!(
                    one.evaluate(own, behind, proto, port),
                    two.evaluate(own, behind, proto, port)
                );
            }
        }
    }
    for (_, src, _, dst) in pairs(scene) {
        for (proto, port) in PROBES {
            prop_assert_eq!(
                one.evaluate(src, dst, proto, port),
                two.evaluate(src, dst, proto, port)
            );
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_here_is_the_language(scene in scene()) {
        let document = Document::parse(&scene.text()).unwrap();
        prop_assert_eq!(check(&document, &scene.mesh.subjects()), Ok(()));
    }

    #[test]
    fn the_verdict_is_what_the_rules_say(scene in scene()) {
        let scene = scene.without_via();
        let policy = compiled(&scene);
        for (_, src, _, dst) in pairs(&scene) {
            for (proto, port) in PROBES {
                let ours = policy.evaluate(src, dst, proto, port).is_accept();
                let theirs = oracle::accepts(&scene, src, dst, proto, port);
                prop_assert_eq!(ours, theirs, "{} -> {} {}/{}\n{}", src, dst, proto, port, scene.text());
            }
        }
    }

    #[test]
    fn rows_are_counted_as_the_packet_filter_has_them(scene in scene()) {
        let policy = compiled(&scene);
        let world = scene.mesh.world();
        for node in live(&scene) {
            let map = build::build(&world, &policy, node).unwrap();
            let rows = Tables::of(&map, 1280).rows.len();
            prop_assert_eq!(policy.rows(node), rows, "{} in\n{}", node, scene.text());
        }
    }

    #[test]
    fn what_lies_behind_routers_is_judged_by_the_same_rules(scene in scene()) {
        let scene = scene.without_via();
        let policy = compiled(&scene);
        for node in live(&scene) {
            for behind in BEHIND {
                let behind: IpAddr = behind.parse().unwrap();
                let own = if behind.is_ipv4() { scene.mesh.v4(node) } else { scene.mesh.v6(node) };
                let routed = live(&scene)
                    .flat_map(|router| policy.routes(node, router))
                    .filter(|route| route.contains(&behind))
                    .max_by_key(|route| route.prefix_len());
                // Through an exit node goes the internet; what it routes besides it may well refuse.
                let exact = routed.is_some_and(|route| {
                    route.prefix_len() > 0 || oracle::in_internet(&scene, behind)
                });
                for (proto, port) in PROBES {
                    let says = oracle::accepts(&scene, own, behind, proto, port);
                    let ours = policy.evaluate(own, behind, proto, port).is_accept();
                    let told = || format!("{own} -> {behind} {proto}/{port}\n{}", scene.text());
                    if exact {
                        prop_assert_eq!(ours, says, "{}", told());
                    } else {
                        prop_assert!(!ours || says && routed.is_some(), "{}", told());
                    }
                }
            }
        }
    }

    #[test]
    fn both_ends_load_entries_that_say_the_verdict(scene in scene()) {
        let policy = compiled(&scene);
        let loaded: BTreeMap<NodeId, NodePolicy> =
            live(&scene).map(|id| (id, policy.node(id))).collect();
        for (from, src, to, dst) in pairs(&scene) {
            for probe in PROBES {
                let decision = policy.evaluate(src, dst, probe.0, probe.1);
                let decision = (decision.action, decision.rule);
                let received = looked_up(&loaded[&to], src, dst, Direction::Ingress, probe);
                let sent = looked_up(&loaded[&from], dst, src, Direction::Egress, probe);
                prop_assert_eq!(received, decision);
                prop_assert_eq!(sent, decision);
            }
        }
        for policy in loaded.values() {
            for entry in policy.entries.values() {
                prop_assert!(policy.rules.contains_key(&entry.rule));
            }
        }
    }

    #[test]
    fn a_node_is_told_of_nobody_whom_it_may_not_see(scene in scene()) {
        let policy = compiled(&scene);
        for viewer in live(&scene) {
            let peers = policy.peers(viewer);
            let told = policy.node(viewer);
            for other in scene.mesh.nodes.keys().filter(|other| **other != viewer) {
                let sees = peers.contains(other);
                prop_assert_eq!(sees, policy.sees(*other, viewer));
                let addresses = scene.mesh.nodes[other].addresses.prefixes();
                prop_assert!(addresses.iter().all(|address| told.identities.contains_key(address) == sees));
            }
        }
    }

    #[test]
    fn the_order_of_rules_and_users_does_not_matter(scene in scene(), turn in 0_usize..7) {
        let mut other = scene.clone();
        let turn = turn % other.rules.len().max(1);
        other.rules.rotate_left(turn);
        other.rules.reverse();
        // The same people with other numbers.
        let number = |id: UserId| UserId(100 - id.0);
        other.mesh.users = scene.mesh.users.values().map(|user| {
            let mut user = (**user).clone();
            user.id = number(user.id);
            (user.id, Arc::new(user))
        }).collect();
        for node in other.mesh.nodes.values_mut() {
            if let Some(user) = node.owner.user() {
                Arc::make_mut(node).owner = mesh_core::node::Owner::User(number(user));
            }
        }
        let (policy, other) = (compiled(&scene), compiled(&other));
        for (from, src, _, dst) in pairs(&scene) {
            prop_assert_eq!(policy.peers(from), other.peers(from));
            for (proto, port) in PROBES {
                let [a, b] = [&policy, &other].map(|policy| policy.evaluate(src, dst, proto, port));
                prop_assert_eq!(a.action, b.action);
            }
        }
    }

    #[test]
    fn an_accept_never_takes_and_a_deny_never_gives(scene in scene(), rule in rule()) {
        let scene = scene.without_via();
        let rule = scene::Rule { via: None, ..rule };
        let verb = rule.verb;
        let (before, after) = (compiled(&scene), compiled(&scene.with(rule)));
        for (_, src, _, dst) in pairs(&scene) {
            for (proto, port) in PROBES {
                let [was, is] = [&before, &after].map(|policy| policy.evaluate(src, dst, proto, port).is_accept());
                match verb {
                    Verb::Accept | Verb::Grant => prop_assert!(!was || is),
                    Verb::Deny => prop_assert!(was || !is),
                }
            }
        }
    }

    #[test]
    fn the_same_world_compiles_to_the_same_bytes(scene in scene()) {
        let (one, two) = (compiled(&scene), compiled(&scene));
        for id in live(&scene) {
            prop_assert_eq!(one.node(id), two.node(id));
        }
    }

    #[test]
    fn what_is_kept_current_is_what_would_be_made_anew((scene, moments) in history()) {
        let mut scene = scene;
        let mut comments = 0;
        let mut kept = compiled(&scene);
        for moment in moments {
            // Some of it was already asked for, and is kept.
            for id in live(&scene).step_by(2) {
                kept.node(id);
                kept.ssh(id);
            }
            for step in moment {
                Step::apply(step, &mut scene, &mut comments);
            }
            let text = format!("{}{}", "// edited\n".repeat(comments), scene.text());
            let document = Document::parse(&text).unwrap();
            let subjects = scene.mesh.subjects();
            kept = compile(&document, &subjects, Some(&kept));
            let anew = compile(&document, &subjects, None);
            same(&scene, &kept, &anew)?;
        }
    }

    #[test]
    fn a_twin_joins_without_a_new_entry_anywhere(scene in scene()) {
        // Entries grow with what policy tells apart, never with nodes.
        let mut grown = scene.clone();
        let Some(first) = live(&scene).next() else { return Ok(()) };
        let literal = |selector: &scene::Selector| {
            use scene::Selector::{Host, IpSet, Prefix};
            matches!(selector, Prefix(_) | Host(_) | IpSet(_))
        };
        grown.rules.retain(|rule| !rule.src.iter().chain(&rule.dst).any(literal));
        let before = compiled(&grown);
        let owner = scene.mesh.nodes[&first].owner.clone();
        let twin = grown.mesh.node_at("twin", owner, "100.64.9.9".parse().unwrap(), "fd7a:115c:a1e0::909".parse().unwrap());
        let nature = scene.mesh.nodes[&first].clone();
        let node = Arc::make_mut(grown.mesh.nodes.get_mut(&twin).unwrap());
        node.host = nature.host.clone();
        node.attributes = nature.attributes.clone();
        let alone = nature.approved_routes.is_empty();
        let after = compiled(&grown);
        for id in live(&scene).filter(|_| alone) {
            prop_assert_eq!(before.node(id).entries, after.node(id).entries);
        }
        prop_assert_eq!(after.sees(first, twin), after.sees(twin, first));
    }

    #[test]
    fn no_text_breaks_the_parser_or_the_compiler(
        sections in prop::collection::vec(
            r#"("(acls|grants|denies|groups|hosts|tests|ssh|ipsets|postures|nodeAttrs)": ?[\[{"a-z:,*0-9./@ \]}]{0,40}[\]}],? ?){0,4}"#, 0..3),
    ) {
        let text = format!("{{{}}}", sections.concat());
        if let Ok(document) = Document::parse(&text) {
            let mesh = support::Mesh::default();
            let _ = check(&document, &mesh.subjects());
            compile(&document, &mesh.subjects(), None);
        }
    }
}
