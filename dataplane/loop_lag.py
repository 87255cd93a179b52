"""How late a loop runs what is due: the first sign that a process has more to do than it can."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.5


class LoopLag:
    """`worst_s` is the worst lateness since it was last taken."""

    __slots__ = ("_monotonic", "_worst_s")

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._worst_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due = self._monotonic() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self._worst_s = max(self._worst_s, self._monotonic() - due)

    def take_worst_s(self) -> float:
        """The worst lateness in seconds since the last call."""
        worst_s, self._worst_s = self._worst_s, 0.0
        return worst_s
