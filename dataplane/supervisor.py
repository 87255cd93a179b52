"""The first process of a node: opens the listening sockets, starts the others, keeps them running, ends them in order.

It knows neither gRPC nor mail, so that nothing in those can take it down. Inputs are the settings; outputs are the
processes, `run/ready.json` (rewritten whenever a process comes or goes) and lines on standard output: `node.ready`
whenever every process has come to serve, `node.reloaded` after a SIGHUP, `node.draining` when it begins to end. It ends
with

    0   drained
    1   a child could not be drained in time and was killed
    69  a port is taken: nothing was started

What each child is given: the settings in force, its listening sockets, a lifeline (a pipe that ends when we end) and a
pipe to say that it is ready. A child that ends is started again after a wait that doubles from 0.1 s to 10 s. A worker
that ended three times within 30 s of its start has its spools quarantined and is left out, unless it is the only one;
who waits in its listening sockets is answered 421, and the sockets are closed so that nobody new falls to them. A full
disk, or a system out of processes or descriptors, ends nothing that runs: what could not be written or started is tried
again, and a worker that finds its spool's disk full is not left out for it.

    SIGHUP           reads the settings again and takes over what may change; a file that cannot be used is reported;
                     spools that were attached are given to the worker that has fewest, which drains and is started anew
    SIGTERM, SIGINT  asks the workers to drain, then the agent to end, so that the ledger gets out; all within
                     `drain_timeout_s`
    a second one     makes them hurry
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from dataplane.core import replies
from dataplane.cores import available_cores
from dataplane.descriptors import raise_descriptor_limit
from dataplane.event_log import LEVELS
from dataplane.ingress.address_counts import AddressCounts
from dataplane.lifecycle import HELD_REPORT_INTERVAL_S, DrainPlan
from dataplane.listening_sockets import answer_waiting, bind_listeners, turn_away
from dataplane.ports import EventLog
from dataplane.process import EXIT_NO_SPACE
from dataplane.restarts import Restarts
from dataplane.settings import Settings, SettingsError, load_settings
from dataplane.settings_handover import HandedSettings, anonymous_file, take_over
from dataplane.spool_folders import assign_spools, lift_quarantines, quarantine_spool, spool_names
from dataplane.telemetry import set_log_level

EXIT_UNDRAINED = 1

READY_FILE = Path("run") / "ready.json"
MAX_WORKERS = 256
# After this what the system refused is tried again: a process, a line on a full disk.
AGAIN_S = 1.0
# A start that finds the disk full costs a second of work.
NO_SPACE_WAIT_S = 5.0
# What the agent gets to end in any case: it only closes streams.
AGENT_STOP_S = 1.0


@dataclass(slots=True)
class Child:
    """A process to keep running: `name` is `agent` or `worker-N`; sockets and spools are a worker's. One that is
    `renewed` was asked to end, to be started again with other arguments.
    """

    name: str
    arguments: list[str]
    sockets: list[socket.socket] = field(default_factory=list)
    spools: list[str] = field(default_factory=list)
    restarts: Restarts = field(default_factory=Restarts)
    process: subprocess.Popen[bytes] | None = None
    ready_pipe: BinaryIO | None = None
    ready: dict[str, object] | None = None
    heard: bytes = b""
    started_at: float = 0.0
    start_due: float | None = 0.0
    given_up: bool = False
    renewed: bool = False


class Supervisor:
    """See the module. The current directory must be the data directory, and locked.

    `config_file` and `folder` are what the settings were read with: they are read so again.
    """

    def __init__(self, settings: Settings, folder: Path, config_file: Path | None, log: EventLog) -> None:
        self._settings = _effective(settings)
        self._folder = folder
        self._config_file = config_file
        self._log = log
        self._handed = HandedSettings(self._settings)
        self._counts_descriptor = anonymous_file("postroad-address-counts")
        self._counts = AddressCounts.create(self._counts_descriptor, self._settings.workers)
        self._reload_requested = False
        self._selector = selectors.DefaultSelector()
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._stop_requests = 0
        self._announced = False
        self._unpublished = False
        self._agent = Child("agent", ["agent", "--workers", "0"])
        self._workers: list[Child] = []
        self._ports: list[int] = []

    def run(self) -> int:
        """Start everything, keep it running until SIGTERM, end it; returns the exit code. PortTakenError and OSError
        before a start.
        """
        raise_descriptor_limit(self._log)
        spools = assign_spools(Path("spool"), self._settings.workers)
        for names in spools:
            for name in names[1:]:
                self._log.info("spool.delivers_only", spool=name, reason="there are more spools than workers")
        for folder in lift_quarantines(Path("spool")):
            self._log.info("spool.quarantine_lifted", spool=folder)
        sockets = bind_listeners(self._settings.listeners, len(spools))
        self._ports = [bound.getsockname()[1] for bound in sockets[0]]
        self._workers = [
            Child(f"worker-{index}", _worker_arguments(index, names), bound, names)
            for index, (names, bound) in enumerate(zip(spools, sockets, strict=True))
        ]
        self._agent.arguments = ["agent", "--workers", str(len(spools))]
        with self._signals():
            self._serve()
            return self._stop()

    # --- serving ---------------------------------------------------------------------------------------------

    @property
    def _children(self) -> list[Child]:
        return [self._agent, *self._workers]

    def _serve(self) -> None:
        while not self._stop_requests:
            now = time.monotonic()
            for child in self._children:
                if child.process is None and child.start_due is not None and child.start_due <= now:
                    self._try_to_start(child)
            self._wait(self._until_next_look(now))
            self._reap(restart=True)
            if self._reload_requested:
                self._reload()
            if self._unpublished:
                self._write_ready()

    def _reload(self) -> None:
        """Read the settings again; what may change is handed to every process, what cannot be used changes nothing."""
        self._reload_requested = False
        self._take_attached()
        try:
            read = _effective(load_settings(self._config_file, self._folder))
            taken = take_over(self._settings, read)
            self._handed.put(taken.settings)
        except (SettingsError, OSError) as error:
            self._log.warning("settings.not_reloaded", error=str(error))
            _say({"event": "node.reloaded", "ok": False})
            return
        # At the more talkative of both levels, so that a change of the level does not hide that it was made.
        set_log_level(min(self._settings.log_level, taken.settings.log_level, key=LEVELS.__getitem__))
        self._log.info("settings.reloaded", changed=taken.changed)
        set_log_level(taken.settings.log_level)
        self._settings = taken.settings
        if taken.kept:
            self._log.warning("settings.need_restart", settings=taken.kept)
        self._signal(self._children, signal.SIGHUP)
        _say({"event": "node.reloaded", "ok": True})

    def _take_attached(self) -> None:
        """Give spools that came since the start to the workers that have fewest; those end in order and begin anew."""
        known = {spool for worker in self._workers for spool in worker.spools}
        try:
            attached = sorted(set(spool_names(Path("spool"))) - known)
        except OSError as error:
            self._log.warning("spool.not_looked_for", error=str(error))
            return
        for spool in attached:
            worker = min((one for one in self._workers if not one.given_up), key=lambda one: len(one.spools))
            worker.spools.append(spool)
            worker.arguments = _worker_arguments(self._workers.index(worker), worker.spools)
            self._log.info("spool.attached", spool=spool, name=worker.name)
            if worker.process is not None and not worker.renewed:
                worker.renewed = True
                self._signal([worker], signal.SIGTERM)

    def _until_next_look(self, now: float) -> float | None:
        due = [child.start_due for child in self._children if child.process is None and child.start_due is not None]
        if self._unpublished:
            due.append(now + AGAIN_S)
        return max(0.0, min(due) - now) if due else None

    def _try_to_start(self, child: Child) -> None:
        """Start it, or try again soon: what runs must not end because processes or descriptors ran out."""
        try:
            self._start(child)
        except OSError as error:
            self._log.warning("process.not_started", name=child.name, error=str(error))
            child.start_due = time.monotonic() + AGAIN_S

    def _start(self, child: Child) -> None:
        ready_read, ready_write = os.pipe()
        settings = self._handed.descriptor
        inherited = [self._lifeline_read, ready_write, settings, *(bound.fileno() for bound in child.sockets)]
        command = [sys.executable, "-m", "dataplane", *child.arguments, "--settings-fd", str(settings)]
        command += ["--lifeline-fd", str(self._lifeline_read), "--ready-fd", str(ready_write)]
        command += ["--parent-pid", str(os.getpid())]
        if child.sockets:
            command += ["--listener-fds", ",".join(str(bound.fileno()) for bound in child.sockets)]
            command += ["--counts-fd", str(self._counts_descriptor)]
            inherited.append(self._counts_descriptor)
        # Held back in the child, too, until it has a handler: a SIGHUP that came sooner would end it.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        # A process group of its own: Ctrl-C in a terminal is ours to turn into an orderly drain.
        try:
            child.process = subprocess.Popen(
                command, cwd=self._folder, pass_fds=inherited, process_group=0, stdin=subprocess.DEVNULL
            )
        except OSError:
            os.close(ready_read)
            raise
        finally:
            os.close(ready_write)
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        child.ready_pipe = os.fdopen(ready_read, "rb", buffering=0)
        child.ready, child.heard = None, b""
        child.started_at = time.monotonic()
        self._selector.register(child.ready_pipe, selectors.EVENT_READ, child)
        self._log.info("process.started", name=child.name, pid=child.process.pid)

    def _wait(self, timeout_s: float | None) -> None:
        """Sleep until a signal, something said by a child, or the timeout."""
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, Child):
                self._hear(key.data)
            else:
                with contextlib.suppress(BlockingIOError):
                    os.read(key.fd, 4096)

    def _hear(self, child: Child) -> None:
        pipe = child.ready_pipe
        if pipe is None:
            return
        said = pipe.read(65536) or b""
        child.heard += said
        if said and not child.heard.endswith(b"\n"):
            return
        self._selector.unregister(pipe)
        pipe.close()
        child.ready_pipe = None
        if said:
            child.ready = json.loads(child.heard)
            self._log.info("process.ready", name=child.name)
            self._write_ready()

    def _reap(self, *, restart: bool) -> None:
        for child in self._children:
            if child.process is None or (code := child.process.poll()) is None:
                continue
            ran_for_s = time.monotonic() - child.started_at
            renewed, child.renewed = child.renewed, False
            # One that ends although nobody asked it to is news, whatever it says of itself.
            if (restart and not renewed) or code:
                self._log.warning("process.ended", name=child.name, code=code, ran_for_s=round(ran_for_s, 3))
            else:
                self._log.info("process.ended", name=child.name, code=code, ran_for_s=round(ran_for_s, 3))
            child.process, child.ready = None, None
            if child in self._workers:
                self._counts.clear(self._workers.index(child))
            if child.ready_pipe is not None:
                self._selector.unregister(child.ready_pipe)
                child.ready_pipe.close()
                child.ready_pipe = None
            if restart and renewed and not code:
                child.start_due = 0.0
                self._write_ready()
            elif restart:
                self._plan_restart(child, ran_for_s, code)
                self._write_ready()

    def _plan_restart(self, child: Child, ran_for_s: float, code: int = 0) -> None:
        if code == EXIT_NO_SPACE:
            # No fault of its own: to leave it out would keep its mail from going on when space returns.
            count = sum([answer_waiting(bound, reply) for bound, reply in self._farewells(child)])
            self._log.warning("process.waits_for_space", name=child.name, turned_away=count)
            child.start_due = time.monotonic() + NO_SPACE_WAIT_S
            return
        wait_s = child.restarts.ended(ran_for_s)
        others = [worker for worker in self._workers if worker is not child and not worker.given_up]
        if child.spools and child.restarts.is_failing and others and self._quarantine(child):
            self._close_to_new_connections(child)
            child.given_up, child.start_due = True, None
            # The node serves again, with fewer: that is news.
            self._announced = False
            return
        if child.restarts.is_failing:
            self._log.warning("process.failing", name=child.name, retry_in_s=wait_s)
        child.start_due = time.monotonic() + wait_s

    def _close_to_new_connections(self, child: Child) -> None:
        """Its share of connections must not wait for somebody who does not come."""
        count = sum([turn_away(bound, reply) for bound, reply in self._farewells(child)])
        child.sockets = []
        self._log.info("listeners.closed", name=child.name, turned_away=count)

    def _farewells(self, child: Child) -> Iterator[tuple[socket.socket, bytes]]:
        """Its sockets, and what is said to those who wait there: nothing where TLS comes first."""
        for bound, listener in zip(child.sockets, self._settings.listeners, strict=False):
            yield bound, b"" if listener.mode == "tls" else replies.SHUTTING_DOWN.wire

    def _quarantine(self, child: Child) -> bool:
        """Set its spools aside; False where the disk does not take even that, which is then what the worker dies of."""
        try:
            for spool in child.spools:
                quarantine_spool(Path("spool") / spool, f"{child.name} ended three times within seconds")
                self._log.warning("spool.quarantined", spool=spool, name=child.name)
        except OSError as error:
            self._log.warning("spool.not_quarantined", name=child.name, error=str(error))
            return False
        return True

    def _write_ready(self) -> None:
        serving = [child for child in self._children if not child.given_up]
        ready = all(child.ready is not None for child in serving)
        state: dict[str, object] = {
            "event": "node.ready",
            "ready": ready,
            "pid": os.getpid(),
            "listeners": [
                {"mode": listener.mode, "address": listener.address, "port": port}
                for listener, port in zip(self._settings.listeners, self._ports, strict=True)
            ],
            "processes": {child.name: child.process.pid for child in serving if child.process is not None},
            "restarts": {child.name: child.restarts.count for child in self._children},
            "quarantined": [spool for child in self._workers if child.given_up for spool in child.spools],
            **(self._agent.ready or {}),
        }
        self._publish(json.dumps(state) + "\n")
        newly, self._announced = ready and not self._announced, ready
        if newly:
            _say(state)

    def _publish(self, text: str) -> None:
        """Replace the file for those who look; on a full disk the old one stays until the new one can be written."""
        temporary = READY_FILE.with_suffix(".new")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(READY_FILE)
        except OSError as error:
            if not self._unpublished:
                self._log.warning("ready.not_written", error=str(error))
            self._unpublished = True
        else:
            self._unpublished = False

    # --- stopping --------------------------------------------------------------------------------------------

    def _stop(self) -> int:
        self._log.info("node.draining", timeout_s=self._settings.drain_timeout_s)
        READY_FILE.unlink(missing_ok=True)
        _say({"event": "node.draining", "pid": os.getpid()})
        for worker in self._workers:
            for bound in worker.sockets:
                bound.close()
        plan = DrainPlan.of(self._settings.drain_timeout_s)
        deadline = time.monotonic() + plan.node_s
        drained = self._end(self._workers, plan.workers_killed_s)
        drained &= self._end([self._agent], max(AGENT_STOP_S, deadline - time.monotonic()))
        self._log.info("node.stopped", drained=drained)
        return 0 if drained else EXIT_UNDRAINED

    def _end(self, children: Sequence[Child], timeout_s: float) -> bool:
        """SIGTERM, wait, SIGKILL what is left; whether nothing had to be killed."""
        deadline = time.monotonic() + timeout_s
        report_at = time.monotonic() + HELD_REPORT_INTERVAL_S
        self._signal(children, signal.SIGTERM)
        hurried = self._stop_requests > 1
        if hurried:
            self._signal(children, signal.SIGUSR1)
        while left := [child for child in children if child.process is not None]:
            now = time.monotonic()
            if now >= deadline:
                for child in left:
                    self._log.warning("process.killed", name=child.name)
                self._signal(left, signal.SIGKILL)
                self._await_dead(left)
                return False
            if now >= report_at:
                report_at = now + HELD_REPORT_INTERVAL_S
                self._log.info("node.waiting", processes=[child.name for child in left])
            self._wait(min(deadline, report_at) - now)
            if self._stop_requests > 1 and not hurried:
                hurried = True
                self._signal(left, signal.SIGUSR1)
            self._reap(restart=False)
        return True

    def _await_dead(self, children: Sequence[Child]) -> None:
        for child in children:
            if child.process is not None:
                child.process.wait()
        self._reap(restart=False)

    def _signal(self, children: Sequence[Child], number: signal.Signals) -> None:
        for child in children:
            if child.process is not None:
                child.process.send_signal(number)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn signals into something that `select` wakes up for."""
        wake_read, wake_write = os.pipe()
        for descriptor in (wake_read, wake_write):
            os.set_blocking(descriptor, False)
        self._selector.register(wake_read, selectors.EVENT_READ)
        former_wakeup = signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        former = {number: signal.signal(number, self._stop_requested) for number in (signal.SIGTERM, signal.SIGINT)}
        former[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._reload_asked)
        former[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, _child_ended)
        # Held back since the node's lock was taken: who found us by it may send one at once.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(former_wakeup)
            self._selector.close()
            own = (wake_read, wake_write, self._lifeline_read, self._lifeline_write)
            for descriptor in (*own, self._handed.descriptor, self._counts_descriptor):
                os.close(descriptor)

    def _stop_requested(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._stop_requests += 1

    def _reload_asked(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._reload_requested = True


def _effective(settings: Settings) -> Settings:
    """The settings with the number of workers filled in."""
    return settings.model_copy(update={"workers": settings.workers or min(available_cores(), MAX_WORKERS)})


def _worker_arguments(index: int, spools: Sequence[str]) -> list[str]:
    return ["worker", "--index", str(index), "--spools", ",".join(spools)]


def _say(state: Mapping[str, object]) -> None:
    """Tell whoever started us; that they no longer listen is no reason to end."""
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(state) + "\n")
        sys.stdout.flush()


def _child_ended(number: int, frame: FrameType | None) -> None:
    """A handler only so that the wake-up pipe is written to: children are reaped after each wait."""
    del number, frame
