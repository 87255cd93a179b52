"""What spools report, in PostgreSQL: order, gaps, what comes twice, what cannot be stored, first outcomes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from controlplane.adapters.postgres.leader import PostgresJobs
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.ports_fleet import (
    Cursor,
    Duplicate,
    RawBatch,
    Refusal,
    RefusalReason,
    SpoolOpening,
    Stored,
)
from postroad.node.v1.ledger_pb2 import CommandResult, EventType, LedgerRecord, RecipientState
from support.databases import Database
from support.fleet import (
    NOW,
    NOW_MS,
    accept_spools,
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

SPOOL = str(uuid.uuid4())
SCHEDULED, QUEUED, DEFERRED, SENT, BOUNCED, CANCELLED = (
    RecipientState.RECIPIENT_STATE_SCHEDULED,
    RecipientState.RECIPIENT_STATE_QUEUED,
    RecipientState.RECIPIENT_STATE_DEFERRED,
    RecipientState.RECIPIENT_STATE_SENT,
    RecipientState.RECIPIENT_STATE_BOUNCED,
    RecipientState.RECIPIENT_STATE_CANCELLED,
)


@pytest.fixture
async def ledger(migrated_database: Database) -> AsyncIterator[PostgresLedger]:
    await add_node(migrated_database)
    async with fleet_database(migrated_database) as database:
        yield PostgresLedger(database, retention=timedelta(days=30))


async def _open(
    ledger: PostgresLedger, incarnation: int = 1, last: int = 1_000, oldest: int = 1, acknowledged: int = 0
) -> Cursor | Refusal:
    return await ledger.open_spool("edge-1", SpoolOpening(SPOOL, incarnation, acknowledged, oldest, last), NOW)


async def _store(
    ledger: PostgresLedger, first: int, *records: LedgerRecord | bytes, incarnation: int = 1, node: str = "edge-1"
) -> Stored:
    raw = [one if isinstance(one, bytes) else one.SerializeToString() for one in records]
    return await ledger.store(node, RawBatch(SPOOL, incarnation, first, raw), NOW)


async def _count(database: Database, table: str) -> int:
    rows = await fetch(database, f"SELECT count(*) FROM postroad.{table}")  # noqa: S608 - of this file
    return int(rows[0][0])


async def _states(database: Database, raw_id: bytes) -> list[int]:
    rows = await fetch(
        database,
        "SELECT state FROM postroad.recipients WHERE message_id = $1 ORDER BY recipient_index",
        text_id(raw_id),
    )
    return [row["state"] for row in rows]


async def test_a_message_settled_at_once_is_one_record(ledger: PostgresLedger, migrated_database: Database) -> None:
    raw_id = message_id()
    record = accepted(raw_id, "a@example.net", "b@example.net", state=SENT, subject="Grüße")
    record.events.append(event(EventType.EVENT_TYPE_SENT, 0, 1, text="queued as 7", provider="providers/inbox"))
    await _open(ledger)

    stored = await _store(ledger, 1, record)

    assert stored == Stored(Cursor(SPOOL, 1), 1, 0)
    message = (await fetch(migrated_database, "SELECT * FROM postroad.messages"))[0]
    assert (message["account"], message["node"], message["subject"]) == ("demo", "edge-1", "Grüße")
    assert int(message["accept_time"].timestamp() * 1000) == NOW_MS
    recipients = await fetch(migrated_database, "SELECT * FROM postroad.recipients ORDER BY recipient_index")
    assert [(row["address"], row["state"], row["reply_code"], row["next_attempt_time"]) for row in recipients] == [
        ("a@example.net", SENT, 250, None),
        ("b@example.net", SENT, 250, None),
    ]
    assert recipients[0]["provider"] == "providers/inbox"
    events = await fetch(migrated_database, "SELECT * FROM postroad.delivery_events ORDER BY position")
    assert [(row["recipient_index"], row["type"]) for row in events] == [(0, 2), (1, 2)]


async def test_a_message_that_is_held_is_scheduled_until_a_record_says_otherwise(
    ledger: PostgresLedger, migrated_database: Database
) -> None:
    raw_id = message_id()
    record = accepted(raw_id, "a@example.net", "b@example.net", send_time_ms=NOW_MS + 3_600_000, priority=-9)
    plain = accepted(message_id())
    await _open(ledger)
    await _store(ledger, 1, record, plain)

    held, usual = await fetch(migrated_database, "SELECT * FROM postroad.messages ORDER BY priority")
    assert int(held["send_time"].timestamp() * 1000) == NOW_MS + 3_600_000
    assert (held["priority"], usual["priority"], usual["send_time"]) == (-9, 0, None)
    rows = await fetch(migrated_database, "SELECT * FROM postroad.recipients WHERE message_id = $1", text_id(raw_id))
    assert [(row["state"], row["next_attempt_time"]) for row in rows] == [(SCHEDULED, held["send_time"])] * 2

    await _store(ledger, 3, changed(raw_id, update(0, SENT), update(1, CANCELLED)))
    assert await _states(migrated_database, raw_id) == [SENT, CANCELLED]


@pytest.mark.parametrize(("priority", "send_time_ms"), [(10, 0), (-10, 0), (0, -1)])
async def test_a_record_that_asks_for_what_nobody_can_ask_for_is_set_aside(
    ledger: PostgresLedger, migrated_database: Database, priority: int, send_time_ms: int
) -> None:
    record = accepted(message_id(), priority=priority, send_time_ms=send_time_ms)
    await _open(ledger)
    assert (await _store(ledger, 1, record)).rejected_count == 1
    (row,) = await fetch(migrated_database, "SELECT reason FROM postroad.ledger_rejects")
    assert row["reason"] == "BAD_ACCEPTANCE"


async def test_mail_held_for_longer_than_the_record_is_kept_is_recorded_to_its_end(
    ledger: PostgresLedger, migrated_database: Database
) -> None:
    raw_id = message_id(NOW_MS - 34 * 86_400_000)
    record = accepted(raw_id, send_time_ms=NOW_MS - 4 * 86_400_000)
    done = accepted(message_id(NOW_MS - 33 * 86_400_000), state=SENT)
    await _open(ledger)
    await _store(ledger, 1, record, done)

    async with fleet_database(migrated_database) as database:
        jobs = PostgresJobs(database)
        before = NOW.date() - timedelta(days=30)
        assert await jobs.drop_partitions(before) == 3  # of the day on which nothing waits
        assert (await _store(ledger, 3, changed(raw_id, update(0, DEFERRED)))).rejected_count == 0
        # Not for ever: a disk that was lost keeps no day.
        assert await jobs.drop_partitions(before + timedelta(days=31)) == 0
        assert await jobs.drop_partitions(before + timedelta(days=32)) == 3


async def test_a_later_record_changes_the_recipient(ledger: PostgresLedger, migrated_database: Database) -> None:
    raw_id = message_id()
    await _open(ledger)
    await _store(ledger, 1, accepted(raw_id, "a@example.net", "b@example.net"))

    deferred = update(0, DEFERRED)
    deferred.next_attempt_ms = NOW_MS + 60_000
    await _store(
        ledger, 2, changed(raw_id, deferred, events=(event(EventType.EVENT_TYPE_DEFERRED, 0, code=451, text="later"),))
    )

    assert await _states(migrated_database, raw_id) == [DEFERRED, QUEUED]
    row = (await fetch(migrated_database, "SELECT * FROM postroad.recipients WHERE recipient_index = 0"))[0]
    assert (row["address"], row["reply_code"], row["reply_text"]) == ("a@example.net", 451, "later")
    assert row["next_attempt_time"].timestamp() == pytest.approx(NOW_MS / 1000 + 60, abs=0.01)


async def test_records_of_one_batch_build_on_each_other(ledger: PostgresLedger, migrated_database: Database) -> None:
    raw_id = message_id()
    await _open(ledger)

    await _store(ledger, 1, accepted(raw_id), changed(raw_id, update(0, DEFERRED)), changed(raw_id, update(0, SENT)))

    assert await _states(migrated_database, raw_id) == [SENT]


@pytest.mark.parametrize("together", [True, False])
async def test_the_first_outcome_stays_and_a_later_one_becomes_an_event(
    ledger: PostgresLedger, migrated_database: Database, *, together: bool
) -> None:
    raw_id = message_id()
    await _open(ledger)
    records = [accepted(raw_id, state=SENT), changed(raw_id, update(0, BOUNCED)), changed(raw_id, update(0, SENT))]

    if together:
        await _store(ledger, 1, *records)
    else:
        for number, record in enumerate(records, 1):
            await _store(ledger, number, record)

    assert await _states(migrated_database, raw_id) == [SENT]
    events = await fetch(migrated_database, "SELECT type, reply_text FROM postroad.delivery_events")
    assert [tuple(row) for row in events] == [(9, "bounced after sent")]
    assert await _count(migrated_database, "ledger_rejects") == 0


async def test_watchers_are_woken_once_for_a_batch(ledger: PostgresLedger, migrated_database: Database) -> None:
    await _open(ledger)
    heard: list[str] = []
    listener = await asyncpg.connect(migrated_database.dsn())
    try:
        for channel in ("postroad_ledger", "end"):
            await listener.add_listener(channel, lambda _, __, one, ___: heard.append(one))

        await _store(ledger, 1, *(accepted(message_id(), state=SENT) for _ in range(500)))
        await execute(migrated_database, 'NOTIFY "end"')
        async with asyncio.timeout(10):
            while "end" not in heard:
                await listener.execute("SELECT 1")
    finally:
        await listener.close()

    assert heard == ["postroad_ledger", "end"]


async def test_a_gap_is_refused_and_changes_nothing(ledger: PostgresLedger, migrated_database: Database) -> None:
    await _open(ledger)
    await _store(ledger, 1, accepted(message_id()))

    stored = await _store(ledger, 3, accepted(message_id()))

    assert isinstance(stored.answer, Refusal)
    assert stored.answer.reason is RefusalReason.GAP
    assert await _count(migrated_database, "messages") == 1
    assert await _open(ledger) == Cursor(SPOOL, 1)


async def test_what_comes_twice_is_stored_once(ledger: PostgresLedger, migrated_database: Database) -> None:
    first, second = message_id(), message_id()
    record = changed(first, update(0, SENT), events=(event(EventType.EVENT_TYPE_SENT, 0),))
    await _open(ledger)
    await _store(ledger, 1, accepted(first), record)

    again = await _store(ledger, 1, accepted(first), record)
    overlapping = await _store(ledger, 2, record, accepted(second))

    assert again == Stored(Cursor(SPOOL, 2), 0, 0)
    assert overlapping == Stored(Cursor(SPOOL, 3), 1, 0)
    assert await _count(migrated_database, "messages") == 2
    assert await _count(migrated_database, "delivery_events") == 1


async def test_bad_records_go_to_the_rejects_and_stop_nobody(
    ledger: PostgresLedger, migrated_database: Database
) -> None:
    day_ms = 86_400_000
    good = [accepted(message_id()) for _ in range(6)]
    strange_time = accepted(message_id())
    strange_time.accepted.accept_time_ms += 2 * day_ms
    bad: list[LedgerRecord | bytes] = [
        b"\xff\xff garbage",
        accepted(b"short"),
        accepted(uuid.uuid4().bytes),
        accepted(message_id(NOW_MS + 2 * day_ms)),
        accepted(message_id(NOW_MS - 66 * day_ms)),
        strange_time,
        accepted(message_id(), account="users/eve"),
        accepted(message_id(), state=99),
        changed(message_id(), update(0, SENT)),
        changed(good[0].message_id, events=(event(EventType.EVENT_TYPE_SENT, 0, code=1_000_000),)),
    ]
    mixed = [bad[0], good[0], *bad[1:4], good[1], good[2], *bad[4:], *good[3:]]
    await _open(ledger)

    stored = await _store(ledger, 1, *mixed)

    assert stored == Stored(Cursor(SPOOL, len(mixed)), 6, len(bad))
    assert await _count(migrated_database, "messages") == 6
    rows = await fetch(migrated_database, "SELECT * FROM postroad.ledger_rejects ORDER BY record_number")
    assert [row["reason"] for row in rows] == [
        "UNDECODABLE",
        "BAD_MESSAGE_ID",
        "BAD_MESSAGE_ID",
        "MESSAGE_ID_OUT_OF_RANGE",
        "MESSAGE_ID_OUT_OF_RANGE",
        "MESSAGE_ID_OUT_OF_RANGE",
        "BAD_ACCOUNT",
        "BAD_RECIPIENT",
        "UNKNOWN_RECIPIENT",
        "REFUSED_BY_DATABASE",
    ]
    assert [row["record_number"] for row in rows] == [1, 3, 4, 5, 8, 9, 10, 11, 12, 13]
    assert rows[0]["record"] == bad[0]


async def test_text_that_postgresql_cannot_hold_does_not_cost_the_record(
    ledger: PostgresLedger, migrated_database: Database
) -> None:
    raw_id = message_id()
    await _open(ledger)
    record = accepted(raw_id, state=SENT, subject="a\0b")
    record.events.append(event(EventType.EVENT_TYPE_SENT, 0, text="ok\0"))

    stored = await _store(ledger, 1, record)

    assert stored.rejected_count == 0
    assert (await fetch(migrated_database, "SELECT subject FROM postroad.messages"))[0]["subject"] == "a\ufffdb"


async def test_mail_of_days_on_which_nobody_led_is_stored(ledger: PostgresLedger, migrated_database: Database) -> None:
    await _open(ledger)

    stored = await _store(ledger, 1, *(accepted(message_id(NOW_MS - days * 86_400_000)) for days in range(12)))

    assert (stored.stored_count, stored.rejected_count) == (12, 0)


async def test_a_newer_incarnation_goes_on_and_the_older_one_is_superseded(ledger: PostgresLedger) -> None:
    await _open(ledger, incarnation=1)
    await _store(ledger, 1, accepted(message_id()))

    assert await _open(ledger, incarnation=2) == Cursor(SPOOL, 1)
    late = await _store(ledger, 2, accepted(message_id()), incarnation=1)
    new = await _store(ledger, 2, accepted(message_id()), incarnation=2)

    assert isinstance(late.answer, Refusal)
    assert late.answer.reason is RefusalReason.SUPERSEDED
    assert new.answer == Cursor(SPOOL, 2)


@pytest.mark.parametrize(("incarnation", "last"), [(1, 10), (3, 0)])
async def test_a_restored_disk_is_refused_until_an_operator_accepts_it(
    ledger: PostgresLedger, migrated_database: Database, incarnation: int, last: int
) -> None:
    await _open(ledger, incarnation=2)
    await _store(ledger, 1, accepted(message_id()), incarnation=2)

    refused = await _open(ledger, incarnation=incarnation, last=last)
    stored = await _store(ledger, 2, accepted(message_id()), incarnation=incarnation + 5)

    assert isinstance(refused, Refusal)
    assert refused.reason is RefusalReason.WENT_BACKWARDS
    assert isinstance(stored.answer, Refusal)
    await accept_spools(migrated_database)
    assert await _open(ledger, incarnation=incarnation + 1, last=last) == Cursor(SPOOL, 0)


async def test_what_a_restored_disk_wrote_before_it_was_refused_is_stored_once_it_is_accepted(
    ledger: PostgresLedger, migrated_database: Database
) -> None:
    before, lost, since = message_id(), message_id(), message_id()
    sent = changed(before, update(0, SENT), events=(event(EventType.EVENT_TYPE_SENT, 0),))
    await _open(ledger)
    await _store(ledger, 1, accepted(before), sent, accepted(lost), accepted(message_id()))

    # The disk is of the time of record 2, of which it knew that record 1 was stored, and took mail at its start.
    assert isinstance(await _open(ledger, incarnation=2, last=3, acknowledged=1), Refusal)
    await accept_spools(migrated_database)
    assert await _open(ledger, incarnation=2, last=3, acknowledged=1) == Cursor(SPOOL, 1)
    stored = await _store(ledger, 2, sent, accepted(since), incarnation=2)

    assert stored == Stored(Cursor(SPOOL, 3), 2, 0)
    assert await _states(migrated_database, before) == [SENT]
    assert await _states(migrated_database, since) == [QUEUED]
    # What is told anew is not listed twice; another attempt is another event.
    assert await _count(migrated_database, "delivery_events") == 1
    again = event(EventType.EVENT_TYPE_SENT, 0)
    again.attempt = 2
    await _store(ledger, 4, changed(before, update(0, SENT, attempts=2), events=(again,)), incarnation=2)
    assert await _count(migrated_database, "delivery_events") == 2


async def test_mail_that_a_restored_disk_ends_after_fewer_attempts_has_ended(
    ledger: PostgresLedger, migrated_database: Database
) -> None:
    raw_id = message_id()
    await _open(ledger)
    put_off = [changed(raw_id, update(0, DEFERRED, attempts=attempt)) for attempt in (1, 2, 3)]
    await _store(ledger, 1, accepted(raw_id), *put_off)
    await _open(ledger, incarnation=2, last=1, acknowledged=1)
    await accept_spools(migrated_database)
    await _open(ledger, incarnation=2, last=1, acknowledged=1)

    sent = changed(raw_id, update(0, SENT, attempts=2), events=(event(EventType.EVENT_TYPE_SENT, 0),))
    stored = await _store(ledger, 2, changed(raw_id, update(0, DEFERRED, attempts=1)), incarnation=2)
    assert await _states(migrated_database, raw_id) == [DEFERRED]
    ended = await _store(ledger, 3, sent, incarnation=2)

    assert (stored, ended) == (Stored(Cursor(SPOOL, 2), 1, 0), Stored(Cursor(SPOOL, 3), 1, 0))
    (row,) = await fetch(migrated_database, "SELECT state, attempts, next_attempt_time FROM postroad.recipients")
    assert (row["state"], row["attempts"], row["next_attempt_time"]) == (SENT, 3, None)


async def test_mail_that_a_restored_disk_tells_anew_keeps_its_outcome(
    ledger: PostgresLedger, migrated_database: Database
) -> None:
    raw_id = message_id()
    await _open(ledger)
    await _store(ledger, 1, accepted(raw_id, state=SENT))
    await execute(migrated_database, "UPDATE postroad.spools SET cursor = 0")

    stored = await _store(ledger, 1, accepted(raw_id), changed(raw_id, update(0, BOUNCED, attempts=2)))

    assert stored.rejected_count == 0
    assert await _states(migrated_database, raw_id) == [SENT]
    events = await fetch(migrated_database, "SELECT type FROM postroad.delivery_events")
    assert [row["type"] for row in events] == [9]


async def test_records_that_are_gone_from_the_spool_are_passed_over_visibly(
    ledger: PostgresLedger, migrated_database: Database
) -> None:
    assert await _open(ledger, last=50, oldest=40) == Cursor(SPOOL, 39)

    rows = await fetch(migrated_database, "SELECT reason, detail FROM postroad.ledger_rejects")
    assert [tuple(row) for row in rows] == [("MISSING", "records 1 to 39 are gone from the spool")]


async def test_a_spool_belongs_to_the_node_that_registered_it(
    ledger: PostgresLedger, migrated_database: Database
) -> None:
    await add_node(migrated_database, "edge-2")
    await _open(ledger)

    opened = await ledger.open_spool("edge-2", SpoolOpening(SPOOL, 9, 0, 1, 100), NOW)
    assert isinstance(opened, Refusal)
    assert opened.reason is RefusalReason.NOT_OWNED
    stored = await _store(ledger, 1, accepted(message_id()), node="edge-2")
    assert stored == Stored(opened, 0, 0)
    assert await _count(migrated_database, "messages") == 0
    # What the other one said of it has changed nothing.
    assert await _open(ledger) == Cursor(SPOOL, 0)


async def test_parts_of_a_result_add_up_until_it_is_whole(ledger: PostgresLedger, migrated_database: Database) -> None:
    await _open(ledger)
    command, first, second = uuid.uuid4(), uuid.UUID(bytes=message_id()), uuid.UUID(bytes=message_id())
    await execute(
        migrated_database,
        """
        INSERT INTO postroad.commands (command, account, verb, spool, message_ids, accepted_before)
        VALUES ($1, 'demo', 2, $2, '{}', now())
        """,
        *(command, uuid.UUID(SPOOL)),
    )

    def result(changed: int, late: int, position: uuid.UUID | None = None, *, partial: bool = True) -> LedgerRecord:
        return LedgerRecord(
            command_result=CommandResult(
                command=str(command),
                changed_count=changed,
                too_late_count=late,
                partial=partial,
                position=position.bytes if position else b"",
            )
        )

    async def stored() -> tuple[object, ...]:
        (row,) = await fetch(
            migrated_database,
            "SELECT changed_count, too_late_count, position, done_time IS NULL, update_time FROM postroad.commands",
        )
        assert row["update_time"] == NOW
        return tuple(row)[:4]

    held = accepted(message_id())
    held.command_result.CopyFrom(result(1, 0).command_result)
    await _store(ledger, 1, held, result(2, 0), result(0, 5, first))
    assert await stored() == (3, 5, first, True)
    # Sent again, as after an answer that was lost: counted once.
    await _store(ledger, 3, result(0, 5, first), result(4, 0), result(0, 1, second))
    assert await stored() == (7, 6, second, True)
    await _store(ledger, 6, result(1, 1, partial=False), result(9, 9), result(9, 9, partial=False))
    assert await stored() == (8, 7, second, False)
    await _store(ledger, 9, result(9, 9))
    assert await stored() == (8, 7, second, False)


async def test_a_result_completes_its_command_once(ledger: PostgresLedger, migrated_database: Database) -> None:
    await _open(ledger)
    command, foreign = uuid.uuid4(), uuid.uuid4()
    for one, spool in ((command, SPOOL), (foreign, str(uuid.uuid4()))):
        await execute(
            migrated_database,
            """
            INSERT INTO postroad.commands (command, account, verb, spool, message_ids) VALUES ($1, 'demo', 1, $2, '{}')
            """,
            one,
            uuid.UUID(spool),
        )

    def result(of: uuid.UUID, count: int) -> LedgerRecord:
        return LedgerRecord(command_result=CommandResult(command=str(of), changed_count=count))

    await _store(ledger, 1, result(command, 3), result(command, 4), result(foreign, 5), result(uuid.uuid4(), 6))

    rows = await fetch(
        migrated_database, "SELECT command, changed_count FROM postroad.commands WHERE done_time > '-infinity'"
    )
    assert [tuple(row) for row in rows] == [(command, 3)]


async def test_a_spool_says_nothing_of_messages_that_another_one_accepted(
    ledger: PostgresLedger, migrated_database: Database
) -> None:
    await _open(ledger)
    raw_id, own = message_id(), message_id()
    await _store(ledger, 1, accepted(raw_id, "a@example.net"))
    await add_node(migrated_database, "edge-2", serial="bb")
    other = str(uuid.uuid4())
    await ledger.open_spool("edge-2", SpoolOpening(other, 1, 0, 1, 10), NOW)
    forged_event = event(EventType.EVENT_TYPE_BOUNCED, 0)
    forged = [
        changed(raw_id, update(0, BOUNCED), events=(forged_event,)),
        changed(raw_id, events=(forged_event,)),
        accepted(raw_id, "a@example.net", state=BOUNCED),
        accepted(raw_id, "a@example.net", account="accounts/other", state=BOUNCED),
        accepted(own, "b@example.net", state=SENT),
    ]

    raw = [record.SerializeToString() for record in forged]
    stored = await ledger.store("edge-2", RawBatch(other, 1, 1, raw), NOW)

    assert stored == Stored(Cursor(other, 5), 1, 4)
    assert await _states(migrated_database, raw_id) == [QUEUED]
    assert await _states(migrated_database, own) == [SENT]
    assert await _count(migrated_database, "delivery_events") == 0
    assert await _count(migrated_database, "ledger_rejects") == 4


# --- messages with an Idempotency-Key ---

OTHER_SPOOL = str(uuid.uuid4())
KEY_HASH = b"k" * 32
HOUR_MS = 3_600_000


async def _store_at(ledger: PostgresLedger, spool: str, first: int, *records: LedgerRecord) -> Stored:
    """Store records of a spool, which is opened where it is new."""
    await ledger.open_spool("edge-1", SpoolOpening(spool, 1, 0, 1, 1_000), NOW)
    return await ledger.store(
        "edge-1", RawBatch(spool, 1, first, [record.SerializeToString() for record in records]), NOW
    )


def _keyed(at_ms: int = NOW_MS, key_hash: bytes = KEY_HASH, *, account: str = "accounts/demo") -> LedgerRecord:
    key: dict[str, Any] = {"submission_key_hash": key_hash, "submission_key_checked": False}
    return accepted(message_id(at_ms), account=account, **key)


async def _duplicates(database: Database) -> dict[bytes, bytes]:
    rows = await fetch(
        database, "SELECT message_id, duplicate_of FROM postroad.messages WHERE duplicate_of IS NOT NULL"
    )
    return {row["message_id"].bytes: row["duplicate_of"].bytes for row in rows}


@pytest.fixture
async def told(migrated_database: Database) -> AsyncIterator[tuple[PostgresLedger, list[Duplicate]]]:
    """A ledger, and the duplicates that it tells of."""
    await add_node(migrated_database)
    duplicates: list[Duplicate] = []
    async with fleet_database(migrated_database) as database:
        yield PostgresLedger(database, retention=timedelta(days=30), report_duplicate=duplicates.append), duplicates


Told = tuple[PostgresLedger, list[Duplicate]]


async def test_a_message_that_two_spools_stored_under_one_key_is_found(told: Told, migrated_database: Database) -> None:
    ledger, duplicates = told
    first, second = _keyed(), _keyed(NOW_MS + 5)
    await _store_at(ledger, SPOOL, 1, first)
    assert duplicates == []
    await _store_at(ledger, OTHER_SPOOL, 1, accepted(message_id()), second)
    assert await _duplicates(migrated_database) == {second.message_id: first.message_id}
    assert duplicates == [Duplicate(str(text_id(second.message_id)), str(text_id(first.message_id)), "demo", False)]


async def test_mail_without_a_key_leaves_no_trace_of_one(told: Told, migrated_database: Database) -> None:
    ledger, duplicates = told
    await _store_at(ledger, SPOOL, 1, accepted(message_id()), accepted(message_id()))
    await _store_at(ledger, OTHER_SPOOL, 1, accepted(message_id()))
    assert (await _count(migrated_database, "submission_keys"), duplicates) == (0, [])


async def test_the_same_key_of_another_account_or_another_day_is_no_duplicate(
    told: Told, migrated_database: Database
) -> None:
    ledger, duplicates = told
    old, new = _keyed(NOW_MS - 24 * HOUR_MS), _keyed(NOW_MS)
    await _store_at(ledger, SPOOL, 1, old, _keyed(account="accounts/other"), _keyed(key_hash=b"l" * 32))
    await _store_at(ledger, OTHER_SPOOL, 1, new)
    assert duplicates == []
    # From now on the newer one has the key; one that is heard of late, and is as old as the first, is none of it.
    third = _keyed(NOW_MS + 1)
    await _store_at(ledger, SPOOL, 4, third, _keyed(NOW_MS - 30 * HOUR_MS))
    assert await _duplicates(migrated_database) == {third.message_id: new.message_id}


async def test_what_is_heard_of_second_is_the_duplicate_whenever_it_was_accepted(
    told: Told, migrated_database: Database
) -> None:
    ledger, _ = told
    early, late = _keyed(NOW_MS - 23 * HOUR_MS), _keyed(NOW_MS)
    await _store_at(ledger, SPOOL, 1, late)
    await _store_at(ledger, OTHER_SPOOL, 1, early)
    assert await _duplicates(migrated_database) == {early.message_id: late.message_id}


async def test_several_with_one_key_in_one_batch_are_all_found(told: Told, migrated_database: Database) -> None:
    ledger, duplicates = told
    records = [_keyed(NOW_MS + number) for number in range(4)]
    await _store_at(ledger, SPOOL, 1, *records)
    assert await _duplicates(migrated_database) == {each.message_id: records[0].message_id for each in records[1:]}
    assert len(duplicates) == 3


async def test_what_is_told_again_is_counted_once(told: Told, migrated_database: Database) -> None:
    ledger, duplicates = told
    first, second = _keyed(), _keyed()
    await _store_at(ledger, SPOOL, 1, first)
    await _store_at(ledger, SPOOL, 2, first)
    await _store_at(ledger, OTHER_SPOOL, 1, second)
    await _store_at(ledger, OTHER_SPOOL, 2, second)
    assert await _duplicates(migrated_database) == {second.message_id: first.message_id}
    assert len(duplicates) == 1


async def test_two_spools_that_tell_at_once_do_not_miss_each_other(told: Told, migrated_database: Database) -> None:
    ledger, duplicates = told
    keys = [bytes([number]) * 32 for number in range(40)]
    await asyncio.gather(
        _store_at(ledger, SPOOL, 1, *(_keyed(key_hash=key) for key in keys)),
        _store_at(ledger, OTHER_SPOOL, 1, *(_keyed(key_hash=key) for key in reversed(keys))),
    )
    assert len(await _duplicates(migrated_database)) == len(duplicates) == 40


async def test_a_key_beside_a_record_that_cannot_be_stored_is_noted_once(
    told: Told, migrated_database: Database
) -> None:
    ledger, duplicates = told
    first, second = _keyed(), _keyed()
    await _store_at(ledger, SPOOL, 1, first)
    stored = await _store_at(
        ledger, OTHER_SPOOL, 1, second, changed(message_id(), update(0, SENT)), _keyed(key_hash=b"m")
    )
    assert stored.rejected_count == 2
    assert await _duplicates(migrated_database) == {second.message_id: first.message_id}
    assert len(duplicates) == 1


async def test_keys_are_forgotten_some_at_a_time(told: Told, migrated_database: Database) -> None:
    ledger, _ = told
    old = [_keyed(NOW_MS - 200 * HOUR_MS, bytes([number]) * 32) for number in range(5)]
    await _store_at(ledger, SPOOL, 1, *old, _keyed())
    async with fleet_database(migrated_database) as database:
        jobs = PostgresJobs(database)
        before = NOW - timedelta(days=7)
        assert [await jobs.delete_submission_keys(before, 3) for _ in range(3)] == [3, 2, 0]
    assert await _count(migrated_database, "submission_keys") == 1
