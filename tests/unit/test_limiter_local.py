"""What only the limiter in memory does: shares of a limit, and a bound on its memory."""

from __future__ import annotations

import functools

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.ports import Take


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def take(key: str = "k", *, capacity: int = 100, rate_per_s: float = 1.0, cost: int = 1) -> Take:
    return Take(key, "t", capacity, rate_per_s, cost)


def allowed(limiter: LocalLimiter, wish: Take, most: int = 1_000) -> int:
    count = 0
    while count < most and limiter.take_now([wish]).allowed:
        count += 1
    return count


def test_a_share_is_the_limit_divided_in_capacity_and_rate() -> None:
    clock = Clock()
    limiter = LocalLimiter(clock, lambda: 10)
    assert allowed(limiter, take()) == 10
    clock.now_s = 20.0
    assert allowed(limiter, take()) == 2


def test_the_shares_of_all_workers_never_exceed_limit_plus_one_each() -> None:
    for share in (1, 3, 7, 50, 1_000):
        limiters = [LocalLimiter(Clock(), functools.partial(int, share)) for _ in range(share)]
        assert sum(allowed(limiter, take()) for limiter in limiters) <= 100 + share


def test_a_limit_smaller_than_the_number_of_workers_lets_one_through_at_a_time() -> None:
    clock = Clock()
    limiter = LocalLimiter(clock, lambda: 1_000)
    assert allowed(limiter, take(capacity=10)) == 1
    clock.now_s = 999.0
    assert allowed(limiter, take(capacity=10)) == 0
    clock.now_s = 1_000.0
    assert allowed(limiter, take(capacity=10)) == 1


def test_a_share_that_changes_holds_from_then_on() -> None:
    share = [1]
    limiter = LocalLimiter(Clock(), lambda: share[0])
    limiter.take_now([take()])
    share[0] = 10
    assert allowed(limiter, take()) == 10
    share[0] = 0
    assert not limiter.take_now([take()]).allowed


def test_a_cost_above_the_share_passes_when_it_is_full_and_is_paid_whole() -> None:
    clock = Clock()
    limiter = LocalLimiter(clock, lambda: 10)
    assert limiter.take_now([take(cost=50)]).allowed
    # 40 are owed and one is wanted, of which the share brings a tenth a second.
    assert limiter.take_now([take()]).wait_s == 410.0
    clock.now_s = 410.0
    assert limiter.take_now([take()]).allowed


def test_a_capacity_of_0_is_no_limit() -> None:
    assert allowed(LocalLimiter(Clock()), take(capacity=0)) == 1_000


def test_memory_is_bounded_and_the_longest_untouched_goes_first() -> None:
    limiter = LocalLimiter(Clock(), max_keys=3)
    for key in ("a", "b", "c"):
        limiter.take_now([take(key, capacity=1, rate_per_s=0.0)])
    limiter.take_now([take("a", cost=0, capacity=1, rate_per_s=0.0)])
    limiter.take_now([take("d", capacity=1, rate_per_s=0.0)])
    assert len(limiter) == 3
    refused = {key: not limiter.take_now([take(key, capacity=1, rate_per_s=0.0)]).allowed for key in ("a", "c", "d")}
    assert refused == {"a": True, "c": True, "d": True}
    assert limiter.take_now([take("b", capacity=1, rate_per_s=0.0)]).allowed


def test_a_refused_take_leaves_no_bucket_behind() -> None:
    limiter = LocalLimiter(Clock())
    limiter.take_now([take("small", capacity=1)])
    limiter.take_now([take("new"), take("small", capacity=1)])
    assert len(limiter) == 1


async def test_closing_forgets_every_bucket() -> None:
    limiter = LocalLimiter(Clock())
    await limiter.take([take()])
    await limiter.close()
    assert len(limiter) == 0
