"""How long to wait before a process that ended is started again, and when to call it failing. Pure."""

from __future__ import annotations

QUICK_S = 30.0
QUICK_CRASHES = 3
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0


class Restarts:
    """The record of one process: a run of 30 s or more clears it, but for `count`, how often it ended."""

    __slots__ = ("_quick", "count")

    def __init__(self) -> None:
        self._quick = 0
        self.count = 0

    @property
    def is_failing(self) -> bool:
        """Whether it ended quickly three times in a row."""
        return self._quick >= QUICK_CRASHES

    def ended(self, ran_for_s: float) -> float:
        """It ended; returns the seconds to wait before the next start."""
        self.count += 1
        self._quick = self._quick + 1 if ran_for_s < QUICK_S else 0
        return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** max(self._quick - 1, 0))
