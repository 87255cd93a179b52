"""The replicated queue in PostgreSQL: who holds what, what a lease's end does, what comes too late."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest

from controlplane.adapters.postgres import queue, queue_reports
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.leader import PostgresJobs
from controlplane.adapters.postgres.ledger import COUNT_OWN, PostgresLedger
from controlplane.adapters.postgres.queue import BY_AGE, CLAIMED_OF_ACCOUNT, PostgresQueue
from controlplane.adapters.postgres.queue_commands import QUEUE_SPOOL
from controlplane.ports_queue import BadQueueRequestError, LeaseLostError, QueuedMessage, Repeated, SpoolOwnershipError
from postroad.node.v1.ledger_pb2 import EventType, RecipientState
from support.databases import Database
from support.fleet import (
    NOW,
    NOW_MS,
    accepted,
    add_node,
    changed,
    event,
    execute,
    fetch,
    fleet_database,
    message_id,
    text_id,
    update,
)
from support.replicated import (
    Holder,
    add_account,
    end_lease,
    event_types,
    ledger_states,
    queue_row,
    queue_states,
    queued,
)

SCHEDULED, QUEUED, SENDING, DEFERRED, HELD, SENT, CANCELLED = (
    RecipientState.RECIPIENT_STATE_SCHEDULED,
    RecipientState.RECIPIENT_STATE_QUEUED,
    RecipientState.RECIPIENT_STATE_SENDING,
    RecipientState.RECIPIENT_STATE_DEFERRED,
    RecipientState.RECIPIENT_STATE_HELD,
    RecipientState.RECIPIENT_STATE_SENT,
    RecipientState.RECIPIENT_STATE_CANCELLED,
)
UNCERTAIN = EventType.EVENT_TYPE_UNCERTAIN


@pytest.fixture
async def database(migrated_database: Database) -> AsyncIterator[FleetDatabase]:
    await add_node(migrated_database)
    await add_node(migrated_database, "edge-2")
    await add_account(migrated_database)
    async with fleet_database(migrated_database) as made:
        yield made


@pytest.fixture
async def holder(database: FleetDatabase) -> Holder:
    ledger = PostgresLedger(database, retention=timedelta(days=30))
    return await Holder(PostgresQueue(database, ledger), ledger).begin()


@pytest.fixture
async def other(holder: Holder) -> Holder:
    """Another node."""
    return await Holder(holder.queue, holder.ledger, "edge-2").begin()


async def test_what_is_stored_is_in_queue_and_ledger_and_the_leases(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    raw_id = await holder.store("a@example.net", "b@example.net")
    assert (await queue_row(migrated_database, raw_id))["epoch"] == holder.epoch
    assert await queue_states(migrated_database, raw_id) == [(SENDING, 1), (SENDING, 1)]
    assert await ledger_states(migrated_database, raw_id) == [QUEUED, QUEUED]
    assert (await other.claim())[1] == []


async def test_an_outcome_leaves_the_queue_with_the_record_that_tells_it(
    holder: Holder, migrated_database: Database
) -> None:
    raw_id = await holder.store("a@example.net", "b@example.net")
    await holder.report(changed(raw_id, update(0, SENT)))
    assert await queue_states(migrated_database, raw_id) == [(SENDING, 1)]
    await holder.report(changed(raw_id, update(1, SENT)))
    assert await queue_row(migrated_database, raw_id) is None
    assert await fetch(migrated_database, "SELECT 1 FROM postroad.queue_contents") == []
    assert await ledger_states(migrated_database, raw_id) == [SENT, SENT]


@pytest.mark.parametrize("off_ms", [0, 3_600_000, -3_600_000])
async def test_what_was_deferred_waits_for_anybody_until_it_is_due(
    holder: Holder, other: Holder, migrated_database: Database, off_ms: int
) -> None:
    raw_id = await holder.store()
    # The node's clock is an hour ahead, or behind: what counts is how long it wants to wait.
    deferred = update(0, DEFERRED, at_ms=NOW_MS + off_ms)
    deferred.next_attempt_ms = NOW_MS + off_ms + 600_000
    await holder.report(changed(raw_id, deferred))
    row = await queue_row(migrated_database, raw_id)
    assert row["epoch"] is None
    assert (await other.claim(now=row["due_time"] - timedelta(seconds=1)))[1] == []
    (by_database,) = await fetch(migrated_database, "SELECT now() AS now")
    assert timedelta(0) <= by_database["now"] + timedelta(minutes=10) - row["due_time"] < timedelta(minutes=5)
    claim_id, claimed = await other.claim(now=row["due_time"])
    assert [(one.message_id, one.content) for one in claimed] == [(raw_id, b"hello\r\n")]
    assert [(one.index, one.attempt) for one in claimed[0].recipients] == [(0, 2)]
    assert await other.confirm(claim_id, claimed) == [raw_id]


async def test_a_claim_that_nobody_confirmed_returns_after_a_minute_and_was_no_attempt(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    raw_id = await holder.store(sending=False)
    claim_id, claimed = await holder.claim()
    assert len(claimed) == 1
    claim_time = (await queue_row(migrated_database, raw_id))["claim_time"]
    assert (await other.claim(now=claim_time + timedelta(seconds=59), adopt=False))[1] == []
    (again,) = (await other.claim(now=claim_time + timedelta(seconds=61), adopt=False))[1]
    assert [one.attempt for one in again.recipients] == [1]
    assert await event_types(migrated_database, raw_id) == []
    # Whoever claimed it first comes too late.
    assert await holder.confirm(claim_id, claimed) == []


async def test_two_claimers_never_get_the_same_message(holder: Holder, other: Holder) -> None:
    ids = {await holder.store(sending=False) for _ in range(60)}
    taken: list[bytes] = []
    for _ in range(10):
        both = await asyncio.gather(*(one.claim(7) for one in (holder, other) * 2))
        taken += [one.message_id for _, claimed in both for one in claimed]
    assert len(taken) == len(set(taken))
    assert set(taken) == ids


async def test_a_claim_and_the_end_of_a_lease_take_what_a_transaction_has_time_for(
    holder: Holder, other: Holder, migrated_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_reports, "RECIPIENTS_AT_ONCE", 5)
    many = [f"r{number}@example.net" for number in range(7)]
    stored = [await holder.store(*many[:count], sending=False) for count in (2, 2, 2, 7, 1)]
    claims = [await holder.claim() for _ in range(4)]
    assert [[len(one.recipients) for one in claimed] for _, claimed in claims] == [[2, 2], [2], [7], [1]]
    for claim_id, claimed in claims:
        await holder.confirm(claim_id, claimed)

    await end_lease(migrated_database, holder.epoch)
    monkeypatch.setattr(queue_reports, "RECIPIENTS_AT_ONCE", 8)
    again: list[bytes] = []
    returned = []
    for _ in range(6):
        again += [one.message_id for one in (await other.claim())[1]]
        count = "SELECT count(*) AS n FROM postroad.delivery_events WHERE type = $1"
        returned.append((await fetch(migrated_database, count, int(UNCERTAIN)))[0]["n"])
    assert all(later - former <= 8 for former, later in pairwise([0, *returned]))
    assert returned[0] < returned[-1] == 14
    assert sorted(again) == sorted(stored)


async def test_what_an_ended_lease_was_sending_is_uncertain_and_another_node_has_it(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    raw_id = await holder.store()
    assert (await other.claim())[1] == []
    await end_lease(migrated_database, holder.epoch)
    assert (await other.claim(adopt=False))[1] == []
    claim_id, (claimed,) = await other.claim()
    assert [one.attempt for one in claimed.recipients] == [2]
    assert await event_types(migrated_database, raw_id) == [UNCERTAIN]
    assert await other.confirm(claim_id, [claimed]) == [raw_id]


async def test_what_an_ended_lease_was_sending_is_held_where_the_account_chose_so(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    await add_account(migrated_database, "careful", uncertain=2)
    raw_id = await holder.store(account="careful")
    waiting = await holder.store(account="careful", sending=False)
    await end_lease(migrated_database, holder.epoch)
    _, claimed = await other.claim()
    assert [one.message_id for one in claimed] == [waiting]
    assert await queue_states(migrated_database, raw_id) == [(HELD, 1)]
    assert await ledger_states(migrated_database, raw_id) == [HELD]
    assert await event_types(migrated_database, raw_id) == [UNCERTAIN]


async def test_a_worker_that_finds_its_own_attempt_uncertain_has_it_held_too(
    holder: Holder, migrated_database: Database
) -> None:
    await add_account(migrated_database, "careful", uncertain=2)
    raw_id = await holder.store(account="careful")
    record = changed(raw_id, update(0, QUEUED), events=(event(UNCERTAIN, 0),))
    record.account = "accounts/careful"
    await holder.report(record)
    assert await queue_states(migrated_database, raw_id) == [(HELD, 1)]
    assert await ledger_states(migrated_database, raw_id) == [HELD]


async def test_what_a_lost_lease_reports_changes_nothing_in_the_queue(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    raw_id = await holder.store()
    await end_lease(migrated_database, holder.epoch)
    claim_id, claimed = await other.claim()
    await other.confirm(claim_id, claimed)
    await holder.report(changed(raw_id, update(0, DEFERRED)))
    await holder.report(changed(raw_id, update(0, QUEUED, attempts=1)))
    assert await queue_states(migrated_database, raw_id) == [(SENDING, 2)]
    assert (await queue_row(migrated_database, raw_id))["epoch"] == other.epoch
    await other.report(changed(raw_id, update(0, SENT, attempts=2)))
    assert await queue_row(migrated_database, raw_id) is None


async def test_an_end_that_a_former_lease_tells_late_saves_another_copy(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    """The node slept; its mail waits again when it says that it had been sent."""
    raw_id, former = await holder.store("a@example.net", "b@example.net"), holder.epoch
    await end_lease(migrated_database, former)
    assert len((await other.claim())[1]) == 1
    await execute(migrated_database, "UPDATE postroad.replicated_queue SET claim_time = claim_time - interval '1 hour'")
    other.epoch = (await other.queue.renew(other.node, other.spool, other.epoch)).epoch
    await execute(
        migrated_database, "UPDATE postroad.replicated_queue SET epoch = NULL, claim_id = NULL, claim_time = NULL"
    )
    await execute(migrated_database, "UPDATE postroad.queue_recipients SET state = 2")
    await holder.report(changed(raw_id, update(0, SENT)), epoch=former)
    assert await queue_states(migrated_database, raw_id) == [(QUEUED, 2)]
    _, (again,) = await other.claim()
    assert [one.index for one in again.recipients] == [1]


async def test_what_was_sent_before_is_not_sent_again_when_the_next_attempt_is_put_off(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    raw_id, former = await holder.store(), holder.epoch
    await end_lease(migrated_database, former)
    claim_id, claimed = await other.claim()
    await other.confirm(claim_id, claimed)
    await holder.report(changed(raw_id, update(0, SENT)), epoch=former)
    assert await queue_states(migrated_database, raw_id) == [(SENDING, 2)]
    await other.report(changed(raw_id, update(0, DEFERRED, attempts=2)))
    assert await queue_row(migrated_database, raw_id) is None
    assert await ledger_states(migrated_database, raw_id) == [SENT]


@pytest.mark.parametrize("end", [SENT, RecipientState.RECIPIENT_STATE_BOUNCED])
async def test_an_end_of_an_attempt_before_the_one_that_was_put_off_is_believed(
    holder: Holder, other: Holder, migrated_database: Database, end: int
) -> None:
    raw_id, former = await holder.store(), holder.epoch
    await end_lease(migrated_database, former)
    claim_id, claimed = await other.claim()
    await other.confirm(claim_id, claimed)
    await other.report(changed(raw_id, update(0, DEFERRED, attempts=2)))
    await holder.report(changed(raw_id, update(0, DEFERRED, attempts=1)), epoch=former)
    assert await queue_states(migrated_database, raw_id) == [(DEFERRED, 2)]
    await holder.report(changed(raw_id, update(0, end, attempts=1)), epoch=former)
    assert await queue_row(migrated_database, raw_id) is None
    assert await ledger_states(migrated_database, raw_id) == [end]
    (row,) = await fetch(migrated_database, "SELECT attempts FROM postroad.recipients")
    assert row["attempts"] == 2


async def test_a_former_lease_of_the_same_spool_is_another_lease(holder: Holder, migrated_database: Database) -> None:
    """It takes over its own mail; what is said under the old lease then is too late."""
    raw_id, former = await holder.store(), holder.epoch
    await end_lease(migrated_database, former)
    holder.epoch = (await holder.queue.renew(holder.node, holder.spool, former)).epoch
    assert holder.epoch != former
    claim_id, claimed = await holder.claim()
    assert await holder.confirm(claim_id, claimed) == [raw_id]
    await holder.report(changed(raw_id, update(0, QUEUED, attempts=1)), epoch=former)
    assert await queue_states(migrated_database, raw_id) == [(SENDING, 2)]


async def test_an_epoch_may_not_be_borrowed(holder: Holder, other: Holder, migrated_database: Database) -> None:
    raw_id = await holder.store()
    await other.report(changed(raw_id, update(0, DEFERRED)), epoch=holder.epoch, rejected=1)
    assert await queue_states(migrated_database, raw_id) == [(SENDING, 1)]
    with pytest.raises(LeaseLostError):
        await other.queue.fetch_content(other.node, other.spool, other.epoch, raw_id, 0)
    other.epoch = holder.epoch
    with pytest.raises(LeaseLostError):
        await other.store()
    with pytest.raises(SpoolOwnershipError):
        await other.queue.renew(other.node, holder.spool, 0)


async def test_nodes_of_other_pools_have_no_say(holder: Holder, migrated_database: Database) -> None:
    """Nor has one that guesses."""
    await add_node(migrated_database, "stranger-1", "strangers")
    stranger = await Holder(holder.queue, holder.ledger, "stranger-1", "strangers").begin()
    raw_id, waiting = await holder.store(), await holder.store(sending=False)
    for epoch in (stranger.epoch, holder.epoch, stranger.epoch + 1_000, 0):
        for message in (raw_id, waiting):
            record = changed(message, update(0, SENT), events=(event(EventType.EVENT_TYPE_SENT, 0),))
            await stranger.report(record, epoch=epoch, rejected=1)
    assert await queue_states(migrated_database, raw_id) == [(SENDING, 1)]
    assert await queue_states(migrated_database, waiting) == [(QUEUED, 0)]
    assert await ledger_states(migrated_database, raw_id) == [QUEUED]
    assert await event_types(migrated_database, raw_id) == []
    # What it may not say takes nothing from what it may.
    await add_account(migrated_database, "strange", "strangers")
    own = await stranger.store(account="strange")
    sent = changed(own, update(0, SENT))
    sent.account = "accounts/strange"
    await stranger.report(changed(raw_id, update(0, SENT)), sent, rejected=1)
    assert await ledger_states(migrated_database, own) == [SENT]


async def test_a_node_of_the_pool_has_no_say_without_a_lease(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    raw_id = await holder.store(sending=False)
    for epoch in (0, other.epoch + 1_000, holder.epoch):
        await other.report(changed(raw_id, update(0, SENT)), epoch=epoch, rejected=1)
    assert await ledger_states(migrated_database, raw_id) == [QUEUED]


@pytest.mark.parametrize("moves", ["nobody", "account", "node"])
async def test_a_lease_that_holds_mail_counts_whoever_moves_to_another_pool(
    holder: Holder, other: Holder, migrated_database: Database, moves: str
) -> None:
    raw_id = await holder.store("a@example.net", sending=False)
    claim_id, claimed = await other.claim()
    await other.confirm(claim_id, claimed)
    await execute(migrated_database, "INSERT INTO postroad.node_pools (node_pool) VALUES ('elsewhere')")
    if moves == "account":
        await execute(migrated_database, "UPDATE postroad.accounts SET node_pool = 'elsewhere'")
    elif moves == "node":
        await execute(migrated_database, "UPDATE postroad.nodes SET node_pool = 'elsewhere' WHERE node = 'edge-2'")
    await other.report(changed(raw_id, update(0, SENT)))
    assert await queue_row(migrated_database, raw_id) is None
    assert await ledger_states(migrated_database, raw_id) == [SENT]


async def test_an_end_that_is_told_days_after_its_lease_is_believed(
    holder: Holder, other: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    raw_id = await holder.store(sending=False)
    claim_id, claimed = await other.claim()
    await other.confirm(claim_id, claimed)
    await end_lease(migrated_database, other.epoch, 40 * 86_400)
    # First it gives its mail back, then it holds nothing.
    for _ in range(2):
        await holder.claim(0)
    assert await queue_states(migrated_database, raw_id) == [(QUEUED, 1)]
    jobs = PostgresJobs(database)
    await jobs.delete_leases(NOW - timedelta(days=41))
    await other.report(changed(raw_id, update(0, SENT)))
    assert await queue_row(migrated_database, raw_id) is None
    assert await ledger_states(migrated_database, raw_id) == [SENT]
    await jobs.delete_leases(NOW - timedelta(days=39))
    (left,) = await fetch(migrated_database, "SELECT spool FROM postroad.node_leases")
    assert str(left["spool"]) == holder.spool


async def make_anew(database: Database, account: str = "demo") -> None:
    """The account is deleted, and another one has its name."""
    await execute(database, "DELETE FROM postroad.accounts WHERE account = $1", account)
    await add_account(database, account)


async def uid_of(database: Database, account: str = "demo") -> str:
    (row,) = await fetch(database, "SELECT uid FROM postroad.accounts WHERE account = $1", account)
    return str(row["uid"])


async def test_mail_of_a_former_account_is_ended_and_keeps_nobody_waiting(
    holder: Holder, other: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    waiting = [await holder.store(sending=False) for _ in range(CLAIMED_OF_ACCOUNT + 1)]
    sending = await holder.store()
    await make_anew(migrated_database)
    fresh = await holder.store(sending=False)
    _, claimed = await other.claim()
    assert [one.message_id for one in claimed] == [fresh]
    jobs = PostgresJobs(database)
    assert await jobs.end_left_behind(20) == 20
    assert await jobs.end_left_behind(20) == 1
    for raw_id in waiting:
        assert await queue_row(migrated_database, raw_id) is None
        assert await ledger_states(migrated_database, raw_id) == [RecipientState.RECIPIENT_STATE_FAILED]
    # What a node holds is ended when it gives it back.
    assert await queue_states(migrated_database, sending) == [(SENDING, 1)]
    await holder.report(changed(sending, update(0, DEFERRED)))
    assert await jobs.end_left_behind(20) == 1
    assert await ledger_states(migrated_database, sending) == [RecipientState.RECIPIENT_STATE_FAILED]
    contents = await fetch(migrated_database, "SELECT message_id FROM postroad.queue_contents")
    assert {row["message_id"].bytes for row in contents} == {fresh}


async def test_a_node_that_means_the_former_account_stores_nothing(holder: Holder, migrated_database: Database) -> None:
    uid = await uid_of(migrated_database)
    meant = queued(message_id())._replace(account_uid=uid)
    await holder.store_all([meant])
    await make_anew(migrated_database)
    with pytest.raises(BadQueueRequestError):
        await holder.store_all([queued(message_id())._replace(account_uid=uid)])
    await holder.store_all([queued(message_id())._replace(account_uid=await uid_of(migrated_database))])


async def test_what_older_code_stored_is_given_to_whoever_has_the_name(
    holder: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    await add_account(migrated_database, "gone")
    kept, lost = await holder.store(sending=False), await holder.store(account="gone", sending=False)
    await execute(migrated_database, "UPDATE postroad.replicated_queue SET account_uid = NULL")
    await execute(migrated_database, "DELETE FROM postroad.accounts WHERE account = 'gone'")
    assert (await holder.claim())[1] == []
    assert await PostgresJobs(database).end_left_behind(20) == 2
    assert await queue_row(migrated_database, lost) is None
    assert [one.message_id for one in (await holder.claim())[1]] == [kept]


async def test_put_back_is_no_attempt(holder: Holder, other: Holder, migrated_database: Database) -> None:
    raw_id = await holder.store()
    await holder.report(changed(raw_id, update(0, QUEUED, attempts=0)))
    assert await queue_states(migrated_database, raw_id) == [(QUEUED, 0)]
    _, (claimed,) = await other.claim()
    assert [one.attempt for one in claimed.recipients] == [1]


async def test_a_lease_that_lives_is_renewed_and_one_that_ended_stores_nothing(
    holder: Holder, migrated_database: Database
) -> None:
    assert (await holder.queue.renew(holder.node, holder.spool, holder.epoch)).epoch == holder.epoch
    await end_lease(migrated_database, holder.epoch)
    with pytest.raises(LeaseLostError):
        await holder.store()
    assert await fetch(migrated_database, "SELECT 1 FROM postroad.messages") == []


async def test_mail_of_an_account_that_is_gone_is_told_apart_from_that_of_others(
    holder: Holder, migrated_database: Database
) -> None:
    await add_account(migrated_database, "gone")
    await execute(migrated_database, "DELETE FROM postroad.accounts WHERE account = 'gone'")
    # What the node takes for a reason to ask for each message alone.
    with pytest.raises(BadQueueRequestError):
        await holder.store_all([queued(message_id(), account="gone"), queued(message_id())])
    await holder.store_all([queued(message_id())])


async def test_leases_are_told_apart_by_a_database_that_forgot_some(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    """A replica that lacks the last commits gives no epoch anew."""
    given = {holder.epoch, other.epoch}
    for _ in range(20):
        await execute(migrated_database, "DELETE FROM postroad.node_leases")
        given.add((await holder.queue.renew(holder.node, holder.spool, 0)).epoch)
    assert len(given) == 22
    assert all(0 < epoch < 1 << 63 for epoch in given)
    # Nothing that a server counts, and may count again.
    assert await fetch(migrated_database, "SELECT 1 FROM pg_class WHERE relname = 'lease_epoch'") == []
    assert max(abs(one - another) for one in given for another in given) > 1 << 40


async def test_a_refused_spool_gets_no_lease(holder: Holder, migrated_database: Database) -> None:
    await execute(migrated_database, "UPDATE postroad.spools SET accepted = false")
    with pytest.raises(LeaseLostError):
        await holder.queue.renew(holder.node, holder.spool, holder.epoch)


async def test_nobody_stores_or_claims_mail_of_another_pool(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    await add_account(migrated_database, "far", pool="far")
    with pytest.raises(BadQueueRequestError):
        await holder.store(account="far")
    await holder.store(sending=False)
    other.pool = "far"
    assert (await other.claim())[1] == []


async def test_all_messages_are_stored_or_none(holder: Holder, migrated_database: Database) -> None:
    twice = message_id()
    with pytest.raises(BadQueueRequestError):
        await holder.store_all([queued(message_id()), queued(twice), queued(twice)])
    with pytest.raises(BadQueueRequestError):
        await holder.store_all([queued(message_id()), queued(message_id(), content=None, chunks=2)])
    assert await fetch(migrated_database, "SELECT 1 FROM postroad.replicated_queue") == []
    assert await fetch(migrated_database, "SELECT 1 FROM postroad.messages") == []


async def test_a_content_in_chunks_comes_back_whole(holder: Holder) -> None:
    raw_id = message_id()
    chunks = [bytes([number]) * 1_000_000 for number in range(6)]
    for number, chunk in enumerate([*chunks, chunks[-1]]):
        await holder.queue.store_content(raw_id, min(number, 5), chunk)
    record = queued(raw_id, sending=False, content=None, chunks=6)
    await holder.store_all([record])
    _, (claimed,) = await holder.claim()
    # The size that the record tells decides what comes along; here all of it did.
    assert claimed.content == b"".join(chunks)
    first = await holder.queue.fetch_content(holder.node, holder.spool, holder.epoch, raw_id, 0)
    rest = await holder.queue.fetch_content(holder.node, holder.spool, holder.epoch, raw_id, first.next_chunk)
    assert (first.next_chunk, rest.next_chunk) == (4, 0)
    assert first.data + rest.data == b"".join(chunks)


async def test_nothing_is_added_to_a_content_that_was_stored(holder: Holder, other: Holder) -> None:
    raw_id = message_id()
    await holder.queue.store_content(raw_id, 0, b"whole\r\n")
    await holder.store_all([queued(raw_id, sending=False, content=None, chunks=1)])
    await other.queue.store_content(raw_id, 1, b"more\r\n")
    _, (claimed,) = await holder.claim()
    assert claimed.content == b"whole\r\n"


async def test_a_claim_is_bounded_by_the_bytes_of_all_that_it_gives(holder: Holder) -> None:
    large = [queued(message_id(), sending=False, size_bytes=600) for _ in range(3)]
    await holder.store_all(large)
    given = []
    for _ in large:
        _, claimed = await holder.claim(max_bytes=1_000)
        given += [(len(claimed), one.content is not None) for one in claimed]
    assert given == [(1, True)] * 3
    # One comes in any case, and its content is to be fetched.
    await holder.store_all([queued(message_id(), sending=False, size_bytes=2_000) for _ in range(2)])
    _, claimed = await holder.claim(max_bytes=1_000)
    assert [one.content for one in claimed] == [None]


async def test_a_flood_leaves_room_for_others_in_a_claim(holder: Holder, migrated_database: Database) -> None:
    await add_account(migrated_database, "small")
    await holder.store_all([queued(message_id(), sending=False) for _ in range(100)])
    small = await holder.store(account="small", sending=False)
    _, claimed = await holder.claim(CLAIMED_OF_ACCOUNT + 1)
    assert len(claimed) == CLAIMED_OF_ACCOUNT + 1
    assert small in {one.message_id for one in claimed}


async def test_of_an_account_the_highest_priority_is_claimed_first_and_of_that_the_oldest(holder: Holder) -> None:
    stored = {}
    for priority in (0, 9, -9, 9, 1, 0):
        stored[await holder.store(sending=False, priority=priority)] = priority
    claimed = await holder.take(BY_AGE + 1, 100)
    priorities = [stored[one.message_id] for one in claimed]
    assert priorities == [9, 9, 1, 0, 0, -9]
    of_nine = [one.message_id for one in claimed[:2]]
    assert of_nine == [raw_id for raw_id, priority in stored.items() if priority == 9]


async def test_by_one_lot_of_a_few_what_has_waited_longest_comes_first(holder: Holder) -> None:
    oldest = await holder.store(sending=False, priority=-9)
    await holder.store_all([queued(message_id(), sending=False, priority=9) for _ in range(CLAIMED_OF_ACCOUNT)])
    assert oldest not in {one.message_id for one in await holder.take(BY_AGE + 1, 1)}
    assert oldest in {one.message_id for one in await holder.take(BY_AGE, 1)}


async def test_a_priority_does_not_give_an_account_more_of_a_claim(holder: Holder, migrated_database: Database) -> None:
    await add_account(migrated_database, "small")
    floods = [queued(message_id(), sending=False, priority=9 - number % 3) for number in range(100)]
    await holder.store_all(floods)
    small = await holder.store(account="small", sending=False, priority=-9)
    _, claimed = await holder.claim(CLAIMED_OF_ACCOUNT + 1)
    assert len(claimed) == CLAIMED_OF_ACCOUNT + 1
    assert small in {one.message_id for one in claimed}


async def test_no_account_waits_for_the_older_backlogs_of_others(holder: Holder, migrated_database: Database) -> None:
    """A claim has room for one account: who comes first is drawn anew each time."""
    for account in ("old-1", "old-2", "old-3"):
        await add_account(migrated_database, account)
        await holder.store_all([queued(message_id(), account=account, sending=False) for _ in range(100)])
    late = await holder.store(sending=False)
    first = {claimed.message_id for lot in range(40) for claimed in await holder.take(lot, 1)}
    assert late in first


async def test_accounts_that_are_left_out_of_a_claim_wait(holder: Holder, migrated_database: Database) -> None:
    await add_account(migrated_database, "wanted")
    await holder.store(sending=False)
    wanted = await holder.store(account="wanted", sending=False)
    _, claimed = await holder.claim(left_out=("demo", "unknown"))
    assert [one.message_id for one in claimed] == [wanted]


async def test_what_is_held_until_a_time_waits_in_the_queue_and_is_claimed_then(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    raw_id = await holder.store(sending=False, hold_s=3_600, priority=9)
    due = await holder.store(sending=False, priority=-9)
    assert await queue_states(migrated_database, raw_id) == [(SCHEDULED, 0)]
    assert await ledger_states(migrated_database, raw_id) == [SCHEDULED]
    _, claimed = await other.claim(after_s=3_590)
    assert [one.message_id for one in claimed] == [due]
    claim_id, claimed = await holder.claim(after_s=3_601, adopt=False)
    assert raw_id in [one.message_id for one in claimed]
    (held,) = [one for one in claimed if one.message_id == raw_id]
    assert [(one.attempt, one.due_ms) for one in held.recipients] == [(1, NOW_MS + 3_600_000)]
    assert raw_id in await holder.confirm(claim_id, claimed)
    await holder.report(changed(raw_id, update(0, SENT)))
    assert await ledger_states(migrated_database, raw_id) == [SENT]


async def test_what_waits_or_is_held_is_cancelled_and_what_is_sent_is_too_late(
    holder: Holder, migrated_database: Database
) -> None:
    waiting = await holder.store("a@example.net", "b@example.net", sending=False, hold_s=3_600)
    sending = await holder.store()
    for raw_id in (waiting, sending, message_id()):
        await execute(
            migrated_database,
            "INSERT INTO postroad.commands (account, verb, spool, message_ids) VALUES ('demo', 1, $1, ARRAY[$2::uuid])",
            *(QUEUE_SPOOL, text_id(raw_id)),
        )
    assert (await holder.claim())[1] == []
    rows = await fetch(migrated_database, "SELECT * FROM postroad.commands")
    done = {row["message_ids"][0].bytes: (row["changed_count"], row["too_late_count"]) for row in rows}
    assert (done.pop(waiting), done.pop(sending), *done.values()) == ((2, 0), (0, 1), (0, 1))
    assert all(row["done_time"] for row in rows)
    assert await queue_row(migrated_database, waiting) is None
    assert await ledger_states(migrated_database, waiting) == [CANCELLED, CANCELLED]
    assert await event_types(migrated_database, waiting) == [EventType.EVENT_TYPE_CANCELLED] * 2


def keyed(raw_id: bytes, content_hash: bytes = b"c" * 32, key_hash: bytes = b"k" * 32) -> QueuedMessage:
    return queued(raw_id, sending=False, submission_key_hash=key_hash, submission_content_hash=content_hash)


async def test_of_messages_with_one_key_one_is_stored_whoever_stores_it(
    holder: Holder, other: Holder, migrated_database: Database
) -> None:
    await holder.store()
    ids = [message_id() for _ in range(8)]
    pairs = zip(ids, (holder, other) * 4, strict=True)
    stores = [one.store_all([keyed(raw_id), queued(message_id())]) for raw_id, one in pairs]
    answers = await asyncio.gather(*stores)
    (row,) = await fetch(migrated_database, "SELECT * FROM postroad.submission_keys")
    first = row["message_id"].bytes
    assert {one for found in answers for one in found} == {
        Repeated(raw_id, first, is_same=True) for raw_id in ids if raw_id != first
    }
    known = await fetch(migrated_database, "SELECT message_id FROM postroad.replicated_queue")
    assert {row["message_id"].bytes for row in known} & set(ids) == {first}
    # What came with them is stored all the same.
    assert len(known) == len(await fetch(migrated_database, "SELECT 1 FROM postroad.messages")) == 1 + 8 + 1


async def test_two_messages_with_one_key_in_one_store_are_told_apart(
    holder: Holder, migrated_database: Database
) -> None:
    first, same, another = message_id(), message_id(), message_id()
    found = await holder.store_all([keyed(first), keyed(same), keyed(another, b"d" * 32)])
    assert found == [Repeated(same, first, is_same=True), Repeated(another, first, is_same=False)]
    assert await queue_row(migrated_database, first) is not None
    late = message_id()
    assert await holder.store_all([keyed(late, b"d" * 32)]) == [Repeated(late, first, is_same=False)]


async def test_a_key_is_taken_for_a_day_also_by_local_mail(
    holder: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    hour_ms, local = 3_600_000, message_id(NOW_MS - 3_600_000)
    record = accepted(local, submission_key_hash=b"k" * 32, submission_content_hash=b"c" * 32)
    await holder.report(record, epoch=0)
    late = message_id()
    assert await holder.store_all([keyed(late)]) == [Repeated(late, local, is_same=True)]
    await execute(
        migrated_database, "UPDATE postroad.submission_keys SET accept_time = accept_time - interval '23 hours'"
    )
    assert await holder.store_all([keyed(late)]) == []
    assert await holder.store_all([keyed(message_id(NOW_MS - 23 * hour_ms), b"d" * 32)]) != []


async def test_a_store_that_fails_takes_no_key(holder: Holder, migrated_database: Database) -> None:
    twice = message_id()
    with pytest.raises(BadQueueRequestError):
        await holder.store_all([keyed(message_id()), queued(twice), queued(twice)])
    assert await fetch(migrated_database, "SELECT 1 FROM postroad.submission_keys") == []


async def test_late_contents_and_mail_of_deleted_accounts_are_swept(
    holder: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    await add_account(migrated_database, "gone")
    kept, lost = await holder.store(sending=False), await holder.store(account="gone", sending=False)
    late, fresh = message_id(NOW_MS - 90_000_000), message_id()
    for raw_id in (late, fresh):
        await holder.queue.store_content(raw_id, 0, b"piece")
    await execute(migrated_database, "DELETE FROM postroad.accounts WHERE account = 'gone'")
    await PostgresJobs(database).sweep_queue(NOW - timedelta(days=1))
    assert await PostgresJobs(database).end_left_behind(100) == 1
    rows = await fetch(migrated_database, "SELECT message_id FROM postroad.queue_contents")
    assert {row["message_id"].bytes for row in rows} == {kept, fresh}
    assert await queue_row(migrated_database, lost) is None
    assert await ledger_states(migrated_database, lost) == [RecipientState.RECIPIENT_STATE_FAILED]
    assert await queue_states(migrated_database, kept) == [(QUEUED, 0)]


# Of fifty accounts, each with three priorities; what each has waits for its time but for a tenth.
_SEED = """
WITH made AS (
    SELECT ('01900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid AS id, n FROM generate_series(1, 50000) AS n
), accounts AS (
    INSERT INTO postroad.accounts (account, node_pool, durability) SELECT 'account-' || n, 'default', 2
    FROM generate_series(0, 49) AS n RETURNING account, uid
), queue AS (
    INSERT INTO postroad.replicated_queue (
        message_id, account, account_uid, priority, size_bytes, envelope, due_time, epoch, claim_id, claim_time
    )
    SELECT id, account, uid, n / 50 % 3, 100, '\\x00',
        CASE WHEN n > 45000 THEN now() - interval '1 s' ELSE now() + n * interval '1 s' END,
        CASE WHEN n / 50 % 7 = 0 THEN $1::bigint END, CASE WHEN n / 50 % 700 = 0 THEN id END,
        CASE WHEN n / 50 % 700 = 0 THEN now() END
    FROM made JOIN accounts ON account = 'account-' || n % 50
)
INSERT INTO postroad.queue_recipients (message_id, recipient_index, state, attempt, due_time)
SELECT id, 0, 2, 0, now() FROM made
"""
# What a claim of 100 messages may touch: they, a head of each account and priority, and the levels of the index.
_TOUCHED_ROWS, _TOUCHED_BLOCKS = 500, 2_000


async def seed_fifty_thousand(holder: Holder, database: Database) -> None:
    await execute(database, _SEED, holder.epoch)
    for table in ("accounts", "replicated_queue", "queue_recipients", "queue_contents", "node_leases"):
        await execute(database, f"ANALYZE postroad.{table}")


async def test_fifty_thousand_rows_are_never_walked(holder: Holder, migrated_database: Database) -> None:
    await seed_fifty_thousand(holder, migrated_database)
    some = [text_id(message_id()) for _ in range(100)]
    now = (await fetch(migrated_database, "SELECT now()"))[0][0]
    looked = {
        "ix_replicated_queue_account_uid": (queue.CLAIM, ("default", now, 100, 1, ())),
        "ix_replicated_queue_epoch": (queue_reports.LOCK_ENDED, ([holder.epoch + 1, holder.epoch + 2],)),
        "ix_replicated_queue_claim_time": (queue_reports.LOCK_UNCONFIRMED, (now,)),
        "pk_queue_recipients": (queue.MARK_RECIPIENTS, (some, now)),
        "pk_replicated_queue": (queue_reports.LOCK, (some,)),
    }
    for index, (sql, arguments) in looked.items():
        rows = await fetch(migrated_database, "EXPLAIN " + sql, *arguments)
        plan = "\n".join(row[0] for row in rows)
        assert index in plan, plan
        assert "Seq Scan on replicated_queue" not in plan, plan
        assert "Seq Scan on queue_recipients" not in plan, plan


async def test_a_claim_reads_what_it_gives_and_not_what_waits_for_its_time(
    holder: Holder, migrated_database: Database
) -> None:
    await seed_fifty_thousand(holder, migrated_database)
    now = (await fetch(migrated_database, "SELECT now()"))[0][0]
    explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + queue.CLAIM
    rows = await fetch(migrated_database, explain, "default", now, 100, 1, ())
    plan = json.loads(rows[0][0])[0]["Plan"]
    scans = [node for node in nodes_below(plan) if node.get("Relation Name") == "replicated_queue"]
    touched = sum((one["Actual Rows"] + one.get("Rows Removed by Filter", 0)) * one["Actual Loops"] for one in scans)
    assert (plan["Actual Rows"], len(scans)) == (100, 3)
    assert touched <= _TOUCHED_ROWS, plan
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= _TOUCHED_BLOCKS, plan


async def test_whose_mail_it_is_costs_by_the_message_and_not_by_the_square_of_them(
    holder: Holder, migrated_database: Database
) -> None:
    count = 1_000
    raw_ids = [message_id() for _ in range(count)]
    await holder.store_all([queued(raw_id) for raw_id in raw_ids])
    await execute(migrated_database, "ANALYZE")
    ids = [text_id(raw_id) for raw_id in raw_ids]
    spool, leases = uuid.UUID(holder.spool), [holder.epoch] * count
    arguments = (ids, ["demo"] * count, min(ids), max(ids), spool, ids, leases, holder.node)
    assert (await fetch(migrated_database, COUNT_OWN, *arguments))[0][0] == count
    (row,) = await fetch(migrated_database, "EXPLAIN (ANALYZE, FORMAT JSON) " + COUNT_OWN, *arguments)
    plan = json.loads(row[0])[0]["Plan"]
    removed = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter")
    touched = sum(sum(one.get(key, 0) for key in removed) * one["Actual Loops"] for one in nodes_below(plan))
    assert touched <= 20 * count, plan


def nodes_below(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes of a plan."""
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes_below(child)


async def test_a_look_at_nothing_costs_no_rows(holder: Holder) -> None:
    claim_id = str(uuid.uuid4())
    assert (await holder.claim())[1] == []
    assert await holder.confirm(claim_id, []) == []
