//! The meaning of a policy, said as plainly as possible: for one packet, ask every rule.
//!
//! Shares nothing with the compiler, not even the parser: it reads the rules that the text was
//! printed from.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::node::{Node, UserId};

use crate::scene::{Ports, Rule, Scene, Selector, Verb};

/// May a new flow be opened?
pub(crate) fn accepts(scene: &Scene, src: IpAddr, dst: IpAddr, proto: u8, port: u16) -> bool {
    let hit = |verb: Verb| {
        scene
            .rules
            .iter()
            .filter(|rule| rule.verb == verb)
            .any(|rule| joins(scene, rule, src, dst) && covers(rule, proto, port))
    };
    hit(Verb::Accept) && !hit(Verb::Deny)
}

fn joins(scene: &Scene, rule: &Rule, src: IpAddr, dst: IpAddr) -> bool {
    let source = rule
        .src
        .iter()
        .any(|selector| holds(scene, selector, src, true));
    source
        && match &rule.dst {
            Selector::Own => {
                let (a, b) = (user(scene, src), user(scene, dst));
                a.is_some() && a == b
            }
            selector => holds(scene, selector, dst, false),
        }
}

fn covers(rule: &Rule, proto: u8, port: u16) -> bool {
    let in_ports = match rule.ports {
        Ports::All => true,
        Ports::Range(first, last) => (first..=last).contains(&port),
    };
    match (rule.proto, proto) {
        // An echo passes where any rule joins the two.
        (_, 1) if rule.verb == Verb::Accept && port == 8 => true,
        (_, 58) if rule.verb == Verb::Accept && port == 128 => true,
        (None, 6 | 17) => in_ports,
        // A deny of ports says nothing of what has none.
        (None, 1 | 58) => rule.verb == Verb::Accept || rule.ports == Ports::All,
        (Some(wanted), proto) => wanted == proto && in_ports,
        (None, _) => false,
    }
}

fn holds(scene: &Scene, selector: &Selector, address: IpAddr, as_source: bool) -> bool {
    let owner = node(scene, address);
    match selector {
        Selector::Any if as_source => in_mesh(scene, address),
        Selector::Any => true,
        Selector::Prefix(net) => net.contains(&address),
        Selector::Tag(tag) => {
            owner.is_some_and(|node| node.owner.tags().any(|own| own.as_str() == *tag))
        }
        Selector::User(login) => {
            user(scene, address).is_some_and(|id| scene.mesh.users[&id].name.as_str() == *login)
        }
        Selector::Group => user(scene, address).is_some_and(|id| id.0 <= 2),
        Selector::Member => user(scene, address).is_some(),
        Selector::Tagged => owner.is_some_and(|node| node.owner.user().is_none()),
        Selector::Own => false,
    }
}

fn in_mesh(scene: &Scene, address: IpAddr) -> bool {
    let reserved: IpNet = "100.115.92.0/23".parse().unwrap();
    let mut nodes = scene.mesh.nodes.values();
    let routed = nodes.any(|node| {
        !node.expired
            && node
                .approved_routes
                .iter()
                .any(|route| route.contains(&address))
    });
    routed || (scene.mesh.pools.contains(address) && !reserved.contains(&address))
}

fn node(scene: &Scene, address: IpAddr) -> Option<&Node> {
    let mut nodes = scene.mesh.nodes.values();
    let found = nodes.find(|node| !node.expired && node.addresses.contains(address));
    found.map(AsRef::as_ref)
}

fn user(scene: &Scene, address: IpAddr) -> Option<UserId> {
    node(scene, address)?.owner.user()
}
