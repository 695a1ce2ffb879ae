//! The meaning of a policy, said as plainly as possible: for one packet, ask every rule.
//!
//! Shares nothing with the compiler, not even the parser: it reads the rules that the text was
//! printed from. It knows nothing of `via`.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::node::{Node, User};

use crate::scene::{CONDITIONS, Ports, Rule, Scene, Selector, Verb};

/// May a new flow be opened?
pub(crate) fn accepts(scene: &Scene, src: IpAddr, dst: IpAddr, proto: u8, port: u16) -> bool {
    let hit = |deny: bool| {
        scene
            .rules
            .iter()
            .filter(|rule| (rule.verb == Verb::Deny) == deny)
            .any(|rule| joins(scene, rule, src, dst) && covers(scene, rule, proto, port))
    };
    hit(false) && !hit(true)
}

fn joins(scene: &Scene, rule: &Rule, src: IpAddr, dst: IpAddr) -> bool {
    assert!(rule.via.is_none(), "the oracle does not know the way");
    let mut sources = rule.src.iter();
    let mut destinations = rule.dst.iter();
    sources.any(|selector| holds(scene, selector, src, true))
        && postured(scene, rule, src)
        && destinations.any(|dst_selector| match dst_selector {
            Selector::Own => {
                let (a, b) = (user(scene, src), user(scene, dst));
                a.is_some() && a.map(|user| user.id) == b.map(|user| user.id)
            }
            selector => holds(scene, selector, dst, false),
        })
}

/// Any one of the rule's postures will do, else the default one; to be denied takes none.
fn postured(scene: &Scene, rule: &Rule, src: IpAddr) -> bool {
    let default: Vec<usize> = scene.names.default_posture.into_iter().collect();
    let postures = rule.postures.as_ref().unwrap_or(&default);
    let has = |posture: &usize| {
        let mut conditions = scene.names.postures[*posture].iter();
        node(scene, src).is_some_and(|node| conditions.all(|at| CONDITIONS[*at].1(node)))
    };
    rule.verb == Verb::Deny || postures.is_empty() || postures.iter().any(has)
}

fn covers(scene: &Scene, rule: &Rule, proto: u8, port: u16) -> bool {
    let in_ports = match rule.ports {
        Ports::All => true,
        Ports::Range(first, last) => (first..=last).contains(&port),
    };
    let accepts = rule.verb != Verb::Deny;
    // An echo passes where any rule joins the two, unless the policy says otherwise.
    let echo = accepts && !scene.names.strict_icmp && matches!((proto, port), (1, 8) | (58, 128));
    let asked = match (rule.proto, proto) {
        (None, 6 | 17) => in_ports,
        // A deny of ports says nothing of what has none.
        (None, 1 | 58) => accepts || rule.ports == Ports::All,
        (Some(wanted), proto) => wanted == proto && in_ports,
        (None, _) => false,
    };
    echo || asked
}

fn holds(scene: &Scene, selector: &Selector, address: IpAddr, as_source: bool) -> bool {
    let owner = node(scene, address);
    let person = user(scene, address);
    match selector {
        Selector::Any if as_source => in_mesh(scene, address),
        Selector::Any | Selector::DangerAll => true,
        Selector::Prefix(net) => net.contains(&address),
        Selector::Host(at) => scene.names.hosts[*at].contains(&address),
        Selector::IpSet(at) => in_set(scene, *at, address),
        Selector::Tag(tag) => {
            owner.is_some_and(|node| node.owner.tags().any(|own| own.as_str() == *tag))
        }
        Selector::Group(at) => {
            let mut members = scene.names.groups[*at].iter();
            members.any(|member| holds(scene, member, address, as_source))
        }
        Selector::User(login) => {
            person.is_some_and(|user| user.name.as_str().eq_ignore_ascii_case(login))
        }
        Selector::Domain(domain) => person.is_some_and(|user| {
            let parts = user.name.as_str().rsplit_once('@');
            parts.is_some_and(|(_, of)| of.eq_ignore_ascii_case(domain))
        }),
        Selector::Idp(group) => person.is_some_and(|user| user.idp_groups.contains(*group)),
        Selector::Role(mesh_core::node::Role::Member) | Selector::Member => {
            owner.is_some_and(|node| node.owner.user().is_some())
        }
        Selector::Role(role) => person.is_some_and(|user| user.role == *role),
        Selector::Tagged => owner.is_some_and(|node| node.owner.user().is_none()),
        Selector::Internet => in_internet(scene, address),
        Selector::Own => false,
    }
}

/// The last step that speaks of the address decides.
fn in_set(scene: &Scene, at: usize, address: IpAddr) -> bool {
    let speaks = |selector: &Selector| match selector {
        Selector::IpSet(inner) => in_set(scene, *inner, address),
        literal => holds(scene, literal, address, false),
    };
    let steps = scene.names.ip_sets[at].iter().rev();
    let mut steps = steps.filter(|(_, selector)| speaks(selector));
    steps.next().is_some_and(|(adds, _)| *adds)
}

pub(crate) fn in_internet(scene: &Scene, address: IpAddr) -> bool {
    let within = |net: &&str| net.parse::<IpNet>().unwrap().contains(&address);
    let private = [
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
    ];
    let public = address.is_ipv4() || within(&"2000::/3");
    public && !private.iter().any(within) && !scene.mesh.pools.contains(address)
}

fn in_mesh(scene: &Scene, address: IpAddr) -> bool {
    let reserved: IpNet = "100.115.92.0/23".parse().unwrap();
    let mut nodes = scene.mesh.nodes.values();
    let routed = nodes.any(|node| {
        !node.expired
            && node
                .approved_routes
                .iter()
                .any(|route| route.prefix_len() > 0 && route.contains(&address))
    });
    routed || (scene.mesh.pools.contains(address) && !reserved.contains(&address))
}

fn node(scene: &Scene, address: IpAddr) -> Option<&Node> {
    let mut nodes = scene.mesh.nodes.values();
    let found = nodes.find(|node| !node.expired && node.addresses.contains(address));
    found.map(AsRef::as_ref)
}

fn user(scene: &Scene, address: IpAddr) -> Option<&User> {
    let user = node(scene, address)?.owner.user()?;
    scene.mesh.users.get(&user).map(AsRef::as_ref)
}
