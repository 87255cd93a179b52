"""How late a loop runs what is due: the first sign that a process has more to do than it can."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dataplane.histogram import LATENCY_BOUNDS_S, Histogram

INTERVAL_S = 0.1


class LoopLag:
    """`seconds` counts the lateness of one timer after the other."""

    __slots__ = ("_monotonic", "seconds")

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self.seconds = Histogram(LATENCY_BOUNDS_S)

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due = self._monotonic() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self.seconds.observe(max(0.0, self._monotonic() - due))
