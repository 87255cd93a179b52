"""Load processes and sinks as children: started, listened to, and ended whatever happens.

Contract. A child prints JSON lines; a thread each puts them, with the child, into one queue. A child that ends before
it said what was expected is a LoadError with the end of its standard error. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.load.job import Job
from benchmarks.load.latency import Timeline
from benchmarks.smtp_tools import ToolError

_ROOT = Path(__file__).parents[2]
_START_S = 20.0
_END_S = 5.0
_POLL_S = 0.1

Line = dict[str, Any]


class LoadError(ToolError):
    """A load process or the sink failed."""


class Child:
    """A Python module as a process. `lines` gets (child, line), and (child, None) when its output ends."""

    def __init__(self, module: str, arguments: Sequence[str], lines: queue.Queue[tuple[Any, Line | None]]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=_ROOT,
        )
        self._lines = lines
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put((self, json.loads(line)))
        self._lines.put((self, None))

    def say(self, line: str) -> None:
        """Write a line to its input; what it does not take any more is lost."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def last_words(self) -> str:
        """Return the end of its standard error."""
        self._errors.seek(0)
        return self._errors.read()[-2_000:].decode(errors="replace").strip()

    def close(self) -> None:
        """End its input, then the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self._errors.close()


class LoadProcess(Child):
    """A generator or another module that speaks as it does, and all it has said."""

    def __init__(self, name: str, job: Job, lines: queue.Queue[tuple[Any, Line | None]], module: str) -> None:
        super().__init__(module, [], lines)
        self.name = name
        self.job = job
        self.is_ready = False
        self.end: Line | None = None
        self.latest: Line = {"begun": 0, "answered": 0, "open": 0, "errors": {}, "last_ns": 0}
        self.open_by_second: dict[int, int] = {}
        self.connect, self.dot, self.message = Timeline(), Timeline(), Timeline()
        self.kinds: dict[str, Timeline] = {}
        self.say(job.to_json())

    def note(self, line: Line) -> None:
        """Take a line of it."""
        if "ready" in line:
            self.is_ready = True
            return
        self.latest = line
        self.open_by_second[time.monotonic_ns() // 1_000_000_000] = line["open"]
        self.connect.add(line["connect"])
        self.dot.add(line["dot"])
        self.message.add(line["message"])
        for kind, seconds in line.get("kinds", {}).items():
            self.kinds.setdefault(kind, Timeline()).add(seconds)
        if "end" in line:
            self.end = line


class SinkProcess:
    """The sink; counts are by stream."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._lines: queue.Queue[tuple[Any, Line | None]] = queue.Queue()
        self._child = Child("benchmarks.load.sink", options, self._lines)
        self.counts: dict[int, list[int]] = {}
        self.arrival: dict[int, Timeline] = {}
        self.strangers = self.connections = 0
        self.pid = self._child.process.pid
        try:
            self.port = int(self._next(time.monotonic() + _START_S)["port"])
        except LoadError:
            self._child.close()
            raise

    def _next(self, deadline: float) -> Line:
        try:
            _, line = self._lines.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            raise LoadError("the sink says nothing") from None
        if line is None:
            raise LoadError(f"the sink ended: {self._child.last_words()}")
        return line

    def _note(self, line: Line) -> None:
        self.counts = {int(stream): counts for stream, counts in line["streams"].items()}
        self.strangers, self.connections = line["strangers"], line["connections"]
        for stream, seconds in line.get("arrival", {}).items():
            self.arrival.setdefault(int(stream), Timeline()).add(seconds)

    def arrived(self, streams: Sequence[int]) -> int:
        """Return how many different messages of these streams have come, as last said."""
        with contextlib.suppress(queue.Empty):
            while True:
                _, line = self._lines.get_nowait()
                if line is None:
                    raise LoadError(f"the sink ended: {self._child.last_words()}")
                self._note(line)
        return sum(self.counts.get(stream, [0, 0])[0] for stream in streams)

    def last_ns(self, streams: Sequence[int]) -> int:
        """Return when the last of their messages came, 0 when none did."""
        return max(self.counts.get(stream, [0, 0, 0])[2] for stream in streams)

    def wait_for(self, streams: Sequence[int], count: int, patience_s: float) -> bool:
        """Return True when `count` messages have come, False when for `patience_s` none came any more."""
        reached, since = -1, time.monotonic()
        while (arrived := self.arrived(streams)) < count:
            if arrived > reached:
                reached, since = arrived, time.monotonic()
            elif time.monotonic() - since > patience_s:
                return False
            time.sleep(_POLL_S)
        return True

    def ledger(self, stream: int, folder: Path) -> bytes:
        """Return how often each number of a stream arrived, a byte each."""
        file = folder / f"arrived-{stream}"
        self._child.say(f"ledger {stream} {file}")
        deadline = time.monotonic() + _START_S
        while True:
            line = self._next(deadline)
            self._note(line)
            if line.get("ledger") == stream:
                return file.read_bytes()

    def connections_so_far(self) -> int:
        """Return how many connections it was asked for."""
        with tempfile.TemporaryDirectory(prefix="postroad-load-") as folder:
            self.ledger(0, Path(folder))
        return self.connections

    def close(self) -> None:
        """End it."""
        self._child.close()
