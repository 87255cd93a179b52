"""A node as processes: its settings in a folder, started as people start it, watched by what it says on standard
output.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import yaml

READY_S = 60.0


def write_settings(folder: Path, control_plane: str, **more: Any) -> Path:
    """A node.yaml for loopback with ports of the system's choice."""
    values: dict[str, Any] = {
        "data_dir": "data",
        "hostname": "node.example",
        "workers": 1,
        "control_plane": {"address": control_plane},
        "listeners": [{"address": "127.0.0.1", "port": 0, "mode": "plain"}],
        "metrics": {"port": 0},
        "delivery": {"allowed_private_networks": ["127.0.0.0/8"]},
        **more,
    }
    file = folder / "node.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


class NodeProcess:
    """A running node; `ready` is what its `node.ready` line said."""

    def __init__(self, process: asyncio.subprocess.Process, data_dir: Path) -> None:
        self.process = process
        self.data_dir = data_dir
        self.ready: dict[str, Any] = {}

    @property
    def smtp_port(self) -> int:
        port: int = self.ready["listeners"][0]["port"]
        return port

    @property
    def metrics_port(self) -> int:
        port: int = self.ready["metrics"]["port"]
        return port

    async def wait_ready(self) -> None:
        """Wait for the next `node.ready`: the node serves, or serves again."""
        self.ready = await self.wait_said("node.ready")

    async def wait_said(self, event: str) -> dict[str, Any]:
        """Wait for the next line on standard output, which must be this event."""
        assert self.process.stdout is not None
        async with asyncio.timeout(READY_S):
            line = await self.process.stdout.readline()
        assert line, f"the node ended before {event}"
        said: dict[str, Any] = json.loads(line)
        assert said["event"] == event
        return said

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        async with asyncio.timeout(READY_S):
            return await self.process.wait()


def log_events(settings_file: Path, event: str) -> list[dict[str, Any]]:
    """The lines of this event that the node's processes wrote so far."""
    lines = (settings_file.parent / "node.log").read_text(encoding="utf-8").splitlines(keepends=True)
    # The last one may not be whole yet.
    whole = (line for line in lines if line.startswith("{") and line.endswith("\n"))
    found: list[dict[str, Any]] = [json.loads(line) for line in whole]
    return [line for line in found if line["event"] == event]


async def wait_gone(pid: int) -> None:
    """Return when the process has ended; it need not be our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(READY_S):
            await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


@contextlib.asynccontextmanager
async def running(
    settings_file: Path, descriptors: int | None = None, **environment: str
) -> AsyncIterator[NodeProcess]:
    """Start a node and wait until it serves; ends it whatever happens. Its log goes to node.log beside the settings.

    With `descriptors` no process of it may have more than so many.
    """
    async with starting(settings_file, descriptors, **environment) as node:
        await node.wait_ready()
        yield node


@contextlib.asynccontextmanager
async def starting(
    settings_file: Path, descriptors: int | None = None, **environment: str
) -> AsyncIterator[NodeProcess]:
    """As `running`, without waiting."""
    limited = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh"] if descriptors else []
    log = os.open(settings_file.parent / "node.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    process = await asyncio.create_subprocess_exec(
        *limited,
        sys.executable,
        "-m",
        "dataplane",
        "run",
        "--config",
        str(settings_file),
        stdout=asyncio.subprocess.PIPE,
        stderr=log,
        env={**os.environ, **environment},
    )
    os.close(log)
    try:
        yield NodeProcess(process, settings_file.parent / "data")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
