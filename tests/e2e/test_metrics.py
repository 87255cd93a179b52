"""What a node and a control plane tell after mail: every metric that was asked for, with a value that fits it."""

from __future__ import annotations

import base64
import re
import smtplib
import time
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

import controlplane.metric_table
import dataplane.metric_table
from postroad.control.v1 import account_service_pb2
from support.local_stack import LocalStack

pytestmark = pytest.mark.timeout(180)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
MESSAGES = 5
RECIPIENTS = ("someone@example.net", "else@example.net")
BODY = b"From: app@example.com\r\nSubject: measured\r\n\r\nsecret words\r\n"


def scrape(stack: LocalStack, port: str) -> tuple[str, Samples]:
    with urllib.request.urlopen(f"http://127.0.0.1:{stack.ready['ports'][port]}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return text, samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def total(samples: Samples, name: str) -> float:
    return sum(number for (found, _), number in samples.items() if found == name)


def until(stack: LocalStack, port: str, holds: Callable[[Samples], bool]) -> tuple[str, Samples]:
    deadline = time.monotonic() + 60
    while True:
        text, samples = scrape(stack, port)
        if holds(samples):
            return text, samples
        assert time.monotonic() < deadline, text


def submit(stack: LocalStack) -> list[str]:
    """Send mail over one session, after a login that fails; returns the messages' ids."""
    with smtplib.SMTP("127.0.0.1", stack.ready["ports"]["smtp"], timeout=30) as client:
        client.starttls(context=stack.tls_context())
        client.ehlo()
        login = f"\0{stack.ready['smtp_username']}\0prs_wrong".encode()
        assert client.docmd("AUTH PLAIN", base64.b64encode(login).decode())[0] == 535
    ids = []
    with smtplib.SMTP("127.0.0.1", stack.ready["ports"]["smtp"], timeout=30) as client:
        client.starttls(context=stack.tls_context())
        client.login(stack.ready["smtp_username"], stack.ready["smtp_password"])
        for _ in range(MESSAGES):
            assert client.mail("app@example.com")[0] == 250
            for recipient in RECIPIENTS:
                assert client.rcpt(recipient)[0] == 250
            code, said = client.data(BODY)
            assert code == 250
            ids.append(said.split()[-1].decode())
    return ids


def test_a_node_tells_what_it_did_with_mail(stack: LocalStack) -> None:
    _, before = scrape(stack, "node-http")
    ids = submit(stack)

    def grown(samples: Samples, name: str, **labels: str) -> float:
        return value(samples, name, **labels) - before.get((name, frozenset(labels.items())), 0.0)

    def ended(samples: Samples) -> bool:
        return (
            grown(samples, "delivery_attempts_total", result="sent") >= MESSAGES * len(RECIPIENTS)
            and total(samples, "queue_depth") == 0
            and value(samples, "ledger_unacknowledged_records") == 0
            and value(samples, "smtp_active_sessions") == 0
        )

    text, after = until(stack, "node-http", ended)

    assert grown(after, "smtp_connections_total", status="accepted") == 2
    assert grown(after, "smtp_message_enqueued_total") == MESSAGES
    assert grown(after, "smtp_auth_attempts_total", result="succeeded") == 1
    assert grown(after, "smtp_auth_attempts_total", result="failed") == 1
    assert grown(after, "smtp_enqueue_duration_seconds_count") == MESSAGES
    assert 0 < grown(after, "smtp_enqueue_duration_seconds_sum") < 60
    assert grown(after, "queue_processing_duration_seconds_count") == MESSAGES * len(RECIPIENTS)
    assert 0 < value(after, "tls_cert_expiry_days") < 4000
    assert {dict(labels)["status"] for name, labels in after if name == "queue_depth"} >= {
        "queued",
        "processing",
        "failed",
    }
    assert 0 <= value(after, "config_age_seconds") < 600
    assert value(after, "ledger_lag_seconds") < 60
    assert (
        grown(after, "limiter_decisions_total", by="shared") + grown(after, "limiter_decisions_total", by="local")
        >= MESSAGES
    )
    assert value(after, "workers_connected") >= 1
    assert value(after, "process_resident_memory_bytes", process="worker-0") > 10_000_000
    assert value(after, "process_open_fds", process="supervisor") > 3
    assert value(after, "process_restarts_total", process="worker-0") == 0
    assert total(after, "event_loop_lag_seconds_count") > 0
    assert total(after, "spool_bytes") > 0
    exported = {family.name for family in text_string_to_metric_families(text)}
    for spec in dataplane.metric_table.METRICS:
        assert {spec.name, spec.name.removesuffix("_total")} & exported, spec.name
    assert_tells_no_secrets(text, stack, ids)


def test_a_control_plane_tells_what_it_was_asked(stack: LocalStack) -> None:
    path = "/postroad.control.v1.AccountService/ListAccounts"
    _, before = scrape(stack, "http")
    with stack.client() as client:
        client.accounts.ListAccounts(account_service_pb2.ListAccountsRequest())
    assert stack.cli("accounts", "list", extra={"POSTROAD_API_KEY": f"prk_00000000_{'x' * 43}"}).returncode != 0

    text, after = until(
        stack,
        "http",
        lambda samples: total(samples, "api_auth_failures_total") > total(before, "api_auth_failures_total"),
    )

    labels = {"method": "POST", "path": path, "status": "OK"}
    counted = value(after, "api_requests_total", **labels) - before.get(
        ("api_requests_total", frozenset(labels.items())), 0.0
    )
    assert counted >= 1
    assert value(after, "api_request_duration_seconds_count") > before.get(
        ("api_request_duration_seconds_count", frozenset()), 0.0
    )
    assert value(after, "db_connections_active") + value(after, "db_connections_idle") >= 1
    assert value(after, "db_query_duration_seconds_count", query="account_list") >= 1
    assert 0 < value(after, "tls_cert_expiry_days") < 4000
    exported = {family.name for family in text_string_to_metric_families(text)}
    for spec in controlplane.metric_table.METRICS:
        # A counter of errors by name has no series before the first error.
        if spec.name not in {"db_errors_total", "job_errors_total"}:
            assert {spec.name, spec.name.removesuffix("_total")} & exported, spec.name
    assert_tells_no_secrets(text, stack, [])


def assert_tells_no_secrets(text: str, stack: LocalStack, message_ids: list[str]) -> None:
    """Values of labels are words, routes and gRPC methods: no address, message, account, key or host."""
    assert stack.ready["smtp_password"] not in text
    assert not re.search(r"pr[ks]_", text)
    assert "demo" not in re.sub(r"# .*", "", text)
    for message_id in message_ids:
        assert message_id not in text
    for label in re.findall(r'="([^"]*)"', text):
        assert re.fullmatch(r"[a-zA-Z0-9_.+-]+|/[A-Za-z0-9_.]+/[A-Za-z]+|/api/v1/[^@]*", label), label
        assert "@" not in label
