"""Metrics of a node are what METRICS says."""

from __future__ import annotations

import pytest

from dataplane.telemetry import METRICS, render


def test_samples_of_several_workers_are_added_and_some_gauges_take_the_greatest() -> None:
    text = render(
        [
            ("smtp_connections_total", ("accepted",), 2),
            ("smtp_connections_total", ("accepted",), 3),
            ("event_loop_lag_seconds", (), 0.5),
            ("event_loop_lag_seconds", (), 0.25),
        ]
    ).decode()
    assert 'smtp_connections_total{status="accepted"} 5.0' in text
    assert "event_loop_lag_seconds 0.5" in text
    assert "queue_depth" not in text


def test_a_sample_that_is_no_metric_of_ours_is_a_bug() -> None:
    with pytest.raises(KeyError):
        render([("no_such_metric", (), 1)])


def test_every_metric_can_be_exported() -> None:
    text = render([(spec.name, ("x",) * len(spec.labels), 1) for spec in METRICS]).decode()
    for spec in METRICS:
        assert f"# TYPE {spec.name} {spec.kind}" in text
