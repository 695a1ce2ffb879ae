-- Columns that come later are null in rows written before, and a null at the end of a row is no
-- part of its sum: such a row still carries the right one.

ALTER TABLE "user" ADD COLUMN role       TEXT;  -- null: member
ALTER TABLE "user" ADD COLUMN idp_groups TEXT;  -- JSON array of strings; null: none

ALTER TABLE node ADD COLUMN attributes TEXT;  -- JSON object; null: none

ALTER TABLE policy ADD COLUMN file   TEXT;  -- as `policy set` was told, without directories
ALTER TABLE policy ADD COLUMN author TEXT;

-- Policies that were in force before. Feeds no netmap, so the root does not know of it; each row
-- has its sum all the same, which is checked before a text is shown or set again.
CREATE TABLE policy_history (
    version INTEGER PRIMARY KEY,
    text    TEXT    NOT NULL,
    changed INTEGER NOT NULL,
    file    TEXT,
    author  TEXT,
    sum     BLOB    NOT NULL
) STRICT;
