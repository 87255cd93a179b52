"""One measured run: load processes against a server that delivers to our sink, and what came of it.

Contract. `measure` starts the processes of every stream, lets them begin at once, reports progress each second, waits
until everything that was answered has arrived and the server says that it is done, and compares the ledgers. It always
comes to an end: a process that outlives its deadline is ended and named. What went wrong is in `problems`; a run with
problems is no measurement. A stream that is not expected to arrive (its next hop is dead) is only counted at the door.
"""

from __future__ import annotations

import itertools
import os
import queue
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks.load.children import Line, LoadError, LoadProcess, SinkProcess
from benchmarks.load.job import Job
from benchmarks.load.latency import Percentiles, Timeline, merge, percentiles
from benchmarks.load.ledgers import Verdict, add_verdicts, judge
from benchmarks.load.results import RunResult, Stream, StreamResult, merge_timelines, rows
from benchmarks.processes import cpu_of, machine_busy_s

_NS = 1_000_000_000
_READY_S = 30.0
_GRACE_S = 15.0
_SETTLE_S = 60.0
_TICK_S = 0.25
# Progress is said when all processes have said theirs.
_LATE_S = 0.3

_streams = itertools.count(1)


class Peer(Protocol):
    """A server under test."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def holders(self) -> tuple[str, ...]:
        """The parts that hold clients' connections."""
        ...

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far by part."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes by part."""
        ...

    def settle(self, timeout_s: float) -> bool:
        """Whether all is delivered and recorded within the time."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, for people: latencies are dot to 250 of the last seconds, in milliseconds."""

    elapsed_s: float
    begun: int
    answered: int
    arrived: int
    open: int
    errors: int
    dot: Percentiles


class Run:
    """See the module. `patience_s`: how long nothing may arrive before the rest is given up."""

    def __init__(self, peer: Peer, sink: SinkProcess, say: Callable[[Progress], None], *, patience_s: float) -> None:
        self._peer = peer
        self._sink = sink
        self._say = say
        self._patience_s = patience_s
        self._lines: queue.Queue[tuple[Any, Line | None]] = queue.Queue()
        self._processes: list[LoadProcess] = []
        self._problems: list[str] = []
        self._begin_ns = 0

    def measure(self, streams: Sequence[Stream], on_tick: Callable[[Progress], None] | None = None) -> RunResult:
        """Run all streams at once; `on_tick` gets each progress, too. LoadError: no result."""
        with tempfile.TemporaryDirectory(prefix="postroad-load-") as folder:
            try:
                return self._measure(streams, Path(folder), on_tick or (lambda _: None))
            finally:
                for process in self._processes:
                    process.close()

    def _measure(self, streams: Sequence[Stream], folder: Path, on_tick: Callable[[Progress], None]) -> RunResult:
        for stream in streams:
            for job in shares(stream, folder):
                self._processes.append(LoadProcess(stream.name, job, self._lines, stream.module))
        self._listen(lambda: all(process.is_ready for process in self._processes), _READY_S, lambda _: None)
        cpu, sink_cpu, own_cpu = self._peer.cpu(), cpu_of(self._sink.pid), cpu_of(os.getpid())
        busy = machine_busy_s()
        self._begin_ns = time.monotonic_ns()
        for process in self._processes:
            process.say("go")
        longest_s = max(stream.job.deadline_s for stream in streams) + _GRACE_S
        self._listen(lambda: all(process.end for process in self._processes), longest_s, on_tick)
        self._wait_for_arrival(streams)
        if all(stream.arrives or not stream.is_mail for stream in streams) and not self._peer.settle(_SETTLE_S):
            self._problems.append("the server still holds mail or records that nobody has acknowledged")
        seconds = (time.monotonic_ns() - self._begin_ns) / _NS
        used = {role: seconds - cpu.get(role, 0.0) for role, seconds in self._peer.cpu().items()}
        sink_used, own_used = cpu_of(self._sink.pid) - sink_cpu, cpu_of(os.getpid()) - own_cpu
        known = sum(used.values()) + sink_used + own_used + self._clients_cpu_s()
        others_cores = max(machine_busy_s() - busy - known, 0.0) / seconds
        results = {stream.name: self._result(stream, folder) for stream in streams}
        messages = sum(result.verdict.answered for result in results.values() if result.is_mail)
        used["total"] = sum(used.values())
        return RunResult(
            peer=self._peer.name,
            seconds=round(seconds, 3),
            streams=results,
            others_cores=round(others_cores, 2),
            cpu_s={role: round(value, 3) for role, value in used.items()},
            cpu_us_per_message=_per_message(used, messages),
            load_cpu_us_per_message=_per_message({"clients": self._clients_cpu_s(), "sink": sink_used}, messages),
            problems=self._problems,
        )

    def _listen(self, is_over: Callable[[], object], timeout_s: float, on_tick: Callable[[Progress], None]) -> None:
        """Take lines until it is over, with progress each second; LoadError when the time is."""
        deadline = time.monotonic() + timeout_s
        next_s = 1.0 + _LATE_S
        while not is_over():
            if time.monotonic() > deadline:
                raise LoadError(f"load processes did not end within {timeout_s:.0f} s")
            try:
                process, line = self._lines.get(timeout=_TICK_S)
            except queue.Empty:
                process = line = None
            if line is not None:
                process.note(line)
            elif process is not None and process.end is None:
                raise LoadError(f"a load process ended: {process.last_words()}")
            elapsed_s = (time.monotonic_ns() - self._begin_ns) / _NS
            if self._begin_ns and elapsed_s >= next_s:
                next_s = int(elapsed_s) + 1.0 + _LATE_S
                progress = self._progress(elapsed_s)
                self._say(progress)
                on_tick(progress)

    def _progress(self, elapsed_s: float) -> Progress:
        latest = [process.latest for process in self._processes]
        return Progress(
            elapsed_s,
            sum(line["begun"] for line in latest),
            sum(line["answered"] for line in latest),
            self._sink.arrived([process.job.stream for process in self._processes]),
            sum(line["open"] for line in latest),
            sum(sum(line["errors"].values()) for line in latest),
            percentiles(merge(process.dot.total() for process in self._processes)),
        )

    def _wait_for_arrival(self, streams: Sequence[Stream]) -> None:
        arriving = {stream.name for stream in streams if stream.arrives and stream.is_mail}
        processes = [process for process in self._processes if process.name in arriving]
        expected = sum(process.latest["answered"] for process in processes)
        self._sink.wait_for([process.job.stream for process in processes], expected, self._patience_s)

    def _clients_cpu_s(self) -> float:
        return sum(float(process.end["cpu_s"]) for process in self._processes if process.end)

    def _result(self, stream: Stream, folder: Path) -> StreamResult:
        processes = [process for process in self._processes if process.name == stream.name]
        numbers = [process.job.stream for process in processes]
        verdict = add_verdicts([self._verdict(stream, process, folder) for process in processes])
        unanswered = sum(process.end["unanswered"] for process in processes if process.end)
        self._judge(stream, verdict, unanswered, processes)
        timelines = {
            "connect": merge_timelines(process.connect for process in processes),
            "dot": merge_timelines(process.dot for process in processes),
            "message": merge_timelines(process.message for process in processes),
            "arrival": merge_timelines(self._sink.arrival.get(number, Timeline()) for number in numbers),
            **{kind: timeline for process in processes for kind, timeline in process.kinds.items()},
        }
        return StreamResult(
            is_mail=stream.is_mail,
            verdict=verdict,
            begun=sum(process.latest["begun"] for process in processes),
            unanswered=unanswered,
            errors=dict(sum((Counter(process.latest["errors"]) for process in processes), Counter())),
            answered_per_s=self._rate(verdict.answered, max(process.latest["last_ns"] for process in processes)),
            delivered_per_s=self._rate(verdict.arrived, self._sink.last_ns(numbers)),
            latency_ms={name: percentiles(timeline.total())._asdict() for name, timeline in timelines.items()},
            timeline=rows(self._begin_ns, timelines, [process.open_by_second for process in processes]),
        )

    def _verdict(self, stream: Stream, process: LoadProcess, folder: Path) -> Verdict:
        if not stream.is_mail:
            return Verdict(answered=process.latest["answered"], arrived=0, lost=0, duplicates=0)
        answered = Path(process.job.ledger_file).read_bytes()
        verdict = judge(answered, self._sink.ledger(process.job.stream, folder))
        return verdict if stream.arrives else replace(verdict, lost=0, first_lost=())

    def _judge(self, stream: Stream, verdict: Verdict, unanswered: int, processes: Sequence[LoadProcess]) -> None:
        if verdict.lost:
            numbers = ", ".join(map(str, verdict.first_lost))
            self._problems.append(
                f"{stream.name}: {verdict.lost} of {verdict.answered} answered messages did not arrive ({numbers} …)"
            )
        if unanswered:
            self._problems.append(f"{stream.name}: {unanswered} messages had no answer when the time was over")
        if not verdict.answered and not stream.job.idle:
            self._problems.append(f"{stream.name}: no message was answered with 250")
        for process in processes:
            if process.end and process.end["end"] != "done":
                self._problems.append(f"{stream.name}: a load process reached its {process.end['end']}")

    def _rate(self, count: int, last_ns: int) -> float:
        """Return messages a second from the begin to the last of them."""
        return round(count * _NS / (last_ns - self._begin_ns), 1) if last_ns > self._begin_ns else 0.0


def shares(stream: Stream, folder: Path) -> list[Job]:
    """Return a job for each process: sessions and messages are split evenly, the first ones take what is over."""
    # A share of no messages would be one without a bound.
    count = min(stream.processes, stream.job.sessions, stream.job.messages or stream.processes)
    jobs = []
    for index in range(count):
        number = next(_streams)
        jobs.append(
            replace(
                stream.job,
                stream=number,
                ledger_file=str(folder / f"answered-{number}"),
                sessions=_share(stream.job.sessions, count, index),
                messages=_share(stream.job.messages, count, index),
                rate=stream.job.rate / count,
            )
        )
    return jobs


def _share(whole: int, parts: int, index: int) -> int:
    return whole // parts + (1 if index < whole % parts else 0)


def _per_message(seconds: dict[str, float], messages: int) -> dict[str, float]:
    return {role: round(value / messages * 1_000_000, 1) for role, value in seconds.items()} if messages else {}
