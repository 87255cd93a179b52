"""Metrics of a control plane: exactly those of the table, and no label that a caller could make up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from controlplane.domain.books import FindingKind
from controlplane.metric_table import METRICS, PROCESS_METRICS
from controlplane.ports_fleet import BookHealth
from controlplane.telemetry import Metrics

POSTGRES = Path(__file__).parents[3] / "controlplane" / "adapters" / "postgres"
# A loop over two tables that stand beside it, and a helper whose callers are looked at themselves.
MADE_OF_CONSTANTS = {("accounts.py", "f'{table}_clear'"), ("rows.py", "name"), ("rows_changed", "name")}


def filled() -> Metrics:
    metrics = Metrics()
    metrics.call_ended("/postroad.control.v1.AccountService/GetAccount", "OK", 0.01)
    metrics.call_ended("/postroad.control.v1.AccountService/GetAccount", "UNAUTHENTICATED", 0.01)
    metrics.request_ended("GET", "/api/v1/{name=accounts/*}", 200, 0.02)
    metrics.request_ended("GET", "/api/v1/{name=accounts/*}", 401, 0.02)
    metrics.request_ended("BREW", "unknown", 404, 0.0)
    metrics.call_ended("/postroad.control.v1.MessageService/WatchMessages", "CANCELLED", None)
    metrics.query_ended("account_get", 0.003, False)
    metrics.query_ended("account_get", 0.003, True)
    metrics.pools_sampled(3, 7)
    metrics.streams_sampled(2)
    metrics.loop_sampled(0.002)
    metrics.config_answered("ack")
    metrics.records_ingested(10, 1)
    metrics.books_compared()
    metrics.duplicate_found()
    metrics.message_ended("accepted")
    metrics.queue_changed("stored", 1)
    metrics.leading(now=True)
    metrics.books_sampled(BookHealth({FindingKind.NO_DEADLINE: 2}, {"7c0e0b5a": 12.5}))
    metrics.job_failed("retention")
    metrics.certificates_sampled({"server": 80.0, "ca": 3000.0})
    return metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def test_who_leads_no_more_tells_nothing_of_the_books() -> None:
    metrics = filled()
    assert samples(metrics)["audit_findings", (("kind", "no_deadline"),)] == 2
    assert samples(metrics)["audit_findings", (("kind", "unbalanced"),)] == 0

    metrics.leading(now=False)

    assert not [name for name, _ in samples(metrics) if name in {"audit_findings", "audit_age_seconds"}]


def test_what_is_exported_is_what_the_table_says() -> None:
    families = {
        f"{family.name}_total" if family.type == "counter" else family.name: family
        for family in text_string_to_metric_families(filled().render().decode())
    }
    assert set(families) == {spec.name for spec in METRICS} | set(PROCESS_METRICS)
    for spec in METRICS:
        family = families[spec.name]
        assert family.type == spec.kind
        labels = {frozenset(sample.labels) - {"le"} for sample in family.samples}
        assert labels == {frozenset(spec.labels)}, spec.name


def test_calls_and_requests_are_counted_by_what_was_called_and_how_it_ended() -> None:
    found = samples(filled())
    method = "/postroad.control.v1.AccountService/GetAccount"
    assert found["api_requests_total", (("method", "POST"), ("path", method), ("status", "OK"))] == 1
    path = "/api/v1/{name=accounts/*}"
    assert found["api_requests_total", (("method", "GET"), ("path", path), ("status", "200"))] == 1
    assert found["api_auth_failures_total", ()] == 2
    assert found["api_request_duration_seconds_count", ()] == 5, "what streamed is not among them"


def test_a_verb_that_a_caller_made_up_is_no_label() -> None:
    assert samples(filled())["api_requests_total", (("method", "other"), ("path", "unknown"), ("status", "404"))] == 1


def test_the_certificate_that_ends_first_counts() -> None:
    found = samples(filled())
    assert found["tls_cert_expiry_days", ()] == 80.0
    assert found["tls_certificate_days_left", (("certificate", "ca"),)] == 3000.0


def names_of_queries() -> Iterator[tuple[str, ast.expr]]:
    for file in POSTGRES.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            match node.func:
                case ast.Attribute(attr="rows" | "row" | "value" | "run"):
                    yield file.name, node.args[0]
                case ast.Attribute(value=ast.Attribute(attr="_database"), attr="transaction"):
                    yield file.name, node.args[0]
                case ast.Name(id="rows_changed"):
                    yield "rows_changed", node.args[1]


def test_the_name_of_a_query_stands_in_the_code() -> None:
    names = list(names_of_queries())
    assert len(names) > 80
    for place, name in names:
        is_constant = isinstance(name, ast.Constant) and isinstance(name.value, str)
        assert is_constant or (place, ast.unparse(name)) in MADE_OF_CONSTANTS, (place, ast.unparse(name))
