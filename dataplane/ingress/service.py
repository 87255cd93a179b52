"""What all connections of a worker share: deadlines, budgets, tasks, the certificate, and their common end.

Contract. `spawn` runs what must wait; an exception in it is logged and counted and touches nobody else. `drain` ends
all sessions within its deadline and loses nothing that was answered 250. Cancelling `drain` leaves the sessions as
they are, refused new ones.

    phase of a drain    idle sessions                   transactions            commits
    from the start      421 to the next command         go on                   go on
    after the grace     421 and closed                  go on                   go on
    near the deadline   -                               421 and closed          go on
    at the deadline     -                               -                       aborted: stored, not answered

While content in memory or the disk's backlog is above its mark (`strained`), a 250 is held back until that is over, at
most for `answer_delay_s`: clients that wait for it bring no more meanwhile. A drain holds none back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from dataplane.core import replies
from dataplane.core.config import NodeSettings
from dataplane.core.session_contract import Limits
from dataplane.ingress.protocol import SmtpProtocol, Timeouts
from dataplane.ingress.reading_turns import ReadingTurns
from dataplane.ingress.submission import LEAST_SPILL_BYTES, Submission
from dataplane.ingress.timers import TimerWheel
from dataplane.ingress.tls import TlsHolder

_MAX_GRACE_S = 2.0
_LOOK_AGAIN_S = 0.05


class Service:
    """One worker's sessions."""

    def __init__(self, submission: Submission, tls: TlsHolder | None, timeouts: Timeouts) -> None:
        self.submission = submission
        self.counters = submission.counters
        self.hostname = submission.hostname
        self.tls = tls
        self.timeouts = timeouts
        self.least_spill_bytes = min(LEAST_SPILL_BYTES, submission.spill_bytes)
        self.turnstile = submission.turnstile
        self.reading_turns = ReadingTurns()
        self.wheel = TimerWheel(submission.clock.monotonic)
        self.draining = False
        self._sessions: set[SmtpProtocol] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._delayed: dict[SmtpProtocol, None] = {}
        self._look: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._empty.set()
        self._limits = Limits()
        self._limits_for: NodeSettings | None = None

    # --- for sessions --------------------------------------------------------------------------------------------

    @property
    def over_budget(self) -> bool:
        """Whether more content is in memory than the worker may hold."""
        return self.counters.content_bytes > self.submission.max_content_bytes

    @property
    def spill_bytes(self) -> int:
        """Above how much a content goes to its file: less while there is more in memory than there should be."""
        submission = self.submission
        return (
            self.least_spill_bytes if self.counters.content_bytes > submission.delay_bytes else submission.spill_bytes
        )

    @property
    def strained(self) -> bool:
        """Whether answers to those who have sent should wait, so that memory and disk catch up."""
        submission = self.submission
        return (self.counters.content_bytes > submission.delay_bytes or submission.spool.strained) and not self.draining

    def delay(self, session: SmtpProtocol) -> None:
        """A session holds its 250 back; it is told when the strain is over."""
        self.counters.answers_delayed += 1
        self._delayed[session] = None
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self._look_at_strain)

    def undelay(self, session: SmtpProtocol) -> None:
        """A session holds nothing back any more."""
        self._delayed.pop(session, None)

    def _look_at_strain(self) -> None:
        self._look = None
        if not self.strained:
            for session in list(self._delayed):
                session.answer_delayed()
        if self._delayed:
            self._look = asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self._look_at_strain)

    @property
    def limits(self) -> Limits:
        """Budgets for a session that begins now."""
        settings = self.submission.config.settings
        if self._limits_for is not settings:
            self._limits = Limits(max_message_bytes=settings.max_message_bytes, max_recipients=settings.max_recipients)
            self._limits_for = settings
        return self._limits

    def opened(self, session: SmtpProtocol) -> None:
        """A session begins."""
        self._sessions.add(session)
        self._empty.clear()
        self.counters.sessions_active += 1
        self.counters.connections_accepted += 1

    def closed(self, session: SmtpProtocol) -> None:
        """A session is over."""
        self._sessions.discard(session)
        self.counters.sessions_active -= 1
        self.submission.admission.leave(session.address)
        if not self._sessions:
            self._empty.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the sessions."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self.counters.connections_failed += 1
            self.submission.log.warning("connection.failed", error=type(error).__name__, exc_info=error)

    # --- the end -------------------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """How many sessions there are."""
        return len(self._sessions)

    def close_to_mail(self) -> None:
        """The beginning of a drain that nobody waits for, and that may be taken back by `draining`."""
        self._begin_draining()
        asyncio.get_running_loop().call_later(_MAX_GRACE_S, self._end_idle)

    def _end_idle(self) -> None:
        if self.draining:
            self._end([session for session in self._sessions if session.idle])

    def _begin_draining(self) -> None:
        self.draining = True
        if self.turnstile is not None:
            self.turnstile.open()
        for session in list(self._delayed):
            session.answer_delayed()

    async def drain(self, deadline_s: float) -> None:
        """End all sessions; see the module."""
        self._begin_draining()
        grace_s = min(_MAX_GRACE_S, deadline_s / 4)
        await self._wait_empty(grace_s)
        self._end([session for session in self._sessions if session.idle])
        await self._wait_empty((deadline_s - grace_s) * 0.8)
        self._end(list(self._sessions))
        await self._wait_empty((deadline_s - grace_s) * 0.2)
        for session in list(self._sessions):
            session.abort()
        for task in list(self._tasks):
            task.cancel()
        self.wheel.stop()

    async def _wait_empty(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            return

    @staticmethod
    def _end(sessions: list[SmtpProtocol]) -> None:
        for session in sessions:
            session.end(replies.SHUTTING_DOWN)
