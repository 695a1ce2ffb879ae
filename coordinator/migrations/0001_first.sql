-- The world at one generation. Every row that feeds it ends in `sum`, the SHA-256 over its other
-- columns, and `instance.root` is the XOR of all those sums: a row that changed, vanished or came
-- twice is noticed when the world is loaded. STRICT, so that a column holds what it says.

CREATE TABLE instance (
    id          INTEGER PRIMARY KEY CHECK (id = 1),
    mesh        BLOB    NOT NULL,  -- 16 random bytes; the marker file beside the database repeats them
    domain      TEXT    NOT NULL,
    pool_v4     TEXT    NOT NULL,
    pool_v6     TEXT    NOT NULL,
    coordinator BLOB    NOT NULL,  -- public key; the private one is in a file of its own
    created     INTEGER NOT NULL,
    epoch       INTEGER NOT NULL,
    generation  INTEGER NOT NULL,
    next_id     INTEGER NOT NULL,  -- of nodes, users and keys alike; never used twice
    root        BLOB    NOT NULL,
    sum         BLOB    NOT NULL
) STRICT;

CREATE TABLE "user" (
    id           INTEGER PRIMARY KEY,
    name         TEXT    NOT NULL UNIQUE,
    display_name TEXT    NOT NULL,
    created      INTEGER NOT NULL,
    sum          BLOB    NOT NULL
) STRICT;

CREATE TABLE node (
    id          INTEGER PRIMARY KEY,
    name        TEXT    NOT NULL UNIQUE,
    machine     BLOB    NOT NULL UNIQUE,
    "key"       BLOB    NOT NULL UNIQUE,
    "user"      INTEGER REFERENCES "user" (id),  -- null: the node belongs to its tags
    tags        TEXT    NOT NULL,                -- this and the lists below: JSON arrays of strings
    v4          TEXT    NOT NULL UNIQUE,
    v6          TEXT    NOT NULL UNIQUE,
    endpoints   TEXT    NOT NULL,
    advertised  TEXT    NOT NULL,
    approved    TEXT    NOT NULL,
    ephemeral   INTEGER NOT NULL,
    created     INTEGER NOT NULL,
    expires     INTEGER,
    expired     INTEGER NOT NULL,
    host        TEXT    NOT NULL,                -- JSON object
    sum         BLOB    NOT NULL
) STRICT;

CREATE TABLE auth_key (
    id         INTEGER PRIMARY KEY,
    prefix     TEXT    NOT NULL UNIQUE,
    hash       BLOB    NOT NULL UNIQUE,  -- SHA-256 of the secret, which is stored nowhere
    reusable   INTEGER NOT NULL,
    ephemeral  INTEGER NOT NULL,
    "user"     INTEGER REFERENCES "user" (id),
    tags       TEXT    NOT NULL,
    created    INTEGER NOT NULL,
    expires    INTEGER NOT NULL,
    revoked    INTEGER NOT NULL,
    uses       INTEGER NOT NULL,
    last_node  INTEGER,                  -- whom the last use enrolled
    sum        BLOB    NOT NULL
) STRICT;

CREATE TABLE policy (
    version INTEGER PRIMARY KEY,
    text    TEXT    NOT NULL,
    changed INTEGER NOT NULL,
    sum     BLOB    NOT NULL
) STRICT;

-- What follows feeds no netmap.

CREATE TABLE last_seen (
    node INTEGER PRIMARY KEY REFERENCES node (id) ON DELETE CASCADE,
    at   INTEGER NOT NULL
) STRICT;

-- Written to learn whether the database takes writes.
CREATE TABLE probe (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    at INTEGER NOT NULL
) STRICT;
