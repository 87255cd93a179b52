"""Requests of API keys, counted by all replicas together.

Contract. `RedisRequestBudget` implements `controlplane.ports.RequestBudget`: a bucket under the tag `k:<key>` in Redis,
and where that cannot be asked the replica's own. Never raises.

Over-admission. A key makes never more requests than capacity x (1 + replicas x failovers) + rate x time x (1 + replicas
that count by themselves): each replica that loses Redis begins with a bucket of its own, and a Redis that lost its
buckets with full ones.
"""

from __future__ import annotations

from controlplane.adapters.redis.functions import RedisAwayError, RedisFunctions
from controlplane.adapters.redis.limits import MICRO
from controlplane.ports import RequestBudget
from dataplane.core.limits import server_key


class RedisRequestBudget:
    """See the module; `per_minute` is at least 1."""

    def __init__(self, functions: RedisFunctions, per_minute: int, local: RequestBudget) -> None:
        self._functions = functions
        self._sizes = (per_minute * MICRO, round(per_minute * MICRO / 60))
        self._local = local

    async def spend(self, key: str) -> float:
        """As the port says."""
        tag = f"k:{key}"
        # The first key says of which epoch the bucket is, which nobody remembers here: it fills within a minute.
        keys = (server_key(tag, "epoch"), server_key(tag, "request"))
        arguments = ("", 1, *self._sizes, 1, 1, 1)
        try:
            answer = await self._functions.within(
                lambda: self._functions.call(tag, "postroad_take_2", keys, arguments, only_looks=False)
            )
        except RedisAwayError:
            return await self._local.spend(key)
        return answer[2] / MICRO if len(answer) > 1 else 0.0
