"""A local stack whose processes can be killed, one server at a time or all at once.

Processes are found by their place in the tree below `postroad up` and by their command line; Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from support.local_stack import LocalStack

_POLL_S = 0.05


class KillableStack(LocalStack):
    """A LocalStack that can lose any of its servers."""

    @property
    def root(self) -> Path:
        """Where everything lives."""
        return self.folder / ".postroad"

    def port(self, name: str) -> int:
        """Port of a server of the stack."""
        port: int = self.ready["ports"][name]
        return port

    def kill_server(self, name: str) -> None:
        """SIGKILL for one server: worker, agent, supervisor, controlplane, postgres or valkey."""
        for pid in self.pids_of(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pids_of(self, name: str) -> list[int]:
        """The processes of one server; none while it is down."""
        return [pid for pid in self._pids() if is_server(name, command_of(pid))]

    def kill_everything(self) -> None:
        """SIGKILL for `postroad up` and every process that it runs, all at once."""
        assert self._process is not None
        pids = [*self._pids(), self._process.pid]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that none sees another one die
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.wait()

    def _pids(self) -> list[int]:
        assert self._process is not None
        return pids_below(self._process.pid)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Return when `condition()` is true; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s:.0f} s still not: {what}"
        time.sleep(_POLL_S)


_PATTERNS = {
    "worker": ("dataplane", "worker"),
    "agent": ("dataplane", "agent"),
    "supervisor": ("dataplane", "run"),
    "controlplane": ("controlplane", "serve"),
    "postgres": ("bin/postgres", "-D"),
    "valkey": ("valkey-server",),
}


def is_server(name: str, command: str) -> bool:
    """Whether a command line is that of this server."""
    words = command.split()
    program, *arguments = _PATTERNS[name]
    if not words or not all(argument in words for argument in arguments):
        return False
    return program in words or words[0].endswith(program)


def command_of(pid: int) -> str:
    """The command line of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def pids_below(pid: int) -> list[int]:
    """Every process that this one started, and that those started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(path.name))
    found: list[int] = []
    todo = list(children.get(pid, ()))
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo.extend(children.get(pid, ()))
    return found
