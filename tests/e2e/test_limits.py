"""Limits end to end: set on the command line, held by the node, enforced at submission, shown with what is left."""

from __future__ import annotations

import smtplib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.request import urlopen

import pytest

from dataplane.adapters.bundle_codec import decode_account, decode_settings
from dataplane.adapters.lkg import open_files
from dataplane.clock import SystemClock
from dataplane.core.limits import Limit, LimitScope, LimitUnit
from postroad.config.v1 import bundle_pb2
from support.local_stack import LocalStack
from support.mail_clients import send_by_session, smtplib_session

pytestmark = pytest.mark.timeout(180)

_SOON_S = 30.0


@contextmanager
def limit(stack: LocalStack, limit_id: str, *options: str) -> Iterator[str]:
    """A limit that is deleted again."""
    made = stack.json("limits", "create", limit_id, *options)
    try:
        yield str(made["name"])
    finally:
        stack.json("limits", "delete", made["name"])


def table(stack: LocalStack, *options: str) -> list[str]:
    result = stack.cli("limits", "list", *options)
    assert result.returncode == 0, result.stderr
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_a_limit_of_the_account_is_held_by_the_node_and_enforced(stack: LocalStack) -> None:
    options = ("--scope", "account", "--unit", "recipient", "--amount", "3", "--per", "day", "--burst", "3")
    with limit(stack, "recipients", *options) as name:
        wait_for(lambda: name in [one.name for one in held(stack)])
        (found,) = [one for one in held(stack) if one.name == name]
        assert found == Limit(name, LimitScope.ACCOUNT, LimitUnit.RECIPIENT, 3, 86_400.0, 3)
        wait_for(lambda: stack.json("nodes", "get", "node-1")["configStatus"] == "CONFIG_STATUS_SYNCED")
        submit(stack, 2)
        allowed = "recipients account accounts/demo 3 recipients a day"
        wait_for(lambda: f"{allowed} 1 of 3" in " ".join(table(stack)))
        with pytest.raises(smtplib.SMTPDataError, match=r"4\.7\.1 .*try again in \d+ s") as refused:
            submit(stack, 2)
        assert refused.value.smtp_code == 450
        (row,) = [row for row in table(stack) if row.startswith("recipients ")]
        assert "1 of 3 " in row
    wait_for(lambda: name not in [one.name for one in held(stack)])


def test_a_shared_limit_is_in_the_settings_of_the_node(stack: LocalStack) -> None:
    with limit(stack, "hosts", "--shared", "--scope", "destination", "--unit", "connection", "--amount", "50") as name:
        assert name == "limits/hosts"
        expected = Limit(name, LimitScope.DESTINATION, LimitUnit.CONNECTION, 50)
        wait_for(lambda: expected in held_by_all(stack))
        assert any(
            row.startswith("limits/hosts destination each destination 50 connections at once") for row in table(stack)
        )


def test_the_list_shows_the_defaults_and_what_is_left_of_them(stack: LocalStack) -> None:
    rows = table(stack)
    assert any(row.startswith("default account accounts/demo 100000 messages an hour ") for row in rows), rows
    assert any(row.startswith("default credential accounts/demo/smtpCredentials/app 50000 ") for row in rows), rows
    found = stack.json("limits", "list")["limits"]
    assert [one["origin"] for one in found] == ["ORIGIN_DEFAULT"] * len(found)
    assert all(one["state"]["known"] for one in found)


def test_an_accounts_weight_is_set_on_the_command_line(stack: LocalStack) -> None:
    changed = stack.json("accounts", "update", "demo", "--delivery-weight", "7")
    try:
        assert changed["deliveryWeight"] == 7
        wait_for(lambda: decode_account(bundles(stack)["accounts/demo"]).delivery_weight == 7)
    finally:
        stack.json("accounts", "update", "demo", "--delivery-weight", "1")


def test_many_messages_are_followed_with_few_requests(stack: LocalStack) -> None:
    before = requests_made(stack)
    found = stack.json("send", "--to", "someone@example.net", "--to", "other@example.net", "--count", "25")
    states = [recipient["state"] for message in found["messages"] for recipient in message["recipients"]]
    assert states == ["RECIPIENT_STATE_SENT"] * 50
    # On a busy machine a few looks more; a watch and a look for each message would be fifty.
    assert requests_made(stack) - before < 25


def requests_made(stack: LocalStack) -> float:
    """Calls of the API since the control plane began, by its metrics."""
    with urlopen(f"http://127.0.0.1:{stack.ready['ports']['http']}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("api_requests_total{"))


# --- inside ----------------------------------------------------------------------------------------------------------


def bundles(stack: LocalStack) -> dict[str, bundle_pb2.Bundle]:
    """What lies in the node's last known good configuration."""
    folder = stack.folder / ".postroad" / "node-1"
    return open_files(folder, None, None, "nodes/node-1", SystemClock()).load().bundles


def held(stack: LocalStack) -> tuple[Limit, ...]:
    return decode_account(bundles(stack)["accounts/demo"]).limits


def held_by_all(stack: LocalStack) -> tuple[Limit, ...]:
    return decode_settings(bundles(stack)["pools/default/settings"]).limits


def wait_for(is_so: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + _SOON_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def submit(stack: LocalStack, recipient_count: int) -> None:
    with smtplib_session(stack) as session:
        send_by_session(
            session, b"Subject: x\r\n\r\nx\r\n", [f"someone-{n}@example.net" for n in range(recipient_count)]
        )
