"""Commands on mail that waits, as people give them: by id and by filter, over two spools, and across a killed worker.

The demo's mail is sent to a provider that nobody serves, so that it waits; the inbox is another one.
"""

from __future__ import annotations

import json
import smtplib
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from dataplane.commands import BATCH_MESSAGES
from support.killable_stack import KillableStack, wait_until
from support.local_stack import stack_folder

pytestmark = pytest.mark.timeout(400)

# Enough that each of two spools needs several batches.
COUNT = 6 * BATCH_MESSAGES


@pytest.fixture(scope="module")
def stack() -> Iterator[KillableStack]:
    with stack_folder() as folder, socket.create_server(("127.0.0.1", 0)) as nobody:
        running = KillableStack(folder, ["--workers", "2"])
        (folder / "struck").mkdir()
        running.extra_environment = {
            # The worker that ends its second batch of a command is killed there, once.
            "POSTROAD_FAILPOINTS": "commands.batch:2",
            "POSTROAD_FAILPOINTS_SPENT": str(folder / "struck"),
        }
        running.start()
        port = nobody.getsockname()[1]
        nobody.close()
        try:
            running.json("providers", "create", "nowhere", "--endpoint", f"127.0.0.1:{port}", "--tls", "none")
            running.json("providers", "create", "later", "--endpoint", f"127.0.0.1:{port}", "--tls", "none")
            # Its mail waits without attempts, so that none is under way when a command comes.
            running.json("providers", "suspend", "later")
            running.json("rules", "update", "default", "--target", "later")
            yield running
        finally:
            if running.is_running:
                running.stop()


def submit(stack: KillableStack, domain: str, count: int, sessions: int = 1) -> list[str]:
    """Mail that waits; the ids that the node gave it. Several sessions, so that both workers have some."""
    ids = []
    for session in range(sessions):
        with smtplib.SMTP_SSL("127.0.0.1", stack.port("smtps"), context=stack.tls_context(), timeout=60) as client:
            client.login(stack.ready["smtp_username"], stack.ready["smtp_password"])
            for number in range(session, count, sessions):
                client.mail("app@example.com")
                client.rcpt(f"r{number}@{domain}")
                _, answer = client.data(b"Subject: waits\r\n\r\nHello\r\n")
                ids.append(answer.decode().rsplit(" ", 1)[1])
    wait_until(lambda: set(states(stack, domain)) <= {"QUEUED", "DEFERRED"}, "all of it waits")
    return ids


def messages(stack: KillableStack, domain: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stack.json("messages", "list", "--limit", "2000")["messages"]
    return [one for one in found if str(one["recipients"][0]["address"]).endswith(f"@{domain}")]


def states(stack: KillableStack, domain: str) -> Counter[str]:
    return Counter(str(one["state"]).removeprefix("RECIPIENT_STATE_") for one in messages(stack, domain))


def test_each_verb_by_id(stack: KillableStack) -> None:
    held, cancelled, bounced, rerouted = submit(stack, "verbs.example", 4)
    answer = stack.json("messages", "hold", held, rerouted)
    assert (answer["changedCount"], answer["tooLateCount"], len(answer["operations"])) == (2, 0, 2)
    assert stack.json("messages", "cancel", cancelled)["changedCount"] == 1
    assert stack.json("messages", "bounce", bounced)["changedCount"] == 1
    assert stack.json("messages", "reroute", held, rerouted, "--to", "inbox")["changedCount"] == 2
    again = stack.cli("messages", "hold", held)
    assert (again.returncode, again.stdout.strip()) == (1, "Held 0, too late for 0")
    late = stack.cli("messages", "cancel", cancelled)
    assert (late.returncode, late.stdout.strip()) == (1, "Cancelled 0, too late for 1")
    assert states(stack, "verbs.example") == {"HELD": 2, "CANCELLED": 1, "FAILED": 1}
    assert stack.json("messages", "release", held, rerouted)["changedCount"] == 2
    for one in (held, rerouted):
        assert stack.cli("messages", "follow", one).returncode == 0
        mail, _ = stack.delivered(one)
        assert mail.recipients[0].endswith("@verbs.example")
    shown = stack.cli("messages", "get", rerouted).stdout
    for word in ("held", "rerouted", "via inbox", "released", "sent"):
        assert word in shown


def test_a_retry_brings_a_deferred_message_forward(stack: KillableStack) -> None:
    (one,) = submit(stack, "retry.example", 1)
    stack.json("messages", "reroute", one, "--to", "nowhere")
    wait_until(lambda: states(stack, "retry.example") == {"DEFERRED": 1}, "it was tried")
    stack.json("messages", "reroute", one, "--to", "inbox")
    assert stack.json("messages", "retry", one)["changedCount"] == 1
    assert stack.cli("messages", "follow", one).returncode == 0


def test_a_filter_reaches_both_spools_counts_exactly_across_a_kill_and_leaves_others_alone(
    stack: KillableStack,
) -> None:
    stack.json("accounts", "create", "other", "--sender-domain", "other.example")
    before = [one["incarnation"] for one in stack.json("nodes", "get", "node-1")["spools"]]
    submit(stack, "bulk.example", COUNT, sessions=8)
    submit(stack, "spared.example", 5)
    done = stack.cli(
        *("messages", "hold", "--recipient-domain", "BULK.example", "--state", "queued", "--state", "deferred"),
        *("--wait", "150", "--yes"),
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"Held {COUNT}, too late for 0"), done
    assert "of 2 spools done" in done.stdout
    assert [path.name for path in (stack.folder / "struck").iterdir()] == ["commands.batch"]
    after = [one["incarnation"] for one in stack.json("nodes", "get", "node-1")["spools"]]
    assert sum(int(one) for one in after) == sum(int(one) for one in before) + 1
    wait_until(lambda: states(stack, "bulk.example") == {"HELD": COUNT}, "every one is held in the ledger")
    assert set(states(stack, "spared.example")) <= {"QUEUED", "DEFERRED"}
    spools = Counter(str(one["spool"]) for one in messages(stack, "bulk.example"))
    assert len(spools) == 2
    assert min(spools.values()) > BATCH_MESSAGES

    nothing = stack.cli("messages", "hold", "--recipient-domain", "bulk.example", "--yes")
    assert (nothing.returncode, nothing.stdout.splitlines()[-1]) == (1, "Held 0, too late for 0")
    other = stack.cli("--account", "other", "messages", "cancel", "--account-wide", "--yes")
    assert other.stdout.splitlines()[-1] == "Cancelled 0, too late for 0"
    young = stack.cli("messages", "cancel", "--account-wide", "--older-than", "1h", "--yes")
    assert young.stdout.splitlines()[-1] == "Cancelled 0, too late for 0"

    moved = ("--recipient-domain", "bulk.example", "--provider", "later", "--output", "json")
    assert json.loads(stack.cli("messages", "reroute", "--to", "inbox", *moved).stdout)["changedCount"] == COUNT
    released = stack.json("messages", "release", "--recipient-domain", "bulk.example", "--provider", "inbox")
    assert released["changedCount"] == COUNT
    wait_until(lambda: states(stack, "bulk.example") == {"SENT": COUNT}, "every one is sent")
    arrived = Counter(mail.recipients[0] for mail in stack.inbox.mails() if "@bulk.example" in mail.recipients[0])
    assert arrived == dict.fromkeys((f"r{number}@bulk.example" for number in range(COUNT)), 1)


def test_a_filter_asks_first_and_a_line_that_names_no_mail_is_wrong(stack: KillableStack) -> None:
    refused = stack.cli("messages", "cancel", "--account-wide")
    assert refused.returncode == 1
    assert "Cancel all waiting mail of accounts/demo?" in refused.stdout + refused.stderr
    assert stack.cli("messages", "cancel").returncode == 2
    assert stack.cli("messages", "cancel", "some-id", "--account-wide").returncode == 2
    assert stack.cli("messages", "hold", "--older-than", "yesterday").returncode == 2
    assert stack.cli("messages", "hold", "--state", "sent").returncode == 2
    assert stack.cli("messages", "reroute", "--account-wide").returncode == 2


def test_an_operation_waits_for_a_node_that_is_away(stack: KillableStack) -> None:
    submit(stack, "away.example", 1)
    stack.kill_server("supervisor")
    wait_until(lambda: not stack.pids_of("worker"), "no worker is there")
    pending = stack.cli("messages", "cancel", "--recipient-domain", "away.example", "--wait", "1", "--yes")
    if pending.returncode:
        assert pending.returncode == 4
        assert "waiting for node-1" in pending.stdout
    wait_until(lambda: states(stack, "away.example") == {"CANCELLED": 1}, "it is cancelled when the node is back")
