"""Metrics of a node are what METRICS says: names, label values, buckets, and how workers' samples become one."""

from __future__ import annotations

import re

import pytest

from dataplane.histogram import LATENCY_BOUNDS_S, Histogram
from dataplane.telemetry import METRICS, MetricSpec, SampleRow, SampleValue, render

SECRETS_AND_ADDRESSES = ("prs_x", "a@example.com", "0190a1b2c3d4e5f60718293a4b5c6d7e", "192.0.2.1", "accounts/demo")


def value_of(spec: MetricSpec) -> SampleValue:
    return Histogram(spec.bounds).row if spec.kind == "histogram" else 1.0


def labels_of(spec: MetricSpec) -> tuple[str, ...]:
    return (spec.values[0] if spec.values else "worker-0",) if spec.labels else ()


def test_samples_of_several_workers_are_added_and_some_gauges_take_the_greatest_or_least() -> None:
    text = render(
        [
            ("smtp_connections_total", ("accepted",), 2),
            ("smtp_connections_total", ("accepted",), 3),
            ("ledger_lag_seconds", (), 0.5),
            ("ledger_lag_seconds", (), 0.25),
            ("tls_cert_expiry_days", (), 80),
            ("tls_cert_expiry_days", (), 9),
        ]
    ).decode()
    assert 'smtp_connections_total{status="accepted"} 5.0' in text
    assert "ledger_lag_seconds 0.5" in text
    assert "tls_cert_expiry_days 9.0" in text
    assert "queue_depth" not in text


def test_histograms_of_several_workers_are_added_bucket_by_bucket() -> None:
    one, other = Histogram(LATENCY_BOUNDS_S), Histogram(LATENCY_BOUNDS_S)
    one.observe(0.003)
    other.observe(0.003)
    other.observe(99.0)
    name = "smtp_enqueue_duration_seconds"
    text = render([(name, (), one.row), (name, (), other.row)]).decode()
    assert f'{name}_bucket{{le="0.002"}} 0.0' in text
    assert f'{name}_bucket{{le="0.005"}} 2.0' in text
    assert f'{name}_bucket{{le="30.0"}} 2.0' in text
    assert f'{name}_bucket{{le="+Inf"}} 3.0' in text
    assert f"{name}_count 3.0" in text
    assert f"{name}_sum 99.006" in text


@pytest.mark.parametrize(("value", "bucket"), [(0.0, 0), (0.001, 0), (0.0011, 1), (30.0, 17), (30.1, 18)])
def test_a_bound_belongs_to_the_bucket_below_it(value: float, bucket: int) -> None:
    histogram = Histogram(LATENCY_BOUNDS_S)
    histogram.observe(value)
    assert histogram.row[bucket] == 1
    assert sum(histogram.row[:-1]) == 1


def test_bounds_ascend() -> None:
    for spec in METRICS:
        assert list(spec.bounds) == sorted(set(spec.bounds)), spec.name
        assert bool(spec.bounds) == (spec.kind == "histogram"), spec.name


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (("no_such_metric", (), 1.0), KeyError),
        (("smtp_active_sessions", ("extra",), 1.0), ValueError),
        (("queue_depth", (), 1.0), ValueError),
        (("queue_depth", ("a@example.com",), 1.0), ValueError),
        (("smtp_enqueue_duration_seconds", (), 1.0), ValueError),
        (("smtp_enqueue_duration_seconds", (), (1.0, 2.0)), ValueError),
        (("smtp_active_sessions", (), (1.0, 2.0)), ValueError),
    ],
)
def test_a_sample_that_is_no_metric_of_ours_is_a_bug(row: SampleRow, error: type[Exception]) -> None:
    with pytest.raises(error):
        render([row])


@pytest.mark.parametrize("spec", [spec for spec in METRICS if spec.values], ids=lambda spec: spec.name)
@pytest.mark.parametrize("value", SECRETS_AND_ADDRESSES)
def test_no_label_takes_an_address_a_message_or_a_credential(spec: MetricSpec, value: str) -> None:
    with pytest.raises(ValueError, match=spec.name):
        render([(spec.name, (value,), value_of(spec))])


def test_only_processes_are_labels_without_a_list_of_values() -> None:
    assert {spec.labels for spec in METRICS if spec.labels and not spec.values} == {("process",)}


def test_every_metric_can_be_exported_under_its_name_and_kind() -> None:
    text = render([(spec.name, labels_of(spec), value_of(spec)) for spec in METRICS]).decode()
    for spec in METRICS:
        assert f"# TYPE {spec.name} {spec.kind}" in text


def test_names_follow_the_custom_of_prometheus() -> None:
    for spec in METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]+", spec.name)
        assert spec.name.endswith("_total") == (spec.kind == "counter"), spec.name
