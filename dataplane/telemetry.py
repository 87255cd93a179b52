"""Logs and metrics of a node: what the other modules import, and the one place that speaks to prometheus-client.

Contract. `configure_logging`, `get_logger` and `set_log_level` are those of `event_log`. `METRICS` is
every metric that a node exports; workers count in plain numbers and hand them to the agent as (name, label values,
value), and `render` turns the lot into the text of `/metrics`: samples of the same name and labels are added, or for a
gauge marked so the greatest counts. A sample that METRICS does not know raises KeyError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from dataplane.event_log import configure_logging, get_logger, set_log_level

__all__ = [
    "METRICS",
    "METRICS_CONTENT_TYPE",
    "MetricSpec",
    "SampleRow",
    "configure_logging",
    "get_logger",
    "render",
    "set_log_level",
]

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST


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
