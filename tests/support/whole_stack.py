"""The local stack as a user runs it: `postroad up` as a process in a folder of the test's, and the pids of all it runs.

Ports are free ones, chosen at the first start and kept. fsync is on, as everywhere outside tests of logic.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from postroad.localstack.ports import DEFAULT_PORTS
from postroad.sdk import Client, connect

START_S = 90.0
STOP_S = 90.0
_POLL_S = 0.05


class WholeStack:
    """`start` and `stop` may be called in turn; `kill_everything` leaves nothing alive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready."""
        command = [sys.executable, "-m", "postroad.cli.main", "--output", "json", "up", "--dir", str(self.folder)]
        for name in DEFAULT_PORTS:
            command += ["--port", f"{name}=0"]
        log = (self.folder.parent / "up.log").open("ab")
        with log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        deadline = time.monotonic() + START_S
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "up.ready":
                self.facts = event
                return
            assert time.monotonic() < deadline, "the stack does not come up in time"
        text = (self.folder.parent / "up.log").read_text(encoding="utf-8", errors="replace")
        raise AssertionError(f"the stack does not come up: {text[-2000:]}")

    def stop(self) -> None:
        """Stop it in order; nothing happens when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=STOP_S)

    def kill_everything(self) -> None:
        """SIGKILL for `postroad up` and every process that it runs, all at once."""
        assert self._process is not None
        pids = [*_descendants(self._process.pid), self._process.pid]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that none sees another one die
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._process.communicate(timeout=STOP_S)
        self._process = None

    def kill(self, name: str) -> None:
        """SIGKILL for one server: worker, agent, supervisor, controlplane, postgres or valkey."""
        for pid in self.pids(name):
            os.kill(pid, signal.SIGKILL)

    def pids(self, name: str) -> list[int]:
        """Processes of that name that live now."""
        assert self._process is not None
        return [pid for pid in _descendants(self._process.pid) if _is(name, _command(pid))]

    def port(self, name: str) -> int:
        """Port of a server of the stack."""
        port: int = self.facts["ports"][name]
        return port

    def connect(self) -> Client:
        """A client of the API with the operator's key."""
        settings = yaml.safe_load((self.folder / "cli.yaml").read_text(encoding="utf-8"))
        return connect(settings["server"], settings["api_key"], self.folder / settings["ca_file"])


def wait_until(condition: Any, what: str, timeout_s: float = 60.0) -> None:
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


def _is(name: str, command: str) -> bool:
    words = command.split()
    program, *arguments = _PATTERNS[name]
    if not words or not all(argument in words for argument in arguments):
        return False
    return program in words or words[0].endswith(program)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(path.name))
    found: list[int] = []
    todo = list(children.get(root, ()))
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo.extend(children.get(pid, ()))
    return found
