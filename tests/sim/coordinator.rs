//! The coordinator's side: the product's own pure parts behind the smallest possible shell.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_api::{update, v1};
use mesh_core::control::{Applied, Keys, Membership};
use mesh_core::ipam;
use mesh_core::key::{MachineKey, MachinePublic};
use mesh_core::netmap::digest::{ItemDigest, ItemKey};
use mesh_core::netmap::{Digest, Netmap, build, delta};
use mesh_core::node::{Epoch, Generation, MeshId, Name, Node, NodeId, Owner, Tag};
use mesh_core::policy::{self, CompiledPolicy, Document, Subjects};
use mesh_core::world::{Mesh, Pools, World};

use crate::model::Pairs;

/// What a session's node holds, as far as was sent.
#[derive(Clone, Debug)]
struct Holds {
    digest: Digest,
    epoch: Epoch,
    generation: Generation,
    items: BTreeMap<ItemKey, ItemDigest>,
}

#[derive(Clone, Debug)]
pub(crate) struct Coordinator {
    pub(crate) key: MachineKey,
    pub(crate) world: World,
    pub(crate) policy: CompiledPolicy,
    pub(crate) pairs: Pairs,
    next: u64,
    sessions: BTreeMap<NodeId, Option<Holds>>,
    pub(crate) applied: BTreeMap<NodeId, Applied>,
}

impl Coordinator {
    pub(crate) fn new(pairs: Pairs) -> Self {
        let world = World {
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
            users: BTreeMap::new(),
            nodes: BTreeMap::new(),
        };
        Self {
            key: MachineKey::from_seed([9; 32]),
            policy: compile(pairs, &world),
            world,
            pairs,
            next: 1,
            sessions: BTreeMap::new(),
            applied: BTreeMap::new(),
        }
    }

    /// One change of the world, and everything that follows from it.
    fn change(&mut self, edit: impl FnOnce(&mut World)) {
        edit(&mut self.world);
        self.world.generation.0 += 1;
        self.policy = compile(self.pairs, &self.world);
    }

    fn edit(&mut self, id: NodeId, edit: impl FnOnce(&mut Node)) {
        self.change(|world| {
            if let Some(node) = world.nodes.get_mut(&id) {
                edit(Arc::make_mut(node));
            }
        });
    }

    pub(crate) fn node_of(&self, machine: &MachinePublic) -> Option<NodeId> {
        let mut nodes = self.world.nodes.values();
        nodes
            .find(|node| node.machine == *machine)
            .map(|node| node.id)
    }

    /// Makes a node, or makes an expired one valid again.
    pub(crate) fn enroll(&mut self, keys: &Keys, tag: usize) -> Membership {
        let machine = keys.machine.public();
        let id = match self.node_of(&machine) {
            Some(id) => {
                self.edit(id, |node| node.expired = false);
                id
            }
            None => self.add(keys, tag),
        };
        Membership {
            mesh: self.world.mesh.id,
            node: id,
        }
    }

    fn add(&mut self, keys: &Keys, tag: usize) -> NodeId {
        let id = NodeId(self.next);
        self.next += 1;
        let pools = &self.world.mesh.pools;
        let taken = self.world.nodes.values().map(|node| node.addresses.v4);
        let addresses = ipam::allocate(pools, &[pools.v4], &taken.collect()).unwrap();
        let name = Name::parse("node").unwrap().unique(&self.world.names());
        let tag = Tag::parse(&format!("tag:t{tag}")).unwrap();
        let node = Node::new(
            id,
            name,
            keys.machine.public(),
            keys.node.public(),
            Owner::Tags([tag].into()),
            addresses,
        );
        self.change(|world| drop(world.nodes.insert(id, Arc::new(node))));
        id
    }

    pub(crate) fn set_policy(&mut self, pairs: Pairs) {
        self.pairs = pairs;
        self.change(|_| {});
    }

    pub(crate) fn rename(&mut self, id: NodeId, name: &str) {
        let name = Name::parse(name).unwrap().unique(&self.world.names());
        self.edit(id, |node| node.name = name);
    }

    pub(crate) fn expire(&mut self, id: NodeId) {
        self.edit(id, |node| node.expired = true);
    }

    /// Returns whether a session must be told.
    pub(crate) fn delete(&mut self, id: NodeId) -> bool {
        self.change(|world| drop(world.nodes.remove(&id)));
        self.applied.remove(&id);
        self.sessions.remove(&id).is_some()
    }

    pub(crate) fn report(&mut self, id: NodeId, endpoints: BTreeSet<SocketAddr>) {
        let node = self.world.nodes.get(&id);
        if node.is_some_and(|node| node.endpoints != endpoints) {
            self.edit(id, |node| node.endpoints = endpoints);
        }
    }

    /// The world of `backup` comes back in a new epoch, as after a restore.
    pub(crate) fn restore(&mut self, backup: &Self) {
        let epoch = Epoch(self.world.epoch.0.max(backup.world.epoch.0) + 1);
        *self = backup.clone();
        self.world.epoch = epoch;
        self.sessions.clear();
        self.applied.clear();
    }

    // === sessions ===

    pub(crate) fn begin(&mut self, id: NodeId, held: Option<&Netmap>) {
        let holds = held.map(|held| Holds {
            digest: held.digest(),
            epoch: held.epoch,
            generation: held.generation,
            items: held.items(),
        });
        // What a node holds of another epoch, or from the future, leads nowhere.
        let usable = holds.filter(|holds| {
            holds.epoch == self.world.epoch && holds.generation <= self.world.generation
        });
        self.sessions.insert(id, usable);
    }

    pub(crate) fn end(&mut self, id: NodeId) {
        self.sessions.remove(&id);
    }

    /// What the node must be sent now, if anything.
    pub(crate) fn update(&mut self, id: NodeId) -> Option<v1::SignedUpdate> {
        let holds = self.sessions.get_mut(&id)?;
        let newest = build::build(&self.world, &self.policy, id)?;
        let signed = match holds {
            None => update::sign_full(&self.key, &newest),
            Some(held)
                if (held.generation, held.digest) == (newest.generation, newest.digest()) =>
            {
                return None;
            }
            Some(held) => {
                let step = delta::since(&held.items, &newest);
                update::sign_delta(&self.key, held.digest, &step, &newest)
            }
        };
        *holds = Some(Holds {
            digest: newest.digest(),
            epoch: newest.epoch,
            generation: newest.generation,
            items: newest.items(),
        });
        Some(signed)
    }
}

fn compile(pairs: Pairs, world: &World) -> CompiledPolicy {
    let document = Document::parse(&pairs.text()).unwrap();
    policy::compile(&document, &Subjects::from(world), None)
}
