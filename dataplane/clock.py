"""The real clock: what `ports.Clock` is outside tests."""

from __future__ import annotations

import time


class SystemClock:
    """Wall clock of the machine and its monotonic clock; never fails."""

    __slots__ = ()

    def wall_ms(self) -> int:
        """Milliseconds since 1970."""
        return time.time_ns() // 1_000_000

    # Seconds that only grow; asked many times a message, so that nothing stands between.
    monotonic = staticmethod(time.monotonic)


def boot_time_s() -> float:
    """Seconds that grow while the machine sleeps, too: what leases are measured by."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
