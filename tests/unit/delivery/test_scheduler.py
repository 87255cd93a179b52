"""The scheduler alone: whose turn it is, how much it takes, and that it never reads in a circle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.envelope import RecipientRow, make_queue_key
from dataplane.core.ids import MessageId
from dataplane.core.queue import State
from dataplane.core.retry import RetryClock
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.outcome import Moment
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
    rooms: dict[str, int] = field(default_factory=dict)  # by next hop
    weights: dict[str, int] = field(default_factory=dict)
    crowded_accounts: set[str] = field(default_factory=set)
    taken: list[str] = field(default_factory=list)
    park_ms: int = 0
    open: bool = True
    when_parking: Callable[[], None] = lambda: None
    parked: list[str] = field(default_factory=list)
    asked: int = 0
    takes_room: bool = False
    held_claims: list[asyncio.Future[None]] | None = None  # claims stay uncommitted while this is a list

    def weight(self, account: str) -> int:
        return self.weights.get(account, 1)

    def room(self, next_hop: str) -> int:
        self.asked += 1
        return self.rooms.get(next_hop, 1)

    def crowded(self, account: str) -> bool:
        return account in self.crowded_accounts

    def window_open(self) -> bool:
        return self.open

    def take(self, stored: StoredMessage, rows: Sequence[RecipientRow]) -> Taken:
        if self.park_ms:
            park_ms = self.park_ms
            self.parked.append(rows[0].queue_key)
            self.when_parking()
            return Taken([], park_ms)
        self.taken.append(rows[0].queue_key)
        if self.takes_room:
            self.rooms["providers/a"] -= 1
        changes = [change(row, State.SENDING, new_attempt=row.attempt + 1) for row in rows]
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.held_claims is not None:
            self.held_claims.append(future)
            return Taken([future])
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
    steady = RetryClock(clock.wall_ms(), clock.monotonic())

    def moment() -> Moment:
        return Moment(clock.wall_ms(), steady.read(clock.wall_ms(), clock.monotonic()))

    scheduler = Scheduler(spool, work, moment, DeliveryCounters(), Log())
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
        made.work.rooms = {"providers/a": 0}
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
        made.scheduler.wake(TWO)
        await made.until(lambda: made.work.taken == [ONE])


async def test_the_end_of_the_loop_is_heard_of() -> None:
    ended: list[BaseException | None] = []
    async with bench() as made:
        made.work.rooms = None  # type: ignore[assignment] # a bug of ours
        await made.put(ONE, 1)
        await made.scheduler.start(lambda task: ended.append(task.exception()))
        await made.until(lambda: bool(ended))
        assert isinstance(ended[0], AttributeError)


def keys_of(count: int) -> list[str]:
    return [make_queue_key(f"accounts/a{number}", "providers/a") for number in range(count)]


async def test_accounts_share_a_next_hop_by_their_weights() -> None:
    async with bench() as made:
        made.work.weights = {"accounts/one": 3}
        made.work.rooms = {"providers/a": 0}
        made.work.takes_room = True
        await made.put(ONE, 400)
        await made.put(TWO, 400)
        await made.scheduler.start(lambda _: None)
        for _ in range(50):
            made.work.rooms["providers/a"] = 4
            made.scheduler.kick("providers/a")
            await made.until(lambda: made.work.rooms["providers/a"] == 0)
            await made.settle_down()
        assert made.work.taken.count(ONE) == pytest.approx(150, abs=6)
        assert made.work.taken.count(TWO) == pytest.approx(50, abs=6)


async def test_a_small_account_waits_behind_one_message_of_each_other_where_many_wait() -> None:
    async with bench() as made:
        made.work.rooms = {"providers/a": 20}
        flood = keys_of(30)
        for key in flood:
            await made.put(key, 5)
        await made.put(ONE, 1)
        await made.scheduler.start(lambda _: None)
        await made.until(lambda: ONE in made.work.taken)
        before = made.work.taken[: made.work.taken.index(ONE)]
        assert max(before.count(key) for key in flood) == 1


async def test_next_hops_take_turns_however_many_accounts_wait_for_one() -> None:
    async with bench() as made:
        for key in keys_of(20):
            await made.put(key, 5)
        other = make_queue_key("accounts/a0", "providers/b")
        await made.put(other, 5)
        await made.scheduler.start(lambda _: None)
        await made.until(lambda: made.work.taken.count(other) == 5)
        assert len(made.work.taken) <= 25


async def test_a_full_next_hop_is_asked_once_and_not_for_each_key() -> None:
    async with bench() as made:
        made.work.rooms = {"providers/a": 0}
        for key in keys_of(50):
            await made.put(key, 1)
        await made.scheduler.start(lambda _: None)
        await made.settle_down()
        assert (made.work.asked, made.spool.reads) == (1, 0)


async def test_a_claim_that_the_disk_keeps_does_not_hold_up_other_keys() -> None:
    async with bench() as made:
        made.work.held_claims = []
        await made.put(ONE, 2)
        await made.put(TWO, 2)
        await made.scheduler.start(lambda _: None)
        await made.settle_down()
        assert sorted(made.work.taken) == [ONE, TWO]  # each once: what is being claimed looks as if it waited


async def test_a_dead_next_hop_costs_a_turn_of_one_key_when_its_time_comes() -> None:
    async with bench() as made:
        made.work.park_ms = made.clock.wall_ms() + 3_600_000
        for key in keys_of(50):
            await made.put(key, 1)
        await made.scheduler.start(lambda _: None)
        await made.until(lambda: len(made.work.parked) == 50)
        made.scheduler.probe_at("providers/a", made.clock.wall_ms() + 10_000)
        made.work.park_ms = 0
        made.clock.advance(9.0)
        made.scheduler.wake(make_queue_key("accounts/nobody", "providers/b"))
        await made.settle_down()
        assert made.work.taken == []
        made.clock.advance(1.0)
        made.scheduler.wake(make_queue_key("accounts/nobody", "providers/b"))
        await made.settle_down()
        assert made.work.taken == keys_of(1)


async def test_a_probe_goes_to_the_next_key_where_one_has_nothing_to_send_and_tries_each_once() -> None:
    async with bench() as made:
        made.work.park_ms = made.clock.wall_ms() + 3_600_000
        for key in keys_of(10):
            await made.put(key, 1)
        await made.scheduler.start(lambda _: None)
        await made.until(lambda: len(made.work.parked) == 10)
        made.work.parked.clear()
        made.scheduler.probe_at("providers/a", made.clock.wall_ms())
        await made.until(lambda: len(made.work.parked) == 10)
        await made.settle_down()
        assert sorted(made.work.parked) == sorted(keys_of(10))


async def test_a_row_that_becomes_due_while_its_key_is_read_is_not_forgotten() -> None:
    async with bench() as made:
        made.work.held_claims = []
        await made.put(ONE, 1)
        await made.scheduler.start(lambda _: None)
        await made.until(lambda: made.work.taken == [ONE])
        made.scheduler.expect(ONE, made.clock.wall_ms() + 5_000)
        (claim,) = made.work.held_claims
        (head,) = await made.spool.heads(ONE, None, 10)
        made.work.held_claims = None
        done = change(make_row(queue_key=ONE, due_ms=head.due_ms), State.CANCELLED)
        await made.spool.settle(Settlement(head.message_id, [done], None, reported=False))
        claim.set_result(None)
        await made.settle_down()
        assert made.scheduler.is_idle
        await made.put(ONE, 1, due_in_s=5)
        made.clock.advance(5.0)
        made.scheduler.wake(TWO)
        await made.until(lambda: made.work.taken == [ONE, ONE])


async def test_an_account_that_has_its_share_of_memory_waits_and_others_go_on() -> None:
    async with bench() as made:
        made.work.crowded_accounts = {"accounts/one"}
        await made.put(ONE, 2)
        await made.put(TWO, 2)
        await made.scheduler.start(lambda _: None)
        await made.until(lambda: made.work.taken == [TWO, TWO])
        made.scheduler.wake(ONE)
        await made.settle_down()
        assert made.work.taken == [TWO, TWO]
        made.work.crowded_accounts = set()
        made.scheduler.nudge()
        await made.until(lambda: made.work.taken.count(ONE) == 2)


async def test_what_is_told_and_read_again_for_hours_leaves_nothing_behind() -> None:
    async with bench() as made:
        made.work.park_ms = made.clock.wall_ms() + 86_400_000
        for key in keys_of(20):
            await made.put(key, 1)
        await made.put(ONE, 1, due_in_s=80_000)
        await made.scheduler.start(lambda _: None)
        await made.until(lambda: len(made.work.parked) == 20)
        begun_ms = made.clock.wall_ms()
        for minute in range(300):
            made.clock.advance(60.0)
            made.scheduler.probe_at("providers/a", made.clock.wall_ms() + 1_000)
            made.scheduler.expect(TWO, begun_ms + 80_000_000 - minute * 1_000)
            await made.settle_down()
        kept = vars(made.scheduler)
        sizes = {name: len(value) for name, value in kept.items() if isinstance(value, (dict, list))}
        assert sizes.pop("_heap") <= 2 * 23 + 64
        assert max(sizes.values()) <= 21


async def test_nothing_is_claimed_of_a_locked_message_and_its_key_is_looked_at_when_it_is_unlocked() -> None:
    async with bench() as made:
        envelope = make_envelope()
        await made.spool.accept(envelope, b"x\r\n", [make_row(queue_key=ONE)])
        made.scheduler.lock(envelope.message_id)
        await made.scheduler.start(lambda _: None)
        await made.settle_down()
        assert made.work.taken == []
        reads = made.spool.reads
        await made.settle_down()
        assert made.spool.reads == reads
        made.scheduler.unlock([envelope.message_id], [ONE])
        await made.until(lambda: made.work.taken == [ONE])


async def test_what_was_read_before_a_message_was_locked_is_not_claimed_however_long_the_reading_takes() -> None:
    async with bench() as made:
        envelope = make_envelope()
        row = make_row(queue_key=ONE)
        await made.spool.accept(envelope, b"x\r\n", [row])
        reading, read = asyncio.Event(), asyncio.Event()
        load = made.spool.load

        async def slow_load(message_id: MessageId) -> StoredMessage | None:
            stored = await load(message_id)
            reading.set()
            await read.wait()
            return stored

        made.spool.load = slow_load  # type: ignore[method-assign]  # what a large content does
        await made.scheduler.start(lambda _: None)
        await reading.wait()
        made.scheduler.lock(envelope.message_id)
        moved = change(row, State.QUEUED, queue_key=TWO)
        await made.spool.settle(Settlement(envelope.message_id, [moved], None, reported=False))
        made.scheduler.unlock([envelope.message_id], [ONE, TWO])
        read.set()
        await made.until(lambda: bool(made.work.taken))
        await made.settle_down()
        assert made.work.taken == [TWO]
