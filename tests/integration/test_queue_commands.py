"""Commands on mail that waits in PostgreSQL: the same as on mail that waits in a spool, whoever claims it then."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from controlplane.adapters.postgres import queue_commands, queue_reports
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.leader import PostgresJobs
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.queue import PostgresQueue
from controlplane.adapters.postgres.queue_commands import QUEUE_SPOOL
from controlplane.ports_queue import Claimed
from dataplane.core.commands import EVENTS, Other, decide
from dataplane.core.envelope import RecipientRow, is_pinned, make_queue_key, split_queue_key
from dataplane.core.queue import EventType, State, Verb
from postroad.node.v1.ledger_pb2 import EventType as WireEvent
from postroad.node.v1.ledger_pb2 import RecipientState
from support.databases import Database
from support.fleet import (
    NOW,
    NOW_MS,
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
    event_types,
    ledger_states,
    queue_row,
    queue_states,
    queued,
)

HOP, OTHER = "accounts/demo/providers/hop", "accounts/demo/providers/other"
SENDING, DEFERRED, SENT = (
    RecipientState.RECIPIENT_STATE_SENDING,
    RecipientState.RECIPIENT_STATE_DEFERRED,
    RecipientState.RECIPIENT_STATE_SENT,
)
HOUR_MS = 3_600_000


@pytest.fixture
async def database(migrated_database: Database) -> AsyncIterator[FleetDatabase]:
    await add_node(migrated_database)
    await add_account(migrated_database)
    async with fleet_database(migrated_database) as made:
        yield made


@pytest.fixture
async def holder(database: FleetDatabase) -> Holder:
    ledger = PostgresLedger(database, retention=timedelta(days=30))
    return await Holder(PostgresQueue(database, ledger), ledger).begin()


async def store(holder: Holder, *recipients: str, account: str = "demo", hop: str = HOP, hold_s: float = 0) -> bytes:
    """Store a message that waits for a provider."""
    raw_id = message_id()
    send_time_ms = NOW_MS + int(hold_s * 1000) if hold_s else 0
    message = queued(raw_id, *recipients, account=account, sending=False, send_time_ms=send_time_ms)
    await holder.store_all([message._replace(next_hops=[hop] * max(1, len(recipients)))])
    return raw_id


async def give(
    database: Database, verb: Verb, *message_ids: bytes, account: str = "demo", provider: str = "", **wanted: Any
) -> UUID:
    """Store a command for the queue; with `wanted` one with a filter."""
    rows = await fetch(
        database,
        "INSERT INTO postroad.commands (account, verb, spool, message_ids, provider, accepted_before, filter_provider,"
        " filter_recipient_domain, filter_states) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) RETURNING command",
        *(account, int(verb), QUEUE_SPOOL, [text_id(one) for one in message_ids], provider),
        wanted.get("before"),
        *(wanted.get("hop", ""), wanted.get("domain", ""), wanted.get("states", [])),
    )
    command: UUID = rows[0]["command"]
    return command


async def result(database: Database, command: UUID) -> tuple[int, int, bool]:
    """What it changed, for how many it was too late, and whether it is done."""
    (row,) = await fetch(database, "SELECT * FROM postroad.commands WHERE command = $1", command)
    return row["changed_count"], row["too_late_count"], row["done_time"] is not None


async def carry_out(holder: Holder) -> list[bytes]:
    """What is asked of the queue is done by whoever claims; what was claimed then."""
    return [one.message_id for one in (await holder.claim(adopt=False))[1]]


async def put_into(database: Database, raw_id: bytes, state: State, due_ms: int) -> None:
    await execute(
        database,
        "UPDATE postroad.queue_recipients SET state = $2, due_time = timestamptz 'epoch' + interval '1 ms' * $3"
        " WHERE message_id = $1",
        *(text_id(raw_id), int(state), due_ms),
    )
    # Nobody claims it between the command and the look.
    await execute(
        database,
        "UPDATE postroad.replicated_queue SET due_time = 'infinity' WHERE message_id = $1",
        text_id(raw_id),
    )


@pytest.mark.parametrize("due_ms", [NOW_MS - HOUR_MS, NOW_MS + HOUR_MS], ids=["due", "later"])
@pytest.mark.parametrize("state", [State.SCHEDULED, State.QUEUED, State.SENDING, State.DEFERRED, State.HELD])
@pytest.mark.parametrize("verb", Verb)
async def test_a_verb_does_to_a_recipient_what_it_does_in_a_spool(
    holder: Holder, migrated_database: Database, verb: Verb, state: State, due_ms: int
) -> None:
    """The oracle is what spools decide by."""
    raw_id = await store(holder)
    await put_into(migrated_database, raw_id, state, due_ms)
    row = RecipientRow(0, "to@example.net", state, 1, due_ms, 0, make_queue_key("accounts/demo", HOP))
    provider = OTHER if verb is Verb.REROUTE else ""
    expected = decide(verb, row, provider, NOW_MS)
    command = await give(migrated_database, verb, raw_id, provider=provider)
    async with holder.queue._database.transaction("test") as connection:
        assert await queue_commands.run_command(connection, NOW)
        assert not await queue_commands.run_command(connection, NOW)
    found = await fetch(
        migrated_database, "SELECT * FROM postroad.queue_recipients WHERE message_id = $1", text_id(raw_id)
    )
    if isinstance(expected, Other):
        assert await result(migrated_database, command) == (0, int(expected is Other.TOO_LATE), True)
        assert [one["state"] for one in found] == [int(state)]
        assert await event_types(migrated_database, raw_id) == []
        return
    assert await result(migrated_database, command) == (1, 0, True)
    assert await event_types(migrated_database, raw_id) == [int(EVENTS[verb])]
    new = expected.row
    if new.state in {State.CANCELLED, State.FAILED}:
        assert found == []
        assert await ledger_states(migrated_database, raw_id) == [int(new.state)]
        assert await queue_row(migrated_database, raw_id) is None
        return
    (one,) = found
    assert one["state"] == int(new.state)
    assert (one["next_hop"], one["pinned"]) == (split_queue_key(new.queue_key)[1], is_pinned(new.queue_key))
    if verb is not Verb.REROUTE:
        assert await ledger_states(migrated_database, raw_id) == [int(new.state)]
    if new.state is State.QUEUED:
        assert one["due_time"].timestamp() * 1000 == pytest.approx(new.due_ms, abs=1)
        assert (await queue_row(migrated_database, raw_id))["due_time"] == one["due_time"]


async def test_what_is_held_is_claimed_by_nobody_until_it_is_released(
    holder: Holder, migrated_database: Database
) -> None:
    held, other = await store(holder, "a@example.net", "b@example.net"), await store(holder)
    await give(migrated_database, Verb.HOLD, held)
    assert await carry_out(holder) == [other]
    assert await carry_out(holder) == []
    command = await give(migrated_database, Verb.RELEASE, held)
    assert await carry_out(holder) == [held]
    assert await result(migrated_database, command) == (2, 0, True)
    assert await event_types(migrated_database, held) == [int(EventType.HELD)] * 2 + [int(EventType.RELEASED)] * 2


async def test_what_was_uncertain_and_held_by_its_account_can_be_released(
    holder: Holder, migrated_database: Database
) -> None:
    await add_account(migrated_database, "careful", uncertain=2)
    raw_id = await holder.store(account="careful")
    uncertain = changed(raw_id, update(0, State.QUEUED), events=(event(WireEvent.EVENT_TYPE_UNCERTAIN, 0),))
    uncertain.account = "accounts/careful"
    await holder.report(uncertain)
    assert await carry_out(holder) == []
    await give(migrated_database, Verb.RELEASE, raw_id, account="careful")
    assert await carry_out(holder) == [raw_id]


async def test_a_retry_makes_due_what_was_put_off_and_what_is_scheduled(
    holder: Holder, migrated_database: Database
) -> None:
    scheduled, put_off = await store(holder, hold_s=3_600), await holder.store()
    deferred = update(0, DEFERRED)
    deferred.next_attempt_ms = NOW_MS + HOUR_MS
    await holder.report(changed(put_off, deferred))
    assert await carry_out(holder) == []
    for raw_id in (scheduled, put_off):
        await give(migrated_database, Verb.RETRY, raw_id)
    assert set(await carry_out(holder)) == {scheduled, put_off}


async def test_who_claims_what_was_rerouted_is_told_the_provider(holder: Holder, migrated_database: Database) -> None:
    raw_id, other = await store(holder), await store(holder)
    await give(migrated_database, Verb.REROUTE, raw_id, provider=OTHER)
    claim_id, claimed = await holder.claim()
    assert providers_of(claimed) == {raw_id: [OTHER], other: [""]}
    # It stays bound when it comes back, whatever it was tried with.
    assert len(await holder.confirm(claim_id, claimed)) == 2
    tried = event(WireEvent.EVENT_TYPE_DEFERRED, 0, provider=HOP)
    await holder.report(changed(raw_id, update(0, DEFERRED), events=(tried,)))
    _, claimed = await holder.claim()
    assert providers_of(claimed) == {raw_id: [OTHER]}


def providers_of(claimed: Sequence[Claimed]) -> dict[bytes, list[str]]:
    return {one.message_id: [each.provider for each in one.recipients] for one in claimed}


async def test_a_part_that_is_being_sent_is_too_late_and_the_rest_is_not(
    holder: Holder, migrated_database: Database
) -> None:
    raw_id = await holder.store("a@example.net", "b@example.net")
    later = update(1, DEFERRED)
    later.next_attempt_ms = NOW_MS + HOUR_MS
    await holder.report(changed(raw_id, later))
    command = await give(migrated_database, Verb.CANCEL, raw_id)
    await carry_out(holder)
    assert await result(migrated_database, command) == (1, 1, True)
    assert await queue_states(migrated_database, raw_id) == [(SENDING, 1)]
    await holder.report(changed(raw_id, update(0, SENT)))
    assert await queue_row(migrated_database, raw_id) is None


async def test_a_message_of_another_account_or_that_is_gone_is_too_late(
    holder: Holder, migrated_database: Database
) -> None:
    await add_account(migrated_database, "other")
    raw_id = await store(holder, account="other")
    for asked in (raw_id, message_id()):
        command = await give(migrated_database, Verb.CANCEL, asked)
        await carry_out(holder)
        assert await result(migrated_database, command) == (0, 1, True)


# --- filters ---------------------------------------------------------------------------------------------------------


async def test_a_filter_means_what_it_says_and_nothing_else(holder: Holder, migrated_database: Database) -> None:
    await add_account(migrated_database, "other")
    both = await store(holder, "a@example.net", "b@example.org")
    elsewhere, scheduled = await store(holder, hop=OTHER), await store(holder, hold_s=3_600)
    strange = await store(holder, account="other")
    before = NOW + timedelta(minutes=1)
    cases: list[tuple[dict[str, Any], dict[bytes, int]]] = [
        ({"domain": "example.org"}, {both: 1}),
        ({"domain": "xample.org"}, {}),
        ({"hop": OTHER}, {elsewhere: 1}),
        ({"states": [int(State.SCHEDULED)]}, {scheduled: 1}),
        ({"before": NOW - timedelta(minutes=1)}, {}),
        ({}, {both: 2, elsewhere: 1, scheduled: 1}),
    ]
    for wanted, meant in cases:
        command = await give(migrated_database, Verb.HOLD, **{"before": before, **wanted})
        async with holder.queue._database.transaction("test") as connection:
            assert await queue_commands.run_command(connection, NOW)
        assert await result(migrated_database, command) == (sum(meant.values()), 0, True)
        rows = await fetch(
            migrated_database,
            "WITH back AS (UPDATE postroad.queue_recipients SET state = CASE WHEN message_id = $1 THEN 1 ELSE 2 END"
            " WHERE state = 5 RETURNING message_id) SELECT message_id, count(*) FROM back GROUP BY 1",
            text_id(scheduled),
        )
        assert {row["message_id"].bytes: row["count"] for row in rows} == meant
    assert await event_types(migrated_database, strange) == []


async def test_a_command_for_every_account_reaches_all(holder: Holder, migrated_database: Database) -> None:
    await add_account(migrated_database, "other")
    ids = [await store(holder), await store(holder, account="other")]
    command = await give(migrated_database, Verb.CANCEL, account="-", before=NOW + timedelta(minutes=1))
    assert await carry_out(holder) == []
    assert await result(migrated_database, command) == (2, 0, True)
    assert [await queue_row(migrated_database, raw_id) for raw_id in ids] == [None, None]


async def test_a_walk_goes_on_where_it_stood_and_counts_nothing_twice(
    holder: Holder, migrated_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_account(migrated_database, "other")
    for account in ("demo", "other", "demo"):
        await holder.store_all([queued(message_id(), account=account, sending=False) for _ in range(7)])
    monkeypatch.setattr(queue_commands, "AT_ONCE", 3)
    monkeypatch.setattr(queue_commands, "WALKED", 5)
    monkeypatch.setattr(queue_commands, "WALK", queue_commands.WALK.replace("LIMIT 5000", "LIMIT 5"))
    command = await give(migrated_database, Verb.HOLD, before=NOW + timedelta(minutes=1))
    counts = []
    while not (await result(migrated_database, command))[2]:
        async with holder.queue._database.transaction("test") as connection:
            assert await queue_commands.run_command(connection, NOW)
        counts.append((await result(migrated_database, command))[0])
    assert counts[-1] == 14
    assert all(later - former <= 3 for former, later in pairwise(counts))
    states = await fetch(migrated_database, "SELECT state, count(*) FROM postroad.queue_recipients GROUP BY 1")
    assert {row["state"]: row["count"] for row in states} == {int(State.HELD): 14, int(State.QUEUED): 7}


async def test_mail_with_many_recipients_is_changed_in_parts_that_a_transaction_has_time_for(
    holder: Holder, migrated_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_reports, "RECIPIENTS_AT_ONCE", 5)
    for count in (2, 2, 2, 7, 1, 4):
        await store(holder, *(f"r{number}@example.net" for number in range(count)))
    command = await give(migrated_database, Verb.HOLD, before=NOW + timedelta(minutes=1))
    counts = [0]
    while not (await result(migrated_database, command))[2]:
        async with holder.queue._database.transaction("test") as connection:
            assert await queue_commands.run_command(connection, NOW)
        counts.append((await result(migrated_database, command))[0])
    steps = [later - former for former, later in pairwise(counts)]
    # One message is changed whole, however many recipients it has.
    assert steps.count(7) == 1
    assert all(0 < step <= 5 for step in steps if step != 7)
    states = await fetch(migrated_database, "SELECT state, count(*) FROM postroad.queue_recipients GROUP BY 1")
    assert {row["state"]: row["count"] for row in states} == {int(State.HELD): 18}


async def test_a_command_that_cannot_be_carried_out_keeps_nobodys_mail_back(
    holder: Holder, database: FleetDatabase, migrated_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_transaction_timeout_s", 1.0)
    # Rows are locked in this order: the command gets no further than to the first.
    locked, free = sorted([await store(holder), await store(holder)])
    command = await give(migrated_database, Verb.HOLD, before=NOW + timedelta(minutes=1))
    somebody = await asyncpg.connect(migrated_database.dsn())
    try:
        async with somebody.transaction():
            lock = "SELECT FROM postroad.replicated_queue WHERE message_id = $1 FOR UPDATE"
            await somebody.execute(lock, text_id(locked))
            assert await carry_out(holder) == [free]
    finally:
        await somebody.close()
    assert await result(migrated_database, command) == (0, 0, False)


async def test_a_filter_finds_mail_by_the_provider_that_it_was_tried_with(
    holder: Holder, migrated_database: Database
) -> None:
    raw_id = await holder.store()
    put_off = changed(raw_id, update(0, DEFERRED), events=(event(WireEvent.EVENT_TYPE_DEFERRED, 0, provider=OTHER),))
    await holder.report(put_off)
    command = await give(migrated_database, Verb.BOUNCE, before=NOW + timedelta(minutes=1), hop=OTHER)
    await carry_out(holder)
    assert await result(migrated_database, command) == (1, 0, True)
    (row,) = await fetch(migrated_database, "SELECT * FROM postroad.recipients")
    assert (row["state"], row["enhanced_code"], row["reply_text"]) == (
        int(State.FAILED),
        "5.7.0",
        "given up by a command",
    )


async def test_what_is_held_ends_with_its_lifetime(
    holder: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    await add_account(migrated_database, "brief")
    await execute(migrated_database, "UPDATE postroad.accounts SET retry_lifetime_s = 60 WHERE account = 'brief'")
    kept = await store(holder)
    ended, scheduled = await store(holder, account="brief"), await store(holder, account="brief", hold_s=3_600)
    waiting = await store(holder, account="brief")
    await give(migrated_database, Verb.HOLD, kept)
    for raw_id in (ended, scheduled):
        await give(migrated_database, Verb.HOLD, raw_id, account="brief")
    assert await carry_out(holder) == [waiting]
    await execute(migrated_database, "UPDATE postroad.messages SET accept_time = accept_time - interval '1 hour'")
    assert await PostgresJobs(database).expire_held(100) == 1
    assert await queue_row(migrated_database, ended) is None
    assert await ledger_states(migrated_database, ended) == [int(State.EXPIRED)]
    assert await event_types(migrated_database, ended) == [int(EventType.HELD), int(EventType.EXPIRED)]
    for raw_id in (kept, scheduled):
        assert await queue_states(migrated_database, raw_id) == [(int(State.HELD), 0)]


async def test_what_is_held_ends_some_recipients_at_a_time(
    holder: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    await execute(migrated_database, "UPDATE postroad.accounts SET retry_lifetime_s = 60")
    raw_ids = [await store(holder, "a@example.net", "b@example.net", "c@example.net") for _ in range(3)]
    await give(migrated_database, Verb.HOLD, *raw_ids)
    assert await carry_out(holder) == []
    await execute(migrated_database, "UPDATE postroad.messages SET accept_time = accept_time - interval '1 hour'")
    jobs = PostgresJobs(database)
    assert [await jobs.expire_held(4) for _ in range(4)] == [4, 4, 1, 0]
    assert await fetch(migrated_database, "SELECT FROM postroad.replicated_queue") == []
    for raw_id in raw_ids:
        assert await ledger_states(migrated_database, raw_id) == [int(State.EXPIRED)] * 3


async def test_commands_end_where_no_node_asks_for_mail(
    holder: Holder, database: FleetDatabase, migrated_database: Database
) -> None:
    raw_id, other = await store(holder), await store(holder, "a@example.org")
    named = await give(migrated_database, Verb.CANCEL, raw_id)
    meant = await give(migrated_database, Verb.HOLD, before=NOW + timedelta(hours=1), domain="example.org")
    jobs = PostgresJobs(database)
    assert await jobs.run_queue_commands(1) == 1
    assert await jobs.run_queue_commands(10) == 1
    assert await jobs.run_queue_commands(10) == 0
    assert await result(migrated_database, named) == (1, 0, True)
    assert await result(migrated_database, meant) == (1, 0, True)
    assert await ledger_states(migrated_database, raw_id) == [int(State.CANCELLED)]
    assert await queue_states(migrated_database, other) == [(int(State.HELD), 0)]


async def test_the_queue_is_walked_by_its_key(holder: Holder, migrated_database: Database) -> None:
    before = UUID(int=(1 << 128) - 1)
    await execute(
        migrated_database,
        "INSERT INTO postroad.replicated_queue (message_id, account, size_bytes, envelope, due_time)"
        " SELECT ('01900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'demo', 1, '', now()"
        " FROM generate_series(1, 50000) AS n",
    )
    await execute(migrated_database, "ANALYZE postroad.replicated_queue")
    rows = await fetch(migrated_database, "EXPLAIN " + queue_commands.WALK, UUID(int=0), before, "demo")
    assert "pk_replicated_queue" in "\n".join(row[0] for row in rows)
