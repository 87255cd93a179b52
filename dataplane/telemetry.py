"""Logs and metrics of a node: what the other modules import, and the one place that speaks to prometheus-client.

Contract. `configure_logging`, `get_logger`, `name_node` and `set_log_level` are those of `event_log`, `METRICS` is that
of `metric_table`. Workers count in plain numbers and hand them to the agent as (name, label values, value); `merge`
adds samples of the same name and labels, or takes the greatest or least of gauges marked so, and `render` turns the lot
into the text of `/metrics`. A sample that METRICS does not know, with a label value that it does not know, or a
histogram of another number of buckets raises KeyError, ValueError or TypeError: our own bug.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from dataplane.event_log import configure_logging, get_logger, name_node, set_log_level
from dataplane.metric_table import METRICS, MetricSpec

__all__ = [
    "METRICS",
    "METRICS_CONTENT_TYPE",
    "MetricSpec",
    "SampleRow",
    "SampleValue",
    "configure_logging",
    "get_logger",
    "is_cumulative",
    "merge_values",
    "name_node",
    "render",
    "set_log_level",
]

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST

SampleValue = float | tuple[float, ...]
SampleRow = tuple[str, tuple[str, ...], SampleValue]

_SPECS = {spec.name: spec for spec in METRICS}
_CUMULATIVE = frozenset(spec.name for spec in METRICS if spec.kind != "gauge")
_Merged = dict[str, dict[tuple[str, ...], SampleValue]]


def is_cumulative(name: str) -> bool:
    """Whether the metric only grows: then what an ended process counted still counts."""
    return name in _CUMULATIVE


def merge_values(name: str, one: SampleValue, other: SampleValue) -> SampleValue:
    """One value of two of the same metric and labels."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return tuple(map(sum, zip(one, other, strict=True)))
    if isinstance(one, tuple) or isinstance(other, tuple):
        raise TypeError(f"{name} comes as a number and as a histogram")
    match _SPECS[name].merge:
        case "max":
            return max(one, other)
        case "min":
            return min(one, other)
        case "sum":
            return one + other


def render(samples: Iterable[SampleRow]) -> bytes:
    """The text of `/metrics`; metrics without a sample are left out."""
    merged: _Merged = {}
    for name, labels, value in samples:
        _check(_SPECS[name], labels, value)
        values = merged.setdefault(name, {})
        values[labels] = merge_values(name, values[labels], value) if labels in values else value
    registry = CollectorRegistry()
    registry.register(_Snapshot(merged))
    return generate_latest(registry)


def _check(spec: MetricSpec, labels: tuple[str, ...], value: SampleValue) -> None:
    if len(labels) != len(spec.labels) or (spec.values and labels[0] not in spec.values):
        raise ValueError(f"{spec.name} has no labels {labels}")
    numbers = len(value) if isinstance(value, tuple) else 0
    # A count for each bound and one above them, and the sum.
    if numbers != (len(spec.bounds) + 2 if spec.kind == "histogram" else 0):
        raise ValueError(f"{spec.name} came with {numbers} numbers")


class _Snapshot(Collector):
    def __init__(self, merged: _Merged) -> None:
        self._merged = merged

    def collect(self) -> Iterator[Metric]:
        for spec in METRICS:
            if spec.name in self._merged:
                yield _family(spec, sorted(self._merged[spec.name].items()))


def _family(spec: MetricSpec, rows: list[tuple[tuple[str, ...], SampleValue]]) -> Metric:
    if spec.kind == "histogram":
        histogram = HistogramMetricFamily(spec.name, spec.help, labels=spec.labels)
        for labels, value in rows:
            if isinstance(value, tuple):
                histogram.add_metric(labels, _buckets(spec, value), value[-1])
        return histogram
    make = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    family = make(spec.name, spec.help, labels=spec.labels)
    for labels, value in rows:
        if not isinstance(value, tuple):
            family.add_metric(labels, value)
    return family


def _buckets(spec: MetricSpec, row: tuple[float, ...]) -> list[tuple[str, float]]:
    """Prometheus's buckets hold what is below them, too."""
    names = [*map(str, spec.bounds), "+Inf"]
    return list(zip(names, accumulate(row[:-1]), strict=True))
