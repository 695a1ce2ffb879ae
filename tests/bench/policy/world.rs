//! Ten thousand nodes in turn of each tag and each user.

use std::sync::Arc;

use mesh_core::key::{MachinePublic, NodePublic};
use mesh_core::node::{
    Addresses, Epoch, Generation, MeshId, Name, Node, NodeId, Owner, Role, Tag, UnixTime, User,
    UserId, UserName,
};
use mesh_core::world::{Mesh, Pools, World};

use super::{IDENTITIES, TAGS, USERS};

/// Nodes in turn of each tag and each user.
pub(super) fn world(nodes: u64) -> World {
    World {
        mesh: Arc::new(Mesh {
            id: MeshId([7; 16]),
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([1; 5]),
            },
        }),
        epoch: Epoch(1),
        generation: Generation(1),
        users: (1..=USERS)
            .map(|id| (UserId(id), Arc::new(user(id))))
            .collect(),
        nodes: (1..=nodes)
            .map(|id| (NodeId(id), Arc::new(node(id))))
            .collect(),
    }
}

pub(super) fn user(id: u64) -> User {
    User {
        id: UserId(id),
        name: UserName::parse(&login(id)).expect("a login without spaces"),
        display_name: String::new(),
        idp_groups: [format!("team-{}", id % 10)].into(),
        role: Role::Member,
        created: UnixTime(0),
    }
}

pub(super) fn login(id: u64) -> String {
    format!("u{id}@x.org")
}

pub(super) fn tagged(number: u64) -> Owner {
    let tag = Tag::parse(&tag(number)).expect("a tag that starts with a letter");
    Owner::Tags([tag].into())
}

pub(super) fn tag(number: u64) -> String {
    format!("tag:g{number}")
}

pub(super) fn node(id: u64) -> Node {
    let group = (id - 1) % IDENTITIES;
    let mut key = [0; 32];
    key[..8].copy_from_slice(&id.to_be_bytes());
    let [.., a, b, c] = id.to_be_bytes();
    let owner = match group.checked_sub(TAGS) {
        None => tagged(group),
        Some(user) => Owner::User(UserId(user + 1)),
    };
    let host = u16::from_be_bytes([b, c]);
    let addresses = Addresses {
        v4: [100, 64 + a, b, c].into(),
        v6: [0xfd01, 0x101, 0x101, 0, 0, 0, u16::from(a), host].into(),
    };
    let name = Name::sanitize(&format!("node-{id}"));
    Node {
        endpoints: [([192, 0, 2, c], 41641).into()].into(),
        ..Node::new(
            NodeId(id),
            name,
            MachinePublic(key),
            NodePublic(key),
            owner,
            addresses,
        )
    }
}
