"""What the fleet's side of the control plane is built on: values of the stream and the ledger, and the ports
to storage.

Contract. Values are immutable. Every method of a port is one transaction, raises `UnavailableError`
while PostgreSQL is away, and leaves nothing half done when it is cancelled. Times are aware datetimes in
UTC or, where a name ends in `_ms`, milliseconds since 1970. Ids of nodes and pools are the last part of the
resource name, spools and commands are UUIDs as text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import IntEnum
from typing import NamedTuple, Protocol

from controlplane.domain.books import Comparison, Finding, FindingKind, LedgerSide
from controlplane.domain.openings import Openings
from dataplane.core.waiting import Tally, Waiting

# --- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bundle:
    """One immutable revision of a bundle, as stored; see postroad.config.v1.Bundle."""

    name: str
    kind: int
    revision: int
    hash: bytes
    content: bytes


class BundleVersion(NamedTuple):
    """What tells a bundle from its other revisions."""

    revision: int
    hash: bytes


class BundleListing(NamedTuple):
    """For each pool its changed bundles, None for a deleted one, and the mark to ask from next time."""

    mark: int
    pools: Mapping[str, Mapping[str, BundleVersion | None]]


class PoolKey(NamedTuple):
    """A key of the secrets in a pool's bundles; never shown."""

    key_id: str
    key: bytes

    def __repr__(self) -> str:
        return f"PoolKey({self.key_id})"


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """All bundles of a node pool at one moment; `pool` is its id, `digest` that of `digest_of`."""

    pool: str
    bundles: Mapping[str, Bundle]
    pool_keys: tuple[PoolKey, ...]
    digest: bytes


def digest_of(hashes: Mapping[str, bytes]) -> bytes:
    """SHA-256 over name, NUL and hash of every bundle, in order of name: what a node holds, in 32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(hashes):
        digest.update(name.encode() + b"\0" + hashes[name])
    return digest.digest()


class DenialSubject(IntEnum):
    """What a denial stops."""

    ACCOUNT = 1
    CREDENTIAL = 2
    PROVIDER = 3
    DESTINATION = 4


class Denial(NamedTuple):
    """One thing to stop; `expire_time` None for never."""

    subject: DenialSubject
    name: str
    since_time: datetime
    expire_time: datetime | None


class DenialSet(NamedTuple):
    """All denials of the fleet; the version only grows."""

    version: int
    denials: tuple[Denial, ...]


class CommandFilter(NamedTuple):
    """Which recipients a command means that names no messages; `after` is a message id of 16 bytes."""

    accepted_before_ms: int
    after: bytes
    provider: str
    recipient_domain: str
    states: tuple[int, ...]


class SpoolCommand(NamedTuple):
    """Something for a spool to do; `verb` as in postroad.node.v1, message ids are 16 bytes each."""

    command: str
    spool: str
    verb: int
    account: str
    message_ids: tuple[bytes, ...]
    provider: str = ""
    filter: CommandFilter | None = None


# --- nodes ---------------------------------------------------------------------------------------------------------


class SpoolLosses(NamedTuple):
    """What a spool lost when a damaged file was replaced; see postroad.node.v1.SpoolStatus."""

    messages: tuple[str, ...] = ()
    message_count: int = 0
    unnamed: bool = False


class SpoolStatus(NamedTuple):
    """A spool as its node sees it; `refused`: the node sends nothing from it, and tells its former openings."""

    spool: str
    incarnation: int
    acknowledged: int
    last_record: int
    waiting_count: int
    open: bool
    refused: bool = False
    losses: SpoolLosses = SpoolLosses()
    openings: Openings = Openings()


class ConfigStatus(IntEnum):
    """Whether a node uses the newest configuration; the numbers are those of postroad.control.v1."""

    SYNCED = 1
    NOT_SENT = 2
    STALE = 3
    ERROR = 4


class ConfigReport(NamedTuple):
    """What is recorded of a node's configuration; `refused` are names and hashes of what it refused."""

    status: ConfigStatus
    error: str
    denials_version: int
    refused: tuple[tuple[str, bytes], ...] = ()


class NodeState(IntEnum):
    """Where a node is in its life; the numbers are those of postroad.control.v1."""

    PENDING = 1
    ENROLLED = 2
    REVOKED = 3


class NodeRecord(NamedTuple):
    """What the node port must know of a node. `stream` is the newest one's id, empty for none; `drains`: it shall."""

    node_id: str
    pool: str
    state: NodeState
    certificate_serial: str
    stream: str
    drains: bool = False


class NodeHello(NamedTuple):
    """What a node says of its software when it connects; `knows_destinations`: it can be told to stop them."""

    boot_id: str
    software_version: str
    knows_destinations: bool = False


class NodeHealth(NamedTuple):
    """What a node says of itself with each heartbeat; see postroad.node.v1.StatusReport."""

    digest: bytes
    draining: bool
    queue_depth: int
    oldest_age_s: float
    clock_skew_s: float
    told_to_drain: bool = False
    closed: bool = False


class CertificateRecord(NamedTuple):
    """What is stored of a node's certificate."""

    serial: str
    fingerprint: bytes
    not_before: datetime
    not_after: datetime


class EnrolledNode(NamedTuple):
    """Whose token it was."""

    node_id: str
    pool: str


class FleetRepository(Protocol):
    """Nodes, pools and what they must know."""

    async def find_enrollment(self, token_sha256: bytes, now: datetime) -> EnrolledNode | None:
        """The node of a token that is good now."""
        ...

    async def complete_enrollment(
        self, token_sha256: bytes, certificate: CertificateRecord, software_version: str, now: datetime
    ) -> bool:
        """Use the token up and record the certificate; False when the token is good no more."""
        ...

    async def get_node(self, node_id: str) -> NodeRecord | None:
        """One node."""
        ...

    async def get_nodes(self, node_ids: Sequence[str]) -> list[NodeRecord]:
        """Those of the nodes that exist."""
        ...

    async def open_stream(self, node_id: str, stream: str, hello: NodeHello, now: datetime) -> Mapping[str, bytes]:
        """Record the node's newest stream; an older one is no longer the node's.

        Returns names and hashes of what the node refused when it last ran this software, empty after another one. For
        a node that has learnt of destinations the version of the denials moves where one is denied: what it holds was
        cut to what its former software knew.
        """
        ...

    async def close_stream(self, node_id: str, stream: str, now: datetime) -> None:
        """Record that the node is not connected, unless a newer stream took over."""
        ...

    async def report_config(self, node_id: str, stream: str, report: ConfigReport, now: datetime) -> None:
        """Record how the node's configuration is, unless a newer stream took over."""
        ...

    async def report_health(self, node_id: str, stream: str, health: NodeHealth, now: datetime) -> None:
        """Record a heartbeat, unless a newer stream took over."""
        ...

    async def report_spools(self, node_id: str, spools: Sequence[SpoolStatus], now: datetime) -> list[SpoolOwner]:
        """Register and update the node's spools; returns those that are its own, and leaves others' as they are."""
        ...

    async def list_spools(self, node_ids: Sequence[str]) -> list[SpoolOwner]:
        """The spools of these nodes."""
        ...

    async def bundles_since(self, mark: int) -> BundleListing:
        """Bundles that changed at or after `mark`, 0 for all of them."""
        ...

    async def load_bundles(self, pool: str, names: Sequence[str]) -> list[Bundle]:
        """Some of a pool's bundles as they are now; deleted ones are missing."""
        ...

    async def load_pool_keys(self, pool: str) -> tuple[PoolKey, ...]:
        """The keys of a pool's secrets, unsealed, in order of id."""
        ...

    async def denials_version(self) -> int:
        """Version of the denials in force."""
        ...

    async def move_denials(self, above: int) -> None:
        """Give the denials in force a version above this one."""
        ...

    async def load_denials(self, now: datetime) -> DenialSet:
        """The denials in force."""
        ...

    async def open_commands(self, spools: Sequence[str]) -> list[SpoolCommand]:
        """Commands of these spools whose result is not known yet, oldest first; at most 1,000."""
        ...


class SpoolOwner(NamedTuple):
    """Whose a spool is, whether its records are taken, the last one that is stored, and under which opening."""

    spool: str
    node_id: str
    accepted: bool
    cursor: int
    opening: bytes | None = None


# --- ledger --------------------------------------------------------------------------------------------------------


class RefusalReason(IntEnum):
    """Why records are not taken; the numbers are those of postroad.node.v1.LedgerRefusal."""

    WENT_BACKWARDS = 1
    SUPERSEDED = 2
    GAP = 3
    NOT_OWNED = 4


class Cursor(NamedTuple):
    """Records of the spool up to `cursor` are stored."""

    spool: str
    cursor: int


class Refusal(NamedTuple):
    """Records of the spool are not taken."""

    spool: str
    reason: RefusalReason
    detail: str


class SpoolOpening(NamedTuple):
    """A spool begins to report; see postroad.node.v1.LedgerOpen."""

    spool: str
    incarnation: int
    acknowledged: int
    oldest_record: int
    last_record: int
    openings: Openings = Openings()


class RawBatch(NamedTuple):
    """Records of one spool in order, still encoded."""

    spool: str
    incarnation: int
    first_record: int
    records: Sequence[bytes]


class Stored(NamedTuple):
    """What a transaction of records did."""

    answer: Cursor | Refusal
    stored_count: int
    rejected_count: int


class Duplicate(NamedTuple):
    """A message that was stored though another one of its account has its Idempotency-Key.

    `checked` says that its spool could ask Redis, which did not know of the other.
    """

    message_id: str
    first_id: str
    account: str
    checked: bool


class LedgerStore(Protocol):
    """The record of every message."""

    async def open_spool(self, node_id: str, opening: SpoolOpening, now: datetime) -> Cursor | Refusal:
        """Register the spool or check that it continues; another node's is refused."""
        ...

    async def store(self, node_id: str, batch: RawBatch, now: datetime) -> Stored:
        """Store a batch and move the cursor, in one transaction."""
        ...

    async def cursors(self, spools: Sequence[str]) -> Mapping[str, int]:
        """Up to where the records of these spools are stored; a spool that is not known is missing."""
        ...


# --- jobs ----------------------------------------------------------------------------------------------------------


class Leadership(Protocol):
    """A lock that one process of the fleet holds, on a connection of its own."""

    async def acquire(self) -> bool:
        """Try to become the leader; never waits for the other one."""
        ...

    async def is_held(self) -> bool:
        """Whether the lock is held still; False as soon as its connection is doubtful."""
        ...

    async def release(self) -> None:
        """Let go, whatever state the connection is in."""
        ...


WAITING_DAYS = 35
"""How much longer a day with mail that waits is kept: mail may be held for 30 days, and has a lifetime of 5 then."""


class JobStore(Protocol):
    """What the leader's jobs do."""

    async def ensure_partitions(self, first: date, days: int) -> None:
        """Make the mail tables' partitions for `days` days from `first` on, where they are missing."""
        ...

    async def drop_partitions(self, before: date) -> int:
        """Drop the partitions of days before `before`; returns how many.

        Not of days whose mail still waits, for WAITING_DAYS more.
        """
        ...

    async def delete_idempotency_keys(self, before: datetime) -> int:
        """Forget answers to requests made before then."""
        ...

    async def delete_submission_keys(self, before: datetime, limit: int) -> int:
        """Forget at most `limit` keys of messages that were accepted before then; returns how many."""
        ...

    async def delete_enrollment_tokens(self, before: datetime) -> int:
        """Forget tokens that ended before then."""
        ...

    async def delete_config_revisions(self, before: datetime, limit: int) -> int:
        """Forget at most `limit` revisions made before then, never the current one of a bundle; returns how many."""
        ...

    async def sweep_queue(self, before: datetime) -> None:
        """Forget contents put before then whose message never came."""
        ...

    async def expire_held(self, limit: int) -> int:
        """End what the replicated queue holds for too long, for at most `limit` recipients; returns for how many."""
        ...

    async def end_left_behind(self, limit: int) -> int:
        """End at most `limit` messages of the replicated queue whose account is gone; returns how many.

        Or of how many it found out whose they are, where that is more.
        """
        ...

    async def end_given_up(self, limit: int) -> int:
        """End what waits in a spool that was given up, of at most `limit` recipients that wait anywhere; returns of how
        many. Commands that wait for such a spool are done.
        """
        ...

    async def run_queue_commands(self, limit: int) -> int:
        """Carry out commands on the replicated queue in at most `limit` parts; returns in how many there was one."""
        ...

    async def delete_leases(self, before: datetime) -> None:
        """Forget leases that ended before then and hold nothing."""
        ...

    async def delete_denials(self, now: datetime, limit: int) -> int:
        """Forget at most `limit` denials that ended by now; the version moves, and replicas are told, if any did."""
        ...


# --- books ---------------------------------------------------------------------------------------------------------


class LedgerBooks(NamedTuple):
    """All accounts of a spool as the ledger has them, as of a record."""

    as_of_record: int
    accounts: Mapping[str, LedgerSide]


class SilentSpool(NamedTuple):
    """A spool that nothing was compared with for long, and who waits in it: counts, and some by name."""

    spool: str
    node: str
    counts: Mapping[str, int]
    named: Mapping[str, Sequence[Waiting]]


class BookHealth(NamedTuple):
    """Open findings by kind, and for each spool seconds since it was last compared."""

    findings: Mapping[FindingKind, int]
    ages_s: Mapping[str, float]


class BookStore(Protocol):
    """The ledger's side of the books, each answer from one snapshot, and what comparisons found."""

    async def read_books(self, spools: Sequence[str]) -> Mapping[str, LedgerBooks]:
        """The books of these spools, those that the ledger knows."""
        ...

    async def waiting_by_bucket(self, spool: str, account: str) -> tuple[int, Mapping[int, Tally]]:
        """Up to which record, and who waits in each bucket."""
        ...

    async def waiting_by_name(self, spool: str, account: str, buckets: Sequence[int]) -> tuple[int, set[Waiting]]:
        """Up to which record, and who waits in these buckets; at most 20,000 of them."""
        ...

    async def conclude(self, comparison: Comparison, now: datetime) -> None:
        """Store a comparison: its books replace the spool's, findings that it does not have are resolved."""
        ...

    async def compare_queue(self, now: datetime) -> Comparison:
        """Compare the replicated queue with the ledger, in one snapshot, and store it like `conclude`."""
        ...

    async def silent_spools(self, before: datetime) -> list[SilentSpool]:
        """Spools that were not compared since then, in which the ledger has somebody wait."""
        ...

    async def report_silent(self, spools: Mapping[tuple[str, str], Sequence[Finding]], now: datetime) -> None:
        """Store what was found of silent spools, by spool and node; the others are silent no more."""
        ...

    async def forget_books(self, first_day: date, resolved_before: datetime) -> None:
        """Drop entries of days before `first_day` whose rows were dropped, findings that were resolved before then, and
        books of spools that the fleet knows no more.
        """
        ...

    async def health(self, now: datetime) -> BookHealth:
        """How the books are."""
        ...
