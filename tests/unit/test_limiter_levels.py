"""What a worker remembers of long buckets, and when it gives up on a server that does not answer."""

from __future__ import annotations

import asyncio

from dataplane.adapters.limiter_levels import Levels
from dataplane.adapters.limiter_shard import _Watch
from dataplane.adapters.limiter_wire import Known, Packer
from dataplane.ports import Take

LOT = ""


def known(key: str, *, rate_per_s: float = 0.01) -> Known:
    return Packer().known(Take(key, "a:demo", 10, rate_per_s, 1))


class Clock:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def test_only_buckets_that_take_minutes_to_fill_are_long() -> None:
    assert known("slow", rate_per_s=10 / 301).is_long
    assert not known("quick", rate_per_s=10 / 299).is_long
    assert known("never", rate_per_s=0.0).is_long
    assert not Packer().known(Take("none", "a:demo", 0, 0.0, 1)).is_long


def test_seeds_are_what_was_seen_aged_by_the_rate_and_never_above_the_capacity() -> None:
    clock = Clock()
    levels, one, two = Levels(clock), known("one"), known("two")
    levels.learn(LOT, [one, two], [0, 9_900_000])
    clock.now_s += 100.0
    assert levels.changed(LOT, 7) is False
    assert levels.take_seeds(LOT, [], 10) == [(one, 1_000_000), (two, 10_000_000)]
    assert levels.take_seeds(LOT, [], 10) == []


def test_a_change_tells_a_loss_from_a_first_meeting() -> None:
    levels = Levels(Clock())
    assert [levels.changed(LOT, epoch) for epoch in (7, 8)] == [False, True]
    assert (levels.epoch(LOT), levels.epoch("other")) == (8, 0)


def test_what_is_asked_for_now_is_seeded_first_and_the_rest_in_portions() -> None:
    levels = Levels(Clock())
    every = [known(f"key-{number}") for number in range(10)]
    levels.learn(LOT, every, [0] * 10)
    levels.changed(LOT, 7)
    portions = [[one.key for one, _ in levels.take_seeds(LOT, [every[8].name], 4)] for _ in range(3)]
    assert portions[0][0] == every[8].key
    assert [len(portion) for portion in portions] == [4, 4, 2]
    assert {key for portion in portions for key in portion} == {one.key for one in every}
    assert levels.lots_to_seed == []


def test_a_level_that_is_owed_is_not_overwritten_by_a_look() -> None:
    levels, one = Levels(Clock()), known("one")
    levels.learn(LOT, [one], [2_000_000])
    levels.changed(LOT, 7)
    levels.learn(LOT, [one], [10_000_000])
    assert levels.take_seeds(LOT, [], 10) == [(one, 2_000_000)]
    levels.owe_again(LOT, [one.name])
    assert levels.take_seeds(LOT, [], 10) == [(one, 2_000_000)]


def test_a_debt_is_remembered_and_paid_by_the_rate() -> None:
    clock = Clock()
    levels, one = Levels(clock), known("one")
    levels.learn(LOT, [one], [-5_000_000_000])
    levels.changed(LOT, 7)
    clock.now_s += 2.0
    assert levels.take_seeds(LOT, [], 10) == [(one, -5_000_000_000 + int(2 * one.rate_per_s))]


def test_memory_is_bounded_and_the_longest_unseen_goes_first() -> None:
    levels = Levels(Clock(), max_keys=3)
    every = [known(f"key-{number}") for number in range(4)]
    for number, one in enumerate(every):
        levels.learn(f"lot-{number % 2}", [one], [0])
    assert len(levels) == 3
    levels.changed("lot-0", 7)
    levels.changed("lot-1", 7)
    kept = [one for lot in ("lot-0", "lot-1") for one, _ in levels.take_seeds(lot, [], 10)]
    assert kept == [every[2], every[1], every[3]]
    for number in range(20):
        levels.changed(f"lot-{number}", 8)
    assert len(levels._epochs) <= 3


async def test_a_call_is_given_up_when_it_is_late_while_the_loop_runs() -> None:
    ended: list[float] = []
    watch = _Watch(ended.append, 30.0)
    watch._due_s = asyncio.get_running_loop().time()
    watch._ring()
    # One last look into the socket.
    assert len(ended) == 0
    watch.stop()
    watch._due_s = asyncio.get_running_loop().time()
    watch._ring()
    assert len(ended) == 1
    watch.stop()


async def test_a_loop_that_is_late_itself_gives_the_server_its_time_again_and_not_for_ever() -> None:
    ended: list[float] = []
    watch = _Watch(ended.append, 30.0)
    for _ in range(5):
        watch.stop()
        watch._due_s = asyncio.get_running_loop().time() - 1.0
        watch._ring()
        assert len(ended) == 0
    for _ in range(2):
        watch.stop()
        watch._due_s = asyncio.get_running_loop().time() - 1.0
        watch._ring()
    watch.stop()
    assert len(ended) == 1
