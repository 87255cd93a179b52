"""When a long queue is counted anew, and that nobody waits long for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from dataplane.adapters.spool_sqlite import depth
from dataplane.adapters.spool_sqlite.depth import GOOD_FOR_S, GOOD_FOR_TIMES, DepthCounter
from dataplane.ports import QueueDepth
from support.spools import ManualClock


class Bench:
    """A counter whose threads are futures that the test fills."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.counts: list[asyncio.Future[QueueDepth]] = []
        self.counter = DepthCounter(Path("spool.db"), self._in_thread, self.clock)

    def _in_thread(self, read: Callable[[], QueueDepth]) -> asyncio.Future[QueueDepth]:
        del read
        self.counts.append(asyncio.get_running_loop().create_future())
        return self.counts[-1]

    async def count(self, answer: QueueDepth | Exception | None = None) -> QueueDepth:
        """Ask, and fill the count that begins with an answer."""
        asked = asyncio.create_task(self.counter.count())
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            self.counts[-1].set_exception(answer)
        elif answer is not None:
            self.counts[-1].set_result(answer)
        return await asked


async def test_a_count_is_good_for_a_second_and_then_made_anew() -> None:
    bench = Bench()
    assert await bench.count(QueueDepth(queued=3)) == QueueDepth(queued=3)
    assert await bench.count() == QueueDepth(queued=3)
    bench.clock.advance(GOOD_FOR_S + 0.1)
    assert await bench.count(QueueDepth(queued=4)) == QueueDepth(queued=4)
    assert len(bench.counts) == 2


async def test_a_count_that_took_long_is_good_for_long() -> None:
    bench = Bench()
    bench.counter._took_s = 0.5
    await bench.count(QueueDepth(queued=3))
    bench.clock.advance(GOOD_FOR_TIMES * 0.5 - 0.1)
    assert await bench.count() == QueueDepth(queued=3)
    bench.clock.advance(0.2)
    assert await bench.count(QueueDepth(queued=4)) == QueueDepth(queued=4)


async def test_nobody_waits_for_a_count_that_does_not_come_and_it_is_made_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(depth, "PATIENCE_S", 0.0)
    bench = Bench()
    assert await bench.count() == QueueDepth()
    assert await bench.count() == QueueDepth()
    assert len(bench.counts) == 1
    bench.counts[0].set_result(QueueDepth(held=1))
    await asyncio.sleep(0)
    assert await bench.count() == QueueDepth(held=1)


async def test_a_file_that_cannot_be_read_leaves_the_last_count() -> None:
    bench = Bench()
    await bench.count(QueueDepth(queued=3))
    bench.clock.advance(GOOD_FOR_S + 0.1)
    assert await bench.count(apsw.IOError("disk")) == QueueDepth(queued=3)
