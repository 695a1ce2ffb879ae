//! The statements of each table, whose columns stand in the order of a row's values.

use super::{Sum, Value, sum};

/// One table: its statements, and how many columns stand before `sum`.
#[derive(Debug)]
pub(in crate::store) struct Table {
    pub(in crate::store) name: &'static str,
    pub(in crate::store) columns: usize,
    /// Columns that the table has had from its beginning. Those behind are only part of the sum up
    /// to the last that is not null, so rows from before keep theirs.
    pub(in crate::store) founding: usize,
    /// Whether its rows are counted in the root.
    pub(in crate::store) feeds_world: bool,
    pub(in crate::store) select: &'static str,
    pub(in crate::store) put: &'static str,
    pub(in crate::store) delete: &'static str,
}

pub(in crate::store) static USER: Table = Table {
    name: "user",
    columns: 6,
    founding: 4,
    feeds_world: true,
    select: r#"SELECT id, name, display_name, created, role, idp_groups, sum
        FROM "user" NOT INDEXED"#,
    put: r#"INSERT INTO "user" (id, name, display_name, created, role, idp_groups, sum)
        VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET
        name = excluded.name, display_name = excluded.display_name, created = excluded.created,
        role = excluded.role, idp_groups = excluded.idp_groups, sum = excluded.sum"#,
    delete: r#"DELETE FROM "user" WHERE id = ?"#,
};

pub(in crate::store) static NODE: Table = Table {
    name: "node",
    columns: 17,
    founding: 16,
    feeds_world: true,
    select: r#"SELECT id, name, machine, "key", "user", tags, v4, v6, endpoints, advertised,
        approved, ephemeral, created, expires, expired, host, attributes, sum
        FROM node NOT INDEXED"#,
    put: r#"INSERT INTO node (id, name, machine, "key", "user", tags, v4, v6, endpoints,
        advertised, approved, ephemeral, created, expires, expired, host, attributes, sum)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET
        name = excluded.name, machine = excluded.machine, "key" = excluded."key",
        "user" = excluded."user", tags = excluded.tags, v4 = excluded.v4, v6 = excluded.v6,
        endpoints = excluded.endpoints, advertised = excluded.advertised,
        approved = excluded.approved, ephemeral = excluded.ephemeral, created = excluded.created,
        expires = excluded.expires, expired = excluded.expired, host = excluded.host,
        attributes = excluded.attributes, sum = excluded.sum"#,
    delete: "DELETE FROM node WHERE id = ?",
};

pub(in crate::store) static KEY: Table = Table {
    name: "auth_key",
    columns: 12,
    founding: 12,
    feeds_world: true,
    select: r#"SELECT id, prefix, hash, reusable, ephemeral, "user", tags, created, expires,
        revoked, uses, last_node, sum FROM auth_key NOT INDEXED"#,
    put: r#"INSERT INTO auth_key VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET
        prefix = excluded.prefix, hash = excluded.hash, reusable = excluded.reusable,
        ephemeral = excluded.ephemeral, "user" = excluded."user", tags = excluded.tags,
        created = excluded.created, expires = excluded.expires, revoked = excluded.revoked,
        uses = excluded.uses, last_node = excluded.last_node, sum = excluded.sum"#,
    delete: "DELETE FROM auth_key WHERE id = ?",
};

pub(in crate::store) static POLICY: Table = Table {
    name: "policy",
    columns: 5,
    founding: 3,
    feeds_world: true,
    select: "SELECT version, text, changed, file, author, sum FROM policy NOT INDEXED",
    put: "INSERT INTO policy (version, text, changed, file, author, sum) VALUES (?, ?, ?, ?, ?, ?)",
    delete: "DELETE FROM policy WHERE version = ?",
};

pub(in crate::store) static POLICY_HISTORY: Table = Table {
    name: "policy_history",
    columns: 5,
    founding: 5,
    feeds_world: false,
    select: "SELECT version, text, changed, file, author, sum FROM policy_history WHERE version = ?",
    put: "INSERT OR REPLACE INTO policy_history (version, text, changed, file, author, sum)
        VALUES (?, ?, ?, ?, ?, ?)",
    delete: "DELETE FROM policy_history WHERE version = ?",
};

impl Table {
    /// The sum of a row of this table.
    pub(in crate::store) fn sum(&self, values: &[Value]) -> Sum {
        let said = |value: &Value| *value != Value::Null;
        let last = values.iter().rposition(said).map_or(0, |last| last + 1);
        sum(
            self.name,
            &values[..last.max(self.founding).min(values.len())],
        )
    }
}
