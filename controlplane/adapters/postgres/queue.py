"""The replicated queue in PostgreSQL: leases, messages as they come, and claims of them.

Contract. Implements `ports_queue.QueueStore`; every method is one transaction on the database's clock. `LeaseLostError`
for a lease that has ended, another spool's, and what it does not hold: nothing was changed then. Of accounts that wait
each gives at most CLAIMED_OF_ACCOUNT messages to a claim, or its part of it where that is more, the highest priority
first and of that the oldest, so that a flood of one account leaves room for the others. Which accounts come first is
drawn by lot for each claim, so that none waits for the backlogs of others. What waits for its time costs a claim
nothing. Two claims never give the same message: rows that another transaction has locked are passed over.

A message with an Idempotency-Key takes the key in the transaction that stores it; one whose key another message took in
the last 24 hours, REPLICATED or as far as the ledger was told LOCAL, is not stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from controlplane.adapters.ledger_records import IdBounds, RecordError, RecordRows, columns
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.ledger import PostgresLedger, insert_replicated, note_keys
from controlplane.adapters.postgres.queue_commands import run_commands
from controlplane.adapters.postgres.queue_reports import at_once, return_ended
from controlplane.adapters.postgres.session import Connection
from controlplane.domain.errors import UnavailableError
from controlplane.ports_queue import (
    BadQueueRequestError,
    Claimed,
    ClaimedRecipient,
    ClaimWish,
    ContentPart,
    Lease,
    LeaseLostError,
    QueuedMessage,
    Repeated,
    SpoolOwnershipError,
)
from dataplane.core.queue import State

LEASE_S = 15
CLAIMED_OF_ACCOUNT = 20
# Transactions, each for RECIPIENTS_AT_ONCE at most.
_COMMANDS_A_CLAIM = 10
_PART_BYTES = 4 * 1024 * 1024
# In a row of RecordRows.messages.
_SEND_TIME_MS, _PRIORITY = 12, 13
_SCHEDULED, _QUEUED, _SENDING, _HELD = int(State.SCHEDULED), int(State.QUEUED), int(State.SENDING), int(State.HELD)
_LOTS = (1 << 63) - 1
BY_AGE = 4
_BAD_CONTENT = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, OverflowError, ValueError)

# Without a lock: the ledger holds the row for as long as a batch takes.
_OWN_SPOOL = "SELECT node, accepted FROM postroad.spools WHERE spool = $1"
_RENEW = f"""
UPDATE postroad.node_leases SET lease_until = clock_timestamp() + interval '{LEASE_S} s'
WHERE epoch = $1 AND spool = $2 AND lease_until > clock_timestamp()
RETURNING epoch
"""
_BEGIN = f"""
INSERT INTO postroad.node_leases (spool, node, lease_until)
VALUES ($1, $2, clock_timestamp() + interval '{LEASE_S} s') RETURNING epoch
"""
# Kept from being deleted until what names it is committed.
_HAS_LEASE = """
SELECT 1 FROM postroad.node_leases WHERE epoch = $1 AND spool = $2 AND node = $3 AND lease_until > clock_timestamp()
FOR KEY SHARE
"""
_OF_POOL = "SELECT account, uid FROM postroad.accounts WHERE account = ANY ($1) AND node_pool = $2"
_EPOCH = "timestamptz 'epoch' + interval '1 ms' *"
_INSERT_QUEUE = f"""
INSERT INTO postroad.replicated_queue (
    message_id, account, account_uid, priority, size_bytes, envelope, due_time, epoch
)
SELECT m, a, w, p, s, e, CASE WHEN x > 0 THEN {_EPOCH} x ELSE transaction_timestamp() END,
    CASE WHEN h THEN $9::bigint END
FROM unnest(
    $1::uuid[], $2::text[], $3::uuid[], $4::smallint[], $5::bigint[], $6::bytea[], $7::bigint[], $8::boolean[]
) AS u (m, a, w, p, s, e, x, h)
"""
_INSERT_RECIPIENTS = f"""
INSERT INTO postroad.queue_recipients (message_id, recipient_index, state, attempt, due_time, next_hop)
SELECT m, i, CASE WHEN h THEN {_SENDING} WHEN x > 0 THEN {_SCHEDULED} ELSE {_QUEUED} END, CASE WHEN h THEN 1 ELSE 0 END,
    CASE WHEN x > 0 THEN {_EPOCH} x ELSE transaction_timestamp() END, n
FROM unnest($1::uuid[], $2::integer[], $3::bigint[], $4::boolean[], $5::text[]) AS u (m, i, x, h, n)
"""
_INSERT_CONTENTS = """
INSERT INTO postroad.queue_contents (message_id, chunk, data)
SELECT m, 0, d FROM unnest($1::uuid[], $2::bytea[]) AS u (m, d)
"""
# Nothing is added to a message that was stored: who knows its id is not its owner.
_INSERT_CHUNK = """
INSERT INTO postroad.queue_contents (message_id, chunk, data)
SELECT $1, $2, $3 WHERE NOT EXISTS (SELECT FROM postroad.replicated_queue WHERE message_id = $1)
ON CONFLICT DO NOTHING
"""
_COUNT_CHUNKS = "SELECT count(*) FROM postroad.queue_contents WHERE message_id = $1 AND chunk < $2"
# Where few accounts wait each gives more, or a claim would leave room that nobody asked for.
_SHARE = f"greatest({CLAIMED_OF_ACCOUNT}, $3 / (SELECT greatest(count(*), 1) FROM turns))"
# What is first due of each account and priority, each found by one step down the index; then of each account its
# highest priorities, or by one lot of BY_AGE those that have waited longest: mail for a dead next hop comes back again
# and again, and must not keep what has a lower priority from ever being claimed. Accounts come in the order of the lot,
# and those behind the last one that is wanted are not read. An account is its uid: what a deleted one left costs a step
# for each priority, however much it is and whoever has the name.
CLAIM = f"""
WITH RECURSIVE heads (account_uid, priority, due_time) AS (
    (
        SELECT account_uid, priority, due_time FROM postroad.replicated_queue
        WHERE epoch IS NULL AND account_uid IS NOT NULL ORDER BY account_uid, priority, due_time LIMIT 1
    )
    UNION ALL
    SELECT next.account_uid, next.priority, next.due_time
    FROM heads AS h CROSS JOIN LATERAL (
        SELECT q.account_uid, q.priority, q.due_time FROM postroad.replicated_queue AS q
        WHERE q.epoch IS NULL AND (q.account_uid, q.priority) > (h.account_uid, h.priority)
        ORDER BY q.account_uid, q.priority, q.due_time LIMIT 1
    ) AS next
), turns AS (
    SELECT a.account, h.account_uid, array_agg(
        h.priority ORDER BY CASE WHEN $4::bigint % {BY_AGE} = 0 THEN h.due_time END, h.priority DESC
    ) AS priorities
    FROM heads AS h JOIN postroad.accounts AS a ON a.uid = h.account_uid AND a.node_pool = $1
    WHERE h.due_time <= $2 AND a.account <> ALL ($5::text[])
    GROUP BY a.account, h.account_uid
    ORDER BY hashtextextended(a.account, $4)
)
SELECT due.message_id, due.size_bytes, due.envelope
FROM turns AS t CROSS JOIN LATERAL (
    SELECT found.message_id, found.size_bytes, found.envelope
    FROM unnest(t.priorities) AS p (priority) CROSS JOIN LATERAL (
        SELECT q.message_id, q.size_bytes, q.envelope
        FROM postroad.replicated_queue AS q
        WHERE q.epoch IS NULL AND q.account_uid = t.account_uid AND q.priority = p.priority AND q.due_time <= $2
        ORDER BY q.due_time LIMIT {_SHARE} FOR UPDATE SKIP LOCKED
    ) AS found
    LIMIT {_SHARE}
) AS due
LIMIT $3
"""
_MARK = """
UPDATE postroad.replicated_queue SET epoch = $2, claim_id = $3, claim_time = $4 WHERE message_id = ANY ($1)
"""
MARK_RECIPIENTS = f"""
UPDATE postroad.queue_recipients SET state = {_SENDING}, attempt = attempt + 1
WHERE message_id = ANY ($1) AND state <> {_HELD} AND due_time <= $2
RETURNING message_id, recipient_index, attempt, (extract(epoch FROM due_time) * 1000)::bigint AS due_ms,
    CASE WHEN pinned THEN next_hop ELSE '' END AS provider
"""
_CONTENTS = """
SELECT message_id, data FROM postroad.queue_contents WHERE message_id = ANY ($1) ORDER BY message_id, chunk
"""
_CONFIRM = """
UPDATE postroad.replicated_queue SET claim_id = NULL, claim_time = NULL
WHERE message_id = ANY ($1) AND epoch = $2 AND (claim_id = $3 OR claim_id IS NULL)
RETURNING message_id
"""
_HOLDS = "SELECT 1 FROM postroad.replicated_queue WHERE message_id = $1 AND epoch = $2"


class PostgresQueue:
    """See the module. `observe` is told what was done and how often; see `controlplane.telemetry`."""

    def __init__(
        self,
        database: FleetDatabase,
        ledger: PostgresLedger,
        observe: Callable[[str, int], None] = lambda _what, _count: None,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._observe = observe

    async def renew(self, node_id: str, spool: str, epoch: int) -> Lease:
        """As the port says."""
        key = UUID(spool)
        async with self._database.transaction("queue_renew") as connection:
            # Before the spool has reported anything it is nobody's.
            await connection.execute(
                "INSERT INTO postroad.spools (spool, node) VALUES ($1, $2) ON CONFLICT DO NOTHING", key, node_id
            )
            row = await connection.fetchrow(_OWN_SPOOL, key)
            if row is None or row["node"] != node_id:
                raise SpoolOwnershipError
            if not row["accepted"]:
                raise LeaseLostError("the spool is refused")
            renewed = await connection.fetchval(_RENEW, epoch, key) if epoch else None
            if renewed is None:
                renewed = await connection.fetchval(_BEGIN, key, node_id)
                self._observe("epochs", 1)
        return Lease(renewed, LEASE_S)

    async def store_content(self, message_id: bytes, chunk: int, data: bytes) -> None:
        """As the port says."""
        async with self._database.transaction("queue_content") as connection:
            await connection.execute(_INSERT_CHUNK, *(UUID(bytes=message_id), chunk, data))

    async def store(
        self, node_id: str, pool: str, spool: str, epoch: int, messages: Sequence[QueuedMessage], now: datetime
    ) -> list[Repeated]:
        """As the port says."""
        bounds = self._ledger.bounds(now)
        rows = _decode(messages, bounds)
        await self._ledger.prepare_days(rows.days(), bounds)
        async with self._database.transaction("queue_store") as connection:
            await _check_lease(connection, node_id, spool, epoch)
            uids = await _uids(connection, pool, rows, messages)
            try:
                repeated = await _find_repeated(connection, rows)
                if repeated:
                    messages = _without(repeated, rows, messages)
                    rows = _decode(messages, bounds)
                if messages:
                    await insert_replicated(connection, rows, node_id, UUID(spool))
                    await _insert(connection, rows, messages, uids, epoch)
            except _BAD_CONTENT as error:
                raise BadQueueRequestError(type(error).__name__) from error
        self._observe("stored", len(messages))
        self._observe("repeated", len(repeated))
        return repeated

    async def claim(
        self, node_id: str, pool: str, wish: ClaimWish, now: datetime | None, *, adopt: bool
    ) -> list[Claimed]:
        """As the port says."""
        # What was asked before counts for this claim, but not more than a claim can wait for; one that fails keeps
        # nobody's mail back.
        with contextlib.suppress(UnavailableError):
            await run_commands(self._database, _COMMANDS_A_CLAIM, now)
        async with self._database.transaction("queue_return") as connection:
            clock = now or await connection.fetchval("SELECT transaction_timestamp()")
            returned, uncertain = await return_ended(connection, clock, adopt=adopt)
        self._observe("returned", returned)
        self._observe("uncertain", uncertain)
        async with self._database.transaction("queue_claim") as connection:
            clock = now or await connection.fetchval("SELECT transaction_timestamp()")
            await _check_lease(connection, node_id, wish.spool, wish.epoch)
            lot = UUID(wish.claim_id).int & _LOTS
            due = await connection.fetch(CLAIM, pool, clock, wish.max_messages, lot, wish.left_out)
            found = _within(due, wish.max_bytes)
            found = found[: await at_once(connection, [row["message_id"] for row in found])]
            message_ids = [row["message_id"] for row in found]
            if not message_ids:
                return []
            await connection.execute(_MARK, message_ids, wish.epoch, UUID(wish.claim_id), clock)
            recipients: dict[UUID, list[ClaimedRecipient]] = {}
            for row in await connection.fetch(MARK_RECIPIENTS, message_ids, clock):
                recipient = ClaimedRecipient(row["recipient_index"], row["attempt"], row["due_ms"], row["provider"])
                recipients.setdefault(row["message_id"], []).append(recipient)
            contents = await _contents(connection, found, wish.max_bytes)
        self._observe("claimed", len(message_ids))
        return [
            Claimed(key.bytes, row["envelope"], tuple(sorted(recipients.get(key, ()))), contents.get(key))
            for row in found
            for key in (row["message_id"],)
        ]

    async def fetch_content(self, node_id: str, spool: str, epoch: int, message_id: bytes, chunk: int) -> ContentPart:
        """As the port says."""
        key = UUID(bytes=message_id)
        async with self._database.transaction("queue_fetch") as connection:
            await _check_lease(connection, node_id, spool, epoch)
            if await connection.fetchval(_HOLDS, key, epoch) is None:
                raise LeaseLostError("the lease does not hold the message")
            data: list[bytes] = []
            size_bytes = 0
            async for row in connection.cursor(
                "SELECT chunk, data FROM postroad.queue_contents WHERE message_id = $1 AND chunk >= $2 ORDER BY chunk",
                *(key, chunk),
                prefetch=4,
            ):
                if data and size_bytes + len(row["data"]) > _PART_BYTES:
                    return ContentPart(b"".join(data), row["chunk"])
                data.append(row["data"])
                size_bytes += len(row["data"])
        return ContentPart(b"".join(data), 0)

    async def confirm(
        self, node_id: str, spool: str, epoch: int, claim_id: str, message_ids: Sequence[bytes]
    ) -> list[bytes]:
        """As the port says."""
        async with self._database.transaction("queue_confirm") as connection:
            await _check_lease(connection, node_id, spool, epoch)
            keys = [UUID(bytes=message_id) for message_id in message_ids]
            found = await connection.fetch(_CONFIRM, keys, epoch, UUID(claim_id))
        return [row["message_id"].bytes for row in found]


def _decode(messages: Sequence[QueuedMessage], bounds: IdBounds) -> RecordRows:
    rows = RecordRows(bounds, clean=True)
    try:
        for message in messages:
            rows.add(message.record)
    except RecordError as error:
        raise BadQueueRequestError(str(error)) from error
    if len(rows.messages) != len(messages):
        raise BadQueueRequestError("a record that accepts nothing")
    return rows


async def _find_repeated(connection: Connection, rows: RecordRows) -> list[Repeated]:
    """Take the keys of these messages; those that have come too late."""
    if not rows.keys:
        return []
    found = await note_keys(connection, rows.keys)
    return [Repeated(row["message_id"].bytes, row["first_id"].bytes, row["is_same"]) for row in found]


def _without(repeated: list[Repeated], rows: RecordRows, messages: Sequence[QueuedMessage]) -> list[QueuedMessage]:
    gone = {one.message_id for one in repeated}
    return [message for row, message in zip(rows.messages, messages, strict=True) if row[0].bytes not in gone]


async def _check_lease(connection: Connection, node_id: str, spool: str, epoch: int) -> None:
    if await connection.fetchval(_HAS_LEASE, epoch, UUID(spool), node_id) is None:
        raise LeaseLostError("the lease has ended")


async def _uids(
    connection: Connection, pool: str, rows: RecordRows, messages: Sequence[QueuedMessage]
) -> dict[str, UUID]:
    """The uids of the messages' accounts; BadQueueRequestError unless these are the ones that the node meant."""
    accounts = list({row[1] for row in rows.messages})
    found = {row["account"]: row["uid"] for row in await connection.fetch(_OF_POOL, accounts, pool)}
    for row, message in zip(rows.messages, messages, strict=True):
        uid = found.get(row[1])
        if uid is None or message.account_uid not in ("", str(uid)):
            # Of several messages the node asks again one by one, so that others' mail is stored.
            raise BadQueueRequestError("an account is not of the node's pool, or gone")
    return found


async def _insert(
    connection: Connection,
    rows: RecordRows,
    messages: Sequence[QueuedMessage],
    uids: Mapping[str, UUID],
    epoch: int,
) -> None:
    queue: list[tuple[Any, ...]] = []
    contents: list[tuple[Any, ...]] = []
    by_id: dict[UUID, QueuedMessage] = {}
    # A record accepts one message, so that both are in the same order.
    for row, message in zip(rows.messages, messages, strict=True):
        key = row[0]
        by_id[key] = message
        account = row[1]
        asked = (row[_PRIORITY], row[4], message.envelope, row[_SEND_TIME_MS], message.sending)
        queue.append((key, account, uids[account], *asked))
        if message.content is not None:
            contents.append((key, message.content))
        elif await connection.fetchval(_COUNT_CHUNKS, key, message.chunks) != message.chunks:
            raise BadQueueRequestError("a content is not whole")
    recipients = [
        (row[0], row[1], row[6], stored.sending, stored.next_hop(row[1]))
        for row in rows.accepted.values()
        for stored in (by_id[row[0]],)
    ]
    await connection.execute(_INSERT_QUEUE, *columns(queue, 8), epoch)
    await connection.execute(_INSERT_RECIPIENTS, *columns(recipients, 5))
    await connection.execute(_INSERT_CONTENTS, *columns(contents, 2))


def _within(due: Sequence[asyncpg.Record], max_bytes: int) -> list[asyncpg.Record]:
    """As many of these messages, in order, as fit; one in any case."""
    found: list[asyncpg.Record] = []
    for row in due:
        max_bytes -= row["size_bytes"]
        if found and max_bytes < 0:
            break
        found.append(row)
    return found


async def _contents(connection: Connection, found: Iterable[Any], max_bytes: int) -> dict[UUID, bytes]:
    """Contents of these messages, without one that is too large to come along."""
    wanted: list[UUID] = []
    for row in found:
        max_bytes -= row["size_bytes"]
        if max_bytes < 0:
            break
        wanted.append(row["message_id"])
    parts: dict[UUID, list[bytes]] = {}
    for row in await connection.fetch(_CONTENTS, wanted):
        parts.setdefault(row["message_id"], []).append(row["data"])
    return {key: b"".join(data) for key, data in parts.items()}
