"""Books: a real spool reports to the ledger, both are compared while they move, and what a hand deleted is named."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from controlplane.adapters.postgres import books as books_module
from controlplane.adapters.postgres.books import PostgresBooks
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.leader import PostgresJobs
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.queue import PostgresQueue
from controlplane.adapters.postgres.queue_commands import QUEUE_SPOOL
from controlplane.domain.books import MOST_NAMED, Comparison, FindingKind
from controlplane.jobs.books import SILENT_AFTER, book_jobs
from controlplane.jobs.leader import Job
from controlplane.ports_fleet import WAITING_DAYS, BookHealth, RawBatch, SpoolOpening
from controlplane.services.auditing import Auditor
from dataplane.adapters.ledger_codec import encode_record
from dataplane.adapters.spool_sqlite import SqliteSpool
from dataplane.core.commands import NO_MESSAGE
from dataplane.core.ids import MessageId, format_message_id
from dataplane.core.ledger import CommandResult, LedgerRecord
from dataplane.core.queue import EventType, State, Verb
from dataplane.core.waiting import WaitingQuestion
from support.databases import Database
from support.fleet import NOW, NOW_MS, accepted, add_node, execute, fetch, fleet_database, message_id
from support.random_mail import Mail, harm
from support.replicated import add_account, ledger_states, queue_row, queued
from support.spools import ManualClock, open_durable

NODE = "node-1"
Found = tuple[FindingKind, str | None, int | None]


@dataclass
class Plane:
    """A ledger, a spool that reports to it, and what compares them."""

    database: Database
    fleet: FleetDatabase
    spool: SqliteSpool
    compared: asyncio.Queue[Comparison] = field(default_factory=asyncio.Queue)
    reasons: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.ledger = PostgresLedger(self.fleet, retention=timedelta(days=30))
        self.store = PostgresBooks(self.fleet)
        self.mail = Mail(self.spool, random.Random(7), NOW_MS)
        self.stored = 0
        self.time = NOW
        self.unheard = 0
        self.slow_s = 0.0

    async def open(self) -> None:
        """Begin to report."""
        await self.ledger.open_spool(NODE, SpoolOpening(self.name, 1, 0, 1, 0), NOW)

    @property
    def name(self) -> str:
        return self.spool.identity.spool

    async def report(self, most: int = 10_000) -> None:
        """Bring what the spool has to tell to the ledger, or a part of it."""
        first, records = await self.spool.records(self.stored, most, 1 << 30)
        if records:
            await self.ledger.store(NODE, RawBatch(self.name, 1, first, records), NOW)
            self.stored = first + len(records) - 1

    @contextlib.asynccontextmanager
    async def comparing(self, *, once: bool = False) -> AsyncIterator[None]:
        """Go round and round, or once: a round that is cut off may store what was so before."""

        async def ask(question: WaitingQuestion) -> None:
            if self.unheard:
                self.unheard -= 1
                return
            slow_s, self.slow_s = self.slow_s, 0.0
            await asyncio.sleep(slow_s)
            account = question.account and f"accounts/{question.account}"
            statement = await self.spool.waiting(question._replace(account=account))
            without = [(owner.removeprefix("accounts/"), one) for owner, one in statement.without_deadline]
            totals = [(owner.removeprefix("accounts/"), *rest) for owner, *rest in statement.totals]
            comparer.answered(statement._replace(totals=tuple(totals), without_deadline=tuple(without)))  # type: ignore[arg-type]

        def concluded(comparison: Comparison) -> None:
            self.compared.put_nowait(comparison)
            if once:
                task.cancel()

        auditor = Auditor(
            self.store,
            self.now,
            interval_s=0.01,
            report=lambda _, reason: self.reasons.put_nowait(reason),
            concluded=concluded,
            answer_s=2.0,
        )
        comparer = auditor.attend(NODE, ask)
        comparer.reports(self.name, taken=True)
        task = asyncio.create_task(comparer.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def now(self) -> Any:
        self.time += timedelta(seconds=1)
        return self.time

    async def compare(self) -> Comparison:
        """One comparison that begins now."""
        while not self.compared.empty():
            self.compared.get_nowait()
        async with self.comparing(once=True), asyncio.timeout(20):
            return await self.compared.get()

    async def findings(self, *, resolved: bool = False) -> list[Found]:
        """What is stored."""
        rows = await fetch(
            self.database,
            """
            SELECT kind, message_id::text, recipient_index FROM postroad.book_findings
            WHERE (resolve_time IS NOT NULL) = $1 ORDER BY kind, message_id, recipient_index
            """,
            resolved,
        )
        return [(FindingKind(row[0]), row[1], row[2]) for row in rows]


@pytest.fixture
async def plane(migrated_database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    await add_node(migrated_database, NODE)
    clock = ManualClock()
    clock.now_ms = NOW_MS
    spool = await open_durable(tmp_path / str(uuid.uuid4()), clock)
    async with fleet_database(migrated_database) as fleet:
        plane = Plane(migrated_database, fleet, spool)
        await plane.open()
        yield plane
    await spool.close()


def jobs_of(plane: Plane, sampled: Callable[[BookHealth], None] = lambda _: None) -> dict[str, Job]:
    """What the leader does, by name."""
    jobs = book_jobs(plane.store, retention=timedelta(days=30), sampled=sampled, concluded=lambda _: None)
    return {job.name: job for job in jobs}


def _named(kind: FindingKind, raw_id: MessageId, index: int = 0) -> Found:
    return kind, format_message_id(raw_id), index


async def _waiting(plane: Plane, count: int = 3) -> list[MessageId]:
    """Messages of one recipient that wait on both sides."""
    ids = [await plane.mail.accept(1) for _ in range(count)]
    for one in ids:
        await plane.mail.settle(one, {0: State.DEFERRED})
    await plane.report()
    return ids


# --- while nothing is wrong


async def test_a_question_that_was_lost_with_its_worker_does_not_put_the_next_round_off(plane: Plane) -> None:
    await plane.mail.accept(3)
    await plane.report()
    plane.unheard = 1
    assert (await plane.compare()).findings == ()
    assert plane.reasons.get_nowait() == "no answer"


async def test_a_node_that_stood_still_in_a_round_does_not_put_the_next_one_off(plane: Plane) -> None:
    await plane.mail.accept(3)
    await plane.report()
    async with plane.comparing(), asyncio.timeout(20):
        await plane.compared.get()
        plane.slow_s = 1.5
        for _ in range(4):
            await plane.compared.get()


async def test_both_sides_agree_while_they_move(plane: Plane) -> None:
    compared: list[Comparison] = []
    async with plane.comparing(), asyncio.timeout(60):
        while len({one.as_of_record for one in compared}) < 6:
            await plane.mail.step()
            await plane.mail.step()
            # The ledger is always a part of the way behind.
            await plane.report(most=plane.mail.choice.randint(1, 2))
            while not plane.compared.empty():
                compared.append(plane.compared.get_nowait())

    assert plane.reasons.empty()
    assert [(one.findings, one.unjudged) for one in compared] == [((), ())] * len(compared)
    assert all(book.agrees and book.ledger.balances for one in compared for book in one.books)
    assert await plane.findings() == []


async def test_a_book_counts_what_was_accepted_and_how_it_ended(plane: Plane) -> None:
    ends = [State.SENT, State.SENT, State.BOUNCED, State.FAILED, State.EXPIRED, State.CANCELLED, State.DEFERRED]
    at_once = await plane.mail.accept(len(ends))
    await plane.mail.settle(at_once, dict(enumerate(ends)))
    later = await plane.mail.accept(2)
    await plane.mail.settle(later, {0: State.DEFERRED})
    await plane.report()
    await plane.mail.settle(later, {0: State.SENT})
    await plane.report()

    (book,) = (await plane.compare()).books

    assert (book.account, book.spool, book.node, book.as_of_record) == ("demo", plane.name, NODE, 3)
    assert book.ledger.entries._asdict() == {
        "accepted": 9,
        "sent": 3,
        "bounced": 1,
        "failed": 1,
        "expired": 1,
        "cancelled": 1,
    }
    assert (book.ledger.waiting.count, book.spool_waiting.count, book.ledger.earlier) == (2, 2, 0)
    assert book.ledger.balances
    assert book.agrees


async def test_replicated_mail_is_in_no_book_of_a_spool_wherever_it_is(plane: Plane) -> None:
    """It waits in PostgreSQL, is sent from this spool, and ends there, while LOCAL mail is counted as ever."""
    await _waiting(plane, 2)
    await add_account(plane.database)
    queue = PostgresQueue(plane.fleet, plane.ledger)
    epoch = (await queue.renew(NODE, plane.name, 0)).epoch
    sent, deferred, sending, waiting, half = (message_id() for _ in range(5))
    for one in (sent, deferred, sending):
        await queue.store(NODE, "default", plane.name, epoch, [queued(one, "a@example.net")], NOW)
    await queue.store(NODE, "default", plane.name, epoch, [queued(waiting, "a@example.net", sending=False)], NOW)
    await queue.store(NODE, "default", plane.name, epoch, [queued(half, "a@example.net", "b@example.net")], NOW)
    for one in (sent, deferred, sending):
        await plane.mail.hold(MessageId(one), epoch)
    await plane.mail.hold(MessageId(half), epoch, 2)

    async def is_right() -> None:
        comparison = await plane.compare()
        (book,) = comparison.books
        assert (comparison.findings, comparison.unjudged) == ((), ())
        assert (book.agrees, book.ledger.balances) == (True, True)
        assert (book.ledger.entries.accepted, book.ledger.waiting.count, book.spool_waiting.count) == (2, 2, 2)

    await is_right()
    await plane.mail.give_back(MessageId(sent), epoch, State.SENT)
    await plane.mail.give_back(MessageId(deferred), epoch, State.DEFERRED)
    await plane.mail.give_back(MessageId(half), epoch, State.SENT)
    await is_right()  # the ledger does not know yet
    await plane.report()
    assert await ledger_states(plane.database, sent) == [int(State.SENT)]
    assert [await queue_row(plane.database, one) is None for one in (sent, deferred, sending)] == [True, False, False]
    await is_right()
    assert plane.reasons.empty()


async def test_a_silent_spool_is_not_said_to_hold_replicated_mail(plane: Plane) -> None:
    await add_account(plane.database)
    queue = PostgresQueue(plane.fleet, plane.ledger)
    epoch = (await queue.renew(NODE, plane.name, 0)).epoch
    await queue.store(NODE, "default", plane.name, epoch, [queued(message_id(), "a@example.net")], NOW)
    assert await plane.store.silent_spools(NOW + timedelta(days=400)) == []


async def test_what_comes_twice_or_cannot_be_stored_is_not_counted(plane: Plane) -> None:
    good, bad = accepted(message_id(), state=6), accepted(message_id(), state=99)
    records = [one.SerializeToString() for one in (good, bad, good)]

    await plane.ledger.store(NODE, RawBatch(plane.name, 1, 1, records), NOW)
    await plane.ledger.store(NODE, RawBatch(plane.name, 1, 1, records), NOW)

    rows = await fetch(plane.database, "SELECT account, day, accepted, sent FROM postroad.book_entries")
    assert [tuple(row) for row in rows] == [("demo", NOW.date(), 1, 1)]


# --- what a hand did


@pytest.mark.parametrize("deletion", ["DELETE FROM recipient WHERE message_id = ?", "DELETE FROM message WHERE id = ?"])
async def test_what_is_gone_from_a_spool_is_named(plane: Plane, deletion: str) -> None:
    lost, *_ = await _waiting(plane)
    assert (await plane.compare()).findings == ()

    harm(plane.spool, deletion, lost)

    (book,) = (await plane.compare()).books
    assert (book.agrees, book.ledger.waiting.count, book.spool_waiting.count) == (False, 3, 2)
    assert await plane.findings() == [_named(FindingKind.MISSING_IN_SPOOL, lost)]


async def command(plane: Plane, one: MessageId, verb: Verb) -> str:
    """A command of the account on a message."""
    (row,) = await fetch(
        plane.database,
        "INSERT INTO postroad.commands (account, verb, spool, message_ids)"
        " VALUES ('demo', $1, $2, ARRAY[$3::uuid]) RETURNING command",
        *(int(verb), plane.name, UUID(bytes=one)),
    )
    return str(row["command"])


async def answer(plane: Plane, name: str) -> tuple[int, int]:
    """The spool says that it does not have the message; what the ledger makes of that."""
    result = CommandResult(name, 0, 1)
    await plane.spool.write_record(encode_record(LedgerRecord(NO_MESSAGE, "accounts/demo", command_result=result)))
    await plane.report()
    (row,) = await fetch(
        plane.database,
        "SELECT changed_count, too_late_count FROM postroad.commands WHERE command = $1 AND done_time IS NOT NULL",
        name,
    )
    return row["changed_count"], row["too_late_count"]


@pytest.mark.parametrize(("verb", "state"), [(Verb.CANCEL, State.CANCELLED), (Verb.BOUNCE, State.FAILED)])
async def test_what_a_spool_has_lost_is_ended_by_a_command_once_the_books_say_so(
    plane: Plane, verb: Verb, state: State
) -> None:
    lost, kept, *_ = await _waiting(plane)
    harm(plane.spool, "DELETE FROM recipient WHERE message_id = ?", lost)

    assert await answer(plane, await command(plane, lost, verb)) == (0, 1)
    assert await ledger_states(plane.database, lost) == [int(State.DEFERRED)]
    await plane.compare()
    assert await answer(plane, await command(plane, lost, Verb.HOLD)) == (0, 1)
    assert await answer(plane, await command(plane, kept, verb)) == (0, 1)
    assert await answer(plane, await command(plane, lost, verb)) == (1, 0)
    assert await answer(plane, await command(plane, lost, verb)) == (0, 1)

    assert await ledger_states(plane.database, lost) == [int(state)]
    assert await ledger_states(plane.database, kept) == [int(State.DEFERRED)]
    events = await fetch(
        plane.database,
        "SELECT message_id, reply_text FROM postroad.delivery_events WHERE type = ANY ($1::smallint[])",
        [int(EventType.CANCELLED), int(EventType.FAILED)],
    )
    assert [tuple(row) for row in events] == [(UUID(bytes=lost), "its spool had lost it")]
    (book,) = (await plane.compare()).books
    assert book.ledger.balances
    assert book.agrees
    assert await plane.findings() == []
    assert await plane.findings(resolved=True) == [_named(FindingKind.MISSING_IN_SPOOL, lost)]


async def test_what_is_gone_from_the_ledger_is_named_and_the_book_does_not_balance(plane: Plane) -> None:
    lost, *_ = await _waiting(plane)

    await execute(plane.database, "DELETE FROM postroad.recipients WHERE message_id = $1", UUID(bytes=lost))

    (book,) = (await plane.compare()).books
    assert (book.agrees, book.ledger.balances) == (False, False)
    unbalanced = (FindingKind.UNBALANCED, None, None)
    assert await plane.findings() == [_named(FindingKind.MISSING_IN_LEDGER, lost), unbalanced]


async def test_a_message_that_is_gone_from_the_ledger_is_named(plane: Plane) -> None:
    lost, *_ = await _waiting(plane)

    await execute(plane.database, "DELETE FROM postroad.messages WHERE message_id = $1", UUID(bytes=lost))

    await plane.compare()
    assert _named(FindingKind.MISSING_IN_LEDGER, lost) in await plane.findings()


async def test_a_record_that_could_not_be_stored_leaves_its_mail_to_be_named(plane: Plane) -> None:
    plane.mail.now_ms = NOW_MS + 3 * 86_400_000
    unknown = await plane.mail.accept(1)
    await plane.mail.settle(unknown, {})
    await plane.report()

    await plane.compare()

    assert await plane.findings() == [_named(FindingKind.MISSING_IN_LEDGER, unknown)]


async def test_what_a_spool_set_aside_is_named_so(plane: Plane) -> None:
    lost, *_ = await _waiting(plane)
    harm(plane.spool, "UPDATE message SET checksum = checksum + 1 WHERE id = ?", lost)
    with contextlib.suppress(Exception):
        await plane.spool.load(lost)

    await plane.compare()

    assert await plane.findings() == [_named(FindingKind.QUARANTINED, lost)]


async def test_who_waits_without_a_time_is_named(plane: Plane) -> None:
    late, *_ = await _waiting(plane)

    harm(plane.spool, "UPDATE recipient SET due_ms = 0 WHERE message_id = ?", late)

    await plane.compare()
    assert await plane.findings() == [_named(FindingKind.NO_DEADLINE, late)]


async def test_a_finding_that_is_over_is_resolved_and_kept(plane: Plane) -> None:
    late, *_ = await _waiting(plane)
    harm(plane.spool, "UPDATE recipient SET due_ms = 0 WHERE message_id = ?", late)
    await plane.compare()
    await plane.compare()
    assert len(await plane.findings()) == 1

    harm(plane.spool, "UPDATE recipient SET due_ms = ? WHERE message_id = ?", NOW_MS, late)
    await plane.compare()

    assert await plane.findings() == []
    assert await plane.findings(resolved=True) == [_named(FindingKind.NO_DEADLINE, late)]


async def test_many_are_named_in_part_and_counted(plane: Plane) -> None:
    await _waiting(plane, MOST_NAMED + 20)
    harm(plane.spool, "DELETE FROM recipient")

    comparison = await plane.compare()

    assert comparison.unjudged == ("demo",)
    named = [one for one in comparison.findings if one.message_id is not None]
    assert 0 < len(named) <= MOST_NAMED


# --- what cannot be compared


async def test_a_spool_that_cannot_answer_keeps_its_books(plane: Plane) -> None:
    await _waiting(plane)
    before = await plane.compare()
    await execute(plane.database, "UPDATE postroad.spools SET cursor = 1000")

    async with plane.comparing(), asyncio.timeout(20):
        reason = await plane.reasons.get()

    assert "1000 was asked for" in reason
    rows = await fetch(plane.database, "SELECT as_of_record, waiting FROM postroad.books")
    assert [tuple(row) for row in rows] == [(before.as_of_record, 3)]


async def test_a_silent_spool_is_named_with_its_mail_until_it_speaks(plane: Plane) -> None:
    ids = await _waiting(plane)
    jobs = {
        job.name: job
        for job in book_jobs(
            plane.store, retention=timedelta(days=30), sampled=lambda _: None, concluded=lambda _: None
        )
    }
    await execute(plane.database, "UPDATE postroad.spools SET create_time = $1", NOW - 2 * SILENT_AFTER)

    await jobs["report_silent_spools"].run(NOW)

    silent = sorted(_named(FindingKind.SPOOL_SILENT, one) for one in ids)
    assert await plane.findings() == silent
    await plane.compare()
    assert await plane.findings() == []


async def test_mail_of_a_spool_that_nobody_knows_any_more_is_named(plane: Plane) -> None:
    (lost,) = await _waiting(plane, 1)
    await plane.compare()
    await execute(plane.database, "DELETE FROM postroad.spools")
    jobs = {
        job.name: job
        for job in book_jobs(
            plane.store, retention=timedelta(days=30), sampled=lambda _: None, concluded=lambda _: None
        )
    }

    await jobs["forget_books"].run(NOW)
    await jobs["report_silent_spools"].run(NOW)

    assert await fetch(plane.database, "SELECT FROM postroad.books") == []
    assert await plane.findings() == [_named(FindingKind.SPOOL_SILENT, lost)]


async def test_books_end_with_the_days_that_are_kept(plane: Plane) -> None:
    await _waiting(plane)
    seen: list[BookHealth] = []
    jobs = jobs_of(plane, seen.append)
    first_day = NOW.date() + timedelta(days=1)

    # Its mail waits, and so the day is kept for longer.
    assert await PostgresJobs(plane.fleet).drop_partitions(first_day) == 0
    await jobs["forget_books"].run(NOW + timedelta(days=31))
    (book,) = (await plane.compare()).books
    assert (book.ledger.entries.accepted, book.ledger.balances, book.agrees) == (3, True, True)

    assert await PostgresJobs(plane.fleet).drop_partitions(first_day + timedelta(days=WAITING_DAYS)) > 0
    await jobs["forget_books"].run(NOW + timedelta(days=30))
    assert len(await fetch(plane.database, "SELECT FROM postroad.book_entries")) == 1
    await jobs["forget_books"].run(NOW + timedelta(days=31))
    assert await fetch(plane.database, "SELECT FROM postroad.book_entries") == []
    await jobs["compare_queue"].run(NOW)
    await jobs["forget_books"].run(NOW)
    await jobs["count_findings"].run(NOW + timedelta(seconds=30))
    assert seen[0].findings == {}
    assert seen[0].ages_s.keys() == {plane.name, str(QUEUE_SPOOL)}


async def test_mail_of_before_the_books_is_compared_and_not_counted(plane: Plane) -> None:
    await execute(plane.database, "UPDATE postroad.book_start SET first_day = $1", NOW.date() + timedelta(days=1))
    await _waiting(plane)

    (book,) = (await plane.compare()).books

    assert (book.ledger.entries.accepted, book.ledger.waiting.count, book.ledger.earlier) == (0, 3, 3)
    assert book.ledger.balances
    assert book.agrees


async def test_an_account_counts_nothing_of_a_former_one_that_had_its_id(plane: Plane) -> None:
    await _waiting(plane)
    await execute(
        plane.database, "INSERT INTO postroad.node_pools (node_pool) VALUES ('default') ON CONFLICT DO NOTHING"
    )
    taken_over = "INSERT INTO postroad.accounts (account, node_pool, messages_since) VALUES ('demo', 'default', $1)"
    await execute(plane.database, taken_over, NOW)

    (book,) = (await plane.compare()).books

    assert (book.ledger.entries.accepted, book.ledger.waiting.count, book.ledger.earlier) == (0, 3, 3)
    assert book.ledger.balances
    assert book.agrees

    # From the day after on it is its own.
    await execute(plane.database, "UPDATE postroad.accounts SET messages_since = $1", NOW - timedelta(days=1))
    (book,) = (await plane.compare()).books
    assert (book.ledger.entries.accepted, book.ledger.earlier, book.ledger.balances) == (3, 0, True)


# --- what it costs


async def test_who_waits_is_found_by_an_index_among_many_who_do_not(plane: Plane) -> None:
    await plane.ledger.store(NODE, RawBatch(plane.name, 1, 1, [accepted(message_id()).SerializeToString()]), NOW)
    spool = UUID(plane.name)
    await execute(
        plane.database,
        """
        WITH new AS (
            INSERT INTO postroad.messages (
                message_id, account, accept_time, sender, size_bytes, header_message_id, subject, credential,
                client_address, client_helo, client_tls, session, node, spool
            )
            SELECT (substr(m.message_id::text, 1, 24) || lpad(to_hex(n), 12, '0'))::uuid, 'demo', now(), '', 1, '', '',
                '', '', '', '', '', 'node-1', m.spool
            FROM postroad.messages AS m, generate_series(1, 50000) AS n
            RETURNING message_id
        )
        INSERT INTO postroad.recipients (message_id, recipient_index, account, address, state, attempts, update_time)
        SELECT message_id, 0, 'demo', 'a@example.net', CASE WHEN random() < 0.01 THEN 4 ELSE 6 END, 1, now() FROM new
        """,
    )
    await execute(plane.database, "ANALYZE postroad.recipients, postroad.messages")
    queries = [
        (books_module.WAITING_TOTALS, [spool], NOW.date()),
        (books_module.WAITING_BY_BUCKET, [spool], "demo"),
        (books_module.WAITING_BY_NAME, [spool], "demo", ["000"]),
    ]

    for sql, *arguments in queries:
        plan = "\n".join(row[0] for row in await fetch(plane.database, f"EXPLAIN {sql}", *arguments))
        assert "Seq Scan on recipients" not in plan, plan
        assert "Seq Scan on messages" not in plan, plan
