"""How a process of the node hears what it must do, how long a drain may take, and what is said while it does.

`ProcessSignals`: the first SIGTERM or SIGINT asks for a drain, the second one for haste, and so does SIGUSR1, which the
supervisor sends because two signals of one number may arrive as one; SIGHUP asks to look at the settings again. All
three are events to wait for. `DrainPlan` divides the time of a drain. `report_held` says every 15 s what still holds a
drain up, by label. `close_behind` ends what uses the spools before it closes them. `die_with_parent` and
`watch_lifeline` end a child whose supervisor is gone, however it went: the kernel's signal where there is one, and in
any case the end of a pipe that only the supervisor holds the other end of.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, Self

from dataplane.ports import EventLog

HELD_REPORT_INTERVAL_S = 15.0
_PR_SET_PDEATHSIG = 1
_ORPHANED = 70


# Long enough for a batch to be stored and acknowledged when everything is there, short beside the drain's deadline.
_LEDGER_S = 5.0


class DrainPlan(NamedTuple):
    """Seconds from the beginning of a drain until each part must have come to its end.

    Sessions get a half at most, deliveries what is left of three quarters; then the ledger gets its turn. A worker that
    is not through by then is killed, which its spool can stand, and the agent has time to end before the node must.
    """

    sessions_s: float
    deliveries_s: float
    ledger_s: float
    workers_killed_s: float
    node_s: float

    @classmethod
    def of(cls, timeout_s: float) -> Self:
        """The plan of a drain that must be over after `timeout_s`."""
        ledger_s = 0.9 * timeout_s
        deliveries_s = ledger_s - min(_LEDGER_S, timeout_s / 5)
        return cls(0.5 * timeout_s, deliveries_s, ledger_s, 0.95 * timeout_s, timeout_s)


class ProcessSignals:
    """Signals as events of the running loop."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.hurry = asyncio.Event()
        self.reload = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received)
        loop.add_signal_handler(signal.SIGUSR1, self._hurried)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)
        # The supervisor starts us with it held back, so that none comes before there is a handler.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def _received(self) -> None:
        (self.hurry if self.drain.is_set() else self.drain).set()

    def _hurried(self) -> None:
        self.drain.set()
        self.hurry.set()


async def report_held(
    held: Callable[[], Awaitable[Mapping[str, int]]], log: EventLog, interval_s: float = HELD_REPORT_INTERVAL_S
) -> None:
    """Log what `held` counts every `interval_s`, until cancelled; labels with nothing held are left out."""
    while True:
        await asyncio.sleep(interval_s)
        counts = await held()
        log.info("drain.waiting", **{label: count for label, count in counts.items() if count})


class Closable(Protocol):
    """A spool, as far as its end goes."""

    async def close(self) -> None:
        """Write what gathered, and let go."""
        ...


async def close_behind(services: Collection[asyncio.Task[Any]], spools: Iterable[Closable]) -> None:
    """Cancel the services, wait for their ends, then close the spools: nobody asks one that is closed."""
    for service in services:
        service.cancel()
    if services:
        await asyncio.wait(services)
    for spool in spools:
        await spool.close()


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent ends; end at once if that has happened already.

    SIGKILL, because a drain would keep the ports and the spool from the node that starts in our place, and
    because the spool makes it safe. Elsewhere than on Linux the lifeline alone does it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(_ORPHANED)


def watch_lifeline(lifeline_fd: int) -> None:
    """End this process when the other end of the pipe is closed; for the running loop."""
    os.set_blocking(lifeline_fd, False)

    def readable() -> None:
        if not os.read(lifeline_fd, 1):
            os._exit(_ORPHANED)

    asyncio.get_running_loop().add_reader(lifeline_fd, readable)
