"""Postfix as a customer's mail server: it relays all its mail through Postroad, over verified TLS and with AUTH."""

from __future__ import annotations

import email
import email.policy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from support import folders
from support.arrivals import Arrivals, Expected, check_content
from support.local_stack import LocalStack
from support.mail_clients import Way
from support.postfix_smart_host import NAME, SmartHostClient
from support.samples import SAMPLES, TEXT, Sample

pytestmark = pytest.mark.timeout(180)

_TO = "someone@example.net"


@pytest.fixture(scope="module", params=[Way(mechanism="PLAIN"), Way(implicit_tls=True, mechanism="LOGIN")], ids=str)
def postfix(request: pytest.FixtureRequest, stack: LocalStack) -> Iterator[SmartHostClient]:
    with folders.passable_folder() as folder:
        instance = SmartHostClient(folder, stack, request.param)
        try:
            yield instance.start()
        finally:
            instance.close()


@pytest.fixture(scope="module")
def arrivals(stack: LocalStack) -> Iterator[Arrivals]:
    arrivals = Arrivals(stack.inbox)
    yield arrivals
    arrivals.check_once(stack)


def _check(arrived: bytes, submitted: bytes, expected: Expected, first_words: bytes) -> None:
    """Check Postroad's fields, then Postfix's Received line, which begins with `first_words`, then the content."""
    sent = arrived[arrived.index(b"\r\n" + first_words) + 2 :]
    check_content(arrived, sent, expected)
    assert sent.endswith(submitted)
    line = sent.removesuffix(submitted)
    # Where there is no header Postfix parts its own from the text; folded lines aside, there is nothing else.
    names = email.message_from_bytes(line, policy=email.policy.SMTP).keys()
    assert names == ["Received"]
    assert line.count(b"\r\n\r\n") <= 1


def _expected(message: str, sample: Sample, recipient: str = _TO) -> Expected:
    return Expected(message, sample.added, recipient=recipient, client=NAME)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_what_postfix_relays_arrives_below_the_documented_headers(
    stack: LocalStack, arrivals: Arrivals, postfix: SmartHostClient, sample: Sample
) -> None:
    message = postfix.inject(sample.content, [_TO]).queued_as()
    mail, arrived = arrivals.wait(message)
    assert (mail.sender, mail.recipients) == ("app@example.com", (_TO,))
    _check(arrived, sample.content, _expected(message, sample), b"Received: from client.example.com ")


def test_postfix_has_verified_the_certificate(postfix: SmartHostClient) -> None:
    postfix.inject(TEXT, [_TO]).queued_as()
    assert "Verified TLS connection established to localhost[127.0.0.1]" in postfix.log()


def test_a_local_program_sends_by_the_sendmail_command(arrivals: Arrivals, postfix: SmartHostClient) -> None:
    header = f"From: Cron <app@{NAME}>\nDate: Fri, 20 Nov 2026 10:00:00 +0100\nMessage-ID: <{postfix.port}@{NAME}>\n"
    content = f"{header}Subject: Übersicht\n\nGrüße\n.\n.dot\n"
    message = postfix.inject_by_sendmail(content.encode(), _TO).queued_as()
    submitted = content.replace("\n", "\r\n").encode()
    arrived = arrivals.wait(message)[1]
    # The subject is raw UTF-8, and Postfix sees that such a header needs SMTPUTF8.
    expected = Expected(message, ("Received",), protocol="UTF8SMTPSA", recipient=_TO, client=NAME)
    _check(arrived, submitted, expected, b"Received: by relay.example.com (Postfix, ")


def test_all_recipients_of_a_message_are_reached_in_one_transaction(
    arrivals: Arrivals, postfix: SmartHostClient
) -> None:
    recipients = [f"reader{number}@{domain}" for number in range(5) for domain in ("example.net", "example.org")]
    message = postfix.inject(TEXT, recipients).queued_as()
    mail, arrived = arrivals.wait(message)
    assert sorted(mail.recipients) == sorted(recipients)
    _check(arrived, TEXT, Expected(message, client=NAME), b"Received: from client.example.com ")


def test_an_address_of_another_script_is_relayed(arrivals: Arrivals, postfix: SmartHostClient) -> None:
    recipient = "чтец@example.net"
    message = postfix.inject(TEXT, [recipient]).queued_as()
    mail, arrived = arrivals.wait(message)
    assert mail.recipients == (recipient,)
    expected = Expected(message, protocol="UTF8SMTPSA", recipient=recipient, client=NAME)
    _check(arrived, TEXT, expected, b"Received: from client.example.com ")


def test_messages_over_several_connections_at_once_arrive_once_each(
    arrivals: Arrivals, postfix: SmartHostClient
) -> None:
    contents = [TEXT + b"number %d\r\n" % number for number in range(60)]
    with ThreadPoolExecutor(6) as pool:
        sent = [one.queued_as() for one in pool.map(lambda content: postfix.inject(content, [_TO]), contents)]
    assert len(set(sent)) == len(contents)
    for message, content in zip(sent, contents, strict=True):
        assert arrivals.wait(message)[1].endswith(content)
    assert arrivals.repeated() == []


def test_a_refused_sender_bounces_at_once_and_the_bounce_itself_is_relayed(
    arrivals: Arrivals, postfix: SmartHostClient
) -> None:
    sender = f"app{postfix.port}@elsewhere.example"
    delivery = postfix.inject(TEXT, [_TO], sender=sender)
    assert delivery.status == "bounced"
    assert "553 5.7.1 Sender domain does not belong to the account" in delivery.reply
    mail, bounce = arrivals.wait_for(lambda one: one.recipients == (sender,))
    assert mail.sender == ""
    assert b"Sender domain does not belong to the account" in bounce.replace(b"\r\n", b" ").replace(b"     ", b" ")
