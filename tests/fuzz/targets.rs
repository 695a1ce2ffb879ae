//! Everything that reads bytes from outside, as functions that take any bytes and must return.
//!
//! A target holds more than "does not panic" where more is cheap to say: what was accepted is
//! written and read again, what is answered is a message. The same functions are replayed over the
//! committed corpora by `cargo test` (`main.rs` here) and driven by cargo-fuzz where there is a
//! nightly compiler (`fuzz_targets/`).
#![allow(
    clippy::unwrap_used,
    reason = "in a target a panic is the finding, and some facts are ours"
)]
#![allow(
    unreachable_pub,
    reason = "a library's root for cargo-fuzz, a module of the test here"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::{Arc, LazyLock};

use mesh_agent::dataplane::software::Engine;
use mesh_agent::dns::protocol::{Report, Request, Setting};
use mesh_agent::dns::resolv_conf::ResolvConf;
use mesh_api::held::Held;
use mesh_api::join::Join;
use mesh_api::update::{Verifier, sign_full};
use mesh_api::v1;
use mesh_common::packet::Slice;
use mesh_core::dataplane::Tables;
use mesh_core::dns::forward::Outgoing;
use mesh_core::dns::wire::{Asker, Outcome, Transport};
use mesh_core::dns::{Config, Zone};
use mesh_core::key::{MachineKey, MachinePublic, NodeKey, NodePublic};
use mesh_core::netmap::{Action, Entry, EntryKey, Me, Netmap, NodePolicy, Peer, PortRange, Rule};
use mesh_core::node::{
    Addresses, Epoch, Generation, MeshId, Name, Node, NodeId, Owner, Role, Tag, UnixTime, User,
    UserId, UserName,
};
use mesh_core::policy::{self, Document, Subjects};
use mesh_core::world::{Mesh, Pools};
use mesh_core::{Direction, Identity, RuleId};
use prost::Message as _;
use sha2::{Digest as _, Sha256};

// Both roots of this file lie in the one folder.
#[path = "policy_targets.rs"]
mod policy_targets;

pub use policy_targets::{policy_diff, policy_layout, policy_question};

/// A target: its name, which is its corpus' too, and itself.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: &[Target] = &[
    ("agent_config", agent_config),
    ("coordinator_config", coordinator_config),
    ("control_message", control_message),
    ("dns_query", dns_query),
    ("dns_upstream", dns_upstream),
    ("helper_report", helper_report),
    ("helper_request", helper_request),
    ("join_string", join_string),
    ("netmap_update", netmap_update),
    ("packet", packet),
    ("policy", policy),
    ("policy_diff", policy_diff),
    ("policy_layout", policy_layout),
    ("policy_question", policy_question),
    ("resolv_conf", resolv_conf),
    ("state_file", state_file),
    ("uapi_request", uapi_request),
];

// === DNS ===

/// A query as it comes off a socket, from everybody and by both transports.
pub fn dns_query(data: &[u8]) {
    static ZONE: LazyLock<Zone> = LazyLock::new(|| Config::of(&netmap()).unwrap().zone);
    for asker in [Asker::Host, Asker::Peer, Asker::Stranger] {
        for transport in [Transport::Udp, Transport::Tcp] {
            match ZONE.respond(asker, transport, data) {
                Outcome::Drop => {}
                Outcome::Reply(reply) => {
                    assert_ne!(asker, Asker::Stranger, "a stranger is not answered");
                    assert_eq!(reply[..2], data[..2], "the asker's own number");
                    assert!(reply[2] & 0x80 != 0, "a reply says that it is one");
                    assert!(transport == Transport::Tcp || reply.len() <= 1232);
                }
                Outcome::Forward { .. } => assert_eq!(asker, Asker::Host),
            }
        }
    }
    if let Ok(outgoing) = Outgoing::new(data, 0x5aa5, [0x5a; 32]) {
        assert!(outgoing.bytes().eq_ignore_ascii_case(&{
            let mut sent = data.to_vec();
            sent[..2].copy_from_slice(&0x5aa5_u16.to_be_bytes());
            sent
        }));
    }
}

/// An answer from upstream to the query `www.Example.org A`, sent as number 0x5aa5.
pub fn dns_upstream(data: &[u8]) {
    const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03www\x07Example\x03org\0\0\x01\0\x01";
    let outgoing = Outgoing::new(QUERY, 0x5aa5, [0; 32]).unwrap();
    for limit in [512, u16::MAX] {
        for reply in [
            outgoing.accept(data, limit),
            outgoing.accept_any_case(data, limit),
        ] {
            let Ok(reply) = reply else { continue };
            assert!(reply.len() <= limit.into());
            assert_eq!(reply[..2], QUERY[..2]);
            assert_eq!(reply[12..QUERY.len()], QUERY[12..]);
        }
    }
}

/// A line that the root helper reads.
pub fn helper_request(data: &[u8]) {
    if let Ok(request) = Request::parse(data) {
        let line = request.to_string();
        assert!(line.bytes().all(|b| (0x20..0x7f).contains(&b)));
        assert_eq!(Request::parse(line.as_bytes()), Ok(request));
    }
}

/// A line that the agent reads from the root helper.
pub fn helper_report(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(Ok(report)) = Report::parse(text) {
        assert_eq!(Report::parse(&report.to_string()), Ok(Ok(report)));
    }
}

/// A resolv.conf that somebody wrote.
pub fn resolv_conf(data: &[u8]) {
    let ours = ResolvConf::parse(&String::from_utf8_lossy(data)).render(&setting());
    let read = ResolvConf::parse(&ours);
    assert_eq!(read.servers, ["100.64.0.1"]);
    assert_eq!(read.search[0], "mesh.internal");
}

fn setting() -> Setting {
    match Request::parse(b"set mesh0 mesh.internal 100.64.0.1 mesh.internal") {
        Ok(Request::Set(setting)) => setting,
        other => panic!("{other:?}"),
    }
}

// === the control channel ===

/// What the two ends of a control session send each other, short of the netmaps themselves.
pub fn control_message(data: &[u8]) {
    let _ = v1::HelloRequest::decode(data);
    let _ = v1::HelloResponse::decode(data);
    let _ = v1::EnrollRequest::decode(data);
    let _ = v1::EnrollResponse::decode(data);
    let _ = v1::CoordinatorMessage::decode(data);
    let Ok(message) = v1::AgentMessage::decode(data) else {
        return;
    };
    if let Some(v1::agent_message::Message::Begin(begin)) = message.message
        && let Some(Ok(held)) = begin.held.as_ref().map(Held::try_from)
    {
        assert_eq!(Held::try_from(&v1::Held::from(&held)), Ok(held));
    }
}

/// The inside of an update, signed as it must be, for a node without a map and for one with.
pub fn netmap_update(data: &[u8]) {
    static KEY: LazyLock<MachineKey> = LazyLock::new(|| MachineKey::from_seed([3; 32]));
    static HELD: LazyLock<Netmap> = LazyLock::new(netmap);
    let signed = v1::SignedUpdate {
        update: data.to_vec(),
        signature: KEY.sign("mesh netmap update v1", data).0.to_vec(),
    };
    let verifier = Verifier {
        coordinator: KEY.public(),
        addressee: None,
    };
    for held in [None, Some(&*HELD)] {
        let Ok(map) = verifier.accept(held, &signed) else {
            continue;
        };
        let again = verifier.accept(None, &sign_full(&KEY, &map));
        assert_eq!(again.as_ref(), Ok(&map), "a map survives its own encoding");
        // Whatever a coordinator may send, a zone can be refused but not be broken.
        let _ = Config::of(&map);
    }
}

pub fn join_string(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(join) = text.parse::<Join>() {
        assert_eq!(join.to_string().parse(), Ok(join));
    }
}

// === the packet path ===

/// A packet at its IP header, both ways, by a filter that has seen the packets before it.
pub fn packet(data: &[u8]) {
    static TABLES: LazyLock<Tables> = LazyLock::new(|| Tables::of(&allowing(netmap()), 1280));
    let mut engine = Engine::default();
    engine.apply(&TABLES);
    for (now, direction) in [Direction::Egress, Direction::Ingress, Direction::Egress]
        .into_iter()
        .enumerate()
    {
        let _ = mesh_common::packet::parse(&Slice(data), direction);
        // Only the maximum segment size of TCP is ever rewritten, so the length is kept.
        let mut packet = data.to_vec();
        let _ = engine.judge(direction, &mut packet, now as u64);
        assert_eq!(packet.len(), data.len());
    }
}

/// With a policy under which both nodes may say everything to each other.
fn allowing(mut map: Netmap) -> Netmap {
    let (me, peer) = (Identity(200), Identity(201));
    let owners = [(addresses(1), me), (addresses(2), peer)];
    for (addresses, identity) in owners {
        for prefix in addresses.prefixes() {
            map.policy.identities.insert(prefix, identity);
        }
    }
    let rule = RuleId(1);
    let summary = "accept * -> *:*".to_owned();
    map.policy.rules.insert(
        rule,
        Rule {
            file: "fuzz".into(),
            line: 1,
            summary,
        },
    );
    for direction in [Direction::Ingress, Direction::Egress] {
        let key = EntryKey {
            remote: peer,
            local: me,
            direction,
            proto: None,
            ports: PortRange::ALL,
        };
        let action = Action::Accept;
        map.policy.entries.insert(key, Entry { action, rule });
    }
    map
}

// === what people write ===

/// A policy, as far as an operator's upload goes: read, checked, compiled.
pub fn policy(data: &[u8]) {
    static USERS: LazyLock<BTreeMap<UserId, Arc<User>>> = LazyLock::new(users);
    static NODES: LazyLock<BTreeMap<NodeId, Arc<Node>>> = LazyLock::new(nodes);
    static POOLS: LazyLock<Pools> = LazyLock::new(|| netmap().mesh.pools);
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let subjects = Subjects {
        users: &USERS,
        nodes: &NODES,
        pools: &POOLS,
    };
    let Ok(document) = Document::parse(text) else {
        return;
    };
    if policy::check(&document, &subjects).is_ok() {
        let compiled = policy::compile(&document, &subjects, None);
        for id in NODES.keys() {
            let _ = compiled.node(*id);
        }
    }
}

pub fn agent_config(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = toml::from_str::<mesh_agent::config::Settings>(text);
    }
}

pub fn coordinator_config(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(settings) = toml::from_str::<mesh_coordinator::config::Settings>(text)
    {
        let _ = mesh_coordinator::config::Config::new(settings);
    }
}

// === what stands on a node's disk and sockets ===

/// One state file of the agent's, as found after any accident.
pub fn state_file(data: &[u8]) {
    if let Ok(payload) = mesh_agent::state_dir::open_envelope(data) {
        assert!(data.ends_with(payload));
    }
    // And with a checksum that holds, so that what is inside is read as well.
    let Some((which, payload)) = data.split_first() else {
        return;
    };
    thread_local!(static FOLDER: tempfile::TempDir = tempfile::tempdir().unwrap());
    FOLDER.with(|folder| {
        let name = ["keys", "node", "netmap"][usize::from(*which) % 3];
        let write = |name: &str, payload: &[u8]| {
            let mut file = File::options();
            let file = file.write(true).create(true).truncate(true).mode(0o600);
            let mut file = file.open(folder.path().join(name)).unwrap();
            file.write_all(&envelope(payload)).unwrap();
        };
        write("keys", KEYS);
        write(name, payload);
        let state = mesh_agent::state_dir::StateDir::open(folder.path()).unwrap();
        let _ = state.load(|| 51820);
        std::fs::remove_file(folder.path().join(name)).unwrap();
    });
}

/// Keys that are as good as any, so that the other files are looked at.
const KEYS: &[u8] = br#"{"machine":"AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=","node":"BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=","listen_port":51820}"#;

fn envelope(payload: &[u8]) -> Vec<u8> {
    let checksum = hex::encode(Sha256::digest(payload));
    [
        b"mesh-agent state v1\n",
        checksum.as_bytes(),
        b"\n",
        payload,
    ]
    .concat()
}

/// What `wg` says to a userspace device.
pub fn uapi_request(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let lines: Vec<&str> = text.lines().collect();
    let _ = mesh_agent::wg::userspace::is_uapi_request(&lines);
}

// === a small mesh ===

fn addresses(host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(100, 64, 0, host),
        v6: Ipv6Addr::new(0xfd01, 0x203, 0x405, 0, 0, 0, 0x6440, host.into()),
    }
}

/// The map of the node `web`, with one peer, `db`.
pub fn netmap() -> Netmap {
    let key = NodeKey::from_seed([7; 32]).public();
    let peer = Peer {
        id: NodeId(2),
        name: Name::parse("db").unwrap(),
        key,
        addresses: addresses(2),
        endpoints: BTreeSet::from([(IpAddr::from([192, 0, 2, 2]), 51820).into()]),
        routes: BTreeSet::new(),
        tags: BTreeSet::from([Tag::parse("tag:db").unwrap()]),
        user: None,
    };
    Netmap {
        mesh: Mesh {
            id: MeshId([1; 16]),
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([1, 2, 3, 4, 5]),
            },
        },
        epoch: Epoch(1),
        generation: Generation(5),
        me: Me {
            id: NodeId(1),
            name: Name::parse("web").unwrap(),
            key,
            addresses: addresses(1),
            tags: BTreeSet::from([Tag::parse("tag:web").unwrap()]),
            user: None,
            expires: None,
            expired: false,
        },
        peers: BTreeMap::from([(peer.id, peer)]),
        policy: NodePolicy::default(),
    }
}

fn users() -> BTreeMap<UserId, Arc<User>> {
    let user = |id: u64, name: &str| {
        let user = User {
            id: UserId(id),
            name: UserName::parse(name).unwrap(),
            display_name: String::new(),
            idp_groups: BTreeSet::new(),
            role: Role::default(),
            created: UnixTime(0),
        };
        (user.id, Arc::new(user))
    };
    BTreeMap::from([user(1, "ann@example.org"), user(2, "bob@example.org")])
}

fn nodes() -> BTreeMap<NodeId, Arc<Node>> {
    let tag = |text: &str| Owner::Tags(BTreeSet::from([Tag::parse(text).unwrap()]));
    let owners = [
        tag("tag:node"),
        tag("tag:operator"),
        Owner::User(UserId(1)),
        Owner::User(UserId(2)),
    ];
    let node = |(number, owner): (u8, Owner)| {
        let node = Node::new(
            NodeId(number.into()),
            Name::sanitize(&format!("n{number}")),
            MachinePublic([number; 32]),
            NodePublic([number; 32]),
            owner,
            addresses(number),
        );
        (node.id, Arc::new(node))
    };
    (1..).zip(owners).map(node).collect()
}
