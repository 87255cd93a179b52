"""Typed transcripts of FUTURERELEASE (RFC 4865) and MT-PRIORITY (RFC 6710)."""

from __future__ import annotations

import pytest

from dataplane.core.session_contract import MAX_HOLD_S, MailParameters
from support.transcript import NOW_MS, Driver, Turn, run_every_way, start

EHLO = b"EHLO c.example\r\n"
LATEST = "2026-10-21T14:13:20Z"  # 30 days after NOW_MS


def dialog(*turns: Turn) -> Driver:
    return run_every_way(start, turns)


def mail(parameters: str, answer: bytes) -> Driver:
    sent = f"MAIL FROM:<a@example.com> {parameters}\r\n".encode()
    return dialog((EHLO, b"250-\r\n" * 9 + b"250 HELP"), (sent, answer), (b"RSET\r\n", b"250"))


def offered(*, tls_active: bool, authorized: bool, tls_available: bool = True) -> bytes:
    driver = start(tls_active=tls_active, tls_available=tls_available, authorized=authorized)
    driver.send(EHLO)
    return driver.answer()


# --- what is offered -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"tls_active": True, "authorized": False},
        {"tls_active": True, "authorized": True},
        {"tls_active": False, "tls_available": False, "authorized": True},
    ],
)
def test_rfc4865_3_the_longest_interval_and_the_latest_time_are_offered_where_mail_is_submitted(
    options: dict[str, bool],
) -> None:
    answer = offered(**options)
    assert f"250-FUTURERELEASE {MAX_HOLD_S} {LATEST}\r\n".encode() in answer
    assert b"250-MT-PRIORITY\r\n" in answer


def test_neither_is_offered_to_strangers_before_tls() -> None:
    for tls_available in (True, False):
        answer = offered(tls_active=False, tls_available=tls_available, authorized=False)
        assert b"FUTURERELEASE" not in answer
        assert b"MT-PRIORITY" not in answer


@pytest.mark.parametrize("parameter", [b"HOLDFOR=60", b"HOLDUNTIL=2026-10-01T00:00:00Z", b"MT-PRIORITY=9"])
def test_rfc6409_4_3_without_auth_neither_is_taken(parameter: bytes) -> None:
    driver = start(authorized=False)
    for sent in (EHLO, b"MAIL FROM:<a@example.com> " + parameter + b"\r\n"):
        driver.send(sent)
    assert driver.answer().endswith(b"530 5.7.0 Authentication required\r\n")
    assert driver.policy.calls == []


# --- FUTURERELEASE ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("HOLDFOR=1", MailParameters(hold_for_s=1)),
        (f"holdfor={MAX_HOLD_S}", MailParameters(hold_for_s=MAX_HOLD_S)),
        ("HOLDUNTIL=2026-09-21T15:13:20Z", MailParameters(hold_until_ms=NOW_MS + 3_600_000)),
        ("HOLDUNTIL=2026-09-21t17:13:20+02:00", MailParameters(hold_until_ms=NOW_MS + 3_600_000)),
        ("HOLDUNTIL=2026-09-21T14:13:20.5Z SIZE=9", MailParameters(size_bytes=9, hold_until_ms=NOW_MS + 500)),
        (f"HOLDUNTIL={LATEST}", MailParameters(hold_until_ms=NOW_MS + MAX_HOLD_S * 1000)),
        ("HOLDUNTIL=2001-01-01T00:00:00Z", MailParameters(hold_until_ms=978_307_200_000)),
    ],
)
def test_rfc4865_4_2_item_4_a_valid_time_is_taken(text: str, parameters: MailParameters) -> None:
    assert mail(text, b"250 2.1.0").policy.parameters == parameters


@pytest.mark.parametrize(
    "text",
    [
        "HOLDFOR", "HOLDFOR=", "HOLDFOR=0", "HOLDFOR=01", "HOLDFOR=-1", "HOLDFOR=1.5", "HOLDFOR=1h", "HOLDFOR=²",
        "HOLDFOR=9999999999", f"HOLDFOR={MAX_HOLD_S + 1}",
        "HOLDUNTIL", "HOLDUNTIL=", "HOLDUNTIL=tomorrow", "HOLDUNTIL=1790000000", "HOLDUNTIL=2026-10-01",
        "HOLDUNTIL=2026-10-01T00:00:00", "HOLDUNTIL=2026-10-01T00:00Z", "HOLDUNTIL=2026-02-30T00:00:00Z",
        "HOLDUNTIL=2026-10-21T14:13:20.001Z", "HOLDUNTIL=9999-12-31T23:59:59Z",
    ],
)  # fmt: skip
def test_rfc4865_4_2_items_7_8_10_and_11_what_is_invalid_or_too_far_is_refused(text: str) -> None:
    mail(text, b"501 5.5.4")


@pytest.mark.parametrize(
    "text",
    ["HOLDFOR=60 HOLDUNTIL=2026-10-01T00:00:00Z", "HOLDUNTIL=2001-01-01T00:00:00Z HOLDFOR=60", "HOLDFOR=1 HOLDFOR=2"],
)
def test_rfc4865_4_2_item_9_more_than_one_time_is_refused(text: str) -> None:
    mail(text, b"501 5.5.4")


# --- MT-PRIORITY -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", range(-9, 10))
def test_rfc6710_3_every_priority_is_taken(priority: int) -> None:
    assert mail(f"MT-PRIORITY={priority}", b"250 2.1.0").policy.parameters == MailParameters(priority=priority)


@pytest.mark.parametrize(
    "text",
    [
        "MT-PRIORITY", "MT-PRIORITY=", "MT-PRIORITY=10", "MT-PRIORITY=-10", "MT-PRIORITY=+1", "MT-PRIORITY=-0",
        "MT-PRIORITY=01", "MT-PRIORITY=x", "MT-PRIORITY=1 MT-PRIORITY=1", "MT-PRIORITY=²",
    ],
)  # fmt: skip
def test_rfc6710_4_1_item_1_what_is_malformed_or_said_twice_is_refused(text: str) -> None:
    mail(text, b"501 5.5.2")


def test_what_one_message_asked_for_is_forgotten_with_it() -> None:
    driver = dialog(
        (EHLO, b"250-\r\n" * 9 + b"250 HELP"),
        (b"MAIL FROM:<a@example.com> HOLDFOR=60 MT-PRIORITY=3\r\n", b"250"),
        (b"RSET\r\nMAIL FROM:<a@example.com>\r\n", b"250\r\n250"),
    )
    assert driver.policy.parameters == MailParameters()
