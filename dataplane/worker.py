"""Composition root of a worker: `python -m dataplane worker`, started by the supervisor in the data directory.

One process, one loop: sessions, spools, delivery, and the link to the agent. It boots from last-known-good and its
spools alone; agent, control plane, PostgreSQL and Redis may all be away. What it does when told:

    SIGTERM                 takes no more connections; lets sessions, then deliveries come to an end, all within
                            `drain_timeout_s`; waits while the agent still takes records; closes the spools; exit 0
    second SIGTERM          goes to the end of the above at once
    the spool failed        ends at once with WorkerError: the next start salvages it
    the spool is refused    marks the folder and ends; started again it sends nothing and answers MAIL with 451, until
                            the control plane accepts the spool, which ends it once more

It may be killed at any time: what was answered 250 is in the spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import sys
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dataplane.adapters.config_view import MappedConfigView
from dataplane.adapters.ledger_codec import encode_record
from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.adapters.lkg import open_files
from dataplane.adapters.resolver import CheckingResolver
from dataplane.adapters.spool_sqlite import SqliteSpool
from dataplane.agent.identity import IdentityError, load_identity
from dataplane.agent.ports import StoreError
from dataplane.agent.workers import hold_worker_lock
from dataplane.agent_link import AgentLink
from dataplane.clock import SystemClock
from dataplane.commands import CommandRunner
from dataplane.delivery.engine import DeliveryEngine, Surroundings
from dataplane.forwarding import RecordForwarder
from dataplane.ingress.admission import Admission
from dataplane.ingress.counters import IngressCounters
from dataplane.ingress.listeners import Ingress, Mode
from dataplane.ingress.protocol import Timeouts
from dataplane.ingress.submission import Submission
from dataplane.ingress.tls import TlsHolder, server_context
from dataplane.lifecycle import StopSignals, report_held
from dataplane.link import SOCKET_PATH
from dataplane.loop_lag import LoopLag
from dataplane.ports import EventLog, Limiter, SpoolError, SpoolFailedError
from dataplane.process import Child
from dataplane.settings import IngressSettings, Settings
from dataplane.spool_folders import is_refused
from dataplane.telemetry import SampleRow
from dataplane.worker_side import WorkerParts, WorkerSide

# Long enough for a batch to be stored and acknowledged when everything is there, short beside the drain's deadline.
LEDGER_FLUSH_S = 5.0
# Of the drain's time, what sessions get; deliveries get what is left.
SESSIONS_SHARE = 0.5
# CPython's default lets a thread keep the loop waiting for 5 ms; commits and checks run in threads.
SWITCH_INTERVAL_S = 0.0005
CERTIFICATE_LOOK_S = 60.0
GARBAGE_OBJECTS = 100_000


class WorkerError(Exception):
    """The worker cannot begin, or cannot go on; the text says why."""


async def run_worker(
    settings: Settings, index: int, spools: Sequence[str], listener_fds: Sequence[int], child: Child, log: EventLog
) -> None:
    """Serve until SIGTERM. WorkerError, OSError when it cannot begin or go on."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _calm_collector()
    stop = StopSignals()
    hold_worker_lock(index)
    async with contextlib.AsyncExitStack() as stack:
        worker = _Worker(settings, index, log, stack)
        await worker.open(spools)
        await worker.serve(listener_fds, child, stop)


class _Worker:
    """The parts of the process, from opening to the last line."""

    def __init__(self, settings: Settings, index: int, log: EventLog, stack: contextlib.AsyncExitStack) -> None:
        self._settings = settings
        self._index = index
        self._log = log
        self._stack = stack
        self._clock = SystemClock()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._spools: dict[str, SqliteSpool] = {}
        self._engines: dict[str, DeliveryEngine] = {}
        self._counters = IngressCounters()
        self._lag = LoopLag(self._clock.monotonic)
        self._node, self._view = self._open_config()

    def _open_config(self) -> tuple[str, MappedConfigView]:
        settings = self._settings
        try:
            node = load_identity(Path()).node
            key_text = settings.seal_key.get_secret_value() if settings.seal_key else None
            files = open_files(Path(), settings.seal_key_file, key_text, node, self._clock)
            view = MappedConfigView(files, self._clock, settings.config_max_age_s)
            # Without the denials nothing may be sent, and without configuration nothing can be.
            view.load_denials()
        except (IdentityError, StoreError) as error:
            raise WorkerError(str(error)) from error
        try:
            view.load()
            view.load_contact()
        except StoreError as error:
            self._log.warning("config.unreadable", error=str(error))
        self._log.info("config.loaded", digest=view.digest[:16], bundles=view.bundle_count, stale=view.stale)
        return node, view

    async def open(self, names: Sequence[str]) -> None:
        """Open the spools and make an engine for each; WorkerError."""
        resolver = CheckingResolver(self._clock, [str(one) for one in self._settings.delivery.allowed_private_networks])
        for name in names:
            try:
                spool = await SqliteSpool.open(
                    Path("spool") / name, self._node, self._clock, on_failed=self._spool_failed
                )
            except SpoolError as error:
                raise WorkerError(str(error)) from error
            self._spools[name] = spool
            surroundings = Surroundings(
                spool,
                self._view,
                resolver,
                encode_record,
                self._clock,
                random.random,
                self._log,
                self._settings.hostname,
            )
            self._engines[name] = DeliveryEngine(surroundings, window_bytes=self._settings.delivery.handover_bytes)
            self._log.info("spool.opened", spool=name, incarnation=spool.identity.incarnation)

    def _spool_failed(self, error: SpoolFailedError) -> None:
        if not self._ended.done():
            self._ended.set_exception(WorkerError(f"the spool failed: {error}"))

    def _restart(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_exception(WorkerError(reason))

    # --- serving ---------------------------------------------------------------------------------------------

    async def serve(self, listener_fds: Sequence[int], child: Child, stop: StopSignals) -> None:
        """Serve until told to end, then drain."""
        limiter = await self._limiter()
        self._stack.push_async_callback(limiter.close)
        side = self._worker_side()
        ingress = await self._start(limiter, listener_fds)
        async with asyncio.TaskGroup() as group:
            services = [
                group.create_task(work) for work in (*side.services(), self._lag.run(), self._watch_tls(ingress))
            ]
            failures = [self._ended, *(engine.failed for engine in self._engines.values())]
            child.report_ready({})
            draining = group.create_task(stop.drain.wait())
            await _first_of(draining, *failures)
            for failure in failures:
                if failure.done():
                    failure.result()
            side.draining = True
            await self._drain(ingress, side, stop)
            for service in (*services, draining):
                service.cancel()

    async def _limiter(self) -> Limiter:
        local = LocalLimiter(self._clock.monotonic, self._share)
        if self._settings.redis is None:
            return local
        limiter = RedisLimiter(self._settings.redis.url.get_secret_value(), local, on_change=self._limiter_changed)
        await limiter.start()
        return limiter

    def _share(self) -> int:
        return max(1, self._view.settings.node_count) * self._settings.workers

    def _limiter_changed(self, shared: bool, reason: str) -> None:  # noqa: FBT001 - the limiter's signature
        if shared:
            self._log.info("limiter.shared")
        else:
            self._log.warning("limiter.local", reason=reason)

    def _worker_side(self) -> WorkerSide:
        parts = WorkerParts(
            index=self._index,
            view=self._view,
            spools=self._spools,
            engines=self._engines,
            samples=self._samples,
            restart=self._restart,
            log=self._log,
        )
        side = WorkerSide(parts)
        link = AgentLink(Path(SOCKET_PATH), side.hello, side.received, side.agent_lost, random.random, self._log)
        forwarder = RecordForwarder(self._spools, link.send, self._log)
        runner = CommandRunner(
            self._spools, encode_record, self._clock, self._log, lambda spool, key: self._engines[spool].wake(key)
        )
        side.attach(link, forwarder, runner)
        return side

    def _samples(self) -> Iterator[SampleRow]:
        yield from self._counters.samples()
        yield "event_loop_lag_seconds", (), self._lag.seconds.row
        for engine in self._engines.values():
            yield from engine.counters.samples()

    async def _start(self, limiter: Limiter, listener_fds: Sequence[int]) -> Ingress:
        primary = next(iter(self._spools))
        for name, engine in self._engines.items():
            if is_refused(Path("spool") / name):
                self._log.warning("spool.is_refused", spool=name)
                self._view.halted = self._view.halted or name == primary
            else:
                await engine.start()
        bounds = self._settings.ingress
        submission = Submission(
            config=self._view,
            spool=self._spools[primary],
            limiter=limiter,
            handover=self._engines[primary],
            clock=self._clock,
            log=self._log,
            admission=Admission(bounds.connections, bounds.connections_per_address),
            counters=self._counters,
            hostname=self._settings.hostname,
            random=os.urandom,
            max_content_bytes=bounds.content_bytes,
            spill_bytes=bounds.spill_bytes,
        )
        ingress = Ingress(submission, self._tls(), _timeouts(bounds))
        sockets = [socket.socket(fileno=descriptor) for descriptor in listener_fds]
        modes = [Mode(listener.mode) for listener in self._settings.listeners]
        ingress.start(list(zip(sockets, modes, strict=True)))
        return ingress

    def _tls(self) -> TlsHolder | None:
        if self._settings.tls is None:
            return None
        try:
            return TlsHolder(server_context(self._settings.tls.certificate_file, self._settings.tls.key_file))
        except OSError as error:
            raise WorkerError(f"the listeners' certificate cannot be used: {error}") from error

    async def _watch_tls(self, ingress: Ingress) -> None:
        """Take over a renewed certificate; one that cannot be used is reported, and the old one served on."""
        holder, files = ingress.service.tls, self._settings.tls
        if holder is None or files is None:
            return
        seen = _changed_at(files.certificate_file)
        while True:
            await asyncio.sleep(CERTIFICATE_LOOK_S)
            if (now := _changed_at(files.certificate_file)) != seen:
                seen = now
                try:
                    holder.context = server_context(files.certificate_file, files.key_file)
                except OSError as error:
                    self._log.warning("certificate.unusable", error=str(error))
                else:
                    self._log.info("certificate.replaced")

    # --- the end ---------------------------------------------------------------------------------------------

    async def _drain(self, ingress: Ingress, side: WorkerSide, stop: StopSignals) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.drain_timeout_s
        self._log.info("drain.begun", timeout_s=self._settings.drain_timeout_s)

        def held() -> dict[str, int]:
            delivering = [engine.held() for engine in self._engines.values()]
            labels = {label for counts in delivering for label in counts}
            return {**ingress.held(), **{label: sum(counts[label] for counts in delivering) for label in labels}}

        reporter = loop.create_task(report_held(held, self._log))
        try:
            await _unless_hurried(ingress.drain(self._settings.drain_timeout_s * SESSIONS_SHARE), stop)
            left_s = max(0.0, deadline - loop.time() - LEDGER_FLUSH_S)
            await asyncio.gather(
                *(
                    engine.stop(0.0 if stop.hurry.is_set() else left_s)
                    for name, engine in self._engines.items()
                    if not is_refused(Path("spool") / name)
                )
            )
            await _unless_hurried(side.flush(min(LEDGER_FLUSH_S, max(0.5, deadline - loop.time()))), stop)
        finally:
            reporter.cancel()
        for spool in self._spools.values():
            await spool.close()
        self._log.info("drain.ended")


def _calm_collector() -> None:
    """Look for cycles seldom: the default looks at every message in flight many times (14 % of the CPU under load).

    What counting references does not free is a few objects a connection; that many pile up in one generation at most.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, 20, 20)


async def _unless_hurried(phase: Awaitable[None], stop: StopSignals) -> None:
    """Run a phase of the drain to its end, or until haste is asked for."""
    work = asyncio.ensure_future(phase)
    hurry = asyncio.ensure_future(stop.hurry.wait())
    await asyncio.wait({work, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not work.done():
        work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work


async def _first_of(*waited: asyncio.Future[Any]) -> None:
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)


def _timeouts(bounds: IngressSettings) -> Timeouts:
    return Timeouts(
        command_s=bounds.command_timeout_s,
        command_before_auth_s=bounds.command_before_auth_timeout_s,
        handshake_s=bounds.handshake_timeout_s,
        commit_s=bounds.commit_timeout_s,
        data_bytes_per_s=bounds.data_bytes_per_s,
    )


def _changed_at(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
