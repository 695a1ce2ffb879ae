//! The embedded store: one SQLite file, one connection, one writer.
//!
//! SQLite calls a file sound that was cut to nothing, and its own checks miss most single flipped
//! bits. So a file is only taken for ours when its header, marker, every row's sum and the sum of
//! the sums agree, and when it has come at least as far as what was acknowledged from it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_core::node::{Epoch, MeshId, NodeId, UnixTime};
use sqlx::migrate::MigrateError;
use sqlx::sqlite::{
    SqliteArguments, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, Connection as _};

use super::rows::{self, Instance, Sum, Table, Value};
use super::{Batch, Founding, KEPT_POLICIES, Loaded, OpenError, PolicyText, StoreError, Write};
use crate::state_dir::{StateDir, sync_directory};

mod files;
mod read;

pub(super) use files::side_file;
use files::{check_header, check_seal, exists, finish_rename, remove_database, show};
use read::{Contents, read};

/// "mesh", at offset 68 of every file of ours (<https://www.sqlite.org/fileformat.html>).
const APPLICATION_ID: u32 = 0x6d65_7368;
/// How long a write waits for somebody else's lock (a backup tool, a curious sqlite3).
const BUSY_TIMEOUT: Duration = Duration::from_secs(3);
/// Below this, a failed write is put down to the full disk.
const NO_SPACE: u64 = 64 * 1024;

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations");

/// An open database, verified, with the sum of every row that it holds.
#[derive(Debug)]
pub struct Sqlite {
    connection: SqliteConnection,
    path: PathBuf,
    instance: Instance,
    sums: Sums,
}

/// By table and id.
type Sums = BTreeMap<(&'static str, i64), Sum>;

impl Sqlite {
    pub(super) async fn open(
        state: &StateDir,
        found: impl FnOnce() -> Founding + Send,
    ) -> Result<(Self, Loaded), OpenError> {
        let path = state.database();
        let marker = state.marker().map_err(OpenError::StateDir)?;
        finish_rename(state, marker)?;
        match (marker, exists(&path)?) {
            (None, true) => Err(OpenError::Foreign(show(&path))),
            (Some(_), false) => Err(OpenError::Missing(show(&path))),
            (None, false) => {
                let founding = found();
                let mesh = founding.mesh.id;
                create(state, founding).await?;
                Self::open_marked(state, mesh).await
            }
            (Some(mesh), true) => Self::open_marked(state, mesh).await,
        }
    }

    async fn open_marked(state: &StateDir, marker: MeshId) -> Result<(Self, Loaded), OpenError> {
        let path = state.database();
        let head = state.head();
        check_header(&path)?;
        if let Some(seal) = head.and_then(|head| head.seal) {
            check_seal(&path, &seal)?;
        }
        let (store, loaded) = Self::open_file(&path).await?;
        if loaded.mesh.id != marker {
            return Err(OpenError::OtherMesh {
                path: show(&path),
                found: loaded.mesh.id.to_string(),
                marker: marker.to_string(),
            });
        }
        if let Some(head) = head
            && (loaded.epoch, loaded.generation) < (head.epoch, head.generation)
        {
            return Err(OpenError::Rollback {
                path: show(&path),
                found: loaded.generation,
                known: head.generation,
            });
        }
        Ok((store, loaded))
    }

    /// Opens a file that must be one of ours, believing nothing: header, SQLite's own check,
    /// schema, every row.
    pub(super) async fn open_file(path: &Path) -> Result<(Self, Loaded), OpenError> {
        check_header(path)?;
        let bad = |what: String| OpenError::Damaged {
            path: show(path),
            what,
        };
        let refused = |error: sqlx::Error| match failed(path, error) {
            error @ (StoreError::Busy | StoreError::Full) => OpenError::Store(error),
            error => bad(error.to_string()),
        };
        let mut connection = connect(path).await.map_err(refused)?;
        let answer: String = sqlx::query_scalar("PRAGMA quick_check(1)")
            .fetch_one(&mut connection)
            .await
            .map_err(refused)?;
        if answer != "ok" {
            return Err(bad(answer));
        }
        match MIGRATIONS.run_direct(None, &mut connection, false).await {
            Ok(()) => {}
            Err(MigrateError::VersionMissing(_)) => return Err(OpenError::Newer(show(path))),
            Err(error) => return Err(bad(error.to_string())),
        }
        let Contents {
            instance,
            sums,
            loaded,
        } = match read(&mut connection, path).await {
            Ok(contents) => contents,
            Err(error @ (StoreError::Busy | StoreError::Full)) => return Err(error.into()),
            Err(StoreError::Damaged(what)) => return Err(bad(what)),
            Err(error) => return Err(bad(error.to_string())),
        };
        let store = Self {
            connection,
            path: path.to_owned(),
            instance,
            sums,
        };
        Ok((store, loaded))
    }

    /// Reads and verifies everything once more.
    pub(super) async fn reload(&mut self) -> Result<Loaded, StoreError> {
        let contents = read(&mut self.connection, &self.path).await?;
        self.instance = contents.instance;
        self.sums = contents.sums;
        Ok(contents.loaded)
    }

    /// Starts a new epoch in a copy that is about to take a database's place.
    pub(super) async fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), StoreError> {
        self.instance.epoch = epoch.0;
        let result = put_instance(&mut self.connection, &self.instance).await;
        result.map_err(|error| failed(&self.path, error))
    }

    // === writing ===

    pub(super) async fn commit(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let mut instance = self.instance.clone();
        instance.generation = batch.to.0;
        instance.next_id = batch.next_id;
        let mut sums = BTreeMap::new();
        let result = self.write(batch, &mut instance, &mut sums).await;
        let result = self.end(result).await;
        result.map_err(|error| match error {
            Failure::Conflict => StoreError::Conflict,
            Failure::Sql(error) => failed(&self.path, error),
        })?;
        self.instance = instance;
        for (row, sum) in sums {
            match sum {
                Some(sum) => drop(self.sums.insert(row, sum)),
                None => drop(self.sums.remove(&row)),
            }
        }
        Ok(())
    }

    /// `instance.root` and `sums` follow the rows; they only count once all is committed.
    async fn write(
        &mut self,
        batch: &Batch,
        instance: &mut Instance,
        sums: &mut BTreeMap<(&'static str, i64), Option<Sum>>,
    ) -> Result<(), Failure> {
        self.begin().await?;
        for Step { table, id, values } in steps(&batch.writes, &self.sums) {
            if !table.feeds_world {
                put_or_delete(table, id, values)
                    .execute(&mut self.connection)
                    .await?;
                continue;
            }
            let row = (table.name, id);
            let before = match sums.get(&row) {
                Some(pending) => *pending,
                None => self.sums.get(&row).copied(),
            };
            if let Some(before) = before {
                rows::toggle(&mut instance.root, &before);
            }
            let after = values.as_ref().map(|values| table.sum(values));
            if let Some(after) = after {
                rows::toggle(&mut instance.root, &after);
            }
            put_or_delete(table, id, values)
                .execute(&mut self.connection)
                .await?;
            sums.insert(row, after);
        }
        // The guard makes this transaction the only one that follows `from`: another writer's
        // would have moved it.
        let sum = rows::sum("instance", &rows::instance(instance));
        let query = sqlx::query(
            "UPDATE instance SET generation = ?, next_id = ?, root = ?, sum = ? \
             WHERE id = 1 AND epoch = ? AND generation = ?",
        );
        let values = [
            rows::int(instance.generation),
            rows::int(instance.next_id),
            Value::Blob(instance.root.to_vec()),
            Value::Blob(sum.to_vec()),
            rows::int(instance.epoch),
            rows::int(batch.from.0),
        ];
        let moved = values
            .into_iter()
            .fold(query, bind)
            .execute(&mut self.connection)
            .await?;
        if moved.rows_affected() != 1 {
            return Err(Failure::Conflict);
        }
        Ok(())
    }

    /// Our own transactions, because SQLite ends one by itself on some errors, a full disk first
    /// among them. sqlx then fails to roll back, counts on as if the transaction stood, and the
    /// next probe would "succeed" inside nothing. <https://www.sqlite.org/lang_transaction.html>
    async fn begin(&mut self) -> Result<(), sqlx::Error> {
        let begun = sqlx::query("BEGIN IMMEDIATE").execute(&mut self.connection);
        begun.await.map(drop)
    }

    /// Commits what went well and undoes what did not, so that no transaction stays open.
    async fn end<E: From<sqlx::Error>>(&mut self, result: Result<(), E>) -> Result<(), E> {
        let committed = match result {
            Ok(()) => sqlx::query("COMMIT")
                .execute(&mut self.connection)
                .await
                .map(drop)
                .map_err(E::from),
            Err(error) => Err(error),
        };
        if committed.is_err() {
            // Fails where SQLite has done it already.
            drop(sqlx::query("ROLLBACK").execute(&mut self.connection).await);
        }
        committed
    }

    pub(super) async fn note_seen(
        &mut self,
        seen: &[(NodeId, UnixTime)],
    ) -> Result<(), StoreError> {
        let result: Result<(), sqlx::Error> = async {
            self.begin().await?;
            for (node, at) in seen {
                // A node that was deleted meanwhile is passed over.
                let query = sqlx::query(
                    "INSERT OR REPLACE INTO last_seen SELECT id, ? FROM node WHERE id = ?",
                );
                let query = bind(bind(query, rows::int(at.0)), rows::int(node.0));
                query.execute(&mut self.connection).await?;
            }
            Ok(())
        }
        .await;
        let result = self.end(result).await;
        result.map_err(|error| failed(&self.path, error))
    }

    pub(super) async fn probe(&mut self, now: UnixTime) -> Result<(), StoreError> {
        // One row may still fit where a change does not: into what a failed one left of the log.
        if no_space(&self.path) {
            return Err(StoreError::Full);
        }
        let query = sqlx::query("INSERT OR REPLACE INTO probe VALUES (1, ?)");
        let result = bind(query, rows::int(now.0))
            .execute(&mut self.connection)
            .await;
        result.map(drop).map_err(|error| failed(&self.path, error))
    }

    pub(super) async fn policies(&mut self) -> Result<Vec<PolicyText>, StoreError> {
        read::policies(&mut self.connection, &self.path).await
    }

    pub(super) async fn policy(&mut self, version: u64) -> Result<Option<PolicyText>, StoreError> {
        read::policy(&mut self.connection, &self.path, version).await
    }

    pub(super) async fn backup(&mut self, path: &Path) -> Result<u64, StoreError> {
        let text = path
            .to_str()
            .ok_or_else(|| StoreError::Failed("the path of a backup is UTF-8".to_owned()))?;
        let io = |error: std::io::Error| StoreError::Failed(error.to_string());
        // An empty file of our mode is what VACUUM fills.
        drop(
            crate::state_dir::private()
                .create_new(true)
                .open(path)
                .map_err(io)?,
        );
        let result = sqlx::query("VACUUM INTO ?")
            .bind(text)
            .execute(&mut self.connection)
            .await;
        if let Err(error) = result {
            drop(fs::remove_file(path));
            return Err(failed(&self.path, error));
        }
        let file = fs::File::open(path).map_err(io)?;
        file.sync_all().map_err(io)?;
        sync_directory(path).map_err(io)?;
        Ok(file.metadata().map_err(io)?.len())
    }

    pub(super) async fn close(self) -> Result<(), StoreError> {
        let closed = self.connection.close().await;
        closed.map_err(|error| StoreError::Failed(error.to_string()))
    }

    /// Lets the file grow by `pages` pages and no further, as a full disk would.
    #[cfg(test)]
    pub(crate) async fn allow_pages(&mut self, pages: u32) {
        let count: u32 = sqlx::query_scalar("PRAGMA page_count")
            .fetch_one(&mut self.connection)
            .await
            .unwrap();
        let limit = format!("PRAGMA max_page_count = {}", count + pages);
        sqlx::raw_sql(sqlx::AssertSqlSafe(limit))
            .execute(&mut self.connection)
            .await
            .unwrap();
    }
}

enum Failure {
    Conflict,
    Sql(sqlx::Error),
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Self::Sql(error)
    }
}

/// One row to be put, or with `values` left out deleted.
struct Step {
    table: &'static Table,
    id: i64,
    values: Option<Vec<Value>>,
}

fn put_or_delete(table: &'static Table, id: i64, values: Option<Vec<Value>>) -> Query {
    let Some(values) = values else {
        return bind(sqlx::query(table.delete), Value::Int(id));
    };
    let sum = table.sum(&values);
    values
        .into_iter()
        .chain([Value::Blob(sum.to_vec())])
        .fold(sqlx::query(table.put), bind)
}

/// The writes as rows, in order. A policy replaces every one that is stored or was just put.
fn steps(writes: &[Write], stored: &Sums) -> Vec<Step> {
    let of_policy = |(table, id): &(&'static str, i64)| (*table == "policy").then_some(*id);
    let mut policies: Vec<i64> = stored.keys().filter_map(of_policy).collect();
    let mut steps = Vec::new();
    for write in writes {
        let (table, id, values) = match write {
            Write::PutUser(user) => (&rows::USER, user.id.0, Some(rows::user(user))),
            Write::DeleteUser(id) => (&rows::USER, id.0, None),
            Write::PutNode(node) => (&rows::NODE, node.id.0, Some(rows::node(node))),
            Write::DeleteNode(id) => (&rows::NODE, id.0, None),
            Write::PutKey(key) => (&rows::KEY, key.id.0, Some(rows::key(key))),
            Write::DeleteKey(id) => (&rows::KEY, id.0, None),
            Write::KeepPolicy(policy) => {
                let forgotten = policy.version.saturating_sub(KEPT_POLICIES);
                steps.push(Step {
                    table: &rows::POLICY_HISTORY,
                    id: rows::signed(forgotten),
                    values: None,
                });
                let table = &rows::POLICY_HISTORY;
                (table, policy.version, Some(rows::policy(policy)))
            }
            Write::PutPolicy(policy) => {
                let gone = std::mem::replace(&mut policies, vec![rows::signed(policy.version)]);
                steps.extend(gone.into_iter().map(|id| Step {
                    table: &rows::POLICY,
                    id,
                    values: None,
                }));
                (&rows::POLICY, policy.version, Some(rows::policy(policy)))
            }
        };
        steps.push(Step {
            table,
            id: rows::signed(id),
            values,
        });
    }
    steps
}

// === making ===

/// Makes the database of a new mesh beside its place, and moves it there when it is whole. The
/// marker comes in between: from then on this directory is never taken for new again.
async fn create(state: &StateDir, founding: Founding) -> Result<(), OpenError> {
    let path = state.database_new();
    remove_database(&path)?;
    let io = |error: std::io::Error| OpenError::StateDir(error.into());
    // Ours alone; SQLite gives its side files the same mode.
    drop(
        crate::state_dir::private()
            .create_new(true)
            .open(&path)
            .map_err(io)?,
    );
    let instance = Instance {
        mesh: founding.mesh,
        coordinator: founding.coordinator,
        created: founding.now,
        epoch: 1,
        generation: 1,
        next_id: 1,
        root: Sum::default(),
    };
    let sql = async {
        let mut connection = connect(&path).await?;
        sqlx::query("PRAGMA application_id = 0x6d657368")
            .execute(&mut connection)
            .await?;
        MIGRATIONS
            .run_direct(None, &mut connection, false)
            .await
            .map_err(|error| sqlx::Error::Migrate(Box::new(error)))?;
        put_instance(&mut connection, &instance).await?;
        connection.close().await
    };
    sql.await
        .map_err(|error| StoreError::Failed(error.to_string()))?;
    fs::File::open(&path)
        .and_then(|file| file.sync_all())
        .map_err(io)?;
    state
        .write_marker(instance.mesh.id)
        .map_err(OpenError::StateDir)?;
    fs::rename(&path, state.database()).map_err(io)?;
    sync_directory(&path).map_err(io)
}

/// Writes the instance row anew.
async fn put_instance(
    connection: &mut SqliteConnection,
    instance: &Instance,
) -> Result<(), sqlx::Error> {
    let values = rows::instance(instance);
    let sum = rows::sum("instance", &values);
    let insert = "INSERT OR REPLACE INTO instance VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
    values
        .into_iter()
        .chain([Value::Blob(sum.to_vec())])
        .fold(sqlx::query(insert), bind)
        .execute(connection)
        .await
        .map(drop)
}

async fn connect(path: &Path) -> Result<SqliteConnection, sqlx::Error> {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true)
        // A log that is reused in place would take writes on a full disk, until it does not.
        .pragma("journal_size_limit", "0")
        .pragma("cell_size_check", "ON")
        .disable_statement_logging()
        .connect()
        .await
}

type Query = sqlx::query::Query<'static, sqlx::Sqlite, SqliteArguments>;

fn bind(query: Query, value: Value) -> Query {
    match value {
        Value::Null => query.bind(None::<i64>),
        Value::Int(n) => query.bind(n),
        Value::Text(text) => query.bind(text),
        Value::Blob(bytes) => query.bind(bytes),
    }
}

/// The primary result code (<https://www.sqlite.org/rescode.html>).
fn code(error: &sqlx::Error) -> Option<u32> {
    let extended: u32 = error.as_database_error()?.code()?.parse().ok()?;
    Some(extended & 0xff)
}

/// Names the failure; a failed write on a disk without space is the disk's fault.
fn failed(path: &Path, error: sqlx::Error) -> StoreError {
    match code(&error) {
        Some(13) => StoreError::Full,
        Some(10) if no_space(path) => StoreError::Full,
        Some(5 | 6) => StoreError::Busy,
        Some(11 | 26) => StoreError::Damaged(error.to_string()),
        _ if matches!(
            error,
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_)
        ) =>
        {
            StoreError::Damaged(error.to_string())
        }
        _ => StoreError::Failed(error.to_string()),
    }
}

fn no_space(path: &Path) -> bool {
    rustix::fs::statvfs(path.parent().unwrap_or(path))
        .is_ok_and(|fs| fs.f_bavail.saturating_mul(fs.f_frsize) < NO_SPACE)
}
