"""What every limiter keeps: token buckets, all or nothing over many keys, on its own clock.

A harness ages buckets: in memory the clock moves, in Valkey the stored times do (its clock is its own).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import redis

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter, redis_key
from dataplane.ports import Limiter, Take

MICRO = 1_000_000


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Harness:
    """A limiter and the means to let time pass for its buckets."""

    def __init__(self, limiter: Limiter, age: Callable[[float], None]) -> None:
        self.limiter = limiter
        self.age = age


@pytest.fixture(params=["local", "redis"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    clock = Clock()

    def advance(seconds: float) -> None:
        clock.now_s += seconds

    if request.param == "local":
        yield Harness(LocalLimiter(clock), advance)
        return
    url = request.getfixturevalue("valkey_url")

    def age(seconds: float) -> None:
        with redis.Redis.from_url(url) as client:
            for key in client.keys("postroad:*"):
                level, since = client.get(key).split()
                client.set(key, b"%d %d" % (int(level), int(since) - int(seconds * MICRO)))

    # Generous, so that a busy machine does not make the local limiter answer for the server.
    limiter = RedisLimiter(url, LocalLimiter(clock), timeout_s=5.0)
    await limiter.start()
    yield Harness(limiter, age)
    assert limiter.local_count == 0
    await limiter.close()


def bucket(key: str = "messages", *, capacity: int = 10, rate_per_s: float = 0.001, cost: int = 1) -> Take:
    return Take(key, "a:demo", capacity, rate_per_s, cost)


async def test_nothing_asked_is_granted(harness: Harness) -> None:
    assert (await harness.limiter.take([])).allowed


async def test_a_new_bucket_is_full_and_gives_its_capacity_and_no_more(harness: Harness) -> None:
    grants = [await harness.limiter.take([bucket()]) for _ in range(11)]
    assert [grant.allowed for grant in grants] == [True] * 10 + [False]


async def test_a_refusal_names_the_key_and_how_long_to_wait(harness: Harness) -> None:
    await harness.limiter.take([bucket(cost=10, rate_per_s=0.5)])
    grant = await harness.limiter.take([bucket(cost=1, rate_per_s=0.5)])
    assert not grant.allowed
    assert grant.refused_key == "messages"
    assert 1.0 < grant.wait_s <= 2.0


async def test_one_refusal_takes_from_no_bucket(harness: Harness) -> None:
    await harness.limiter.take([bucket("small", capacity=1)])
    for _ in range(3):
        grant = await harness.limiter.take([bucket("large"), bucket("small", capacity=1)])
        assert (grant.allowed, grant.refused_key) == (False, "small")
    assert (await harness.limiter.take([bucket("large", cost=10)])).allowed


async def test_the_bucket_that_takes_longest_is_the_one_named(harness: Harness) -> None:
    await harness.limiter.take([bucket("quick", cost=10), bucket("slow", cost=10)])
    grant = await harness.limiter.take([bucket("quick", rate_per_s=1.0), bucket("slow", rate_per_s=0.1)])
    assert grant.refused_key == "slow"
    assert 5 < grant.wait_s <= 10


async def test_time_refills_at_the_rate_and_up_to_the_capacity(harness: Harness) -> None:
    await harness.limiter.take([bucket(cost=10)])
    harness.age(3_000.0)
    assert (await harness.limiter.take([bucket(cost=3)])).allowed
    assert not (await harness.limiter.take([bucket(cost=1)])).allowed
    harness.age(1_000_000.0)
    assert (await harness.limiter.take([bucket(cost=10)])).allowed
    assert not (await harness.limiter.take([bucket(cost=1)])).allowed


async def test_a_clock_that_goes_back_takes_nothing_away_and_gives_nothing(harness: Harness) -> None:
    await harness.limiter.take([bucket(cost=5)])
    harness.age(-3_600.0)
    assert (await harness.limiter.take([bucket(cost=5)])).allowed
    assert not (await harness.limiter.take([bucket(cost=1)])).allowed


async def test_a_key_asked_for_twice_in_one_take_pays_twice(harness: Harness) -> None:
    grant = await harness.limiter.take([bucket(cost=6), bucket(cost=6)])
    assert not grant.allowed
    assert (await harness.limiter.take([bucket(cost=5), bucket(cost=5)])).allowed
    assert not (await harness.limiter.take([bucket(cost=1)])).allowed


async def test_a_cost_above_the_capacity_empties_a_full_bucket(harness: Harness) -> None:
    assert (await harness.limiter.take([bucket(cost=1_000)])).allowed
    assert not (await harness.limiter.take([bucket(cost=1)])).allowed


async def test_a_bucket_that_never_refills_says_a_day(harness: Harness) -> None:
    await harness.limiter.take([bucket(rate_per_s=0.0, cost=10)])
    assert (await harness.limiter.take([bucket(rate_per_s=0.0)])).wait_s == 86_400.0


async def test_a_capacity_of_0_is_no_limit(harness: Harness) -> None:
    for _ in range(3):
        assert (await harness.limiter.take([bucket(capacity=0, rate_per_s=0.0, cost=5)])).allowed


async def test_tags_keep_equal_keys_apart(harness: Harness) -> None:
    await harness.limiter.take([bucket(cost=10)])
    assert (await harness.limiter.take([Take("messages", "a:other", 10, 0.001, 10)])).allowed


async def test_a_smaller_capacity_holds_at_once(harness: Harness) -> None:
    await harness.limiter.take([bucket(capacity=100, cost=1)])
    assert (await harness.limiter.take([bucket(capacity=5, cost=5)])).allowed
    assert not (await harness.limiter.take([bucket(capacity=5, cost=1)])).allowed


async def test_takes_of_one_turn_are_decided_one_after_the_other(harness: Harness) -> None:
    grants = await asyncio.gather(*(harness.limiter.take([bucket()]) for _ in range(200)))
    assert sum(grant.allowed for grant in grants) == 10


async def test_large_buckets_count_exactly(harness: Harness) -> None:
    capacity = 3_999_999_999
    assert (await harness.limiter.take([bucket(capacity=capacity, cost=capacity - 1)])).allowed
    assert (await harness.limiter.take([bucket(capacity=capacity, cost=1)])).allowed
    assert not (await harness.limiter.take([bucket(capacity=capacity, cost=1)])).allowed


def test_a_key_in_redis_carries_its_tag_in_braces() -> None:
    assert redis_key(bucket()) == "postroad:{a:demo}messages"
