"""Streams of load, and what came of them: values that the table, the JSON and the plot are made from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.load.job import Job
from benchmarks.load.latency import Timeline, merge, percentiles
from benchmarks.load.ledgers import Verdict

NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Stream:
    """Load of one kind: a job for all its processes together, and the module that runs it.

    `is_mail` is False for requests that are no messages; `arrives` whether what is answered must arrive at the sink.
    """

    name: str
    job: Job
    processes: int = 1
    arrives: bool = True
    is_mail: bool = True
    module: str = "benchmarks.load.generator"


@dataclass(slots=True)
class StreamResult:
    """What came of a stream. Latencies in milliseconds; `timeline` has a row a second."""

    is_mail: bool
    verdict: Verdict
    begun: int
    unanswered: int
    errors: dict[str, int]
    answered_per_s: float
    delivered_per_s: float
    latency_ms: dict[str, dict[str, float]]
    timeline: list[dict[str, float]]


@dataclass(slots=True)
class RunResult:
    """One run of one peer. CPU in seconds, and in microseconds a message that was answered; memory in bytes.

    `findings` are a scenario's own; `recorded` counts the messages of the run in the control plane's records, where
    there are any.
    """

    peer: str
    seconds: float
    streams: dict[str, StreamResult]
    # Cores that processes which have nothing to do with the run kept busy meanwhile.
    others_cores: float
    cpu_s: dict[str, float]
    cpu_us_per_message: dict[str, float]
    load_cpu_us_per_message: dict[str, float]
    phase: str = "load"
    recorded: int | None = None
    dead_target_connections: int | None = None
    findings: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def merge_timelines(many: Iterable[Timeline]) -> Timeline:
    """Return the sum by second."""
    merged = Timeline()
    for timeline in many:
        for second, buckets in timeline.seconds.items():
            merged.seconds[second] = merge([merged.seconds.get(second, {}), buckets])
    return merged


def rows(
    begin_ns: int, timelines: dict[str, Timeline], open_by_second: Sequence[dict[int, int]]
) -> list[dict[str, float]]:
    """Return a row for each second from the begin to the last in which something ended."""
    begin = begin_ns // NS
    dots, messages, arrivals = (timelines[name].seconds for name in ("dot", "message", "arrival"))
    last = max([begin, *dots, *arrivals, *(second for seconds in open_by_second for second in seconds)])
    made = []
    for second in range(begin, last + 1):
        dot = percentiles(dots.get(second, {}))
        made.append(
            {
                "second": second - begin,
                "answered": dot.values,
                "arrived": sum(arrivals.get(second, {}).values()),
                "open": sum(seconds.get(second, 0) for seconds in open_by_second),
                "dot_p50_ms": dot.p50,
                "dot_p95_ms": dot.p95,
                "dot_p99_ms": dot.p99,
                "dot_max_ms": dot.max,
                "message_p95_ms": percentiles(messages.get(second, {})).p95,
            }
        )
    return made
