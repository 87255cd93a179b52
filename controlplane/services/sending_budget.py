"""Buckets of messages that are sent by API, as one control plane keeps them while nobody can be asked.

Contract. `LocalMessageBudget` implements `ports_sending.MessageBudget` in memory. Each bucket is one of `parts` of the
limit, but has room for one token at least; it grants when it holds the cost or is full, and goes into debt by what it
does not hold, as the shared ones do. With `max_keys` buckets the one that was touched longest ago is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from controlplane.domain.sending_limits import Take
from controlplane.ports_sending import Denied
from dataplane.core.limits import LONGEST_WAIT_S, server_key

_MAX_KEYS = 100_000


class _Bucket(NamedTuple):
    level: float
    capacity: float
    since_s: float


class LocalMessageBudget:
    """See the module. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float], *, max_keys: int = _MAX_KEYS) -> None:
        self._clock = clock
        self._max_keys = max_keys
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    async def take(self, groups: Sequence[Sequence[Take]], parts: int) -> list[Denied | None]:
        """As the port says."""
        return [self._take(group, parts) for group in groups]

    async def give_back(self, takes: Sequence[Take]) -> None:
        """As the port says."""
        for take in takes:
            name = server_key(take.tag, take.key)
            bucket = self._buckets.get(name)
            if bucket is not None:
                self._buckets[name] = bucket._replace(level=min(bucket.capacity, bucket.level + take.cost))

    def _take(self, group: Sequence[Take], parts: int) -> Denied | None:
        now_s = self._clock()
        found: dict[str, _Bucket] = {}
        worst: Denied | None = None
        for take in group:
            if not take.capacity:
                continue
            name = server_key(take.tag, take.key)
            bucket = found.get(name) or self._now(name, take, parts, now_s)
            missing = min(take.cost, bucket.capacity) - bucket.level
            if missing > 0:
                rate = take.rate_per_s / parts
                wait_s = min(missing / rate, LONGEST_WAIT_S) if rate else LONGEST_WAIT_S
                if worst is None or wait_s > worst.wait_s:
                    worst = Denied(wait_s, take.key)
            found[name] = bucket._replace(level=bucket.level - take.cost)
        if worst is None:
            for name, bucket in found.items():
                self._buckets[name] = bucket
                self._buckets.move_to_end(name)
            while len(self._buckets) > self._max_keys:
                self._buckets.popitem(last=False)
        return worst

    def _now(self, name: str, take: Take, parts: int, now_s: float) -> _Bucket:
        capacity = max(take.capacity / parts, 1.0)
        former = self._buckets.get(name)
        if former is None:
            return _Bucket(capacity, capacity, now_s)
        gained = max(0.0, now_s - former.since_s) * take.rate_per_s / parts
        return _Bucket(min(capacity, former.level + gained), capacity, now_s)
