"""A spool that keeps nothing: it answers as fast as the loop turns, so that a benchmark shows what the real one costs.

Inputs and outputs are those of `ports.Spool`. Writes succeed on the loop's next turn; records are counted, never kept;
reads find nothing. It never fails, except after `close`. Never for mail that matters.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.idempotency import Submitted
from dataplane.core.ids import MessageId
from dataplane.ports import (
    Cursor,
    Due,
    KeyHead,
    Openings,
    QueueDepth,
    Settlement,
    SpoolError,
    SpoolIdentity,
    SpoolStats,
    StoredMessage,
    WalkedRow,
)

Result = TypeVar("Result")


class NullSpool:
    """`ports.Spool` without a memory: `retains` says so to whoever would read back."""

    retains: ClassVar[bool] = False
    durable: ClassVar[bool] = False

    def __init__(self, *, node: str = "node-1") -> None:
        self._identity = SpoolIdentity(str(uuid.uuid4()), node, 1)
        self._openings = Openings(secrets.token_bytes(16))
        self._last = 0
        self._acknowledged = 0
        self._writes = 0
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
        """Nothing is kept, so there is always room until the end."""
        return not self._closed

    @property
    def strained(self) -> bool:
        """Never."""
        return False

    def receive(self, message_id: MessageId) -> NullIncoming:
        """Begin a content that nobody keeps."""
        return NullIncoming(self)

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Forget the message."""
        return self._answer(None)

    def settle(self, settlement: Settlement) -> asyncio.Future[int]:
        """Say that every recipient was changed."""
        self._last += settlement.record is not None and not self._closed
        return self._answer(len(settlement.changes))

    def write_record(self, record: bytes) -> asyncio.Future[int]:
        """Number the record and forget it."""
        self._last += not self._closed
        return self._answer(self._last)

    def acknowledge(self, number: int) -> asyncio.Future[None]:
        """Move the mark. SpoolError for a number that was never given."""
        if number > self._last:
            return self._answer(None, SpoolError(f"record {number} is acknowledged, {self._last} is the last"))
        self._acknowledged = number
        return self._answer(None)

    def _answer(self, result: Result, error: SpoolError | None = None) -> asyncio.Future[Result]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._writes += 1
        if self._closed:
            error = SpoolError("the spool is closed")
        loop.call_soon(_resolve, future, result, error)
        return future

    def submitted(self, key_hash: bytes) -> Submitted | None:
        """None: it is gone."""
        self._check_open()
        return None

    async def load(self, message_id: MessageId) -> StoredMessage | None:
        """None: it is gone."""
        self._check_open()
        return None

    async def describe(self, message_id: MessageId) -> StoredMessage | None:
        """None: it is gone."""
        return await self.load(message_id)

    async def walk(self, after: tuple[MessageId, int], before: MessageId, limit: int) -> list[WalkedRow]:
        """No recipient waits."""
        self._check_open()
        return []

    async def keys(self) -> list[KeyHead]:
        """No key waits."""
        self._check_open()
        return []

    async def heads(self, queue_key: str, after: Cursor | None, limit: int) -> list[Due]:
        """No recipient waits."""
        self._check_open()
        return []

    async def unreported(self, limit: int) -> list[MessageId]:
        """No message is kept."""
        self._check_open()
        return []

    async def interrupted(self) -> list[MessageId]:
        """No message is kept."""
        self._check_open()
        return []

    async def records(self, after: int, max_records: int, max_bytes: int) -> tuple[int, list[bytes]]:
        """No record is kept."""
        self._check_open()
        return after + 1, []

    async def depth(self) -> QueueDepth:
        """No recipient waits."""
        self._check_open()
        return QueueDepth()

    async def stats(self) -> SpoolStats:
        """Counts of what went by."""
        self._check_open()
        return SpoolStats(0, 0, self._last + 1, self._last, self._acknowledged, 0, 0, self._writes)

    async def close(self) -> None:
        """Refuse from now on."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise SpoolError("the spool is closed")


class NullIncoming:
    """`ports.Incoming` that counts octets."""

    def __init__(self, spool: NullSpool) -> None:
        self._spool = spool
        self._ended = False
        self.size_bytes = 0

    def write(self, *pieces: bytes) -> asyncio.Future[None]:
        """Count pieces."""
        self.size_bytes += sum(map(len, pieces))
        return self._answer()

    def accept(self, envelope: Envelope, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Forget the message."""
        answer = self._answer() if self._ended else self._spool.accept(envelope, b"", recipients)
        self._ended = True
        return answer

    def discard(self) -> None:
        """Take no more."""
        self._ended = True

    def _answer(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._ended or not self._spool.has_room(0):
            future.set_exception(SpoolError("the content was ended"))
        else:
            future.set_result(None)
        return future


def _resolve(future: asyncio.Future[Result], result: Result, error: SpoolError | None) -> None:
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(result)
