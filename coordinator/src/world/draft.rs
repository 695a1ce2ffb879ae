//! The next world while it is being decided upon.
//!
//! Every put notes what it means for the others: whether policy must be compiled again, and whose
//! netmaps can change. Forgetting either would leave a node with an old map, so both are derived
//! here, from the old and the new value, and never said by who makes the change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_core::node::{Generation, Node, NodeId, UnixTime, User, UserId};
use mesh_core::policy::{self, Document, Subjects};
use mesh_core::world::World;

use super::{Current, TRAIL, Touched, machines};
use crate::preauth::{KeyId, PreAuthKey};
use crate::store::{PolicyText, Write};

/// The next world while it is being decided upon. Whoever refuses a change must not have written.
#[derive(Debug)]
pub struct Draft {
    pub now: UnixTime,
    world: World,
    keys: BTreeMap<KeyId, Arc<PreAuthKey>>,
    policy: Option<Arc<PolicyText>>,
    document: Arc<Document>,
    pub(super) next_id: u64,
    pub(super) writes: Vec<Write>,
    /// Something changed that policy looks at.
    stale_policy: bool,
    touched: Touched,
    /// Whose advertised routes the policy may approve now and could not before.
    offers: Offers,
}

/// Nodes whose routes are to be held against the policy's `autoApprovers`.
#[derive(Debug)]
enum Offers {
    Everybodys,
    Of(BTreeSet<NodeId>),
}

impl Draft {
    pub(super) fn of(current: &Current, now: UnixTime) -> Self {
        Self {
            now,
            world: current.world.clone(),
            keys: current.keys.clone(),
            policy: current.policy.clone(),
            document: current.document.clone(),
            next_id: current.next_id,
            writes: Vec::new(),
            stale_policy: false,
            touched: Touched::Nodes(BTreeSet::new()),
            offers: Offers::Of(BTreeSet::new()),
        }
    }

    fn touch(&mut self, node: &Node) {
        let serves = !node.approved_routes.is_empty();
        match &mut self.touched {
            Touched::Nodes(nodes) if !serves => drop(nodes.insert(node.id)),
            touched => *touched = Touched::Everything,
        }
    }

    pub fn world(&self) -> &World {
        &self.world
    }

    pub fn keys(&self) -> &BTreeMap<KeyId, Arc<PreAuthKey>> {
        &self.keys
    }

    pub fn policy(&self) -> Option<&Arc<PolicyText>> {
        self.policy.as_ref()
    }

    /// What is in force, whoever set it.
    pub fn document(&self) -> &Document {
        &self.document
    }

    /// A number that nothing in this mesh ever had.
    pub fn next_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    pub fn put_node(&mut self, node: Node) -> Arc<Node> {
        let node = Arc::new(node);
        let old = self.world.nodes.insert(node.id, node.clone());
        let judged_anew = old
            .as_ref()
            .is_none_or(|old| policy::tells_apart(old, &node));
        self.stale_policy |= judged_anew;
        let offers = |node: &Node| (node.advertised_routes.clone(), node.owner.clone());
        if let Offers::Of(nodes) = &mut self.offers
            && old.as_ref().is_none_or(|old| offers(old) != offers(&node))
        {
            nodes.insert(node.id);
        }
        match &old {
            Some(old) if !judged_anew && for_peers(old) == for_peers(&node) => {}
            old => {
                if let Some(old) = old {
                    self.touch(old);
                }
                self.touch(&node);
            }
        }
        self.writes.push(Write::PutNode(node.clone()));
        node
    }

    pub fn delete_node(&mut self, id: NodeId) {
        if let Some(old) = self.world.nodes.remove(&id) {
            self.stale_policy = true;
            self.touch(&old);
            self.writes.push(Write::DeleteNode(id));
        }
    }

    pub fn put_user(&mut self, user: User) -> Arc<User> {
        let user = Arc::new(user);
        self.world.users.insert(user.id, user.clone());
        self.offers = Offers::Everybodys;
        self.stale_policy = true;
        self.touched = Touched::Everything;
        self.writes.push(Write::PutUser(user.clone()));
        user
    }

    pub fn delete_user(&mut self, id: UserId) {
        if self.world.users.remove(&id).is_some() {
            self.stale_policy = true;
            self.touched = Touched::Everything;
            self.writes.push(Write::DeleteUser(id));
        }
    }

    pub fn put_key(&mut self, key: PreAuthKey) -> Arc<PreAuthKey> {
        let key = Arc::new(key);
        self.keys.insert(key.id, key.clone());
        self.writes.push(Write::PutKey(key.clone()));
        key
    }

    pub fn delete_key(&mut self, id: KeyId) {
        if self.keys.remove(&id).is_some() {
            self.writes.push(Write::DeleteKey(id));
        }
    }

    pub fn put_policy(&mut self, text: PolicyText, document: Arc<Document>) -> Arc<PolicyText> {
        let text = Arc::new(text);
        if let Some(before) = &self.policy {
            self.writes.push(Write::KeepPolicy(before.clone()));
        }
        self.policy = Some(text.clone());
        self.document = document;
        self.offers = Offers::Everybodys;
        self.stale_policy = true;
        self.touched = Touched::Everything;
        self.writes.push(Write::PutPolicy(text.clone()));
        text
    }

    /// Approves the routes that the policy lets their nodes have without an administrator. What was
    /// approved before stays: a policy takes nothing back.
    pub(super) fn approve_offers(&mut self) {
        let document = Arc::clone(&self.document);
        let offers = std::mem::replace(&mut self.offers, Offers::Of(BTreeSet::new()));
        let nodes = match offers {
            Offers::Everybodys => self.world.nodes.keys().copied().collect(),
            Offers::Of(nodes) => nodes,
        };
        for id in nodes {
            let Some(node) = self.world.nodes.get(&id).cloned() else {
                continue;
            };
            if node.advertised_routes.is_subset(&node.approved_routes) {
                continue;
            }
            let approved = policy::auto_approved(&document, &Subjects::from(&self.world), &node);
            if !approved.is_subset(&node.approved_routes) {
                let mut node = node.as_ref().clone();
                node.approved_routes.extend(approved);
                self.put_node(node);
            }
        }
    }

    /// The world that this draft becomes, compiled where that can have changed.
    pub(super) fn finish(self, current: &Current, to: Generation) -> Current {
        let mut world = self.world;
        world.generation = to;
        let nodes_changed = self
            .writes
            .iter()
            .any(|write| matches!(write, Write::PutNode(_) | Write::DeleteNode(_)));
        let compiled = if self.stale_policy {
            let prev = Some(current.compiled.as_ref());
            Arc::new(policy::compile(
                &self.document,
                &Subjects::from(&world),
                prev,
            ))
        } else {
            current.compiled.clone()
        };
        let mut trail = current.trail.clone();
        trail.push_back((to, Arc::new(self.touched)));
        if trail.len() > TRAIL {
            trail.pop_front();
        }
        Current {
            trail,
            machines: if nodes_changed {
                Arc::new(machines(&world))
            } else {
                current.machines.clone()
            },
            world,
            keys: self.keys,
            policy: self.policy,
            document: self.document,
            compiled,
            next_id: self.next_id,
        }
    }
}

/// What of a node its own netmap or another's holds.
fn for_peers(node: &Node) -> impl PartialEq + '_ {
    let Node {
        id,
        name,
        machine: _,
        key,
        owner,
        addresses,
        endpoints,
        advertised_routes,
        approved_routes,
        ephemeral: _,
        created: _,
        expires,
        expired,
        host: _,
        attributes: _,
    } = node;
    (
        (id, name, key, owner, addresses, endpoints),
        (advertised_routes, approved_routes, expires, expired),
    )
}
