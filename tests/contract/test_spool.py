"""What every spool does, whatever it keeps mail in.

spool    all adapters
keeper   those that keep what they are given: an adapter whose `retains` is false is exempt from tests that read back
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dataplane.adapters.spool_null import NullSpool
from dataplane.adapters.spool_ram import RamSpool
from dataplane.adapters.spool_sqlite import SqliteSpool
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.idempotency import SubmissionKey, Submitted
from dataplane.core.ids import MessageId, first_message_id
from dataplane.core.queue import State
from dataplane.ports import Cursor, Due, KeyHead, QueueDepth, Spool, SpoolError, WalkedRow
from support.spools import (
    KEY,
    NOW_MS,
    OTHER_KEY,
    ManualClock,
    change,
    make_envelope,
    make_id,
    make_row,
    open_durable,
    settlement,
)

ADAPTERS: dict[str, type[SqliteSpool | RamSpool | NullSpool]] = {
    "sqlite": SqliteSpool,
    "ram": RamSpool,
    "null": NullSpool,
}
CONTENT = b"Subject: Hello\r\n\r\nbody\r\n"
TEN_MINUTES_S = 600.0
TAIL_BYTES = 64 * 1024 * 1024
DAY_S = 24 * 3_600.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


async def open_spool(name: str, folder: Path, clock: ManualClock) -> Spool:
    if name == "sqlite":
        return await open_durable(folder / str(uuid.uuid4()), clock)
    if name == "null":
        return NullSpool()
    return RamSpool(clock)


@pytest.fixture(params=list(ADAPTERS))
async def spool(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Spool]:
    opened = await open_spool(request.param, tmp_path, clock)
    yield opened
    await opened.close()


@pytest.fixture(params=[name for name, adapter in ADAPTERS.items() if adapter.retains])
async def keeper(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Spool]:
    opened = await open_spool(request.param, tmp_path, clock)
    yield opened
    await opened.close()


# --- all adapters ---


async def test_identity_names_node_and_a_first_incarnation(spool: Spool) -> None:
    assert spool.identity.node == "node-1"
    assert spool.identity.incarnation == 1
    assert len(spool.identity.spool) == 36


async def test_accept_and_settle_complete(spool: Spool) -> None:
    envelope, row = make_envelope(), make_row(state=State.SENDING, attempt=1)
    await spool.accept(envelope, CONTENT, [row])
    changed = await spool.settle(settlement(envelope.message_id, [change(row, State.SENT)], b"record", reported=True))
    assert changed == 1


async def test_writes_complete_on_a_later_turn_never_at_once(spool: Spool) -> None:
    future = spool.accept(make_envelope(), CONTENT, [make_row()])
    assert not future.done()
    await future


async def test_records_are_numbered_from_one_without_gaps(spool: Spool) -> None:
    numbers = await asyncio.gather(*(spool.write_record(b"record %d" % number) for number in range(1, 8)))
    assert numbers == [1, 2, 3, 4, 5, 6, 7]


async def test_acknowledging_what_was_never_written_is_refused(spool: Spool) -> None:
    await spool.write_record(b"one")
    with pytest.raises(SpoolError):
        await spool.acknowledge(2)
    assert (await spool.stats()).acknowledged == 0


async def test_acknowledged_mark_shows_in_stats(spool: Spool) -> None:
    await spool.write_record(b"one")
    await spool.acknowledge(1)
    stats = await spool.stats()
    assert (stats.acknowledged, stats.outbox_last) == (1, 1)


async def test_there_is_room_in_a_new_spool(spool: Spool) -> None:
    assert spool.has_room(25 * 1024 * 1024)


async def test_calls_after_close_are_refused(spool: Spool) -> None:
    await spool.close()
    assert not spool.has_room(1)
    with pytest.raises(SpoolError):
        await spool.accept(make_envelope(), CONTENT, [make_row()])
    with pytest.raises(SpoolError):
        await spool.settle(settlement(make_id(), []))
    with pytest.raises(SpoolError):
        await spool.write_record(b"late")
    with pytest.raises(SpoolError):
        await spool.acknowledge(0)
    with pytest.raises(SpoolError):
        await spool.load(make_id())
    with pytest.raises(SpoolError):
        await spool.keys()
    with pytest.raises(SpoolError):
        await spool.heads(KEY, None, 1)
    with pytest.raises(SpoolError):
        await spool.unreported(1)
    with pytest.raises(SpoolError):
        await spool.interrupted()
    with pytest.raises(SpoolError):
        await spool.records(0, 1, 1)
    with pytest.raises(SpoolError):
        await spool.stats()


async def test_close_can_be_called_twice(spool: Spool) -> None:
    await spool.close()
    await spool.close()


async def test_close_finishes_what_was_begun(spool: Spool) -> None:
    future = spool.accept(make_envelope(), CONTENT, [make_row()])
    await spool.close()
    await future


# --- messages ---


async def test_a_message_reads_back_as_it_was_accepted(keeper: Spool) -> None:
    envelope = make_envelope()
    rows = [make_row(0), make_row(1, state=State.SCHEDULED, due_ms=NOW_MS + 5, priority=3, queue_key=OTHER_KEY)]
    await keeper.accept(envelope, CONTENT, rows)
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.envelope == envelope
    assert stored.content == CONTENT
    assert stored.recipients == tuple(rows)
    assert stored.reported is False


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 3_000_000])
async def test_content_of_any_size_reads_back(keeper: Spool, size: int) -> None:
    envelope = make_envelope()
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    await keeper.accept(envelope, content, [make_row()])
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.content == content


@pytest.mark.parametrize("subject", ["", "Grüße 你好 🙂", "null \0 inside", "lone \udcff surrogate", 'quote " and \\'])
async def test_text_of_any_kind_reads_back(keeper: Spool, subject: str) -> None:
    envelope = make_envelope(subject=subject)
    await keeper.accept(envelope, CONTENT, [make_row()])
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.envelope == envelope


async def test_a_thousand_recipients_read_back(keeper: Spool) -> None:
    envelope, rows = make_envelope(), [make_row(index) for index in range(1_000)]
    await keeper.accept(envelope, CONTENT, rows)
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.recipients == tuple(rows)
    assert (await keeper.stats()).waiting_count == 1_000


async def test_an_unknown_message_is_none(keeper: Spool) -> None:
    assert await keeper.load(make_id()) is None


async def test_the_same_id_is_stored_once(keeper: Spool) -> None:
    envelope = make_envelope()
    await keeper.accept(envelope, CONTENT, [make_row()])
    with pytest.raises(SpoolError):
        await keeper.accept(envelope, b"other", [make_row()])
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.content == CONTENT


@pytest.mark.parametrize(
    "rows",
    [[], [make_row(state=State.SENT)], [make_row(0), make_row(0)]],
    ids=["no recipients", "terminal at once", "an index twice"],
)
async def test_impossible_recipients_are_refused_and_leave_nothing(keeper: Spool, rows: list[RecipientRow]) -> None:
    envelope = make_envelope()
    with pytest.raises(SpoolError):
        await keeper.accept(envelope, CONTENT, rows)
    assert await keeper.load(envelope.message_id) is None
    assert (await keeper.stats()).waiting_count == 0


async def test_a_refused_message_leaves_its_neighbours_of_the_commit_alone(keeper: Spool) -> None:
    first, second = make_envelope(), make_envelope()
    futures: list[asyncio.Future[Any]] = [
        keeper.accept(first, CONTENT, [make_row()]),
        keeper.accept(first, CONTENT, [make_row()]),
        keeper.write_record(b"between"),
        keeper.accept(second, CONTENT, [make_row()]),
    ]
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert isinstance(results[1], SpoolError)
    assert [results[0], results[2], results[3]] == [None, 1, None]
    assert await keeper.load(second.message_id) is not None


async def test_giving_up_the_wait_does_not_undo_an_accept(keeper: Spool) -> None:
    envelope = make_envelope()
    future = keeper.accept(envelope, CONTENT, [make_row()])
    future.cancel()
    await keeper.write_record(b"a later write, so that the commit is over")
    assert await keeper.load(envelope.message_id) is not None


async def test_giving_up_the_wait_does_not_undo_an_accept_of_a_large_message(keeper: Spool) -> None:
    envelope = make_envelope()
    row = make_row()
    keeper.accept(envelope, b"x" * 1_000_000, [row]).cancel()
    # A settlement of the same message waits for it.
    settled = await keeper.settle(settlement(envelope.message_id, [change(row, State.DEFERRED, new_attempt=1)]))
    assert settled == 1
    assert await keeper.load(envelope.message_id) is not None


# --- settlements ---


async def test_the_message_goes_with_its_last_recipient(keeper: Spool) -> None:
    envelope, rows = make_envelope(), [make_row(0), make_row(1)]
    await keeper.accept(envelope, CONTENT, rows)
    assert await keeper.settle(settlement(envelope.message_id, [change(rows[0], State.SENT)], b"a")) == 1
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.recipients == (rows[1],)
    assert await keeper.settle(settlement(envelope.message_id, [change(rows[1], State.BOUNCED)], b"b")) == 1
    assert await keeper.load(envelope.message_id) is None
    stats = await keeper.stats()
    assert (stats.waiting_count, stats.oldest_accepted_ms) == (0, 0)


@pytest.mark.parametrize("state", [State.SENT, State.BOUNCED, State.FAILED, State.EXPIRED, State.CANCELLED])
async def test_every_terminal_state_removes_the_recipient(keeper: Spool, state: State) -> None:
    envelope, row = make_envelope(), make_row()
    await keeper.accept(envelope, CONTENT, [row])
    await keeper.settle(settlement(envelope.message_id, [change(row, state)]))
    assert await keeper.load(envelope.message_id) is None
    assert await keeper.keys() == []


async def test_a_deferred_recipient_waits_with_its_new_time_attempt_and_key(keeper: Spool) -> None:
    envelope, row = make_envelope(), make_row(state=State.SENDING, attempt=1)
    await keeper.accept(envelope, CONTENT, [row])
    deferred = change(row, State.DEFERRED, due_ms=NOW_MS + 60_000, queue_key=OTHER_KEY)
    assert await keeper.settle(settlement(envelope.message_id, [deferred], b"record", reported=True)) == 1
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.recipients == (row._replace(state=State.DEFERRED, due_ms=NOW_MS + 60_000, queue_key=OTHER_KEY),)
    assert stored.reported is True
    assert await keeper.keys() == [KeyHead(OTHER_KEY, NOW_MS + 60_000)]


async def test_a_stale_attempt_changes_nothing_and_writes_no_record(keeper: Spool) -> None:
    envelope, row = make_envelope(), make_row(state=State.SENDING, attempt=2)
    await keeper.accept(envelope, CONTENT, [row])
    stale = change(row, State.SENT, attempt=1)
    assert await keeper.settle(settlement(envelope.message_id, [stale], b"record", reported=True)) == 0
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.recipients == (row,)
    assert stored.reported is False
    assert await keeper.records(0, 10, 1_000) == (1, [])


async def test_a_settlement_of_a_message_that_is_gone_changes_nothing(keeper: Spool) -> None:
    row = make_row()
    assert await keeper.settle(settlement(make_id(), [change(row, State.SENT)], b"record")) == 0
    assert (await keeper.stats()).outbox_last == 0


async def test_a_second_outcome_of_the_same_attempt_changes_nothing(keeper: Spool) -> None:
    envelope, rows = make_envelope(), [make_row(0), make_row(1)]
    await keeper.accept(envelope, CONTENT, rows)
    outcome = settlement(envelope.message_id, [change(rows[0], State.SENT)], b"record")
    first, second = keeper.settle(outcome), keeper.settle(outcome)
    assert (await first, await second) == (1, 0)
    assert (await keeper.stats()).outbox_last == 1


async def test_of_two_claims_in_one_commit_one_wins(keeper: Spool) -> None:
    envelope, row = make_envelope(), make_row()
    await keeper.accept(envelope, CONTENT, [row])
    claim = settlement(envelope.message_id, [change(row, State.SENDING, new_attempt=1)])
    first, second = keeper.settle(claim), keeper.settle(claim)
    assert (await first, await second) == (1, 0)


async def test_some_recipients_of_a_settlement_may_be_stale(keeper: Spool) -> None:
    envelope, rows = make_envelope(), [make_row(0), make_row(1), make_row(2)]
    await keeper.accept(envelope, CONTENT, rows)
    changes = [change(rows[0], State.SENT), change(rows[1], State.SENT, attempt=9), change(rows[2], State.SENT)]
    assert await keeper.settle(settlement(envelope.message_id, changes, b"record")) == 2
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.recipients == (rows[1],)
    assert (await keeper.stats()).outbox_last == 1


async def test_a_record_without_changes_is_written_even_for_a_message_that_is_gone(keeper: Spool) -> None:
    assert await keeper.settle(settlement(make_id(), [], b"late news")) == 0
    assert await keeper.records(0, 10, 1_000) == (1, [b"late news"])


async def test_accept_and_settlement_of_one_message_fit_in_one_commit(keeper: Spool) -> None:
    envelope, row = make_envelope(), make_row()
    accepted = keeper.accept(envelope, CONTENT, [row])
    settled = keeper.settle(settlement(envelope.message_id, [change(row, State.CANCELLED)], b"record"))
    await accepted
    assert await settled == 1
    assert await keeper.load(envelope.message_id) is None


async def test_a_large_message_is_gone_with_its_content_after_settlement(keeper: Spool) -> None:
    envelope, row = make_envelope(), make_row()
    await keeper.accept(envelope, b"x" * 1_000_000, [row])
    await keeper.settle(settlement(envelope.message_id, [change(row, State.SENT)]))
    assert await keeper.load(envelope.message_id) is None


# --- keys and heads ---


async def test_keys_tell_the_first_due_time_of_each_key(keeper: Spool) -> None:
    rows = [
        make_row(0, due_ms=NOW_MS + 9),
        make_row(1, due_ms=NOW_MS + 3, state=State.DEFERRED),
        make_row(2, due_ms=NOW_MS + 7, state=State.SCHEDULED, queue_key=OTHER_KEY),
    ]
    await keeper.accept(make_envelope(), CONTENT, rows)
    assert await keeper.keys() == [KeyHead(KEY, NOW_MS + 3), KeyHead(OTHER_KEY, NOW_MS + 7)]


async def test_sending_and_held_recipients_are_in_no_key(keeper: Spool) -> None:
    rows = [make_row(0, state=State.SENDING, attempt=1), make_row(1, state=State.HELD)]
    await keeper.accept(make_envelope(), CONTENT, rows)
    assert await keeper.keys() == []
    assert await keeper.heads(KEY, None, 10) == []
    assert (await keeper.stats()).waiting_count == 2


async def test_a_released_recipient_is_found_again(keeper: Spool) -> None:
    envelope, row = make_envelope(), make_row(state=State.HELD)
    await keeper.accept(envelope, CONTENT, [row])
    await keeper.settle(settlement(envelope.message_id, [change(row, State.QUEUED)]))
    assert await keeper.heads(KEY, None, 10) == [Due(envelope.message_id, 0, 0, NOW_MS, 0, State.QUEUED)]


async def test_what_is_scheduled_waits_behind_its_time_and_says_so(keeper: Spool) -> None:
    later, now = make_envelope(), make_envelope()
    await keeper.accept(later, CONTENT, [make_row(state=State.SCHEDULED, due_ms=NOW_MS + 3_600_000, priority=9)])
    await keeper.accept(now, CONTENT, [make_row()])
    assert await keeper.heads(KEY, None, 10) == [
        Due(now.message_id, 0, 0, NOW_MS, 0, State.QUEUED),
        Due(later.message_id, 0, 0, NOW_MS + 3_600_000, 9, State.SCHEDULED),
    ]
    assert await keeper.keys() == [KeyHead(KEY, NOW_MS)]
    assert (await keeper.depth()).scheduled == 1


async def test_time_and_priority_of_an_envelope_are_kept(keeper: Spool) -> None:
    for send_time_ms, priority in ((0, 0), (NOW_MS + 1, 0), (0, -9), (NOW_MS + 1, 9)):
        envelope = replace(make_envelope(), send_time_ms=send_time_ms, priority=priority)
        await keeper.accept(envelope, CONTENT, [make_row()])
        stored = await keeper.load(envelope.message_id)
        assert stored is not None
        assert stored.envelope == envelope


async def test_heads_come_by_due_time_then_priority_then_age_then_index(keeper: Spool) -> None:
    old, new = make_id(NOW_MS), make_id(NOW_MS + 1)
    await keeper.accept(
        make_envelope(new), CONTENT, [make_row(0), make_row(1, priority=5), make_row(2, due_ms=NOW_MS - 1)]
    )
    await keeper.accept(make_envelope(old), CONTENT, [make_row(1), make_row(0), make_row(2, priority=-5)])
    heads = await keeper.heads(KEY, None, 10)
    assert [(due.message_id, due.index) for due in heads] == [
        (new, 2),
        (new, 1),
        (old, 0),
        (old, 1),
        (new, 0),
        (old, 2),
    ]
    assert [due.priority for due in heads] == [0, 5, 0, 0, 0, -5]


async def test_heads_go_on_after_a_cursor_whatever_became_of_its_row(keeper: Spool) -> None:
    envelopes = [make_envelope() for _ in range(5)]
    for envelope in envelopes:
        await keeper.accept(envelope, CONTENT, [make_row(0, priority=2), make_row(1, priority=1)])
    seen: list[tuple[bytes, int]] = []
    after: Cursor | None = None
    for _ in range(4):
        heads = await keeper.heads(KEY, after, 3)
        seen += [(due.message_id, due.index) for due in heads]
        last = heads[-1]
        after = Cursor(last.due_ms, last.priority, last.message_id, last.index)
        row = make_row(last.index)
        await keeper.settle(settlement(last.message_id, [change(row, State.SENT)]))
    expected = [(envelope.message_id, 0) for envelope in envelopes] + [
        (envelope.message_id, 1) for envelope in envelopes
    ]
    assert seen == expected
    assert await keeper.heads(KEY, after, 3) == []


async def test_heads_tell_the_attempt_to_name_when_claiming(keeper: Spool) -> None:
    envelope, row = make_envelope(), make_row(state=State.DEFERRED, attempt=4)
    await keeper.accept(envelope, CONTENT, [row])
    (due,) = await keeper.heads(KEY, None, 1)
    assert due.attempt == 4


async def test_many_keys_are_all_found(keeper: Spool) -> None:
    keys = [f"accounts/demo\tprovider-{number:04}" for number in range(700)]
    rows = [make_row(index, queue_key=key) for index, key in enumerate(keys)]
    await keeper.accept(make_envelope(), CONTENT, rows)
    assert [head.queue_key for head in await keeper.keys()] == keys


async def test_the_oldest_message_shows_in_stats(keeper: Spool) -> None:
    await keeper.accept(make_envelope(make_id(NOW_MS + 500)), CONTENT, [make_row()])
    await keeper.accept(make_envelope(make_id(NOW_MS - 500)), CONTENT, [make_row()])
    assert (await keeper.stats()).oldest_accepted_ms == NOW_MS - 500


# --- reporting ---


async def test_unreported_messages_come_oldest_first_until_reported(keeper: Spool) -> None:
    old, new = make_envelope(make_id(NOW_MS)), make_envelope(make_id(NOW_MS + 10))
    await keeper.accept(new, CONTENT, [make_row()])
    await keeper.accept(old, CONTENT, [make_row()])
    assert await keeper.unreported(10) == [old.message_id, new.message_id]
    assert await keeper.unreported(1) == [old.message_id]
    await keeper.settle(settlement(old.message_id, [], b"accepted", reported=True))
    assert await keeper.unreported(10) == [new.message_id]


async def test_a_message_that_is_gone_is_not_unreported(keeper: Spool) -> None:
    envelope, row = make_envelope(), make_row()
    await keeper.accept(envelope, CONTENT, [row])
    await keeper.settle(settlement(envelope.message_id, [change(row, State.SENT)], b"record"))
    assert await keeper.unreported(10) == []


async def test_what_is_being_sent_by_this_incarnation_is_not_interrupted(keeper: Spool) -> None:
    await keeper.accept(make_envelope(), CONTENT, [make_row(state=State.SENDING, attempt=1)])
    assert await keeper.interrupted() == []


# --- records ---


async def _write_records(spool: Spool, count: int, size: int = 10) -> list[bytes]:
    records = [b"%010d" % number + bytes(size - 10) for number in range(1, count + 1)]
    await asyncio.gather(*(spool.write_record(record) for record in records))
    return records


async def test_records_follow_a_number_in_order(keeper: Spool) -> None:
    records = await _write_records(keeper, 20)
    assert await keeper.records(0, 100, 1_000_000) == (1, records)
    assert await keeper.records(7, 3, 1_000_000) == (8, records[7:10])
    assert await keeper.records(20, 3, 1_000_000) == (21, [])


async def test_records_of_several_commits_follow_each_other(keeper: Spool) -> None:
    for number in range(5):
        await asyncio.gather(*(keeper.write_record(b"%d.%d" % (number, part)) for part in range(number + 1)))
    first, records = await keeper.records(1, 100, 1_000)
    assert (first, len(records), records[-1]) == (2, 14, b"4.4")


async def test_records_stop_at_max_bytes_but_never_at_none(keeper: Spool) -> None:
    records = await _write_records(keeper, 5, size=100)
    assert await keeper.records(0, 100, 250) == (1, records[:2])
    assert await keeper.records(0, 100, 1) == (1, records[:1])


async def test_empty_and_large_records_are_kept(keeper: Spool) -> None:
    records = [b"", b"x" * 2_000_000, b""]
    await asyncio.gather(*(keeper.write_record(record) for record in records))
    assert await keeper.records(0, 10, 10_000_000) == (1, records)


async def test_acknowledged_records_can_be_read_again_within_the_tail(keeper: Spool, clock: ManualClock) -> None:
    records = await _write_records(keeper, 10)
    await keeper.acknowledge(10)
    clock.advance(TEN_MINUTES_S - 60)
    await keeper.acknowledge(10)
    assert await keeper.records(0, 100, 1_000) == (1, records)


async def test_the_mark_goes_back_within_the_tail(keeper: Spool) -> None:
    await _write_records(keeper, 10)
    await keeper.acknowledge(10)
    await keeper.acknowledge(4)
    assert (await keeper.stats()).acknowledged == 4


async def test_the_tail_is_forgotten_after_ten_minutes_and_the_mark_goes_back_no_further(
    keeper: Spool, clock: ManualClock
) -> None:
    await _write_records(keeper, 10)
    await keeper.acknowledge(10)
    clock.advance(TEN_MINUTES_S + 10)
    await keeper.write_record(b"eleven")
    await keeper.acknowledge(11)
    first = (await keeper.stats()).outbox_first
    assert first == 11
    assert await keeper.records(0, 100, 1_000) == (11, [b"eleven"])
    await keeper.acknowledge(2)
    assert (await keeper.stats()).acknowledged == 10


async def test_what_was_taken_back_is_kept_whatever_its_age(keeper: Spool, clock: ManualClock) -> None:
    records = await _write_records(keeper, 10)
    await keeper.acknowledge(10)
    await keeper.acknowledge(0)
    clock.advance(2 * TEN_MINUTES_S)
    await keeper.acknowledge(0)
    assert await keeper.records(0, 100, 1_000) == (1, records)


async def test_the_tail_is_never_longer_than_64_mib(keeper: Spool) -> None:
    record = bytes(4 * 1024 * 1024)
    for _ in range(20):
        await keeper.write_record(record)
    for _ in range(5):
        await keeper.acknowledge(20)
    stats = await keeper.stats()
    assert (stats.outbox_last - stats.outbox_first + 1) * len(record) <= TAIL_BYTES
    assert stats.outbox_first <= 6


async def test_records_not_acknowledged_are_kept_whatever_their_age(keeper: Spool, clock: ManualClock) -> None:
    records = await _write_records(keeper, 3)
    clock.advance(100 * TEN_MINUTES_S)
    await keeper.acknowledge(0)
    assert await keeper.records(0, 100, 1_000) == (1, records)


async def test_numbers_go_on_after_everything_was_acknowledged_and_trimmed(keeper: Spool, clock: ManualClock) -> None:
    await _write_records(keeper, 3)
    await keeper.acknowledge(3)
    clock.advance(2 * TEN_MINUTES_S)
    await keeper.acknowledge(3)
    assert await keeper.write_record(b"four") == 4


# --- contents that arrive in pieces ---


async def test_a_content_that_arrives_in_pieces_reads_back_whole(keeper: Spool) -> None:
    envelope, rows = make_envelope(), [make_row(0), make_row(1)]
    pieces = [CONTENT, b"", b"x" * 300_000, b"y", b"z" * 70_000]
    incoming = keeper.receive(envelope.message_id)
    await incoming.write(pieces[0])
    # The rest is not waited for: accepting takes whatever was written before it.
    writes = [incoming.write(piece) for piece in pieces[1:]]
    assert incoming.size_bytes == sum(map(len, pieces))
    await incoming.accept(envelope, rows)
    await asyncio.gather(*writes)
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.content == b"".join(pieces)
    assert stored.envelope == envelope
    assert stored.recipients == tuple(rows)


async def test_a_content_without_a_piece_is_an_empty_one(keeper: Spool) -> None:
    envelope = make_envelope()
    await keeper.receive(envelope.message_id).accept(envelope, [make_row()])
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.content == b""


async def test_a_content_that_is_discarded_leaves_nothing(keeper: Spool) -> None:
    envelope = make_envelope()
    incoming = keeper.receive(envelope.message_id)
    await incoming.write(b"x" * 100_000)
    incoming.discard()
    incoming.discard()
    with pytest.raises(SpoolError):
        await incoming.write(b"late")
    with pytest.raises(SpoolError):
        await incoming.accept(envelope, [make_row()])
    assert await keeper.load(envelope.message_id) is None
    assert (await keeper.stats()).waiting_count == 0


async def test_a_settlement_of_a_message_waits_for_its_pieces(keeper: Spool) -> None:
    envelope, row = make_envelope(), make_row()
    incoming = keeper.receive(envelope.message_id)
    incoming.write(b"x" * 1_000_000)
    incoming.accept(envelope, [row]).cancel()
    assert await keeper.settle(settlement(envelope.message_id, [change(row, State.DEFERRED, new_attempt=1)])) == 1


async def test_discarding_after_accept_changes_nothing(keeper: Spool) -> None:
    envelope = make_envelope()
    incoming = keeper.receive(envelope.message_id)
    incoming.write(CONTENT)
    accepted = incoming.accept(envelope, [make_row()])
    incoming.discard()
    await accepted
    assert await keeper.load(envelope.message_id) is not None


async def test_pieces_of_an_id_that_is_stored_leave_the_first_message_alone(keeper: Spool) -> None:
    for first_content in (CONTENT, b"x" * 100_000):
        envelope = make_envelope()
        await keeper.accept(envelope, first_content, [make_row()])
        incoming = keeper.receive(envelope.message_id)
        incoming.write(b"other" * 20_000)
        with pytest.raises(SpoolError):
            await incoming.accept(envelope, [make_row()])
        stored = await keeper.load(envelope.message_id)
        assert stored is not None
        assert stored.content == first_content


async def test_pieces_are_for_the_message_that_they_were_begun_for(keeper: Spool) -> None:
    incoming = keeper.receive(make_id())
    incoming.write(CONTENT)
    envelope = make_envelope()
    with pytest.raises(SpoolError):
        await incoming.accept(envelope, [make_row()])
    assert await keeper.load(envelope.message_id) is None


async def test_impossible_recipients_are_refused_for_pieces_too(keeper: Spool) -> None:
    envelope = make_envelope()
    incoming = keeper.receive(envelope.message_id)
    incoming.write(CONTENT)
    with pytest.raises(SpoolError):
        await incoming.accept(envelope, [])
    assert await keeper.load(envelope.message_id) is None


async def test_pieces_complete_on_every_spool(spool: Spool) -> None:
    envelope = make_envelope()
    incoming = spool.receive(envelope.message_id)
    await incoming.write(CONTENT)
    await incoming.accept(envelope, [make_row()])
    with pytest.raises(SpoolError):
        await incoming.accept(envelope, [make_row()])


async def test_no_content_begins_after_close(spool: Spool) -> None:
    begun = spool.receive(make_id())
    await spool.close()
    for incoming in (begun, spool.receive(make_id())):
        with pytest.raises(SpoolError):
            await incoming.write(CONTENT)


async def test_a_new_spool_is_not_strained(spool: Spool) -> None:
    assert not spool.strained


async def test_recipients_are_counted_by_state(keeper: Spool, clock: ManualClock) -> None:
    rows = [make_row(), make_row(1, state=State.SENDING, attempt=1)]
    envelope = make_envelope()
    await keeper.accept(envelope, CONTENT, rows)
    assert await keeper.depth() == QueueDepth(queued=1, sending=1)
    await keeper.settle(
        settlement(envelope.message_id, [change(rows[0], State.HELD), change(rows[1], State.DEFERRED)], b"record")
    )
    clock.advance(1.1)
    assert await keeper.depth() == QueueDepth(deferred=1, held=1)


# --- commands: whole settlements, descriptions, walks ---


async def test_a_whole_settlement_with_one_stale_attempt_changes_nothing(keeper: Spool) -> None:
    envelope, rows = make_envelope(), [make_row(0), make_row(1)]
    await keeper.accept(envelope, CONTENT, rows)
    stale = [change(rows[0], State.HELD, new_attempt=1), change(rows[1], State.HELD, attempt=7)]
    whole = settlement(envelope.message_id, stale, b"record", reported=True)._replace(whole=True)
    assert await keeper.settle(whole) == 0
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert [row.state for row in stored.recipients] == [State.QUEUED, State.QUEUED]
    assert not stored.reported
    assert (await keeper.records(0, 10, 1 << 20))[1] == []
    present = [change(row, State.HELD, new_attempt=1) for row in rows]
    assert await keeper.settle(whole._replace(changes=present)) == 2
    assert (await keeper.records(0, 10, 1 << 20))[1] == [b"record"]


async def test_a_whole_settlement_of_a_message_that_is_gone_changes_nothing(keeper: Spool) -> None:
    gone = settlement(make_id(), [change(make_row(), State.CANCELLED)], b"record")._replace(whole=True)
    assert await keeper.settle(gone) == 0


async def test_whole_settlements_in_one_batch_stand_or_fall_alone(keeper: Spool) -> None:
    first, second, row = make_envelope(), make_envelope(), make_row()
    await asyncio.gather(keeper.accept(first, CONTENT, [row]), keeper.accept(second, CONTENT, [row]))
    good = settlement(first.message_id, [change(row, State.CANCELLED)], b"good", reported=True)._replace(whole=True)
    stale = settlement(second.message_id, [change(row, State.CANCELLED, attempt=1)], b"stale", reported=True)
    good_count, stale_count = await asyncio.gather(keeper.settle(good), keeper.settle(stale._replace(whole=True)))
    assert (good_count, stale_count) == (1, 0)
    assert (await keeper.records(0, 10, 1 << 20))[1] == [b"good"]
    assert (await keeper.load(first.message_id), (await keeper.stats()).waiting_count) == (None, 1)


async def test_a_description_is_the_message_without_its_content(keeper: Spool) -> None:
    envelope = make_envelope()
    await keeper.accept(envelope, CONTENT, [make_row(0), make_row(1, state=State.HELD)])
    loaded, described = await keeper.load(envelope.message_id), await keeper.describe(envelope.message_id)
    assert loaded is not None
    assert described == loaded._replace(content=b"")
    assert await keeper.describe(make_id()) is None


async def test_a_walk_finds_recipients_of_all_states_in_order_and_in_slices(keeper: Spool) -> None:
    states = [State.SCHEDULED, State.QUEUED, State.SENDING, State.DEFERRED, State.HELD]
    ids = [make_id(NOW_MS + number) for number in range(3)]
    for message_id in reversed(ids):
        rows = [make_row(index, state=state, queue_key=OTHER_KEY) for index, state in enumerate(states)]
        await keeper.accept(make_envelope(message_id), CONTENT, rows)
    expected = [WalkedRow(one, index, state, OTHER_KEY) for one in ids for index, state in enumerate(states)]
    found: list[WalkedRow] = []
    position = (MessageId(b""), 0)
    while page := await keeper.walk(position, first_message_id(NOW_MS + 9), 4):
        assert len(page) <= 4
        found += page
        position = page[-1][:2]
    assert found == expected
    assert await keeper.walk((ids[0], 4), ids[2], 100) == expected[5:10]
    assert await keeper.walk((ids[1], 1 << 30), first_message_id(NOW_MS + 9), 100) == expected[10:]


async def test_a_walk_goes_on_behind_what_was_changed_meanwhile(keeper: Spool) -> None:
    envelopes, row = [make_envelope() for _ in range(4)], make_row()
    for envelope in envelopes:
        await keeper.accept(envelope, CONTENT, [row])
    first, second, third, fourth = (envelope.message_id for envelope in envelopes)
    before = first_message_id(NOW_MS + 1)
    assert [one.message_id for one in await keeper.walk((MessageId(b""), 0), before, 2)] == [first, second]
    ends = [settlement(one, [change(row, State.CANCELLED)]) for one in (second, third)]
    await asyncio.gather(*map(keeper.settle, ends))
    assert [one.message_id for one in await keeper.walk((second, 0), before, 2)] == [fourth]


async def test_a_walk_of_nothing_is_empty(spool: Spool) -> None:
    assert await spool.walk((MessageId(b""), 0), make_id(), 10) == []
    assert await spool.describe(make_id()) is None


# --- submission keys ---


def keyed(name: bytes, clock: ManualClock, *, content_hash: bytes = b"c" * 32, checked: bool = False) -> Envelope:
    envelope = make_envelope(accepted_ms=clock.now_ms)
    return replace(envelope, submission_key=SubmissionKey(name * 32, content_hash, checked))


async def test_a_spool_knows_no_key_that_it_was_not_given(spool: Spool) -> None:
    assert spool.submitted(b"k" * 32) is None


async def test_messages_with_keys_are_stored_as_others_are(spool: Spool, clock: ManualClock) -> None:
    await asyncio.gather(*(spool.accept(keyed(b"%c" % name, clock), CONTENT, [make_row()]) for name in range(100)))


async def test_a_key_answers_with_its_message(keeper: Spool, clock: ManualClock) -> None:
    envelopes = [keyed(name, clock, content_hash=name * 32) for name in (b"a", b"b")]
    for envelope in envelopes:
        await keeper.accept(envelope, CONTENT, [make_row()])
    for name, envelope in zip((b"a", b"b"), envelopes, strict=True):
        assert keeper.submitted(name * 32) == Submitted(name * 32, envelope.message_id)
    assert keeper.submitted(b"c" * 32) is None


@pytest.mark.parametrize("checked", [False, True])
async def test_a_message_keeps_its_key(keeper: Spool, clock: ManualClock, *, checked: bool) -> None:
    envelope = keyed(b"k", clock, checked=checked)
    await keeper.accept(envelope, CONTENT, [make_row()])
    stored = await keeper.load(envelope.message_id)
    assert stored is not None
    assert stored.envelope == envelope


async def test_a_key_outlives_its_message_for_a_day(keeper: Spool, clock: ManualClock) -> None:
    envelope, row = keyed(b"k", clock), make_row()
    await keeper.accept(envelope, CONTENT, [row])
    await keeper.settle(settlement(envelope.message_id, [change(row, State.SENT)], b"record", reported=True))
    assert await keeper.load(envelope.message_id) is None
    clock.advance(DAY_S - 1)
    assert keeper.submitted(b"k" * 32) == Submitted(b"c" * 32, envelope.message_id)
    clock.advance(1)
    assert keeper.submitted(b"k" * 32) is None


async def test_a_key_that_a_message_has_is_refused_and_nothing_is_stored(keeper: Spool, clock: ManualClock) -> None:
    first, second = keyed(b"k", clock), keyed(b"k", clock)
    await keeper.accept(first, CONTENT, [make_row()])
    with pytest.raises(SpoolError):
        await keeper.accept(second, CONTENT, [make_row()])
    assert await keeper.load(second.message_id) is None
    assert keeper.submitted(b"k" * 32) == Submitted(b"c" * 32, first.message_id)
    assert (await keeper.stats()).waiting_count == 1


async def test_of_messages_at_once_with_one_key_one_is_stored(keeper: Spool, clock: ManualClock) -> None:
    envelopes = [keyed(b"k", clock) for _ in range(5)]
    others = [keyed(b"%d" % number, clock) for number in range(5)]
    writes = [keeper.accept(envelope, CONTENT, [make_row()]) for envelope in (*envelopes, *others)]
    ends = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(end) for end in ends[5:]] == [type(None)] * 5, "nobody else's message fails with them"
    assert [end is None for end in ends[:5]].count(True) == 1
    assert all(isinstance(end, SpoolError) for end in ends[:5] if end is not None)
    assert len(await keeper.unreported(100)) == 6


async def test_a_key_may_be_used_again_after_a_day(keeper: Spool, clock: ManualClock) -> None:
    await keeper.accept(keyed(b"k", clock), CONTENT, [make_row()])
    clock.advance(DAY_S)
    second = keyed(b"k", clock, content_hash=b"d" * 32)
    await keeper.accept(second, CONTENT, [make_row()])
    assert keeper.submitted(b"k" * 32) == Submitted(b"d" * 32, second.message_id)


async def test_a_key_is_kept_with_a_content_that_arrives_in_pieces(keeper: Spool, clock: ManualClock) -> None:
    for size_bytes in (1_000, 100_000):
        envelope = keyed(b"%c" % (size_bytes % 251), clock)
        assert envelope.submission_key is not None
        incoming = keeper.receive(envelope.message_id)
        await incoming.write(b"x" * size_bytes)
        assert keeper.submitted(envelope.submission_key.key_hash) is None
        await incoming.accept(envelope, [make_row()])
        assert keeper.submitted(envelope.submission_key.key_hash) == Submitted(b"c" * 32, envelope.message_id)


async def test_no_key_is_known_of_a_message_that_was_not_stored(keeper: Spool, clock: ManualClock) -> None:
    envelope = keyed(b"k", clock)
    await keeper.accept(envelope, CONTENT, [make_row()])
    twin = replace(envelope, submission_key=SubmissionKey(b"l" * 32, b"c" * 32))
    with pytest.raises(SpoolError):
        await keeper.accept(twin, CONTENT, [make_row()])
    assert keeper.submitted(b"l" * 32) is None


async def test_keys_are_not_looked_up_after_close(spool: Spool) -> None:
    await spool.close()
    with pytest.raises(SpoolError):
        spool.submitted(b"k" * 32)
