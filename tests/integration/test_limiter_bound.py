"""How far above a limit a fleet can come: four workers hammer one limit while its server is restarted, emptied, paused.

The bound is the one that `limiter_redis` states. Time is the monotonic clock, which all processes share, from before
the first worker until after the last: generous, so that a slow machine makes the bound wider and never the test fail.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from postroad.localstack import ValkeyServer

WORKERS = 4
CAPACITY = 400
CHILD = Path(__file__).parents[1] / "support" / "limiter_child.py"
PATIENCE_S = 60.0


class Worker:
    """A child and the lines that it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stdin is not None
        self.process = process
        self.lines: list[str] = []
        self._out, self._in = process.stdout, process.stdin

    async def is_now(self, state: str) -> None:
        """Wait until it is `shared` or `local`, if that is not what it said last."""
        said = [line for line in self.lines if line in ("shared", "local")]
        if said[-1:] != [state]:
            await self.says(state)

    async def says(self, word: str) -> None:
        """Wait until it says this once more."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                line = (await self._out.readline()).decode().strip()
                assert line, f"it ended after {self.lines[-5:]}"
                self.lines.append(line)
                if line == word:
                    return

    async def end(self) -> dict[str, int]:
        """Stop it; returns its counts."""
        self._in.write(b"stop\n")
        async with asyncio.timeout(PATIENCE_S):
            rest = (await self._out.read()).decode().splitlines()
            assert await self.process.wait() == 0
        self.lines += rest[:-1]
        counts: dict[str, int] = json.loads(rest[-1])
        return counts


@asynccontextmanager
async def workers(url: str, rate_per_s: float) -> AsyncIterator[list[Worker]]:
    arguments = (str(CHILD), url, str(WORKERS), str(CAPACITY), str(rate_per_s))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, CHILD.parents[1:3]))}
    pipe = asyncio.subprocess.PIPE
    started: list[Worker] = []
    try:
        for _ in range(WORKERS):
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdin=pipe, stdout=pipe, env=environment
            )
            started.append(Worker(process))
        yield started
    finally:
        for worker in started:
            if worker.process.returncode is None:
                worker.process.kill()
                await worker.process.wait()


async def all_say(fleet: list[Worker], word: str) -> None:
    await asyncio.gather(*(worker.says(word) for worker in fleet))


async def all_are(fleet: list[Worker], state: str) -> None:
    await asyncio.gather(*(worker.is_now(state) for worker in fleet))


async def restart(server: ValkeyServer, fleet: list[Worker]) -> ValkeyServer:
    """Restart the server, empty as it then is."""
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, server.stop)
    await all_are(fleet, "local")
    await all_say(fleet, "asked")
    again = ValkeyServer(server.data_dir, server.port)
    await loop.run_in_executor(None, again.start)
    await all_are(fleet, "shared")
    return again


async def pause(server: ValkeyServer, fleet: list[Worker]) -> None:
    """Let the server hang for a while."""
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        await all_are(fleet, "local")
        await all_say(fleet, "asked")
    finally:
        os.kill(pid, signal.SIGCONT)
    await all_are(fleet, "shared")


@pytest.mark.parametrize(("rate_per_s", "lost_count"), [(5.0, 2), (0.5, 0)], ids=["short", "long"])
async def test_four_workers_stay_within_the_bound_whatever_becomes_of_the_server(
    passable_folder: Path, rate_per_s: float, lost_count: int
) -> None:
    """A short bucket is given away anew at each loss; a long one is seeded by what the workers remember."""
    server = ValkeyServer(passable_folder / "valkey").start()
    started_s = time.monotonic()
    try:
        async with workers(server.url(), rate_per_s) as fleet:
            await all_say(fleet, "exhausted")
            server = await restart(server, fleet)
            await all_say(fleet, "asked")
            with redis.Redis.from_url(server.url()) as client:
                client.flushall()
            await all_say(fleet, "asked")
            await pause(server, fleet)
            await all_say(fleet, "asked")
            counts = [await worker.end() for worker in fleet]
    finally:
        server.destroy()
    elapsed_s = time.monotonic() - started_s
    granted = sum(count["granted"] for count in counts)
    away_count = 2  # restarted and paused; more when this machine was slow, which each worker's share covers
    # Time counts twice: the shares refill while the server's buckets do.
    bound = CAPACITY * (1 + lost_count + away_count) + rate_per_s * 2 * elapsed_s + WORKERS
    assert granted <= bound
    assert granted >= CAPACITY
    assert sum(count["granted_locally"] for count in counts) <= CAPACITY + rate_per_s * elapsed_s + WORKERS
    assert sum(count["asked"] for count in counts) > 2 * bound
    assert all(count["trips"] >= 2 for count in counts)
