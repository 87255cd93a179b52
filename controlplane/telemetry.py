"""Logs and metrics of the control plane: the one place that speaks to structlog and prometheus-client.

Contract. `configure_logging` sends one JSON line per event to standard error; one that cannot be written is lost, and
raises nothing. `get_logger` gives a logger whose events have stable names (`config.acked`, `ledger.refused`).
`Metrics` holds every metric of the process in a registry of its own, so that two of them in one process do not clash;
its methods take plain values and never raise on them. `render` is the text of `/metrics`. Nothing here sees a
credential or a message body.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

import orjson
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def configure_logging(level: str, stream: TextIO | None = None) -> None:
    """Log from `level` on to `stream`, standard error by default; the standard library's loggers too."""
    out = cast("TextIO", _Lines(stream or sys.stderr))
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(_JsonFormatter())
    logging.basicConfig(handlers=[handler], level=max(_LEVELS[level], logging.WARNING), force=True)


def get_logger(component: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry `component`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(component=component)
    return logger


def _to_json(value: Any, default: Callable[[Any], Any] | None = None, **_: Any) -> str:
    return orjson.dumps(value, default=default or str, option=orjson.OPT_NON_STR_KEYS).decode()


class _Lines:
    """A stream for log lines that fails in silence: no call may fail for want of somebody to tell."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: str) -> int:
        """Write the line if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.write(line)
        return len(line)

    def flush(self) -> None:
        """Flush if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()


class _JsonFormatter(logging.Formatter):
    """Lines of other libraries in the shape of ours."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"event": "library.log", "component": record.name, "level": record.levelname.lower()}
        line["text"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _to_json(line)


class Metrics:
    """Every metric of one control plane."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._requests = Counter(
            "api_requests_total", "API calls that ended", ["method", "path", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "api_request_duration_seconds",
            "Duration of API calls",
            ["path"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._auth_failures = Counter(
            "api_auth_failures_total", "API calls refused for want of a good key", registry=registry
        )
        self._active = Gauge("db_connections_active", "Connections in use", ["role"], registry=registry)
        self._idle = Gauge("db_connections_idle", "Connections at rest", ["role"], registry=registry)
        self._query_seconds = Histogram(
            "db_query_duration_seconds",
            "Duration of database work by name",
            ["query"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._query_errors = Counter("db_errors_total", "Database work that failed", ["query"], registry=registry)
        self._streams = Gauge("config_streams", "Open configuration streams of nodes", registry=registry)
        self._answers = Counter(
            "config_answers_total", "Answers of nodes to configuration", ["answer"], registry=registry
        )
        self._records = Counter("ledger_records_total", "Ledger records", ["result"], registry=registry)
        self._leading = Gauge("leader", "1 while this process runs the jobs", registry=registry)
        self._job_errors = Counter("job_errors_total", "Runs of jobs that failed", ["job"], registry=registry)
        self._certificate_days = Gauge(
            "tls_cert_expiry_days", "Days until a certificate ends", ["certificate"], registry=registry
        )

    def request_ended(self, method: str, path: str, status: str, seconds: float) -> None:
        """An API call ended: `method` is POST for gRPC or the HTTP verb, `path` the RPC's full name."""
        self._requests.labels(method, path, status).inc()
        self._request_seconds.labels(path).observe(seconds)
        if status == "UNAUTHENTICATED":
            self._auth_failures.inc()

    def query_ended(self, query: str, seconds: float, failed: bool) -> None:  # noqa: FBT001 - an observer's shape
        """Database work of a fixed name ended."""
        self._query_seconds.labels(query).observe(seconds)
        if failed:
            self._query_errors.labels(query).inc()

    def pool_sampled(self, role: str, active: int, idle: int) -> None:
        """What a connection pool holds now."""
        self._active.labels(role).set(active)
        self._idle.labels(role).set(idle)

    def streams_sampled(self, count: int) -> None:
        """How many nodes are connected to this process."""
        self._streams.set(count)

    def config_answered(self, answer: str) -> None:
        """A node answered `ack` or `nack`."""
        self._answers.labels(answer).inc()

    def records_ingested(self, stored: int, rejected: int) -> None:
        """A transaction of ledger records was committed."""
        self._records.labels("stored").inc(stored)
        self._records.labels("rejected").inc(rejected)

    def leading(self, *, now: bool) -> None:
        """Whether this process is the leader."""
        self._leading.set(1 if now else 0)

    def job_failed(self, job: str) -> None:
        """A job's run raised."""
        self._job_errors.labels(job).inc()

    def certificate_sampled(self, certificate: str, days_left: float) -> None:
        """How long a certificate is good for."""
        self._certificate_days.labels(certificate).set(days_left)

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self._registry)
