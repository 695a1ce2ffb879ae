//! One recorded case: the world that it was recorded in, the policy, and what was seen.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::node::{NodeId, Owner, Tag};
use mesh_core::policy::{Document, auto_approved};
use serde::Deserialize;

use super::support::Mesh;

#[derive(Deserialize)]
pub(crate) struct Case {
    pub(crate) id: String,
    pub(crate) policy_text: String,
    pub(crate) accepted: bool,
    pub(crate) error: Option<String>,
    #[serde(default)]
    pub(crate) optional: bool,
    users: Vec<User>,
    nodes: BTreeMap<String, Node>,
    registration_order: Vec<String>,
    pub(crate) reach: Option<Reach>,
    pub(crate) netmap: Option<BTreeMap<String, Seen>>,
    pub(crate) ssh: Option<Ssh>,
}

/// Destination node, source node, login: what was answered.
#[derive(Deserialize)]
pub(crate) struct Ssh {
    pub(crate) logins: Vec<String>,
    pub(crate) allow: BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>,
}

#[derive(Deserialize)]
struct User {
    name: String,
    email: String,
}

#[derive(Deserialize)]
struct Node {
    tags: Vec<String>,
    user: Option<String>,
    ipv4: IpAddr,
    ipv6: IpAddr,
    routable_ips: Vec<String>,
    approved_routes: Vec<String>,
}

/// Destination node, destination label, source label: what may be opened.
pub(crate) type Allowed = BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>;

#[derive(Deserialize)]
pub(crate) struct Reach {
    pub(crate) addrs: BTreeMap<String, IpAddr>,
    pub(crate) allow: Allowed,
}

#[derive(Deserialize)]
pub(crate) struct Seen {
    pub(crate) capmap: Option<BTreeMap<String, serde_json::Value>>,
    pub(crate) whois_caps: Option<BTreeMap<IpAddr, BTreeMap<String, serde_json::Value>>>,
    #[serde(default)]
    pub(crate) peers: BTreeMap<String, SeenPeer>,
}

#[derive(Deserialize, PartialEq, Eq, Debug)]
pub(crate) struct SeenPeer {
    pub(crate) allowed_ips: Vec<String>,
    pub(crate) primary_routes: Vec<String>,
}

/// A policy's `autoApprovers` approve routes while the nodes are being recorded: some of them were
/// seen before, some after.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Approval {
    AsRecorded,
    Automatic,
}

/// The world of a case, and its nodes by the names that the case gives them.
pub(crate) struct Scene {
    pub(crate) mesh: Mesh,
    pub(crate) ids: BTreeMap<String, NodeId>,
}

impl Case {
    pub(crate) fn scene(&self, approval: Approval) -> Scene {
        let mut mesh = Mesh::default();
        let mut ids = BTreeMap::new();
        let mut owners = BTreeMap::new();
        for user in &self.users {
            let login = if user.email.is_empty() {
                &user.name
            } else {
                &user.email
            };
            owners.insert(&user.name, mesh.user(login));
        }
        let unordered = self.nodes.keys();
        let unordered = unordered.filter(|name| !self.registration_order.contains(name));
        for name in self.registration_order.iter().chain(unordered) {
            let node = &self.nodes[name];
            let owner = match &node.user {
                Some(user) => Owner::User(owners[user]),
                None => Owner::Tags(
                    node.tags
                        .iter()
                        .map(|tag| Tag::parse(tag).unwrap())
                        .collect(),
                ),
            };
            let id = mesh.node_at(name, owner, node.ipv4, node.ipv6);
            for route in &node.routable_ips {
                mesh.advertise(id, route);
            }
            for route in &node.approved_routes {
                mesh.approve(id, route);
            }
            ids.insert(name.clone(), id);
        }
        if approval == Approval::Automatic
            && let Ok(document) = Document::parse(&self.policy_text)
        {
            for id in ids.values() {
                let node = Arc::clone(&mesh.nodes[id]);
                for route in auto_approved(&document, &mesh.subjects(), &node) {
                    mesh.approve(*id, &route.to_string());
                }
            }
        }
        Scene { mesh, ids }
    }
}

/// Where the cases are, if they are anywhere.
pub(crate) fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("MESH_POLICY_CASES").map_or_else(
        || {
            PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../shared/policy-cases"
            ))
        },
        PathBuf::from,
    );
    if folder.is_dir() {
        return Some(folder);
    }
    let missing = format!(
        "no recorded policy cases in {}: set MESH_POLICY_CASES to their folder",
        folder.display()
    );
    assert!(std::env::var_os("CI").is_none(), "{missing}");
    let _ = writeln!(std::io::stderr(), "{missing}");
    None
}

/// The sets of the folder, by name.
pub(crate) fn read(folder: &Path) -> BTreeMap<String, Vec<Case>> {
    let files = std::fs::read_dir(folder).unwrap();
    let files = files.map(|entry| entry.unwrap().path());
    let sets: BTreeMap<String, Vec<Case>> = files
        .filter(|path| path.extension().is_some_and(|end| end == "jsonl"))
        .map(|path| {
            let set = path.file_stem().unwrap().to_string_lossy().into_owned();
            let text = std::fs::read_to_string(&path).unwrap();
            let cases = text.lines().map(|line| serde_json::from_str(line).unwrap());
            (set, cases.collect())
        })
        .collect();
    assert!(!sets.is_empty(), "no *.jsonl in {}", folder.display());
    sets
}

/// The node that a label belongs to.
pub(crate) fn owner(label: &str) -> Option<&str> {
    match label.strip_prefix("ROUTE:") {
        Some(route) => route.rsplit(':').next(),
        None if label.starts_with("EXT/") => None,
        None => label.split('/').next(),
    }
}

/// As the cases write prefixes.
pub(crate) fn shown(nets: impl IntoIterator<Item = IpNet>) -> Vec<String> {
    let mut shown: Vec<String> = nets.into_iter().map(|net| net.to_string()).collect();
    shown.sort();
    shown
}
