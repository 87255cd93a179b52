"""The replicated queue as nodes use it: who may, how much at once, and when mail of lost nodes is given to others.

Contract. Everything passes to the store but this: what an ended lease held is given away only after this process has
had answers of PostgreSQL for ADOPT_AFTER_S without a break, which is an error or SILENT_S in which nobody was answered
(nodes ask more often; a process that stood still does not notice otherwise). When control plane or database come back,
all leases have ended, and nodes that live and know what became of their mail get that time to say so. LeaseLostError,
SpoolOwnershipError, BadQueueRequestError and UnavailableError pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from controlplane.domain.errors import UnavailableError
from controlplane.ports_queue import (
    BadQueueRequestError,
    Claimed,
    ClaimWish,
    ContentPart,
    Lease,
    QueuedMessage,
    QueueStore,
    Repeated,
)

ADOPT_AFTER_S = 8.0
SILENT_S = 6.0
MAX_MESSAGES = 1_000
MAX_BYTES = 8 * 1024 * 1024
MAX_CHUNK_BYTES = 1024 * 1024


class QueueService:
    """See the module. `monotonic` gives seconds that only grow."""

    def __init__(self, store: QueueStore, clock: Callable[[], datetime], monotonic: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._monotonic = monotonic
        self._answered_since_s = self._answered_s = float("-inf")

    async def renew(self, node_id: str, spool: str, epoch: int) -> Lease:
        """Renew or begin a spool's lease."""
        with self._watched():
            return await self._store.renew(node_id, spool, epoch)

    async def store_content(self, message_id: bytes, chunk: int, data: bytes) -> None:
        """Put a piece of a content."""
        if len(message_id) != 16 or chunk < 0 or len(data) > MAX_CHUNK_BYTES:
            raise BadQueueRequestError("no piece of a content")
        with self._watched():
            await self._store.store_content(message_id, chunk, data)

    async def store(
        self, node_id: str, pool: str, spool: str, epoch: int, messages: Sequence[QueuedMessage]
    ) -> list[Repeated]:
        """Store messages, all or none but those whose key another message has: they are returned."""
        if not 0 < len(messages) <= MAX_MESSAGES:
            raise BadQueueRequestError(f"1 to {MAX_MESSAGES} messages")
        with self._watched():
            return await self._store.store(node_id, pool, spool, epoch, messages, self._clock())

    async def claim(self, node_id: str, pool: str, wish: ClaimWish) -> list[Claimed]:
        """Claim what is due."""
        if not 0 < wish.max_messages <= MAX_MESSAGES or not 0 <= wish.max_bytes <= MAX_BYTES:
            raise BadQueueRequestError(f"1 to {MAX_MESSAGES} messages of at most {MAX_BYTES} bytes")
        now_s = self._monotonic()
        adopt = now_s - self._answered_s <= SILENT_S and now_s - self._answered_since_s >= ADOPT_AFTER_S
        with self._watched():
            return await self._store.claim(node_id, pool, wish, None, adopt=adopt)

    async def fetch_content(self, node_id: str, spool: str, epoch: int, message_id: bytes, chunk: int) -> ContentPart:
        """Read a content that the lease holds."""
        if len(message_id) != 16:
            raise BadQueueRequestError("no message id")
        with self._watched():
            return await self._store.fetch_content(node_id, spool, epoch, message_id, chunk)

    async def confirm(
        self, node_id: str, spool: str, epoch: int, claim_id: str, message_ids: Sequence[bytes]
    ) -> list[bytes]:
        """Begin to send what was claimed."""
        if any(len(message_id) != 16 for message_id in message_ids):
            raise BadQueueRequestError("no message id")
        with self._watched():
            return await self._store.confirm(node_id, spool, epoch, claim_id, message_ids)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except UnavailableError:
            self._answered_s = float("-inf")
            raise
        now_s = self._monotonic()
        if now_s - self._answered_s > SILENT_S:
            self._answered_since_s = now_s
        self._answered_s = now_s
