//! Where the world is kept: what can be read from it at a start, and written to it in one
//! transaction.
//!
//! The store decides nothing. It is handed the rows of one batch of changes and either all of them
//! are durable when it returns, or none is. That is also all that a second engine would have to do.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use mesh_core::key::MachinePublic;
use mesh_core::node::{Epoch, Generation, Node, NodeId, UnixTime, User, UserId};
use mesh_core::world::Mesh;

use crate::preauth::{KeyId, PreAuthKey};
use crate::state_dir::StateDir;

pub mod restore;
mod rows;
mod sqlite;

pub use sqlite::Sqlite;

/// What a new instance is made of.
#[derive(Debug, Clone)]
pub struct Founding {
    pub mesh: Mesh,
    pub coordinator: MachinePublic,
    pub now: UnixTime,
}

/// The policy text in force, or one that was.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PolicyText {
    /// How often the text has been replaced, from 1.
    pub version: u64,
    pub text: String,
    pub changed: UnixTime,
    /// What the file was called that it came from; empty where nobody said.
    pub file: String,
    /// Who set it; empty where it was not known.
    pub author: String,
}

impl PolicyText {
    /// The name that rules and problems are to be found by.
    pub fn shown_file(&self) -> &str {
        match self.file.as_str() {
            "" => "policy",
            file => file,
        }
    }
}

/// How many policies are kept behind the one in force.
pub const KEPT_POLICIES: u64 = 100;

/// Everything that a start reads.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub mesh: Mesh,
    pub coordinator: MachinePublic,
    pub epoch: Epoch,
    pub generation: Generation,
    pub next_id: u64,
    pub users: BTreeMap<UserId, Arc<User>>,
    pub nodes: BTreeMap<NodeId, Arc<Node>>,
    pub keys: BTreeMap<KeyId, Arc<PreAuthKey>>,
    pub policy: Option<Arc<PolicyText>>,
    pub last_seen: BTreeMap<NodeId, UnixTime>,
}

/// One row to be written. Puts insert or replace.
#[derive(Debug, Clone)]
pub enum Write {
    PutUser(Arc<User>),
    DeleteUser(UserId),
    PutNode(Arc<Node>),
    DeleteNode(NodeId),
    PutKey(Arc<PreAuthKey>),
    DeleteKey(KeyId),
    /// Keeps a policy that is about to be replaced, and forgets the oldest that is kept.
    KeepPolicy(Arc<PolicyText>),
    /// Replaces whatever policy there was.
    PutPolicy(Arc<PolicyText>),
}

/// Rows that become durable together.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The generation that the writes were decided upon; the stored one must still be this.
    pub from: Generation,
    /// One more than `from`.
    pub to: Generation,
    pub next_id: u64,
    pub writes: Vec<Write>,
}

/// Why a database was not opened. Each says what to do; none is ever taken for "new".
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the database {0} is gone, but the marker beside it says that a mesh lives here")]
    Missing(String),
    #[error(
        "the database {0} has no marker file beside it: it is foreign, or its directory is incomplete"
    )]
    Foreign(String),
    #[error("the database {path} is damaged: {what}")]
    Damaged { path: String, what: String },
    #[error("the database {path} belongs to another mesh ({found}, the marker says {marker})")]
    OtherMesh {
        path: String,
        found: String,
        marker: String,
    },
    #[error(
        "the database {path} ends at generation {found}, but generation {known} was acknowledged: \
         it was cut short or replaced by an older copy"
    )]
    Rollback {
        path: String,
        found: Generation,
        known: Generation,
    },
    #[error("the key file is not the one that the mesh's nodes pin; put the right one back")]
    OtherKey,
    #[error("the database {0} was written by a newer mesh-coordinator; run that one")]
    Newer(String),
    #[error("the database cannot be read")]
    Store(#[from] StoreError),
    #[error("the state directory cannot be used: {0:#}")]
    StateDir(anyhow::Error),
}

impl OpenError {
    /// What the operator does next, where restoring a backup is the remedy.
    pub fn restore_hint(&self) -> Option<&'static str> {
        match self {
            Self::Missing(_)
            | Self::Foreign(_)
            | Self::Damaged { .. }
            | Self::OtherMesh { .. }
            | Self::Rollback { .. } => Some(
                "put a backup back with `mesh-coordinator db restore FILE`; nothing was changed, \
                 and running agents keep their tunnels meanwhile",
            ),
            Self::OtherKey | Self::Newer(_) | Self::Store(_) | Self::StateDir(_) => None,
        }
    }
}

/// Why a write or a read did not happen. The world is what it was.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("the disk under the database is full")]
    Full,
    #[error("the database is locked by another process")]
    Busy,
    #[error("the database is damaged: {0}")]
    Damaged(String),
    #[error("the database was changed by somebody else")]
    Conflict,
    #[error("the database failed: {0}")]
    Failed(String),
}

/// The engine under the world.
#[derive(Debug)]
pub enum Store {
    Sqlite(Sqlite),
}

impl Store {
    /// Opens the directory's database with everything verified, or founds a mesh if there is
    /// neither a database nor a marker.
    pub async fn open(
        state: &StateDir,
        found: impl FnOnce() -> Founding + Send,
    ) -> Result<(Self, Loaded), OpenError> {
        let (store, loaded) = Sqlite::open(state, found).await?;
        Ok((Self::Sqlite(store), loaded))
    }

    /// Makes `batch` durable, or nothing of it.
    pub async fn commit(&mut self, batch: &Batch) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(store) => store.commit(batch).await,
        }
    }

    /// Reads and verifies everything once more, after a failure that left the outcome open.
    pub async fn reload(&mut self) -> Result<Loaded, StoreError> {
        match self {
            Self::Sqlite(store) => store.reload().await,
        }
    }

    /// Notes when nodes were last connected. Feeds no netmap.
    pub async fn note_seen(&mut self, seen: &[(NodeId, UnixTime)]) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(store) => store.note_seen(seen).await,
        }
    }

    /// Writes one row and flushes it, to learn whether writes work.
    pub async fn probe(&mut self, now: UnixTime) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(store) => store.probe(now).await,
        }
    }

    /// The policies before the one in force that are kept, newest first, without their texts.
    pub async fn policies(&mut self) -> Result<Vec<PolicyText>, StoreError> {
        match self {
            Self::Sqlite(store) => store.policies().await,
        }
    }

    /// One of them, whole.
    pub async fn policy(&mut self, version: u64) -> Result<Option<PolicyText>, StoreError> {
        match self {
            Self::Sqlite(store) => store.policy(version).await,
        }
    }

    /// Writes a consistent copy to `path`, which must not exist; returns its size in bytes.
    pub async fn backup(&mut self, path: &Path) -> Result<u64, StoreError> {
        match self {
            Self::Sqlite(store) => store.backup(path).await,
        }
    }

    pub async fn close(self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(store) => store.close().await,
        }
    }
}
