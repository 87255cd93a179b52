"""What the replicated queue and mail on its way between nodes need of PostgreSQL, as values and ports.

Contract. As in `ports_fleet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, Protocol
from uuid import UUID

# --- replicated queue ----------------------------------------------------------------------------------------------


class SpoolOwnershipError(Exception):
    """The spool is another node's."""


class LeaseLostError(Exception):
    """The lease has ended, or what was asked for is not under it; nothing was changed."""


class BadQueueRequestError(Exception):
    """What was asked can never be done."""


class Lease(NamedTuple):
    """A lease that is good for so long from now on."""

    epoch: int
    duration_s: int


class QueuedMessage(NamedTuple):
    """A message as it enters the queue; `content` None where `chunks` of it were put before.

    `next_hops` are the providers that its recipients wait for, in their order; empty where nobody can tell.
    `account_uid` is whose it is, empty for the account that has the name.
    """

    record: bytes
    envelope: bytes
    content: bytes | None
    chunks: int
    sending: bool
    next_hops: Sequence[str] = ()
    account_uid: str = ""

    def next_hop(self, index: int) -> str:
        """What a recipient waits for, empty where nobody can tell."""
        return self.next_hops[index] if index < len(self.next_hops) else ""


class Repeated(NamedTuple):
    """A message that was not stored: `first_id` has its key, and is the same submission or not."""

    message_id: bytes
    first_id: bytes
    is_same: bool


class ClaimWish(NamedTuple):
    """Who claims how much; see postroad.node.v1.ClaimMessagesRequest. `left_out` are ids of accounts."""

    spool: str
    epoch: int
    claim_id: str
    max_messages: int
    max_bytes: int
    left_out: tuple[str, ...] = ()


class ClaimedRecipient(NamedTuple):
    """A recipient that is due, and the attempt that may begin; `provider` is what a command bound it to."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a row
    attempt: int
    due_ms: int
    provider: str = ""


class Claimed(NamedTuple):
    """A claimed message; `content` None when it must be fetched."""

    message_id: bytes
    envelope: bytes
    recipients: tuple[ClaimedRecipient, ...]
    content: bytes | None


class ContentPart(NamedTuple):
    """Chunks one after the other; `next_chunk` is the first that is missing, 0 for none."""

    data: bytes
    next_chunk: int


class QueueStore(Protocol):
    """Mail that PostgreSQL owns. LeaseLostError where a lease is named that has ended."""

    async def renew(self, node_id: str, spool: str, epoch: int) -> Lease:
        """Renew the lease, or begin one where `epoch` is 0 or has ended; SpoolOwnershipError for another's spool."""
        ...

    async def store_content(self, message_id: bytes, chunk: int, data: bytes) -> None:
        """Put a piece of a content whose message comes later."""
        ...

    async def store(
        self, node_id: str, pool: str, spool: str, epoch: int, messages: Sequence[QueuedMessage], now: datetime
    ) -> list[Repeated]:
        """Store messages, all or none, in queue and ledger; BadQueueRequestError for what can never be stored.

        Returned and not stored are those whose Idempotency-Key another message has.
        """
        ...

    async def claim(
        self, node_id: str, pool: str, wish: ClaimWish, now: datetime | None, *, adopt: bool
    ) -> list[Claimed]:
        """Claim what is due, after claims that were not confirmed and, with `adopt`, ended leases gave theirs back.

        `now` takes the place of the database's clock.
        """
        ...

    async def fetch_content(self, node_id: str, spool: str, epoch: int, message_id: bytes, chunk: int) -> ContentPart:
        """Read a content that the lease holds, from a chunk on."""
        ...

    async def confirm(
        self, node_id: str, spool: str, epoch: int, claim_id: str, message_ids: Sequence[bytes]
    ) -> list[bytes]:
        """Begin to send what was claimed; returns which of it is still the lease's."""
        ...


# --- hand-over -----------------------------------------------------------------------------------------------------

NO_SPOOL = UUID(int=0)
"""Stands in `messages` and `commands` for the spool of mail that nobody has."""


class Handover(NamedTuple):
    """A message on its way to a spool; `what` is a serialised postroad.node.v1.HandedOver."""

    message_id: bytes
    account: str
    what: bytes
    content_bytes: int


class HandoverCounts(NamedTuple):
    """Messages that nobody has, and how long the first of them has been waiting."""

    message_count: int
    oldest_age_s: float


class HandoverStore(Protocol):
    """Mail that one spool gave up and no other one has yet."""

    async def invited(self, spools: Sequence[str]) -> list[str]:
        """Which of these spools may take something."""
        ...

    async def take(self, node_id: str, spool: str, after_record: int) -> list[Handover]:
        """What is the spool's from now on, or was before and is not in its records up to `after_record`.

        Nothing for a spool of another node, a refused one, and one of which that record is not stored.
        """
        ...

    async def piece(self, message_id: bytes, piece: int) -> bytes | None:
        """A piece of the content; None when there is none, or no more."""
        ...

    async def end_drains(self, now: datetime) -> list[str]:
        """End the drains of nodes on which nothing waits, and all of whose mail has a new owner; returns whose."""
        ...

    async def sweep(self, now: datetime) -> HandoverCounts:
        """Remove pieces of contents that nobody waits for, and count what is between two spools."""
        ...
