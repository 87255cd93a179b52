from __future__ import annotations

import pytest

from controlplane.domain.errors import Reason, ResourceExhaustedError
from controlplane.services.throttle import LocalRequestBudget, Throttle

KEY = "prk_lookup12_" + "A" * 43
OTHER = "prk_lookup12_" + "B" * 43


class Clock:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Budget:
    """Answers as it is told and remembers who asked."""

    def __init__(self, wait_s: float = 0.0) -> None:
        self.wait_s = wait_s
        self.keys: list[str] = []

    async def spend(self, key: str) -> float:
        self.keys.append(key)
        return self.wait_s


async def spend_all(budget: LocalRequestBudget, key: str) -> int:
    count = 0
    while not await budget.spend(key):
        count += 1
    return count


async def test_a_key_makes_a_minutes_requests_at_once_and_then_one_as_each_comes_back() -> None:
    clock = Clock()
    budget = LocalRequestBudget(100, clock)
    assert await spend_all(budget, "a") == 100
    assert await budget.spend("a") == pytest.approx(0.6)
    # Another key has a bucket of its own.
    assert await budget.spend("b") == 0.0
    clock.now_s += 0.6001
    assert await spend_all(budget, "a") == 1
    clock.now_s += 30
    assert await spend_all(budget, "a") == 50
    clock.now_s += 3_600
    assert await spend_all(budget, "a") == 100


async def test_a_clock_that_goes_back_brings_nothing() -> None:
    clock = Clock()
    budget = LocalRequestBudget(2, clock)
    assert await spend_all(budget, "a") == 2
    clock.now_s -= 3_600
    assert await budget.spend("a") == pytest.approx(30)


async def test_buckets_are_bounded_and_the_one_used_longest_ago_goes_first() -> None:
    budget = LocalRequestBudget(1, Clock(), max_keys=2)
    for key in ("a", "b", "a", "c"):
        await budget.spend(key)
    assert len(budget) == 2
    # `a` was used before `b`: its refused request did not count as use.
    assert (await budget.spend("b"), await budget.spend("c")) == (60, 60)


async def test_a_spent_key_is_told_how_long_to_wait_and_whose_quota_it_is() -> None:
    throttle = Throttle(Budget(wait_s=12.5), Clock())
    with pytest.raises(ResourceExhaustedError, match=r"12\.5 s") as caught:
        await throttle.spend(KEY, "accounts/acme/apiKeys/ci")
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.REQUESTS_EXHAUSTED, 12.5)
    assert caught.value.subject == "accounts/acme/apiKeys/ci"


async def test_the_bucket_belongs_to_the_readable_part_of_the_key() -> None:
    budget = Budget()
    await Throttle(budget, Clock()).spend(KEY, "apiKeys/a")
    assert budget.keys == ["lookup12"]


async def test_a_key_that_was_refused_is_refused_without_asking_until_its_time_comes() -> None:
    clock, budget = Clock(), Budget(wait_s=2.0)
    throttle = Throttle(budget, clock)
    throttle.refuse_spent(KEY)
    with pytest.raises(ResourceExhaustedError):
        await throttle.spend(KEY, "apiKeys/a")
    clock.now_s += 1.5
    with pytest.raises(ResourceExhaustedError) as caught:
        throttle.refuse_spent(KEY)
    assert caught.value.retry_after_s == pytest.approx(0.5)
    assert caught.value.subject == "apiKeys/a"
    # Who knows only the readable part learns nothing.
    throttle.refuse_spent(OTHER)
    clock.now_s += 0.5
    throttle.refuse_spent(KEY)
    assert len(budget.keys) == 1


async def test_without_a_budget_nothing_is_counted() -> None:
    throttle = Throttle(None, Clock())
    for _ in range(1_000):
        throttle.refuse_spent(KEY)
        await throttle.spend(KEY, "apiKeys/a")
