"""Runs the jobs in one process of the fleet at a time.

Contract. `Leader.run` tries to become the leader, then runs each job at once and again after its interval,
until it is cancelled; the lock is let go then. Before each round it asks whether the lock is held still: a
leader that was cut off stops and tries anew. A job that fails is reported and runs again at its next turn
of the loop; it stops nobody else.

    state      every `turn_s` seconds                 leaves by
    follower   acquire                                held → leader
    leader     is_held, then each job that is due     lost → follower
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import NamedTuple

from controlplane.ports_fleet import Leadership


class Job(NamedTuple):
    """Something to do every `interval`; given the time."""

    name: str
    interval: timedelta
    run: Callable[[datetime], Awaitable[None]]


class Leader:
    """See the module. `report` is told of failures, `leading` of changes."""

    def __init__(
        self,
        leadership: Leadership,
        jobs: list[Job],
        clock: Callable[[], datetime],
        *,
        turn_s: float = 5.0,
        report: Callable[[str, Exception], None] = lambda _job, _error: None,
        leading: Callable[[bool], None] = lambda _now: None,
    ) -> None:
        self._leadership = leadership
        self._jobs = jobs
        self._clock = clock
        self._turn_s = turn_s
        self._report = report
        self._leading = leading
        self._due: dict[str, datetime] = {}
        self._is_leader = False

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self.turn()
                await asyncio.sleep(self._turn_s)
        finally:
            self._set(now=False)
            await self._leadership.release()

    async def turn(self) -> None:
        """One turn of the loop."""
        if self._is_leader:
            self._set(now=await self._leadership.is_held())
        if not self._is_leader:
            self._set(now=await self._leadership.acquire())
        if self._is_leader:
            for job in self._jobs:
                await self._run_if_due(job)

    async def _run_if_due(self, job: Job) -> None:
        now = self._clock()
        if now < self._due.get(job.name, now):
            return
        try:
            await job.run(now)
            self._due[job.name] = now + job.interval
        except Exception as error:  # noqa: BLE001 - no job may stop the others; it is reported
            self._report(job.name, error)

    def _set(self, *, now: bool) -> None:
        if now != self._is_leader:
            self._is_leader = now
            self._due.clear()
            self._leading(now)
