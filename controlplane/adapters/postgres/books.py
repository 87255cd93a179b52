"""The ledger's side of the books, and what comparisons with spools found, in PostgreSQL.

Contract. Implements `ports_fleet.BookStore`. Each answer about a spool is read in one snapshot together with the
spool's cursor, so that it is exact as of that record however busily records are stored meanwhile; nobody waits for it.
Who waits is found by an index that holds nobody else. REPLICATED mail is in no spool's book: it moves between them. The
replicated queue has books of its own, as a spool without a node; both of its sides are here, so that one snapshot says
who waits where. A recipient that one node sends while another has told its end is on neither side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any
from uuid import UUID

import asyncpg

from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.queue_commands import QUEUE_SPOOL
from controlplane.adapters.postgres.session import Connection
from controlplane.domain.books import (
    MOST_NAMED,
    Book,
    Comparison,
    Entries,
    Finding,
    FindingKind,
    LedgerSide,
    compare_names,
    name_waiting,
    unbalanced,
)
from controlplane.ports_fleet import BookHealth, LedgerBooks, SilentSpool
from controlplane.ports_queue import NO_SPOOL
from dataplane.core.queue import State
from dataplane.core.waiting import Tally, Waiting, tally_of_sum

MOST_NAMES = 20_000

_SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"

# Ids added up in three parts, each of which is a number without sign; `digits` are the 32 of an id.
_PARTS = """
    sum(('x' || substr(digits, 1, 12))::bit(48)::bigint) AS high,
    sum(('x' || substr(digits, 13, 10))::bit(40)::bigint) AS middle,
    sum(('x' || substr(digits, 23))::bit(40)::bigint) AS low
"""
# OFFSET keeps the planner from reading all messages of all days to find those of the few that wait.
_MESSAGE = "SELECT spool, node FROM postroad.messages WHERE message_id = r.message_id AND NOT replicated OFFSET 0"
_WAITING = f"""
    SELECT m.spool, r.account, r.recipient_index, r.message_id, replace(r.message_id::text, '-', '') AS digits
    FROM postroad.recipients AS r CROSS JOIN LATERAL ({_MESSAGE}) AS m
    WHERE r.state < 6 AND m.spool = ANY($1::uuid[])
"""
# What was accepted on the day on which an account took over the id of a former one, or before, may be the former one's.
_OWN_DAYS = """
    SELECT account, (messages_since AT TIME ZONE 'UTC')::date + 1 AS first_day
    FROM postroad.accounts WHERE messages_since IS NOT NULL
"""
WAITING_TOTALS = f"""
SELECT spool, account, recipient_index, count(*) AS count,
    count(*) FILTER (WHERE message_id < postroad.message_id_bound(greatest($2, o.first_day))) AS earlier, {_PARTS}
FROM ({_WAITING}) AS waiting LEFT JOIN ({_OWN_DAYS}) AS o USING (account) GROUP BY spool, account, recipient_index
"""
WAITING_BY_BUCKET = f"""
SELECT substr(digits, 30) AS bucket, recipient_index, count(*) AS count, {_PARTS}
FROM ({_WAITING} AND r.account = $2) AS waiting GROUP BY substr(digits, 30), recipient_index
"""
WAITING_BY_NAME = f"""
SELECT message_id, recipient_index FROM ({_WAITING} AND r.account = $2) AS waiting
WHERE substr(digits, 30) = ANY($3::text[]) LIMIT {MOST_NAMES}
"""
_REPLICATED = "SELECT FROM postroad.messages WHERE message_id = r.message_id AND replicated OFFSET 0"
QUEUE_LEDGER = f"""
    SELECT r.account, r.recipient_index, r.message_id, replace(r.message_id::text, '-', '') AS digits
    FROM postroad.recipients AS r CROSS JOIN LATERAL ({_REPLICATED}) AS m
    WHERE r.state < 6
"""
_QUEUE_HELD = f"""
    SELECT q.account, r.recipient_index, r.message_id, replace(r.message_id::text, '-', '') AS digits
    FROM postroad.queue_recipients AS r JOIN postroad.replicated_queue AS q USING (message_id)
    WHERE NOT (r.state = {int(State.SENDING)} AND EXISTS (
        SELECT FROM postroad.recipients AS l
        WHERE l.message_id = r.message_id AND l.recipient_index = r.recipient_index AND l.state >= 6
    ))
"""
_QUEUE_TOTALS = f"""
SELECT account, recipient_index, count(*) AS count,
    count(*) FILTER (WHERE message_id < postroad.message_id_bound(o.first_day)) AS earlier, {_PARTS}
FROM ({{side}}) AS waiting LEFT JOIN ({_OWN_DAYS}) AS o USING (account) GROUP BY account, recipient_index
"""
_QUEUE_NAMES = """
SELECT account, message_id, recipient_index FROM ({side}) AS one
EXCEPT SELECT account, message_id, recipient_index FROM ({other}) AS two LIMIT {most}
"""
_QUEUE_ENTRIES = f"""
SELECT account, sum(accepted)::bigint AS accepted, sum(sent)::bigint AS sent, sum(bounced)::bigint AS bounced,
    sum(failed)::bigint AS failed, sum(expired)::bigint AS expired, sum(cancelled)::bigint AS cancelled
FROM postroad.queue_entries LEFT JOIN ({_OWN_DAYS}) AS o USING (account)
WHERE o.first_day IS NULL OR day >= o.first_day GROUP BY account
"""
# What no claim can find, and what no lease's end gives back.
_QUEUE_LOST = f"""
SELECT q.account, r.message_id, r.recipient_index
FROM postroad.queue_recipients AS r JOIN postroad.replicated_queue AS q USING (message_id)
WHERE r.state <> {int(State.HELD)} AND (
    q.epoch IS NULL AND q.due_time > r.due_time
    OR q.epoch IS NOT NULL AND NOT EXISTS (SELECT FROM postroad.node_leases AS l WHERE l.epoch = q.epoch)
) LIMIT {MOST_NAMES}
"""
_ENTRIES = f"""
SELECT spool, account, sum(accepted)::bigint AS accepted, sum(sent)::bigint AS sent, sum(bounced)::bigint AS bounced,
    sum(failed)::bigint AS failed, sum(expired)::bigint AS expired, sum(cancelled)::bigint AS cancelled
FROM postroad.book_entries LEFT JOIN ({_OWN_DAYS}) AS o USING (account)
WHERE spool = ANY($1::uuid[]) AND day >= greatest($2, o.first_day) GROUP BY spool, account
"""
# Whoever's spool it was: one that the fleet knows no more is silent, too. So is mail that changes hands for too long.
_SILENT = f"""
SELECT * FROM (
    SELECT m.spool, m.node, r.account, r.message_id, r.recipient_index,
        count(*) OVER (PARTITION BY m.spool, r.account) AS count,
        row_number() OVER (PARTITION BY m.spool, r.account ORDER BY r.message_id, r.recipient_index) AS number
    FROM postroad.recipients AS r CROSS JOIN LATERAL ({_MESSAGE}) AS m
    WHERE r.state < 6
        AND NOT (m.spool = '{NO_SPOOL}' AND EXISTS (
            SELECT FROM postroad.handovers AS h WHERE h.message_id = r.message_id AND h.create_time >= $1
        ))
        AND NOT EXISTS (SELECT FROM postroad.book_comparisons AS c WHERE c.spool = m.spool AND c.compare_time >= $1)
        AND NOT EXISTS (SELECT FROM postroad.spools AS s WHERE s.spool = m.spool AND s.create_time >= $1)
        AND NOT EXISTS (SELECT FROM postroad.given_up_spools AS g WHERE g.spool = m.spool)
) AS numbered WHERE number <= {MOST_NAMED}
"""
_PUT_BOOKS = """
INSERT INTO postroad.books (
    spool, node, as_of_record, compare_time, account, accepted, sent, bounced, failed, expired, cancelled, waiting,
    earlier, spool_waiting, ledger_digest, spool_digest
)
SELECT $1, $2, $3, $4, u.* FROM unnest(
    $5::text[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[],
    $13::bigint[], $14::bigint[], $15::bytea[], $16::bytea[]
) AS u
"""
_PUT_COMPARISON = """
INSERT INTO postroad.book_comparisons (spool, node, as_of_record, compare_time) VALUES ($1, $2, $3, $4)
ON CONFLICT (spool) DO UPDATE
SET node = excluded.node, as_of_record = excluded.as_of_record, compare_time = excluded.compare_time
"""
_PUT_FINDINGS = """
INSERT INTO postroad.book_findings AS f (
    spool, node, first_seen_time, last_seen_time, kind, account, message_id, recipient_index, detail
)
SELECT $1, $2, $3, $3, u.* FROM unnest($4::smallint[], $5::text[], $6::uuid[], $7::integer[], $8::text[]) AS u
ON CONFLICT (spool, account, kind, message_id, recipient_index) WHERE resolve_time IS NULL
DO UPDATE SET last_seen_time = excluded.last_seen_time, detail = excluded.detail, node = excluded.node
"""
_RESOLVE = """
UPDATE postroad.book_findings SET resolve_time = $2
WHERE spool = $1 AND resolve_time IS NULL AND last_seen_time < $2 AND account <> ALL ($3::text[])
"""
_RESOLVE_SILENT = """
UPDATE postroad.book_findings SET resolve_time = $1
WHERE kind = $2 AND resolve_time IS NULL AND last_seen_time < $1
"""
# A day whose mail still waits keeps its rows, and with them its entries.
_FORGET_ENTRIES = """
DELETE FROM postroad.{table}
WHERE day < $1 AND to_regclass('postroad.recipients_' || to_char(day, 'YYYYMMDD')) IS NULL
"""
_FORGET_SPOOLS = """
DELETE FROM postroad.{table} AS b
WHERE b.spool <> $1 AND NOT EXISTS (SELECT FROM postroad.spools AS s WHERE s.spool = b.spool)
"""


class PostgresBooks:
    """`ports_fleet.BookStore`; see the module."""

    def __init__(self, database: FleetDatabase) -> None:
        self._database = database

    async def read_books(self, spools: Sequence[str]) -> Mapping[str, LedgerBooks]:
        """As the port says."""
        ids = [UUID(spool) for spool in spools]
        async with self._database.transaction("books_read") as connection:
            await connection.execute(_SNAPSHOT)
            first_day = await connection.fetchval("SELECT first_day FROM postroad.book_start")
            cursors = await connection.fetch("SELECT spool, cursor FROM postroad.spools WHERE spool = ANY($1)", ids)
            entries = await connection.fetch(_ENTRIES, ids, first_day)
            waiting = await connection.fetch(WAITING_TOTALS, ids, first_day)
        accounts: dict[UUID, dict[str, LedgerSide]] = defaultdict(dict)
        for row in entries:
            accounts[row["spool"]][row["account"]] = LedgerSide(Entries(*(row[name] for name in Entries._fields)))
        for row in waiting:
            side = accounts[row["spool"]].get(row["account"], LedgerSide())
            total, earlier = side.waiting.plus(_tally(row)), side.earlier + row["earlier"]
            accounts[row["spool"]][row["account"]] = side._replace(waiting=total, earlier=earlier)
        return {str(row["spool"]): LedgerBooks(row["cursor"], accounts[row["spool"]]) for row in cursors}

    async def waiting_by_bucket(self, spool: str, account: str) -> tuple[int, Mapping[int, Tally]]:
        """As the port says."""
        async with self._database.transaction("books_waiting_by_bucket") as connection:
            await connection.execute(_SNAPSHOT)
            cursor = await _cursor(connection, spool)
            rows = await connection.fetch(WAITING_BY_BUCKET, [UUID(spool)], account)
        buckets: dict[int, Tally] = {}
        for row in rows:
            bucket = int(row["bucket"], 16)
            buckets[bucket] = buckets.get(bucket, Tally()).plus(_tally(row))
        return cursor, buckets

    async def waiting_by_name(self, spool: str, account: str, buckets: Sequence[int]) -> tuple[int, set[Waiting]]:
        """As the port says."""
        digits = [f"{bucket:03x}" for bucket in buckets]
        async with self._database.transaction("books_waiting_by_name") as connection:
            await connection.execute(_SNAPSHOT)
            cursor = await _cursor(connection, spool)
            rows = await connection.fetch(WAITING_BY_NAME, [UUID(spool)], account, digits)
        return cursor, {Waiting(row["message_id"].bytes, row["recipient_index"]) for row in rows}

    async def conclude(self, comparison: Comparison, now: datetime) -> None:
        """As the port says."""
        spool = UUID(comparison.spool)
        head = (spool, comparison.node, comparison.as_of_record, now)
        books = [
            [book.account for book in comparison.books],
            *([book.ledger.entries[place] for book in comparison.books] for place in range(len(Entries._fields))),
            [book.ledger.waiting.count for book in comparison.books],
            [book.ledger.earlier for book in comparison.books],
            [book.spool_waiting.count for book in comparison.books],
            [book.ledger.waiting.digest.to_bytes(16) for book in comparison.books],
            [book.spool_waiting.digest.to_bytes(16) for book in comparison.books],
        ]
        async with self._database.transaction("books_conclude") as connection:
            # Two streams of a node may follow each other closely.
            await connection.execute(_PUT_COMPARISON, *head)
            await connection.execute("DELETE FROM postroad.books WHERE spool = $1", spool)
            await connection.execute(_PUT_BOOKS, *head, *books)
            await _put_findings(connection, spool, comparison.node, comparison.findings, now)
            await connection.execute(_RESOLVE, spool, now, list(comparison.unjudged))

    async def compare_queue(self, now: datetime) -> Comparison:
        """As the port says."""
        async with self._database.transaction("books_compare_queue") as connection:
            await connection.execute(_SNAPSHOT)
            entries = await connection.fetch(_QUEUE_ENTRIES)
            ledger = await _queue_side(connection, QUEUE_LEDGER)
            queue = await _queue_side(connection, _QUEUE_HELD)
            lost = await _by_account(connection, _QUEUE_LOST)
            here, there = {}, {}
            if ledger != queue:
                here = await _by_account(connection, _only(QUEUE_LEDGER, _QUEUE_HELD))
                there = await _by_account(connection, _only(_QUEUE_HELD, QUEUE_LEDGER))
        entered = {row["account"]: Entries(*(row[name] for name in Entries._fields)) for row in entries}
        books = tuple(
            Book(
                *(account, str(QUEUE_SPOOL), "", 0, now),
                ledger.get(account, LedgerSide())._replace(entries=entered.get(account, Entries())),
                queue.get(account, LedgerSide()).waiting,
            )
            for account in sorted({*entered, *ledger, *queue})
        )
        findings = [finding for book in books for finding in unbalanced(book)]
        for account in sorted({*here, *there}):
            findings += compare_names(account, here.get(account, ()), there.get(account, ()), frozenset())
        for account, recipients in sorted(lost.items()):
            findings += name_waiting(FindingKind.NO_DEADLINE, account, recipients, "waits where nothing looks for it")
        comparison = Comparison(str(QUEUE_SPOOL), "", 0, books, tuple(findings), ())
        await self.conclude(comparison, now)
        return comparison

    async def silent_spools(self, before: datetime) -> list[SilentSpool]:
        """As the port says."""
        async with self._database.transaction("books_silent") as connection:
            rows = await connection.fetch(_SILENT, before)
        nodes = {row["spool"]: row["node"] for row in rows}
        counts: dict[UUID, dict[str, int]] = defaultdict(dict)
        named: dict[UUID, dict[str, list[Waiting]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            counts[row["spool"]][row["account"]] = row["count"]
            named[row["spool"]][row["account"]].append(Waiting(row["message_id"].bytes, row["recipient_index"]))
        return [SilentSpool(str(spool), node, counts[spool], named[spool]) for spool, node in nodes.items()]

    async def report_silent(self, spools: Mapping[tuple[str, str], Sequence[Finding]], now: datetime) -> None:
        """As the port says."""
        async with self._database.transaction("books_report_silent") as connection:
            for (spool, node), findings in spools.items():
                await _put_findings(connection, UUID(spool), node, findings, now)
            await connection.execute(_RESOLVE_SILENT, now, int(FindingKind.SPOOL_SILENT))

    async def forget_books(self, first_day: date, resolved_before: datetime) -> None:
        """As the port says."""
        async with self._database.transaction("books_forget") as connection:
            for table in ("book_entries", "queue_entries"):
                await connection.execute(_FORGET_ENTRIES.format(table=table), first_day)
            await connection.execute("DELETE FROM postroad.book_findings WHERE resolve_time < $1", resolved_before)
            for table in ("books", "book_comparisons"):
                await connection.execute(_FORGET_SPOOLS.format(table=table), QUEUE_SPOOL)

    async def health(self, now: datetime) -> BookHealth:
        """As the port says."""
        async with self._database.transaction("books_health") as connection:
            findings = await connection.fetch(
                "SELECT kind, count(*) AS count FROM postroad.book_findings WHERE resolve_time IS NULL GROUP BY kind"
            )
            ages = await connection.fetch(
                """
                SELECT s.spool, coalesce(c.compare_time, s.create_time) AS since
                FROM postroad.spools AS s LEFT JOIN postroad.book_comparisons AS c USING (spool)
                UNION ALL SELECT spool, compare_time FROM postroad.book_comparisons WHERE spool = $1
                """,
                QUEUE_SPOOL,
            )
        counts = {FindingKind(row["kind"]): row["count"] for row in findings}
        return BookHealth(counts, {str(row["spool"]): (now - row["since"]).total_seconds() for row in ages})


async def _queue_side(connection: Connection, side: str) -> dict[str, LedgerSide]:
    """Who waits on a side, by account."""
    found: dict[str, LedgerSide] = {}
    for row in await connection.fetch(_QUEUE_TOTALS.format(side=side)):
        former = found.get(row["account"], LedgerSide())
        total, earlier = former.waiting.plus(_tally(row)), former.earlier + row["earlier"]
        found[row["account"]] = LedgerSide(Entries(), total, earlier)
    return found


def _only(side: str, other: str) -> str:
    """The statement that names who waits on the one side only."""
    return _QUEUE_NAMES.format(side=side, other=other, most=MOST_NAMES)


async def _by_account(connection: Connection, sql: str) -> dict[str, list[Waiting]]:
    found: dict[str, list[Waiting]] = defaultdict(list)
    for row in await connection.fetch(sql):
        found[row["account"]].append(Waiting(row["message_id"].bytes, row["recipient_index"]))
    return dict(found)


async def _put_findings(
    connection: Connection, spool: UUID, node: str, findings: Sequence[Finding], now: datetime
) -> None:
    columns: list[list[Any]] = [
        [int(finding.kind) for finding in findings],
        [finding.account for finding in findings],
        [finding.message_id for finding in findings],
        [finding.recipient_index for finding in findings],
        [finding.detail for finding in findings],
    ]
    await connection.execute(_PUT_FINDINGS, spool, node, now, *columns)


async def _cursor(connection: Connection, spool: str) -> int:
    cursor: int = await connection.fetchval("SELECT cursor FROM postroad.spools WHERE spool = $1", UUID(spool))
    return cursor


def _tally(row: asyncpg.Record) -> Tally:
    ids_sum = (int(row["high"]) << 80) + (int(row["middle"]) << 40) + int(row["low"])
    return tally_of_sum(row["count"], ids_sum, row["recipient_index"])
