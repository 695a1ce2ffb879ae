//! What may change in the world, and when not.
//!
//! Every function here decides upon a [`Draft`] and is called by the single writer, so what it has
//! checked is still true when it writes: a one-off key cannot be used twice, a name or an address
//! cannot be given twice. It checks everything first and writes last.

use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::ipam;
use mesh_core::key::{MachinePublic, NodePublic};
use mesh_core::node::{Addresses, HostInfo, Name, Node, NodeId, Owner, UnixTime};
use mesh_core::policy::{self, Subjects};
use mesh_core::routes::is_reportable;
use mesh_core::world::Pools;

use crate::preauth::{KeyRefused, PreAuthKey, Presented};
use crate::world::Draft;

pub mod admin;

/// How long the key of a person's node is honoured. Tagged nodes do not expire.
pub const NODE_LIFETIME: u64 = 180 * 24 * 3600;
/// Underlay addresses that one node may report.
pub const MAX_ENDPOINTS: usize = 32;
/// Prefixes that one node may offer to route.
pub const MAX_ROUTES: usize = 128;

/// Whose fault a refusal is, which decides the status code and the CLI's advice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The request makes no sense.
    Invalid,
    /// What it names does not exist.
    NotFound,
    /// It would collide with something.
    Exists,
    /// It makes sense, but not now.
    Precondition,
    /// The asker may not.
    Denied,
    /// There is no more of it.
    Exhausted,
}

/// A change that was not made, with words for whoever asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    pub fault: Fault,
    pub text: String,
}

impl Refusal {
    pub fn new(fault: Fault, text: impl Into<String>) -> Self {
        Self {
            fault,
            text: text.into(),
        }
    }
}

impl From<KeyRefused> for Refusal {
    fn from(refused: KeyRefused) -> Self {
        Self::new(Fault::Denied, refused.to_string())
    }
}

// === enrolment ===

/// What a machine must have proven before it gets here: that it holds both private keys.
#[derive(Debug, Clone)]
pub struct Enrolment {
    pub machine: MachinePublic,
    pub key: NodePublic,
    pub secret: Presented,
    /// Wanted name; empty: the host's.
    pub name: String,
    pub host: HostInfo,
}

/// Makes a node of a machine, or renews the one that it is.
pub fn enroll(draft: &mut Draft, request: Enrolment) -> Result<Arc<Node>, Refusal> {
    let key = find_key(draft, &request.secret)?;
    let known = node_of(draft, &request.machine);
    if let Some(node) = &known
        && key.last_node == Some(node.id)
        && node.key == request.key
        && !node.expired
        && !key.revoked
    {
        // The answer to this very enrolment was lost on its way, and the machine asks again.
        return Ok(node.clone());
    }
    key.usable(draft.now)?;
    let other =
        holder_of(draft, &request.key).filter(|id| Some(*id) != known.as_ref().map(|n| n.id));
    if other.is_some() {
        return Err(Refusal::new(
            Fault::Exists,
            "this WireGuard key belongs to another node: was the state directory copied?",
        ));
    }
    let expires = match key.owner {
        Owner::User(_) => Some(UnixTime(draft.now.0 + NODE_LIFETIME)),
        Owner::Tags(_) => None,
    };
    let node = match known {
        Some(node) => Node {
            key: request.key,
            name: renamed(draft, &node, &request.name),
            owner: key.owner.clone(),
            ephemeral: key.ephemeral,
            expires,
            expired: false,
            host: request.host,
            ..node.as_ref().clone()
        },
        None => {
            let addresses = allocate(draft, &key.owner)?;
            let wanted = match request.name.as_str() {
                "" => request.host.hostname.as_str(),
                name => name,
            };
            let name = Name::sanitize(wanted).unique(&draft.world().names());
            let id = NodeId(draft.next_id());
            Node {
                ephemeral: key.ephemeral,
                created: draft.now,
                expires,
                host: request.host,
                ..Node::new(
                    id,
                    name,
                    request.machine,
                    request.key,
                    key.owner.clone(),
                    addresses,
                )
            }
        }
    };
    // The key is used up and the node exists, or neither: one transaction writes both.
    draft.put_key(PreAuthKey {
        uses: key.uses + 1,
        last_node: Some(node.id),
        ..key.as_ref().clone()
    });
    Ok(draft.put_node(node))
}

/// The addresses of a new node: from the policy's `ipPool` for its owner, else from what no pool
/// sets aside.
fn allocate(draft: &Draft, owner: &Owner) -> Result<Addresses, Refusal> {
    let world = draft.world();
    let allotment = policy::allotment(draft.document(), &Subjects::from(world), owner);
    let taken = world.nodes.values().map(|node| node.addresses.v4).collect();
    let found = ipam::allocate(&world.mesh.pools, &allotment.nets, &taken);
    found.map_err(|full| {
        let nets: Vec<String> = allotment.nets.iter().map(ToString::to_string).collect();
        let words = match allotment.line {
            Some(line) => format!(
                "every address of the ipPool {} that the policy has for this node, at line {line}, \
                 belongs to a node: an administrator can widen it",
                nets.join(", ")
            ),
            None => full.to_string(),
        };
        Refusal::new(Fault::Exhausted, words)
    })
}

fn find_key(draft: &Draft, secret: &Presented) -> Result<Arc<PreAuthKey>, KeyRefused> {
    let mut keys = draft.keys().values();
    keys.find(|key| key.prefix == secret.prefix && secret.opens(key))
        .cloned()
        .ok_or(KeyRefused::Unknown)
}

fn node_of(draft: &Draft, machine: &MachinePublic) -> Option<Arc<Node>> {
    let mut nodes = draft.world().nodes.values();
    nodes.find(|node| node.machine == *machine).cloned()
}

fn holder_of(draft: &Draft, key: &NodePublic) -> Option<NodeId> {
    let mut nodes = draft.world().nodes.values();
    nodes.find(|node| node.key == *key).map(|node| node.id)
}

/// The name that an enrolled machine gets when it enrols again: its old one, unless it asks for
/// another.
fn renamed(draft: &Draft, node: &Node, wanted: &str) -> Name {
    if wanted.is_empty() || Name::sanitize(wanted) == node.name {
        return node.name.clone();
    }
    let mut taken = draft.world().names();
    taken.remove(&node.name);
    Name::sanitize(wanted).unique(&taken)
}

// === what a connected node may change about itself ===

fn own(draft: &Draft, id: NodeId) -> Result<Arc<Node>, Refusal> {
    let node = draft.world().nodes.get(&id).cloned();
    node.ok_or_else(|| Refusal::new(Fault::NotFound, "the node was deleted"))
}

/// A session begins: the host may have changed, and so may the node key, which was proven anew.
pub fn begin(
    draft: &mut Draft,
    id: NodeId,
    key: NodePublic,
    host: Option<HostInfo>,
) -> Result<(), Refusal> {
    let node = own(draft, id)?;
    if holder_of(draft, &key).is_some_and(|holder| holder != id) {
        return Err(Refusal::new(
            Fault::Exists,
            "this WireGuard key belongs to another node: was the state directory copied?",
        ));
    }
    if node.expired && node.key != key {
        return Err(Refusal::new(
            Fault::Precondition,
            "the node has expired: enrol again with `mesh up --auth-key` to use a new key",
        ));
    }
    put_if_changed(draft, &node, |node| {
        node.key = key;
        if let Some(host) = host {
            node.host = host;
        }
    });
    Ok(())
}

/// The underlay as the node sees it now. What nobody could use is left out, not an error.
pub fn report(
    draft: &mut Draft,
    id: NodeId,
    endpoints: &[SocketAddr],
    routes: &[IpNet],
) -> Result<(), Refusal> {
    let node = own(draft, id)?;
    let pools = draft.world().mesh.pools;
    let endpoints = endpoints.iter().filter(|e| reachable(e, &pools)).copied();
    let endpoints = endpoints.take(MAX_ENDPOINTS).collect();
    let routes = routes.iter().filter(|net| routable(net, &pools)).copied();
    let routes = routes.take(MAX_ROUTES).collect();
    put_if_changed(draft, &node, |node| {
        node.endpoints = endpoints;
        node.advertised_routes = routes;
    });
    Ok(())
}

/// The node leaves: an ephemeral one is deleted, another must enrol again to come back.
pub fn logout(draft: &mut Draft, id: NodeId) -> Result<(), Refusal> {
    let node = own(draft, id)?;
    if node.ephemeral {
        draft.delete_node(id);
    } else {
        expire_now(draft, &node);
    }
    Ok(())
}

fn expire_now(draft: &mut Draft, node: &Arc<Node>) -> Arc<Node> {
    let now = draft.now;
    put_if_changed(draft, node, |node| {
        node.expires = Some(node.expires.map_or(now, |at| at.min(now)));
        node.expired = true;
    })
}

fn put_if_changed(draft: &mut Draft, old: &Arc<Node>, change: impl FnOnce(&mut Node)) -> Arc<Node> {
    let mut node = old.as_ref().clone();
    change(&mut node);
    if node == **old {
        old.clone()
    } else {
        draft.put_node(node)
    }
}

/// Whether WireGuard of another host could ever reach this. Mesh addresses would make the tunnel
/// run through itself.
fn reachable(endpoint: &SocketAddr, pools: &Pools) -> bool {
    let address = endpoint.ip().to_canonical();
    endpoint.port() != 0 && is_reportable(address) && !pools.contains(address)
}

/// A prefix that a node may offer: the mesh's own addresses are nobody's to route, nor are those that mean something
/// else on every host.
pub fn routable(net: &IpNet, pools: &Pools) -> bool {
    let mesh = pools
        .each()
        .iter()
        .any(|pool| net.prefix_len() > 0 && (pool.contains(net) || net.contains(pool)));
    let mapped = matches!(net, IpNet::V6(net) if net.addr().to_ipv4_mapped().is_some());
    let means_one_thing = net.prefix_len() == 0 || is_reportable(net.addr()) && !mapped;
    *net == net.trunc() && !mesh && means_one_thing
}

// === time ===

/// Marks every node whose time is up. Returns how many.
pub fn expire_due(draft: &mut Draft) -> usize {
    let now = draft.now;
    let due = |node: &&Arc<Node>| !node.expired && node.expires.is_some_and(|at| at <= now);
    let due: Vec<_> = draft.world().nodes.values().filter(due).cloned().collect();
    for node in &due {
        expire_now(draft, node);
    }
    due.len()
}

/// Deletes the ephemeral nodes among `gone`.
pub fn drop_ephemeral(draft: &mut Draft, gone: &[NodeId]) -> usize {
    let nodes = &draft.world().nodes;
    let ephemeral = |id: &&NodeId| nodes.get(id).is_some_and(|node| node.ephemeral);
    let gone: Vec<NodeId> = gone.iter().filter(ephemeral).copied().collect();
    for id in &gone {
        draft.delete_node(*id);
    }
    gone.len()
}
