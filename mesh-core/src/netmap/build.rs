//! One node's map, cut out of the world and its compiled policy.
//!
//! What is left out is the point: a node learns of a peer, and of a route, only where policy joins
//! the two. An expired node is told so and nothing else; nobody else is told of it.

use std::collections::BTreeMap;

use super::{Me, Netmap, NodePolicy, Peer};
use crate::node::{Node, NodeId, UserName};
use crate::policy::CompiledPolicy;
use crate::world::World;

/// What `id` must know, or `None` if there is no such node.
pub fn build(world: &World, policy: &CompiledPolicy, id: NodeId) -> Option<Netmap> {
    let node = world.nodes.get(&id)?;
    let (peers, policy) = if node.expired {
        (BTreeMap::new(), NodePolicy::default())
    } else {
        let seen = policy.peers(id).into_iter();
        let peers = seen.filter_map(|peer| Some((peer, see(world, policy, id, peer)?)));
        (peers.collect(), policy.node(id))
    };
    Some(Netmap {
        mesh: world.mesh.as_ref().clone(),
        epoch: world.epoch,
        generation: world.generation,
        me: Me {
            id,
            name: node.name.clone(),
            key: node.key,
            addresses: node.addresses,
            tags: node.owner.tags().cloned().collect(),
            user: user(world, node),
            expires: node.expires,
            expired: node.expired,
        },
        peers,
        policy,
    })
}

/// `peer` as `viewer` sees it.
fn see(world: &World, policy: &CompiledPolicy, viewer: NodeId, peer: NodeId) -> Option<Peer> {
    let node = world.nodes.get(&peer).filter(|node| !node.expired)?;
    Some(Peer {
        id: peer,
        name: node.name.clone(),
        key: node.key,
        addresses: node.addresses,
        endpoints: node.endpoints.clone(),
        routes: policy.routes(viewer, peer),
        tags: node.owner.tags().cloned().collect(),
        user: user(world, node),
    })
}

fn user(world: &World, node: &Node) -> Option<UserName> {
    let id = node.owner.user()?;
    world.users.get(&id).map(|user| user.name.clone())
}
