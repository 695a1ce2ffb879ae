//! Builds worlds for policy tests: users and nodes by name, everything else made up.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::key::{MachinePublic, NodePublic};
use mesh_core::node::{
    Addresses, Epoch, Generation, MeshId, Name, Node, NodeId, Owner, Role, Tag, UnixTime, User,
    UserId, UserName,
};
use mesh_core::policy::{CompiledPolicy, Document, Problems, Subjects, check, compile};
use mesh_core::world::{self, Pools, World};

#[derive(Clone, Debug)]
pub(crate) struct Mesh {
    pub(crate) users: BTreeMap<UserId, Arc<User>>,
    pub(crate) nodes: BTreeMap<NodeId, Arc<Node>>,
    pub(crate) pools: Pools,
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            users: BTreeMap::new(),
            nodes: BTreeMap::new(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: "fd7a:115c:a1e0::/48".parse().unwrap(),
            },
        }
    }
}

impl Mesh {
    pub(crate) fn user(&mut self, login: &str) -> UserId {
        let id = UserId(self.users.len() as u64 + 1);
        let user = User {
            id,
            name: UserName::parse(login).unwrap(),
            display_name: String::new(),
            idp_groups: BTreeSet::new(),
            role: Role::default(),
            created: UnixTime(0),
        };
        self.users.insert(id, Arc::new(user));
        id
    }

    pub(crate) fn world(&self) -> World {
        World {
            mesh: Arc::new(world::Mesh {
                id: MeshId([1; 16]),
                domain: "mesh.internal".to_owned(),
                pools: self.pools,
            }),
            epoch: Epoch(1),
            generation: Generation(1),
            users: self.users.clone(),
            nodes: self.nodes.clone(),
        }
    }

    /// A node with the next addresses; the owner is a tag, or several, or a user's login.
    pub(crate) fn node(&mut self, name: &str, owner: &str) -> NodeId {
        let number = self.nodes.len() as u32 + 1;
        let v4 = IpAddr::from([100, 64, (number >> 8) as u8, number as u8]);
        let v6 = format!("fd7a:115c:a1e0::{number:x}").parse().unwrap();
        self.node_at(name, self.owner(owner), v4, v6)
    }

    pub(crate) fn owner(&self, owner: &str) -> Owner {
        if owner.starts_with("tag:") {
            let tags = owner.split(',').map(|tag| Tag::parse(tag).unwrap());
            return Owner::Tags(tags.collect());
        }
        let user = self.users.values().find(|user| user.name.as_str() == owner);
        Owner::User(user.expect("a user of the mesh").id)
    }

    pub(crate) fn node_at(&mut self, name: &str, owner: Owner, v4: IpAddr, v6: IpAddr) -> NodeId {
        let id = NodeId(self.nodes.len() as u64 + 1);
        let id = self.node_called(id, owner, v4, v6);
        let node = Arc::make_mut(self.nodes.get_mut(&id).unwrap());
        node.name = Name::sanitize(name);
        id
    }

    pub(crate) fn node_called(
        &mut self,
        id: NodeId,
        owner: Owner,
        v4: IpAddr,
        v6: IpAddr,
    ) -> NodeId {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&id.0.to_be_bytes());
        let (IpAddr::V4(v4), IpAddr::V6(v6)) = (v4, v6) else {
            panic!("one address of each family");
        };
        let node = Node::new(
            id,
            Name::sanitize("n"),
            MachinePublic(key),
            NodePublic(key),
            owner,
            Addresses { v4, v6 },
        );
        self.nodes.insert(id, Arc::new(node));
        id
    }

    /// Advertises and approves.
    pub(crate) fn route(&mut self, node: NodeId, route: &str) {
        self.advertise(node, route);
        self.approve(node, route);
    }

    pub(crate) fn advertise(&mut self, node: NodeId, route: &str) {
        let node = Arc::make_mut(self.nodes.get_mut(&node).unwrap());
        node.advertised_routes.insert(route.parse().unwrap());
    }

    pub(crate) fn approve(&mut self, node: NodeId, route: &str) {
        let node = Arc::make_mut(self.nodes.get_mut(&node).unwrap());
        node.approved_routes.insert(route.parse().unwrap());
    }

    pub(crate) fn expire(&mut self, node: NodeId) {
        Arc::make_mut(self.nodes.get_mut(&node).unwrap()).expired = true;
    }

    pub(crate) fn v4(&self, node: NodeId) -> IpAddr {
        self.nodes[&node].addresses.v4.into()
    }

    pub(crate) fn v6(&self, node: NodeId) -> IpAddr {
        self.nodes[&node].addresses.v6.into()
    }

    pub(crate) fn subjects(&self) -> Subjects<'_> {
        Subjects {
            users: &self.users,
            nodes: &self.nodes,
            pools: &self.pools,
        }
    }

    pub(crate) fn try_policy(&self, text: &str) -> Result<CompiledPolicy, Problems> {
        let document = Document::parse(text)?;
        check(&document, &self.subjects())?;
        Ok(compile(&document, &self.subjects(), None))
    }

    #[track_caller]
    pub(crate) fn policy(&self, text: &str) -> CompiledPolicy {
        self.try_policy(text)
            .unwrap_or_else(|problems| panic!("{problems}\nin {text}"))
    }
}
