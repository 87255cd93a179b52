"""The pools of connections of a worker, one for each provider (`connections`), and what they have in common.

They belong to the worker, whatever number of engines (spools) it has, so that the number of connections to a provider
holds for the worker; engines that share them stop together. Here are the number of connections in all, the dials under
way, and who is told what becomes of providers. A pool is made at first use and forgotten when nothing is known of it,
or when its provider has left the configuration and its last connection has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple

from dataplane.core.config import SmtpProvider
from dataplane.delivery.connection import Connection
from dataplane.delivery.connections import Job, Pool
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.limits import DeliveryLimits
from dataplane.ports import Clock, EventLog

Dialer = Callable[[SmtpProvider], Coroutine[Any, Any, Connection]]

WORKER_CONNECTION_LIMIT = 1_000


class PoolsFollower(NamedTuple):
    """Who is told of a provider by its name: `usable` that it was dead and is not any more, `dead` until which time.

    `ended` hears of each transaction that ends while the pools stop, `broken` of an error of ours that left a job
    without an end: only a new start of the worker gets it out of `sending`.
    """

    usable: Callable[[str], None]
    dead: Callable[[str, float], None]
    ended: Callable[[], None]
    broken: Callable[[BaseException], None]


class Pools:
    """All pools of a worker. `counters` are those of the engine that made them."""

    def __init__(
        self,
        dialer: Dialer,
        clock: Clock,
        random: Callable[[], float],
        counters: DeliveryCounters,
        log: EventLog,
        *,
        connection_limit: int = WORKER_CONNECTION_LIMIT,
        limits: DeliveryLimits | None = None,
    ) -> None:
        self.dialer = dialer
        self.clock = clock
        self.random = random
        self.counters = counters
        self.log = log
        self.limits = limits
        self._followers: list[PoolsFollower] = []
        self._pools: dict[str, Pool] = {}
        self._connection_limit = connection_limit
        self._tasks: set[asyncio.Task[None]] = set()
        self.stopping = False

    def follow(self, follower: PoolsFollower) -> None:
        """Tell an engine what happens."""
        self._followers.append(follower)

    def usable_again(self, name: str) -> None:
        """A provider that was dead takes mail."""
        for follower in self._followers:
            follower.usable(name)

    def found_dead(self, name: str, retry_at_s: float) -> None:
        """A provider takes nothing before then (monotonic)."""
        for follower in self._followers:
            follower.dead(name, retry_at_s)

    def transaction_ended(self) -> None:
        """One less is under way."""
        for follower in self._followers:
            follower.ended()

    def broken(self, error: BaseException) -> None:
        """A job was left without an end."""
        for follower in self._followers:
            follower.broken(error)

    def find(self, name: str) -> Pool | None:
        """The pool of a provider, if there is one."""
        return self._pools.get(name)

    def get(self, provider: SmtpProvider) -> Pool:
        """The pool of a provider, made at first use and brought up to date."""
        pool = self._pools.get(provider.name)
        if pool is None:
            pool = self._pools[provider.name] = Pool(self, provider)
        elif pool.provider is not provider:
            pool.update(provider)
        return pool

    def __iter__(self) -> Iterator[Pool]:
        return iter(list(self._pools.values()))

    def make_room(self) -> bool:
        """Whether one more connection may be opened; closes somebody's idle one when there is no room."""
        if self.stopping:
            return False
        if self.counters.connections_now < self._connection_limit:
            return True
        for pool in self._pools.values():
            if pool.close_one_idle():
                break
        return False

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a dial as a task of ours."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._dial_ended)

    def _dial_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.broken(error)

    def connection_closed(self, pool: Pool) -> None:
        """Give the place to whoever waits for one, and forget a pool that nothing is known of."""
        if pool.is_blank:
            self._forget(pool)
        if self.counters.connections_now == self._connection_limit - 1:
            for other in list(self._pools.values()):
                other.pump()

    def remove(self, pool: Pool) -> None:
        """Its provider is gone from the configuration: forget it when the last connection has ended."""
        pool.is_gone = True
        pool.retire()
        if pool.is_blank:
            self._forget(pool)

    def _forget(self, pool: Pool) -> None:
        if self._pools.get(pool.provider.name) is pool:
            del self._pools[pool.provider.name]

    def stop(self) -> list[Job]:
        """Open and begin nothing any more; returns the jobs that had not begun."""
        self.stopping = True
        jobs = [job for pool in self for job in pool.take_waiting()]
        for pool in self:
            pool.close_idle()
        return jobs

    def abort(self) -> None:
        """Cut what is left."""
        for pool in self:
            pool.abort()

    async def join(self) -> None:
        """Wait for dials that were cut. Cancellation leaves them cut."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def busy_count(self) -> int:
        """Transactions under way."""
        return sum(pool.busy_count for pool in self._pools.values())
