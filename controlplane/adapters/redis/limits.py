"""What is left of limits, by the counters that nodes share.

Contract. `RedisLiveLimits` implements `controlplane.ports.LiveLimits`. One call looks at everything; a cluster refuses
keys of several tags together and is then asked once for each tag. A bucket that nobody drew from is full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from redis.exceptions import ClusterCrossSlotError

from controlplane.adapters.redis.functions import RedisAwayError, RedisFunctions
from controlplane.domain.limits import Look
from controlplane.ports import LiveStateUnknownError
from dataplane.core.limits import server_key

MICRO = 1_000_000
_PEEK, _COUNT = "postroad_peek_2", "postroad_count_1"


class RedisLiveLimits:
    """See the module."""

    def __init__(self, functions: RedisFunctions) -> None:
        self._functions = functions
        self._is_cluster = False

    async def look(self, looks: Sequence[Look]) -> list[float]:
        """As the port says."""
        try:
            return await self._functions.within(lambda: self._look(looks))
        except RedisAwayError as error:
            raise LiveStateUnknownError(f"Redis cannot be asked: {error}") from error

    async def _look(self, looks: Sequence[Look]) -> list[float]:
        buckets = [n for n, look in enumerate(looks) if look.rate_per_s]
        slots = [n for n, look in enumerate(looks) if not look.rate_per_s]
        return await self._in_parts(looks, [part for part in (buckets, slots) if part], self._of_one_kind)

    async def _of_one_kind(self, looks: Sequence[Look]) -> list[float]:
        if not self._is_cluster:
            try:
                return await self._call(looks)
            except ClusterCrossSlotError:
                self._is_cluster = True
        by_tag: dict[str, list[int]] = {}
        for n, look in enumerate(looks):
            by_tag.setdefault(look.tag, []).append(n)
        return await self._in_parts(looks, list(by_tag.values()), self._call)

    async def _in_parts(
        self,
        looks: Sequence[Look],
        parts: Sequence[Sequence[int]],
        ask: Callable[[Sequence[Look]], Awaitable[list[float]]],
    ) -> list[float]:
        # Each waits for all, so that none goes on in the background when another one failed.
        answers = await asyncio.gather(*(ask([looks[n] for n in part]) for part in parts), return_exceptions=True)
        levels = [0.0] * len(looks)
        for part, found in zip(parts, answers, strict=True):
            if isinstance(found, BaseException):
                raise found
            for n, level in zip(part, found, strict=True):
                levels[n] = level
        return levels

    async def _call(self, looks: Sequence[Look]) -> list[float]:
        keys = [server_key(look.tag, look.key) for look in looks]
        if not looks[0].rate_per_s:
            counts = await self._functions.call(looks[0].tag, _COUNT, keys, (), only_looks=True)
            return [float(count) for count in counts]
        sizes = [size for look in looks for size in (look.capacity * MICRO, round(look.rate_per_s * MICRO))]
        levels = await self._functions.call(looks[0].tag, _PEEK, keys, sizes, only_looks=True)
        return [level / MICRO for level in levels]
