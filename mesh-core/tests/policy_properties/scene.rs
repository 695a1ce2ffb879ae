//! Random meshes, random policies over the whole language, and the text that says them.
//!
//! Names and numbers are few, so that rules meet.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::node::{
    AttributeName, AttributeValue, HostInfo, Node, NodeId, Owner, Role, Tag, User, UserId, UserName,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::support::Mesh;

#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) mesh: Mesh,
    pub(crate) names: Names,
    pub(crate) rules: Vec<Rule>,
}

/// What the text defines beside its rules.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Names {
    /// `group:one`, `group:two`: people.
    pub(crate) groups: [Vec<Selector>; 2],
    /// `alpha`, `beta`.
    pub(crate) hosts: [IpNet; 2],
    /// `ipset:one`, `ipset:two`: what is taken in, and what is left out. The second may name the first.
    pub(crate) ip_sets: [Vec<(bool, Selector)>; 2],
    /// `posture:one`, `posture:two`: conditions, by their place in [`CONDITIONS`].
    pub(crate) postures: [BTreeSet<usize>; 2],
    pub(crate) default_posture: Option<usize>,
    pub(crate) strict_icmp: bool,
    pub(crate) attributes: Vec<(Selector, &'static str)>,
    pub(crate) ssh: Vec<Ssh>,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Ssh {
    checks: bool,
    src: Selector,
    dst: Selector,
    login: &'static str,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Rule {
    pub(crate) verb: Verb,
    pub(crate) src: Vec<Selector>,
    pub(crate) dst: Vec<Selector>,
    pub(crate) proto: Option<u8>,
    pub(crate) ports: Ports,
    /// `srcPosture`, by number; several are any of them.
    pub(crate) postures: Option<Vec<usize>>,
    pub(crate) via: Option<&'static str>,
    /// A capability, granted besides.
    pub(crate) app: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verb {
    /// An entry of `acls`.
    Accept,
    Grant,
    Deny,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ports {
    All,
    Range(u16, u16),
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Selector {
    Any,
    Prefix(IpNet),
    /// Of [`Names::hosts`].
    Host(usize),
    IpSet(usize),
    Tag(&'static str),
    User(&'static str),
    /// `user:*@DOMAIN`.
    Domain(&'static str),
    Group(usize),
    Idp(&'static str),
    Role(Role),
    Member,
    Tagged,
    DangerAll,
    /// As a destination only.
    Internet,
    /// `autogroup:self`, as a destination only.
    Own,
}

pub(crate) const USERS: [&str; 4] = [
    "ada@example.com",
    "Bob@Example.com",
    "eve@example.org",
    "zoe",
];
pub(crate) const DOMAINS: [&str; 2] = ["example.com", "EXAMPLE.org"];
pub(crate) const IDP_GROUPS: [&str; 2] = ["ops", "dev"];
pub(crate) const TAGS: [&str; 3] = ["tag:a", "tag:b", "tag:c"];
pub(crate) const ROUTES: [&str; 6] = [
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.9.0.0/16",
    "fd99::/64",
    "0.0.0.0/0",
    "::/0",
];
const PREFIXES: [&str; 11] = [
    "10.0.0.0/8",
    "10.1.2.0/24",
    "10.1.2.128/25",
    "10.1.3.0/24",
    "100.64.0.0/30",
    "100.64.0.3/32",
    "fd7a:115c:a1e0::/126",
    "fd99::/96",
    "8.8.0.0/16",
    "2001:db8::/32",
    "0.0.0.0/1",
];

type Condition = (&'static str, fn(&Node) -> bool);

fn attribute<'a>(node: &'a Node, name: &str) -> Option<&'a AttributeValue> {
    node.attributes.get(&AttributeName::parse(name).unwrap())
}

/// Conditions of postures, and what they mean.
pub(crate) const CONDITIONS: [Condition; 6] = [
    ("node:os == 'linux'", |node| node.host.os == "linux"),
    ("node:os NOT IN ['linux', 'plan9']", |node| {
        !["", "linux", "plan9"].contains(&node.host.os.as_str())
    }),
    (
        "custom:score >= 5",
        |node| matches!(attribute(node, "custom:score"), Some(AttributeValue::Number(score)) if *score >= 5),
    ),
    ("custom:score NOT SET", |node| {
        attribute(node, "custom:score").is_none()
    }),
    ("ip:country != 'NO'", |node| {
        let norway = AttributeValue::Text("NO".to_owned());
        attribute(node, "ip:country").is_some_and(|country| *country != norway)
    }),
    ("custom:managed == true", |node| {
        attribute(node, "custom:managed") == Some(&AttributeValue::Bool(true))
    }),
];

impl Scene {
    pub(crate) fn text(&self) -> String {
        let of = |verb| {
            let rules = self.rules.iter().filter(|rule| rule.verb == verb);
            let rules: Vec<Value> = rules.map(Rule::json).collect();
            rules
        };
        let names = &self.names;
        let tags = TAGS.iter().map(|tag| ((*tag).to_owned(), json!([])));
        let tags: serde_json::Map<_, _> = tags.collect();
        let texts = |selectors: &[Selector]| -> Vec<String> {
            selectors.iter().map(Selector::text).collect()
        };
        let steps = |steps: &[(bool, Selector)]| -> Vec<String> {
            let step = |(adds, selector): &(bool, Selector)| {
                let verb = if *adds { "add" } else { "remove" };
                format!("{verb} {}", selector.text())
            };
            steps.iter().map(step).collect()
        };
        let conditions = |posture: &BTreeSet<usize>| -> Vec<&str> {
            posture.iter().map(|at| CONDITIONS[*at].0).collect()
        };
        let attributes = names.attributes.iter();
        let attributes: Vec<Value> = attributes
            .map(|(target, name)| json!({"target": [target.text()], "attr": [name]}))
            .collect();
        let ssh: Vec<Value> = names
            .ssh
            .iter()
            .map(|ssh| {
                let action = if ssh.checks { "check" } else { "accept" };
                json!({
                    "action": action, "users": [ssh.login],
                    "src": [ssh.src.text()], "dst": [ssh.dst.text()],
                })
            })
            .collect();
        let text = json!({
            "groups": {"group:one": texts(&names.groups[0]), "group:two": texts(&names.groups[1])},
            "hosts": {"alpha": names.hosts[0].to_string(), "beta": names.hosts[1].to_string()},
            "ipsets": {"ipset:one": steps(&names.ip_sets[0]), "ipset:two": steps(&names.ip_sets[1])},
            "postures": {
                "posture:one": conditions(&names.postures[0]),
                "posture:two": conditions(&names.postures[1]),
            },
            "defaultSrcPosture": names.default_posture.iter().map(|at| posture(*at)).collect::<Vec<_>>(),
            "options": {"icmp": if names.strict_icmp { "strict" } else { "any-rule" }},
            "tagOwners": tags,
            "nodeAttrs": attributes,
            "ssh": ssh,
            "acls": of(Verb::Accept),
            "grants": of(Verb::Grant),
            "denies": of(Verb::Deny),
        });
        serde_json::to_string_pretty(&text).unwrap()
    }

    pub(crate) fn with(&self, rule: Rule) -> Self {
        let mut scene = self.clone();
        scene.rules.push(rule);
        scene
    }

    pub(crate) fn without_via(&self) -> Self {
        let mut scene = self.clone();
        scene.rules.retain(|rule| rule.via.is_none());
        scene
    }
}

fn posture(number: usize) -> &'static str {
    ["posture:one", "posture:two"][number]
}

impl Rule {
    fn json(&self) -> Value {
        let ports = match self.ports {
            Ports::All => "*".to_owned(),
            Ports::Range(first, last) => format!("{first}-{last}"),
        };
        let src: Vec<String> = self.src.iter().map(Selector::text).collect();
        let mut json = json!({"src": src});
        if self.verb == Verb::Grant {
            let dst: Vec<String> = self.dst.iter().map(Selector::text).collect();
            json["dst"] = dst.into();
            json["ip"] = match self.proto {
                Some(proto) => [format!("{proto}:{ports}")].as_slice().into(),
                None => [ports].as_slice().into(),
            };
            if let Some(tag) = self.via {
                json["via"] = json!([tag]);
            }
            if self.app {
                json["app"] = json!({"example.com/cap": [{"level": 7}]});
            }
        } else {
            let dst = |dst: &Selector| match dst {
                Selector::Prefix(IpNet::V6(net)) => {
                    format!("[{}]/{}:{ports}", net.addr(), net.prefix_len())
                }
                dst => format!("{}:{ports}", dst.text()),
            };
            json["dst"] = self.dst.iter().map(dst).collect();
            if let Some(proto) = self.proto {
                json["proto"] = proto.to_string().into();
            }
        }
        if self.verb == Verb::Accept {
            json["action"] = "accept".into();
        }
        if let Some(postures) = &self.postures
            && self.verb != Verb::Deny
        {
            json["srcPosture"] = postures.iter().map(|at| posture(*at)).collect();
        }
        json
    }
}

impl Selector {
    fn text(&self) -> String {
        let numbered = |kind: &str, at: &usize| format!("{kind}:{}", ["one", "two"][*at]);
        match self {
            Self::Any => "*".to_owned(),
            Self::Prefix(net) => net.to_string(),
            Self::Host(at) => ["alpha", "beta"][*at].to_owned(),
            Self::IpSet(at) => numbered("ipset", at),
            Self::Tag(name) => (*name).to_owned(),
            Self::User(name) if name.contains('@') => (*name).to_owned(),
            Self::User(name) => format!("{name}@"),
            Self::Domain(domain) => format!("user:*@{domain}"),
            Self::Group(at) => numbered("group", at),
            Self::Idp(name) => format!("idp:{name}"),
            Self::Role(role) => format!("autogroup:{role}"),
            Self::Member => "autogroup:member".to_owned(),
            Self::Tagged => "autogroup:tagged".to_owned(),
            Self::DangerAll => "autogroup:danger-all".to_owned(),
            Self::Internet => "autogroup:internet".to_owned(),
            Self::Own => "autogroup:self".to_owned(),
        }
    }
}

// === people and nodes ===

/// What can be said of a user at once.
pub(crate) fn user(number: usize) -> impl Strategy<Value = User> {
    let role = prop::sample::select(&Role::ALL[..]);
    let idp_groups = prop::sample::subsequence(&IDP_GROUPS[..], 0..=IDP_GROUPS.len());
    (role, idp_groups).prop_map(move |(role, idp_groups)| User {
        id: UserId(number as u64 + 1),
        name: UserName::parse(USERS[number]).unwrap(),
        display_name: String::new(),
        idp_groups: idp_groups.into_iter().map(str::to_owned).collect(),
        role,
        created: mesh_core::node::UnixTime(0),
    })
}

/// What can be said of a node but for who it is.
#[derive(Clone, Debug)]
pub(crate) struct Nature {
    /// Users first, then tags, then both of two tags.
    owner: usize,
    routes: Vec<&'static str>,
    expired: bool,
    os: &'static str,
    attributes: Vec<(&'static str, AttributeValue)>,
}

pub(crate) fn nature() -> impl Strategy<Value = Nature> {
    let attributes = vec![
        ("custom:score", AttributeValue::Number(4)),
        ("custom:score", AttributeValue::Number(5)),
        ("custom:managed", AttributeValue::Bool(true)),
        ("custom:managed", AttributeValue::Text("true".to_owned())),
        ("ip:country", AttributeValue::Text("NO".to_owned())),
        ("ip:country", AttributeValue::Text("SE".to_owned())),
    ];
    (
        0..USERS.len() + TAGS.len() + 1,
        prop_oneof![2 => Just(Vec::new()), 1 => prop::sample::subsequence(&ROUTES[..], 1..3)],
        prop::bool::weighted(0.1),
        prop::sample::select(&["", "linux", "plan9", "macos"][..]),
        prop::sample::subsequence(attributes, 0..3),
    )
        .prop_map(|(owner, routes, expired, os, attributes)| Nature {
            owner,
            routes,
            expired,
            os,
            attributes,
        })
}

impl Nature {
    /// Makes the node be so, whatever it was.
    pub(crate) fn apply(&self, mesh: &mut Mesh, id: NodeId) {
        let owner = match self.owner.checked_sub(USERS.len()) {
            None => Owner::User(UserId(self.owner as u64 + 1)),
            Some(at) => {
                let tags = TAGS.get(at..=at).unwrap_or(&TAGS[..2]);
                Owner::Tags(tags.iter().map(|tag| Tag::parse(tag).unwrap()).collect())
            }
        };
        let node = Arc::make_mut(mesh.nodes.get_mut(&id).unwrap());
        node.owner = owner;
        node.expired = self.expired;
        node.host = HostInfo {
            os: self.os.to_owned(),
            ..HostInfo::default()
        };
        let attributes = self.attributes.iter();
        node.attributes = attributes
            .map(|(name, value)| (AttributeName::parse(name).unwrap(), value.clone()))
            .collect();
        let routes = self.routes.iter().map(|route| route.parse().unwrap());
        node.advertised_routes = routes.collect();
        node.approved_routes = node.advertised_routes.clone();
    }
}

pub(crate) fn mesh() -> impl Strategy<Value = Mesh> {
    let users = [0, 1, 2, 3].map(user);
    let natures = prop::collection::vec(nature(), 1..8);
    (users, natures).prop_map(|(users, natures)| {
        let mut mesh = Mesh::default();
        for user in users {
            mesh.users.insert(user.id, Arc::new(user));
        }
        for nature in natures {
            let id = mesh.node("n", TAGS[0]);
            nature.apply(&mut mesh, id);
        }
        mesh
    })
}

// === the text ===

fn prefix() -> impl Strategy<Value = IpNet> {
    prop::sample::select(&PREFIXES[..]).prop_map(|net| net.parse().unwrap())
}

fn people() -> impl Strategy<Value = Selector> {
    prop_oneof![
        3 => prop::sample::select(&USERS[..]).prop_map(Selector::User),
        1 => prop::sample::select(&DOMAINS[..]).prop_map(Selector::Domain),
    ]
}

/// Those whose nodes `autogroup:self` may open to each other.
fn owners() -> impl Strategy<Value = Selector> {
    prop_oneof![
        2 => people(),
        1 => (0_usize..2).prop_map(Selector::Group),
        1 => prop::sample::select(&IDP_GROUPS[..]).prop_map(Selector::Idp),
        1 => prop::sample::select(&Role::ALL[..]).prop_map(Selector::Role),
        1 => Just(Selector::Member),
    ]
}

fn selector() -> impl Strategy<Value = Selector> {
    prop_oneof![
        2 => Just(Selector::Any),
        2 => prefix().prop_map(Selector::Prefix),
        1 => (0_usize..2).prop_map(Selector::Host),
        1 => (0_usize..2).prop_map(Selector::IpSet),
        3 => prop::sample::select(&TAGS[..]).prop_map(Selector::Tag),
        3 => owners(),
        1 => Just(Selector::Tagged),
    ]
}

fn source() -> impl Strategy<Value = Selector> {
    prop_oneof![9 => selector(), 1 => Just(Selector::DangerAll)]
}

fn destination() -> impl Strategy<Value = Selector> {
    prop_oneof![9 => selector(), 1 => Just(Selector::Internet)]
}

pub(crate) fn rule() -> impl Strategy<Value = Rule> {
    let verb = prop_oneof![2 => Just(Verb::Accept), 2 => Just(Verb::Grant), 1 => Just(Verb::Deny)];
    let ends = prop_oneof![
        5 => (prop::collection::vec(source(), 1..3), prop::collection::vec(destination(), 1..3)),
        1 => (prop::collection::vec(owners(), 1..3), Just(vec![Selector::Own])),
    ];
    // Around few numbers, so that rules meet.
    let ports = prop_oneof![
        Just(Ports::All),
        (1_u16..12, 0_u16..6).prop_map(|(first, more)| Ports::Range(first, first + more)),
    ];
    let proto =
        prop::sample::select(&[None, None, Some(6), Some(17), Some(132), Some(47), Some(1)][..]);
    let postures = prop::option::weighted(0.2, prop::collection::vec(0_usize..2, 0..3));
    let via = prop::option::weighted(0.2, prop::sample::select(&TAGS[..]));
    let app = prop::bool::weighted(0.1);
    (verb, ends, proto, ports, postures, via, app).prop_map(
        |(verb, (src, dst), proto, ports, postures, via, app)| Rule {
            app: app && verb == Verb::Grant && !dst.contains(&Selector::Internet),
            verb,
            src,
            dst,
            proto,
            ports: match proto {
                Some(1 | 47) => Ports::All,
                _ => ports,
            },
            postures: postures.filter(|_| verb != Verb::Deny),
            via: via.filter(|_| verb == Verb::Grant),
        },
    )
}

fn steps(inner: bool) -> impl Strategy<Value = Vec<(bool, Selector)>> {
    let item = prop_oneof![
        3 => prefix().prop_map(Selector::Prefix),
        1 => (0_usize..2).prop_map(Selector::Host),
        1 => Just(match inner {
            true => Selector::IpSet(0),
            false => Selector::Host(0),
        }),
    ];
    prop::collection::vec((prop::bool::weighted(0.7), item), 0..4)
}

fn ssh() -> impl Strategy<Value = Ssh> {
    let src = prop_oneof![
        owners(),
        prop::sample::select(&TAGS[..]).prop_map(Selector::Tag)
    ];
    let dst = prop_oneof![
        2 => prop::sample::select(&TAGS[..]).prop_map(Selector::Tag),
        1 => Just(Selector::Tagged),
    ];
    let own = (owners(), Just(Selector::Own));
    let login = prop::sample::select(&["root", "autogroup:nonroot", "localpart:*@example.com"][..]);
    let ends = prop_oneof![2 => (src, dst), 1 => own];
    (any::<bool>(), ends, login).prop_map(|(checks, (src, dst), login)| Ssh {
        checks,
        src,
        dst,
        login,
    })
}

pub(crate) fn names() -> impl Strategy<Value = Names> {
    let members = || prop::collection::vec(people(), 0..3);
    let posture = || prop::collection::btree_set(0..CONDITIONS.len(), 1..3);
    let target = (
        selector(),
        prop::sample::select(&["blue", "disable-ipv4"][..]),
    );
    (
        [members(), members()],
        [prefix(), prefix()],
        (steps(false), steps(true)),
        [posture(), posture()],
        prop::option::weighted(0.2, 0_usize..2),
        any::<bool>(),
        prop::collection::vec(target, 0..2),
        prop::collection::vec(ssh(), 0..3),
    )
        .prop_map(
            |(groups, hosts, ip_sets, postures, default_posture, strict_icmp, attributes, ssh)| {
                Names {
                    groups,
                    hosts,
                    ip_sets: ip_sets.into(),
                    postures,
                    default_posture,
                    strict_icmp,
                    attributes,
                    ssh,
                }
            },
        )
}

pub(crate) fn scene() -> impl Strategy<Value = Scene> {
    (mesh(), names(), prop::collection::vec(rule(), 0..7)).prop_map(|(mesh, names, rules)| Scene {
        mesh,
        names,
        rules,
    })
}
