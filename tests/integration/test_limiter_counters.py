"""What the shared limiter counts is told under the names of the metrics, and who answered is told apart."""

from __future__ import annotations

import time

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.ports import Take
from dataplane.telemetry import SampleValue, render
from dataplane.worker import limiter_samples

NOBODY = "redis://127.0.0.1:1/0"


def samples(limiter: RedisLimiter) -> dict[tuple[str, ...], SampleValue]:
    render(limiter_samples(limiter))
    return {(name, *labels): value for name, labels, value in limiter_samples(limiter)}


async def test_what_the_server_decides_is_counted_and_timed(valkey_url: str) -> None:
    limiter = RedisLimiter(valkey_url, LocalLimiter(time.monotonic), timeout_s=10.0)
    await limiter.start()
    try:
        for _ in range(3):
            await limiter.take([Take("messages", "a:counted", 100, 1.0, 1)])
        found = samples(limiter)
    finally:
        await limiter.close()
    assert found["limiter_decisions_total", "shared"] == 3
    assert found["limiter_decisions_total", "local"] == 0
    assert found["limiter_shared",] == 1
    calls = found["limiter_call_duration_seconds",]
    assert isinstance(calls, tuple)
    assert sum(calls[:-1]) >= 3
    assert 0 < calls[-1] < 60


async def test_what_the_local_share_grants_is_what_may_be_above_a_limit() -> None:
    limiter = RedisLimiter(NOBODY, LocalLimiter(time.monotonic))
    await limiter.start()
    try:
        for _ in range(2):
            await limiter.take([Take("messages", "a:counted", 1, 0.0, 1)])
        found = samples(limiter)
    finally:
        await limiter.close()
    assert found["limiter_decisions_total", "local"] == 2
    assert found["limiter_over_admission_total",] == 1, "the second one was refused"
    assert found["limiter_decisions_total", "shared"] == 0
    assert found["limiter_shared",] == 0
