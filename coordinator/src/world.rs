//! The single writer: change → store → new world → compiled policy → published.
//!
//! A change is a function over a [`Draft`]. Those that wait together are decided one after another
//! and become durable in one transaction; only then is anything published, and only then is anybody
//! answered. When the store fails, the draft is dropped: what was published stays, whole.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use mesh_core::key::MachinePublic;
use mesh_core::node::{Generation, Node, NodeId, UnixTime, User, UserId};
use mesh_core::policy::{self, CompiledPolicy, Document, Subjects};
use mesh_core::world::World;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::clock::Clock;
use crate::preauth::{KeyId, PreAuthKey};
use crate::registry::Refusal;
use crate::state_dir::StateDir;
use crate::store::{Batch, Loaded, PolicyText, Store, StoreError, Write};

/// Changes that share one transaction at most: each waits for one flush of the disk.
const BATCH: usize = 128;
/// Changes that may wait for the writer before callers wait to ask.
const QUEUE: usize = 1024;
/// How often a store that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// How often a store that nobody writes to is tried.
const PROBE: Duration = Duration::from_secs(30);

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

    fn load(loaded: Loaded, prev: Option<&Self>) -> anyhow::Result<Self> {
        // Checked when it was set: a start must not fail because a check has become stricter.
        let text = loaded.policy.as_ref();
        let text = text.map_or(policy::ALLOW_ALL, |policy| &policy.text);
        let document = Document::parse(text)
            .map_err(|problems| anyhow::anyhow!("the stored policy does not parse: {problems}"))?;
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

// === drafts ===

/// The next world while it is being decided upon. Whoever refuses a change must not have written.
#[derive(Debug)]
pub struct Draft {
    pub now: UnixTime,
    world: World,
    keys: BTreeMap<KeyId, Arc<PreAuthKey>>,
    policy: Option<(Arc<PolicyText>, Arc<Document>)>,
    next_id: u64,
    writes: Vec<Write>,
    /// Something changed that policy looks at.
    stale_policy: bool,
    touched: Touched,
}

impl Draft {
    fn of(current: &Current, now: UnixTime) -> Self {
        let policy = current.policy.clone();
        Self {
            now,
            world: current.world.clone(),
            keys: current.keys.clone(),
            policy: policy.map(|text| (text, current.document.clone())),
            next_id: current.next_id,
            writes: Vec::new(),
            stale_policy: false,
            touched: Touched::Nodes(BTreeSet::new()),
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
        self.policy.as_ref().map(|(text, _)| text)
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
        self.stale_policy |= old
            .as_ref()
            .is_none_or(|old| for_policy(old) != for_policy(&node));
        match &old {
            Some(old) if for_peers(old) == for_peers(&node) => {}
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
        self.policy = Some((text.clone(), document));
        self.stale_policy = true;
        self.touched = Touched::Everything;
        self.writes.push(Write::PutPolicy(text.clone()));
        text
    }

    /// The world that this draft becomes, compiled where that can have changed.
    fn finish(self, current: &Current, to: Generation) -> Current {
        let mut world = self.world;
        world.generation = to;
        let (policy, document) = match self.policy {
            Some((text, document)) => (Some(text), document),
            None => (None, current.document.clone()),
        };
        let nodes_changed = self
            .writes
            .iter()
            .any(|write| matches!(write, Write::PutNode(_) | Write::DeleteNode(_)));
        let compiled = if self.stale_policy {
            let prev = Some(current.compiled.as_ref());
            Arc::new(policy::compile(&document, &Subjects::from(&world), prev))
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
            policy,
            document,
            compiled,
            next_id: self.next_id,
        }
    }
}

/// What of a node the policy looks at.
fn for_policy(node: &Node) -> impl PartialEq + '_ {
    (
        &node.owner,
        node.addresses,
        node.expired,
        &node.advertised_routes,
        &node.approved_routes,
    )
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
    } = node;
    (
        (id, name, key, owner, addresses, endpoints),
        (advertised_routes, approved_routes, expires, expired),
    )
}

// === asking ===

/// Why a change did not happen.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ChangeError {
    /// The asker's fault, in words for the asker.
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the coordinator is shutting down")]
    Stopped,
}

type Decide = Box<dyn FnOnce(&mut Draft) -> Answer + Send>;
type Answer = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

enum Request {
    Change(Decide),
    Seen(Vec<(NodeId, UnixTime)>),
    Backup(
        PathBuf,
        oneshot::Sender<Result<(u64, Generation), StoreError>>,
    ),
}

/// The way to the writer, and to what it published last.
#[derive(Clone, Debug)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
    current: watch::Receiver<Arc<Current>>,
    trouble: watch::Receiver<Option<String>>,
}

impl Handle {
    pub fn current(&self) -> Arc<Current> {
        self.current.borrow().clone()
    }

    pub fn subscribe(&self) -> watch::Receiver<Arc<Current>> {
        self.current.clone()
    }

    /// Why writes do not work at the moment; `None` when they do.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
    }

    /// Decides upon the newest world. `Ok` means durable and published.
    pub async fn change<T: Send + 'static>(
        &self,
        decide: impl FnOnce(&mut Draft) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, ChangeError> {
        let (sender, receiver) = oneshot::channel();
        let decide = Box::new(move |draft: &mut Draft| -> Answer {
            let before = draft.writes.len();
            let decision = decide(draft);
            debug_assert!(
                decision.is_ok() || draft.writes.len() == before,
                "a refused change has written"
            );
            Box::new(move |committed| {
                // Nobody waits any more: the change stands all the same.
                drop(sender.send(match committed {
                    Ok(()) => decision.map_err(ChangeError::Refused),
                    Err(error) => Err(ChangeError::Store(error)),
                }));
            })
        });
        let sent = self.requests.send(Request::Change(decide)).await;
        sent.map_err(|_| ChangeError::Stopped)?;
        receiver.await.map_err(|_| ChangeError::Stopped)?
    }

    /// Notes when nodes were last connected.
    pub async fn note_seen(&self, seen: Vec<(NodeId, UnixTime)>) {
        drop(self.requests.send(Request::Seen(seen)).await);
    }

    /// Writes a copy of the database; returns its size and generation.
    pub async fn backup(&self, path: PathBuf) -> Result<(u64, Generation), ChangeError> {
        let (sender, receiver) = oneshot::channel();
        let sent = self.requests.send(Request::Backup(path, sender)).await;
        sent.map_err(|_| ChangeError::Stopped)?;
        Ok(receiver.await.map_err(|_| ChangeError::Stopped)??)
    }
}

// === the writer ===

/// Owner of the store. Lives until every [`Handle`] is gone.
#[derive(Debug)]
pub struct Writer {
    store: Store,
    state: StateDir,
    clock: Clock,
    requests: mpsc::Receiver<Request>,
    current: watch::Sender<Arc<Current>>,
    trouble: watch::Sender<Option<String>>,
}

impl Writer {
    pub fn new(
        store: Store,
        loaded: Loaded,
        mut state: StateDir,
        clock: Clock,
    ) -> anyhow::Result<(Self, Handle)> {
        state
            .break_seal(loaded.epoch, loaded.generation)
            .context("write the head file")?;
        let (request_sender, requests) = mpsc::channel(QUEUE);
        let (current, published) = watch::channel(Arc::new(Current::load(loaded, None)?));
        let (trouble, trouble_seen) = watch::channel(None);
        let handle = Handle {
            requests: request_sender,
            current: published,
            trouble: trouble_seen,
        };
        let writer = Self {
            store,
            state,
            clock,
            requests,
            current,
            trouble,
        };
        Ok((writer, handle))
    }

    /// Serves until stopped, or until the last handle is gone; then closes the store.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let idle = if self.trouble.borrow().is_some() {
                RETRY
            } else {
                PROBE
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                request = self.requests.recv() => match request {
                    None => break,
                    Some(first) => self.serve(first).await,
                },
                () = tokio::time::sleep(idle) => self.probe().await,
            }
        }
        let world = self.current.borrow().clone();
        match self.store.close().await {
            Ok(()) => {
                let (epoch, generation) = (world.world.epoch, world.world.generation);
                if let Err(error) = self.state.seal(epoch, generation) {
                    warn!(%error, "seal the database");
                }
            }
            Err(error) => warn!(%error, "close the database"),
        }
    }

    async fn serve(&mut self, first: Request) {
        let mut decisions = Vec::new();
        let mut next = Some(first);
        while let Some(request) = next.take() {
            match request {
                Request::Change(decide) => decisions.push(decide),
                Request::Seen(seen) => {
                    if let Err(error) = self.store.note_seen(&seen).await {
                        self.failed(&error);
                    }
                }
                Request::Backup(path, reply) => {
                    // What was asked before the backup is in it.
                    self.commit(std::mem::take(&mut decisions)).await;
                    let generation = self.current.borrow().world.generation;
                    let done = self.store.backup(&path).await;
                    drop(reply.send(done.map(|bytes| (bytes, generation))));
                }
            }
            if decisions.len() < BATCH {
                next = self.requests.try_recv().ok();
            }
        }
        self.commit(decisions).await;
    }

    async fn commit(&mut self, decisions: Vec<Decide>) {
        let current = self.current.borrow().clone();
        let mut draft = Draft::of(&current, self.clock.now());
        let decide = |decide: Decide| decide(&mut draft);
        let answers: Vec<Answer> = decisions.into_iter().map(decide).collect();
        let committed = if draft.writes.is_empty() {
            Ok(())
        } else {
            self.commit_draft(&current, draft).await
        };
        for answer in answers {
            answer(committed.clone());
        }
    }

    async fn commit_draft(
        &mut self,
        current: &Arc<Current>,
        draft: Draft,
    ) -> Result<(), StoreError> {
        let from = current.world.generation;
        let to = Generation(from.0 + 1);
        let batch = Batch {
            from,
            to,
            next_id: draft.next_id,
            writes: draft.writes.clone(),
        };
        if let Err(error) = self.store.commit(&batch).await {
            self.failed(&error);
            if !matches!(error, StoreError::Full | StoreError::Busy) {
                self.recover().await;
            }
            return Err(error);
        }
        self.state.raise_head(current.world.epoch, to);
        self.healed();
        let current = current.clone();
        // Compiling is arithmetic over every node: not for the threads that serve sockets.
        let next = tokio::task::spawn_blocking(move || draft.finish(&current, to)).await;
        match next {
            Ok(next) => drop(self.current.send_replace(Arc::new(next))),
            // Durable but unpublished: read it back rather than answer from an old world.
            Err(_) => self.recover().await,
        }
        Ok(())
    }

    /// After a failure that leaves open whether the transaction counts, the database says.
    async fn recover(&mut self) {
        let loaded = match self.store.reload().await {
            Ok(loaded) => loaded,
            Err(error) => return self.failed(&error),
        };
        let current = self.current.borrow().clone();
        if loaded.generation == current.world.generation {
            return;
        }
        match Current::load(loaded, Some(&current)) {
            Ok(next) => drop(self.current.send_replace(Arc::new(next))),
            Err(error) => error!(%error, "read the world back"),
        }
    }

    async fn probe(&mut self) {
        match self.store.probe(self.clock.now()).await {
            Ok(()) => self.healed(),
            Err(error) => self.failed(&error),
        }
    }

    fn failed(&self, error: &StoreError) {
        warn!(%error, "the database takes no writes");
        self.trouble.send_replace(Some(error.to_string()));
    }

    fn healed(&self) {
        if self.trouble.borrow().is_some() {
            info!("the database takes writes again");
            self.trouble.send_replace(None);
        }
    }
}
