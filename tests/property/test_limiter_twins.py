"""The limiter in memory and the library in Redis decide alike, whatever is asked in whatever order.

Nothing refills and no slot ends meanwhile, so that time plays no part: what it does is in the contract suite.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.ports import Slot, Take

CAPACITIES = (0, 1, 5, 12)
keys = st.integers(0, len(CAPACITIES) - 1)
costs = st.one_of(st.integers(0, 15), st.sampled_from((40, 1_000, 4_000_000_000, 9_000_000_000)))
refunds = costs.flatmap(lambda cost: st.sampled_from((cost, -cost)))
takes = st.lists(st.tuples(keys, costs), min_size=1, max_size=4)
slots = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), takes),
        st.tuples(st.just("refund"), st.lists(st.tuples(keys, refunds), min_size=1, max_size=3)),
        st.tuples(st.just("hold"), slots),
        st.tuples(st.just("release"), slots),
    ),
    max_size=25,
)
numbers = itertools.count()
Script = list[tuple[str, list[tuple[int, int]]]]


@dataclass
class Twins:
    """Both limiters, and the loop that the shared one lives in."""

    runner: asyncio.Runner
    shared: RedisLimiter


@pytest.fixture
def twins(valkey_url: str) -> Iterator[Twins]:
    with asyncio.Runner() as runner:
        shared = RedisLimiter(valkey_url, LocalLimiter(lambda: 0.0), timeout_s=10.0)
        runner.run(shared.start())
        yield Twins(runner, shared)
        runner.run(shared.close())
        assert shared.counters.local == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=steps)
def test_both_answer_the_same(twins: Twins, script: Script) -> None:
    twins.runner.run(play(twins.shared, script))


async def play(shared: RedisLimiter, script: Script) -> None:
    # A server keeps what earlier examples did: each has a tag of its own.
    tag = f"a:example-{next(numbers)}"
    local = LocalLimiter(lambda: 0.0)
    for verb, items in script:
        if verb in ("take", "refund"):
            wanted = [Take(f"bucket-{key}", tag, CAPACITIES[key], 0.0, cost) for key, cost in items]
            if verb == "take":
                assert await shared.take(wanted) == local.take_now(wanted)._replace(local=False)
            else:
                shared.refund(wanted)
                local.refund(wanted)
        else:
            places = [Slot(f"slots-{key}", tag, key + 1, 1_000.0, f"holder-{holder}") for key, holder in items]
            if verb == "hold":
                assert (await shared.hold(places)).allowed == local.hold_now(places).allowed
            else:
                shared.release(places)
                local.release(places)
