"""What a spool says of those that wait: exact as of any record it can still send, while it goes on and after harm."""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest

from dataplane.adapters.spool_sqlite import SqliteSpool, statement
from dataplane.core.envelope import make_queue_key
from dataplane.core.queue import TERMINAL, State
from dataplane.core.waiting import BUCKETS, Tally, Waiting, WaitingQuestion, WaitingStatement, bucket_of, tally
from dataplane.ports import SpoolError
from postroad.node.v1.ledger_pb2 import LedgerRecord as Message
from support.random_mail import ACCOUNT, Mail, harm
from support.spools import NOW_MS, ManualClock, open_durable


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[SqliteSpool]:
    spool = await open_durable(tmp_path / str(uuid.uuid4()), ManualClock())
    yield spool
    await spool.close()


async def _ask(spool: SqliteSpool, record: int, account: str = "", buckets: Iterable[int] = ()) -> WaitingStatement:
    question = WaitingQuestion(spool.identity.spool, 7, record, account, tuple(buckets))
    answer = await spool.waiting(question)
    assert (answer.spool, answer.number) == (spool.identity.spool, 7)
    return answer


async def _ledger(spool: SqliteSpool) -> list[set[Waiting]]:
    """Who waits in a ledger that has stored so many records."""
    _, records = await spool.records(0, 100_000, 1 << 30)
    waiting: set[Waiting] = set()
    story = [set(waiting)]
    for record in map(Message.FromString, records):
        waiting |= {Waiting(record.message_id, index) for index in range(len(record.accepted.recipients))}
        waiting -= {Waiting(record.message_id, one.index) for one in record.recipients if State(one.state) in TERMINAL}
        story.append(set(waiting))
    return story


def _tally(waiting: Iterable[Waiting]) -> Tally:
    total = Tally()
    for one in waiting:
        total = total.plus(tally(*one))
    return total


@pytest.mark.parametrize("seed", range(4))
async def test_it_speaks_exactly_as_of_every_record(
    spool: SqliteSpool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statement, "PAGE_ROWS", 5)
    mail = Mail(spool, random.Random(seed))
    for _ in range(120):
        await mail.step()

    story = await _ledger(spool)

    assert len(story) > 40
    for record, waiting in enumerate(story):
        totals = (await _ask(spool, record)).totals
        assert {account: total for account, _, total in totals} == ({ACCOUNT: _tally(waiting)} if waiting else {})
        by_bucket = (await _ask(spool, record, ACCOUNT)).totals
        assert sum(total.count for _, _, total in by_bucket) == len(waiting)
        assert {bucket for _, bucket, _ in by_bucket} == {bucket_of(one.message_id) for one in waiting}
        half = {bucket for bucket in range(BUCKETS) if bucket % 2}
        named = (await _ask(spool, record, ACCOUNT, half)).recipients
        assert {one for _, one in named} == {one for one in waiting if bucket_of(one.message_id) in half}


async def test_accounts_are_told_apart(spool: SqliteSpool) -> None:
    mail = Mail(spool, random.Random(1))
    message_id = await mail.accept(2)
    await mail.settle(message_id, {})
    key = make_queue_key("accounts/other", "providers/x")
    harm(spool, "UPDATE recipient SET queue_key = ? WHERE idx = 1", key)

    totals = (await _ask(spool, 1)).totals

    expected = {ACCOUNT: tally(message_id, 0), "accounts/other": tally(message_id, 1)}
    assert {account: total for account, _, total in totals} == expected
    other = (await _ask(spool, 1, "accounts/other", range(BUCKETS))).recipients
    assert other == (("accounts/other", Waiting(message_id, 1)),)


DELETIONS = ["DELETE FROM recipient WHERE message_id = ?", "DELETE FROM message WHERE id = ?"]


@pytest.mark.parametrize("deletion", DELETIONS)
async def test_what_a_hand_deleted_waits_no_more(spool: SqliteSpool, deletion: str) -> None:
    mail = Mail(spool, random.Random(2))
    lost, kept = await mail.accept(1), await mail.accept(1)
    for one in (lost, kept):
        await mail.settle(one, {})

    harm(spool, deletion, lost)

    named = (await _ask(spool, 2, ACCOUNT, range(BUCKETS))).recipients
    assert [one for _, one in named] == [Waiting(kept, 0)]
    assert (await _ask(spool, 2)).totals == ((ACCOUNT, 0, tally(kept, 0)),)


@pytest.mark.parametrize(
    ("state", "due_ms", "found"),
    [
        (State.DEFERRED, 0, True),
        (State.QUEUED, NOW_MS + 31 * 86_400_000, True),
        (State.SCHEDULED, NOW_MS + 31 * 86_400_000, False),
        (State.DEFERRED, NOW_MS - 86_400_000, False),
        (State.HELD, 0, False),
        (State.SENDING, 0, False),
    ],
)
async def test_who_waits_without_a_time_is_named(spool: SqliteSpool, state: State, due_ms: int, found: bool) -> None:  # noqa: FBT001
    message_id = await Mail(spool, random.Random(3)).accept(1)
    harm(spool, "UPDATE recipient SET state = ?, due_ms = ?", int(state), due_ms)

    late = (await _ask(spool, 0)).without_deadline

    assert late == (((ACCOUNT, Waiting(message_id, 0)),) if found else ())


async def test_what_was_set_aside_is_named(spool: SqliteSpool) -> None:
    mail = Mail(spool, random.Random(4))
    message_id = await mail.accept(1)
    await mail.settle(message_id, {})
    harm(spool, "UPDATE message SET checksum = checksum + 1")
    with pytest.raises(SpoolError, match="quarantined"):
        await spool.load(message_id)

    answer = await _ask(spool, 1, ACCOUNT, [bucket_of(message_id)])

    assert (answer.recipients, answer.quarantined) == ((), (message_id,))


async def _far_behind(spool: SqliteSpool, monkeypatch: pytest.MonkeyPatch) -> int:
    del spool
    monkeypatch.setattr(statement, "MOST_RECORDS", 2)
    return 0


async def _not_written(spool: SqliteSpool, monkeypatch: pytest.MonkeyPatch) -> int:
    del spool, monkeypatch
    return 4


async def _damaged(spool: SqliteSpool, monkeypatch: pytest.MonkeyPatch) -> int:
    del monkeypatch
    harm(spool, "UPDATE outbox SET checksum = checksum + 1")
    return 1


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (_far_behind, "the ledger lags by 3 records"),
        (_not_written, "there are records 1 to 3, and 4 was asked for"),
        (_damaged, "the spool cannot be read: DamagedRowError"),
    ],
)
async def test_what_cannot_be_answered_is_answered_with_why(
    spool: SqliteSpool, harm: Callable[..., object], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail = Mail(spool, random.Random(5))
    for _ in range(3):
        await mail.settle(await mail.accept(), {})
    record = await harm(spool, monkeypatch)  # type: ignore[misc]

    assert await _ask(spool, record) == WaitingStatement(spool.identity.spool, 7, error)
