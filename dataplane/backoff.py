"""How long to wait before trying again: exponential with full jitter, forgotten after a time of health.

Randomness is an argument, so that tests own it.
"""

from __future__ import annotations

from collections.abc import Callable


class Backoff:
    """Waits for one thing that is tried over and over; the n-th bound is `base_s` doubled n times, at most `cap_s`."""

    __slots__ = ("_base_s", "_cap_s", "_failures", "_healthy_after_s", "_random")

    def __init__(
        self, random: Callable[[], float], *, base_s: float, cap_s: float, healthy_after_s: float = 60.0
    ) -> None:
        self._random = random
        self._base_s = base_s
        self._cap_s = cap_s
        self._healthy_after_s = healthy_after_s
        self._failures = 0

    def next_wait_s(self, worked_for_s: float) -> float:
        """Seconds to wait now that it ended after it had worked for `worked_for_s`."""
        if worked_for_s >= self._healthy_after_s:
            self._failures = 0
        bound = min(self._cap_s, self._base_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        # Never at once: something that fails immediately and for ever must not become a busy loop.
        return max(bound * self._random(), self._base_s / 10)
