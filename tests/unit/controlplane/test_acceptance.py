"""What becomes of a message that is sent by API, without anything around it: the content, the envelope, the errors."""

from __future__ import annotations

import pytest

from controlplane.domain.acceptance import Accepted, Origin, SendingAccount, Stamp, accept
from controlplane.domain.errors import FailedPreconditionError, InvalidArgumentError, Reason
from controlplane.domain.outgoing import Outgoing
from controlplane.domain.sending_limits import SendingLimits
from dataplane.core.config import Account, HeaderCondition, NodeSettings, Rule, Target
from dataplane.core.idempotency import hash_key
from dataplane.core.ids import format_message_id, new_message_id
from dataplane.core.limits import Limit, LimitScope, LimitUnit
from dataplane.core.policy import compile_account

NOW_MS = 1_780_000_000_000
STAMP = Stamp(
    new_message_id(NOW_MS, bytes(10)),
    NOW_MS,
    "cp.example",
    "accounts/acme/apiKeys/k",
    "session",
    Origin("192.0.2.7", "HTTPS", "TLSv1.3"),
    "secret",
)
RAW = b"From: app@acme.example\r\nX-Tag: news\r\n\r\nHi.\r\n"
TARGETS = (Target("accounts/acme/providers/hop"),)


def account(*rules: Rule, **more: object) -> SendingAccount:
    value = Account(
        "accounts/acme", "uid", 7, ("acme.example",), rules=rules or (Rule("accounts/acme/routingRules/a", 0, TARGETS),)
    )
    settings = NodeSettings(**more)  # type: ignore[arg-type]  # settings by name
    return SendingAccount(compile_account(value), settings, SendingLimits(value, settings), is_suspended=False)


def sent(message: Outgoing, to: SendingAccount | None = None) -> Accepted:
    return accept(message, to or account(), STAMP)


def raw(*recipients: str, content: bytes = RAW, **more: object) -> Outgoing:
    to = recipients or ("someone@example.net",)
    return Outgoing("message", "app@acme.example", to, content, **more)  # type: ignore[arg-type]  # fields by name


def test_the_envelope_says_who_sent_it_how_and_under_which_key() -> None:
    message = sent(raw(request_id="r", fingerprint=b"f" * 32, priority=2))
    envelope = message.envelope
    assert (envelope.account, envelope.account_uid, envelope.credential) == (
        "accounts/acme",
        "uid",
        "accounts/acme/apiKeys/k",
    )
    assert (envelope.client_address, envelope.client_tls, envelope.priority) == ("192.0.2.7", "TLSv1.3", 2)
    assert envelope.headers == {"x-tag": ("news",)}
    assert (envelope.size_bytes, message.charged_bytes) == (len(message.content), len(RAW))
    assert message.key is not None
    assert (message.key.key_hash, message.key.content_hash) == (hash_key("uid", b"r"), b"f" * 32)
    assert sent(raw()).key is None


def test_received_names_the_peer_the_protocol_and_one_recipient_only() -> None:
    top = sent(raw()).content.split(b"\r\nDate:")[0].decode()
    assert top.startswith("Received: from unknown ([192.0.2.7]) (TLSv1.3)\r\n\tby cp.example with HTTPS id ")
    assert f"{format_message_id(STAMP.message_id)}\r\n\tfor <someone@example.net>;" in top
    assert "for <" not in sent(raw("a@example.net", "b@example.net")).content.decode()


def test_a_last_line_without_an_end_gets_one_and_nothing_else_changes() -> None:
    assert sent(raw(content=RAW.removesuffix(b"\r\n"))).content.endswith(RAW)
    assert sent(raw(content=RAW)).content.endswith(b"\r\n" + RAW)


def test_what_is_there_is_not_added() -> None:
    content = b"Date: x\r\nMessage-ID: <a@b>\r\n" + RAW
    message = sent(raw(content=content))
    assert message.content.count(b"Date:") == message.content.count(b"Message-ID:") == 1
    assert message.envelope.header_message_id == "<a@b>"


@pytest.mark.parametrize(
    ("content", "is_8bit", "is_international"),
    [
        (RAW, False, False),
        (RAW + "Grüße\r\n".encode(), True, False),
        ("Subject: Grüße\r\n".encode() + RAW, True, True),
    ],
)
def test_what_a_next_hop_must_offer_is_known(content: bytes, is_8bit: bool, is_international: bool) -> None:  # noqa: FBT001 - a table
    envelope = sent(raw(content=content)).envelope
    assert (envelope.body_8bit, envelope.smtputf8) == (is_8bit, is_international)
    assert sent(raw("jörg@example.net")).envelope.smtputf8


def test_a_rule_that_only_the_content_can_match_is_asked_when_it_is_there() -> None:
    only_news = account(Rule("accounts/acme/routingRules/a", 0, TARGETS, headers=(HeaderCondition("x-tag", "news"),)))
    sent(raw(), only_news)
    with pytest.raises(FailedPreconditionError) as refusal:
        sent(raw(content=b"From: app@acme.example\r\n\r\nHi.\r\n"), only_news)
    assert refusal.value.reason is Reason.NO_ROUTE


def test_a_message_is_as_large_as_the_pool_allows_and_no_larger() -> None:
    fits = account(max_message_bytes=len(RAW))
    sent(raw(), fits)
    with pytest.raises(InvalidArgumentError):
        sent(raw(content=RAW + b"x\r\n"), fits)


def test_limits_of_account_and_address_are_drawn_from_and_one_counts() -> None:
    value = Account(
        "accounts/acme",
        "uid",
        7,
        limits=(Limit("accounts/acme/limits/own", LimitScope.ACCOUNT, LimitUnit.MESSAGE, 10, 60.0, 5),),
    )
    settings = NodeSettings(
        limits=(
            Limit("limits/all", LimitScope.ACCOUNT, LimitUnit.BYTE, 1_000, 1.0, 100),
            Limit("limits/ip", LimitScope.ADDRESS, LimitUnit.RECIPIENT, 20, 1.0, 10),
        )
    )
    takes = SendingLimits(value, settings).takes("2001:db8::1:2:3:4", 3, 500)
    assert [(take.tag, take.key, take.capacity, take.cost) for take in takes] == [
        ("a:accounts/acme", "account:message", 5, 1),
        ("a:accounts/acme", "account:byte", 100, 500),
        ("ip:2001:db8::", "address:recipient", 10, 3),
    ]
