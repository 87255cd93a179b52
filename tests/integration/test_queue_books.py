"""The books of the replicated queue: they balance whatever becomes of mail, and name what a hand did to it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from controlplane.adapters.postgres.books import PostgresBooks
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.leader import PostgresJobs
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.queue import PostgresQueue
from controlplane.adapters.postgres.queue_commands import QUEUE_SPOOL
from controlplane.domain.books import Comparison, FindingKind
from dataplane.core.queue import State, Verb
from support.databases import Database
from support.fleet import NOW, accepted, add_node, changed, execute, fetch, fleet_database, message_id, text_id, update
from support.replicated import Holder, add_account, end_lease, queue_row

ENDS = (State.SENT, State.BOUNCED, State.FAILED, State.EXPIRED)


@pytest.fixture
async def database(migrated_database: Database) -> AsyncIterator[FleetDatabase]:
    for node in ("edge-1", "edge-2"):
        await add_node(migrated_database, node)
    for account in ("demo", "small"):
        await add_account(migrated_database, account)
    async with fleet_database(migrated_database) as made:
        yield made


@pytest.fixture
async def holder(database: FleetDatabase) -> Holder:
    ledger = PostgresLedger(database, retention=timedelta(days=30))
    return await Holder(PostgresQueue(database, ledger), ledger).begin()


@pytest.fixture
async def other(holder: Holder) -> Holder:
    return await Holder(holder.queue, holder.ledger, "edge-2").begin()


async def compare(database: FleetDatabase) -> Comparison:
    return await PostgresBooks(database).compare_queue(NOW)


async def is_right(database: FleetDatabase) -> Comparison:
    comparison = await compare(database)
    assert comparison.findings == ()
    assert all(book.agrees and book.ledger.balances for book in comparison.books)
    return comparison


async def found(database: Database, *, resolved: bool = False) -> set[tuple[FindingKind, str | None]]:
    rows = await fetch(
        database,
        "SELECT kind, message_id::text FROM postroad.book_findings"
        " WHERE spool = $1 AND (resolve_time IS NOT NULL) = $2",
        *(QUEUE_SPOOL, resolved),
    )
    return {(FindingKind(row[0]), row[1]) for row in rows}


async def command(database: Database, verb: Verb, raw_id: bytes, account: str = "demo") -> None:
    await execute(
        database,
        "INSERT INTO postroad.commands (account, verb, spool, message_ids) VALUES ($1, $2, $3, ARRAY[$4::uuid])",
        *(account, int(verb), QUEUE_SPOOL, text_id(raw_id)),
    )


async def test_a_book_counts_what_was_accepted_and_how_it_ended(
    holder: Holder, other: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    """By two nodes, by a command, by a job and by the deletion of an account."""
    both = await holder.store("a@example.net", "b@example.net")
    await holder.report(changed(both, update(0, State.SENT), update(1, State.BOUNCED)))
    moved = await holder.store()
    await holder.report(changed(moved, update(0, State.DEFERRED)))
    claim_id, claimed = await other.claim()
    await other.confirm(claim_id, claimed)
    await other.report(changed(moved, update(0, State.SENT, attempts=2)))
    cancelled, bounced = await holder.store(sending=False), await holder.store(sending=False)
    await command(migrated_database, Verb.CANCEL, cancelled)
    await command(migrated_database, Verb.BOUNCE, bounced)
    await holder.store(sending=False, hold_s=3_600)
    await holder.store(account="small", sending=False)
    assert len((await holder.claim(adopt=False))[1]) == 1
    (book, small) = (await is_right(database)).books
    assert (book.account, book.spool, book.node) == ("demo", str(QUEUE_SPOOL), "")
    assert book.ledger.entries._asdict() == {
        "accepted": 6,
        "sent": 2,
        "bounced": 1,
        "failed": 1,
        "expired": 0,
        "cancelled": 1,
    }
    assert (book.ledger.waiting.count, book.spool_waiting.count, small.ledger.waiting.count) == (1, 1, 1)
    await execute(
        migrated_database, "UPDATE postroad.replicated_queue SET epoch = NULL, claim_id = NULL, claim_time = NULL"
    )
    await execute(migrated_database, "UPDATE postroad.queue_recipients SET state = 2 WHERE state = 3")
    await execute(migrated_database, "DELETE FROM postroad.accounts WHERE account = 'small'")
    await PostgresJobs(database).sweep_queue(NOW - timedelta(days=1))
    assert await PostgresJobs(database).end_left_behind(100) == 1
    (_, small) = (await is_right(database)).books
    assert (small.ledger.entries.accepted, small.ledger.entries.failed, small.ledger.waiting.count) == (1, 1, 0)


async def test_the_book_of_a_name_balances_while_mail_of_its_former_account_waits_and_ends(
    holder: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    for _ in range(2):
        await holder.store("a@example.net", sending=False)
    await execute(migrated_database, "DELETE FROM postroad.accounts WHERE account = 'demo'")
    await add_account(migrated_database)
    await holder.store("a@example.net", sending=False)
    await is_right(database)
    assert await PostgresJobs(database).end_left_behind(100) == 2
    (book,) = (await is_right(database)).books
    assert (book.ledger.entries.accepted, book.ledger.entries.failed) == (3, 2)
    assert (book.ledger.waiting.count, book.spool_waiting.count) == (1, 1)


@pytest.mark.parametrize("seed", range(3))
async def test_the_book_balances_whatever_becomes_of_mail(
    holder: Holder, other: Holder, database: FleetDatabase, migrated_database: Database, seed: int
) -> None:
    choice = random.Random(seed)
    ids: list[bytes] = []
    # Who held what, under which lease, in which attempt: they may report, however late.
    held: list[tuple[Holder, int, bytes, int]] = []
    for _ in range(60):
        one = choice.choice((holder, other))
        match choice.randrange(6):
            case 0 | 1:
                sending = choice.random() < 0.5
                ids.append(await one.store("a@example.net", "b@example.net", sending=sending))
                held += [(one, one.epoch, ids[-1], 1)] if sending else []
            case 2:
                claim_id, claimed = await one.claim(choice.randint(1, 5))
                if choice.random() < 0.7 and await one.confirm(claim_id, claimed):
                    held += [(one, one.epoch, each.message_id, each.recipients[0].attempt) for each in claimed]
            case 3 if held:
                who, epoch, raw_id, attempt = choice.choice(held)
                state = choice.choice((*ENDS, State.DEFERRED, State.QUEUED))
                told = update(choice.randrange(2), state, attempts=attempt)
                await who.report(changed(raw_id, told), epoch=epoch)
            case 4 if ids:
                await command(migrated_database, choice.choice(tuple(Verb)[:5]), choice.choice(ids))
            case 5 if choice.random() < 0.3:
                await end_lease(migrated_database, one.epoch)
                await (other if one is holder else holder).claim(1)
                one.epoch = (await one.queue.renew(one.node, one.spool, 0)).epoch
        await is_right(database)


async def test_who_is_sent_by_one_node_when_another_tells_its_end_is_on_neither_side(
    holder: Holder, other: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    raw_id, former = await holder.store(), holder.epoch
    await end_lease(migrated_database, former)
    claim_id, claimed = await other.claim()
    await other.confirm(claim_id, claimed)
    await holder.report(changed(raw_id, update(0, State.SENT)), epoch=former)
    (book,) = (await is_right(database)).books
    assert (book.ledger.entries.sent, book.ledger.waiting.count) == (1, 0)
    await other.report(changed(raw_id, update(0, State.SENT, attempts=2)))
    (book,) = (await is_right(database)).books
    assert book.ledger.entries.sent == 1


async def test_what_a_hand_did_is_named_and_over_when_it_is_mended(
    holder: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    lost, ended, late, stuck, kept = [await holder.store(sending=False) for _ in range(5)]
    away = await holder.store()
    sql = (
        "DELETE FROM postroad.queue_recipients WHERE message_id = $1",
        "UPDATE postroad.recipients SET state = 6 WHERE message_id = $1",
        "UPDATE postroad.replicated_queue SET due_time = 'infinity' WHERE message_id = $1",
        "UPDATE postroad.replicated_queue SET epoch = 999999 WHERE message_id = $1",
    )
    for statement, raw_id in zip(sql, (lost, ended, late, stuck), strict=True):
        await execute(migrated_database, statement, text_id(raw_id))
    await compare(database)
    named = {
        (FindingKind.MISSING_IN_SPOOL, str(text_id(lost))),
        (FindingKind.MISSING_IN_LEDGER, str(text_id(ended))),
        (FindingKind.UNBALANCED, None),
        (FindingKind.NO_DEADLINE, str(text_id(late))),
        (FindingKind.NO_DEADLINE, str(text_id(stuck))),
    }
    assert await found(migrated_database) == named
    mending = (
        "INSERT INTO postroad.queue_recipients VALUES ($1, 0, 2, 0, now())",
        "UPDATE postroad.recipients SET state = 2 WHERE message_id = $1",
        "UPDATE postroad.replicated_queue SET due_time = '2026-01-01' WHERE message_id = $1",
        "UPDATE postroad.replicated_queue SET epoch = NULL WHERE message_id = $1",
    )
    for statement, raw_id in zip(mending, (lost, ended, late, stuck), strict=True):
        await execute(migrated_database, statement, text_id(raw_id))
    await PostgresBooks(database).compare_queue(NOW + timedelta(minutes=1))
    assert await found(migrated_database) == set()
    assert await found(migrated_database, resolved=True) == named
    assert {await queue_row(migrated_database, raw_id) is None for raw_id in (kept, away)} == {False}


async def test_local_mail_is_in_no_book_of_the_queue(holder: Holder, database: FleetDatabase) -> None:
    await holder.store()
    await holder.report(accepted(message_id()), accepted(message_id(), state=State.SENT), epoch=0)
    (book,) = (await is_right(database)).books
    assert (book.ledger.entries.accepted, book.ledger.waiting.count) == (1, 1)
