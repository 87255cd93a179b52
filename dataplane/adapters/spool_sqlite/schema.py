"""What lies in `spool.db`, and how its connections are opened.

    state            one row: whose file it is, and the counters that must not be found by counting rows
    message          envelope, addresses and, unless it lies in content/, content
    recipient        one row per recipient that is not terminal; the two partial indexes are the queue and the attempts
    unreported       messages whose envelope is in no record yet; apart, so that the mark does not rewrite a wide row
    outbox           records not acknowledged and the tail of those that are, many to a row
    quarantine       messages whose row or content did not match its checksum
    submission_key   keys of messages of the last 24 hours, in the order of acceptance; they outlive their message
    opening          ids of openings that the control plane may ask for, see openings.py

`user_version` is the layout's number. A newer layout that this code can still read and write says so in
`state.readable_by`; otherwise opening fails. A file of an older layout is given what it lacks when it is opened: layout
2 added `submission_key`, layout 3 `opening` and `state.answered`; older code leaves them alone. `rank` is the negated
priority, so that one comparison of row values follows the order of `ports.Cursor`. Opening raises apsw's errors; the
caller tells damage from the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import apsw

from dataplane.ports import SpoolError

Row = tuple[Any, ...]

DATABASE = "spool.db"
LAYOUT = 3
# The oldest code that may use what this code writes.
_READABLE_BY = 1
APPLICATION_ID = 0x50525350
PAGE_BYTES = 8192
# Kept small on purpose: the file's pages are in the system's cache anyway, and the queue must not grow into our memory.
_CACHE_KIB = 16384

_TABLES = """
CREATE TABLE state (
    id INTEGER PRIMARY KEY CONSTRAINT ck_state_id CHECK (id = 1),
    spool TEXT NOT NULL,
    readable_by INTEGER NOT NULL,
    incarnation INTEGER NOT NULL,
    waiting_count INTEGER NOT NULL,
    outbox_first INTEGER NOT NULL,
    outbox_last INTEGER NOT NULL,
    outbox_bytes INTEGER NOT NULL,
    acknowledged INTEGER NOT NULL
) STRICT;
CREATE TABLE message (
    number INTEGER PRIMARY KEY,
    id BLOB NOT NULL CONSTRAINT uq_message_id UNIQUE,
    checksum INTEGER NOT NULL,
    content_bytes INTEGER NOT NULL,
    envelope BLOB NOT NULL,
    content BLOB
) STRICT;
CREATE TABLE recipient (
    message_id BLOB NOT NULL,
    idx INTEGER NOT NULL,
    state INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    due_ms INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    incarnation INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    queue_key TEXT NOT NULL,
    CONSTRAINT pk_recipient PRIMARY KEY (message_id, idx)
) STRICT, WITHOUT ROWID;
CREATE INDEX ix_recipient_waiting ON recipient (queue_key, due_ms, rank, message_id, idx) WHERE state IN (1, 2, 4);
CREATE INDEX ix_recipient_sending ON recipient (message_id, incarnation) WHERE state = 3;
CREATE TABLE unreported (
    message_id BLOB NOT NULL CONSTRAINT pk_unreported PRIMARY KEY
) STRICT, WITHOUT ROWID;
CREATE TABLE outbox (
    first INTEGER PRIMARY KEY,
    count INTEGER NOT NULL,
    end_bytes INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    records BLOB NOT NULL
) STRICT;
CREATE TABLE quarantine (
    id BLOB NOT NULL CONSTRAINT pk_quarantine PRIMARY KEY,
    reason TEXT NOT NULL,
    time_ms INTEGER NOT NULL,
    envelope BLOB,
    content BLOB,
    recipients TEXT
) STRICT;
CREATE VIEW waiting AS
SELECT lower(hex(r.message_id)) AS message,
       json_extract(CAST(m.envelope AS TEXT), '$.account') AS account,
       json_extract(CAST(m.envelope AS TEXT), '$.sender') AS sender,
       json_extract(CAST(m.envelope AS TEXT), '$.recipients."' || r.idx || '"') AS recipient,
       CASE r.state WHEN 1 THEN 'scheduled' WHEN 2 THEN 'queued' WHEN 3 THEN 'sending' WHEN 4 THEN 'deferred'
                    WHEN 5 THEN 'held' END AS state,
       r.attempt,
       datetime(r.due_ms / 1000, 'unixepoch') AS due,
       -r.rank AS priority,
       replace(r.queue_key, char(9), ' ') AS queue_key,
       m.content_bytes
FROM recipient AS r LEFT JOIN message AS m ON m.id = r.message_id;
"""
_SUBMISSION_KEYS = """
CREATE TABLE submission_key (
    number INTEGER PRIMARY KEY,
    key_hash BLOB NOT NULL CONSTRAINT uq_submission_key_key_hash UNIQUE,
    content_hash BLOB NOT NULL,
    message_id BLOB NOT NULL,
    time_ms INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) STRICT;
"""
# `last_record` is known when the next one begins; `answered` is the newest incarnation that the control plane took.
_OPENINGS = """
CREATE TABLE opening (
    incarnation INTEGER PRIMARY KEY,
    id BLOB NOT NULL CONSTRAINT uq_opening_id UNIQUE,
    last_record INTEGER
) STRICT;
ALTER TABLE state ADD COLUMN answered INTEGER NOT NULL DEFAULT 0;
"""
# By the layout that lacked them.
_ADDITIONS = {1: _SUBMISSION_KEYS, 2: _OPENINGS}


def open_writer(path: Path, vfs: str | None = None) -> apsw.Connection:
    """Open the one connection that writes and checkpoints; creates an empty file where there is none."""
    connection = apsw.Connection(str(path), vfs=vfs)
    # Closing must not checkpoint by itself: after a failed fsync the file has to stay as it is.
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    connection.execute("PRAGMA foreign_keys = OFF")
    return connection


def open_reader(path: Path, vfs: str | None = None) -> apsw.Connection:
    """Open a connection that cannot write; the writer is open already."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY, vfs=vfs)
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    return connection


def prepare(connection: apsw.Connection, spool: str) -> None:
    """Make the tables in an empty file, or check that this code may use what is there. SpoolError when it may not."""
    layout = scalar(connection, "PRAGMA user_version")
    if layout == 0:
        with connection:
            connection.execute(_TABLES + "".join(_ADDITIONS.values()))
            connection.execute(
                "INSERT INTO state VALUES (1, ?, ?, 0, 0, 1, 0, 0, 0, 0)",
                (spool, _READABLE_BY),
            )
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {LAYOUT}")
        return
    owner, readable_by = connection.execute("SELECT spool, readable_by FROM state").get
    if readable_by > LAYOUT:
        raise SpoolError(f"spool.db has layout {layout}, which needs a newer version of Postroad")
    if owner != spool:
        raise SpoolError(f"spool.db belongs to spool {owner}, not to {spool}")
    if layout < LAYOUT:
        with connection:
            connection.execute("".join(sql for lacking, sql in _ADDITIONS.items() if lacking >= layout))
            connection.execute(f"PRAGMA user_version = {LAYOUT}")


def scalar(connection: apsw.Connection, sql: str, bindings: tuple[Any, ...] = ()) -> int:
    """Return the one integer that a query answers."""
    value: int = connection.execute(sql, bindings).get
    return value


def fetch(
    source: apsw.Connection | apsw.Cursor, sql: str, bindings: tuple[Any, ...] | Mapping[str, Any] = ()
) -> list[Row]:
    """Return all rows of a query; the tables are STRICT, so a column has the type that it was declared with."""
    return source.execute(sql, bindings).fetchall()
