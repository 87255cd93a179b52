"""The logs of a running stack: a message can be followed by its id, and what must not be written is not."""

from __future__ import annotations

import json
import smtplib
import time
from typing import Any

import pytest

from support.local_stack import LocalStack

pytestmark = pytest.mark.timeout(180)

CANARY = "canary-in-the-content"
KEPT_BACK = "prs_canary-in-a-login"


def submit(stack: LocalStack) -> str:
    """Send one message after a login that fails; returns the message's id."""
    with smtplib.SMTP("127.0.0.1", stack.ready["ports"]["smtp"], timeout=30) as client:
        client.starttls(context=stack.tls_context())
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.login(stack.ready["smtp_username"], KEPT_BACK)
        client.login(stack.ready["smtp_username"], stack.ready["smtp_password"])
        assert client.mail("app@example.com")[0] == 250
        assert client.rcpt("someone@example.net")[0] == 250
        code, said = client.data(f"From: app@example.com\r\nSubject: {CANARY}\r\n\r\n{CANARY}\r\n".encode())
        assert code == 250
        return said.split()[-1].decode()


def lines_about(stack: LocalStack, message: str) -> list[dict[str, Any]]:
    text = (stack.folder / ".postroad" / "logs" / "node-1.log").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("message") == message]


def test_a_message_is_followed_by_its_id_and_nothing_secret_is_written(stack: LocalStack) -> None:
    message = submit(stack)
    deadline = time.monotonic() + 60
    while len(found := lines_about(stack, message)) < 2:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    accepted, sent = found
    assert (accepted["event"], sent["event"]) == ("message.accepted", "delivery.sent")
    for field in ("session", "account", "node", "process"):
        assert accepted[field] == sent[field] != ""
    assert (accepted["account"], sent["attempt"], sent["recipients"]) == ("accounts/demo", 1, [0])
    assert sent["bundle_revision"] > 0
    for log in (stack.folder / ".postroad" / "logs").glob("*.log"):
        text = log.read_text(encoding="utf-8", errors="replace")
        for secret in (CANARY, KEPT_BACK, stack.ready["smtp_password"], "prs_", "prk_"):
            assert secret not in text, log.name
