"""Composition root of a worker: `python -m dataplane worker`, started by the supervisor in the data directory.

One process, one loop: sessions, spools, delivery, and the link to the agent. It boots from last-known-good and its
spools alone; agent, control plane, PostgreSQL and Redis may all be away. What it does when told:

    SIGTERM                 takes no more connections; lets sessions, then deliveries come to an end, all within
                            `drain_timeout_s`; waits while the agent still takes records; closes the spools; exit 0
    DRAIN                   answers 421 and takes no mail, and hands over what waits, until told otherwise (`handover`)
    second SIGTERM          goes to the end of the above at once
    SIGHUP                  takes over what of the settings may change; nobody's session ends
    the spool failed        ends at once with WorkerError: the next start salvages it
    the spool is refused    marks the folder and ends; started again it sends nothing from it, and answers MAIL with 451
                            when it has no other
    the spool is known      sends what it held at the start; that waits 5 s for the control plane, which may refuse it
    the spool is accepted   sends from it at once; ends, to take mail again, when it had no other

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
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataplane.adapters.claims_redis import RedisClaims
from dataplane.adapters.config_view import MappedConfigView
from dataplane.adapters.handover_codec import decode_part, encode_given, encode_taken
from dataplane.adapters.ledger_codec import encode_record, encode_statement
from dataplane.adapters.limiter_link import Server
from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_memory import LimiterMemory
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.adapters.lkg import open_files
from dataplane.adapters.replicated_queue import LinkedQueue
from dataplane.adapters.resolver import CheckingResolver
from dataplane.adapters.spool_sqlite import SqliteSpool, read_losses
from dataplane.agent.identity import IdentityError, load_identity
from dataplane.agent.ports import StoreError
from dataplane.agent.workers import hold_worker_lock
from dataplane.agent_link import AgentLink
from dataplane.busy_time import busy_time
from dataplane.clock import SystemClock, boot_time_s
from dataplane.commands import CommandRunner, Tools
from dataplane.delivery.engine import DeliveryEngine, Surroundings
from dataplane.delivery.limits import DeliveryLimits
from dataplane.descriptors import connection_room, descriptor_limit, open_descriptors
from dataplane.forwarding import RecordForwarder
from dataplane.handover import Giver, HandoverTools, Taker
from dataplane.ingress.address_counts import AddressCounts
from dataplane.ingress.admission import Admission
from dataplane.ingress.counters import IngressCounters
from dataplane.ingress.idempotency import Submissions
from dataplane.ingress.listeners import Ingress, Mode
from dataplane.ingress.submission import Submission
from dataplane.ingress.tls import TlsHolder, server_context
from dataplane.ingress.turnstile import Turnstile
from dataplane.lifecycle import DrainPlan, ProcessSignals, close_behind, report_held
from dataplane.link import SOCKET_PATH
from dataplane.live_settings import LiveSettings, timeouts_of
from dataplane.loop_lag import LoopLag
from dataplane.ports import Claims, EventLog, Limiter, SpoolError, SpoolFailedError, SpoolFullError, SpoolLosses
from dataplane.process import EXIT_NO_SPACE, EXIT_UNAVAILABLE, Child
from dataplane.settings import Settings, SettingsError, TlsSettings
from dataplane.spool_folders import is_refused, lift_quarantine, quarantine_spool
from dataplane.telemetry import SampleRow, name_node
from dataplane.worker_side import WorkerParts, WorkerSide

# CPython's default lets a thread keep the loop waiting for 5 ms; commits and checks run in threads.
SWITCH_INTERVAL_S = 0.0005
CERTIFICATE_LOOK_S = 60.0
# How long mail of before the start waits for the control plane to know its spool. An agent has connected long before.
WORD_WAIT_S = 5.0
# Even a drain that took all its time leaves the ledger a moment.
LEAST_FLUSH_S = 0.5
# The report in the spool's quarantine, and the control plane, name more.
LOGGED_LOSSES = 100
GARBAGE_OBJECTS = 100_000


class WorkerError(Exception):
    """The worker cannot begin, or cannot go on; the text says why."""

    exit_code = EXIT_UNAVAILABLE


class NoSpaceError(WorkerError):
    """The disk does not even take what opening a spool writes."""

    exit_code = EXIT_NO_SPACE


async def run_worker(
    settings: Settings, index: int, spools: Sequence[str], listener_fds: Sequence[int], child: Child, log: EventLog
) -> None:
    """Serve until SIGTERM. WorkerError, OSError when it cannot begin or go on."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _calm_collector()
    signals = ProcessSignals()
    hold_worker_lock(index)
    async with contextlib.AsyncExitStack() as stack:
        worker = _Worker(settings, index, child, log, stack)
        await worker.open(spools)
        await worker.serve(listener_fds, signals)


class _Worker:
    """The parts of the process, from opening to the last line."""

    def __init__(
        self, settings: Settings, index: int, child: Child, log: EventLog, stack: contextlib.AsyncExitStack
    ) -> None:
        self._settings = settings
        self._index = index
        self._child = child
        self._log = log
        self._stack = stack
        self._clock = SystemClock()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._look_at_certificate = asyncio.Event()
        self._certificate_seen = (0, 0)
        self._spools: dict[str, SqliteSpool] = {}
        self._engines: dict[str, DeliveryEngine] = {}
        self._losses: dict[str, SpoolLosses] = {}
        self._resuming: set[asyncio.Task[None]] = set()
        self._words: dict[str, asyncio.Event] = {}  # of spools whose mail waits until the control plane knows them
        self._unconfirmed: set[asyncio.Task[None]] = set()
        self._ingress: Ingress | None = None
        self._halted = False
        self._counters = IngressCounters()
        self._limits: RedisLimiter | None = None
        self._queue: LinkedQueue | None = None
        self._limiter = self._make_limiter()
        self._lag = LoopLag(self._clock.monotonic)
        self._node, self._view = self._open_config()

    def _open_config(self) -> tuple[str, MappedConfigView]:
        settings = self._settings
        try:
            node = load_identity(Path()).node
            name_node(node)
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
        """Open the spools and make an engine for each; one that cannot be opened is set aside while there are others.

        WorkerError when none can be.
        """
        resolver = CheckingResolver(self._clock, [str(one) for one in self._settings.delivery.allowed_private_networks])
        limits = DeliveryLimits(self._limiter, self._view, os.urandom(8).hex(), self._log)
        self._stack.callback(limits.close)
        for name in names:
            try:
                spool = await SqliteSpool.open(
                    Path("spool") / name, self._node, self._clock, on_failed=self._spool_failed
                )
            except SpoolFullError as error:
                # Nothing is damaged: to set it aside would keep its mail from going on when space returns.
                raise NoSpaceError(str(error)) from error
            except SpoolError as error:
                if len(names) == 1:
                    raise WorkerError(str(error)) from error
                self._set_aside(name, error)
                continue
            self._spools[name] = spool
            self._tell_of_losses(name, spool)
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
            first = next(iter(self._engines.values()), None)
            self._engines[name] = DeliveryEngine(
                surroundings,
                window_bytes=self._settings.delivery.handover_bytes,
                # A provider's number of connections is this worker's, whatever number of spools it has.
                pools=first.pools if first is not None else None,
                limits=limits,
                holds=self._holds,
            )
            self._log.info("spool.opened", spool=name, incarnation=spool.identity.incarnation)
            lift_quarantine(Path("spool") / name)
        if not self._spools:
            raise WorkerError("none of this worker's spools can be opened")

    def _tell_of_losses(self, name: str, spool: SqliteSpool) -> None:
        self._losses[name] = read_losses(Path("spool") / name)
        if (report := spool.salvage) is not None:
            self._log.warning(
                "spool.salvaged",
                spool=name,
                reason=report.reason,
                kept=report.messages_kept,
                lost=len(report.lost_messages),
                lost_messages=report.lost_messages[:LOGGED_LOSSES],
                lost_records=len(report.lost_records),
                damaged_places=report.damaged_places,
                quarantine=str(report.quarantine),
            )

    def _holds(self, epoch: int) -> bool:
        return self._queue is not None and self._queue.holds(epoch)

    def _set_aside(self, name: str, error: SpoolError) -> None:
        """One damaged spool must not keep the others' mail from going on."""
        self._log.warning("spool.quarantined", spool=name, error=str(error))
        with contextlib.suppress(OSError):
            quarantine_spool(Path("spool") / name, str(error))

    def _spool_failed(self, error: SpoolFailedError) -> None:
        if not self._ended.done():
            self._ended.set_exception(WorkerError(f"the spool failed: {error}"))

    def _restart(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_exception(WorkerError(reason))

    def _close_to_mail(self, wanted: bool) -> None:  # noqa: FBT001 - the part's signature
        if self._ingress is not None:
            self._ingress.close_to_mail(wanted=wanted)
        if self._queue is not None:
            (self._queue.stop if wanted else self._queue.go_on)()

    def _deliver_from(self, name: str) -> bool:
        """Send from a spool that was refused; False when the worker has no other one and answers 451."""
        if self._halted:
            return False
        self._resume(self._engines[name].start())
        return True

    async def _begin(self, name: str) -> None:
        """Send from a spool; what it held at the start, only once the control plane has its records: it may be an old
        copy, and would send again what was sent. For a control plane that is away nobody waits long.
        """
        engine = self._engines[name]
        await engine.recover()
        if (await self._spools[name].stats()).waiting_count:
            self._words[name] = asyncio.Event()
            task = self._resume(self._begin_at_word(name))
            self._unconfirmed.add(task)
            task.add_done_callback(self._unconfirmed.discard)
        else:
            await engine.begin()

    async def _begin_at_word(self, name: str) -> None:
        try:
            async with asyncio.timeout(WORD_WAIT_S):
                await self._words[name].wait()
        except TimeoutError:
            self._log.warning("spool.unconfirmed", spool=name, waited_s=WORD_WAIT_S)
        await self._engines[name].begin()

    def _known(self, name: str) -> None:
        if (word := self._words.get(name)) is not None:
            word.set()

    def _resume(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._resuming.add(task)
        task.add_done_callback(self._resumed)
        return task

    def _resumed(self, task: asyncio.Task[None]) -> None:
        self._resuming.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._restart(f"a spool cannot be read: {error}")

    # --- serving ---------------------------------------------------------------------------------------------

    async def serve(self, listener_fds: Sequence[int], signals: ProcessSignals) -> None:
        """Serve until told to end, then drain."""
        self._stack.push_async_callback(self._limiter.close)
        memory = None
        if self._limits is not None:
            memory = LimiterMemory(Path(), self._index, self._limits, self._clock, self._log)
            memory.recall()
            await self._limits.start()
        room = connection_room(descriptor_limit(), open_descriptors())
        live = LiveSettings(self._settings, self._view, room, self._log)
        self._queue = self._replicated_queue()
        side = self._worker_side(live)
        ingress = await self._start(listener_fds, live)
        async with asyncio.TaskGroup() as group:
            services = [
                group.create_task(work)
                for work in (
                    *side.services(),
                    self._lag.run(),
                    self._watch_tls(ingress),
                    self._follow_settings(live, signals),
                    *(() if memory is None else (memory.run(),)),
                    *self._queue_services(),
                )
            ]
            failures = [self._ended, *(engine.failed for engine in self._engines.values())]
            self._child.report_ready({})
            draining = group.create_task(signals.drain.wait())
            await _first_of(draining, *failures)
            for failure in failures:
                if failure.done():
                    failure.result()
            side.begin_draining()
            if self._queue is not None:
                self._queue.stop()
            await self._drain(ingress, side, DrainPlan.of(live.settings.drain_timeout_s), signals)
            await close_behind((*services, draining), self._spools.values())
            self._log.info("drain.ended")

    def _make_limiter(self) -> Limiter:
        local = LocalLimiter(self._clock.monotonic, self._share)
        if self._settings.redis is None:
            return local
        self._limits = shared_limiter(self._settings.redis.url.get_secret_value(), local, self._limiter_changed)
        return local if self._limits is None else self._limits

    def _share(self) -> int:
        return max(1, self._view.settings.node_count) * self._settings.workers

    def _limiter_changed(self, shared: bool, reason: str) -> None:  # noqa: FBT001 - the limiter's signature
        if shared:
            self._log.info("limiter.shared")
        else:
            self._log.warning("limiter.local", reason=reason)

    async def _follow_settings(self, live: LiveSettings, signals: ProcessSignals) -> None:
        while True:
            await signals.reload.wait()
            signals.reload.clear()
            self._look_at_certificate.set()
            try:
                settings = self._child.settings()
            except SettingsError as error:
                # Replaced once more while we read: the next signal is on its way.
                self._log.info("settings.not_read", error=str(error))
            else:
                live.use(settings or live.settings)

    def _worker_side(self, live: LiveSettings) -> WorkerSide:
        parts = WorkerParts(
            index=self._index,
            view=self._view,
            spools=self._spools,
            books=self._spools,
            encode_statement=encode_statement,
            engines=self._engines,
            losses=self._losses,
            samples=self._samples,
            config_changed=live.apply,
            restart=self._restart,
            deliver_from=self._deliver_from,
            known=self._known,
            close_to_mail=self._close_to_mail,
            is_closed=lambda: self._ingress is not None and self._ingress.service.active == 0,
            log=self._log,
            queue=self._queue,
        )
        side = WorkerSide(parts)
        link = AgentLink(Path(SOCKET_PATH), side.hello, side.received, side.agent_lost, random.random, self._log)
        forwarder = RecordForwarder(self._spools, link.send, self._log)
        runner = CommandRunner(self._spools, Tools(self._engines, encode_record, self._clock, self._log))
        handover = HandoverTools(self._engines, encode_given, encode_taken, decode_part, self._log)
        giver = Giver(self._spools, handover, runner.turn, forwarder.is_served)
        side.attach(link, forwarder, runner, giver, Taker(self._spools, handover, link.send))
        if self._queue is not None:
            self._queue.attach(self._engines[self._primary()], link.send)
        return side

    def _primary(self) -> str:
        """Mail goes to the first spool that is not refused; the others deliver what they hold."""
        good = (name for name in self._spools if not is_refused(Path("spool") / name))
        return next(good, next(iter(self._spools)))

    def _replicated_queue(self) -> LinkedQueue | None:
        primary = self._primary()
        if is_refused(Path("spool") / primary):
            return None
        return LinkedQueue(self._spools[primary], self._view, encode_record, boot_time_s, self._log)

    def _queue_services(self) -> list[Coroutine[Any, Any, None]]:
        return [self._queue.keep_lease(), self._queue.claim_mail()] if self._queue is not None else []

    def _samples(self) -> Iterator[SampleRow]:
        yield from self._counters.samples()
        yield "event_loop_lag_seconds", (), self._lag.seconds.row
        if self._limits is not None:
            yield from limiter_samples(self._limits)
        if self._queue is not None:
            yield from self._queue.samples()
        for engine in self._engines.values():
            yield from engine.counters.samples()

    async def _start(self, listener_fds: Sequence[int], live: LiveSettings) -> Ingress:
        refused = {name for name in self._spools if is_refused(Path("spool") / name)}
        primary = self._primary()
        self._halted = primary in refused
        for name in self._engines:
            if name in refused:
                self._log.warning("spool.is_refused", spool=name)
            else:
                await self._begin(name)
        bounds = self._settings.ingress
        admission = Admission(bounds.connections, bounds.connections_per_address, shared=self._shared_counts())
        submission = Submission(
            config=self._view,
            spool=self._spools[primary],
            limiter=self._limiter,
            handover=self._engines[primary],
            clock=self._clock,
            log=self._log,
            admission=admission,
            counters=self._counters,
            hostname=self._settings.hostname,
            random=os.urandom,
            max_content_bytes=bounds.content_bytes,
            spill_bytes=bounds.spill_bytes,
            keyed=Submissions(self._spools[primary], self._claims(), self._counters, self._log),
            turnstile=self._turnstile(self._engines[primary]),
            delay_bytes=bounds.delay_bytes,
            replicated=self._queue,
            halted=self._halted,
        )
        ingress = Ingress(submission, self._tls(), timeouts_of(bounds))
        live.attach(admission, ingress.service)
        self._ingress = ingress
        sockets = [socket.socket(fileno=descriptor) for descriptor in listener_fds]
        modes = [Mode(listener.mode) for listener in self._settings.listeners]
        ingress.start(list(zip(sockets, modes, strict=True)))
        return ingress

    def _claims(self) -> Claims | None:
        return RedisClaims(self._limits) if self._limits is not None else None

    def _shared_counts(self) -> AddressCounts | None:
        return AddressCounts(self._child.counts_fd, self._index) if self._child.counts_fd >= 0 else None

    def _turnstile(self, engine: DeliveryEngine) -> Turnstile:
        counters, loop = engine.counters, asyncio.get_running_loop()
        turnstile = Turnstile(lambda: counters.window_messages, self._clock.monotonic, busy_time(), loop)
        engine.on_message_left = turnstile.one_left
        return turnstile

    def _tls(self) -> TlsHolder | None:
        if self._settings.tls is None:
            return None
        # Before it is read: one that is replaced meanwhile is then seen to have changed.
        self._certificate_seen = _changed_at(self._settings.tls)
        try:
            return TlsHolder(server_context(self._settings.tls.certificate_file, self._settings.tls.key_file))
        except OSError as error:
            raise WorkerError(f"the listeners' certificate cannot be used: {error}") from error

    async def _watch_tls(self, ingress: Ingress) -> None:
        """Take over a renewed certificate, at once when told to look, else within a minute; one that cannot be used is
        reported, and the old one served on.
        """
        holder, files = ingress.service.tls, self._settings.tls
        if holder is None or files is None:
            return
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CERTIFICATE_LOOK_S):
                    await self._look_at_certificate.wait()
            self._look_at_certificate.clear()
            if (now := _changed_at(files)) != self._certificate_seen:
                self._certificate_seen = now
                try:
                    holder.context = server_context(files.certificate_file, files.key_file)
                except OSError as error:
                    self._log.warning("certificate.unusable", error=str(error))
                else:
                    self._log.info("certificate.replaced")

    # --- the end ---------------------------------------------------------------------------------------------

    async def _drain(self, ingress: Ingress, side: WorkerSide, plan: DrainPlan, signals: ProcessSignals) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._log.info("drain.begun", timeout_s=plan.node_s)

        async def held() -> Mapping[str, int]:
            delivering = [engine.held() for engine in self._engines.values()]
            labels = {label for counts in delivering for label in counts}
            summed = {label: sum(counts[label] for counts in delivering) for label in labels}
            return {**ingress.held(), **summed, "records": await side.unstored()}

        reporter = loop.create_task(report_held(held, self._log))
        hurrying = loop.create_task(self._hurry(signals))
        try:
            await _unless_hurried(ingress.drain(plan.sessions_s), signals)
            for task in self._unconfirmed:
                task.cancel()
            await asyncio.gather(*self._resuming, return_exceptions=True)
            left_s = max(0.0, began + plan.deliveries_s - loop.time())
            await asyncio.gather(
                *(
                    engine.stop(0.0 if signals.hurry.is_set() else left_s)
                    for name, engine in self._engines.items()
                    if not is_refused(Path("spool") / name)
                )
            )
            await _unless_hurried(side.flush(max(LEAST_FLUSH_S, began + plan.ledger_s - loop.time())), signals)
        finally:
            reporter.cancel()
            hurrying.cancel()

    async def _hurry(self, signals: ProcessSignals) -> None:
        await signals.hurry.wait()
        for engine in self._engines.values():
            engine.hurry()


def _calm_collector() -> None:
    """Look for cycles seldom: the default looks at every message in flight many times (14 % of the CPU under load).

    What counting references does not free is a few objects a connection; that many pile up in one generation at most.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, 20, 20)


def shared_limiter(url: str, local: LocalLimiter, on_change: Callable[[bool, str], None]) -> RedisLimiter | None:
    """Return the limiter in Redis; None, of which `on_change` hears, when it cannot be made: mail goes on by shares."""
    try:
        # What a URL asks for is looked at by its connections only.
        Server(url).connection(None)
        return RedisLimiter(url, local, on_change=on_change)
    except Exception as error:  # noqa: BLE001 - whatever redis-py finds wrong with a URL; its text may quote a password
        on_change(False, f"redis.url cannot be used: {type(error).__name__}")
        return None


def limiter_samples(limiter: RedisLimiter) -> Iterator[SampleRow]:
    """What the shared limiter counts, under the names of the metrics."""
    counters = limiter.counters
    yield "limiter_decisions_total", ("shared",), counters.shared
    yield "limiter_decisions_total", ("local",), counters.local
    yield "limiter_over_admission_total", (), counters.local_granted
    yield "limiter_trips_total", (), counters.trips
    yield "limiter_lost_total", (), counters.lost
    yield "limiter_shared", (), int(limiter.shared)
    yield "limiter_call_duration_seconds", (), counters.call_seconds.row


async def _unless_hurried(phase: Awaitable[None], signals: ProcessSignals) -> None:
    """Run a phase of the drain to its end, or until haste is asked for."""
    work = asyncio.ensure_future(phase)
    hurry = asyncio.ensure_future(signals.hurry.wait())
    await asyncio.wait({work, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not work.done():
        work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work


async def _first_of(*waited: asyncio.Future[Any]) -> None:
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)


def _changed_at(files: TlsSettings) -> tuple[int, int]:
    """When certificate and key were written: who renews them writes one after the other."""
    return _written_at(files.certificate_file), _written_at(files.key_file)


def _written_at(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
