"""A stack with two workers: a message with an Idempotency-Key is stored once for both, or found where it was not."""

from __future__ import annotations

import smtplib
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from support.local_stack import LocalStack, stack_folder

pytestmark = pytest.mark.timeout(300)

# Each of two workers has a connection in two: after so many the other one had none once in a billion runs.
CONNECTIONS = 30


@pytest.fixture
def stack() -> Iterator[LocalStack]:
    with stack_folder() as folder:
        running = LocalStack(folder, ["--workers", "2"]).start()
        try:
            yield running
        finally:
            if running.is_running:
                running.stop()


def submit(stack: LocalStack, key: str, tls: ssl.SSLContext) -> str:
    """Send the same message as ever under this key, over a connection of its own; return the id that the 250 names."""
    content = f"Idempotency-Key: {key}\r\nFrom: app@example.com\r\nSubject: {key}\r\n\r\nHello\r\n"
    with smtplib.SMTP_SSL("127.0.0.1", stack.ready["ports"]["smtps"], context=tls, timeout=60) as session:
        session.login(stack.ready["smtp_username"], stack.ready["smtp_password"])
        session.mail("app@example.com")
        session.rcpt("someone@example.net")
        code, text = session.data(content.encode())
    assert code == 250, text
    return text.decode().rpartition(" ")[2]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def metric(stack: LocalStack, port: str, sample: str) -> float:
    url = f"http://127.0.0.1:{stack.ready['ports'][port]}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{sample} "))


def forget(stack: LocalStack) -> None:
    """What a Redis without persistence does when it starts anew."""
    password = (stack.folder / ".postroad" / "valkey" / "password").read_text(encoding="ascii").strip()
    with redis.Redis(port=stack.ready["ports"]["valkey"], password=password) as client:
        client.flushall()


def test_a_message_is_stored_once_for_both_workers_and_a_double_is_found(stack: LocalStack) -> None:
    tls = stack.tls_context()
    ids = {submit(stack, "order-1", tls) for _ in range(CONNECTIONS)}
    assert len(ids) == 1
    assert metric(stack, "node-http", 'smtp_submission_keys_total{result="stored"}') == 1
    assert metric(stack, "node-http", 'smtp_submission_keys_total{result="repeated"}') == CONNECTIONS - 1

    doubles: list[str] = []
    while len(set(doubles)) < 2:
        assert len(doubles) < CONNECTIONS
        doubles.append(submit(stack, "order-2", tls))
        forget(stack)
    until(lambda: metric(stack, "http", "ledger_duplicates_total") == 1, "the ledger has counted the double")
    messages = [get(stack, each) for each in dict.fromkeys(doubles)]
    named = {message["duplicateOf"]: message["name"] for message in messages if "duplicateOf" in message}
    assert len(named) == 1
    assert {*named, *named.values()} == {message["name"] for message in messages}
    assert "duplicateOf" not in get(stack, ids.pop())
    until(lambda: arrived(stack, "order-1") == 1, "the message arrives")
    until(lambda: arrived(stack, "order-2") == 2, "both arrive")
    everything = b"".join(stack.inbox.content(mail) for mail in stack.inbox.mails())
    assert b"dempotency" not in everything


def get(stack: LocalStack, message: str) -> dict[str, Any]:
    found: dict[str, Any] = stack.json("messages", "get", message)
    return found


def arrived(stack: LocalStack, subject: str) -> int:
    return [mail.subject for mail in stack.inbox.mails()].count(subject)
