"""Keeps on the node's disk what a worker remembers of long buckets, for the case that all end together with Redis.

Contract. Each worker writes its own file below `limits/` every KEEP_S seconds and at its end; at its start it recalls
what any worker of the node has written, aged by the time that has passed. A file that cannot be read is passed over,
and one that cannot be written is tried again: limits then hold as if nothing were remembered. Cancelling `run` writes
once more.

A file is JSON: {"seen_ms": wall clock, "levels": [[lot, key, capacity, rate, level, seconds before seen_ms], …]}, sizes
and levels in micro-tokens. A wall clock that went back counts as no time, which is the stricter reading.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dataplane.adapters.limiter_levels import Level, aged
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.adapters.limiter_wire import make_known
from dataplane.files import write_durably
from dataplane.ports import Clock, EventLog

KEEP_S = 10.0
LIMITS_FOLDER = "limits"
_MAX_FILE_BYTES = 16 * 1024 * 1024
# Above every debt, capacity and time; what is not below it is damage.
_MOST = 10**16


class LimiterMemory:
    """Of one worker; `folder` is the data directory."""

    def __init__(
        self,
        folder: Path,
        index: int,
        limiter: RedisLimiter,
        clock: Clock,
        log: EventLog,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._folder = folder / LIMITS_FOLDER
        self._file = self._folder / f"worker-{index}.json"
        self._limiter = limiter
        self._clock = clock
        self._log = log
        self._sleep = sleep
        self._writing = threading.Lock()

    def recall(self) -> None:
        """Before the limiter starts: give it what this node's workers knew."""
        for file in sorted(self._folder.glob("worker-*.json")):
            try:
                levels = self._levels_of(json.loads(_read(file)))
            except Exception as error:  # noqa: BLE001 - whatever is wrong with a file, the worker starts without it
                self._log.warning("limiter.memory_unreadable", file=file.name, error=type(error).__name__)
            else:
                for lot, level in levels:
                    self._limiter.recall(lot, level)

    def _levels_of(self, kept: dict[str, Any]) -> list[tuple[str, Level]]:
        """Return the levels of a file. Whatever exception when one of them cannot be."""
        now_s = self._clock.monotonic()
        passed_s = max(0.0, (self._clock.wall_ms() - _within(kept["seen_ms"], 0, _MOST)) / 1000)
        levels = []
        for lot, name, capacity, rate_per_s, held, before_s in kept["levels"]:
            known = make_known(str(name), int(_within(capacity, 0, _MOST)), float(_within(rate_per_s, 0, _MOST)))
            seen_s = now_s - passed_s - _within(before_s, 0, _MOST)
            levels.append((str(lot), Level(known, int(_within(held, -_MOST, _MOST)), seen_s)))
        return levels

    async def run(self) -> None:
        """Write now and then."""
        try:
            while True:
                await self._sleep(KEEP_S)
                await asyncio.to_thread(self._write, self._kept())
        finally:
            self._write(self._kept())

    def _kept(self) -> dict[str, Any]:
        now_s = self._clock.monotonic()
        levels = [
            [lot, level.known.name, level.known.capacity, level.known.rate_per_s, level.level, now_s - level.seen_s]
            for lot, level in self._limiter.remembered()
            if aged(level, now_s) < level.known.capacity
        ]
        return {"seen_ms": self._clock.wall_ms(), "levels": levels}

    def _write(self, kept: dict[str, Any]) -> None:
        try:
            with self._writing:
                if kept["levels"] or self._file.exists():
                    self._folder.mkdir(mode=0o700, exist_ok=True)
                    write_durably(self._file, [json.dumps(kept).encode()])
        except OSError as error:
            self._log.warning("limiter.memory_not_written", error=type(error).__name__)


def _read(file: Path) -> bytes:
    if file.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError("too large")
    return file.read_bytes()


def _within(number: Any, least: int, most: int) -> int | float:
    """Return the number; ValueError for one that is none, or out of range (which NaN is)."""
    if not isinstance(number, int | float) or not least <= number <= most:
        raise ValueError("no number that can be")
    return number
