"""When a recipient is tried again, and when it has been tried long enough: exponential back-off with full jitter.

Pure: the random number and both clocks are arguments. The delay before attempt n + 1 is drawn evenly from 0 to
min(cap, base x factor^(n-1)) and is never below one second. Age counts only at the end of a failed attempt.

Due times are wall clock, and wall clocks jump. `RetryClock` is the wall clock without the jumps seen since it was
made: small corrections are followed, a jump of more than a second shifts it against the wall from then on. Due times
written and compared by it are rebased by that: a jump neither makes everything due at once nor delays anything. After
a restart the wall counts as it is: that costs a recipient one early attempt, or a delay that `rebase_due` cuts short.
Only the time that a submitter named is a date, not a delay: mail that is scheduled goes when the wall clock shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dataplane.core.config import RetryPolicy

FLOOR_S = 1.0
JUMP_MS = 1_000


def backoff_s(policy: RetryPolicy, attempt: int, random: float) -> float:
    """Return the seconds to wait after failed attempt number `attempt` (from 1); `random` lies in [0, 1)."""
    return max(FLOOR_S, random * _bound_s(policy, attempt))


def _bound_s(policy: RetryPolicy, attempt: int) -> float:
    try:
        grown = policy.base_s * policy.factor ** max(0, attempt - 1)
    except OverflowError:
        return policy.cap_s
    return min(policy.cap_s, grown)


def next_attempt_ms(policy: RetryPolicy, attempt: int, now_ms: int, random: float) -> int:
    """Return when the next attempt is due after `attempt` failed at `now_ms`."""
    return now_ms + int(backoff_s(policy, attempt, random) * 1000)


def is_expired(policy: RetryPolicy, since_ms: int, wall_ms: int, steady_ms: int) -> bool:
    """Whether a message accepted or released at `since_ms` has outlived its lifetime by the wall and the steady clock.

    A jump moves one of them only, so that it expires nothing.
    """
    return min(wall_ms, steady_ms) - since_ms >= policy.lifetime_s * 1000


def rebase_due(due_ms: int, now_ms: int, cap_s: float) -> int:
    """Return the due time of a waiting retry, moved to the longest possible delay where it lies beyond that.

    Only a clock that was ahead when the time was written can have put it there.
    """
    return min(due_ms, now_ms + int(cap_s * 1000))


@dataclass(slots=True)
class RetryClock:
    """The wall clock without its jumps, in milliseconds since 1970.

    `offset_ms` is what all jumps so far amount to: wall minus steady.
    """

    wall_ms: int
    monotonic_s: float
    offset_ms: int = 0

    def read(self, wall_ms: int, monotonic_s: float) -> int:
        """Return the steady time for a reading of both clocks."""
        expected_ms = self.wall_ms + int((monotonic_s - self.monotonic_s) * 1000)
        difference_ms = wall_ms - expected_ms
        if abs(difference_ms) > JUMP_MS:
            self.offset_ms += difference_ms
        self.wall_ms = wall_ms
        self.monotonic_s = monotonic_s
        return wall_ms - self.offset_ms
