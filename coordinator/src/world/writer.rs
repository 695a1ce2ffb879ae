//! The writer's task, and the way to it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use mesh_core::node::{Generation, NodeId, UnixTime};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{Current, Draft};
use crate::clock::Clock;
use crate::registry::Refusal;
use crate::state_dir::StateDir;
use crate::store::{Batch, Loaded, PolicyText, Store, StoreError};

/// Changes that share one transaction at most: each waits for one flush of the disk.
const BATCH: usize = 128;
/// Changes that may wait for the writer before callers wait to ask.
const QUEUE: usize = 1024;
/// How often a store that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// How often a store that nobody writes to is tried.
const PROBE: Duration = Duration::from_secs(30);

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
    Policies(oneshot::Sender<Result<Vec<PolicyText>, StoreError>>),
    Policy(u64, oneshot::Sender<Result<Option<PolicyText>, StoreError>>),
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
        self.ask(|reply| Request::Backup(path, reply)).await
    }

    /// The policies before the one in force that are kept, newest first, without their texts.
    pub async fn policies(&self) -> Result<Vec<PolicyText>, ChangeError> {
        self.ask(Request::Policies).await
    }

    /// One of them, whole.
    pub async fn policy(&self, version: u64) -> Result<Option<PolicyText>, ChangeError> {
        self.ask(|reply| Request::Policy(version, reply)).await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Request,
    ) -> Result<T, ChangeError> {
        let (sender, receiver) = oneshot::channel();
        let sent = self.requests.send(request(sender)).await;
        sent.map_err(|_| ChangeError::Stopped)?;
        Ok(receiver.await.map_err(|_| ChangeError::Stopped)??)
    }
}

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
        // The last goodbyes were sent a moment before the stop.
        self.requests.close();
        while let Some(first) = self.requests.recv().await {
            self.serve(first).await;
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
                Request::Policies(reply) => drop(reply.send(self.store.policies().await)),
                Request::Policy(version, reply) => {
                    drop(reply.send(self.store.policy(version).await));
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
        draft.approve_offers();
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
