"""How many recipients wait in which state, counted beside the loop and seldom enough to cost nothing.

A write does not know the state that a row had before, so the counts are read: one pass over the table in a thread, over
a connection of its own (0.12 s for a million recipients). A count is good for a second, and for fifty times as long as
it took, so that counting takes at most a fiftieth of a core however long the queue is. `count` waits a quarter of a
second for a new one and returns the last one otherwise; a file that cannot be read leaves the last one, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import apsw

from dataplane.adapters.spool_sqlite.schema import open_reader
from dataplane.ports import Clock, QueueDepth

GOOD_FOR_S = 1.0
GOOD_FOR_TIMES = 50.0
PATIENCE_S = 0.25

_COUNT = """
SELECT count(*) FILTER (WHERE state = 1), count(*) FILTER (WHERE state = 2), count(*) FILTER (WHERE state = 3),
       count(*) FILTER (WHERE state = 4), count(*) FILTER (WHERE state = 5)
FROM recipient NOT INDEXED
"""


class DepthCounter:
    """See the module. `in_thread` runs what blocks."""

    def __init__(
        self, database: Path, in_thread: Callable[[Callable[[], QueueDepth]], asyncio.Future[QueueDepth]], clock: Clock
    ) -> None:
        self._database = database
        self._in_thread = in_thread
        self._clock = clock
        self._last = QueueDepth()
        self._good_until_s = 0.0
        self._took_s = 0.0
        self._counting: asyncio.Future[QueueDepth] | None = None

    async def count(self) -> QueueDepth:
        """The counts. Cancelled, it leaves the count to whoever asks next."""
        if self._counting is None and self._clock.monotonic() >= self._good_until_s:
            self._counting = self._in_thread(self._read)
            self._counting.add_done_callback(self._counted)
        if self._counting is not None:
            await asyncio.wait([self._counting], timeout=PATIENCE_S)
        return self._last

    def _read(self) -> QueueDepth:
        started_s = time.perf_counter()
        connection = open_reader(self._database)
        try:
            return QueueDepth(*connection.execute(_COUNT).get)
        finally:
            connection.close()
            self._took_s = time.perf_counter() - started_s

    def _counted(self, counting: asyncio.Future[QueueDepth]) -> None:
        self._counting = None
        self._good_until_s = self._clock.monotonic() + max(GOOD_FOR_S, GOOD_FOR_TIMES * self._took_s)
        with contextlib.suppress(apsw.Error):
            self._last = counting.result()
