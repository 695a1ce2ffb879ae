//! Random meshes, random rules, and the text that says the rules.

use ipnet::IpNet;
use mesh_core::node::NodeId;
use proptest::prelude::*;

use crate::support::Mesh;

#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) mesh: Mesh,
    pub(crate) rules: Vec<Rule>,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Rule {
    pub(crate) verb: Verb,
    pub(crate) src: Vec<Selector>,
    pub(crate) dst: Selector,
    pub(crate) proto: Option<u8>,
    pub(crate) ports: Ports,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verb {
    Accept,
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
    Tag(&'static str),
    User(&'static str),
    /// `group:some`: the first two users.
    Group,
    Member,
    Tagged,
    /// `autogroup:self`, as a destination only.
    Own,
}

pub(crate) const USERS: [&str; 3] = ["ada@example.com", "bob@example.com", "eve@example.org"];
pub(crate) const TAGS: [&str; 3] = ["tag:a", "tag:b", "tag:c"];
const ROUTES: [&str; 4] = ["10.1.0.0/16", "10.1.2.0/24", "10.9.0.0/16", "fd99::/64"];
const PREFIXES: [&str; 8] = [
    "10.0.0.0/8",
    "10.1.2.0/24",
    "10.1.2.128/25",
    "100.64.0.0/30",
    "100.64.0.3/32",
    "fd7a:115c:a1e0::/126",
    "fd99::/96",
    "0.0.0.0/0",
];

impl Scene {
    pub(crate) fn text(&self) -> String {
        let of = |verb| {
            let rules = self.rules.iter().filter(|rule| rule.verb == verb);
            let rules: Vec<serde_json::Value> = rules.map(Rule::json).collect();
            rules
        };
        let tags: serde_json::Map<_, _> = TAGS
            .iter()
            .map(|tag| ((*tag).to_owned(), serde_json::json!([])))
            .collect();
        serde_json::json!({
            "groups": {"group:some": [USERS[0], USERS[1]]},
            "tagOwners": tags,
            "acls": of(Verb::Accept),
            "denies": of(Verb::Deny),
        })
        .to_string()
    }

    pub(crate) fn with(&self, rule: Rule) -> Self {
        let mut scene = self.clone();
        scene.rules.push(rule);
        scene
    }
}

impl Rule {
    fn json(&self) -> serde_json::Value {
        let ports = match self.ports {
            Ports::All => "*".to_owned(),
            Ports::Range(first, last) => format!("{first}-{last}"),
        };
        let dst = match &self.dst {
            Selector::Prefix(IpNet::V6(net)) => {
                format!("[{}]/{}:{ports}", net.addr(), net.prefix_len())
            }
            dst => format!("{}:{ports}", dst.text()),
        };
        let src: Vec<String> = self.src.iter().map(Selector::text).collect();
        let mut json = serde_json::json!({"src": src, "dst": [dst]});
        if self.verb == Verb::Accept {
            json["action"] = "accept".into();
        }
        if let Some(proto) = self.proto {
            json["proto"] = proto.to_string().into();
        }
        json
    }
}

impl Selector {
    fn text(&self) -> String {
        match self {
            Self::Any => "*".to_owned(),
            Self::Prefix(net) => net.to_string(),
            Self::Tag(name) | Self::User(name) => (*name).to_owned(),
            Self::Group => "group:some".to_owned(),
            Self::Member => "autogroup:member".to_owned(),
            Self::Tagged => "autogroup:tagged".to_owned(),
            Self::Own => "autogroup:self".to_owned(),
        }
    }
}

/// Owners of the nodes, by number: users first, then tags, then both of two tags.
fn mesh() -> impl Strategy<Value = Mesh> {
    let node = (
        0_usize..7,
        prop::option::of(0..ROUTES.len()),
        prop::bool::weighted(0.1),
    );
    prop::collection::vec(node, 1..7).prop_map(|nodes| {
        let mut mesh = Mesh::default();
        for user in USERS {
            mesh.user(user);
        }
        for (owner, route, expired) in nodes {
            let owner = match owner {
                0..3 => USERS[owner],
                3..6 => TAGS[owner - 3],
                _ => "tag:a,tag:b",
            };
            let id: NodeId = mesh.node("n", owner);
            if let Some(route) = route {
                mesh.route(id, ROUTES[route]);
            }
            if expired {
                mesh.expire(id);
            }
        }
        mesh
    })
}

fn selector() -> impl Strategy<Value = Selector> {
    prop_oneof![
        Just(Selector::Any),
        prop::sample::select(&PREFIXES[..]).prop_map(|net| Selector::Prefix(net.parse().unwrap())),
        prop::sample::select(&TAGS[..]).prop_map(Selector::Tag),
        prop::sample::select(&USERS[..]).prop_map(Selector::User),
        Just(Selector::Group),
        Just(Selector::Member),
        Just(Selector::Tagged),
    ]
}

pub(crate) fn rule() -> impl Strategy<Value = Rule> {
    let verb = prop_oneof![3 => Just(Verb::Accept), 1 => Just(Verb::Deny)];
    let people = prop_oneof![
        Just(Selector::Member),
        Just(Selector::Group),
        prop::sample::select(&USERS[..]).prop_map(Selector::User),
    ];
    let ends = prop_oneof![
        5 => (prop::collection::vec(selector(), 1..3), selector()),
        1 => (prop::collection::vec(people, 1..3), Just(Selector::Own)),
    ];
    // Around few numbers, so that rules meet.
    let ports = prop_oneof![
        Just(Ports::All),
        (1_u16..12, 0_u16..6).prop_map(|(first, more)| Ports::Range(first, first + more)),
    ];
    let proto =
        prop::sample::select(&[None, None, Some(6), Some(17), Some(132), Some(47), Some(1)][..]);
    (verb, ends, proto, ports).prop_map(|(verb, (src, dst), proto, ports)| Rule {
        verb,
        src,
        dst,
        proto,
        ports: match proto {
            Some(1 | 47) => Ports::All,
            _ => ports,
        },
    })
}

pub(crate) fn scene() -> impl Strategy<Value = Scene> {
    (mesh(), prop::collection::vec(rule(), 0..7)).prop_map(|(mesh, rules)| Scene { mesh, rules })
}
