"""What every budget of requests holds: a replica's own, and the one that replicas share in Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from controlplane.adapters.redis.functions import RedisFunctions
from controlplane.adapters.redis.requests import RedisRequestBudget
from controlplane.ports import RequestBudget
from controlplane.services.throttle import LocalRequestBudget

Make = Callable[[int], RequestBudget]


class NoBudget:
    """Stands where nobody may be asked."""

    async def spend(self, key: str) -> float:
        raise AssertionError(f"the replica counted {key} by itself")


@pytest.fixture(params=["local", "redis"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    if request.param == "local":
        yield lambda per_minute: LocalRequestBudget(per_minute, time.monotonic)
        return
    functions = RedisFunctions(request.getfixturevalue("valkey_url"), timeout_s=20.0)
    yield lambda per_minute: RedisRequestBudget(functions, per_minute, NoBudget())
    await functions.close()


@pytest.mark.parametrize("per_minute", [1, 6])
async def test_a_minutes_requests_are_there_at_once_and_no_more(make: Make, per_minute: int) -> None:
    budget = make(per_minute)
    assert [await budget.spend("a") for _ in range(per_minute)] == [0.0] * per_minute
    for _ in range(3):
        assert 0 < await budget.spend("a") <= 60 / per_minute
    assert await budget.spend("b") == 0.0


async def test_requests_at_the_same_time_get_no_more_than_one_after_the_other(make: Make) -> None:
    budget = make(10)
    waits = await asyncio.gather(*(budget.spend("a") for _ in range(40)))
    assert waits.count(0.0) == 10
