"""Every metric that a node exports. docs/metrics.md says what each is good for; a test holds the two together.

A label has a closed set of values, written here, so that no series can be made up by what a client or a remote server
sends; the one exception is `process`, which has as many values as the node has processes. `merge` says what becomes of
several workers' gauges; counters and histograms are always added.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from dataplane.histogram import CALL_BOUNDS_S, LATENCY_BOUNDS_S, LIFETIME_BOUNDS_S

PROCESS = ("process",)
ENDS = ("sent", "deferred", "bounced", "failed", "expired", "uncertain", "interrupted")
CONNECTION_ENDS = ("accepted", "over_cap", "over_rate", "early_talker", "tls_failed", "timed_out", "failed")
QUEUE_STATES = ("queued", "processing", "deferred", "scheduled", "held", "failed")


class MetricSpec(NamedTuple):
    """A metric; `values` are all that its label may have, `bounds` those of a histogram's buckets."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    merge: Literal["sum", "max", "min"] = "sum"
    bounds: tuple[float, ...] = ()


def _counter(name: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> MetricSpec:
    return MetricSpec(name, "counter", text, (label,) if label else (), values)


def _gauge(
    name: str,
    text: str,
    label: str = "",
    values: tuple[str, ...] = (),
    merge: Literal["sum", "max", "min"] = "sum",
) -> MetricSpec:
    return MetricSpec(name, "gauge", text, (label,) if label else (), values, merge)


def _histogram(
    name: str, text: str, bounds: tuple[float, ...], label: str = "", values: tuple[str, ...] = ()
) -> MetricSpec:
    return MetricSpec(name, "histogram", text, (label,) if label else (), values, bounds=bounds)


METRICS: tuple[MetricSpec, ...] = (
    # submission
    _counter("smtp_connections_total", "Connections by what became of them", "status", CONNECTION_ENDS),
    _gauge("smtp_active_sessions", "SMTP sessions that are open"),
    _counter("smtp_message_enqueued_total", "Messages stored and answered 250"),
    _counter("smtp_messages_refused_total", "Messages refused for what they contain, after the dot"),
    _counter(
        "smtp_submission_keys_total",
        "Messages with an Idempotency-Key by what became of them",
        "result",
        ("stored", "unchecked", "repeated", "pending", "conflicting"),
    ),
    _counter("smtp_auth_attempts_total", "AUTH attempts", "result", ("succeeded", "failed", "throttled")),
    _histogram("smtp_enqueue_duration_seconds", "From the final dot to its answer", LATENCY_BOUNDS_S),
    _counter("smtp_commits_late_total", "Commits that outlasted the client's answer"),
    _counter("smtp_answers_delayed_total", "250s held back while memory or disk was strained"),
    _gauge("smtp_content_bytes", "Content and recipients in memory that clients are sending or that are being stored"),
    # the queue
    _gauge("queue_depth", "Recipients in the spools by state; failed are messages set aside", "status", QUEUE_STATES),
    _gauge("queue_oldest_age_seconds", "Age of the oldest message that waits", merge="max"),
    _histogram("queue_processing_duration_seconds", "From acceptance to a recipient's last state", LIFETIME_BOUNDS_S),
    _counter("queue_recovered_total", "Recipients found in mid-attempt at a start"),
    _counter("queue_quarantined_total", "Messages set aside because they could not be read back"),
    _counter(
        "duplicate_windows_total",
        "Recipients or messages that may be sent twice: W1 our answer was lost, W2 the remote's",
        "window",
        ("W1", "W2"),
    ),
    # delivery
    _counter("delivery_attempts_total", "Recipients of attempts that ended", "result", ENDS),
    _histogram(
        "delivery_stage_duration_seconds",
        "Time of an attempt by stage",
        LATENCY_BOUNDS_S,
        "stage",
        ("waiting", "connecting", "transferring"),
    ),
    _gauge("delivery_connections", "Connections to next hops"),
    _counter("delivery_connections_total", "Connections to next hops by result", "result", ("opened", "failed")),
    _counter("delivery_throttled_total", "Times that a destination was found dead"),
    _counter("delivery_limited_total", "Times that a limit let a message or a connection wait"),
    _gauge("delivery_window_bytes", "Memory of messages that were handed over or read back, recipients included"),
    _gauge("delivery_window_messages", "Messages that are in memory for delivery"),
    _counter("delivery_transactions_total", "SMTP transactions with next hops that began"),
    _counter("delivery_put_back_total", "Recipients returned to the queue without an attempt"),
    # spools and the ledger
    _counter("spool_write_failures_total", "Outcomes that the spool refused at first"),
    _gauge("spool_bytes", "Size of the spools", "file", ("database", "wal")),
    _counter("spool_commits_total", "Commits of the spools"),
    _gauge("spools_quarantined", "Spools set aside until the node starts again"),
    _gauge("ledger_unacknowledged_records", "Records that the control plane has not stored"),
    _gauge("ledger_lag_seconds", "Age of the oldest record that the control plane has not stored", merge="max"),
    _counter("handover_messages_total", "Messages handed over at a drain", "direction", ("given", "taken")),
    _counter("ledger_records_alone_total", "Acceptances that were recorded before any outcome"),
    # REPLICATED mail
    _gauge("replicated_lease_seconds", "Seconds that the shortest lease of the workers is good for", merge="min"),
    _counter(
        "replicated_messages_total",
        "Messages of the replicated queue: stored, refused with 451, claimed to be sent",
        "result",
        ("stored", "refused", "claimed"),
    ),
    _counter("replicated_leases_lost_total", "Leases that ended or were given up"),
    # limits
    _counter("limiter_decisions_total", "Questions to the limiter by who answered", "by", ("shared", "local")),
    _counter("limiter_over_admission_total", "Grants of local shares: what may be above a limit, at most"),
    _counter("limiter_trips_total", "Times that a server of limits was given up for a while"),
    _counter("limiter_lost_total", "Times that a server of limits had lost its buckets"),
    _gauge("limiter_shared", "Workers whose limits are shared"),
    _histogram("limiter_call_duration_seconds", "Round trips to the shared limiter", CALL_BOUNDS_S),
    # configuration and the control plane
    _gauge("config_age_seconds", "Time since the configuration was called current"),
    _gauge("config_stale", "1 while submission is refused for the configuration's age", merge="max"),
    _gauge("config_bundles", "Bundles in use"),
    _counter("config_refused_total", "Configuration answered with a refusal"),
    _gauge("denials_version", "Version of the denials in force"),
    _gauge("control_plane_connected_state", "1 while the stream is open", "stream", ("config", "ledger")),
    _gauge("tls_cert_expiry_days", "Days until the first of the node's certificates ends", merge="min"),
    _gauge("tls_certificate_days_left", "Days until a certificate ends", "certificate", ("node", "listeners")),
    # processes
    _gauge("workers_connected", "Workers that the agent hears from"),
    _gauge("workers_late", "Workers that did not answer the last question for their counters in time"),
    _histogram("event_loop_lag_seconds", "How late the loops of workers run what is due", LATENCY_BOUNDS_S),
    MetricSpec("process_restarts_total", "counter", "Starts of a process after its first", PROCESS),
    MetricSpec("process_resident_memory_bytes", "gauge", "Memory of a process", PROCESS),
    MetricSpec("process_open_fds", "gauge", "Open descriptors of a process", PROCESS),
    MetricSpec("process_cpu_seconds_total", "counter", "CPU time of a process", PROCESS),
)
