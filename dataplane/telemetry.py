"""Logs and metrics of a node: the one place that speaks to structlog and prometheus-client.

Contract. `configure_logging` sends one JSON line per event to standard error, for our loggers and those of
libraries; a field that by its name may hold a secret or content is not written, and what looks like one of
our keys is struck out of the line. A line that cannot be written (the disk is full, the reader of a pipe left) is
lost, and raises nothing. `get_logger` gives a logger whose events have stable names
(`message.accepted`, `config.applied`). `METRICS` is every metric that a node exports; workers count in plain
numbers and hand them to the agent as (name, label values, value), and `render` turns the lot into the text of
`/metrics`: samples of the same name and labels are added, or for a gauge marked so the greatest counts. A
sample that METRICS does not know raises KeyError.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import orjson
import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_NEVER_WRITTEN = frozenset(
    {"password", "secret", "token", "authorization", "key", "content", "body", "data", "argument", "arguments"}
)
_OUR_KEYS = re.compile(rb"pr[ks]_[A-Za-z0-9_-]+")

Logger = structlog.typing.FilteringBoundLogger


def configure_logging(level: str, process: str, stream: BinaryIO | None = None) -> None:
    """Log from `level` on to `stream`, standard error by default; every line names the `process`."""
    out = cast("BinaryIO", _Lines(stream or sys.stderr.buffer))
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
            _render_line,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.BytesLoggerFactory(out),
        cache_logger_on_first_use=True,
    )
    handler = _LibraryHandler(process)
    logging.basicConfig(handlers=[handler], level=max(_LEVELS[level], logging.WARNING), force=True)


def get_logger(process: str) -> Logger:
    """A logger whose lines carry `process`."""
    logger: Logger = structlog.get_logger(process=process)
    return logger


def _render_line(logger: Any, method: str, event: MutableMapping[str, Any]) -> bytes:
    del logger, method
    if not _NEVER_WRITTEN.isdisjoint(event):
        event = {name: value for name, value in event.items() if name not in _NEVER_WRITTEN}
    line = orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS)
    if b"prs_" in line or b"prk_" in line:
        return _OUR_KEYS.sub(b"***", line)
    return line


class _Lines:
    """A stream for log lines that fails in silence: between a commit and its 250 there is a line, too."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, line: bytes) -> int:
        """Write the line if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.write(line)
        return len(line)

    def flush(self) -> None:
        """Flush if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()


class _LibraryHandler(logging.Handler):
    """Lines of other libraries in the shape of ours."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def emit(self, record: logging.LogRecord) -> None:
        write = structlog.get_logger(process=self._process, library=record.name)
        exc_info = record.exc_info if record.exc_info and record.exc_info[0] else None
        write.log(max(record.levelno, logging.DEBUG), "library.log", text=record.getMessage(), exc_info=exc_info)


class MetricSpec(NamedTuple):
    """A metric: `merge` says what becomes of several workers' gauges (counters are always added)."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()
    merge: Literal["sum", "max"] = "sum"


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("smtp_connections_total", "counter", "Connections by what became of them", ("status",)),
    MetricSpec("smtp_active_sessions", "gauge", "SMTP sessions that are open"),
    MetricSpec("smtp_message_enqueued_total", "counter", "Messages answered 250"),
    MetricSpec("smtp_auth_attempts_total", "counter", "AUTH attempts", ("result",)),
    MetricSpec("queue_depth", "gauge", "Recipients that wait in the spools", ("status",)),
    MetricSpec("queue_oldest_age_seconds", "gauge", "Age of the oldest waiting message", merge="max"),
    MetricSpec("delivery_attempts_total", "counter", "Recipients of attempts that ended", ("result",)),
    MetricSpec("delivery_connections", "gauge", "Connections to next hops"),
    MetricSpec("delivery_connections_total", "counter", "Connections to next hops by result", ("result",)),
    MetricSpec("delivery_throttled_total", "counter", "Times that a destination was found dead"),
    MetricSpec("delivery_window_bytes", "gauge", "Content held in memory for delivery"),
    MetricSpec("queue_recovered_total", "counter", "Recipients found in mid-attempt at a start (window W2)"),
    MetricSpec("spool_write_failures_total", "counter", "Outcomes that the spool refused at first"),
    MetricSpec("spool_bytes", "gauge", "Size of the spools", ("file",)),
    MetricSpec("spool_commits_total", "counter", "Commits of the spools since they were opened"),
    MetricSpec("ledger_unacknowledged_records", "gauge", "Records that the control plane has not stored"),
    MetricSpec("config_age_seconds", "gauge", "Time since the configuration was called current"),
    MetricSpec("config_stale", "gauge", "1 while submission is refused for the configuration's age", merge="max"),
    MetricSpec("config_bundles", "gauge", "Bundles in use"),
    MetricSpec("config_refused_total", "counter", "Configuration answered with a refusal"),
    MetricSpec("denials_version", "gauge", "Version of the denials in force"),
    MetricSpec("control_plane_connected_state", "gauge", "1 while the stream is open", ("stream",)),
    MetricSpec("workers_connected", "gauge", "Workers that the agent hears from"),
    MetricSpec("event_loop_lag_seconds", "gauge", "How late the worst worker's loop is now", merge="max"),
    MetricSpec("tls_cert_expiry_days", "gauge", "Days until a certificate ends", ("certificate",), "max"),
)
_SPECS = {spec.name: spec for spec in METRICS}

SampleRow = tuple[str, tuple[str, ...], float]


def render(samples: Iterable[SampleRow]) -> bytes:
    """The text of `/metrics`; metrics without a sample are left out."""
    merged: dict[str, dict[tuple[str, ...], float]] = {}
    for name, labels, value in samples:
        values = merged.setdefault(_SPECS[name].name, {})
        join: Callable[[float, float], float] = max if _SPECS[name].merge == "max" else float.__add__
        values[labels] = join(values[labels], float(value)) if labels in values else float(value)
    registry = CollectorRegistry()
    registry.register(_Snapshot(merged))
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, merged: dict[str, dict[tuple[str, ...], float]]) -> None:
        self._merged = merged

    def collect(self) -> Iterator[Metric]:
        for spec in METRICS:
            if spec.name in self._merged:
                family: CounterMetricFamily | GaugeMetricFamily = (
                    CounterMetricFamily(spec.name, spec.help, labels=spec.labels)
                    if spec.kind == "counter"
                    else GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)
                )
                for labels, value in sorted(self._merged[spec.name].items()):
                    family.add_metric(labels, value)
                yield family
