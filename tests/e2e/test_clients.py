"""Foreign clients submit over verified TLS: what they sent arrives byte for byte, below the documented headers.

swaks, curl and smtplib send the same samples in the same ways. Their own words for a refusal are looked at too, since
those are what people see.
"""

from __future__ import annotations

import json
import re
import smtplib
import ssl
import subprocess
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from email.policy import SMTPUTF8
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.arrivals import Arrivals, Expected, check_content
from support.certificates import write_certificate
from support.local_stack import LocalStack
from support.mail_clients import (
    WAYS,
    RefusedError,
    Way,
    run_swaks,
    send_by_session,
    smtplib_session,
    submit_by_curl,
    submit_by_smtplib,
    submit_by_swaks,
)
from support.programs import find_program
from support.samples import DOTS, SAMPLES, TEXT, Sample

pytestmark = pytest.mark.timeout(180)

_Submit = Callable[..., str]
_MAX_BYTES = 26_214_400
_TO = "someone@example.net"

each_client = pytest.mark.parametrize(
    "submit", [submit_by_swaks, submit_by_curl, submit_by_smtplib], ids=["swaks", "curl", "smtplib"]
)


@pytest.fixture(scope="module")
def arrivals(stack: LocalStack) -> Iterator[Arrivals]:
    arrivals = Arrivals(stack.inbox)
    yield arrivals
    arrivals.check_once(stack)


# --- all clients -----------------------------------------------------------------------------------------------------


@each_client
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_what_a_client_sent_arrives_below_the_documented_headers(
    stack: LocalStack, arrivals: Arrivals, submit: _Submit, sample: Sample
) -> None:
    message = submit(stack, sample.content, [_TO])
    mail, arrived = arrivals.wait(message)
    assert (mail.sender, mail.recipients) == ("app@example.com", (_TO,))
    expected = Expected(message, sample.added, recipient=_TO, body_only=sample.body_only)
    check_content(arrived, sample.content, expected)


@each_client
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_both_ports_and_both_mechanisms_serve(stack: LocalStack, arrivals: Arrivals, submit: _Submit, way: Way) -> None:
    message = submit(stack, DOTS, [_TO], way=way)
    check_content(arrivals.wait(message)[1], DOTS, Expected(message, recipient=_TO))


@each_client
def test_each_of_several_recipients_gets_the_message_once_and_no_header_tells_of_the_others(
    stack: LocalStack, arrivals: Arrivals, submit: _Submit
) -> None:
    recipients = [f"reader{number}@{domain}" for number in range(10) for domain in ("example.net", "example.org")]
    message = submit(stack, TEXT, recipients)
    mail, arrived = arrivals.wait(message)
    assert sorted(mail.recipients) == sorted(recipients)
    check_content(arrived, TEXT, Expected(message))


@each_client
@pytest.mark.parametrize("implicit_tls", [False, True], ids=["starttls", "smtps"])
def test_a_wrong_password_is_refused_in_words_that_the_client_shows(
    stack: LocalStack, submit: _Submit, *, implicit_tls: bool
) -> None:
    with pytest.raises((RefusedError, smtplib.SMTPAuthenticationError)) as refusal:
        submit(stack, TEXT, [_TO], way=Way(implicit_tls, password="prs_wrong"))
    assert re.search(r"535|Login denied", str(refusal.value))


@pytest.mark.parametrize(
    ("submit", "words"), [(submit_by_swaks, "verif"), (submit_by_curl, "certificate")], ids=["swaks", "curl"]
)
@pytest.mark.parametrize("implicit_tls", [False, True], ids=["starttls", "smtps"])
def test_a_client_that_trusts_another_ca_sends_nothing(
    stack: LocalStack, submit: _Submit, tmp_path: Path, words: str, *, implicit_tls: bool
) -> None:
    other, _ = write_certificate(tmp_path, "another CA")
    with pytest.raises(RefusedError) as refusal:
        submit(stack, TEXT, [_TO], way=Way(implicit_tls, ca_file=str(other)))
    assert words in str(refusal.value)
    assert "MAIL FROM" not in str(refusal.value)


@each_client
def test_a_sender_of_a_domain_that_is_not_the_accounts_is_refused_with_553(stack: LocalStack, submit: _Submit) -> None:
    with pytest.raises(RefusedError) as refusal:
        submit(stack, TEXT, [_TO], sender="app@elsewhere.example")
    assert "553 5.7.1 " in str(refusal.value)


@each_client
def test_an_author_of_a_domain_that_is_not_the_accounts_is_refused_with_550(stack: LocalStack, submit: _Submit) -> None:
    with pytest.raises(RefusedError) as refusal:
        submit(stack, TEXT.replace(b"example.com", b"elsewhere.example"), [_TO])
    assert "550 5.7.1 From names a domain of somebody else" in str(refusal.value)


# --- swaks and curl as people use them -------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", [False, True], ids=["one-by-one", "pipelined"])
def test_swaks_with_its_own_message_arrives_as_its_transcript_shows(
    stack: LocalStack, arrivals: Arrivals, *, pipelining: bool
) -> None:
    words = ["--header", "Subject: By hand", "--body", "Hello\n.dot\n\nBye", *(["--pipeline"] if pipelining else [])]
    transcript = run_swaks(stack, "app@example.com", [_TO], words)
    found = re.search(rb"<~  354 .*?\n(.*\n) ~> \.\r?\n<~  250 2\.0\.0 queued as (\S+)", transcript, re.DOTALL)
    assert found is not None, transcript
    lines = [line.removeprefix(b" ~> ").removesuffix(b"\r") for line in found[1].splitlines()]
    sent = b"".join(line.removeprefix(b".") + b"\r\n" for line in lines)
    message = found[2].decode()
    assert b"\r\n.dot\r\n\r\nBye\r\n" in sent
    check_content(arrivals.wait(message)[1], sent, Expected(message, ("Received",), recipient=_TO))


def test_swaks_may_send_an_empty_message(stack: LocalStack, arrivals: Arrivals) -> None:
    message = submit_by_swaks(stack, b"", [_TO])
    check_content(arrivals.wait(message)[1], b"", Expected(message, recipient=_TO))


def test_curl_is_told_that_its_file_is_too_large_before_it_sends_it(stack: LocalStack) -> None:
    with pytest.raises(RefusedError) as refusal:
        submit_by_curl(stack, TEXT + b"x\r\n" * (_MAX_BYTES // 3), [_TO])
    assert "552 5.3.4 Message is too big" in str(refusal.value)
    assert "> DATA" not in str(refusal.value)


def test_curl_submits_to_an_address_of_another_script(stack: LocalStack, arrivals: Arrivals) -> None:
    message = submit_by_curl(stack, TEXT, ["jürgen@example.net"])
    mail, arrived = arrivals.wait(message)
    assert mail.recipients == ("jürgen@example.net",)
    assert "SMTPUTF8" in mail.options
    check_content(arrived, TEXT, Expected(message, protocol="UTF8SMTPSA", recipient="jürgen@example.net"))


def _curl_json(stack: LocalStack, path: str, key: str) -> tuple[int, Any]:
    """Status and body of a GET; the key goes by standard input, not onto the command line."""
    http = yaml.safe_load((stack.folder / ".postroad" / "cli.yaml").read_text(encoding="utf-8"))["http"]
    result = subprocess.run(
        [
            *(find_program("curl"), "--disable", "--silent", "--show-error", "--config", "-"),
            *("--write-out", "\n%{http_code}", f"{http}{path}"),
        ],
        input=f'header = "Authorization: Bearer {key}"\n' if key else "",
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    body, _, status = result.stdout.rpartition("\n")
    return int(status), json.loads(body)


def test_curl_lists_the_messages_just_sent_over_http(stack: LocalStack) -> None:
    recipient = "listed@example.net"
    with smtplib_session(stack) as client:
        sent = [send_by_session(client, TEXT, [recipient]) for _ in range(3)]
    for message in sent:
        assert stack.cli("messages", "follow", message).returncode == 0
    key = yaml.safe_load((stack.folder / ".postroad" / "cli.yaml").read_text(encoding="utf-8"))["api_key"]
    path = f"/api/v1/accounts/demo/messages?recipient={recipient}&pageSize=2"
    status, first = _curl_json(stack, path, key)
    assert status == 200
    status, second = _curl_json(stack, f"{path}&pageToken={first['nextPageToken']}", key)
    assert status == 200
    assert not second.get("nextPageToken")
    listed = [*first["messages"], *second["messages"]]
    assert [one["name"] for one in listed] == [f"accounts/demo/messages/{one}" for one in reversed(sent)]
    assert {one["state"] for one in listed} == {"RECIPIENT_STATE_SENT"}
    status, got = _curl_json(stack, f"/api/v1/{listed[0]['name']}", key)
    assert status == 200
    assert [one["address"] for one in got["recipients"]] == [recipient]


@pytest.mark.parametrize("key", ["", "prk_aaaaaaaa_" + "a" * 43], ids=["none", "unknown"])
def test_curl_without_a_known_key_is_answered_401(stack: LocalStack, key: str) -> None:
    status, body = _curl_json(stack, "/api/v1/accounts/demo/messages", key)
    assert status == 401
    assert "messages" not in body


# --- smtplib ---------------------------------------------------------------------------------------------------------


def test_500_messages_over_one_connection_arrive_once_each(stack: LocalStack, arrivals: Arrivals) -> None:
    contents = [TEXT + b"number %d\r\n" % number for number in range(500)]
    with smtplib_session(stack) as client:
        sent = [send_by_session(client, content, [_TO]) for content in contents]
    assert len(set(sent)) == len(contents)
    for message, content in zip(sent, contents, strict=True):
        check_content(arrivals.wait(message)[1], content, Expected(message, recipient=_TO))
    assert arrivals.repeated() == []


def test_send_message_submits_what_the_email_package_makes(stack: LocalStack, arrivals: Arrivals) -> None:
    message = EmailMessage(policy=SMTPUTF8)
    message["From"] = "Jürgen <app@example.com>"
    message["To"] = "книга@example.net"
    message["Subject"] = "Grüße 你好"
    message["X-Sample"] = "send-message"
    message.set_content("Grüße\n.dot\n", cte="8bit")
    with smtplib_session(stack) as client:
        assert client.send_message(message) == {}
    mail, arrived = arrivals.wait_for(lambda one: one.recipients == ("книга@example.net",))
    assert mail.subject == "Grüße 你好"
    assert "SMTPUTF8" in mail.options
    expected = Expected(mail.message, protocol="UTF8SMTPSA", recipient="книга@example.net")
    check_content(arrived, message.as_bytes(), expected)


def test_a_second_login_after_a_wrong_password_may_succeed_on_the_same_connection(stack: LocalStack) -> None:
    with smtplib.SMTP("127.0.0.1", stack.ready["ports"]["smtp"], timeout=30) as client:
        client.starttls(context=stack.tls_context())
        with pytest.raises(smtplib.SMTPAuthenticationError) as refusal:
            client.login(stack.ready["smtp_username"], "prs_wrong")
        assert (refusal.value.smtp_code, refusal.value.smtp_error[:6]) == (535, b"5.7.8 ")
        assert client.login(stack.ready["smtp_username"], stack.ready["smtp_password"])[0] == 235


def test_login_without_tls_is_not_even_tried(stack: LocalStack) -> None:
    with smtplib.SMTP("127.0.0.1", stack.ready["ports"]["smtp"], timeout=30) as client:
        with pytest.raises(smtplib.SMTPNotSupportedError):
            client.login(stack.ready["smtp_username"], stack.ready["smtp_password"])
        assert client.docmd("AUTH", "PLAIN AGEAYg==")[0] == 538


def test_a_default_context_does_not_trust_the_local_ca(stack: LocalStack) -> None:
    with (
        smtplib.SMTP("127.0.0.1", stack.ready["ports"]["smtp"], timeout=30) as client,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        client.starttls(context=ssl.create_default_context())


def test_a_message_declared_too_large_is_refused_at_mail_and_the_connection_goes_on(
    stack: LocalStack, arrivals: Arrivals
) -> None:
    with smtplib_session(stack) as client:
        with pytest.raises(smtplib.SMTPSenderRefused) as refusal:
            client.sendmail("app@example.com", [_TO], b"x\r\n" * (_MAX_BYTES // 3 + 1))
        assert (refusal.value.smtp_code, refusal.value.smtp_error[:6]) == (552, b"5.3.4 ")
        arrivals.wait(send_by_session(client, TEXT, [_TO]))


def test_a_message_that_turns_out_too_large_is_refused_after_its_end_and_the_connection_goes_on(
    stack: LocalStack, arrivals: Arrivals
) -> None:
    with smtplib_session(stack) as client:
        assert client.mail("app@example.com")[0] == 250
        assert client.rcpt(_TO)[0] == 250
        code, text = client.data(TEXT + (b"x" * 70 + b"\r\n") * (_MAX_BYTES // 72))
        assert (code, text[:6]) == (552, b"5.3.4 ")
        arrivals.wait(send_by_session(client, TEXT, [_TO]))


def test_a_message_of_the_greatest_size_arrives(stack: LocalStack, arrivals: Arrivals) -> None:
    lines = (b"x" * 70 + b"\r\n") * ((_MAX_BYTES - len(TEXT)) // 72 - 1)
    content = TEXT + lines + b"y" * (_MAX_BYTES - len(TEXT) - len(lines) - 2) + b"\r\n"
    assert len(content) == _MAX_BYTES
    with smtplib_session(stack) as client:
        message = send_by_session(client, content, [_TO])
    check_content(arrivals.wait(message)[1], content, Expected(message, recipient=_TO))


def test_sendmail_tells_of_the_refused_recipients_and_reaches_the_others(stack: LocalStack, arrivals: Arrivals) -> None:
    good = ["good@example.net", "well@example.net"]
    with smtplib_session(stack) as client:
        refused = client.sendmail("app@example.com", [good[0], "bad..dots@example.net", good[1]], TEXT)
    assert {address: code for address, (code, _) in refused.items()} == {"bad..dots@example.net": 553}
    arrivals.wait_for(lambda one: one.recipients == tuple(good))


def test_a_foreign_sender_is_refused_as_smtplib_tells_it_and_the_next_may_send(
    stack: LocalStack, arrivals: Arrivals
) -> None:
    with smtplib_session(stack) as client:
        with pytest.raises(smtplib.SMTPSenderRefused) as refusal:
            client.sendmail("app@elsewhere.example", [_TO], TEXT)
        assert (refusal.value.smtp_code, refusal.value.smtp_error[:6]) == (553, b"5.7.1 ")
        arrivals.wait(send_by_session(client, TEXT, [_TO], sender="other@sub.example.com"))
