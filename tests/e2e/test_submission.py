"""An application submits, the node delivers, the ledger knows: everything for real, over real TLS."""

from __future__ import annotations

import contextlib
import email
import email.policy
import json
import re
import signal
import smtplib
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import IO, Any

import pytest

from postroad.control.v1.message_pb2 import DELIVERY_EVENT_TYPE_SENT
from postroad.sdk import follow
from support.local_stack import LocalStack

pytestmark = pytest.mark.timeout(180)

_INTERRUPTED = 130
_ADDED = (b"Received", b"Date", b"Message-ID")
_CONTENT = (
    b"From: app@example.com\r\nTo: someone@example.net\r\nSubject: dots\r\n\r\n"
    b".leading dot\r\n..two\r\n\r\nlast line \t\r\n"
)


def _starttls(stack: LocalStack) -> smtplib.SMTP:
    client = smtplib.SMTP("127.0.0.1", stack.ready["ports"]["smtp"], timeout=30)
    client.starttls(context=stack.tls_context())
    client.login(stack.ready["smtp_username"], stack.ready["smtp_password"])
    return client


def _smtps(stack: LocalStack) -> smtplib.SMTP:
    client = smtplib.SMTP_SSL("127.0.0.1", stack.ready["ports"]["smtps"], context=stack.tls_context(), timeout=30)
    client.login(stack.ready["smtp_username"], stack.ready["smtp_password"])
    return client


def _logged_in(stack: LocalStack, username: str, password: str) -> smtplib.SMTP:
    """A session with AUTH, as soon as the node knows the credential."""
    deadline = time.monotonic() + 30
    while True:
        client = smtplib.SMTP_SSL("127.0.0.1", stack.ready["ports"]["smtps"], context=stack.tls_context(), timeout=30)
        try:
            client.login(username, password)
        except smtplib.SMTPAuthenticationError:
            client.close()
            assert time.monotonic() < deadline, "the node never heard of the credential"
        else:
            return client


def _until_mail_answers(client: smtplib.SMTP, sender: str, wanted: Callable[[int], bool]) -> int:
    """Repeat MAIL on the same connection until the answer is as wanted: a change takes moments to arrive."""
    deadline = time.monotonic() + 30
    while True:
        code, _ = client.mail(sender)
        client.rset()
        if wanted(code):
            return code
        assert time.monotonic() < deadline, f"MAIL goes on being answered with {code}"


def _submit(client: smtplib.SMTP, content: bytes, recipient: str = "someone@example.net") -> str:
    """Send as smtplib does, keeping the reply to the dot; returns the id in it."""
    assert client.mail("app@example.com")[0] == 250
    assert client.rcpt(recipient)[0] == 250
    code, text = client.data(content)
    assert code == 250, text
    found = re.search(rb"queued as ([0-9a-f-]{36})", text)
    assert found is not None, text
    return found.group(1).decode()


def _wait_for_end(stack: LocalStack, *messages: str) -> None:
    """Wait until they are sent."""
    with stack.client() as client:
        for message in messages:
            events = follow(client, f"accounts/demo/messages/{message}", 60)
            with contextlib.suppress(StopIteration):
                while True:
                    last = next(events).type
            assert last == DELIVERY_EVENT_TYPE_SENT, stack.logs()


@pytest.mark.parametrize("connect", [_starttls, _smtps])
def test_content_arrives_byte_for_byte_below_the_documented_headers(
    stack: LocalStack, connect: Callable[[LocalStack], smtplib.SMTP]
) -> None:
    with connect(stack) as client:
        message = _submit(client, _CONTENT)
    _wait_for_end(stack, message)
    mail, content = stack.delivered(message)
    assert (mail.sender, mail.recipients) == ("app@example.com", ("someone@example.net",))
    assert content.endswith(_CONTENT)
    added = email.message_from_bytes(content.removesuffix(_CONTENT) + b"\r\n", policy=email.policy.SMTP)
    assert [name.encode() for name in added.keys()] == list(_ADDED)  # noqa: SIM118 - a message repeats keys
    assert message in str(added["Received"])


def test_headers_that_are_there_are_left_alone(stack: LocalStack) -> None:
    content = b"Date: Fri, 20 Nov 2026 10:00:00 +0000\r\nMessage-ID: <mine@example.com>\r\n" + _CONTENT
    with _starttls(stack) as client:
        message = _submit(client, content)
    _wait_for_end(stack, message)
    _, delivered = stack.delivered(message)
    assert delivered.endswith(content)
    assert delivered.lower().count(b"\r\ndate:") == 1
    assert delivered.lower().count(b"message-id:") == 1


def test_many_messages_on_one_connection_arrive_once_each(stack: LocalStack) -> None:
    with _starttls(stack) as client:
        sent = [_submit(client, _CONTENT + b"%d\r\n" % number) for number in range(20)]
    _wait_for_end(stack, *sent)
    for number, message in enumerate(sent):
        assert stack.delivered(message)[1].endswith(b"\r\n%d\r\n" % number)


def test_auth_is_needed_and_a_wrong_password_is_refused(stack: LocalStack) -> None:
    with smtplib.SMTP("127.0.0.1", stack.ready["ports"]["smtp"], timeout=30) as client:
        client.starttls(context=stack.tls_context())
        client.ehlo()
        assert client.mail("app@example.com")[0] == 530
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.login(stack.ready["smtp_username"], "prs_wrong")


def test_a_sender_of_a_foreign_domain_is_refused(stack: LocalStack) -> None:
    with _starttls(stack) as client:
        code, text = client.mail("app@elsewhere.example")
    assert 500 <= code < 600, text


def test_suspending_the_account_stops_the_next_message_of_an_open_connection(stack: LocalStack) -> None:
    inbox = f"127.0.0.1:{stack.ready['ports']['inbox']}"
    stack.json("accounts", "create", "paused", "--sender-domain", "paused.example.org")
    stack.json("providers", "create", "hop", "--account", "paused", "--tls", "none", "--endpoint", inbox)
    stack.json("rules", "create", "all", "--account", "paused", "--target", "hop")
    credential = stack.json("credentials", "create", "app", "--account", "paused")
    with _logged_in(stack, credential["username"], credential["secret"]) as client:
        assert client.mail("app@paused.example.org")[0] == 250
        client.rset()
        stack.json("accounts", "suspend", "paused", "--reason", "test")
        code = _until_mail_answers(client, "app@paused.example.org", lambda code: code != 250)
        assert code == 451
        stack.json("accounts", "resume", "paused")
        assert _until_mail_answers(client, "app@paused.example.org", lambda code: code == 250) == 250


def test_what_was_suspended_with_a_receipt_is_refused_at_once(stack: LocalStack) -> None:
    stack.json("accounts", "create", "halted", "--sender-domain", "halted.example.org")
    credential = stack.json("credentials", "create", "app", "--account", "halted")
    with _logged_in(stack, credential["username"], credential["secret"]) as client:
        for verb, state, code in (("suspend", "IN_FORCE", 451), ("resume", "LIFTED", 250)):
            told = stack.json("credentials", verb, "app", "--account", "halted", "--wait", "30")
            assert (told["state"], told["confirmed"]) == (f"STATE_{state}", True)
            assert [one["confirmed"] for one in told["receipts"]] == [True]
            # Nothing to wait for: the node has confirmed it.
            assert client.mail("app@halted.example.org")[0] == code
            client.rset()
    shown = stack.cli("credentials", "suspension", "app", "--account", "halted")
    assert "confirmed by all 1 nodes" in shown.stdout


def test_mail_for_a_suspended_destination_waits_until_it_is_resumed_and_its_other_recipients_get_it(
    stack: LocalStack,
) -> None:
    told = stack.json("destinations", "suspend", "halted.example.net", "--reason", "theirs to mend", "--wait", "30")
    assert (told["state"], told["confirmed"]) == ("STATE_IN_FORCE", True)
    assert [(one["confirmed"], one["unsupported"]) for one in told["receipts"]] == [(True, False)]
    listed = stack.cli("destinations", "list")
    assert re.search(r"accounts/demo/destinations/halted\.example\.net +suspended .*theirs to mend", listed.stdout)
    to = ("--to", "waits@halted.example.net", "--to", "goes@example.net")
    (message,) = (one["id"] for one in stack.json("send", *to, "--no-follow")["messages"])
    deadline = time.monotonic() + 30
    while not stack.inbox.find(message):
        assert time.monotonic() < deadline, stack.logs()
    assert [mail.recipients for mail in stack.inbox.find(message)] == [("goes@example.net",)]
    assert stack.json("destinations", "resume", "halted.example.net", "--wait", "30")["state"] == "STATE_LIFTED"
    assert stack.cli("messages", "follow", message).returncode == 0
    assert [mail.recipients for mail in stack.inbox.find(message)][1:] == [("waits@halted.example.net",)]


def test_send_follows_to_sent_and_list_and_get_know_the_message(stack: LocalStack) -> None:
    text = stack.cli("send", "--to", "reader@example.net", "--subject", "For people")
    assert text.returncode == 0, text.stderr + stack.logs()
    assert "Sent to reader@example.net" in text.stdout
    answer = stack.json("send", "--to", "a@example.net", "--to", "b@example.net", "--subject", "For programs")
    (message,) = answer["messages"]
    assert message["state"] == "RECIPIENT_STATE_SENT"
    assert [one["address"] for one in message["recipients"]] == ["a@example.net", "b@example.net"]
    listed = stack.json("messages", "list", "--limit", "1")["messages"]
    assert [one["name"] for one in listed] == [message["name"]]
    got = stack.json("messages", "get", message["name"])
    assert {event["type"] for event in got["events"]} >= {"DELIVERY_EVENT_TYPE_ACCEPTED", "DELIVERY_EVENT_TYPE_SENT"}
    assert stack.cli("messages", "follow", message["name"]).returncode == 0
    shown = stack.cli("inbox", "show", message["name"].rpartition("/")[2])
    assert "Subject: For programs" in shown.stdout


def _read_answers(lines: IO[str], message: str) -> list[dict[str, Any]]:
    """What a watch prints until the message is sent."""
    answers = []
    for line in lines:
        answers.append(json.loads(line))
        for event in answers[-1].get("events", ()):
            if event["message"].endswith(message) and event["type"] == "DELIVERY_EVENT_TYPE_SENT":
                return answers
    raise AssertionError(f"the watch ended: {answers}")


def _types_of(answers: Iterable[dict[str, Any]], message: str) -> list[str]:
    events = [event for answer in answers for event in answer.get("events", ())]
    return [
        event["type"].removeprefix("DELIVERY_EVENT_TYPE_") for event in events if event["message"].endswith(message)
    ]


def test_the_mail_of_an_account_is_watched_and_a_later_watch_goes_on_at_a_position(stack: LocalStack) -> None:
    with stack.running_cli("messages", "watch", "--output", "json") as watching:
        assert watching.stdout is not None
        begun = json.loads(watching.stdout.readline())
        (message,) = (one["id"] for one in stack.json("send", "--to", "a@example.net", "--no-follow")["messages"])
        answers = _read_answers(watching.stdout, message)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == _INTERRUPTED
    types = _types_of(answers, message)
    assert (types[0], types[-1], types.count("SENT")) == ("ACCEPTED", "SENT", 1)

    with stack.running_cli("messages", "watch", "--output", "json", "--position", begun["position"]) as again:
        assert again.stdout is not None
        assert _types_of(_read_answers(again.stdout, message), message) == types
    text = stack.cli("messages", "watch", "--position", answers[-1]["position"], "--timeout", "1")
    assert text.returncode == 0, text.stderr
    assert message not in text.stdout
    assert "goes on from here" in text.stderr


def test_mail_is_held_shown_cancelled_and_goes_out_at_its_time(stack: LocalStack) -> None:
    held = stack.json("send", "--to", "later@example.net", "--hold-for", "3600", "--priority", "5")
    (message,) = (one["id"] for one in held["messages"])
    deadline = time.monotonic() + 30
    while not (found := [one for one in stack.json("messages", "list")["messages"] if one["name"].endswith(message)]):
        assert time.monotonic() < deadline, stack.logs()
    got = stack.json("messages", "get", message)
    assert (got["state"], got["priority"]) == ("RECIPIENT_STATE_SCHEDULED", 5)
    assert got["sendTime"] == found[0]["sendTime"] == got["recipients"][0]["nextAttemptTime"]
    assert stack.json("messages", "cancel", message)["changedCount"] == 1
    short = stack.json("send", "--to", "soon@example.net", "--hold-for", "1", "--follow")["messages"][0]
    times = [datetime.fromisoformat(short[name]) for name in ("acceptTime", "sendTime")]
    assert times[1] - times[0] == timedelta(seconds=1)
    (sent,) = (one for one in short["events"] if one["type"] == "DELIVERY_EVENT_TYPE_SENT")
    assert datetime.fromisoformat(sent["eventTime"]) >= times[1]
    assert b"PRIORITY" not in stack.delivered(short["name"].rpartition("/")[2])[1]


def test_send_by_smtps_of_a_file_keeps_its_bytes(stack: LocalStack) -> None:
    (stack.folder / "raw.eml").write_bytes(_CONTENT)
    answer = stack.json("send", "--to", "raw@example.net", "--raw", "raw.eml", "--implicit-tls")
    message = answer["messages"][0]["name"].rpartition("/")[2]
    assert stack.delivered(message)[1].endswith(_CONTENT)


def test_a_message_that_the_next_hop_refuses_ends_with_status_1_and_the_reason(stack: LocalStack) -> None:
    # The inbox takes everything, so the refusal is ours: no rule matches this recipient.
    stack.json("accounts", "create", "ruleless", "--sender-domain", "ruleless.example.org")
    credential = stack.json("credentials", "create", "app", "--account", "ruleless")
    _logged_in(stack, credential["username"], credential["secret"]).close()
    extra = {
        "POSTROAD_ACCOUNT": "ruleless",
        "POSTROAD_SMTP_USERNAME": credential["username"],
        "POSTROAD_SMTP_PASSWORD": credential["secret"],
    }
    result = stack.cli("send", "--to", "x@example.net", "--from", "a@ruleless.example.org", extra=extra)
    assert result.returncode == 1
    assert "5.4.4" in result.stderr


def test_status_shows_processes_and_a_node_in_sync(stack: LocalStack) -> None:
    status = stack.json("status")
    assert {one["name"]: one["ready"] for one in status["processes"]} == {"control plane": True, "node": True}
    (node,) = status["nodes"]
    assert node["configStatus"] == "CONFIG_STATUS_SYNCED"
    assert stack.cli("health").stdout.strip() == "SERVING"
