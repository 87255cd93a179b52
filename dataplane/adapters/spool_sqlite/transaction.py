"""The statements of one commit: what a batch of writes does to the tables, without the COMMIT.

Inputs are operations and the counters as last committed; outputs are results noted on the operations and new counters.
All statements run on the loop's thread, so the batch is a generator that yields every few statements: the caller
decides how long one turn may last. It has two ways, with the same outcome:

    together   messages and recipients by executemany; any error ends it, and the caller rolls back
    singly     each operation in a savepoint, so that one that cannot be written fails alone

Numbers of records are given here, inside the transaction, so a rollback gives them back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any
from zlib import crc32

import apsw

from dataplane.adapters.spool_sqlite.codec import (
    KeyRow,
    Recipient,
    message_checksum_of_parts,
    pack_records,
    recipient_checksum,
)
from dataplane.adapters.spool_sqlite.errors import ISOLATED
from dataplane.adapters.spool_sqlite.schema import fetch
from dataplane.adapters.spool_tail import TAIL_BYTES, AcknowledgedTail
from dataplane.core.idempotency import KEY_WINDOW_MS
from dataplane.core.ids import MessageId
from dataplane.core.queue import TERMINAL
from dataplane.ports import RecipientChange, Settlement, SpoolError

# So many rows at a time between yields: some 100 to 200 µs.
_SLICE_ROWS = 32
_SLICE_BYTES = 256 * 1024
_SLICE_SETTLEMENTS = 8
# Records of a commit share a row up to this size.
_PACK_BYTES = 256 * 1024
_TRIM_PACKS = 64
_VACUUM_PAGES = 16

_INSERT_MESSAGE = "INSERT INTO message (id, checksum, content_bytes, envelope, content) VALUES (?, ?, ?, ?, ?)"
_INSERT_RECIPIENT = (
    "INSERT INTO recipient (message_id, idx, state, attempt, due_ms, rank, incarnation, checksum, queue_key) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_INSERT_KEY = (
    "INSERT INTO submission_key (key_hash, content_hash, message_id, time_ms, checksum) VALUES (?, ?, ?, ?, ?)"
)
# Another message may have had the key here: the ledger knows of that.
_INSERT_TAKEN_KEY = _INSERT_KEY.replace("INSERT", "INSERT OR IGNORE")
_DELETE_AGED_KEY = "DELETE FROM submission_key WHERE key_hash = ? AND time_ms <= ?"
_DELETE_AGED_KEYS = (
    "DELETE FROM submission_key WHERE time_ms <= ?2 "
    "AND number IN (SELECT number FROM submission_key ORDER BY number LIMIT ?1)"
)
_INSERT_UNREPORTED = "INSERT INTO unreported (message_id) VALUES (?)"
_DELETE_UNREPORTED = "DELETE FROM unreported WHERE message_id = ?"
_ATTEMPTS = "SELECT idx, attempt FROM recipient WHERE message_id = ?"
# One that is being sent has no number here that anybody would name.
_WAITING = "SELECT idx, CASE state WHEN 3 THEN -1 ELSE attempt END FROM recipient WHERE message_id = ?"
_DELETE_RECIPIENT = "DELETE FROM recipient WHERE message_id = ? AND idx = ? AND attempt = ?"
_UPDATE_RECIPIENT = (
    "UPDATE recipient SET state = ?, attempt = ?, due_ms = ?, incarnation = ?, checksum = ?, queue_key = ? "
    "WHERE message_id = ? AND idx = ? AND attempt = ?"
)
_DELETE_INLINE = (
    "DELETE FROM message WHERE id = ?1 AND content IS NOT NULL "
    "AND NOT EXISTS (SELECT 1 FROM recipient WHERE message_id = ?1)"
)
_DELETE_WITH_FILE = (
    "DELETE FROM message WHERE id = ?1 AND content IS NULL "
    "AND NOT EXISTS (SELECT 1 FROM recipient WHERE message_id = ?1)"
)
_INSERT_PACK = "INSERT INTO outbox (first, count, end_bytes, checksum, records) VALUES (?, ?, ?, ?, ?)"
_OLDEST_PACKS = "SELECT first, count, end_bytes FROM outbox ORDER BY first LIMIT ?"
_END_BYTES_OF = "SELECT end_bytes FROM outbox WHERE first <= ? ORDER BY first DESC LIMIT 1"
_TRIM = "DELETE FROM outbox WHERE first < ?"
_UPDATE_STATE = (
    "UPDATE state SET waiting_count = ?, outbox_first = ?, outbox_last = ?, outbox_bytes = ?, acknowledged = ?, "
    "answered = ?"
)
_QUARANTINE_MESSAGE = (
    "INSERT OR REPLACE INTO quarantine (id, reason, time_ms, envelope, content) "
    "SELECT id, ?2, ?3, envelope, content FROM message WHERE id = ?1"
)
_QUARANTINE_RECIPIENTS = (
    "UPDATE quarantine SET recipients = ("
    "SELECT json_group_array(json_array(idx, state, attempt, due_ms, -rank, queue_key)) "
    "FROM recipient WHERE message_id = ?1) WHERE id = ?1"
)
_DELETE_RECIPIENTS = "DELETE FROM recipient WHERE message_id = ?"
_DELETE_MESSAGE = "DELETE FROM message WHERE id = ?"


# The numbers of terminal states are the highest; comparing them is far quicker than hashing an enum's member.
_FIRST_TERMINAL = min(TERMINAL)


@dataclass(frozen=True, slots=True)
class Counters:
    """The row `state`, so that nothing is counted by reading rows."""

    waiting_count: int
    outbox_first: int
    outbox_last: int
    outbox_bytes: int
    acknowledged: int
    answered: int


@dataclass(slots=True, eq=False)
class Operation:
    """A write that waits for its commit; `error` is set when it could not be part of it."""

    future: Any
    error: SpoolError | None = field(default=None, init=False)
    result: int | None = field(default=None, init=False)

    @property
    def size_bytes(self) -> int:
        """Roughly what the operation adds to the transaction."""
        return 64

    @property
    def is_patient(self) -> bool:
        """Whether nobody waits for the commit to go on."""
        return False


@dataclass(slots=True, eq=False)
class Accept(Operation):
    """A message in the form of its row, and its recipients."""

    row: tuple[MessageId, int, int, bytes, bytes | None]
    recipients: Sequence[Recipient]
    key: KeyRow | None = None

    def complete(self, content_checksum: int) -> None:
        """Put in the checksum of a content that was written before the envelope was known."""
        message_id, _, content_bytes, envelope, content = self.row
        checksum = message_checksum_of_parts(message_id, envelope, content_checksum, content_bytes)
        self.row = (message_id, checksum, content_bytes, envelope, content)

    @property
    def has_file(self) -> bool:
        """Whether the content lies in a file."""
        return self.row[4] is None

    @property
    def size_bytes(self) -> int:
        """Envelope, content and recipients."""
        return len(self.row[3]) + len(self.row[4] or b"") + 128 * len(self.recipients)


@dataclass(slots=True, eq=False)
class Take(Accept):
    """A message that another spool gave up, and the record that says that it is here; the result is its number."""

    record: bytes = b""


@dataclass(slots=True, eq=False)
class Give(Operation):
    """A message that goes to another spool: index and attempt of all its recipients, and the records that hold it.

    The result is the number of the last record, 0 when the recipients are not these, or one is being sent.
    """

    message_id: MessageId
    recipients: Sequence[tuple[int, int]]
    records: Sequence[bytes]

    @property
    def size_bytes(self) -> int:
        """The records."""
        return sum(map(len, self.records))


@dataclass(slots=True, eq=False)
class Settle(Operation):
    """A settlement."""

    settlement: Settlement

    @property
    def is_patient(self) -> bool:
        """What has a record tells an outcome; what has none is claimed or moved, and then it is sent."""
        return self.settlement.record is not None


@dataclass(slots=True, eq=False)
class WriteRecord(Operation):
    """A record that belongs to no message."""

    record: bytes

    @property
    def size_bytes(self) -> int:
        """The record."""
        return len(self.record)


@dataclass(slots=True, eq=False)
class Acknowledge(Operation):
    """The mark of what is stored elsewhere."""

    number: int

    @property
    def is_patient(self) -> bool:
        """Until then the records are kept."""
        return True


@dataclass(slots=True, eq=False)
class Quarantine(Operation):
    """Set a message aside that cannot be read."""

    message_id: MessageId
    reason: str
    time_ms: int


@dataclass(slots=True, eq=False)
class ForgetKeys(Operation):
    """Remove submission keys up to `before_ms`, of the oldest `count`; the result is how many went."""

    before_ms: int
    count: int

    @property
    def is_patient(self) -> bool:
        """They are found by nobody any more."""
        return True


class Transaction:
    """One commit's statements. Make a new one for each batch; after an error roll back and forget it."""

    def __init__(
        self, connection: apsw.Connection, counters: Counters, incarnation: int, tail: AcknowledgedTail, now_s: float
    ) -> None:
        self._connection = connection
        self._execute = connection.cursor().execute
        self._incarnation = incarnation
        self._tail = tail
        self._now_s = now_s
        self._before = counters
        self._waiting_count = counters.waiting_count
        self._first = counters.outbox_first
        self._last = counters.outbox_last
        self._bytes = counters.outbox_bytes
        self._acknowledged = counters.acknowledged
        self._answered = counters.answered
        self._records: list[bytes] = []
        self._acknowledges = False
        self.files_to_remove: list[MessageId] = []
        self.quarantined_count = 0

    @property
    def counters(self) -> Counters:
        """The counters as this transaction leaves them; true once it is committed."""
        return Counters(self._waiting_count, self._first, self._last, self._bytes, self._acknowledged, self._answered)

    def together(self, operations: Sequence[Operation], *, vacuum: bool) -> Iterator[None]:
        """Run a batch; raises what apsw raises, and the caller rolls back."""
        self._execute("BEGIN IMMEDIATE")
        accepts = [operation for operation in operations if type(operation) is Accept]
        yield from self._store(accepts)
        others = [operation for operation in operations if type(operation) is not Accept]
        for is_plain, run in groupby(others, _is_plain):
            while part := list(islice(run, _SLICE_ROWS if is_plain else _SLICE_SETTLEMENTS)):
                if is_plain:
                    self._settle_plain(part)
                else:
                    for operation in part:
                        self._apply(operation)
                yield
        yield from self._finish(vacuum=vacuum)

    def singly(self, operations: Sequence[Operation]) -> Iterator[None]:
        """Run a batch so that an operation that cannot be written fails alone. Raises what concerns all of them."""
        self._execute("BEGIN IMMEDIATE")
        for operation in operations:
            before = self.counters
            self._execute("SAVEPOINT operation")
            try:
                self._apply(operation)
            except (*ISOLATED, SpoolError) as error:
                self._execute("ROLLBACK TO operation")
                operation.error = SpoolError(f"the write is impossible: {type(error).__name__}")
                self._waiting_count = before.waiting_count
            self._execute("RELEASE operation")
            yield
        yield from self._finish(vacuum=False)

    def _store(self, accepts: list[Accept]) -> Iterator[None]:
        for part in _slices(accepts):
            rows = [accept.row for accept in part]
            self._connection.executemany(_INSERT_MESSAGE, rows)
            yield
            self._connection.executemany(_INSERT_UNREPORTED, [row[:1] for row in rows])
            yield
        recipients = [row for accept in accepts for row in accept.recipients]
        for start in range(0, len(recipients), _SLICE_ROWS):
            self._connection.executemany(_INSERT_RECIPIENT, recipients[start : start + _SLICE_ROWS])
            yield
        keys = [accept.key for accept in accepts if accept.key is not None]
        for start in range(0, len(keys), _SLICE_ROWS):
            self._store_keys(keys[start : start + _SLICE_ROWS])
            yield
        self._waiting_count += len(recipients)

    def _store_keys(self, keys: Sequence[KeyRow]) -> None:
        """Store keys; for each, two that are too old go, so that there are never many more than 24 hours bring."""
        aged = [(key.key_hash, key.time_ms - KEY_WINDOW_MS) for key in keys]
        self._connection.executemany(_DELETE_AGED_KEY, aged)
        self._forget_keys(2 * len(keys), min(before_ms for _, before_ms in aged))
        self._connection.executemany(_INSERT_KEY, keys)

    def _forget_keys(self, count: int, before_ms: int) -> int:
        self._execute(_DELETE_AGED_KEYS, (count, before_ms))
        return self._connection.changes()

    def _apply(self, operation: Operation) -> None:
        match operation:
            case Settle():
                operation.result = self._settle(operation.settlement)
            case Give():
                operation.result = self._give(operation)
            case Take():
                operation.result = self._take(operation)
            case Accept():
                for _ in self._store([operation]):
                    pass
            case WriteRecord():
                self._records.append(operation.record)
                operation.result = self._last + len(self._records)
            case Acknowledge():
                self._acknowledge(operation)
            case Quarantine():
                self._quarantine(operation)
            case ForgetKeys():
                operation.result = self._forget_keys(operation.count, operation.before_ms)

    # --- settlements ---

    def _settle_plain(self, operations: Sequence[Operation]) -> None:
        """The common case many at a time: one recipient ends, and the record tells of the message for the first time.

        ValueError when an attempt is stale, which nobody can then be told apart: the batch goes the slower way.
        """
        settlements = [operation.settlement for operation in operations if isinstance(operation, Settle)]
        keys = [settlement[:1] for settlement in settlements]
        ends = [(message_id, changes[0].index, changes[0].attempt) for message_id, changes, *_ in settlements]
        if self._changes_of(_DELETE_RECIPIENT, ends) != len(keys):
            raise ValueError("a settlement names a stale attempt")
        if self._changes_of(_DELETE_INLINE, keys) != len(keys):
            for settlement in settlements:
                self._remove(settlement.message_id)
        self._connection.executemany(_DELETE_UNREPORTED, keys)
        for operation in operations:
            operation.result = 1
        self._waiting_count -= len(keys)
        self._records += [settlement.record for settlement in settlements if settlement.record is not None]

    def _changes_of(self, sql: str, rows: Sequence[tuple[object, ...]]) -> int:
        before = self._connection.total_changes()
        self._connection.executemany(sql, rows)
        return self._connection.total_changes() - before

    def _settle(self, settlement: Settlement) -> int:
        message_id, changes, record, reported, whole = settlement
        changed = removed = 0
        if whole and not self._are_present(message_id, changes):
            return 0
        for change in changes:
            if change.state >= _FIRST_TERMINAL:
                self._execute(_DELETE_RECIPIENT, (message_id, change.index, change.attempt))
                removed += self._connection.changes()
            else:
                changed += self._update(message_id, change)
        changed += removed
        if changes and not changed:
            return 0
        gone = removed > 0 and self._remove(message_id)
        if reported or gone:
            self._execute(_DELETE_UNREPORTED, (message_id,))
        self._waiting_count -= removed
        if record is not None:
            self._records.append(record)
        return changed

    # --- hand-over ---

    def _give(self, operation: Give) -> int:
        """Take the message out of the queue and put it into the outbox: from this commit on nobody here sends it."""
        message_id = operation.message_id
        present = fetch(self._connection, _WAITING, (message_id,))
        if sorted(present) != sorted(operation.recipients):
            return 0
        self._execute(_DELETE_RECIPIENTS, (message_id,))
        self._waiting_count -= self._connection.changes()
        self._remove(message_id)
        self._execute(_DELETE_UNREPORTED, (message_id,))
        self._records += operation.records
        return self._last + len(self._records)

    def _take(self, operation: Take) -> int:
        """Put the message into the queue, and the record that says so into the outbox."""
        self._execute(_INSERT_MESSAGE, operation.row)
        self._connection.executemany(_INSERT_RECIPIENT, operation.recipients)
        if operation.key is not None:
            self._execute(_INSERT_TAKEN_KEY, operation.key)
        self._waiting_count += len(operation.recipients)
        self._records.append(operation.record)
        return self._last + len(self._records)

    def _are_present(self, message_id: MessageId, changes: Sequence[RecipientChange]) -> bool:
        present: dict[int, int] = dict(fetch(self._connection, _ATTEMPTS, (message_id,)))
        return all(present.get(change.index) == change.attempt for change in changes)

    def _update(self, message_id: MessageId, change: RecipientChange) -> int:
        index, attempt, state, new_attempt, due_ms, queue_key = change
        checksum = recipient_checksum(message_id, index, state, new_attempt, due_ms, queue_key)
        self._execute(
            _UPDATE_RECIPIENT,
            (
                int(state),
                new_attempt,
                due_ms,
                self._incarnation,
                checksum,
                queue_key,
                message_id,
                index,
                attempt,
            ),
        )
        return self._connection.changes()

    def _remove(self, message_id: MessageId) -> bool:
        """Delete the message if no recipient is left; say whether it went."""
        self._execute(_DELETE_INLINE, (message_id,))
        if self._connection.changes():
            return True
        self._execute(_DELETE_WITH_FILE, (message_id,))
        if self._connection.changes():
            self.files_to_remove.append(message_id)
            return True
        return False

    def _quarantine(self, operation: Quarantine) -> None:
        key = (operation.message_id,)
        self._execute(_QUARANTINE_MESSAGE, (operation.message_id, operation.reason, operation.time_ms))
        self.quarantined_count += self._connection.changes()
        self._execute(_QUARANTINE_RECIPIENTS, key)
        self._execute(_DELETE_RECIPIENTS, key)
        self._waiting_count -= self._connection.changes()
        self._execute(_DELETE_MESSAGE, key)
        self._execute(_DELETE_UNREPORTED, key)

    # --- records ---

    def _acknowledge(self, operation: Acknowledge) -> None:
        last = self._last + len(self._records)
        if operation.number > last:
            operation.error = SpoolError(f"record {operation.number} is acknowledged, and {last} is the last one")
            return
        self._acknowledged = max(operation.number, self._first - 1)
        self._acknowledges = True
        self._answered = self._incarnation

    def _finish(self, *, vacuum: bool) -> Iterator[None]:
        yield from self._pack()
        if self._acknowledges:
            self._tail.note(self._acknowledged, self._now_s)
            self._trim()
        counters = self.counters
        if counters != self._before:
            self._execute(
                _UPDATE_STATE,
                (self._waiting_count, self._first, self._last, self._bytes, self._acknowledged, self._answered),
            )
        if vacuum:
            self._execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()

    def _pack(self) -> Iterator[None]:
        pack: list[bytes] = []
        pack_bytes = 0
        for record in self._records:
            if pack and pack_bytes + len(record) > _PACK_BYTES:
                self._write_pack(pack)
                yield
                pack, pack_bytes = [], 0
            pack.append(record)
            pack_bytes += len(record)
        if pack:
            self._write_pack(pack)

    def _write_pack(self, pack: list[bytes]) -> None:
        packed = pack_records(pack)
        self._bytes += len(packed)
        self._execute(_INSERT_PACK, (self._last + 1, len(pack), self._bytes, crc32(packed), packed))
        self._last += len(pack)

    def _trim(self) -> None:
        """Forget packs from the front that are acknowledged and outside the tail, at most so many in one commit."""
        mark = fetch(self._connection, _END_BYTES_OF, (self._acknowledged,))
        if not mark:
            return
        expired = self._tail.expired(self._now_s)
        first = self._first
        for pack_first, count, end_bytes in fetch(self._connection, _OLDEST_PACKS, (_TRIM_PACKS,)):
            last = pack_first + count - 1
            # `expired` may lie above a mark that was taken back.
            if last > self._acknowledged or (last > expired and mark[0][0] - end_bytes < TAIL_BYTES):
                break
            first = last + 1
        if first > self._first:
            self._execute(_TRIM, (first,))
            self._first = first


def _slices(accepts: Sequence[Accept]) -> Iterator[list[Accept]]:
    """Cut where rows or bytes get too many for a turn."""
    part: list[Accept] = []
    size_bytes = 0
    for accept in accepts:
        part.append(accept)
        size_bytes += accept.size_bytes
        if len(part) == _SLICE_ROWS or size_bytes > _SLICE_BYTES:
            yield part
            part, size_bytes = [], 0
    if part:
        yield part


def _is_plain(operation: Operation) -> bool:
    """Whether a settlement ends one recipient and marks its message as recorded."""
    if not isinstance(operation, Settle):
        return False
    _, changes, record, reported, _ = operation.settlement
    return reported and record is not None and len(changes) == 1 and changes[0].state >= _FIRST_TERMINAL
