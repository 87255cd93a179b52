"""Hand-over between two real spools over a real database: what moves, that it moves once whatever is lost on the way,
and that books and commands follow it.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path

import pytest

from controlplane.ports_queue import NO_SPOOL
from dataplane.core.envelope import make_queue_key
from dataplane.core.idempotency import SubmissionKey
from dataplane.core.queue import State, Verb
from dataplane.ports import Settlement
from support.databases import Database
from support.fleet import NOW, NOW_MS, add_node, execute, fetch, fleet_database
from support.handover import Plane, Side, drain, side
from support.spools import KEY, change, make_row

FIRST, SECOND = str(uuid.uuid4()), str(uuid.uuid4())
LARGE = b"".join(b"%07d\r\n" % number for number in range(100_000))
Open = Callable[[str], AbstractAsyncContextManager[Side]]


@pytest.fixture
async def plane(migrated_database: Database) -> AsyncIterator[Plane]:
    for number, node in enumerate(("mx1", "mx2", "mx3")):
        await add_node(migrated_database, node, serial=f"a{number}")
    async with fleet_database(migrated_database) as fleet:
        yield Plane(migrated_database, fleet)


@pytest.fixture
def opened(plane: Plane, tmp_path: Path) -> Open:
    """Open the spool of a node, the same one each time."""
    names = {"mx1": FIRST, "mx2": SECOND, "mx3": str(uuid.uuid4())}
    return lambda node: side(plane, node, tmp_path / node / names[node])


async def owners(plane: Plane) -> set[uuid.UUID]:
    return {row["spool"] for row in await fetch(plane.database, "SELECT spool FROM postroad.messages")}


async def left_over(plane: Plane) -> int:
    (row,) = await fetch(
        plane.database,
        """
        SELECT (SELECT count(*) FROM postroad.handovers) + (SELECT count(*) FROM postroad.handover_contents)
            + (SELECT count(*) FROM postroad.ledger_rejects) AS count
        """,
    )
    return int(row["count"])


async def test_what_moves_is_what_it_was(plane: Plane, opened: Open) -> None:
    pinned = make_queue_key("accounts/demo", "providers/other", 5, pinned=True)
    rows = (
        make_row(0, state=State.DEFERRED, attempt=3, due_ms=NOW_MS + 60_000),
        make_row(1, state=State.HELD, attempt=2),
        make_row(2, state=State.SCHEDULED, due_ms=NOW_MS + 3_600_000),
        make_row(3, due_ms=NOW_MS, priority=5, queue_key=pinned),
    )
    key = SubmissionKey(b"k" * 32, b"c" * 32, checked=True)
    async with opened("mx1") as giver, opened("mx2") as taker:
        small = await giver.accept(*rows, priority=5, submission_key=key, send_time_ms=NOW_MS + 3_600_000)
        large = await giver.accept(content=LARGE)
        empty = await giver.accept(content=b"")
        before = {one.message_id: await giver.spool.load(one.message_id) for one in (small, large, empty)}
        await drain(plane.database, "mx1")
        assert await giver.give_all() == 3
        assert await owners(plane) == {NO_SPOOL}
        assert (await giver.spool.stats()).waiting_count == 0
        assert not list((giver.spool._folder / "content").iterdir())
        assert await taker.take_all() == 3
        for envelope in (small, large, empty):
            stored, former = await taker.spool.load(envelope.message_id), before[envelope.message_id]
            assert former is not None
            assert stored is not None
            assert (stored.envelope, stored.content, stored.recipients) == former[:3]
            assert stored.reported
        assert taker.spool.submitted(key.key_hash) is not None
        assert taker.engine.woken == {KEY, pinned}
        assert giver.engine.locked == set()
        assert await owners(plane) == {uuid.UUID(SECOND)}
    assert await left_over(plane) == 0
    (row,) = await fetch(plane.database, "SELECT node, message_count, recipient_count FROM postroad.drain_targets")
    assert tuple(row) == ("mx2", 3, 6)


async def test_what_is_being_sent_stays_and_a_claim_on_its_way_finds_nothing(plane: Plane, opened: Open) -> None:
    async with opened("mx1") as giver:
        sending = await giver.accept(make_row(0), make_row(1))
        row = make_row(0)
        await giver.spool.settle(
            Settlement(sending.message_id, [change(row, State.SENDING, new_attempt=1)], None, reported=False)
        )
        going = await giver.accept()
        assert await giver.give_all() == 1
        assert await giver.rows(going) is None
        assert await giver.rows(sending) is not None
        claim = Settlement(going.message_id, [change(make_row(), State.SENDING, new_attempt=1)], None, reported=False)
        assert await giver.spool.settle(claim) == 0
        stale = [make_row(0, attempt=4), make_row(1)]
        assert await giver.spool.give(sending.message_id, stale, [b"record"]) == 0
        exact = await giver.rows(sending)
        assert exact is not None
        assert await giver.spool.give(sending.message_id, exact, [b"record"]) == 0
        assert (await giver.spool.stats()).waiting_count == 2
    assert await owners(plane) == {NO_SPOOL}


async def test_a_giver_that_is_killed_after_its_commit_sends_nothing_and_its_mail_moves_when_it_is_back(
    plane: Plane, opened: Open
) -> None:
    async with opened("mx1") as giver:
        envelope = await giver.accept()
        await giver.give_unreported()
    async with opened("mx1") as giver, opened("mx2") as taker:
        assert await giver.spool.keys() == []
        assert await taker.take_all() == 0
        await giver.report()
        assert await taker.take_all() == 1
        assert await giver.rows(envelope) is None
        assert await taker.rows(envelope) is not None
    assert await left_over(plane) == 0


async def test_records_that_are_sent_again_move_nothing_again(plane: Plane, opened: Open) -> None:
    async with opened("mx1") as giver, opened("mx2") as taker:
        await giver.accept()
        await giver.give_all()
        giver.stored = 0
        await giver.report()
        assert await taker.take_all() == 1
        giver.stored = 0
        await giver.report()
        assert await taker.take_all() == 0
        assert await owners(plane) == {uuid.UUID(SECOND)}
    assert await left_over(plane) == 0


async def test_an_answer_that_is_lost_leaves_the_mail_to_who_was_to_have_it(plane: Plane, opened: Open) -> None:
    async with opened("mx1") as giver, opened("mx2") as taker, opened("mx3") as other:
        envelope = await giver.accept()
        await giver.give_all()
        taker.lose_answers = True
        assert await taker.take_all() == 0
        assert await other.take_all() == 0
        assert await plane.store.invited([other.name, taker.name]) == [taker.name]
        taker.lose_answers = False
        assert await taker.take_all() == 1
        assert await taker.rows(envelope) is not None


async def test_a_taker_that_is_killed_before_its_commit_is_given_the_mail_again(plane: Plane, opened: Open) -> None:
    async with opened("mx1") as giver:
        envelope = await giver.accept()
        await giver.give_all()
    async with opened("mx2") as taker:
        taker.lose_answers = True
        await taker.take_all()
    async with opened("mx3") as other, opened("mx2") as taker:
        assert await other.take_all() == 0
        assert await taker.take_all() == 1
        assert await taker.rows(envelope) is not None


async def test_a_taker_that_is_killed_after_its_commit_is_not_given_the_mail_again_though_it_has_sent_it(
    plane: Plane, opened: Open
) -> None:
    async with opened("mx1") as giver:
        envelope = await giver.accept()
        await giver.give_all()
    async with opened("mx2") as taker:
        found = await plane.store.take("mx2", taker.name, 0)
        assert [one.message_id for one in found] == [envelope.message_id]
        await taker.take_all_but_report()
        # It is sent, and with that gone from the spool, before anybody heard that it had been here.
        row = make_row()
        await taker.spool.settle(
            Settlement(envelope.message_id, [change(row, State.SENT, new_attempt=1)], None, reported=True)
        )
    async with opened("mx2") as taker:
        last = (await taker.spool.stats()).outbox_last
        assert await plane.store.take("mx2", taker.name, last) == []
        assert await taker.take_all() == 0
        assert (await taker.spool.stats()).waiting_count == 0
    assert await left_over(plane) == 0


async def test_a_node_that_drains_itself_is_given_nothing_but_what_it_was_given_before(
    plane: Plane, opened: Open
) -> None:
    async with opened("mx1") as giver, opened("mx2") as taker:
        await giver.accept()
        await giver.give_all()
        taker.lose_answers = True
        await taker.take_all()
        taker.lose_answers = False
        await giver.accept()
        await giver.give_all()
        await drain(plane.database, "mx2")
        assert await plane.store.invited([taker.name]) == [taker.name]
        assert await taker.take_all() == 1
        assert await plane.store.invited([taker.name]) == []
        # Undrained, the giver is one of those who may have it.
        assert await giver.take_all() == 1
    assert await left_over(plane) == 0


async def test_only_the_spools_own_node_takes_and_none_that_is_refused_or_of_another_pool(
    plane: Plane, opened: Open
) -> None:
    await add_node(plane.database, "far", "other", "bb")
    async with opened("mx1") as giver, opened("mx2") as taker:
        await giver.accept()
        await giver.give_all()
        assert await plane.store.take("mx3", taker.name, 0) == []
        assert await plane.store.take("mx2", taker.name, 1) == []
        await execute(plane.database, "UPDATE postroad.spools SET accepted = false WHERE node = 'mx2'")
        assert await plane.store.take("mx2", taker.name, 0) == []
        await execute(plane.database, "UPDATE postroad.spools SET accepted = true, node = 'far' WHERE node = 'mx2'")
        assert await plane.store.invited([taker.name]) == []
        assert await plane.store.take("far", taker.name, 0) == []


async def test_a_spool_that_says_that_it_took_what_it_was_not_given_is_not_believed(plane: Plane, opened: Open) -> None:
    async with opened("mx1") as giver, opened("mx2") as taker, opened("mx3") as other:
        envelope = await giver.accept()
        before = await giver.spool.load(envelope.message_id)
        assert before is not None
        await giver.give_all()
        await plane.store.take("mx2", taker.name, 0)
        await other.take_by_hand(before)
        assert [row["reason"] for row in await fetch(plane.database, "SELECT reason FROM postroad.ledger_rejects")] == [
            "UNKNOWN_RECIPIENT"
        ]
        assert await taker.take_all() == 1
        assert await owners(plane) == {uuid.UUID(SECOND)}


async def test_a_hand_over_whose_content_is_not_whole_is_set_aside_with_all_that_it_says(
    plane: Plane, opened: Open
) -> None:
    async with opened("mx1") as giver:
        await giver.accept(content=LARGE)
        await giver.give_unreported()
        first, records = await giver.spool.records(0, 10_000, 1 << 30)
        await execute(plane.database, "DELETE FROM postroad.handover_contents")
        giver.stored = 0
        await giver.report_without_pieces(first, records)
        (reject,) = await fetch(plane.database, "SELECT reason, record FROM postroad.ledger_rejects")
        assert (reject["reason"], reject["record"]) == ("REFUSED_BY_DATABASE", records[-1])
        assert await fetch(plane.database, "SELECT 1 FROM postroad.handovers") == []


async def test_each_recipient_waits_in_one_book_at_most_and_the_books_agree_at_each_step(
    plane: Plane, opened: Open
) -> None:
    async with opened("mx1") as giver, opened("mx2") as taker:
        for number in range(5):
            await giver.accept(*(make_row(index) for index in range(number + 1)))
        await giver.give_unreported()
        # The spool speaks as of what the ledger knows: before and after that is told.
        assert await giver.book() == (True, True)
        await giver.report()
        assert await giver.book() == (True, True)
        assert await taker.book() == (True, True)
        await taker.take_all_but_report()
        assert await taker.book() == (True, True)
        await taker.report()
        assert await taker.book() == (True, True)
        # What was not given up with the first commit is the giver's.
        await giver.report_acceptance()
        await giver.report()
        assert await giver.book() == (True, True)
        books = await plane.books.read_books([FIRST, SECOND])
        sides = [books[name].accounts["demo"] for name in (FIRST, SECOND)]
        assert sum(one.entries.accepted for one in sides) == sum(one.waiting.count for one in sides) == 15
        assert sides[1].waiting.count > 0


async def test_mail_that_nobody_takes_is_named(plane: Plane, opened: Open) -> None:
    async with opened("mx1") as giver:
        await giver.accept()
        await giver.give_all()
    now = NOW + timedelta(minutes=1)
    silent = await plane.books.silent_spools(now - timedelta(minutes=10))
    assert str(NO_SPOOL) not in {one.spool for one in silent}
    await execute(plane.database, "UPDATE postroad.handovers SET create_time = now() - interval '1 hour'")
    silent = await plane.books.silent_spools(now - timedelta(minutes=10))
    assert {one.spool for one in silent if one.counts} == {str(NO_SPOOL)}


async def test_a_command_for_one_message_follows_it(plane: Plane, opened: Open) -> None:
    async with opened("mx1") as giver, opened("mx2") as taker:
        envelope = await giver.accept()
        await giver.report_acceptance()
        (row,) = await fetch(
            plane.database,
            "INSERT INTO postroad.commands (account, verb, spool, message_ids) VALUES ('demo', $1, $2, ARRAY[$3::uuid])"
            " RETURNING command",
            *(int(Verb.HOLD), uuid.UUID(FIRST), uuid.UUID(bytes=envelope.message_id)),
        )
        await giver.give_all()
        # The spool that gave it up calls it too late; nobody listens.
        await giver.answer_command(row["command"], too_late=1)
        spools = [one["spool"] for one in await fetch(plane.database, "SELECT spool FROM postroad.commands")]
        assert spools == [NO_SPOOL]
        await taker.take_all()
        (command,) = await fetch(plane.database, "SELECT spool, done_time, too_late_count FROM postroad.commands")
        assert tuple(command) == (uuid.UUID(SECOND), None, 0)


@pytest.mark.parametrize("when", ["before", "between", "ended"])
async def test_a_command_with_a_filter_reaches_what_it_described_before_it_moved(
    plane: Plane, opened: Open, when: str
) -> None:
    async with opened("mx1") as giver, opened("mx2") as taker:
        envelope = await giver.accept()
        await giver.report_acceptance()

        async def ask() -> None:
            await execute(
                plane.database,
                """
                INSERT INTO postroad.commands (
                    operation, account, verb, spool, message_ids, accepted_before, position, done_time
                )
                SELECT o, 'demo', $1, spool, '{}', now(), '00000000-0000-0000-0000-000000000000',
                    CASE WHEN spool = $2 OR $3 THEN now() END
                FROM postroad.spools, (SELECT gen_random_uuid() AS o) AS one
                """,
                *(int(Verb.HOLD), uuid.UUID(SECOND), when == "ended"),
            )

        if when != "between":
            await ask()
        await giver.give_all()
        if when == "between":
            await ask()
        await taker.take_all()
        rows = await fetch(
            plane.database,
            "SELECT position FROM postroad.commands WHERE spool = $1 AND done_time IS NULL",
            uuid.UUID(SECOND),
        )
        if when == "ended":
            assert rows == []
        else:
            (row,) = rows
            assert row["position"] == uuid.UUID(int=uuid.UUID(bytes=envelope.message_id).int - 1)


async def test_a_drain_is_over_when_nothing_is_left_by_the_nodes_word_and_by_the_ledgers(
    plane: Plane, opened: Open
) -> None:
    await execute(plane.database, "INSERT INTO postroad.node_status (node) VALUES ('mx1')")
    async with opened("mx1") as giver, opened("mx2") as taker:
        await giver.accept()
        await giver.report_acceptance()
        await drain(plane.database, "mx1")
        assert await plane.store.end_drains(NOW) == []
        await execute(plane.database, "UPDATE postroad.node_status SET closed = true WHERE node = 'mx1'")
        # The node has said that nothing waits; the ledger knows of something that does.
        assert await plane.store.end_drains(NOW) == []
        await giver.give_all()
        assert await plane.store.end_drains(NOW) == []
        assert (await plane.store.sweep(NOW)).message_count == 1
        await taker.take_all()
        assert await plane.store.end_drains(NOW) == ["mx1"]
        assert await plane.store.end_drains(NOW) == []
        assert (await plane.store.sweep(NOW)) == (0, 0.0)
