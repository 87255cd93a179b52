"""Sending by API through a whole stack: what arrives is what was sent, once, whatever dies in between."""

from __future__ import annotations

import base64
import contextlib
import email
import http.client
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from email.policy import default
from pathlib import Path

import pytest

from postroad.control.v1.message_pb2 import RECIPIENT_STATE_SENT, Message
from postroad.control.v1.message_service_pb2 import (
    BatchSendMessagesRequest,
    GetMessageRequest,
    ListMessagesRequest,
    SendMessageRequest,
)
from postroad.control.v1.outgoing_message_pb2 import Attachment, EmailAddress, MessageContent, OutgoingMessage
from postroad.sdk import InvalidArgumentError, PostroadError, watch_events
from support.arrivals import Arrivals
from support.killable_stack import KillableStack, wait_until
from support.local_stack import LocalStack, stack_folder
from support.samples import SAMPLES, Sample

pytestmark = pytest.mark.timeout(300)

PARENT = "accounts/demo"
SENDER = "app@example.com"
SENDS = 40


@pytest.fixture(scope="module")
def arrivals(stack: LocalStack) -> Iterator[Arrivals]:
    arrivals = Arrivals(stack.inbox)
    yield arrivals
    arrivals.check_once(stack)


def raw(content: bytes, *recipients: str) -> OutgoingMessage:
    return OutgoingMessage(sender=SENDER, recipients=recipients or ["someone@example.net"], raw=content)


def subject_of(content: bytes) -> str:
    return str(email.message_from_bytes(content, policy=default)["Subject"])


def short(name: str) -> str:
    return name.rpartition("/")[2]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_a_whole_message_arrives_octet_for_octet_below_the_headers_that_are_added(
    stack: LocalStack, arrivals: Arrivals, sample: Sample
) -> None:
    with stack.client() as client:
        answer = client.messages.SendMessage(SendMessageRequest(parent=PARENT, message=raw(sample.content)))
    _, arrived = arrivals.wait(short(answer.message))
    added = arrived.removesuffix(sample.content)
    assert len(added) + len(sample.content) == len(arrived)
    assert added.startswith(b"Received: from unknown ([127.0.0.1]) (TLS)\r\n\tby localhost with GRPCS id ")


def test_a_message_of_parts_arrives_with_all_of_them(stack: LocalStack, arrivals: Arrivals) -> None:
    content = MessageContent(
        author=EmailAddress(address=SENDER, display_name="Käse & Brot"),
        to=[EmailAddress(address="someone@example.net")],
        bcc=[EmailAddress(address="hidden@example.net")],
        subject="Grüße aus Köln",
        text="Schöne Grüße.\n",
        html='<p>Schöne Grüße.</p><img src="cid:logo@example.com">',
        attachments=[
            Attachment(file_name="logo.png", content_type="image/png", data=b"\x89PNG", content_id="logo@example.com"),
            Attachment(file_name="Rechnung März.pdf", content_type="application/pdf", data=bytes(range(256)) * 100),
        ],
    )
    request = SendMessageRequest(parent=PARENT, message=OutgoingMessage(content=content, tags=["hello"]))
    with stack.client() as client:
        answer = client.messages.SendMessage(request)
        assert answer.recipient_count == 2
        wait_until(
            lambda: all(one.state == RECIPIENT_STATE_SENT for one in _get(stack, answer.message).recipients),
            "both recipients are sent",
        )
        listed = client.messages.ListMessages(ListMessagesRequest(parent=PARENT, tag="hello"))
        assert [one.name for one in listed.messages] == [answer.message]
        assert [*_get(stack, answer.message).tags] == ["hello"]
        with contextlib.closing(watch_events(client, PARENT, message=answer.message, timeout_s=30)) as answers:
            assert {tuple(event.tags) for event in next(answers).events} == {("hello",)}
    copies = [stack.inbox.content(mail) for mail in stack.inbox.find(short(answer.message))]
    message = email.message_from_bytes(copies[0], policy=default)
    assert b"hidden" not in b"".join(copies)
    assert (message["From"], message["Subject"]) == (f"Käse & Brot <{SENDER}>", "Grüße aus Köln")
    plain, html = message.get_body(("plain",)), message.get_body(("html",))
    assert plain is not None
    assert html is not None
    assert plain.get_content().split() == ["Schöne", "Grüße."]
    assert "cid:logo@example.com" in html.get_content()
    (attached,) = message.iter_attachments()
    assert (attached.get_filename(), attached.get_content()) == ("Rechnung März.pdf", bytes(range(256)) * 100)


def _get(stack: LocalStack, name: str) -> Message:
    with stack.client() as client:
        return client.messages.GetMessage(GetMessageRequest(name=name))


def test_the_same_request_twice_arrives_once_and_another_one_under_its_id_is_refused(
    stack: LocalStack, arrivals: Arrivals
) -> None:
    content = b"From: app@example.com\r\nSubject: twice\r\n\r\nhi\r\n"
    request = SendMessageRequest(parent=PARENT, message=raw(content), request_id=str(uuid.uuid4()))
    with stack.client() as client:
        first, again = client.messages.SendMessage(request), client.messages.SendMessage(request)
        assert (again.message, again.repeated_request) == (first.message, True)
        request.message.raw = content.replace(b"hi", b"ho")
        with pytest.raises(InvalidArgumentError) as refusal:
            client.messages.SendMessage(request)
    assert refusal.value.reason == "REQUEST_ID_REUSED"
    arrivals.wait(short(first.message))


def test_a_batch_with_some_that_are_wrong_delivers_all_the_others(stack: LocalStack) -> None:
    run = uuid.uuid4().hex
    requests = [
        SendMessageRequest(
            message=raw(b"From: app@example.com\r\nSubject: %b %d\r\n\r\nhi\r\n" % (run.encode(), number))
        )
        for number in range(500)
    ]
    bad = {5, 100, 499}
    for number in bad:
        requests[number].message.recipients[:] = ["nobody"]
    with stack.client() as client:
        answer = client.messages.BatchSendMessages(BatchSendMessagesRequest(parent=PARENT, requests=requests))
    assert {n for n, one in enumerate(answer.results) if one.WhichOneof("outcome") == "error"} == bad
    names = {short(one.sent.message) for one in answer.results if one.sent.message}
    assert len(names) == 497
    wait_until(lambda: names <= {mail.message for mail in stack.inbox.mails()}, "all of the batch have arrived")
    copies = Counter(mail.message for mail in stack.inbox.mails())
    assert all(copies[name] == 1 for name in names)


def test_a_message_is_sent_as_json_over_http(stack: LocalStack, arrivals: Arrivals) -> None:
    content = b"From: app@example.com\r\nSubject: json\r\n\r\nhi\r\n"
    body = {
        "message": {
            "sender": SENDER,
            "recipients": ["someone@example.net"],
            "raw": base64.b64encode(content).decode(),
            "metadata": {"order": "47"},
        }
    }
    root = stack.folder / ".postroad"
    key = (root / "keys" / "operator.key").read_text(encoding="ascii").strip()
    connection = http.client.HTTPConnection("127.0.0.1", stack.ready["ports"]["http"], timeout=20)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with contextlib.closing(connection):
        connection.request("POST", f"/api/v1/{PARENT}/messages:send", json.dumps(body), headers)
        said = json.load(connection.getresponse())
    _, arrived = arrivals.wait(short(said["message"]))
    assert arrived.endswith(content)
    assert b"with HTTP id" in arrived
    assert dict(_get(stack, said["message"]).metadata) == {"order": "47"}


def test_the_command_sends_a_file_and_parts_and_follows_to_the_end(stack: LocalStack, tmp_path: Path) -> None:
    file = tmp_path / "mail.eml"
    file.write_bytes(b"From: App <app@example.com>\nTo: a@example.net\nBcc: b@example.net\nSubject: a file\n\nhi\n")
    sent = stack.json("messages", "send", str(file), "--tag", "cli", "--metadata", "a=b")
    assert [(one["address"], one["state"]) for one in sent["recipients"]] == [
        ("a@example.net", "RECIPIENT_STATE_SENT"),
        ("b@example.net", "RECIPIENT_STATE_SENT"),
    ]
    assert (sent["tags"], sent["metadata"]) == (["cli"], {"a": "b"})
    arrived = stack.inbox.content(stack.inbox.find(short(sent["name"]))[0])
    assert arrived.endswith(b"Subject: a file\r\n\r\nhi\r\n")
    assert b"Bcc" not in arrived

    attached = tmp_path / "note.txt"
    attached.write_text("a note")
    words = ["--from", SENDER, "--to", "A <a@example.net>", "--subject", "parts", "--text", "hi", "--attach"]
    shown = stack.cli("messages", "send", *words, str(attached))
    assert shown.returncode == 0, shown.stderr
    assert "by API" in shown.stdout
    later = stack.json("messages", "send", *words, str(attached), "--in", "2h", "--priority", "5")
    found = stack.json("messages", "get", short(later["message"]))
    assert (found["state"], found["priority"]) == ("RECIPIENT_STATE_SCHEDULED", 5)
    stack.cli("messages", "cancel", short(later["message"]), "--yes")
    wrong = stack.cli("messages", "send", "--from", SENDER, "--to", "nobody", "--text", "hi")
    assert wrong.returncode == 2


def test_a_control_plane_that_is_killed_in_between_leaves_one_message_of_each() -> None:
    with stack_folder() as folder:
        stack = KillableStack(folder)
        stack.start()
        try:
            _kill_in_between(stack)
        finally:
            if stack.is_running:
                stack.stop()


def _kill_in_between(stack: KillableStack) -> None:
    requests = [
        SendMessageRequest(
            parent=PARENT,
            message=raw(b"From: app@example.com\r\nSubject: kept %d\r\n\r\nhi\r\n" % number),
            request_id=str(uuid.uuid4()),
        )
        for number in range(SENDS)
    ]
    answered: dict[int, str] = {}

    def send_until_answered(number: int) -> None:
        deadline = time.monotonic() + 120
        while number not in answered and time.monotonic() < deadline:
            try:
                with stack.client() as client:
                    answered[number] = client.messages.SendMessage(requests[number]).message
            except PostroadError:
                continue

    threads = [threading.Thread(target=send_until_answered, args=(number,)) for number in range(SENDS)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answered) >= SENDS // 8, "some are answered")
    stack.kill_server("controlplane")
    for thread in threads:
        thread.join()
    assert len(answered) == SENDS
    wait_until(lambda: len(_subjects(stack)) >= SENDS, "all have arrived", 120)
    with stack.client() as client:
        again = [client.messages.SendMessage(request) for request in requests]
        listed = client.messages.ListMessages(ListMessagesRequest(parent=PARENT, page_size=1_000))
    assert [one.message for one in again] == [answered[number] for number in range(SENDS)]
    assert all(one.repeated_request for one in again)
    assert len(listed.messages) == SENDS
    assert Counter(_subjects(stack)) == {f"kept {number}": 1 for number in range(SENDS)}


def _subjects(stack: LocalStack) -> list[str]:
    return [subject_of(stack.inbox.content(mail)) for mail in stack.inbox.mails()]
