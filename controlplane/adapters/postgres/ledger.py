"""The record of every message in PostgreSQL: what spools report, stored once, in order, whatever it says.

Contract. Implements `ports_fleet.LedgerStore`. A batch is one transaction that locks the spool's row: the
cursor moves with the rows, so that a batch whose answer was lost is recognised when it comes again. A
record that cannot be stored goes to `ledger_rejects` and counts as stored; the others are found by halving.
UnavailableError leaves everything as it was.

    what comes                              what is done
    first record = cursor + 1               stored; cursor = last record
    begins earlier (sent again)             the part above the cursor is stored
    begins later                            refused: GAP
    older incarnation than the newest       refused: SUPERSEDED
    Open of an old copy of the disk         refused: WENT_BACKWARDS
    spool refused before                    refused: WENT_BACKWARDS, until AcceptSpool
    newer incarnation                       stored: the worker was restarted
    another node's spool, or a given up one refused: NOT_OWNED

A spool speaks of messages that are its own: what it says of others' is set aside, whoever's they are. It has those that
it accepted and those that it took over, and has them no more once it gave them up (`handovers`). Of REPLICATED
messages, which move between spools, it speaks under a lease of its own, whether that has ended or not: one that holds
the message, or one of a node of the account's pool. What it says of mail that it holds under a lease changes the
replicated queue in the same transaction.
A recipient's first terminal state stays, whichever attempt it is of; a later, other one becomes an event
`conflicting_outcome`. Of other states that of the highest attempt stays.
What a spool was asked to cancel or bounce and has lost, as the books say, ends when it has answered (`ends`).
What was accepted and what ended is entered into the spool's books by the statement that moves the cursor, and into the
queue's where the spool held it under a lease.

Of two messages of an account with one Idempotency-Key, accepted within 24 hours, the one that is heard of second is
marked as the duplicate of the other, and told: spools could not ask each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from controlplane.adapters.ledger_records import (
    DAY_MS,
    STATE,
    CommandProgress,
    IdBounds,
    KeyRow,
    RecordError,
    RecordRows,
    columns,
    conflict_event,
)
from controlplane.adapters.postgres.book_entries import BY_DAY, ENTER, Entered, enter_queue
from controlplane.adapters.postgres.ends import end_lost
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.handover_records import NotAssignedError, store_given, store_pieces, store_taken
from controlplane.adapters.postgres.queue_reports import apply_reports
from controlplane.adapters.postgres.session import Connection
from controlplane.domain.openings import is_old_copy, resume_after
from controlplane.ports_fleet import (
    WAITING_DAYS,
    Cursor,
    Duplicate,
    RawBatch,
    Refusal,
    RefusalReason,
    SpoolOpening,
    Stored,
)
from dataplane.core.queue import TERMINAL

Numbered = Sequence[tuple[int, bytes]]

_TERMINAL = [int(state) for state in TERMINAL]
_DETAIL_LIMIT = 1_000
# What a record's content can do to a statement; everything else is ours or the server's.
_BAD_CONTENT = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, OverflowError, ValueError)

_LOCK = """
SELECT node, incarnation, cursor, accepted, opening FROM postroad.spools WHERE spool = $1 FOR UPDATE
"""
_EPOCH = "timestamptz 'epoch' + interval '1 ms' *"
_WINDOW = "interval '24 hours'"
_INSERT_MESSAGES = f"""
INSERT INTO postroad.messages (
    message_id, account, accept_time, sender, size_bytes, header_message_id, subject, credential, client_address,
    client_helo, client_tls, session, send_time, priority, node, spool, replicated
)
SELECT m, a, {_EPOCH} t, s, z, h, j, c, ca, ch, ct, n, CASE WHEN x > 0 THEN {_EPOCH} x END, p, $15, $16, $17
FROM unnest(
    $1::uuid[], $2::text[], $3::bigint[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::text[],
    $10::text[], $11::text[], $12::text[], $13::bigint[], $14::smallint[]
) AS u (m, a, t, s, z, h, j, c, ca, ch, ct, n, x, p)
ON CONFLICT DO NOTHING
"""
_RECIPIENT_ROWS = f"""
SELECT m, i, a, d, s, n, CASE WHEN x > 0 THEN {_EPOCH} x END, {_EPOCH} t, c, e, r, p
FROM unnest(
    $1::uuid[], $2::integer[], $3::text[], $4::text[], $5::smallint[], $6::integer[], $7::bigint[], $8::bigint[],
    $9::smallint[], $10::text[], $11::text[], $12::text[]
) AS u (m, i, a, d, s, n, x, t, c, e, r, p)
"""
_RECIPIENT_COLUMNS = """
    message_id, recipient_index, account, address, state, attempts, next_attempt_time, update_time, reply_code,
    enhanced_code, reply_text, provider
"""
# A few rows come back, however many were written: what the books want to know.
_INSERT_RECIPIENTS = f"""
WITH written AS (
    INSERT INTO postroad.recipients ({_RECIPIENT_COLUMNS}) {_RECIPIENT_ROWS}
    ON CONFLICT DO NOTHING
    RETURNING tableoid AS partition, account, state
)
{BY_DAY}
"""
# The bounds let the planner leave out all days but those of the batch. An end counts whatever attempt it is of: who
# lost a lease, or goes on from an older disk, has made fewer than the ledger knows.
_UPDATE_RECIPIENTS = f"""
WITH u ({_RECIPIENT_COLUMNS}) AS ({_RECIPIENT_ROWS}), written AS (
UPDATE postroad.recipients AS r
SET state = u.state, attempts = greatest(r.attempts, u.attempts), next_attempt_time = u.next_attempt_time,
    update_time = u.update_time,
    reply_code = CASE WHEN u.reply_text <> '' OR u.reply_code <> 0 THEN u.reply_code ELSE r.reply_code END,
    enhanced_code = CASE WHEN u.reply_text <> '' OR u.reply_code <> 0 THEN u.enhanced_code ELSE r.enhanced_code END,
    reply_text = CASE WHEN u.reply_text <> '' OR u.reply_code <> 0 THEN u.reply_text ELSE r.reply_text END,
    provider = CASE WHEN u.provider <> '' THEN u.provider ELSE r.provider END
FROM u
WHERE r.message_id = u.message_id AND r.recipient_index = u.recipient_index AND r.account = u.account
    AND r.message_id BETWEEN $13 AND $14 AND r.state <> ALL ($15::smallint[])
    AND (r.attempts <= u.attempts OR u.state = ANY ($15))
RETURNING r.tableoid AS partition, r.account, r.state
)
{BY_DAY}
"""
_SELECT_STATES = """
SELECT r.message_id, r.recipient_index, r.state
FROM postroad.recipients AS r
JOIN unnest($1::uuid[], $2::integer[], $3::text[]) AS u (m, i, a)
    ON r.message_id = u.m AND r.recipient_index = u.i AND r.account = u.a
WHERE r.message_id BETWEEN $4 AND $5
"""
_INSERT_EVENTS = f"""
INSERT INTO postroad.delivery_events (
    message_id, recipient_index, account, type, event_time, attempt, bundle_revision, rule, provider, remote_host, tls,
    reply_code, enhanced_code, reply_text, queued_ms, waiting_ms, connecting_ms, transferring_ms, node, spool
)
SELECT m, i, a, y, {_EPOCH} t, n, b, r, p, h, l, c, e, x, q, w, g, f, $19, $20
FROM unnest(
    $1::uuid[], $2::integer[], $3::text[], $4::smallint[], $5::bigint[], $6::integer[], $7::bigint[], $8::text[],
    $9::text[], $10::text[], $11::text[], $12::smallint[], $13::text[], $14::text[], $15::bigint[], $16::bigint[],
    $17::bigint[], $18::bigint[]
) AS u (m, i, a, y, t, n, b, r, p, h, l, c, e, x, q, w, g, f)
"""
_SELECT_EVENTS = """
SELECT message_id, recipient_index, type, (extract(epoch FROM event_time) * 1000)::bigint, attempt
FROM postroad.delivery_events WHERE message_id = ANY ($1) AND message_id BETWEEN $2 AND $3
"""
# A late word is good after its account moved to another pool where the spool accepted the message; that of a deleted
# account is nobody's any more. Leases are found once for all messages, and not by each message among those of all.
COUNT_OWN = """
SELECT count(*)
FROM postroad.messages AS m JOIN unnest($1::uuid[], $2::text[]) AS u (i, a) ON m.message_id = u.i AND m.account = u.a
LEFT JOIN (
    SELECT g.i, array_agg(l.epoch) AS epochs FROM unnest($6::uuid[], $7::bigint[]) AS g (i, e)
    JOIN postroad.node_leases AS l ON l.epoch = g.e AND l.spool = $5 GROUP BY g.i
) AS h ON h.i = m.message_id
WHERE m.message_id BETWEEN $3 AND $4 AND CASE WHEN m.replicated THEN h.i IS NOT NULL AND (
    m.spool = $5
    OR EXISTS (
        SELECT FROM postroad.replicated_queue AS q WHERE q.message_id = m.message_id AND q.epoch = ANY (h.epochs)
    )
    OR NOT EXISTS (
        SELECT FROM postroad.accounts AS c WHERE c.account = m.account
            AND c.node_pool IS DISTINCT FROM (SELECT n.node_pool FROM postroad.nodes AS n WHERE n.node = $8)
    )
) ELSE m.spool = $5 END
"""
_MOVE_CURSOR = f"""
WITH entered AS ({ENTER})
UPDATE postroad.spools SET cursor = $2, incarnation = $3, update_time = $4 WHERE spool = $1
"""
_UPDATE_COMMANDS = """
UPDATE postroad.commands AS c
SET done_time = CASE WHEN u.d THEN $8::timestamptz END, update_time = $8, changed_count = c.changed_count + u.n,
    too_late_count = c.too_late_count + u.l, error = u.e, position = coalesce(u.p, c.position)
FROM unnest($1::uuid[], $2::integer[], $3::integer[], $4::text[], $5::boolean[], $6::uuid[]) AS u (m, n, l, e, d, p)
WHERE c.command = u.m AND c.spool = $7 AND c.done_time IS NULL
"""
# In one order, so that two transactions with the same keys wait for each other and do not deadlock. A key that is there
# is another message's, this one's from before, or too old to count: then it goes to who was accepted later.
_NOTE_KEYS = f"""
WITH u AS (
    SELECT a, h, m, {_EPOCH} t AS t, c, x
    FROM unnest($1::text[], $2::bytea[], $3::uuid[], $4::bigint[], $5::boolean[], $6::bytea[]) AS u (a, h, m, t, c, x)
), noted AS (
    INSERT INTO postroad.submission_keys AS k (account, key_hash, message_id, accept_time, checked, content_hash)
    SELECT a, h, m, t, c, x FROM u ORDER BY a, h
    ON CONFLICT (account, key_hash) DO UPDATE SET
        message_id = CASE WHEN excluded.accept_time >= k.accept_time + {_WINDOW} THEN excluded.message_id
            ELSE k.message_id END,
        checked = CASE WHEN excluded.accept_time >= k.accept_time + {_WINDOW} THEN excluded.checked ELSE k.checked END,
        content_hash = CASE WHEN excluded.accept_time >= k.accept_time + {_WINDOW} THEN excluded.content_hash
            ELSE k.content_hash END,
        accept_time = CASE WHEN excluded.accept_time >= k.accept_time + {_WINDOW} THEN excluded.accept_time
            ELSE k.accept_time END
    RETURNING account, key_hash, message_id, accept_time, content_hash
)
SELECT u.m AS message_id, noted.message_id AS first_id, u.a AS account, u.c AS checked,
    coalesce(u.x = noted.content_hash, true) AS is_same
FROM u JOIN noted ON noted.account = u.a AND noted.key_hash = u.h
WHERE noted.message_id <> u.m AND u.t < noted.accept_time + {_WINDOW} AND u.t > noted.accept_time - {_WINDOW}
"""
_MARK_DUPLICATES = """
UPDATE postroad.messages AS m SET duplicate_of = u.f
FROM unnest($1::uuid[], $2::uuid[], $3::text[]) AS u (i, f, a)
WHERE m.message_id = u.i AND m.account = u.a AND m.message_id BETWEEN $4 AND $5 AND m.duplicate_of IS NULL
RETURNING m.message_id
"""
_REJECT = """
INSERT INTO postroad.ledger_rejects (node, spool, incarnation, record_number, record, reason, detail)
VALUES ($1, $2, $3, $4, $5, $6, $7)
"""


class PostgresLedger:
    """See the module. Records of messages older than `retention` and WAITING_DAYS are not stored any more."""

    def __init__(
        self,
        database: FleetDatabase,
        *,
        retention: timedelta,
        report: Callable[[str, str, str], None] = lambda _spool, _reason, _detail: None,
        report_duplicate: Callable[[Duplicate], None] = lambda _duplicate: None,
    ) -> None:
        self._database = database
        self.report_duplicate = report_duplicate
        self._kept_ms = int(retention.total_seconds() * 1000) + WAITING_DAYS * DAY_MS
        self._report = report
        self._days_ready: set[int] = set()

    async def open_spool(self, node_id: str, opening: SpoolOpening, now: datetime) -> Cursor | Refusal:
        """As `LedgerStore.open_spool`."""
        spool = UUID(opening.spool)
        async with self._database.transaction("ledger_open") as connection:
            await connection.execute(
                "INSERT INTO postroad.spools (spool, node, incarnation) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                spool,
                node_id,
                opening.incarnation,
            )
            row = await connection.fetchrow(_LOCK, spool)
            if row is None or row["node"] != node_id:
                return _not_owned(opening.spool)
            accepted = row["accepted"] and not _went_backwards(opening, row)
            cursor: int = row["cursor"]
            if accepted and opening.oldest_record > cursor + 1:
                cursor = await self._pass_over(connection, node_id, opening, cursor)
            await connection.execute(
                """
                UPDATE postroad.spools
                SET reported_incarnation = $2, resume_record = $3, accepted = $4, cursor = $5, update_time = $6,
                    incarnation = CASE WHEN $4 THEN $2 ELSE incarnation END,
                    reported_opening = $7, opening = CASE WHEN $4 THEN $7 ELSE opening END
                WHERE spool = $1
                """,
                spool,
                opening.incarnation,
                resume_after(row["opening"], cursor, opening.openings, opening.acknowledged),
                accepted,
                cursor,
                now,
                opening.openings.present or None,
            )
            if row["accepted"] and not accepted:
                await connection.execute("SELECT pg_notify('postroad_commands', '')")
        if accepted:
            return Cursor(opening.spool, cursor)
        detail = f"incarnation {opening.incarnation}, last record {opening.last_record}: {_why_refused(opening, row)}"
        self._report(opening.spool, "WENT_BACKWARDS", detail)
        return Refusal(opening.spool, RefusalReason.WENT_BACKWARDS, detail)

    async def store(self, node_id: str, batch: RawBatch, now: datetime) -> Stored:
        """As `LedgerStore.store`."""
        bounds = self.bounds(now)
        records = list(enumerate(batch.records, batch.first_record))
        # Before the spool's row is locked: the lock is held for the database's part only.
        decoded = _decode(records, bounds)
        await self.prepare_days(decoded.rows.days(), bounds)
        async with self._database.transaction("ledger_store") as connection:
            row = await connection.fetchrow(_LOCK, UUID(batch.spool))
            if row is None or row["node"] != node_id:
                return Stored(_not_owned(batch.spool), 0, 0)
            refusal = _refusal(batch, row)
            if refusal is not None:
                return Stored(refusal, 0, 0)
            if row["cursor"] >= batch.first_record:
                records = [numbered for numbered in records if numbered[0] > row["cursor"]]
                decoded = _decode(records, bounds)
            if not records:
                return Stored(Cursor(batch.spool, row["cursor"]), 0, 0)
            writer = _Writer(connection, node_id, batch, bounds, now)
            await writer.write(decoded)
            moved = (UUID(batch.spool), records[-1][0], batch.incarnation, now)
            await connection.execute(_MOVE_CURSOR, *moved, *writer.entered.columns())
            await enter_queue(connection, UUID(batch.spool), writer.moving)
            await connection.execute("SELECT pg_notify('postroad_ledger', '')")
        for reject in writer.rejects:
            self._report(batch.spool, reject.reason, f"record {reject.number}: {reject.text}")
        for duplicate in writer.duplicates:
            self.report_duplicate(duplicate)
        cursor = Cursor(batch.spool, records[-1][0])
        return Stored(cursor, len(records) - len(writer.rejects), len(writer.rejects))

    async def cursors(self, spools: Sequence[str]) -> Mapping[str, int]:
        """As `LedgerStore.cursors`."""
        async with self._database.transaction("ledger_cursors") as connection:
            rows = await connection.fetch(
                "SELECT spool, cursor FROM postroad.spools WHERE spool = ANY ($1)", [UUID(spool) for spool in spools]
            )
        return {str(row["spool"]): row["cursor"] for row in rows}

    def look_anew(self) -> None:
        """The database may be another one than before, that has lost the partitions that were made last."""
        self._days_ready.clear()

    async def _pass_over(self, connection: Connection, node_id: str, opening: SpoolOpening, cursor: int) -> int:
        """Records that the spool holds no more never come: say so where people look, and go on behind them."""
        text = f"records {cursor + 1} to {opening.oldest_record - 1} are gone from the spool"
        spool = UUID(opening.spool)
        await connection.execute(_REJECT, node_id, spool, opening.incarnation, cursor + 1, b"", "MISSING", text)
        self._report(opening.spool, "MISSING", text)
        return opening.oldest_record - 1

    def bounds(self, now: datetime) -> IdBounds:
        """Which messages can be stored."""
        now_ms = int(now.timestamp() * 1000)
        return IdBounds(now_ms - self._kept_ms, now_ms + DAY_MS)

    async def prepare_days(self, days: set[int], bounds: IdBounds) -> None:
        """Make partitions that the leader did not: a node may report mail of days on which nobody led."""
        for day in sorted(days - self._days_ready):
            async with self._database.transaction("ledger_partitions") as connection:
                await connection.execute("SELECT postroad.ensure_partitions(date '1970-01-01' + $1::integer, 1)", day)
            self._days_ready.add(day)
        self._days_ready = {day for day in self._days_ready if day >= bounds.first_ms // DAY_MS}


async def insert_replicated(connection: Connection, rows: RecordRows, node_id: str, spool: UUID) -> None:
    """Record messages that are accepted into the queue in this transaction."""
    await connection.execute(_INSERT_MESSAGES, *columns(rows.messages, 14), node_id, spool, True)
    entered = Entered()
    entered.accepted(await connection.fetch(_INSERT_RECIPIENTS, *columns(rows.accepted.values(), 12)))
    await enter_queue(connection, spool, entered)
    await connection.execute("SELECT pg_notify('postroad_ledger', '')")


async def note_keys(connection: Connection, rows: Sequence[KeyRow]) -> list[asyncpg.Record]:
    """Note whose keys these are; what is known of messages whose key is another's, as _NOTE_KEYS says.

    Who comes second waits here until the first one's transaction has ended.
    """
    found: list[asyncpg.Record] = []
    while rows:
        # A statement cannot change a row twice: a key that comes again has a statement of its own.
        first = {(row.account, row.key_hash): row for row in reversed(rows)}
        rows = [row for row in rows if first[row.account, row.key_hash] is not row]
        found += await connection.fetch(_NOTE_KEYS, *columns(first.values(), 6))
    return found


async def _find_duplicates(connection: Connection, rows: Sequence[KeyRow]) -> list[Duplicate]:
    """Note whose keys these are, and mark messages whose key is another's."""
    found = await note_keys(connection, rows)
    if not found:
        return []
    ids = [one["message_id"] for one in found]
    firsts, accounts = [one["first_id"] for one in found], [one["account"] for one in found]
    marked = await connection.fetch(_MARK_DUPLICATES, ids, firsts, accounts, min(ids), max(ids))
    new = {one["message_id"] for one in marked}
    return [
        Duplicate(str(one["message_id"]), str(one["first_id"]), one["account"], one["checked"])
        for one in found
        if one["message_id"] in new
    ]


class _Reject(NamedTuple):
    number: int
    raw: bytes
    reason: str
    text: str


class _Decoded(NamedTuple):
    rows: RecordRows
    records: list[tuple[int, bytes]]
    rejects: list[_Reject]


class _UnknownRecipientError(ValueError):
    """A record speaks of a recipient that was never accepted."""


def _decode(records: Numbered, bounds: IdBounds, *, clean: bool = False) -> _Decoded:
    decoded = _Decoded(RecordRows(bounds, clean=clean), [], [])
    for number, raw in records:
        try:
            decoded.rows.add(raw)
            decoded.records.append((number, raw))
        except RecordError as error:
            decoded.rejects.append(_Reject(number, raw, error.reason, str(error)))
    return decoded


def _went_backwards(opening: SpoolOpening, row: asyncpg.Record) -> bool:
    return opening.incarnation < row["incarnation"] or is_old_copy(
        row["opening"], row["cursor"], opening.openings, opening.last_record
    )


def _why_refused(opening: SpoolOpening, row: asyncpg.Record) -> str:
    if opening.incarnation < row["incarnation"] or opening.last_record < row["cursor"]:
        return "older than known"
    if _went_backwards(opening, row):
        return "a copy of the disk, made before it reported last"
    return "it waits for AcceptSpool"


def _not_owned(spool: str) -> Refusal:
    return Refusal(spool, RefusalReason.NOT_OWNED, "the spool is another node's, or was given up")


def _refusal(batch: RawBatch, row: asyncpg.Record) -> Refusal | None:
    if not row["accepted"]:
        return Refusal(batch.spool, RefusalReason.WENT_BACKWARDS, "the spool waits for AcceptSpool")
    if batch.incarnation < row["incarnation"]:
        return Refusal(batch.spool, RefusalReason.SUPERSEDED, f"incarnation {row['incarnation']} reports now")
    if batch.first_record > row["cursor"] + 1:
        return Refusal(batch.spool, RefusalReason.GAP, f"stored up to {row['cursor']}")
    return None


class _Writer:
    """Writes records inside a transaction; what cannot be stored is found by halving and set aside."""

    def __init__(self, connection: Connection, node_id: str, batch: RawBatch, bounds: IdBounds, now: datetime) -> None:
        self._connection = connection
        self._node_id = node_id
        self._spool = UUID(batch.spool)
        self._incarnation = batch.incarnation
        self._bounds = bounds
        self._now = now
        self.rejects: list[_Reject] = []
        self.entered = Entered()
        self.moving = Entered()  # what is held under a lease
        self.duplicates: list[Duplicate] = []

    async def write(self, decoded: _Decoded) -> None:
        """Store all that can be stored, set the rest aside."""
        self.rejects += decoded.rejects
        await self._write_or_halve(decoded)
        for reject in self.rejects:
            # NUL is the one character that text cannot hold.
            text = reject.text.replace("\0", "")[:_DETAIL_LIMIT]
            arguments = (self._incarnation, reject.number, reject.raw, reject.reason, text)
            await self._connection.execute(_REJECT, self._node_id, self._spool, *arguments)

    async def _write_or_halve(self, decoded: _Decoded) -> None:
        if not decoded.records:
            return
        await self._connection.execute("SAVEPOINT records")
        try:
            entered, moving = await self._write_rows(decoded.rows)
            await self._connection.execute("RELEASE records")
            self.entered.add(entered)
            self.moving.add(moving)
        except _BAD_CONTENT as error:
            await self._connection.execute("ROLLBACK TO records")
            await self._halve(decoded, error)

    async def _halve(self, decoded: _Decoded, error: Exception) -> None:
        records = decoded.records
        if len(records) == 1 and decoded.rows.is_clean:
            reason = "UNKNOWN_RECIPIENT" if isinstance(error, _UnknownRecipientError) else "REFUSED_BY_DATABASE"
            self.rejects.append(_Reject(*records[0], reason, str(error)))
            return
        middle = max(len(records) // 2, 1)
        for part in (records[:middle], records[middle:]):
            await self._write_or_halve(_decode(part, self._bounds, clean=True))

    async def _write_rows(self, rows: RecordRows) -> tuple[Entered, Entered]:
        """Write them; what is entered into the spool's books, and into the queue's."""
        connection, entered, moving = self._connection, Entered(), Entered()
        new: set[tuple[Any, ...]] = set()
        await self._take_over(rows, entered)
        if rows.messages:
            own = (self._node_id, self._spool, False)
            answer = await connection.execute(_INSERT_MESSAGES, *columns(rows.messages, 14), *own)
            if _count(answer) == len(rows.messages):
                new = {row[:2] for row in rows.messages}
        await self._check_own(rows, new)
        events = await self._write_recipients(rows, entered, moving)
        if events:
            await connection.execute(_INSERT_EVENTS, *columns(events, 18), self._node_id, self._spool)
        if rows.reports:
            await apply_reports(connection, self._spool, list(rows.reports.values()))
        await self._give_up(rows, entered)
        if rows.results:
            results = await self._end_lost(rows, entered)
            await connection.execute(_UPDATE_COMMANDS, *columns(results, 6), self._spool, self._now)
        if rows.keys:
            # Last: what is found must not be undone with what follows.
            self.duplicates += await _find_duplicates(connection, rows.keys)
        return entered, moving

    async def _write_recipients(self, rows: RecordRows, entered: Entered, moving: Entered) -> Sequence[tuple[Any, ...]]:
        """Write what became of recipients; the events that are to be listed."""
        events = rows.events
        ended: set[tuple[UUID, int]] = set()
        if rows.accepted:
            written = await self._connection.fetch(_INSERT_RECIPIENTS, *columns(rows.accepted.values(), 12))
            if entered.accepted(written) != len(rows.accepted):
                # A disk that was restored tells known mail anew.
                events = events + await self._update(list(rows.accepted.values()), entered, ended)
        for changed, into in self._by_book(rows, entered, moving):
            events = events + await self._update(changed, into, ended)
        return await self._new_events(events, ended) if ended else events

    @staticmethod
    def _by_book(rows: RecordRows, entered: Entered, moving: Entered) -> list[tuple[list[list[Any]], Entered]]:
        """What changed, and where it is entered."""
        if not rows.reports:
            return [(list(rows.changed.values()), entered)] if rows.changed else []
        local = [row for key, row in rows.changed.items() if key not in rows.reports]
        held = [row for key, row in rows.changed.items() if key in rows.reports]
        return [(changed, into) for changed, into in ((local, entered), (held, moving)) if changed]

    async def _give_up(self, rows: RecordRows, entered: Entered) -> None:
        if rows.pieces:
            await store_pieces(self._connection, rows.pieces)
        if rows.given:
            # Before results of commands: what was given up has left them to its next owner.
            await store_given(self._connection, self._node_id, self._spool, rows.given, entered)

    async def _end_lost(self, rows: RecordRows, entered: Entered) -> list[CommandProgress]:
        """End what commands name and the spool has lost; what became of the commands."""
        results = list(rows.results.values())
        done = [result.command for result in results if result.is_done and not result.error]
        counts = await end_lost(self._connection, self._spool, done, self._now, entered)
        # A message that is gone counts as one that is too late.
        return [
            result._replace(
                changed_count=result.changed_count + counts[result.command],
                too_late_count=max(0, result.too_late_count - 1) if counts[result.command] else result.too_late_count,
            )
            for result in results
        ]

    async def _take_over(self, rows: RecordRows, entered: Entered) -> None:
        if not rows.taken:
            return
        try:
            await store_taken(self._connection, self._node_id, self._spool, rows.taken, entered)
        except NotAssignedError as error:
            raise _UnknownRecipientError(str(error)) from error

    async def _check_own(self, rows: RecordRows, new: set[tuple[Any, ...]]) -> None:
        """Refuse what is said of messages that are not this spool's; `new` are those that it accepted just now."""
        named = {row[:2] for row in rows.messages}
        named |= {(row[0], row[2]) for row in (*rows.changed.values(), *rows.events)}
        named |= {row[:2] for row in (*rows.pieces, *rows.given)}
        named -= new
        if not named:
            return
        message_ids, accounts = columns(named, 2)
        bounds = (min(message_ids), max(message_ids))
        leases = columns(rows.leases, 2)
        arguments = (message_ids, accounts, *bounds, self._spool, *leases, self._node_id)
        count = await self._connection.fetchval(COUNT_OWN, *arguments)
        if count < len(named):
            raise _UnknownRecipientError("a message is none of this spool, nor under a lease of it")

    async def _update(
        self, rows: list[list[Any]], entered: Entered, ended: set[tuple[UUID, int]]
    ) -> list[tuple[Any, ...]]:
        """Change recipients that are not terminal yet; returns the events of outcomes that came too late.

        Recipients that had ended as is said now are added to `ended`.
        """
        ids = [row[0] for row in rows]
        least, greatest = min(ids), max(ids)
        written = await self._connection.fetch(_UPDATE_RECIPIENTS, *columns(rows, 12), least, greatest, _TERMINAL)
        if entered.changed(written) == len(rows):
            return []
        message_ids, indexes, accounts = columns([row[:3] for row in rows], 3)
        found = await self._connection.fetch(_SELECT_STATES, message_ids, indexes, accounts, least, greatest)
        states = {(one["message_id"], one["recipient_index"]): one["state"] for one in found}
        if len(states) < len(rows):
            raise _UnknownRecipientError("a recipient is not known")
        conflicts = []
        for row in rows:
            present = states[row[0], row[1]]
            if row[STATE] not in _TERMINAL or present not in _TERMINAL:
                continue
            if row[STATE] == present:
                ended.add((row[0], row[1]))
            else:
                conflicts.append(conflict_event(row, present))
        return conflicts

    async def _new_events(
        self, events: Sequence[tuple[Any, ...]], ended: set[tuple[UUID, int]]
    ) -> list[tuple[Any, ...]]:
        """Leave out what a disk that was restored tells anew of recipients that had ended."""
        message_ids = list({message_id for message_id, _ in ended})
        found = await self._connection.fetch(_SELECT_EVENTS, message_ids, min(message_ids), max(message_ids))
        known = {tuple(row) for row in found}
        return [event for event in events if (*event[:2], *event[3:6]) not in known]


def _count(answer: str) -> int:
    """How many rows a command's tag says."""
    return int(answer.rpartition(" ")[2])
