"""The scheduler alone: whose turn it is, how much it takes, and that it never reads in a circle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.envelope import RecipientRow, make_queue_key
from dataplane.core.queue import State
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.scheduler import Scheduler, Taken
from dataplane.ports import Cursor, Due, Settlement, SpoolError, StoredMessage
from support.ingress import Log
from support.spools import ManualClock, change, make_envelope, make_row

ONE = make_queue_key("accounts/one", "providers/a")
TWO = make_queue_key("accounts/two", "providers/a")


class CountingSpool(RamSpool):
    """Counts reads, and fails as often as it is told."""

    reads = 0
    failures = 0

    async def heads(self, queue_key: str, after: Cursor | None, limit: int) -> list[Due]:
        self.reads += 1
        if self.failures:
            self.failures -= 1
            raise SpoolError("told so")
        return await super().heads(queue_key, after, limit)


@dataclass
class Destination:
    """A `Work` that claims what it is offered while there is room."""

    spool: RamSpool
    rooms: dict[str, int] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    park_ms: int = 0
    open: bool = True
    when_parking: Callable[[], None] = lambda: None

    def room(self, queue_key: str) -> int:
        return self.rooms.get(queue_key, 1)

    def window_open(self) -> bool:
        return self.open

    def take(self, stored: StoredMessage, rows: Sequence[RecipientRow]) -> Taken:
        if self.park_ms:
            park_ms = self.park_ms
            self.when_parking()
            return Taken([], park_ms)
        self.taken.append(rows[0].queue_key)
        changes = [change(row, State.SENDING, new_attempt=row.attempt + 1) for row in rows]
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        claim = self.spool.settle(Settlement(stored.envelope.message_id, changes, None, reported=False))
        claim.add_done_callback(lambda _: future.set_result(None))
        return Taken([future])


@dataclass
class Bench:
    scheduler: Scheduler
    spool: CountingSpool
    work: Destination
    clock: ManualClock

    async def put(self, queue_key: str, count: int, *, due_in_s: int = 0) -> None:
        for _ in range(count):
            due_ms = self.clock.wall_ms() + due_in_s * 1000
            await self.spool.accept(make_envelope(), b"x\r\n", [make_row(queue_key=queue_key, due_ms=due_ms)])

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(2_000):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("never")

    async def settle_down(self) -> None:
        """Let everything happen that happens without time passing."""
        for _ in range(200):
            await asyncio.sleep(0)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    clock = ManualClock()
    spool = CountingSpool(clock)
    work = Destination(spool)
    scheduler = Scheduler(spool, work, clock.wall_ms, DeliveryCounters(), Log())
    yield Bench(scheduler, spool, work, clock)
    await scheduler.stop()


async def test_keys_take_turns_however_much_waits_in_one() -> None:
    async with bench() as made:
        await made.put(ONE, 50)
        await made.put(TWO, 5)
        await made.scheduler.start(lambda _: None)
        await made.until(lambda: len(made.work.taken) == 55)
        assert made.work.taken[:10].count(TWO) == 5


async def test_a_full_destination_is_not_asked_until_a_place_is_free_and_then_for_the_key_that_waited_longest() -> None:
    async with bench() as made:
        made.work.rooms = {ONE: 0, TWO: 0}
        await made.put(ONE, 2)
        await made.put(TWO, 2)
        await made.scheduler.start(lambda _: None)
        await made.settle_down()
        assert (made.spool.reads, made.work.taken) == (0, [])
        made.work.rooms = {}
        made.scheduler.kick("providers/a")
        await made.until(lambda: len(made.work.taken) >= 1)
        assert made.work.taken[0] == ONE


async def test_what_is_due_later_is_not_read_again_before() -> None:
    async with bench() as made:
        await made.put(ONE, 3, due_in_s=100)
        await made.scheduler.start(lambda _: None)
        await made.settle_down()
        reads = made.spool.reads
        await made.settle_down()
        assert made.spool.reads == reads
        made.clock.advance(100)
        made.scheduler.wake(ONE)
        await made.until(lambda: len(made.work.taken) == 3)


async def test_a_parked_key_is_not_read_in_a_circle_and_a_wake_does_not_free_it() -> None:
    async with bench() as made:
        made.work.park_ms = made.clock.wall_ms() + 60_000
        await made.put(ONE, 3)
        await made.scheduler.start(lambda _: None)
        await made.settle_down()
        assert made.spool.reads == 1
        made.scheduler.wake(ONE)
        await made.settle_down()
        assert made.spool.reads == 1
        made.work.park_ms = 0
        made.scheduler.release("providers/b")
        await made.settle_down()
        assert made.work.taken == []
        made.scheduler.release("providers/a")
        await made.until(lambda: len(made.work.taken) == 3)


async def test_a_release_while_the_rows_are_read_is_not_lost() -> None:
    async with bench() as made:
        made.work.park_ms = made.clock.wall_ms() + 60_000

        def recover() -> None:
            made.work.park_ms = 0
            made.scheduler.release("providers/a")

        made.work.when_parking = recover
        await made.put(ONE, 1)
        await made.scheduler.start(lambda _: None)
        await made.until(lambda: made.work.taken == [ONE])


async def test_a_closed_window_stops_reading_and_a_nudge_goes_on() -> None:
    async with bench() as made:
        made.work.open = False
        await made.put(ONE, 1)
        await made.scheduler.start(lambda _: None)
        await made.settle_down()
        assert made.work.taken == []
        made.work.open = True
        made.scheduler.nudge()
        await made.until(lambda: made.work.taken == [ONE])


async def test_a_spool_that_cannot_be_read_puts_the_key_off_and_the_loop_lives() -> None:
    async with bench() as made:
        made.spool.failures = 1
        await made.put(ONE, 1)
        await made.scheduler.start(lambda _: None)
        await made.settle_down()
        assert made.spool.reads == 1
        made.clock.advance(1)
        made.scheduler.wake(ONE)
        await made.until(lambda: made.work.taken == [ONE])


async def test_a_lost_wake_up_is_found_by_the_poll() -> None:
    async with bench() as made:
        await made.scheduler.start(lambda _: None)
        await made.settle_down()
        await made.put(ONE, 1)
        made.clock.advance(60)
        made.scheduler.nudge()
        await made.until(lambda: made.work.taken == [ONE])


async def test_the_end_of_the_loop_is_heard_of() -> None:
    ended: list[BaseException | None] = []
    async with bench() as made:
        made.work.rooms = None  # type: ignore[assignment] # a bug of ours
        await made.put(ONE, 1)
        await made.scheduler.start(lambda task: ended.append(task.exception()))
        await made.until(lambda: bool(ended))
        assert isinstance(ended[0], AttributeError)
