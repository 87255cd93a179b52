"""The one thread that runs COMMIT and checkpoints, so that the loop never waits for the disk.

Inputs are jobs from the loop, one at a time; the output is a call on the loop's thread when the job is over, with
apsw's error or None. Until then the loop must not touch the writing connection. Nothing is retried here.

Both threads share one interpreter lock, and a busy loop can starve the other thread for hundreds of milliseconds: it
gives the lock up at each poll of its sockets and takes it back before the other one has woken, and each such gift also
restarts the interval after which it would have to hand it over (measured: 350 ms a commit beside turns of 100 µs). So
the loop waits, for microseconds, where the thread needs the lock: when it sets out, and, should it not be back after a
millisecond, at growing intervals until it is. An idle loop sleeps in its poll, and pays neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

import apsw

from dataplane.failpoints import failpoint

Done = Callable[[apsw.Error | None], None]

# How long the loop stands still at most: for a thread to wake on another core, and no longer than a callback may take.
_SET_OUT_S = 0.001
_MEET_S = 0.0002
_FIRST_MEETING_S = 0.001
_LAST_MEETING_S = 0.016


class Committer:
    """Runs one job at a time. Make it on the loop's thread; `stop` ends the thread."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[tuple[Callable[[], None], Done] | None] = SimpleQueue()
        self._set_out: SimpleQueue[None] = SimpleQueue()
        self._back: SimpleQueue[None] = SimpleQueue()
        self._meeting: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._run, name="spool-commit", daemon=True)
        self._thread.start()

    def commit(self, done: Done) -> None:
        """Commit the open transaction."""
        self._start(self._commit, done)

    def checkpoint(self, done: Done) -> None:
        """Move what no reader needs any more from the WAL to the file. A lock held by others is no error."""
        self._start(self._checkpoint, done)

    def stop(self) -> None:
        """End the thread after what it has to do; waits for it."""
        self._jobs.put(None)
        self._thread.join()
        if self._meeting:
            self._meeting.cancel()

    def _start(self, work: Callable[[], None], done: Done) -> None:
        self._jobs.put((work, done))
        with contextlib.suppress(Empty):
            self._set_out.get(timeout=_SET_OUT_S)
        self._meeting = self._loop.call_later(_FIRST_MEETING_S, self._meet, 2 * _FIRST_MEETING_S)

    def _meet(self, next_s: float) -> None:
        """Stand still for a moment, so that a thread that waits for the lock can come back."""
        try:
            self._back.get(timeout=_MEET_S)
        except Empty:
            self._meeting = self._loop.call_later(next_s, self._meet, min(2 * next_s, _LAST_MEETING_S))
        else:
            self._back.put(None)

    def _finish(self, done: Done, error: apsw.Error | None) -> None:
        if self._meeting:
            self._meeting.cancel()
        self._back.get()
        done(error)

    # --- in the thread ---

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, done = job
            self._set_out.put(None)
            error: apsw.Error | None = None
            try:
                work()
            except apsw.Error as raised:
                error = raised
            # A loop that is closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._finish, done, error)
            self._back.put(None)

    def _commit(self) -> None:
        self._connection.execute("COMMIT")
        failpoint("spool.committed")

    def _checkpoint(self) -> None:
        with contextlib.suppress(apsw.BusyError):
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
