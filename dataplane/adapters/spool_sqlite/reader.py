"""What is read back, over a connection that cannot write.

Inputs are keys and positions, outputs are values of `ports`; every query walks an index from where it starts and stops
at its limit. Short reads on the loop's thread: none holds the connection over a turn of the loop, so none holds back
the WAL. Raises apsw's errors, and DamagedRowError for a row that does not match its checksum.
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

import apsw

from dataplane.adapters.spool_sqlite.codec import (
    DamagedRowError,
    KeyRow,
    Recipient,
    decode_envelope,
    decode_key,
    decode_recipient,
    message_checksum,
    unpack_records,
)
from dataplane.adapters.spool_sqlite.schema import fetch
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.idempotency import Submitted
from dataplane.core.ids import MessageId
from dataplane.core.queue import State
from dataplane.ports import Cursor, Due, KeyHead, StoredMessage, WalkedRow

_SENDABLE = "state IN (1, 2, 4)"
KEYS = f"""
WITH RECURSIVE key (queue_key) AS (
    SELECT (SELECT queue_key FROM recipient INDEXED BY ix_recipient_waiting
            WHERE {_SENDABLE} AND queue_key >= ?1 ORDER BY queue_key LIMIT 1)
    UNION ALL
    SELECT (SELECT r.queue_key FROM recipient AS r INDEXED BY ix_recipient_waiting
            WHERE r.{_SENDABLE} AND r.queue_key > key.queue_key ORDER BY r.queue_key LIMIT 1)
    FROM key WHERE key.queue_key IS NOT NULL
    LIMIT ?2
)
SELECT queue_key, (SELECT r.due_ms FROM recipient AS r INDEXED BY ix_recipient_waiting
                   WHERE r.{_SENDABLE} AND r.queue_key = key.queue_key ORDER BY r.due_ms LIMIT 1)
FROM key WHERE queue_key IS NOT NULL
"""  # noqa: S608 - made of constants
HEADS = f"""
SELECT message_id, idx, attempt, due_ms, -rank, state FROM recipient INDEXED BY ix_recipient_waiting
WHERE {_SENDABLE} AND queue_key = ? AND (due_ms, rank, message_id, idx) > (?, ?, ?, ?)
ORDER BY due_ms, rank, message_id, idx LIMIT ?
"""  # noqa: S608 - made of constants
UNREPORTED = "SELECT message_id FROM unreported ORDER BY message_id LIMIT ?"
INTERRUPTED = """
SELECT DISTINCT message_id FROM recipient INDEXED BY ix_recipient_sending
WHERE state = 3 AND incarnation < ? AND message_id > ? ORDER BY message_id LIMIT ?
"""
OLDEST = "SELECT id FROM message ORDER BY id LIMIT 1"
RECORDS = """
SELECT first, count, checksum, records FROM outbox
WHERE first >= coalesce((SELECT max(first) FROM outbox WHERE first <= ?1), 0) ORDER BY first
"""
MESSAGE = "SELECT checksum, content_bytes, envelope, content FROM message WHERE id = ?"
RECIPIENTS = """
SELECT message_id, idx, state, attempt, due_ms, rank, incarnation, checksum, queue_key
FROM recipient WHERE message_id = ? ORDER BY idx
"""
ENVELOPE = "SELECT envelope FROM message WHERE id = ?"
WALK = """
SELECT message_id, idx, state, queue_key FROM recipient
WHERE (message_id, idx) > (?1, ?2) AND message_id < ?3 AND state BETWEEN 1 AND 5 ORDER BY message_id, idx LIMIT ?4
"""
IS_UNREPORTED = "SELECT 1 FROM unreported WHERE message_id = ?"
SUBMITTED = """
SELECT key_hash, content_hash, message_id, time_ms, checksum FROM submission_key WHERE key_hash = ? AND time_ms > ?
"""
OLDEST_KEY = "SELECT time_ms FROM submission_key ORDER BY number LIMIT 1"
OWNS_CONTENT = """
SELECT EXISTS (SELECT 1 FROM message WHERE id = ?1) OR EXISTS (SELECT 1 FROM quarantine WHERE id = ?1)
"""

# Before any time that a recipient can have.
_BEFORE_ALL = (-(1 << 62), 0, b"", 0)


class Loaded(NamedTuple):
    """A message whose content is None when it lies in a file; `checksum` covers `envelope_bytes` and the content."""

    envelope: Envelope
    recipients: tuple[RecipientRow, ...]
    reported: bool
    checksum: int
    envelope_bytes: bytes
    content_bytes: int
    content: bytes | None


class Reader:
    """Queries. Not thread-safe; `close` ends it."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._cursor = connection.cursor()

    def load(self, message_id: MessageId) -> Loaded | None:
        """A message as of now; an inline content is checked already."""
        execute = self._cursor.execute
        # One snapshot: a commit between the queries must not tear the message apart.
        execute("BEGIN")
        try:
            row = execute(MESSAGE, (message_id,)).fetchone()
            if row is None:
                return None
            found = fetch(self._cursor, RECIPIENTS, (message_id,))
            reported = execute(IS_UNREPORTED, (message_id,)).fetchone() is None
        finally:
            execute("COMMIT")
        checksum, content_bytes, encoded, content = row
        if content is not None and message_checksum(message_id, encoded, content) != checksum:
            raise DamagedRowError("the message does not match its checksum")
        envelope, addresses = decode_envelope(message_id, encoded)
        recipients = tuple(decode_recipient(Recipient(*fields), addresses) for fields in found)
        return Loaded(envelope, recipients, reported, checksum, encoded, content_bytes, content)

    def describe(self, message_id: MessageId) -> StoredMessage | None:
        """A message as of now without its content, which is not read: only its recipients are checked."""
        execute = self._cursor.execute
        execute("BEGIN")
        try:
            row = execute(ENVELOPE, (message_id,)).fetchone()
            if row is None:
                return None
            found = fetch(self._cursor, RECIPIENTS, (message_id,))
            reported = execute(IS_UNREPORTED, (message_id,)).fetchone() is None
        finally:
            execute("COMMIT")
        envelope, addresses = decode_envelope(message_id, row[0])
        recipients = tuple(decode_recipient(Recipient(*fields), addresses) for fields in found)
        return StoredMessage(envelope, b"", recipients, reported)

    def walk(self, after: tuple[MessageId, int], before: MessageId, limit: int) -> list[WalkedRow]:
        """The next recipients by their primary key."""
        return [
            WalkedRow(message_id, index, State(state), queue_key)
            for message_id, index, state, queue_key in fetch(self._cursor, WALK, (*after, before, limit))
        ]

    def keys(self, start: str, limit: int) -> list[KeyHead]:
        """The first keys from `start` on."""
        return [KeyHead(*row) for row in fetch(self._cursor, KEYS, (start, limit))]

    def heads(self, queue_key: str, after: Cursor | None, limit: int) -> list[Due]:
        """The next sendable recipients of a key."""
        position = (after.due_ms, -after.priority, after.message_id, after.index) if after else _BEFORE_ALL
        rows = fetch(self._cursor, HEADS, (queue_key, *position, limit))
        return [
            Due(message_id, index, attempt, due_ms, priority, State(state))
            for message_id, index, attempt, due_ms, priority, state in rows
        ]

    def unreported(self, limit: int) -> list[MessageId]:
        """The oldest messages without a record."""
        return [row[0] for row in fetch(self._cursor, UNREPORTED, (limit,))]

    def interrupted(self, incarnation: int, after: bytes, limit: int) -> list[MessageId]:
        """Messages after `after` with attempts begun before `incarnation`."""
        return [row[0] for row in fetch(self._cursor, INTERRUPTED, (incarnation, after, limit))]

    def oldest(self) -> MessageId | None:
        """The lowest id, which is the oldest to the millisecond."""
        row = self._cursor.execute(OLDEST).fetchone()
        return row[0] if row else None

    def submitted(self, key_hash: bytes, after_ms: int) -> Submitted | None:
        """What was stored under a key after `after_ms`."""
        rows = fetch(self._cursor, SUBMITTED, (key_hash, after_ms))
        return decode_key(KeyRow(*rows[0])) if rows else None

    def has_aged_key(self, before_ms: int) -> bool:
        """Whether the first of the submission keys is as old as that."""
        rows = fetch(self._cursor, OLDEST_KEY)
        return bool(rows) and rows[0][0] <= before_ms

    def owns_content(self, message_id: MessageId) -> bool:
        """Whether a row needs the file of this message."""
        return bool(fetch(self._cursor, OWNS_CONTENT, (message_id,))[0][0])

    def records(self, after: int, max_records: int, max_bytes: int) -> tuple[int, list[bytes]]:
        """Records that follow `after`, at least one if there is any."""
        found: list[bytes] = []
        first = after + 1
        size_bytes = 0
        rows = self._cursor.execute(RECORDS, (first,))
        try:
            for pack_first, count, checksum, packed in rows:
                if crc32(packed) != checksum:
                    raise DamagedRowError("records do not match their checksum")
                if not found:
                    first = max(first, pack_first)
                for record in unpack_records(packed, count)[max(0, first - pack_first) :]:
                    size_bytes += len(record)
                    if len(found) == max_records or (found and size_bytes > max_bytes):
                        return first, found
                    found.append(record)
            return first, found
        finally:
            # An unfinished query would hold its snapshot, and with it the WAL.
            self._cursor = self._connection.cursor()
            rows.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
