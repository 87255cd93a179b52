"""A spool in memory: the semantics of the durable one without its disk, for tests and for attributing cost.

Inputs and outputs are those of `ports.Spool`. Writes are applied together on the loop's next turn, as one commit; a
write that fails changes nothing and leaves the others alone. Nothing outlives the process, so a new spool is always the
first incarnation and never finds an interrupted attempt. `capacity_bytes` bounds content and records; above it
accepting fails with SpoolFullError, settling goes on.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import islice
from typing import ClassVar, TypeVar

from dataplane.adapters.spool_tail import TAIL_BYTES, AcknowledgedTail
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.idempotency import KEY_WINDOW_MS, Submitted
from dataplane.core.ids import MessageId, message_id_time_ms
from dataplane.core.queue import TERMINAL, State
from dataplane.ports import (
    Clock,
    Cursor,
    Due,
    KeyHead,
    Openings,
    QueueDepth,
    RecipientChange,
    Settlement,
    SpoolError,
    SpoolFullError,
    SpoolIdentity,
    SpoolStats,
    StoredMessage,
    WalkedRow,
)

Result = TypeVar("Result")

_SENDABLE = frozenset({State.SCHEDULED, State.QUEUED, State.DEFERRED})
_Place = tuple[int, int, MessageId, int]


@dataclass(slots=True)
class _Message:
    envelope: Envelope
    content: bytes
    recipients: dict[int, RecipientRow]
    reported: bool = False


class RamSpool:
    """`ports.Spool` in dictionaries. To be used from one loop."""

    retains: ClassVar[bool] = True
    durable: ClassVar[bool] = False

    def __init__(self, clock: Clock, *, node: str = "node-1", capacity_bytes: int = 1 << 30) -> None:
        self._clock = clock
        self._identity = SpoolIdentity(str(uuid.uuid4()), node, 1)
        self._openings = Openings(secrets.token_bytes(16))
        self._capacity_bytes = capacity_bytes
        self._bytes = 0
        self._messages: dict[MessageId, _Message] = {}
        self._places: dict[str, list[_Place]] = {}
        self._records: deque[bytes] = deque()
        self._first = 1
        self._acknowledged = 0
        self._tail = AcknowledgedTail(0, clock.monotonic())
        self._keys: dict[bytes, tuple[int, Submitted]] = {}
        self._pending: list[Callable[[], None]] = []
        self._commits = 0
        self._closed = False

    @property
    def identity(self) -> SpoolIdentity:
        """A random UUID, always the first incarnation."""
        return self._identity

    @property
    def openings(self) -> Openings:
        """The first one."""
        return self._openings

    def has_room(self, size_bytes: int) -> bool:
        """Whether a message of this size would be taken now."""
        return not self._closed and self._bytes + size_bytes <= self._capacity_bytes

    @property
    def strained(self) -> bool:
        """Never: there is no disk to wait for."""
        return False

    # --- writes ---

    def receive(self, message_id: MessageId) -> RamIncoming:
        """Begin a content that arrives in pieces."""
        return RamIncoming(self, message_id)

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Store a message. SpoolFullError above the capacity, SpoolError for an id that is there already."""
        return self._later(lambda: self._accept(envelope, content, recipients))

    def settle(self, settlement: Settlement) -> asyncio.Future[int]:
        """Apply changes and write the record; nothing at all when every change names a stale attempt."""
        return self._later(lambda: self._settle(settlement))

    def write_record(self, record: bytes) -> asyncio.Future[int]:
        """Write a record that belongs to no message."""
        return self._later(lambda: self._write(record))

    def acknowledge(self, number: int) -> asyncio.Future[None]:
        """Move the mark and trim the tail. SpoolError for a number that was never given."""
        return self._later(lambda: self._acknowledge(number))

    def _later(self, work: Callable[[], Result]) -> asyncio.Future[Result]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        if self._closed:
            future.set_exception(SpoolError("the spool is closed"))
            return future

        def run() -> None:
            try:
                result = work()
            except SpoolError as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self._pending.append(run)
        if len(self._pending) == 1:
            loop.call_soon(self._commit)
        return future

    def _commit(self) -> None:
        pending, self._pending = self._pending, []
        self._commits += bool(pending)
        for run in pending:
            run()

    def _accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> None:
        if not recipients or any(row.state in TERMINAL for row in recipients):
            raise SpoolError("a message needs recipients, and none of them terminal")
        if envelope.message_id in self._messages:
            raise SpoolError("a message of this id is stored already")
        if not self.has_room(len(content)):
            raise SpoolFullError("the spool's capacity is used up")
        key = envelope.submission_key
        if key is not None and self._submitted(key.key_hash, envelope.accepted_ms) is not None:
            raise SpoolError("a message has this submission key already")
        rows = {row.index: row for row in recipients}
        if len(rows) < len(recipients):
            raise SpoolError("two recipients share an index")
        if key is not None:
            self._forget_keys(envelope.accepted_ms)
            self._keys.pop(key.key_hash, None)
            self._keys[key.key_hash] = (envelope.accepted_ms, Submitted(key.content_hash, envelope.message_id))
        self._messages[envelope.message_id] = _Message(envelope, content, rows)
        self._bytes += len(content)
        for row in recipients:
            self._enqueue(envelope.message_id, row)

    def _submitted(self, key_hash: bytes, now_ms: int) -> Submitted | None:
        time_ms, submitted = self._keys.get(key_hash, (0, None))
        return submitted if time_ms > now_ms - KEY_WINDOW_MS else None

    def _forget_keys(self, now_ms: int) -> None:
        aged = [key for key, (time_ms, _) in islice(self._keys.items(), 2) if time_ms <= now_ms - KEY_WINDOW_MS]
        for key in aged:
            del self._keys[key]

    def _settle(self, settlement: Settlement) -> int:
        message = self._messages.get(settlement.message_id)
        changed = 0
        if settlement.whole and not all(_is_present(message, change) for change in settlement.changes):
            return 0
        for change in settlement.changes:
            row = message.recipients.get(change.index) if message else None
            if message and row and row.attempt == change.attempt:
                self._change(settlement.message_id, message, row, change)
                changed += 1
        if settlement.changes and not changed:
            return 0
        if message and settlement.reported:
            message.reported = True
        if message and not message.recipients:
            del self._messages[settlement.message_id]
            self._bytes -= len(message.content)
        if settlement.record is not None:
            self._write(settlement.record)
        return changed

    def _change(self, message_id: MessageId, message: _Message, row: RecipientRow, change: RecipientChange) -> None:
        self._dequeue(message_id, row)
        if change.state in TERMINAL:
            del message.recipients[row.index]
            return
        moved = row._replace(
            state=change.state, attempt=change.new_attempt, due_ms=change.due_ms, queue_key=change.queue_key
        )
        message.recipients[row.index] = moved
        self._enqueue(message_id, moved)

    def _enqueue(self, message_id: MessageId, row: RecipientRow) -> None:
        if row.state in _SENDABLE:
            insort(self._places.setdefault(row.queue_key, []), _place(message_id, row))

    def _dequeue(self, message_id: MessageId, row: RecipientRow) -> None:
        if row.state in _SENDABLE:
            places = self._places[row.queue_key]
            del places[bisect_left(places, _place(message_id, row))]
            if not places:
                del self._places[row.queue_key]

    def _write(self, record: bytes) -> int:
        self._records.append(record)
        self._bytes += len(record)
        return self._last

    def _acknowledge(self, number: int) -> None:
        if number > self._last:
            raise SpoolError(f"record {number} is acknowledged, and {self._last} is the last one")
        self._acknowledged = max(number, self._first - 1)
        self._tail.note(self._acknowledged, self._clock.monotonic())
        self._trim()

    def _trim(self) -> None:
        expired = self._tail.expired(self._clock.monotonic())
        count = self._acknowledged - self._first + 1
        tail_bytes = sum(len(record) for record in islice(self._records, count))
        while self._first <= self._acknowledged and (self._first <= expired or tail_bytes > TAIL_BYTES):
            record = self._records.popleft()
            tail_bytes -= len(record)
            self._bytes -= len(record)
            self._first += 1

    @property
    def _last(self) -> int:
        return self._first + len(self._records) - 1

    # --- reads ---

    async def load(self, message_id: MessageId) -> StoredMessage | None:
        """Read a message back, None when it is gone."""
        self._check_open()
        message = self._messages.get(message_id)
        if message is None:
            return None
        rows = tuple(message.recipients[index] for index in sorted(message.recipients))
        return StoredMessage(message.envelope, message.content, rows, message.reported)

    async def describe(self, message_id: MessageId) -> StoredMessage | None:
        """Read a message back without its content, None when it is gone."""
        stored = await self.load(message_id)
        return None if stored is None else stored._replace(content=b"")

    async def walk(self, after: tuple[MessageId, int], before: MessageId, limit: int) -> list[WalkedRow]:
        """The next recipients by message and index."""
        self._check_open()
        places = (
            (message_id, index)
            for message_id, message in self._messages.items()
            if after[0] <= message_id < before
            for index in message.recipients
        )
        found = nsmallest(limit, (place for place in places if place > after))
        rows = [(message_id, self._messages[message_id].recipients[index]) for message_id, index in found]
        return [WalkedRow(message_id, row.index, row.state, row.queue_key) for message_id, row in rows]

    def submitted(self, key_hash: bytes) -> Submitted | None:
        """What was stored under a submission key in the last 24 hours."""
        self._check_open()
        return self._submitted(key_hash, self._clock.wall_ms())

    async def keys(self) -> list[KeyHead]:
        """Every queue key with sendable recipients, sorted."""
        self._check_open()
        return [KeyHead(key, places[0][0]) for key, places in sorted(self._places.items())]

    async def heads(self, queue_key: str, after: Cursor | None, limit: int) -> list[Due]:
        """The next sendable recipients of a key."""
        self._check_open()
        places = self._places.get(queue_key, [])
        start = 0
        if after:
            start = bisect_right(places, (after.due_ms, -after.priority, after.message_id, after.index))
        return [self._due(place) for place in places[start : start + limit]]

    def _due(self, place: _Place) -> Due:
        due_ms, rank, message_id, index = place
        row = self._messages[message_id].recipients[index]
        return Due(message_id, index, row.attempt, due_ms, -rank, row.state)

    async def unreported(self, limit: int) -> list[MessageId]:
        """Messages whose envelope is in no record yet, oldest first."""
        self._check_open()
        found = (message_id for message_id, message in self._messages.items() if not message.reported)
        return sorted(found)[:limit]

    async def interrupted(self) -> list[MessageId]:
        """Nothing: no attempt outlives the memory it was noted in."""
        self._check_open()
        return []

    async def records(self, after: int, max_records: int, max_bytes: int) -> tuple[int, list[bytes]]:
        """Records that follow `after`, at least one if there is any."""
        self._check_open()
        first = max(after + 1, self._first)
        found: list[bytes] = []
        size_bytes = 0
        start = first - self._first
        for record in islice(self._records, start, start + max_records):
            size_bytes += len(record)
            if found and size_bytes > max_bytes:
                break
            found.append(record)
        return first, found

    async def depth(self) -> QueueDepth:
        """Recipients by state now."""
        self._check_open()
        states = Counter(row.state for message in self._messages.values() for row in message.recipients.values())
        return QueueDepth(*(states[state] for state in State if state not in TERMINAL))

    async def stats(self) -> SpoolStats:
        """Counters now; `database_bytes` is what content and records hold."""
        self._check_open()
        oldest = min(self._messages, default=None)
        return SpoolStats(
            waiting_count=sum(len(message.recipients) for message in self._messages.values()),
            oldest_accepted_ms=message_id_time_ms(oldest) if oldest else 0,
            outbox_first=self._first,
            outbox_last=self._last,
            acknowledged=self._acknowledged,
            database_bytes=self._bytes,
            wal_bytes=0,
            commits=self._commits,
        )

    async def close(self) -> None:
        """Apply what gathered; everything is forgotten with the object."""
        self._commit()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise SpoolError("the spool is closed")


class RamIncoming:
    """`ports.Incoming` in a list."""

    def __init__(self, spool: RamSpool, message_id: MessageId) -> None:
        self._spool = spool
        self._message_id = message_id
        self._pieces: list[bytes] = []
        self._error: SpoolError | None = None
        self.size_bytes = 0

    def write(self, *pieces: bytes) -> asyncio.Future[None]:
        """Keep pieces. SpoolFullError above the capacity."""
        size_bytes = sum(map(len, pieces))
        if self._error is None and not self._spool.has_room(self.size_bytes + size_bytes):
            self.discard()
            self._error = SpoolFullError("the spool's capacity is used up")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._error is not None:
            future.set_exception(self._error)
            return future
        self._pieces += pieces
        self.size_bytes += size_bytes
        future.set_result(None)
        return future

    def accept(self, envelope: Envelope, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Store the message with the content that was written."""
        error, content = self._error, b"".join(self._pieces)
        self.discard()
        if error is None and envelope.message_id == self._message_id:
            return self._spool.accept(envelope, content, recipients)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_exception(error or SpoolError("the content was begun for another message"))
        return future

    def discard(self) -> None:
        """Forget the pieces."""
        self._pieces.clear()
        self._error = self._error or SpoolError("the content was ended")


def _is_present(message: _Message | None, change: RecipientChange) -> bool:
    row = message.recipients.get(change.index) if message else None
    return row is not None and row.attempt == change.attempt


def _place(message_id: MessageId, row: RecipientRow) -> _Place:
    """Where a recipient stands in its key: the order of `ports.Cursor`."""
    return row.due_ms, -row.priority, message_id, row.index
