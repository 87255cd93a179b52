"""What every limiter keeps: token buckets and slots, all or nothing over many keys, on its own clock.

A harness ages buckets and slots: in memory the clock moves, in Valkey the stored times do (its clock is its own). The
cluster has three servers: keys of several tags lie on several of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import redis

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.adapters.limiter_wire import redis_key
from dataplane.ports import Limiter, Slot, Take

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


def age_keys(clients: Sequence[redis.Redis], seconds: float) -> None:
    """Let time pass for what lies on servers."""
    for client in clients:
        keys: Any = client.keys("postroad:*")
        for key in keys:
            if client.type(key) == b"zset":
                held: Any = client.zrange(key, 0, -1, withscores=True)
                client.zadd(key, {holder: end_us - seconds * MICRO for holder, end_us in held})
            elif not key.endswith(b"epoch") and not key.endswith(b"{epoch}"):
                value: Any = client.get(key)
                level, since = value.split()
                client.set(key, b"%d %d" % (int(level), int(since) - int(seconds * MICRO)))


@pytest.fixture(params=["local", "redis", "cluster"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    clock = Clock()

    def advance(seconds: float) -> None:
        clock.now_s += seconds

    if request.param == "local":
        yield Harness(LocalLimiter(clock), advance)
        return
    if request.param == "redis":
        url = request.getfixturevalue("valkey_url")
        clients = [redis.Redis.from_url(url)]
    else:
        cluster = request.getfixturevalue("valkey_cluster")
        url = cluster.url()
        clients = [cluster.client(number) for number in range(3)]
    # Generous, so that a busy machine does not make the local limiter answer for the server.
    limiter = RedisLimiter(url, LocalLimiter(clock), timeout_s=5.0)
    await limiter.start()
    assert limiter.shared
    assert limiter.is_cluster is (request.param == "cluster")
    yield Harness(limiter, lambda seconds: age_keys(clients, seconds))
    assert limiter.counters.local == 0
    await limiter.close()
    for client in clients:
        client.close()


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


async def test_a_cost_above_the_capacity_needs_a_full_bucket(harness: Harness) -> None:
    await harness.limiter.take([bucket(cost=1, rate_per_s=0.5)])
    grant = await harness.limiter.take([bucket(cost=1_000, rate_per_s=0.5)])
    assert not grant.allowed
    assert 1.0 < grant.wait_s <= 2.0
    harness.age(2.0)
    assert (await harness.limiter.take([bucket(cost=1_000, rate_per_s=0.5)])).allowed


async def test_a_cost_above_the_capacity_is_paid_whole(harness: Harness) -> None:
    hourly = bucket(rate_per_s=10.0)
    assert (await harness.limiter.take([hourly._replace(cost=1_000)])).allowed
    grant = await harness.limiter.take([hourly])
    assert (grant.allowed, grant.refused_key) == (False, "messages")
    assert 95.0 < grant.wait_s <= 99.1
    assert 95.0 < (await harness.limiter.take([hourly._replace(cost=1_000)])).wait_s <= 100.0
    harness.age(90.0)
    assert not (await harness.limiter.take([hourly])).allowed
    harness.age(11.0)
    assert (await harness.limiter.take([hourly._replace(cost=10)])).allowed


async def test_costs_above_the_capacity_stay_within_rate_and_time_and_one_cost(harness: Harness) -> None:
    granted = 0
    for _ in range(40):
        grant = await harness.limiter.take([bucket(rate_per_s=1.0, cost=100)])
        granted += 100 * grant.allowed
        harness.age(10.0)
    assert 400 <= granted <= 10 + 400 + 100


async def test_debts_of_several_buckets_are_all_or_nothing(harness: Harness) -> None:
    await harness.limiter.take([bucket("one", cost=25)])
    for _ in range(3):
        grant = await harness.limiter.take([bucket("other", cost=1_000), bucket("one")])
        assert (grant.allowed, grant.refused_key) == (False, "one")
    assert (await harness.limiter.take([bucket("other", cost=10)])).allowed


async def test_a_debt_grants_nothing_not_even_what_costs_nothing(harness: Harness) -> None:
    await harness.limiter.take([bucket(cost=15)])
    assert not (await harness.limiter.take([bucket(cost=0)])).allowed


async def test_what_was_taken_beyond_the_capacity_comes_back_and_no_more(harness: Harness) -> None:
    await harness.limiter.take([bucket(cost=1_000)])
    harness.limiter.refund([bucket(cost=993)])
    assert (await harness.limiter.take([bucket(cost=3)])).allowed
    assert not (await harness.limiter.take([bucket()])).allowed


async def test_a_debt_ends_at_as_much_as_a_bucket_can_hold(harness: Harness) -> None:
    most, rate_per_s = 4_000_000_000, 1_000_000.0
    for _ in range(3):
        harness.limiter.refund([bucket(rate_per_s=rate_per_s, cost=-most)])
    assert 3_900.0 < (await harness.limiter.take([bucket(rate_per_s=rate_per_s)])).wait_s <= 4_000.1
    await harness.limiter.take([bucket("taken", rate_per_s=rate_per_s, cost=10 * most)])
    assert 3_900.0 < (await harness.limiter.take([bucket("taken", rate_per_s=rate_per_s)])).wait_s <= 4_000.1
    harness.age(4_001.0)
    assert (await harness.limiter.take([bucket(rate_per_s=rate_per_s, cost=10)])).allowed


async def test_no_wait_is_longer_than_ten_years(harness: Harness) -> None:
    await harness.limiter.take([bucket(rate_per_s=1e-9, cost=1_000)])
    assert (await harness.limiter.take([bucket(rate_per_s=1e-9)])).wait_s == 10 * 365 * 86_400.0


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


async def test_a_refusal_under_one_tag_gives_back_what_others_granted(harness: Harness) -> None:
    tags = [f"a:account-{number}" for number in range(8)]
    await harness.limiter.take([Take("messages", tags[5], 10, 0.001, 10)])
    for _ in range(3):
        grant = await harness.limiter.take([Take("messages", tag, 10, 0.001, 2) for tag in tags])
        assert (grant.allowed, grant.refused_key) == (False, "messages")
    for tag in tags:
        assert (await harness.limiter.take([Take("messages", tag, 10, 0.001, 10)])).allowed is (tag != tags[5])


async def test_many_tags_are_granted_together(harness: Harness) -> None:
    wishes = [Take("messages", f"a:account-{number}", 10, 0.001, 4) for number in range(8)]
    grants = [await harness.limiter.take(wishes) for _ in range(3)]
    assert [grant.allowed for grant in grants] == [True, True, False]


async def test_ask_answers_like_take(harness: Harness) -> None:
    assert (await harness.limiter.ask([bucket(cost=10)])).allowed
    assert (await harness.limiter.ask([bucket()])).refused_key == "messages"
    assert (await harness.limiter.ask([])).allowed


async def test_a_refund_makes_room_and_never_more_than_the_capacity(harness: Harness) -> None:
    await harness.limiter.take([bucket(cost=10), bucket("other", cost=4)])
    harness.limiter.refund([bucket(cost=3), bucket("other", cost=1_000)])
    assert (await harness.limiter.take([bucket(cost=3)])).allowed
    assert not (await harness.limiter.take([bucket()])).allowed
    assert (await harness.limiter.take([bucket("other", cost=10)])).allowed
    assert not (await harness.limiter.take([bucket("other")])).allowed


async def test_a_charge_is_never_refused_and_goes_into_debt(harness: Harness) -> None:
    await harness.limiter.take([bucket(cost=2)])
    harness.limiter.refund([bucket(cost=-3), bucket("fresh", cost=-4), bucket("small", cost=-1_000)])
    for key, is_left in (("messages", 5), ("fresh", 6)):
        assert (await harness.limiter.take([bucket(key, cost=is_left)])).allowed
        assert not (await harness.limiter.take([bucket(key)])).allowed
    harness.age(989_000.0)
    assert not (await harness.limiter.take([bucket("small")])).allowed
    harness.age(2_500.0)
    assert (await harness.limiter.take([bucket("small")])).allowed
    assert not (await harness.limiter.take([bucket("small")])).allowed


async def test_a_capacity_of_0_keeps_no_debt(harness: Harness) -> None:
    harness.limiter.refund([bucket(capacity=0, cost=-5)])
    await harness.limiter.take([bucket(capacity=0, cost=5)])
    assert (await harness.limiter.take([bucket(cost=10)])).allowed


async def test_a_rate_of_one_a_month_refills_by_one_a_month(harness: Harness) -> None:
    monthly = bucket(capacity=2, rate_per_s=1 / (31 * 86_400))
    await harness.limiter.take([monthly, monthly])
    harness.age(30 * 86_400)
    assert not (await harness.limiter.take([monthly])).allowed
    harness.age(1.01 * 86_400)
    assert (await harness.limiter.take([monthly])).allowed
    assert not (await harness.limiter.take([monthly])).allowed


async def test_a_refund_of_a_bucket_that_nobody_drew_from_is_nothing(harness: Harness) -> None:
    harness.limiter.refund([bucket(cost=5)])
    assert (await harness.limiter.take([bucket(cost=10)])).allowed
    assert not (await harness.limiter.take([bucket()])).allowed


# --- slots


def slot(holder: str, key: str = "slots", *, capacity: int = 2, ttl_s: float = 60.0, tag: str = "d:mx") -> Slot:
    return Slot(key, tag, capacity, ttl_s, holder)


async def test_no_slots_are_held_at_once(harness: Harness) -> None:
    assert (await harness.limiter.hold([])).allowed


async def test_as_many_hold_as_there_are_slots(harness: Harness) -> None:
    grants = [await harness.limiter.hold([slot(f"holder-{number}")]) for number in range(4)]
    assert [grant.allowed for grant in grants] == [True, True, False, False]
    assert grants[2].refused_key == "slots"
    assert 0.0 < grants[2].wait_s <= 1.0


async def test_a_slot_that_is_given_back_is_free_at_once(harness: Harness) -> None:
    await harness.limiter.hold([slot("first")])
    await harness.limiter.hold([slot("second")])
    harness.limiter.release([slot("first")])
    assert (await harness.limiter.hold([slot("third")])).allowed
    assert not (await harness.limiter.hold([slot("fourth")])).allowed


async def test_a_holder_that_dies_gives_its_slots_back_when_their_time_is_over(harness: Harness) -> None:
    await harness.limiter.hold([slot("dead", ttl_s=60.0)])
    await harness.limiter.hold([slot("alive", ttl_s=600.0)])
    harness.age(59.0)
    assert not (await harness.limiter.hold([slot("next")])).allowed
    harness.age(2.0)
    assert (await harness.limiter.hold([slot("next")])).allowed
    assert not (await harness.limiter.hold([slot("another")])).allowed


async def test_who_renews_keeps_its_slot_and_needs_no_second_one(harness: Harness) -> None:
    await harness.limiter.hold([slot("first")])
    await harness.limiter.hold([slot("second")])
    for _ in range(4):
        harness.age(40.0)
        assert (await harness.limiter.hold([slot("first")])).allowed
    assert (await harness.limiter.hold([slot("third")])).allowed
    assert not (await harness.limiter.hold([slot("fourth")])).allowed


async def test_failed_attempts_refresh_nobodys_time(harness: Harness) -> None:
    await harness.limiter.hold([slot("dead-1")])
    await harness.limiter.hold([slot("dead-2")])
    for _ in range(5):
        harness.age(11.0)
        assert not (await harness.limiter.hold([slot("waits")])).allowed
    harness.age(6.0)
    assert (await harness.limiter.hold([slot("waits")])).allowed


async def test_one_refusal_holds_no_slot_of_any_key(harness: Harness) -> None:
    await harness.limiter.hold([slot("first", "small", capacity=1)])
    for number in range(3):
        holder = f"holder-{number}"
        grant = await harness.limiter.hold([slot(holder, "large"), slot(holder, "small", capacity=1)])
        assert (grant.allowed, grant.refused_key) == (False, "small")
    for holder in ("one", "two"):
        assert (await harness.limiter.hold([slot(holder, "large")])).allowed


async def test_slots_of_many_tags_are_held_together_or_not_at_all(harness: Harness) -> None:
    tags = [f"d:mx-{number}" for number in range(6)]
    await harness.limiter.hold([slot("first", capacity=1, tag=tags[3])])
    for _ in range(3):
        assert not (await harness.limiter.hold([slot("second", capacity=1, tag=tag) for tag in tags])).allowed
    for tag in tags:
        assert (await harness.limiter.hold([slot("third", capacity=1, tag=tag)])).allowed is (tag != tags[3])


async def test_to_give_back_what_is_not_held_changes_nothing(harness: Harness) -> None:
    await harness.limiter.hold([slot("first")])
    harness.limiter.release([slot("nobody"), slot("nobody", "unknown")])
    await harness.limiter.hold([slot("second")])
    assert not (await harness.limiter.hold([slot("third")])).allowed


async def test_fewer_slots_hold_at_once_and_cut_nobody_off(harness: Harness) -> None:
    await harness.limiter.hold([slot("first")])
    await harness.limiter.hold([slot("second")])
    assert (await harness.limiter.hold([slot("second", capacity=1)])).allowed
    assert not (await harness.limiter.hold([slot("third", capacity=1)])).allowed


async def test_holds_and_takes_of_one_turn_each_get_their_own_answer(harness: Harness) -> None:
    limiter = harness.limiter
    held = [asyncio.ensure_future(limiter.hold([slot(f"holder-{number}")])) for number in range(6)]
    taken = [limiter.ask([bucket(cost=3)]) for _ in range(6)]
    assert sum(grant.allowed for grant in await asyncio.gather(*held)) == 2
    assert sum(grant.allowed for grant in await asyncio.gather(*taken)) == 3
