"""A spool's lease on REPLICATED mail, as the worker sees it: until when what it holds may be sent.

Pure: seconds are those of a clock that runs on while the machine sleeps (CLOCK_BOOTTIME), passed in. A lease counts
from the *sending* of the request that renewed it, and ends MARGIN_S early, so that it has always ended here before the
database ends it. Another epoch makes all that was held void.

    state      what may be done                                     left by
    none       nothing is accepted, claimed or sent                 `renewed`
    live       all, under `epoch`                                   time, `abandon`, `renewed` with another epoch
    over       nothing; renewed in time it is the same epoch        `renewed`
"""

from __future__ import annotations

MARGIN_S = 1.0


class Lease:
    """See the module."""

    __slots__ = ("_epoch", "_until_s")

    def __init__(self) -> None:
        self._epoch = 0
        self._until_s = 0.0

    @property
    def epoch(self) -> int:
        """The epoch to be renewed, 0 for none; it may be over."""
        return self._epoch

    def left_s(self, now_s: float) -> float:
        """Seconds that the lease is good for."""
        return max(0.0, self._until_s - now_s) if self._epoch else 0.0

    def holds(self, epoch: int, now_s: float) -> bool:
        """Whether what is held under this epoch may still be sent."""
        return 0 != epoch == self._epoch and now_s < self._until_s

    def renewed(self, epoch: int, duration_s: float, sent_s: float) -> bool:
        """Take an answer to a request that was sent at `sent_s`; whether it made all void that was held."""
        void = self._epoch not in (0, epoch)
        until_s = sent_s + duration_s - MARGIN_S
        # Answers may overtake each other; the newest request counts.
        self._until_s = until_s if epoch != self._epoch else max(until_s, self._until_s)
        self._epoch = epoch
        return void

    def abandon(self) -> None:
        """Nobody knows what the database thinks that this lease holds: begin another one."""
        self._epoch = 0
        self._until_s = 0.0
