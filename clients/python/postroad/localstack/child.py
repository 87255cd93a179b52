"""One of Postroad's own programs as a child process of the local stack.

Contract. `start()` returns when the program is ready, or raises `LocalStackError` with the end of its log and leaves no
process behind. `stop()` ends it in order: its signals one after the other, SIGKILL last. Output goes to the log file
itself, not through us, so that nothing blocks and nothing is lost when we die. The child has a session of its own
(Ctrl-C reaches only us, who keep the order) and, on Linux, ends when we do. A child of a stack that was killed is found
by its pid file and ended by `end_orphan()`, after a look that the process is still that one.

    state      process   pid file   how it is left
    stopped    none      none       start()
    running    ours      ours       stop(), or it ends by itself: `ended` returns its status
    orphaned   foreign   old        end_orphan(), which start() calls first
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from postroad.localstack.errors import LocalStackError
from postroad.localstack.layout import Layout
from postroad.localstack.server import command_line

_TETHER = Path(__file__).with_name("tether.py")
_POLL_S = 0.05
_ORPHAN_STEP_S = 5.0
_KILLED_WAIT_S = 10.0
_LOG_LIMIT_BYTES = 10 * 1024 * 1024
_TAIL_BYTES = 4_000
_TAIL_LINES = 12

# Signals and how long each is given.
Steps = Sequence[tuple[signal.Signals, float]]


class Child:
    """A program of Postroad. `ready` is asked until it says True; `arguments` follow the Python interpreter."""

    def __init__(
        self,
        label: str,
        name: str,
        arguments: Sequence[str],
        layout: Layout,
        *,
        ready: Callable[[], Awaitable[bool]],
        stop_steps: Steps,
        start_timeout_s: float = 60.0,
    ) -> None:
        self.label = label
        self.name = name
        self._arguments = arguments
        self._layout = layout
        self._ready = ready
        self._stop_steps = stop_steps
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0

    @property
    def is_running(self) -> bool:
        """Whether our process lives."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None and self.is_running else None

    async def start(self) -> None:
        """Start and wait until it is ready; when cancelled, the process may run, and stop() ends it in order."""
        await self.end_orphan()
        process = self._process = await self._spawn()
        self._pid_file.write_text(str(process.pid), encoding="ascii")
        try:
            await self._become_ready(process)
        except LocalStackError:
            await self._kill()
            raise

    async def stop(self) -> None:
        """End it in order; does nothing when it does not run. When cancelled, it may still be ending."""
        process = self._process
        if process is None:
            return
        for number, patience_s in self._stop_steps:
            if process.returncode is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience_s)
        await self._kill()

    def hurry(self) -> None:
        """Send SIGTERM again: the node then gives up draining."""
        if self._process is not None and self.is_running:
            self._process.send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """Wait until it ends by itself; its status, negative for a signal."""
        if self._process is None:
            return 0
        return await self._process.wait()

    def log_tail(self) -> str:
        """The last lines of the log."""
        return tail(self._layout.log(self.name))

    def has_said(self, words: str) -> bool:
        """Whether the newest process wrote `words` to its log; for programs that say when they are ready."""
        with self._layout.log(self.name).open(encoding="utf-8", errors="replace") as log:
            log.seek(self._log_start)
            return words in log.read()

    async def end_orphan(self) -> None:
        """End the process that a killed stack left behind, if there is one."""
        await end_left_behind(self._pid_file, (str(self._layout.root), self._arguments[1]))
        self._pid_file.unlink(missing_ok=True)

    # --- inside ----------------------------------------------------------------------------------

    @property
    def _pid_file(self) -> Path:
        return self._layout / "run" / f"{self.name}.pid"

    async def _spawn(self) -> asyncio.subprocess.Process:
        log = self._layout.log(self.name)
        if log.exists() and log.stat().st_size > _LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".log.1"))
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._log_start = os.fstat(descriptor).st_size
        try:
            return await asyncio.create_subprocess_exec(
                *tethered(self._arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
                env=child_environment(os.environ),
                cwd=self._layout.root,
            )
        except OSError as error:
            raise LocalStackError(
                f"{self.label} could not be started: {error}", f"Check that you may run {sys.executable}"
            ) from error
        finally:
            os.close(descriptor)

    async def _become_ready(self, process: asyncio.subprocess.Process) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not await self._ready():
            if process.returncode is not None:
                raise self._error(f"ended at once with status {process.returncode}")
            if time.monotonic() > deadline:
                raise self._error(f"was not ready after {self._start_timeout_s:.0f} s")
            await asyncio.sleep(_POLL_S)
        if process.returncode is not None:
            # Somebody else answers on its port.
            raise self._error(f"ended at once with status {process.returncode}")

    def _error(self, happened: str) -> LocalStackError:
        log = self._layout.log(self.name)
        return LocalStackError(
            f"{self.label} {happened}; the end of {log}:\n{self.log_tail() or '(empty)'}",
            "Mend what the log names, then start again: what was done so far is kept",
        )

    async def _kill(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _KILLED_WAIT_S)
        self._pid_file.unlink(missing_ok=True)


def tethered(arguments: Sequence[str]) -> list[str]:
    """The command for a Python program that ends when we do. To be started from the main thread only: the kernel
    takes the thread for the parent.
    """
    return [sys.executable, "-IS", str(_TETHER), str(os.getpid()), sys.executable, *arguments]


async def end_left_behind(pid_file: Path, words: Sequence[str]) -> None:
    """End the process that a killed stack left in `pid_file`, if it is still that one: pids are used again, so its
    command line must hold all `words`.
    """
    pid = _read_pid(pid_file)

    def lives() -> bool:
        line = "" if pid is None else command_line(pid)
        return all(word in line for word in words)

    # A second SIGTERM hurries a node; SIGKILL is safe for every program of ours.
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _ORPHAN_STEP_S
        if pid is not None and lives():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while lives() and time.monotonic() < deadline:  # noqa: ASYNC110 - no child of ours: nothing tells
            await asyncio.sleep(_POLL_S)


def _read_pid(pid_file: Path) -> int | None:
    """What the file says; None when there is none, or when it was cut off."""
    try:
        return int(pid_file.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Our environment for a child: without what would lead it to other settings than the folder's."""
    return {
        **{name: value for name, value in environment.items() if name != "POSTROAD_CONFIG"},
        "PYTHONUNBUFFERED": "1",
    }


def tail(file: Path) -> str:
    """The last lines of a file."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-_TAIL_LINES:])
