//! Reading everything, and believing a row only when it carries its own sum.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use mesh_core::node::{Epoch, Generation, NodeId, UnixTime};
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{Row as _, TypeInfo as _, ValueRef as _};

use super::{Sums, failed};
use crate::store::rows::{self, Columns, Instance, Sum, Table, Value};
use crate::store::{Loaded, PolicyText, StoreError};

pub(super) struct Contents {
    pub(super) instance: Instance,
    pub(super) sums: Sums,
    pub(super) loaded: Loaded,
}

/// Reads every row that feeds the world; any that does not carry its own sum fails the whole.
pub(super) async fn read(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<Contents, StoreError> {
    let select = "SELECT id, mesh, domain, pool_v4, pool_v6, coordinator, created, epoch, \
                  generation, next_id, root, sum FROM instance NOT INDEXED";
    let found = sqlx::query(select).fetch_all(&mut *connection).await;
    let found = found.map_err(|error| failed(path, error))?;
    let [row] = found.as_slice() else {
        return Err(damaged("the instance row is missing"));
    };
    let (values, _) = checked("instance", rows::INSTANCE_COLUMNS, row, |values| {
        rows::sum("instance", values)
    })?;
    let instance =
        rows::read_instance(&mut Columns::new(values)).map_err(|e| unreadable("instance", e))?;

    let mut tables = Tables {
        connection,
        path,
        sums: BTreeMap::new(),
    };
    let users = tables.read(&rows::USER, rows::read_user).await?;
    let nodes = tables.read(&rows::NODE, rows::read_node).await?;
    let keys = tables.read(&rows::KEY, rows::read_key).await?;
    let policies = tables.read(&rows::POLICY, rows::read_policy).await?;
    let sums = tables.sums;
    let mut root = Sum::default();
    for sum in sums.values() {
        rows::toggle(&mut root, sum);
    }
    if root != instance.root {
        return Err(damaged("rows are missing, doubled or from another time"));
    }

    let seen: Vec<(i64, i64)> = sqlx::query_as("SELECT node, at FROM last_seen NOT INDEXED")
        .fetch_all(connection)
        .await
        .map_err(|error| failed(path, error))?;
    let seen = seen.into_iter().filter_map(|(node, at)| {
        let (node, at) = (node.try_into().ok()?, at.try_into().ok()?);
        Some((NodeId(node), UnixTime(at)))
    });
    let loaded = Loaded {
        mesh: instance.mesh.clone(),
        coordinator: instance.coordinator,
        epoch: Epoch(instance.epoch),
        generation: Generation(instance.generation),
        next_id: instance.next_id,
        users: by_id(users, |user| user.id),
        nodes: by_id(nodes, |node| node.id),
        keys: by_id(keys, |key| key.id),
        policy: policies
            .into_iter()
            .max_by_key(|policy| policy.version)
            .map(Arc::new),
        last_seen: seen.collect(),
    };
    Ok(Contents {
        instance,
        sums,
        loaded,
    })
}

/// The policies before the one in force, newest first, without their texts.
pub(super) async fn policies(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<Vec<PolicyText>, StoreError> {
    let select = "SELECT version, changed, file, author FROM policy_history ORDER BY version DESC";
    let found: Vec<(i64, i64, Option<String>, Option<String>)> = sqlx::query_as(select)
        .fetch_all(connection)
        .await
        .map_err(|error| failed(path, error))?;
    let kept = found
        .into_iter()
        .filter_map(|(version, changed, file, author)| {
            Some(PolicyText {
                version: version.try_into().ok()?,
                text: String::new(),
                changed: UnixTime(changed.try_into().ok()?),
                file: file.unwrap_or_default(),
                author: author.unwrap_or_default(),
            })
        });
    Ok(kept.collect())
}

/// One of them, whole, if it is kept and carries its own sum.
pub(super) async fn policy(
    connection: &mut SqliteConnection,
    path: &Path,
    version: u64,
) -> Result<Option<PolicyText>, StoreError> {
    let table = &rows::POLICY_HISTORY;
    let found = sqlx::query(table.select)
        .bind(rows::signed(version))
        .fetch_optional(connection)
        .await
        .map_err(|error| failed(path, error))?;
    let Some(row) = found else { return Ok(None) };
    let (values, _) = checked(table.name, table.columns, &row, |v| table.sum(v))?;
    let policy = rows::read_policy(&mut Columns::new(values));
    policy.map(Some).map_err(|e| unreadable(table.name, e))
}

struct Tables<'a> {
    connection: &'a mut SqliteConnection,
    path: &'a Path,
    sums: Sums,
}

impl Tables<'_> {
    async fn read<T>(
        &mut self,
        table: &Table,
        read: fn(&mut Columns) -> Result<T, rows::Unreadable>,
    ) -> Result<Vec<T>, StoreError> {
        let found = sqlx::query(table.select)
            .fetch_all(&mut *self.connection)
            .await;
        let found = found.map_err(|error| failed(self.path, error))?;
        let mut items = Vec::with_capacity(found.len());
        for row in &found {
            let (values, sum) = checked(table.name, table.columns, row, |v| table.sum(v))?;
            let Some(Value::Int(id)) = values.first() else {
                return Err(damaged("a row has no id"));
            };
            self.sums.insert((table.name, *id), sum);
            let item = read(&mut Columns::new(values)).map_err(|e| unreadable(table.name, e))?;
            items.push(item);
        }
        Ok(items)
    }
}

/// The first `columns` values of a row, if the sum behind them is theirs.
fn checked(
    table: &str,
    columns: usize,
    row: &SqliteRow,
    sum: impl FnOnce(&[Value]) -> Sum,
) -> Result<(Vec<Value>, Sum), StoreError> {
    let broken = || damaged(&format!("a row of {table} does not have its own checksum"));
    let values: Option<Vec<Value>> = (0..columns).map(|n| value(row, n)).collect();
    let values = values.ok_or_else(broken)?;
    let sum = sum(&values);
    match value(row, columns) {
        Some(Value::Blob(stored)) if stored == sum => Ok((values, sum)),
        _ => Err(broken()),
    }
}

fn value(row: &SqliteRow, index: usize) -> Option<Value> {
    let raw = row.try_get_raw(index).ok()?;
    if raw.is_null() {
        return Some(Value::Null);
    }
    match raw.type_info().name() {
        "INTEGER" => row.try_get(index).map(Value::Int).ok(),
        "TEXT" => row.try_get(index).map(Value::Text).ok(),
        "BLOB" => row.try_get(index).map(Value::Blob).ok(),
        _ => None,
    }
}

fn by_id<K: Ord, T>(items: Vec<T>, id: impl Fn(&T) -> K) -> BTreeMap<K, Arc<T>> {
    let keyed = items.into_iter().map(|item| (id(&item), Arc::new(item)));
    keyed.collect()
}

fn damaged(what: &str) -> StoreError {
    StoreError::Damaged(what.to_owned())
}

fn unreadable(table: &str, column: rows::Unreadable) -> StoreError {
    StoreError::Damaged(format!("column {} of {table} is unreadable", column.0))
}
