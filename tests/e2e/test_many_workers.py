"""A local stack with three workers, one of which is killed while thirty clients submit: who notices, and what arrives.

A client whose worker was killed connects again and sends the interrupted message once more, as clients do.
"""

from __future__ import annotations

import json
import os
import signal
import smtplib
import ssl
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.local_stack import LocalStack, stack_folder
from support.node_mail import accepted_by, workers_of

pytestmark = pytest.mark.timeout(400)

WORKERS = 3
CLIENTS = 30
# With the one that each client sends first, 210 messages.
EACH = 6
KILL_AFTER = 60
TRIES = 20


@pytest.fixture
def stack() -> Iterator[LocalStack]:
    with stack_folder() as folder:
        running = LocalStack(folder, ["--workers", str(WORKERS)]).start()
        try:
            yield running
        finally:
            if running.is_running:
                running.stop()


class Submitter(threading.Thread):
    """A client with a session that it keeps; `answered` are its messages that were answered 250."""

    def __init__(self, number: int, stack: LocalStack, tls: ssl.SSLContext, go_on: threading.Event) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.answered: list[str] = []
        self.cut_count = 0
        self.first_sent = threading.Event()
        self._stack = stack
        self._tls = tls
        self._go_on = go_on
        self._session: smtplib.SMTP
        self.local_port = 0

    def run(self) -> None:
        self._connect()
        self.local_port = self._session.sock.getsockname()[1]  # type: ignore[union-attr]  # connected
        self._submit("first")
        self.first_sent.set()
        self._go_on.wait(60)
        for number in range(EACH):
            self._submit(str(number))
        self._session.close()

    def _submit(self, name: str) -> None:
        token = f"token-{self.number}-{name}"
        content = f"From: app@example.com\r\nTo: x@example.net\r\nSubject: {token}\r\n\r\nHello\r\n"
        for _ in range(TRIES):
            try:
                self._session.sendmail("app@example.com", ["x@example.net"], content)
            except (smtplib.SMTPServerDisconnected, ConnectionError):
                self.cut_count += 1
                self._connect()
            else:
                self.answered.append(token)
                return

    def _connect(self) -> None:
        port = self._stack.ready["ports"]["smtps"]
        for _ in range(TRIES):
            try:
                self._session = smtplib.SMTP_SSL("127.0.0.1", port, context=self._tls, timeout=60)
                self._session.login(self._stack.ready["smtp_username"], self._stack.ready["smtp_password"])
            except (smtplib.SMTPServerDisconnected, ConnectionError, ssl.SSLError):
                self.cut_count += 1
            else:
                return


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def metric(stack: LocalStack, name: str) -> float:
    url = f"http://127.0.0.1:{stack.ready['ports']['node-http']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def subjects(stack: LocalStack) -> Counter[str]:
    return Counter(mail.subject for mail in stack.inbox.mails())


def test_a_killed_worker_costs_no_answered_message_and_no_session_of_another(stack: LocalStack) -> None:
    go_on, tls = threading.Event(), stack.tls_context()
    clients = [Submitter(number, stack, tls, go_on) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        assert client.first_sent.wait(60)
    # Each of three loops counts for itself; the node tells of all.
    assert metric(stack, "smtp_active_sessions") == CLIENTS
    assert metric(stack, "smtp_message_enqueued_total") == CLIENTS
    workers = workers_of(node_ready(stack))
    port = stack.ready["ports"]["smtps"]
    owners = {client.number: accepted_by(workers, port, client.local_port) for client in clients}
    victim = owners[0]
    assert len(set(owners.values())) > 1
    go_on.set()
    until(lambda: sum(len(client.answered) for client in clients) >= KILL_AFTER, "enough answered")
    os.kill(workers[victim], signal.SIGKILL)
    for client in clients:
        client.join(120)
        assert not client.is_alive()
    assert {owners[client.number] for client in clients if client.cut_count} == {victim}
    answered = {token for client in clients for token in client.answered}
    assert len(answered) == CLIENTS * (EACH + 1)
    until(lambda: answered <= set(subjects(stack)), "every answered message arrives")
    told_of_the_end(stack, workers, victim)


def told_of_the_end(stack: LocalStack, workers: dict[str, int], victim: str) -> None:
    """What the control plane knows of the node afterwards."""
    until(lambda: set(workers_of(node_ready(stack))) == set(workers), "the worker is there again")
    until(lambda: waiting(stack) == 0, "nothing waits")
    spools = stack.json("nodes", "get", "node-1")["spools"]
    assert sorted(int(spool["incarnation"]) for spool in spools) == [1, 1, 2]
    assert all(spool["accepted"] for spool in spools)
    (listed,) = stack.json("nodes", "list")["nodes"]
    assert len(listed["spools"]) == WORKERS
    assert workers_of(node_ready(stack))[victim] != workers[victim]
    until(lambda: set(states(stack)) == {"RECIPIENT_STATE_SENT"}, "every message is sent in the ledger")
    assert states(stack).total() >= CLIENTS * (EACH + 1)


def states(stack: LocalStack) -> Counter[str]:
    messages = stack.json("messages", "list", "--limit", "1000")["messages"]
    return Counter(message["state"] for message in messages)


def waiting(stack: LocalStack) -> int:
    return sum(int(spool.get("waitingCount", 0)) for spool in stack.json("nodes", "get", "node-1").get("spools", []))


def node_ready(stack: LocalStack) -> dict[str, Any]:
    ready: dict[str, Any] = json.loads((stack.folder / ".postroad" / "node-1" / "run" / "ready.json").read_text())
    return ready
