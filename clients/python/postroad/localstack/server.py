"""A database server as a child process: the part that PostgreSQL and Valkey have in common.

Contract. `start()` returns when the server answers, or raises `LocalStackError` and leaves no process behind.
`stop()` ends it in order, harder and harder up to SIGKILL; `kill()` is SIGKILL at once and for tests of
durability. All are idempotent and blocking. A folder has one owner at a time: a lock file, freed by the
kernel when its holder dies, tells a server whose owner was killed (it is ended and replaced) from one that is
in use (an error).

    state        process   lock    how it is left
    stopped      none      free    start()
    running      ours      held    stop(), kill(), or it dies by itself (is_running turns False)
    orphaned     foreign   free    the next start() ends it first

The child gets a session of its own, so that Ctrl-C reaches only the program that owns it and shutdown has an
order.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from postroad.localstack.errors import LocalStackError
from postroad.localstack.ports import free_port, is_free, port_taken
from postroad.localstack.shelter import Account, remove_folder, serving_account, settle_folder

_POLL_S = 0.02
_PORT_ATTEMPTS = 5
_LOG_LIMIT_BYTES = 10 * 1024 * 1024
_LOG_TAIL_BYTES = 2_000


class LocalServer(ABC):
    """One server over one data folder; see the module for the contract.

    `port` 0 picks a free one at each start. `settings` go to the server's configuration as they are. `run_as`
    names the user to run as when we are root. `shelter` is where data lies that this user could not reach.
    """

    label: ClassVar[str]
    # As in DEFAULT_PORTS.
    port_name: ClassVar[str]
    # Signals of stop(), mildest first; each is given `stop_step_s` seconds.
    stop_signals: ClassVar[Sequence[signal.Signals]] = (signal.SIGTERM, signal.SIGKILL)

    def __init__(
        self,
        data_dir: Path,
        port: int = 0,
        *,
        settings: Mapping[str, str] | None = None,
        run_as: str | None = None,
        start_timeout_s: float = 60.0,
        stop_step_s: float = 20.0,
        shelter: Path | None = None,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.settings = dict(settings or {})
        self._wanted_port = port
        self._port = port
        self._run_as = run_as
        self._start_timeout_s = start_timeout_s
        self._stop_step_s = stop_step_s
        self._shelter = shelter
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._account: Account | None = None
        self._folder = self.data_dir
        self._log_start = 0

    # --- what each kind of server adds -----------------------------------------------------------

    @abstractmethod
    def _prepare(self) -> None:
        """Bring the data folder into a state to start from; runs under the lock."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The program and its arguments, for `self.port`."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether the running process serves clients now."""

    def _environment(self) -> dict[str, str]:
        """The whole environment of the process: nothing of ours leaks in by accident."""
        return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}

    def _may_start_again(self, log_tail: str) -> bool:
        """Whether a process that ended with this log would come up if it were started anew a moment later."""
        del log_tail
        return False

    # --- what users call -------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The port on 127.0.0.1; the real one as soon as start() has returned."""
        return self._port

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process is not None and self.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether our process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def log_file(self) -> Path:
        """Where the server writes what it has to say."""
        return self._folder / "server.log"

    def start(self) -> Self:
        """Start, and return when the server answers; a second call while it runs does nothing."""
        if self.is_running:
            return self
        self._account = serving_account(self.data_dir, self._run_as)
        self._folder = settle_folder(self.data_dir, self._account, self._shelter)
        self._acquire_lock()
        try:
            self._end_orphan()
            self._prepare()
            self._bring_up()
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self, mode: str = "fast") -> None:
        """End the server in order; `mode` is for servers that know several ways."""
        process = self._process
        if process is not None:
            for number in self._signals_of(mode):
                if process.poll() is None:
                    process.send_signal(number)
                if _ends_within(process, self._stop_step_s):
                    break
        self._forget_process()

    def kill(self) -> None:
        """SIGKILL, as a crash would be: nothing is flushed, nothing is tidied up."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._forget_process()

    def destroy(self) -> None:
        """Kill the server, or the one that a killed owner left behind, and delete all its data."""
        self.kill()
        if self.data_dir.exists():
            self._folder = self.data_dir.resolve()
            self._acquire_lock()
            self._end_orphan()
            self._forget_process()
        remove_folder(self.data_dir)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def log_tail(self) -> str:
        """The last lines that the newest process wrote to the log."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                return file.read().decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    # --- starting --------------------------------------------------------------------------------

    def _bring_up(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        ports_tried = 0
        while True:
            self._choose_port()
            self._spawn()
            if self._becomes_ready(deadline):
                return
            tail = self.log_tail()
            # Between our look at a free port and the server's bind another program may have taken it.
            lost_port = "in use" in tail and self._wanted_port == 0 and ports_tried < _PORT_ATTEMPTS
            ports_tried += lost_port
            worth_it = not self.is_running and (lost_port or self._may_start_again(tail))
            if not worth_it or time.monotonic() > deadline:
                raise self._start_error(tail)
            time.sleep(_POLL_S)

    def _choose_port(self) -> None:
        if self._wanted_port == 0:
            self._port = free_port()
        elif not is_free(self._wanted_port):
            raise port_taken(self._wanted_port, self.port_name)

    def _spawn(self) -> None:
        if self.log_file.exists() and self.log_file.stat().st_size > _LOG_LIMIT_BYTES:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        self._process = self._popen(self._command())
        self._pid_file.write_text(str(self._process.pid), encoding="ascii")

    def _popen(self, command: list[str]) -> subprocess.Popen[bytes]:
        """A child in a session of its own, as the serving user, in its folder (which that user can enter)."""
        account = self._account
        with self.log_file.open("ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            try:
                return subprocess.Popen(
                    command,
                    cwd=self._folder,
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    umask=0o077,
                    user=account.uid if account else None,
                    group=account.gid if account else None,
                    extra_groups=[] if account else None,
                )
            except OSError as error:
                raise LocalStackError(
                    f"{self.label} could not be started: {error}",
                    "Check that the wheels of the local stack fit this machine",
                ) from error

    def _becomes_ready(self, deadline: float) -> bool:
        process = self._process
        while process is not None and time.monotonic() < deadline:
            # The wait is the pause between two looks, cut short when the process ends.
            if _ends_within(process, _POLL_S):
                return False
            if self._is_ready():
                return True
        return False

    def _start_error(self, tail: str) -> LocalStackError:
        happened = "ended at once" if not self.is_running else f"gave no answer in {self._start_timeout_s:.0f} s"
        return LocalStackError(
            f"{self.label} {happened}; the end of {self.log_file}: {tail or '(empty)'}",
            "Mend what the log names, or move the data folder away to start with empty data",
        )

    def _write_private(self, name: str, text: str) -> Path:
        """A file in the data folder that only the serving user can read."""
        path = self._folder / name
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if self._account is not None:
                os.fchown(descriptor, self._account.uid, self._account.gid)
            file.write(text)
        return path

    # --- ownership -------------------------------------------------------------------------------

    @property
    def _pid_file(self) -> Path:
        return self._folder / "server.pid"

    def _acquire_lock(self) -> None:
        if self._lock is not None:
            return
        lock = os.open(self._folder / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise LocalStackError(
                f"{self.data_dir} is in use by another running Postroad",
                "Stop that one first, or give this one a data folder of its own",
            ) from error
        self._lock = lock

    def _forget_process(self) -> None:
        self._process = None
        if self._lock is not None:
            self._pid_file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _end_orphan(self) -> None:
        """End a server that outlived its owner: we hold the lock, so nobody else counts on it."""
        try:
            pid = int(self._pid_file.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return
        for number in (*self.stop_signals, signal.SIGKILL):
            # Looked at each time: a pid may belong to somebody else by now.
            if not self._is_ours(pid):
                break
            os.kill(pid, number)
            deadline = time.monotonic() + self._stop_step_s
            while self._is_ours(pid) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        self._pid_file.unlink(missing_ok=True)

    def _is_ours(self, pid: int) -> bool:
        """Whether process `pid` is a server over this very folder."""
        return str(self._folder) in command_line(pid)

    def _signals_of(self, mode: str) -> Sequence[signal.Signals]:
        del mode
        return self.stop_signals


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def command_line(pid: int) -> str:
    """The command line of a process, empty when there is none (a zombie has none either)."""
    proc = Path("/proc")
    if (proc / "self").exists():
        try:
            return (proc / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    ps = shutil.which("ps") or "/bin/ps"
    result = subprocess.run([ps, "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, check=False)
    return result.stdout.decode(errors="replace")
