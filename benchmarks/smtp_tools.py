"""Postfix's own load tools, smtp-source and smtp-sink, as processes.

Both servers under test get the same load from the same tools. Every wait has a deadline; a tool that fails raises
ToolError with what it printed.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.02


class ToolError(Exception):
    """A load tool is missing, failed, or did not finish in time."""


_PACKAGES = {"node": "nodejs", "npm": "npm"}


def find_tool(name: str) -> str:
    """Return the path of a program of Postfix or node; ToolError says what to install."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        msg = f"{name} is missing (Debian: apt-get install {_PACKAGES.get(name, 'postfix')})"
        raise ToolError(msg)
    return found


def free_port() -> int:
    """Return a TCP port that was free on 127.0.0.1 a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    """Whether somebody takes connections on 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Sink:
    """smtp-sink on a port of its own; counts messages by the counters that it prints."""

    def __init__(self) -> None:
        """Start it; ready when the port answers."""
        self.port = free_port()
        self._output = Path(tempfile.mkstemp(prefix="sink-")[1])
        command = [find_tool("smtp-sink"), "-c", f"127.0.0.1:{self.port}", "1024"]
        if os.geteuid() == 0:
            command[1:1] = ["-u", "nobody"]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        self._wait_ready()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ToolError(self._output.read_text(encoding="utf-8", errors="replace"))
            if is_listening(self.port):
                return
            time.sleep(_POLL_S)
        msg = "smtp-sink does not answer"
        raise ToolError(msg)

    @property
    def messages(self) -> int:
        """Messages received so far."""
        counters = re.findall(rb"mesg=(\d+)", self._output.read_bytes()[-400:])
        return int(counters[-1]) if counters else 0

    def wait_for(self, count: int, timeout_s: float) -> None:
        """Return when `count` messages were received; ToolError after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while self.messages < count:
            if time.monotonic() > deadline:
                msg = f"the sink has {self.messages} of {count} messages after {timeout_s:.0f} s"
                raise ToolError(msg)
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Stop it and forget what it printed."""
        self._process.terminate()
        self._process.wait(10)
        self._output.unlink(missing_ok=True)


@dataclass(frozen=True)
class Load:
    """What smtp-source sends: messages in all, sessions at a time, content bytes, a connection per message or kept."""

    messages: int
    sessions: int
    size_bytes: int
    keep_connections: bool
    sender: str
    recipient: str


def run_source(load: Load, port: int, timeout_s: float) -> None:
    """Send the load to 127.0.0.1:`port`; return when every message was answered with 250. ToolError otherwise."""
    command = [find_tool("smtp-source"), "-s", str(load.sessions), "-m", str(load.messages), "-l", str(load.size_bytes)]
    command += ["-f", load.sender, "-t", load.recipient]
    if load.keep_connections:
        command.append("-d")
    command.append(f"127.0.0.1:{port}")
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if result.returncode:
        msg = f"smtp-source: {result.stderr.strip() or result.stdout.strip()}"
        raise ToolError(msg)
