"""What ingress, delivery and the loop count reaches /metrics: nothing is counted that nobody is told."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from dataplane import loop_lag
from dataplane.delivery.counters import DeliveryCounters
from dataplane.histogram import Histogram
from dataplane.ingress.counters import IngressCounters
from dataplane.loop_lag import LoopLag
from dataplane.telemetry import render


@pytest.mark.parametrize("kind", [IngressCounters, DeliveryCounters])
def test_every_counter_is_told_under_a_name_that_is_exported(
    kind: type[IngressCounters | DeliveryCounters],
) -> None:
    counters = kind()
    expected: set[float] = set()
    for number, field in enumerate(dataclasses.fields(counters), 1_000):
        if isinstance(histogram := getattr(counters, field.name), Histogram):
            histogram.observe(number)
        else:
            setattr(counters, field.name, number)
        expected.add(number)

    told = {value[-1] if isinstance(value, tuple) else value for _, _, value in counters.samples()}

    assert told == expected
    assert render(counters.samples())


async def test_a_loop_that_is_late_is_counted_by_how_late_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_lag, "INTERVAL_S", 0.0)
    times = iter([10.0, 10.0, 20.0, 20.06])
    done = asyncio.Event()

    def monotonic() -> float:
        now = next(times, None)
        if now is None:
            done.set()
            return 0.0
        return now

    lag = LoopLag(monotonic)
    task = asyncio.create_task(lag.run())
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    assert lag.seconds.row[0] == 1  # in time
    assert lag.seconds.row[8] == 1  # above 50 ms, up to 75 ms
