"""Every metric that a control plane exports. docs/metrics.md says what each is good for; a test holds the two together.

A label never has a value that a caller could make up: `path` is a gRPC method or the pattern of a route, `method` one
of HTTP_VERBS or `other`, `query` the name that a query has in the code.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

HTTP_VERBS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
UNKNOWN_PATH = "unknown"

_LATENCY_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class MetricSpec(NamedTuple):
    """A metric; `bounds` are those of a histogram's buckets."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("api_requests_total", "counter", "API calls that ended", ("method", "path", "status")),
    MetricSpec("api_request_duration_seconds", "histogram", "Duration of API calls", (), _LATENCY_BOUNDS_S),
    MetricSpec("api_auth_failures_total", "counter", "API calls refused for want of a good key"),
    MetricSpec("api_messages_total", "counter", "Messages that were to be sent by API", ("result",)),
    MetricSpec("db_connections_active", "gauge", "Connections to PostgreSQL in use"),
    MetricSpec("db_connections_idle", "gauge", "Connections to PostgreSQL at rest"),
    MetricSpec("db_query_duration_seconds", "histogram", "Duration of queries", ("query",), _LATENCY_BOUNDS_S),
    MetricSpec("db_errors_total", "counter", "Queries that failed", ("query",)),
    MetricSpec("config_streams", "gauge", "Open configuration streams of nodes"),
    MetricSpec("config_answers_total", "counter", "Answers of nodes to configuration", ("answer",)),
    MetricSpec("ledger_records_total", "counter", "Ledger records", ("result",)),
    MetricSpec("audit_comparisons_total", "counter", "Comparisons of a spool with the ledger that were completed"),
    MetricSpec("audit_findings", "gauge", "What is wrong with the books now; told by the leader", ("kind",)),
    MetricSpec("audit_age_seconds", "gauge", "Since a spool was last compared; told by the leader", ("spool",)),
    MetricSpec("ledger_duplicates_total", "counter", "Messages that two spools stored under one Idempotency-Key"),
    MetricSpec("replicated_queue_changes_total", "counter", "What became of mail in the replicated queue", ("change",)),
    MetricSpec(
        "handover_given_total", "counter", "Messages of draining nodes that were given to a spool, again included"
    ),
    MetricSpec("handover_waiting", "gauge", "Messages that their node gave up and no other one has yet"),
    MetricSpec("handover_oldest_age_seconds", "gauge", "Since the first of them was given up; 0 for none"),
    MetricSpec("leader", "gauge", "1 while this process runs the jobs"),
    MetricSpec("job_errors_total", "counter", "Runs of jobs that failed", ("job",)),
    MetricSpec("tls_cert_expiry_days", "gauge", "Days until the first certificate of this process ends"),
    MetricSpec("tls_certificate_days_left", "gauge", "Days until a certificate ends", ("certificate",)),
    MetricSpec("event_loop_lag_seconds", "histogram", "How late the loop runs what is due", (), _LATENCY_BOUNDS_S),
)
# What prometheus-client tells of a process by itself.
PROCESS_METRICS = (
    "process_virtual_memory_bytes",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_cpu_seconds_total",
    "process_open_fds",
    "process_max_fds",
)
