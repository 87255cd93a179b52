"""How many requests an API key may make: a bucket each, looked at after the key is known to be good.

Contract. `LocalRequestBudget` is a bucket a key in this process. `Throttle.spend` takes a request from the bucket of a
key that was authenticated, or raises ResourceExhaustedError with the time until there is one. `refuse_spent`, before
authentication, refuses a key that was refused a moment ago without asking anybody: a flood costs neither the database
nor Redis more than a few looks a second. A key is remembered by its hash, so that who guesses at one neither spends its
bucket nor is told of it.

A bucket holds what a minute brings: a program that does nothing for a minute may make all its requests at once, as a
script that lists and changes many things does.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

from controlplane.domain.errors import Reason, ResourceExhaustedError
from controlplane.domain.secrets import lookup_of
from controlplane.ports import RequestBudget

_MINUTE_S = 60.0
_MAX_KEYS = 10_000


class LocalRequestBudget:
    """See the module; `per_minute` is at least 1, `clock` is monotonic, in seconds."""

    def __init__(self, per_minute: int, clock: Callable[[], float], *, max_keys: int = _MAX_KEYS) -> None:
        self._capacity = per_minute
        self._rate = per_minute / _MINUTE_S
        self._clock = clock
        self._max_keys = max_keys
        # Level and when it was so; touched longest ago first.
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    async def spend(self, key: str) -> float:
        """Take one request: 0.0, or the seconds until there is one."""
        now_s = self._clock()
        level, since_s = self._levels.get(key, (float(self._capacity), now_s))
        level = min(self._capacity, level + max(0.0, now_s - since_s) * self._rate)
        if level < 1:
            return (1 - level) / self._rate
        self._levels[key] = (level - 1, now_s)
        self._levels.move_to_end(key)
        if len(self._levels) > self._max_keys:
            self._levels.popitem(last=False)
        return 0.0


class Throttle:
    """See the module. Without a budget nothing is counted."""

    def __init__(self, budget: RequestBudget | None, clock: Callable[[], float]) -> None:
        self._budget = budget
        self._clock = clock
        self._spent_until: OrderedDict[bytes, tuple[float, str]] = OrderedDict()

    def refuse_spent(self, presented: str) -> None:
        """Raise ResourceExhaustedError for a key whose bucket was empty and still is."""
        if not self._spent_until:
            return
        name = _hash(presented)
        until_s, principal = self._spent_until.get(name, (0.0, ""))
        wait_s = until_s - self._clock()
        if wait_s > 0:
            raise _exhausted(wait_s, principal)
        self._spent_until.pop(name, None)

    async def spend(self, presented: str, principal: str) -> None:
        """Take a request of `presented`, which is the good key of that name."""
        if self._budget is None:
            return
        wait_s = await self._budget.spend(lookup_of(presented) or "")
        if wait_s > 0:
            self._spent_until[_hash(presented)] = (self._clock() + wait_s, principal)
            if len(self._spent_until) > _MAX_KEYS:
                self._spent_until.popitem(last=False)
            raise _exhausted(wait_s, principal)


def _hash(presented: str) -> bytes:
    return hashlib.sha256(presented.encode()).digest()


def _exhausted(wait_s: float, principal: str) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        Reason.REQUESTS_EXHAUSTED,
        f"the key made all requests that it may make now; try again in {wait_s:.1f} s",
        retry_after_s=wait_s,
        subject=principal,
    )
