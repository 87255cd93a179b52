"""A content of REPLICATED mail that arrives in pieces: they go to PostgreSQL as they come, their message at last."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.ids import MessageId
from dataplane.ports import SpoolError
from postroad.node.v1 import queue_service_pb2 as pb

CHUNK_BYTES = 256 * 1024


class Queue(Protocol):
    """What a content needs of the replicated queue."""

    def put(
        self, envelope: Envelope, content: bytes, rows: Sequence[RecipientRow], message: pb.QueuedMessage
    ) -> asyncio.Future[None]:
        """Store a message whose content was put before; `content` is what the spool takes."""
        ...

    async def put_chunk(self, message_id: MessageId, chunk: int, data: bytes) -> None:
        """Put a piece of a content."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something to its end, whoever waits for it."""
        ...


class IncomingContent:
    """`ports.Incoming`: pieces go to PostgreSQL as they come, one after the other."""

    def __init__(self, queue: Queue, message_id: MessageId) -> None:
        self._queue = queue
        self._message_id = message_id
        self._buffer = bytearray()
        self._size_bytes = 0
        self._chunks = 0
        self._last: asyncio.Task[None] | None = None
        self._discarded = False

    @property
    def size_bytes(self) -> int:
        """As the port says."""
        return self._size_bytes

    def write(self, *pieces: bytes) -> asyncio.Future[None]:
        """As the port says."""
        for piece in pieces:
            self._buffer += piece
            self._size_bytes += len(piece)
        while len(self._buffer) >= CHUNK_BYTES:
            self._put(bytes(self._buffer[:CHUNK_BYTES]))
            del self._buffer[:CHUNK_BYTES]
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._last is None:
            written.set_result(None)
        else:
            self._last.add_done_callback(partial(_follow, written))
        return written

    def accept(self, envelope: Envelope, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """As the port says."""
        return self.store(envelope, b"", recipients)

    def store(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Store the message; `content` is what the spool takes, where delivery holds it."""
        if self._buffer or not self._chunks:
            self._put(bytes(self._buffer))
            self._buffer.clear()
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def store() -> None:
            try:
                if self._last is not None:
                    await self._last
                message = pb.QueuedMessage(chunks=self._chunks)
                await self._queue.put(envelope, content, recipients, message)
            except SpoolError as error:
                resolve(stored, error)
            else:
                resolve(stored, None)

        self._queue.spawn(store())
        return stored

    def discard(self) -> None:
        """As the port says; what PostgreSQL has of it is swept there."""
        self._discarded = True
        self._buffer.clear()

    def _put(self, data: bytes) -> None:
        chunk, former = self._chunks, self._last
        self._chunks += 1

        async def put() -> None:
            if former is not None:
                await former
            if self._discarded:
                raise SpoolError("the content was given up")
            await self._queue.put_chunk(self._message_id, chunk, data)

        self._last = self._queue.spawn(put())
        self._last.add_done_callback(look_at)


def look_at(future: asyncio.Future[Any]) -> None:
    """Nobody else looks at how it ended."""
    if not future.cancelled():
        future.exception()


def _follow(follower: asyncio.Future[None], future: asyncio.Future[None]) -> None:
    resolve(follower, SpoolError("given up") if future.cancelled() else future.exception())


def resolve(future: asyncio.Future[None], error: BaseException | None) -> None:
    """End what somebody may wait for; a client that left looks at nothing."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()
