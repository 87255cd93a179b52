"""Logs and metrics of the control plane: the one place that speaks to structlog and prometheus-client.

Contract. `configure_logging` sends one JSON line per event to standard error; one that cannot be written is lost, and
raises nothing. `get_logger` gives a logger whose events have stable names (`config.acked`, `ledger.refused`).
`Metrics` holds every metric of `metric_table` in a registry of its own, so that two of them in one process do not
clash; its methods take plain values and never raise on them. `render` is the text of `/metrics`. Nothing here sees a
credential or a message body.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO, cast

import orjson
import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from controlplane.domain.acceptance import Accepted
from controlplane.domain.books import FindingKind
from controlplane.metric_table import HTTP_VERBS, METRICS, MetricSpec
from controlplane.ports_fleet import BookHealth
from controlplane.ports_queue import HandoverCounts
from dataplane.core.ids import format_message_id

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_UNAUTHORIZED = 401


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


class SendingReports:
    """`ports_sending.SendingObserver`: a line of the log for each message that was accepted, and counters of all."""

    def __init__(self, ended: Callable[[str], None], log: structlog.typing.FilteringBoundLogger) -> None:
        self.ended = ended
        self._log = log

    def accepted(self, message: Accepted) -> None:
        """A message is stored."""
        envelope = message.envelope
        self._log.info(
            "message.accepted",
            session=envelope.session,
            message=format_message_id(envelope.message_id),
            account=envelope.account,
            credential=envelope.credential,
            recipients=len(message.recipients),
            size_bytes=envelope.size_bytes,
        )


class Metrics:
    """Every metric of one control plane."""

    def __init__(self) -> None:
        # For the whole process, and that is meant: a second series for each counter that nobody asked for.
        disable_created_metrics()  # type: ignore[no-untyped-call] # prometheus-client's
        registry = CollectorRegistry()
        self._registry = registry
        self._counters = {spec.name: _counter(spec, registry) for spec in METRICS if spec.kind == "counter"}
        self._gauges = {spec.name: _gauge(spec, registry) for spec in METRICS if spec.kind == "gauge"}
        self._histograms = {spec.name: _histogram(spec, registry) for spec in METRICS if spec.kind == "histogram"}
        ProcessCollector(registry=registry)

    def call_ended(self, method: str, status: str, seconds: float | None) -> None:
        """A gRPC call ended: the method's full name, the name of its status, seconds unless it streamed."""
        self._request_ended("POST", method, status, seconds, refused=status == "UNAUTHENTICATED")

    def request_ended(self, verb: str, path: str, status: int, seconds: float | None) -> None:
        """The same of the JSON API; `path` is the pattern of the route, UNKNOWN_PATH for none."""
        method = verb if verb in HTTP_VERBS else "other"
        self._request_ended(method, path, str(status), seconds, refused=status == _UNAUTHORIZED)

    def _request_ended(self, method: str, path: str, status: str, seconds: float | None, *, refused: bool) -> None:
        self._counters["api_requests_total"].labels(method, path, status).inc()
        if seconds is not None:
            self._histograms["api_request_duration_seconds"].observe(seconds)
        if refused:
            self._counters["api_auth_failures_total"].inc()

    def query_ended(self, query: str, seconds: float, failed: bool) -> None:  # noqa: FBT001 - an observer's shape
        """Database work of a fixed name ended."""
        self._histograms["db_query_duration_seconds"].labels(query).observe(seconds)
        if failed:
            self._counters["db_errors_total"].labels(query).inc()

    def pools_sampled(self, active: int, idle: int) -> None:
        """What the connection pools hold now."""
        self._gauges["db_connections_active"].set(active)
        self._gauges["db_connections_idle"].set(idle)

    def streams_sampled(self, count: int) -> None:
        """How many nodes are connected to this process."""
        self._gauges["config_streams"].set(count)

    def loop_sampled(self, late_s: float) -> None:
        """How late the loop ran what was due."""
        self._histograms["event_loop_lag_seconds"].observe(late_s)

    def config_answered(self, answer: str) -> None:
        """A node answered `ack` or `nack`."""
        self._counters["config_answers_total"].labels(answer).inc()

    def records_ingested(self, stored: int, rejected: int) -> None:
        """A transaction of ledger records was committed."""
        records = self._counters["ledger_records_total"]
        records.labels("stored").inc(stored)
        records.labels("rejected").inc(rejected)

    def books_compared(self) -> None:
        """A spool was compared with the ledger."""
        self._counters["audit_comparisons_total"].inc()

    def books_sampled(self, health: BookHealth) -> None:
        """How the books are."""
        for kind in FindingKind:
            self._gauges["audit_findings"].labels(kind.name.lower()).set(health.findings.get(kind, 0))
        # A spool that is gone tells nothing any more.
        self._gauges["audit_age_seconds"].clear()
        for spool, age_s in health.ages_s.items():
            self._gauges["audit_age_seconds"].labels(spool).set(age_s)

    def handed_over(self, count: int) -> None:
        """So many messages were given to a spool."""
        self._counters["handover_given_total"].inc(count)

    def handovers_counted(self, counts: HandoverCounts) -> None:
        """How much mail nobody has."""
        self._gauges["handover_waiting"].set(counts.message_count)
        self._gauges["handover_oldest_age_seconds"].set(counts.oldest_age_s)

    def duplicate_found(self) -> None:
        """Two spools stored messages with one Idempotency-Key."""
        self._counters["ledger_duplicates_total"].inc()

    def message_ended(self, result: str) -> None:
        """A message that was to be sent by API was `accepted`, `repeated`, `refused` or `limited`."""
        self._counters["api_messages_total"].labels(result).inc()

    def queue_changed(self, change: str, count: int) -> None:
        """Something became of so many messages of the replicated queue."""
        self._counters["replicated_queue_changes_total"].labels(change).inc(count)

    def leading(self, *, now: bool) -> None:
        """Whether this process is the leader; what only the leader tells ends with that."""
        self._gauges["leader"].set(1 if now else 0)
        if not now:
            for name in ("audit_findings", "audit_age_seconds"):
                self._gauges[name].clear()

    def job_failed(self, job: str) -> None:
        """A job's run raised."""
        self._counters["job_errors_total"].labels(job).inc()

    def certificates_sampled(self, days_left: Mapping[str, float]) -> None:
        """How long each certificate is good for."""
        for certificate, days in days_left.items():
            self._gauges["tls_certificate_days_left"].labels(certificate).set(days)
        self._gauges["tls_cert_expiry_days"].set(min(days_left.values()))

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self._registry)


def _counter(spec: MetricSpec, registry: CollectorRegistry) -> Counter:
    return Counter(spec.name, spec.help, spec.labels, registry=registry)


def _gauge(spec: MetricSpec, registry: CollectorRegistry) -> Gauge:
    return Gauge(spec.name, spec.help, spec.labels, registry=registry)


def _histogram(spec: MetricSpec, registry: CollectorRegistry) -> Histogram:
    return Histogram(spec.name, spec.help, spec.labels, buckets=spec.bounds, registry=registry)
