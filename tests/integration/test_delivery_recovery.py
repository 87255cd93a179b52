"""What a start makes of what a former process left in a durable spool: the deliver path of a crash, row by row."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import pytest

from dataplane.core.config import RetryPolicy
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.queue import State
from dataplane.ports import Settlement
from support.delivery import CONTENT, KEY_A, A, Config, delivery_bench
from support.next_hop import STALL, Behaviour, next_hop
from support.spools import ManualClock, change, make_envelope, open_durable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / str(uuid.uuid4())


def row(clock: ManualClock, state: State, attempt: int, *, index: int = 0) -> RecipientRow:
    return RecipientRow(index, f"u{index}@x.test", state, attempt, clock.wall_ms(), 0, KEY_A)


async def leave_behind(folder: Path, clock: ManualClock, *rows: RecipientRow, reported: bool = False) -> Envelope:
    """A spool as a process left it that was killed."""
    spool = await open_durable(folder, clock)
    envelope = make_envelope(accepted_ms=clock.wall_ms())
    await spool.accept(envelope, CONTENT, rows)
    if reported:
        await spool.settle(Settlement(envelope.message_id, (), b"record", reported=True))
    await spool.close()
    return envelope


def routed(port: int) -> Config:
    config = Config()
    config.add_provider(A, port)
    config.route_to(A)
    return config


async def test_an_attempt_nobody_watched_is_uncertain_and_made_again_at_once(folder: Path) -> None:
    clock = ManualClock()
    envelope = await leave_behind(folder, clock, row(clock, State.SENDING, 1))
    spool = await open_durable(folder, clock)
    async with next_hop() as hop, delivery_bench(spool, clock=clock, config=routed(hop.port)) as bench:
        await bench.events_come(2)
        assert bench.types() == ["UNCERTAIN", "SENT"]
        assert [event.attempt for event in bench.events] == [1, 2]
        assert bench.records[0].accepted == envelope
        assert bench.records[1].accepted is None
        assert len(hop.messages) == 1
        assert bench.engine.counters.recovered == 1
    await spool.close()


async def test_a_later_attempt_that_ended_with_the_process_waits_as_after_a_failure(folder: Path) -> None:
    clock = ManualClock()
    await leave_behind(folder, clock, row(clock, State.SENDING, 3), reported=True)
    spool = await open_durable(folder, clock)
    async with next_hop() as hop, delivery_bench(spool, clock=clock, config=routed(hop.port)) as bench:
        assert bench.types() == ["UNCERTAIN"]
        assert bench.updates[0].state is State.QUEUED
        assert bench.updates[0].next_attempt_ms == clock.wall_ms() + int(RetryPolicy().base_s * 4 * 500)
        assert bench.records[0].accepted is None
        assert hop.messages == []
        await bench.retry(120.0)
        await bench.events_come(2)
        assert bench.types() == ["UNCERTAIN", "SENT"]
    await spool.close()


async def test_an_acceptance_that_was_never_told_is_told_at_the_start_and_once(folder: Path) -> None:
    clock = ManualClock()
    envelope = await leave_behind(folder, clock, row(clock, State.QUEUED, 0), row(clock, State.QUEUED, 0, index=1))
    spool = await open_durable(folder, clock)
    async with next_hop() as hop, delivery_bench(spool, clock=clock, config=routed(hop.port)) as bench:
        await bench.events_come(1)
        assert bench.records[0].accepted == envelope
        assert bench.records[0].recipients_accepted == ("u0@x.test", "u1@x.test")
        assert [record.accepted for record in bench.records[1:]] == [None]
        assert hop.messages[0].recipients == ["u0@x.test", "u1@x.test"]
    await spool.close()


@pytest.mark.parametrize(("cut", "copies"), [("before the dot", 1), ("after the dot", 2)])
async def test_kill_at_each_point_of_an_attempt_loses_nothing_and_copies_only_after_the_dot(
    folder: Path, tmp_path: Path, cut: str, copies: int
) -> None:
    """The remote looks at the spool's files at that moment; a new engine starts on what it saw."""
    clock = ManualClock()
    later = tmp_path / "later" / folder.name

    def kill(reply: bytes | None) -> bytes | None:
        shutil.copytree(folder, later)
        return reply

    behaviour = Behaviour()
    if cut == "before the dot":
        behaviour.recipient = lambda _: kill(None)
    else:
        behaviour.final = lambda _: kill(b"250 ok\r\n")
    async with next_hop(behaviour) as hop:
        spool = await open_durable(folder, clock)
        async with delivery_bench(spool, clock=clock, config=routed(hop.port)) as bench:
            await bench.submit("u0@x.test")
            await bench.events_come(1)
        await spool.close()
        hop.behaviour = Behaviour()
        spool = await open_durable(later, clock)
        async with delivery_bench(spool, clock=clock, config=routed(hop.port)) as bench:
            await bench.events_come(2)
            assert bench.types() == ["UNCERTAIN", "SENT"]
        assert await spool.keys() == []
        await spool.close()
        assert len(hop.messages) == copies


async def test_an_outcome_of_a_former_attempt_changes_nothing(folder: Path) -> None:
    clock = ManualClock()
    envelope = await leave_behind(folder, clock, row(clock, State.SENDING, 1), reported=True)
    spool = await open_durable(folder, clock)
    stalling = Behaviour(final=lambda _: STALL)
    async with next_hop(stalling) as hop, delivery_bench(spool, clock=clock, config=routed(hop.port)):
        await hop.stalled.wait()
        late = change(row(clock, State.SENDING, 1), State.BOUNCED)
        assert await spool.settle(Settlement(envelope.message_id, (late,), b"late", reported=False)) == 0
        stored = await spool.load(envelope.message_id)
        assert stored is not None
        assert (stored.recipients[0].state, stored.recipients[0].attempt) == (State.SENDING, 2)
    await spool.close()


async def test_a_retry_that_a_clock_ahead_put_off_is_brought_back(folder: Path) -> None:
    clock = ManualClock()
    year_ms = 365 * 86_400_000
    late = row(clock, State.DEFERRED, 1)._replace(due_ms=clock.wall_ms() + year_ms)
    envelope = await leave_behind(folder, clock, late, reported=True)
    spool = await open_durable(folder, clock)
    async with next_hop() as hop, delivery_bench(spool, clock=clock, config=routed(hop.port)) as bench:
        bench.engine.wake(KEY_A)
        day_later_ms = clock.wall_ms() + 86_400_000
        await bench.until(lambda: bench.engine._scheduler._timed.get(KEY_A) == day_later_ms)
        stored = await spool.load(envelope.message_id)
        assert stored is not None
        assert stored.recipients[0].due_ms == day_later_ms
        await bench.retry(86_400.0)
        await bench.events_come(1)
        assert bench.types() == ["SENT"]
    await spool.close()
