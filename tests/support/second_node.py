"""A second node beside a local stack's, started by hand: enrolled by the API, with ports and a folder of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from support.killable_stack import KillableStack, pids_below, wait_until
from support.local_stack import environment
from support.ports import own_ports

START_TIMEOUT_S = 60.0


class SecondNode:
    """Node `node-2`; `port` speaks STARTTLS."""

    def __init__(self, stack: KillableStack) -> None:
        self._stack = stack
        self._folder = stack.folder / "node-2"
        self._folder.mkdir()
        self.log_file = self._folder / "node.log"
        (self.port,) = own_ports(["smtp"]).values()
        self._process: subprocess.Popen[bytes] | None = None
        first = stack.root / "node-1" / "node.yaml"
        settings = yaml.safe_load(first.read_text(encoding="utf-8"))
        settings["data_dir"] = str(self._folder / "data")
        settings["metrics"]["port"] = 0
        for listener in settings["listeners"]:
            listener["port"] = 0
        next(one for one in settings["listeners"] if one["mode"] == "starttls")["port"] = self.port
        self._file = self._folder / "node.yaml"
        self._file.write_text(yaml.safe_dump(_absolute(settings, first.parent)), encoding="utf-8")
        token = stack.json("nodes", "create", "node-2")["enrollmentToken"]
        self._run("enroll", "--token", token).wait(START_TIMEOUT_S)

    def start(self) -> SecondNode:
        """Start it, and wait until it takes mail."""
        begun = self.log().count("queue.lease_begun")
        self._process = self._run("run")
        wait_until(
            lambda: self.log().count("queue.lease_begun") > begun, "the second node has a lease", START_TIMEOUT_S
        )
        return self

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def signal_all(self, number: signal.Signals) -> None:
        """A signal for every process of the node, as when its machine stops or dies."""
        assert self._process is not None
        pids = [*pids_below(self._process.pid), self._process.pid]
        if number is signal.SIGKILL:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)  # so that none sees another one die
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number is signal.SIGKILL:
            self._process.wait(START_TIMEOUT_S)
            self._process = None

    def end(self) -> None:
        """Kill what still runs."""
        if self._process is not None and self._process.poll() is None:
            self.signal_all(signal.SIGKILL)

    def _run(self, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dataplane", words[0], "--config", str(self._file), *words[1:]]
        with self.log_file.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment(self._stack.folder))


def _absolute(value: object, base: Path) -> object:
    """The settings with every file's path made absolute."""
    if isinstance(value, dict):
        return {
            key: str((base / one).resolve()) if key.endswith("_file") and isinstance(one, str) else _absolute(one, base)
            for key, one in value.items()
        }
    return [_absolute(one, base) for one in value] if isinstance(value, list) else value
