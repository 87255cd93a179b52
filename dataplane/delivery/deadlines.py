"""One timer for all connections: each carries its deadline, and a sweep once a second ends those that passed it.

Moving a deadline is one assignment, however often a conversation moves on. The sweep costs one comparison a connection
and runs only while something is watched. A deadline fires up to a second late, which SMTP's timers do not notice.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from dataplane.ports import Clock

SWEEP_S = 1.0
NEVER = float("inf")


class Timed(Protocol):
    """Something with a deadline, in seconds of the monotonic clock; NEVER for none."""

    deadline_s: float

    def deadline_passed(self, now_s: float) -> None:
        """End what waits, or set a new deadline."""
        ...


class Deadlines:
    """The watched, and the timer."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._watched: set[Timed] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, timed: Timed) -> None:
        """Look at its deadline from now on."""
        self._watched.add(timed)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._fire)

    def forget(self, timed: Timed) -> None:
        """Look at it no longer."""
        self._watched.discard(timed)

    def sweep(self) -> None:
        """Call all whose deadline has passed."""
        now_s = self._clock.monotonic()
        for timed in [timed for timed in self._watched if timed.deadline_s <= now_s]:
            timed.deadline_passed(now_s)

    def close(self) -> None:
        """Stop the timer; deadlines pass unnoticed from now on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        try:
            self.sweep()
        finally:
            if self._watched and self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._fire)
