"""The agent's end of the link: which workers are there, and messages to and from them.

`WorkerHub` listens on the Unix socket, keeps the `WorkerTable` and tells one observer what happened. A worker that
says something out of turn or that cannot be read is disconnected; it comes back by itself. A worker's process is known
to be gone when the lock file that it holds for as long as it lives can be locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from dataplane.agent.applied import WorkerTable
from dataplane.agent.totals import WorkerTotals
from dataplane.link import (
    UNASKED,
    ConfigApplied,
    DenialsApplied,
    LedgerRecords,
    LedgerStatement,
    LedgerTake,
    LinkError,
    LinkProtocol,
    Message,
    QueueCall,
    SpoolState,
    StatusRequest,
    WorkerHello,
    WorkerStatus,
)
from dataplane.ports import EventLog

STATUS_TIMEOUT_S = 2.0


class WorkerObserver(Protocol):
    """Who is told; called on the loop, must not raise for what a worker may send."""

    def worker_connected(self, hello: WorkerHello) -> None:
        """A worker said Hello; the table knows it."""
        ...

    def worker_lost(self, index: int, spools: Iterable[str]) -> None:
        """A worker's connection ended."""
        ...

    def workers_changed(self) -> None:
        """What workers have in use changed, or one is known to be gone."""
        ...

    def records_arrived(self, records: LedgerRecords) -> None:
        """A worker answered a pull."""
        ...

    def statement_arrived(self, statement: LedgerStatement) -> None:
        """A worker answered a question."""
        ...

    def queue_called(self, index: int, call: QueueCall) -> None:
        """A worker asks the replicated queue."""
        ...

    def take_asked(self, take: LedgerTake) -> None:
        """A worker's spool takes mail over."""
        ...

    def status_changed(self) -> None:
        """A worker told how it is without being asked."""
        ...


class WorkerHub:
    """See the module."""

    def __init__(self, socket_path: Path, table: WorkerTable, log: EventLog) -> None:
        self._socket_path = socket_path
        self._table = table
        self._log = log
        self._observer: WorkerObserver
        self._links: dict[int, LinkProtocol] = {}
        self._indexes: dict[LinkProtocol, int] = {}
        self._spools: dict[str, tuple[int, SpoolState]] = {}
        self._statuses: dict[int, WorkerStatus] = {}
        self.totals = WorkerTotals()
        self.late_count = 0
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[set[int], asyncio.Future[None]]] = {}
        self._server: asyncio.AbstractServer | None = None

    async def start(self, observer: WorkerObserver) -> None:
        """Listen; an old socket file in the way is replaced, since the node's lock says that nobody else uses it."""
        self._observer = observer
        with contextlib.suppress(FileNotFoundError):
            self._socket_path.unlink()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: LinkProtocol(self._received, self._lost), str(self._socket_path)
        )
        self._socket_path.chmod(0o600)

    async def stop(self) -> None:
        """Close every connection and the socket."""
        if self._server is not None:
            self._server.close()
            for protocol in list(self._indexes):
                protocol.close()
            self._server = None

    # --- sending ---------------------------------------------------------------------------------------------

    def send(self, index: int, message: Message) -> bool:
        """Send to one worker; False when it is not connected."""
        protocol = self._links.get(index)
        return protocol is not None and protocol.send(message)

    def send_to_owner(self, spool: str, message: Message) -> bool:
        """Send to the worker that has the spool open; False when none has."""
        owner = self._spools.get(spool)
        return owner is not None and self.send(owner[0], message)

    def broadcast(self, message: Message) -> None:
        """Send to every worker that is connected."""
        for protocol in self._links.values():
            protocol.send(message)

    def note_accepted(self, spool: str) -> None:
        """Its worker was told to send from the spool: what it said before is not to be said again."""
        if (owner := self._spools.get(spool)) is not None:
            self._spools[spool] = (owner[0], owner[1]._replace(refused=False))

    @property
    def spools(self) -> list[SpoolState]:
        """Every spool that was reported since the agent began, as last reported."""
        return [state for _, state in self._spools.values()]

    def is_open(self, spool: str) -> bool:
        """Whether a connected worker has the spool open."""
        return spool in self._spools and self._spools[spool][0] in self._links

    async def collect_status(self) -> list[WorkerStatus]:
        """What each connected worker says now, or said last when it does not answer within two seconds."""
        if self._links:
            number = next(self._numbers)
            answered = asyncio.get_running_loop().create_future()
            self._waiting[number] = (set(self._links), answered)
            self.broadcast(StatusRequest(number))
            try:
                async with asyncio.timeout(STATUS_TIMEOUT_S):
                    await answered
            except TimeoutError:
                self.late_count = len(self._waiting[number][0])
                self._log.info("worker.status_late", workers=sorted(self._waiting[number][0]))
            else:
                self.late_count = 0
            finally:
                del self._waiting[number]
        return [status for index, status in self._statuses.items() if index in self._links]

    @property
    def draining(self) -> bool:
        """Whether no worker takes mail because they were told to end, or the node to drain; one alone is renewed."""
        said = [self._statuses.get(index) for index in self._links]
        return bool(said) and all(status is not None and status.draining for status in said)

    # --- what is known of processes ----------------------------------------------------------------------------

    def look_for_absent(self) -> None:
        """Find out which of the workers that nothing is known of have no process."""
        found = [index for index in self._table.unknown if not _is_locked(worker_lock_path(index))]
        for index in found:
            self._table.absent(index)
        if found:
            self._observer.workers_changed()

    # --- receiving -------------------------------------------------------------------------------------------

    def _received(self, protocol: LinkProtocol, message: Message) -> None:
        if isinstance(message, WorkerHello):
            self._hello(protocol, message)
            return
        index = self._indexes.get(protocol)
        if index is None:
            raise LinkError("a worker spoke before its Hello")
        match message:
            case ConfigApplied():
                self._table.config_applied(index, message.digest, message.error)
                self._observer.workers_changed()
            case DenialsApplied():
                self._table.denials_applied(index, message.version, message.error)
                self._observer.workers_changed()
            case LedgerRecords():
                self._observer.records_arrived(message)
            case LedgerStatement():
                self._observer.statement_arrived(message)
            case QueueCall():
                self._observer.queue_called(index, message)
            case LedgerTake():
                self._observer.take_asked(message)
            case WorkerStatus():
                self._status(index, message)
            case _:
                raise LinkError(f"a worker sent {type(message).__name__}")

    def _hello(self, protocol: LinkProtocol, hello: WorkerHello) -> None:
        if protocol in self._indexes:
            raise LinkError("a second Hello")
        former = self._links.get(hello.worker)
        if former is not None:
            self._forget(former)
            former.abort()
        self._links[hello.worker] = protocol
        # What its former process said of itself is not true of this one.
        self._statuses.pop(hello.worker, None)
        self._indexes[protocol] = hello.worker
        self.totals.began(hello.worker, hello.pid)
        for state in hello.spools:
            self._spools[state.spool] = (hello.worker, state)
        halted = bool(hello.spools) and all(state.refused for state in hello.spools)
        self._table.connected(hello.worker, hello.config_digest, hello.denials_version, halted=halted)
        self._log.info("worker.connected", worker=hello.worker, pid=hello.pid)
        self._observer.worker_connected(hello)
        self._observer.workers_changed()

    def _status(self, index: int, status: WorkerStatus) -> None:
        self._statuses[index] = status
        self.totals.told(index, status.samples)
        for state in status.spools:
            self._spools[state.spool] = (index, state)
        if status.number == UNASKED:
            self._observer.status_changed()
        if status.number in self._waiting:
            missing, answered = self._waiting[status.number]
            missing.discard(index)
            if not missing and not answered.done():
                answered.set_result(None)

    def _lost(self, protocol: LinkProtocol, error: Exception | None) -> None:
        index = self._forget(protocol)
        if index is not None:
            self._log.info("worker.disconnected", worker=index, error=str(error) if error else "")

    def _forget(self, protocol: LinkProtocol) -> int | None:
        index = self._indexes.pop(protocol, None)
        if index is None or self._links.get(index) is not protocol:
            return None
        del self._links[index]
        self._table.lost(index)
        self.totals.lost(index)
        for missing, answered in self._waiting.values():
            missing.discard(index)
            if not missing and not answered.done():
                answered.set_result(None)
        if self._observer is not None:
            self._observer.worker_lost(index, [spool for spool, (owner, _) in self._spools.items() if owner == index])
        return index


def worker_lock_path(index: int) -> Path:
    """The file that worker `index` holds locked while it lives, relative to the data directory."""
    return Path("run") / f"worker-{index}.lock"


def hold_worker_lock(index: int) -> int:
    """Lock the file of worker `index` for as long as the process lives; waits for a former one to be gone."""
    descriptor = os.open(worker_lock_path(index), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
