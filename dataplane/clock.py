"""The real clock: what `ports.Clock` is outside tests."""

from __future__ import annotations

import time


class SystemClock:
    """Wall clock of the machine and its monotonic clock; never fails."""

    __slots__ = ()

    def wall_ms(self) -> int:
        """Milliseconds since 1970."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds that only grow."""
        return time.monotonic()
