"""docs/metrics.md and the code tell of the same metrics: names, types, labels and their values, in both directions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import controlplane.metric_table
import dataplane.metric_table

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
NODE, CONTROL_PLANE = DOCUMENT.split("\n## Node\n")[1].split("\n## Control plane\n")


class Documented(NamedTuple):
    kind: str
    labels: tuple[str, ...]
    values: tuple[str, ...]
    meaning: str


def documented(text: str) -> dict[str, Documented]:
    rows = {}
    for line in text.splitlines():
        match = re.match(r"\| `([a-z0-9_]+)` \| (\w+) \| (.*?) ?\| (.+?) \| (?:(.+?) )?\|$", line)
        if match is not None:
            name, kind, labels, meaning = match.group(1, 2, 3, 4)
            assert name not in rows, f"{name} stands there twice"
            if ":" in labels:
                label, values = labels.split(":")
                rows[name] = Documented(kind, (label.strip("` "),), tuple(re.findall(r"`(\w+)`", values)), meaning)
            else:
                rows[name] = Documented(kind, tuple(re.findall(r"`(\w+)`", labels)), (), meaning)
    return rows


def test_every_row_is_read() -> None:
    lines = [line for line in DOCUMENT.splitlines() if line.startswith("| `")]
    assert len(lines) == len(documented(NODE)) + len(documented(CONTROL_PLANE))


def test_the_metrics_of_a_node_are_documented_as_they_are() -> None:
    assert {name: row[:3] for name, row in documented(NODE).items()} == {
        spec.name: (spec.kind, spec.labels, spec.values) for spec in dataplane.metric_table.METRICS
    }


def test_the_metrics_of_a_control_plane_are_documented_as_they_are() -> None:
    assert {name: row[:2] for name, row in documented(CONTROL_PLANE).items()} == {
        spec.name: (spec.kind, spec.labels) for spec in controlplane.metric_table.METRICS
    }
    for name in controlplane.metric_table.PROCESS_METRICS:
        assert f"`{name}`" in CONTROL_PLANE


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("smtp_connections_total", ("status",)),
        ("smtp_active_sessions", ()),
        ("smtp_message_enqueued_total", ()),
        ("smtp_auth_attempts_total", ("result",)),
        ("api_requests_total", ("method", "path", "status")),
        ("api_request_duration_seconds", ()),
        ("api_auth_failures_total", ()),
        ("db_connections_active", ()),
        ("db_connections_idle", ()),
        ("db_query_duration_seconds", ("query",)),
        ("db_errors_total", ("query",)),
        ("queue_depth", ("status",)),
        ("queue_processing_duration_seconds", ()),
        ("tls_cert_expiry_days", ()),
    ],
)
def test_names_that_were_asked_for_stay(name: str, labels: tuple[str, ...]) -> None:
    found = [spec.labels for spec in dataplane.metric_table.METRICS if spec.name == name]
    found += [spec.labels for spec in controlplane.metric_table.METRICS if spec.name == name]
    assert found
    assert set(found) == {labels}


def test_alerts_are_on_metrics_and_label_values_that_exist() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "postroad-alerts.yml").read_text(encoding="utf-8"))
    node = {spec.name: spec for spec in dataplane.metric_table.METRICS}
    known = set(node) | {spec.name for spec in controlplane.metric_table.METRICS} | {"up"}
    found = 0
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        for name, selector in re.findall(r"\b([a-z]+_[a-z_]+|up|leader)\b(?:\{(.*?)\})?", rule["expr"]):
            metric = name.removesuffix("_bucket")
            if name == "histogram_quantile":
                continue
            assert metric in known, (rule["alert"], name)
            found += 1
            for label, value in re.findall(r'(\w+)="(\w+)"', selector):
                assert metric not in node or label == "job" or value in node[metric].values, (rule["alert"], value)
    assert found >= len(rules["groups"][0]["rules"]) + len(rules["groups"][1]["rules"])
