//! The single writer: change → store → new world → compiled policy → published.
//!
//! A change is a function over a [`Draft`]. Those that wait together are decided one after another
//! and become durable in one transaction; only then is anything published, and only then is anybody
//! answered. When the store fails, the draft is dropped: what was published stays, whole.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use mesh_core::key::MachinePublic;
use mesh_core::node::{Generation, Node, NodeId, Role};
use mesh_core::policy::{self, CompiledPolicy, Document, Subjects};
use mesh_core::world::World;

use crate::preauth::{KeyId, PreAuthKey};
use crate::store::{Loaded, PolicyText};

mod draft;
#[cfg(test)]
mod tests;
mod writer;

pub use draft::Draft;
pub use writer::{ChangeError, Handle, Writer};

/// The file whose lines are named as long as no policy was ever set.
const NO_FILE: &str = "default-policy";

/// Everything at one generation. Immutable: who holds it, holds it whole.
#[derive(Debug)]
pub struct Current {
    pub world: World,
    pub keys: BTreeMap<KeyId, Arc<PreAuthKey>>,
    /// `None`: nobody has set one, and everybody may reach everybody.
    pub policy: Option<Arc<PolicyText>>,
    pub document: Arc<Document>,
    pub compiled: Arc<CompiledPolicy>,
    machines: Arc<BTreeMap<MachinePublic, NodeId>>,
    next_id: u64,
    /// The last changes, newest last.
    trail: VecDeque<(Generation, Arc<Touched>)>,
}

/// How many changes back [`Current::may_concern`] can tell what they were about.
const TRAIL: usize = 256;

/// What a change was about.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Touched {
    Everything,
    /// Nodes that others see differently now, or that came or went. May be none.
    Nodes(BTreeSet<NodeId>),
}

impl Current {
    /// Whether this node's netmap can differ from what it was at `before`. Errs on the safe side.
    ///
    /// A node is only told of those whom it sees, so a change to one that it saw neither before
    /// nor now is none of its business. Only a change to a node that serves routes concerns
    /// everybody: through whom a route goes can depend on a router that the viewer does not see.
    pub fn may_concern(&self, id: NodeId, before: &Self) -> bool {
        let since = before.world.generation;
        if self.world.epoch != before.world.epoch || self.world.generation < since {
            return true;
        }
        let steps = self.trail.iter().rev();
        let news = steps.take_while(|(generation, _)| *generation > since);
        let mut oldest = self.world.generation.0 + 1;
        for (generation, touched) in news {
            oldest = generation.0;
            let Touched::Nodes(nodes) = touched.as_ref() else {
                return true;
            };
            let concerns = |node: &NodeId| {
                *node == id || before.compiled.sees(id, *node) || self.compiled.sees(id, *node)
            };
            if nodes.iter().any(concerns) {
                return true;
            }
        }
        oldest > since.0 + 1
    }

    /// The node that this machine key belongs to.
    pub fn node_of(&self, machine: &MachinePublic) -> Option<&Arc<Node>> {
        let id = self.machines.get(machine)?;
        self.world.nodes.get(id)
    }

    /// Whether it is the node of a person who administers the mesh's network.
    pub fn is_administrators(&self, machine: &MachinePublic) -> bool {
        let user = self.node_of(machine).filter(|node| !node.expired);
        let user = user.and_then(|node| self.world.users.get(&node.owner.user()?));
        user.is_some_and(|user| matches!(user.role, Role::Owner | Role::Admin | Role::NetworkAdmin))
    }

    fn load(loaded: Loaded, prev: Option<&Self>) -> anyhow::Result<Self> {
        // Checked when it was set: a start must not fail because a check has become stricter.
        let stored = loaded.policy.as_deref();
        let text = stored.map_or(policy::ALLOW_ALL, |policy| &policy.text);
        let document = Document::parse(text)
            .map_err(|problems| anyhow::anyhow!("the stored policy does not parse: {problems}"))?
            .in_file(stored.map_or(NO_FILE, PolicyText::shown_file));
        let world = World {
            mesh: Arc::new(loaded.mesh),
            epoch: loaded.epoch,
            generation: loaded.generation,
            users: loaded.users,
            nodes: loaded.nodes,
        };
        let compiled = policy::compile(
            &document,
            &Subjects::from(&world),
            prev.map(|prev| prev.compiled.as_ref()),
        );
        Ok(Self {
            machines: Arc::new(machines(&world)),
            world,
            keys: loaded.keys,
            policy: loaded.policy,
            document: Arc::new(document),
            compiled: Arc::new(compiled),
            next_id: loaded.next_id,
            trail: VecDeque::new(),
        })
    }
}

fn machines(world: &World) -> BTreeMap<MachinePublic, NodeId> {
    let nodes = world.nodes.values();
    nodes.map(|node| (node.machine, node.id)).collect()
}
