"""Brings settlements into the spool, and keeps those that it refused until it takes them.

An outcome must not be lost while the process lives: a settlement that fails is tried again every second. A spool that
failed for good (SpoolFailedError) takes nothing any more; its worker ends, and the next start recovers what was
`sending`. `done` is called after the commit with the number of recipients changed, and with 0 when all is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from dataplane.core.ids import format_message_id
from dataplane.delivery.counters import DeliveryCounters
from dataplane.failpoints import failpoint
from dataplane.ports import EventLog, Settlement, Spool, SpoolError, SpoolFailedError

AGAIN_S = 1.0

Done = Callable[[int], None]


class Settler:
    """State: settlements on their way, and those that wait for their next try."""

    def __init__(self, spool: Spool, counters: DeliveryCounters, log: EventLog) -> None:
        self._spool = spool
        self._counters = counters
        self._log = log
        self._timers: set[asyncio.TimerHandle] = set()
        self.pending_count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def settle(self, settlement: Settlement, done: Done | None = None) -> None:
        """Write it, sooner or later."""
        self.pending_count += 1
        self._idle.clear()
        self._send(settlement, done)

    async def drained(self) -> None:
        """Return when nothing is on its way. Cancellation leaves everything as it is."""
        await self._idle.wait()

    def _send(self, settlement: Settlement, done: Done | None) -> None:
        future = self._spool.settle(settlement)
        future.add_done_callback(partial(self._finished, settlement, done))

    def _finished(self, settlement: Settlement, done: Done | None, future: asyncio.Future[int]) -> None:
        error = None if future.cancelled() else future.exception()
        failpoint("delivery.settled")
        if error is None and not future.cancelled():
            self._count_down()
            if done is not None:
                done(future.result())
            return
        self._counters.settle_failures += 1
        self._log.warning(
            "delivery.settle_failed",
            message=format_message_id(settlement.message_id),
            error=type(error or future).__name__,
        )
        if isinstance(error, SpoolError) and not isinstance(error, SpoolFailedError):
            self._again(settlement, done)
        else:
            self._count_down()
            if done is not None:
                done(0)

    def _again(self, settlement: Settlement, done: Done | None) -> None:
        def fire() -> None:
            self._timers.discard(handle)
            self._send(settlement, done)

        handle = asyncio.get_running_loop().call_later(AGAIN_S, fire)
        self._timers.add(handle)

    def _count_down(self) -> None:
        self.pending_count -= 1
        if self.pending_count == 0:
            self._idle.set()

    def close(self) -> None:
        """Give up what waits; the next start recovers it."""
        for handle in self._timers:
            handle.cancel()
        self._timers.clear()
