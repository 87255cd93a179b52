"""What the data plane needs of the outside: interfaces that adapters fill and contract suites hold.

Every method that returns a Future schedules its work at once: giving up the wait does not undo the work, so that a
client that leaves never cancels a commit.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import asyncio

    from dataplane.core.config import Denials, NodeSettings, SealedValue, SmtpProvider, Target
    from dataplane.core.envelope import Envelope, RecipientRow
    from dataplane.core.idempotency import Submitted
    from dataplane.core.ids import MessageId
    from dataplane.core.ledger import LedgerRecord
    from dataplane.core.policy import CompiledAccount
    from dataplane.core.queue import State


# --- spool


class SpoolError(Exception):
    """The spool could not do it; the submitter is answered 451."""


class SpoolFullError(SpoolError):
    """No room: disk or WAL above its cap. The submitter is answered 452 4.3.1."""


class RepeatedSubmissionError(SpoolError):
    """It was not stored: `message_id` has its Idempotency-Key, and is the same submission or not."""

    def __init__(self, message_id: bytes, *, is_same: bool) -> None:
        super().__init__("another message has its key")
        self.message_id = message_id
        self.is_same = is_same


class SpoolFailedError(SpoolError):
    """A commit or checkpoint failed: the spool refuses everything from now on, the process must end; never retried."""


@dataclass(frozen=True, slots=True)
class SpoolIdentity:
    """Which spool this is: its UUID, the node's name and the incarnation, which grows by one each time it is opened."""

    spool: str
    node: str
    incarnation: int


class FormerOpening(NamedTuple):
    """An opening of a spool that is over: its id, and the last record written before the next one."""

    id: bytes
    last_record: int


class Openings(NamedTuple):
    """Id of the present opening of a spool, drawn at random, and those of before that somebody may ask for: a copy of
    the disk knows none that came after it.
    """

    present: bytes
    former: tuple[FormerOpening, ...] = ()


class SpoolLosses(NamedTuple):
    """What a spool lost when damaged files were replaced: ids of messages (1,000 at most), how many messages and
    records, and how many stretches could not be read, of which nobody can name the losses.
    """

    messages: tuple[str, ...] = ()
    message_count: int = 0
    record_count: int = 0
    damaged_places: int = 0


class Due(NamedTuple):
    """A waiting recipient at the head of a queue key."""

    message_id: MessageId
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a row
    attempt: int
    due_ms: int
    priority: int
    state: State


class Cursor(NamedTuple):
    """Where a read of a queue key goes on: after this row, by due_ms, priority descending, message id, index."""

    due_ms: int
    priority: int
    message_id: MessageId
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a row


class KeyHead(NamedTuple):
    """A queue key that has waiting recipients, and when the first of them is due."""

    queue_key: str
    due_ms: int


class StoredMessage(NamedTuple):
    """A message read back: `recipients` are those not terminal yet; `reported`: its envelope is in a record.

    `canonical` says that its line ends were looked at while it was read; False where nobody has looked.
    """

    envelope: Envelope
    content: bytes
    recipients: tuple[RecipientRow, ...]
    reported: bool
    canonical: bool = False


class RecipientChange(NamedTuple):
    """What a settlement does to a recipient: `attempt` must be the row's present one (else nothing is changed).

    A terminal `state` removes the row. `new_attempt` is the attempt stored from now on.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a row
    attempt: int
    state: State
    new_attempt: int
    due_ms: int
    queue_key: str


class Settlement(NamedTuple):
    """Changes of one message and the ledger record that tells them, in one transaction.

    `record` is the encoded record or None for a change that nobody needs to hear of (a claim). `reported` marks the
    message's envelope as recorded. When no recipient is left the message and its content go too. `whole`: nothing is
    done unless every change names the present attempt.
    """

    message_id: MessageId
    changes: Sequence[RecipientChange]
    record: bytes | None
    reported: bool
    whole: bool = False


class WalkedRow(NamedTuple):
    """A recipient that is not terminal, as a walk finds it."""

    message_id: MessageId
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a row
    state: State
    queue_key: str


class QueueDepth(NamedTuple):
    """Recipients by state; those that ended are in no queue."""

    scheduled: int = 0
    queued: int = 0
    sending: int = 0
    deferred: int = 0
    held: int = 0


class SpoolStats(NamedTuple):
    """Plain counters for status and metrics; bytes and rows now, commits since open.

    `waiting_count` is recipients that are not terminal, those being sent included; `quarantined_count` is messages set
    aside because they could not be read back; `outbox_first` is above `outbox_last` when no record is kept.
    """

    waiting_count: int
    oldest_accepted_ms: int
    outbox_first: int
    outbox_last: int
    acknowledged: int
    database_bytes: int
    wal_bytes: int
    commits: int
    quarantined_count: int = 0


class Incoming(Protocol):
    """Content that goes into the spool while it arrives; ended by `accept` or by `discard`, whichever is called first.

    What was written belongs to no message before `accept` is done: a crash before that leaves nothing but a file that
    the next start removes.
    """

    @property
    def size_bytes(self) -> int:
        """Octets given to `write` so far."""
        ...

    def write(self, *pieces: bytes) -> asyncio.Future[None]:
        """Append; done means that the pieces' memory is free, not that they are durable.

        After a failure (SpoolFullError, SpoolFailedError, SpoolError) the content is discarded, and what is written
        then fails as well.
        """
        ...

    def accept(self, envelope: Envelope, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Store a message with all that was written as its content; the same contract as `Spool.accept`."""
        ...

    def discard(self) -> None:
        """Forget what was written. Nothing happens after `accept`."""
        ...


class Spool(Protocol):
    """Durable home of accepted mail and of the records not yet acknowledged. One owner; not thread-safe.

    Writes are grouped: a commit takes all that gathered while the last one ran. A future is done after the commit that
    holds its write; it fails with SpoolError when that commit did not happen. Records are numbered from 1 without
    gaps.
    """

    @property
    def identity(self) -> SpoolIdentity:
        """Which spool this is."""
        ...

    @property
    def openings(self) -> Openings:
        """What tells it from a copy of its disk."""
        ...

    def has_room(self, size_bytes: int) -> bool:
        """Whether a message of this size would be taken now; cheap, for a 452 that comes before the content does."""
        ...

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Store a message whole; done means durable. SpoolFullError, SpoolFailedError.

        SpoolError, and nothing stored, for an id that is there already, for a submission key that a message of the last
        24 hours has, and for recipients that are none, terminal or share an index.
        """
        ...

    def submitted(self, key_hash: bytes) -> Submitted | None:
        """Return which message was stored under this key in the last 24 hours, whatever became of it; None for none.

        Cheap, from what is durable: a message that is being stored is not among them. SpoolError.
        """
        ...

    def receive(self, message_id: MessageId) -> Incoming:
        """Begin a content too large to be held in memory; its message will have this id."""
        ...

    @property
    def strained(self) -> bool:
        """Whether the disk lags so far behind that the pace of acceptance should drop; cheap, asked after each commit.

        It says nothing about how much mail waits: a long queue is no strain.
        """
        ...

    def settle(self, settlement: Settlement) -> asyncio.Future[int]:
        """Apply changes and write the record; the result is how many recipients were changed.

        When there are changes and all of them name a stale attempt or a message that is gone, nothing is written:
        neither record nor mark; of a `whole` one when any of them does. Without changes the record is always written.
        """
        ...

    def write_record(self, record: bytes) -> asyncio.Future[int]:
        """Write a record that belongs to no message (a command's result); the result is its number."""
        ...

    def acknowledge(self, number: int) -> asyncio.Future[None]:
        """Records up to `number` are stored elsewhere; keep the tail (10 minutes or 64 MiB), forget what is before it.

        A number below what was acknowledged moves the mark back as far as the tail reaches. SpoolError for a number
        above the last one.
        """
        ...

    async def load(self, message_id: MessageId) -> StoredMessage | None:
        """Read a message back, None when it is gone. SpoolError for a row with a wrong checksum; it is quarantined."""
        ...

    async def describe(self, message_id: MessageId) -> StoredMessage | None:
        """As `load` without reading the content, which is empty: neither it nor the envelope is checked for damage."""
        ...

    async def walk(self, after: tuple[MessageId, int], before: MessageId, limit: int) -> list[WalkedRow]:
        """The next recipients by (message id, index), of messages below `before`; all that are not terminal.

        It finds what was there when the walk began and is still there, whatever was changed meanwhile.
        """
        ...

    async def keys(self) -> list[KeyHead]:
        """Every queue key that has queued, deferred or scheduled recipients; reads heads, never rows."""
        ...

    async def heads(self, queue_key: str, after: Cursor | None, limit: int) -> list[Due]:
        """The next recipients of a key that may be sent some time, in order; not those `sending` or `held`."""
        ...

    async def unreported(self, limit: int) -> list[MessageId]:
        """Messages whose envelope is in no record yet, oldest first (after a crash)."""
        ...

    async def interrupted(self) -> list[MessageId]:
        """Messages with recipients left `sending` by a former incarnation; nobody saw how their attempts ended."""
        ...

    async def records(self, after: int, max_records: int, max_bytes: int) -> tuple[int, list[bytes]]:
        """Records that follow number `after`: number of the first one and the records, at least one if there is any."""
        ...

    async def depth(self) -> QueueDepth:
        """Recipients by state, as old as a second or as fifty times what counting them takes.

        Cancelling it changes nothing.
        """
        ...

    async def stats(self) -> SpoolStats:
        """Counters now."""
        ...

    async def close(self) -> None:
        """Commit what gathered, checkpoint, unlock. Calls after it fail with SpoolError."""
        ...


class ReplicatedQueue(Protocol):
    """Mail that PostgreSQL owns. A node holds what it sends at once, under a lease; all else waits there."""

    @property
    def epoch(self) -> int:
        """The lease under which mail may be taken now; 0 for none: then nothing is accepted."""
        ...

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Store a message; done means that PostgreSQL has it and, for rows that are `sending`, the spool too.

        SpoolError when that cannot be had; then it is not delivered from here, but PostgreSQL may have it all the
        same. RepeatedSubmissionError where another message has its key, by whatever node it was stored.
        """
        ...

    def receive(self, message_id: MessageId) -> Incoming:
        """Begin a content too large to be held in memory; its message waits in PostgreSQL."""
        ...


# --- limits


class Take(NamedTuple):
    """A wish of `cost` tokens from a bucket of `capacity` that refills with `rate_per_s` tokens a second.

    Granted when the bucket holds the cost, or is full, and then taken whole: a cost above the capacity leaves a debt,
    and nothing is granted before time has paid for it. A capacity of 0 is no limit.
    """

    key: str
    tag: str
    capacity: int
    rate_per_s: float
    cost: int


class Grant(NamedTuple):
    """Answer: allowed or not, seconds to wait when not, the key that refused, whether the local fallback decided."""

    allowed: bool
    wait_s: float
    refused_key: str
    local: bool


class Slot(NamedTuple):
    """A wish to hold one of `capacity` places under `key` for at most `ttl_s` seconds, then to be renewed.

    `holder` is unique to whoever holds it (worker and connection).
    """

    key: str
    tag: str
    capacity: int
    ttl_s: float
    holder: str


class Limiter(Protocol):
    """Token buckets, all or nothing over many keys, and slots that are held for a while.

    Never raises: a dead server means the local share decides.
    """

    def ask(self, takes: Sequence[Take]) -> asyncio.Future[Grant]:
        """Take all or none. The answer may be there at once; cancelled before it came, nothing stays taken."""
        ...

    async def take(self, takes: Sequence[Take]) -> Grant:
        """Take all or none; the same for who waits anyway."""
        ...

    def refund(self, takes: Sequence[Take]) -> None:
        """Give back what was granted and not used, never above the capacity; lost when the server is away.

        A negative cost takes what was used beyond what was granted, into debt where need be, and is never refused.
        """
        ...

    async def hold(self, slots: Sequence[Slot]) -> Grant:
        """Hold all or none; a slot that is held already by this holder is renewed."""
        ...

    def release(self, slots: Sequence[Slot]) -> None:
        """Give slots back; what is lost ends with its `ttl_s`."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


# --- idempotent submission


class Claimed(enum.Enum):
    """What the fleet knows of a key.

    YES: nobody had it, and now this message has it. PENDING: another message with this content is being stored. STORED:
    one was. OTHER: a message with another content has it. UNKNOWN: nobody could be asked.
    """

    YES = enum.auto()
    PENDING = enum.auto()
    STORED = enum.auto()
    OTHER = enum.auto()
    UNKNOWN = enum.auto()


class Claim(NamedTuple):
    """An answer; `message_id` is that of the message that was STORED, empty otherwise."""

    state: Claimed
    message_id: bytes = b""


class Claims(Protocol):
    """Which submission keys are taken, over all spools of the fleet. Nothing here raises or waits for long.

    A claim ends by `stored`, by `withdraw`, or by itself after `idempotency.PENDING_MS`.
    """

    def claim(self, key_hash: bytes, content_hash: bytes, message_id: MessageId) -> asyncio.Future[Claim]:
        """Take the key for a message that is about to be stored; the answer may be there already."""
        ...

    def stored(self, key_hash: bytes, content_hash: bytes, message_id: MessageId) -> None:
        """The message is durable: it answers for its key from now on. Lost when nobody can be told."""
        ...

    def withdraw(self, key_hash: bytes, message_id: MessageId) -> None:
        """The message was not stored: give its key free, unless another has it. Lost when nobody can be told."""
        ...


# --- configuration


class ConfigView(Protocol):
    """The configuration in use, from memory only. Two calls may see different configurations: pin what must agree."""

    @property
    def settings(self) -> NodeSettings:
        """Settings of the node's pool."""
        ...

    @property
    def denials(self) -> Denials:
        """What must stop now."""
        ...

    @property
    def loaded(self) -> bool:
        """Whether there is a configuration at all: without one an unknown account is no deleted one."""
        ...

    @property
    def stale(self) -> bool:
        """Whether the configuration is older than `config_max_age`: submission answers 451, delivery goes on."""
        ...

    def account(self, name: str) -> CompiledAccount | None:
        """The account `accounts/{account}`, compiled at first use; None when the node does not serve it."""
        ...

    def account_of_network(self, address: str) -> str | None:
        """Name of the account bound to the network that holds this address."""
        ...

    def provider(self, name: str) -> SmtpProvider | None:
        """A provider of any account or a shared one; None when it is unknown."""
        ...

    def unseal(self, value: SealedValue, account: str, resource: str, field: str) -> bytes:
        """Open a secret of a bundle. KeyError for an unknown key, ValueError when it does not belong there."""
        ...


# --- delivery


class Handover(Protocol):
    """What ingress tells delivery of mail that it accepted. Nothing here blocks, fails or reserves anything.

    For each message: `next_hop` where there are several targets, `admit`, then the spool's commit, then exactly one of
    `deliver` (where `admit` said yes for all of its queue keys and the rows were committed as `sending`, attempt 1) and
    `queued` (committed as `queued`, attempt 0; or as `scheduled`, which nobody is asked to admit).
    Recipients without a route go the same way, under the key of an empty next hop: delivery fails them with 5.4.4.
    """

    def next_hop(self, account: str, targets: Sequence[Target]) -> str:
        """Which provider mail for these targets waits for: the first that takes some now, else the first of all."""
        ...

    def admit(self, held_bytes: int, queue_key: str) -> bool:
        """Whether a message may be handed on: window open, destination neither full nor dead.

        `held_bytes` is what it takes in memory, recipients included (`envelope.message_bytes`).
        """
        ...

    def deliver(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> None:
        """Deliver a message whose rows are committed as `sending`, attempt 1."""
        ...

    def queued(self, envelope: Envelope, recipients: Sequence[RecipientRow]) -> None:
        """A message was committed as `queued` or `scheduled`: it is recorded soon, and read back in its turn."""
        ...

    def wake(self, queue_key: str) -> None:
        """Look at this key anew; rows were added or became due."""
        ...


class EventLog(Protocol):
    """Log lines: a stable event name and fields; never content, never a credential."""

    def info(self, event: str, **fields: object) -> None:
        """Write one line."""
        ...

    def warning(self, event: str, **fields: object) -> None:
        """Write one line that somebody should read."""
        ...


# --- others


class Clock(Protocol):
    """Time, so that tests own it."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970."""
        ...

    def monotonic(self) -> float:
        """Seconds that only grow."""
        ...


class RecordEncoder(Protocol):
    """Turns a ledger record into the bytes that travel."""

    def __call__(self, record: LedgerRecord) -> bytes:
        """Return the encoded record."""
        ...


class Resolver(Protocol):
    """Names to addresses that may be dialled."""

    async def addresses(self, host: str) -> list[str]:
        """Addresses of `host`, every one checked against the deployment's rules.

        LookupError for a name without addresses, PermissionError when one of them may not be dialled, OSError when the
        answer could not be had (temporary).
        """
        ...
