"""Typed transcripts of STARTTLS and AUTH: RFC 3207, 4954, 4616, and what must not survive TLS."""

from __future__ import annotations

import base64

import pytest

from dataplane.core import replies
from dataplane.core.session_contract import Action, Limits, Timer
from support.transcript import AUTH_PLAIN, Driver, Recorder, Turn, run_every_way, start

EHLO_PLAIN = (b"EHLO c.example\r\n", b"250-\r\n" * 6 + b"250-STARTTLS\r\n250 HELP")
EHLO_TLS = (
    b"EHLO c.example\r\n",
    b"250-\r\n" * 6 + b"250-AUTH PLAIN LOGIN\r\n250-FUTURERELEASE\r\n250-MT-PRIORITY\r\n250 HELP",
)
EHLO_KNOWN = (
    b"EHLO c.example\r\n",
    b"250-\r\n" * 6 + b"250-STARTTLS\r\n250-FUTURERELEASE\r\n250-MT-PRIORITY\r\n250 HELP",
)
EHLO_BARE = (b"EHLO c.example\r\n", b"250-\r\n" * 6 + b"250 HELP")
STARTTLS = (b"STARTTLS\r\n", b"220 2.0.0")
MAIL = (b"MAIL FROM:<a@example.com>\r\n", b"250 2.1.0")
LOGGED_IN = (AUTH_PLAIN, b"235 2.7.0")
USER, WRONG, RIGHT = (base64.b64encode(text) + b"\r\n" for text in (b"app", b"wrong", b"secret"))


def clear(policy: Recorder | None = None, limits: Limits | None = None) -> Driver:
    """A port with STARTTLS, before it."""
    return start(policy, limits, tls_active=False, authorized=False)


def encrypted(policy: Recorder | None = None, limits: Limits | None = None) -> Driver:
    """A port with TLS from the first octet."""
    return start(policy, limits, authorized=False)


def plain() -> Driver:
    """A port without TLS."""
    return start(tls_available=False, tls_active=False, authorized=False)


# --- STARTTLS --------------------------------------------------------------------------------------------------------


def test_rfc3207_4_starttls_then_auth_then_mail() -> None:
    run_every_way(clear, [EHLO_PLAIN, STARTTLS, EHLO_TLS, LOGGED_IN, MAIL])


def test_rfc3207_4_2_everything_before_tls_is_forgotten() -> None:
    driver = run_every_way(
        lambda: start(tls_active=False, authorized=True),
        [EHLO_KNOWN, STARTTLS, (MAIL[0], b"503 5.5.1 EHLO first"), (AUTH_PLAIN, b"503 5.5.1 EHLO first")],
    )
    assert ("forget",) in driver.policy.calls
    assert driver.session.helo == ""


def test_rfc3207_4_2_a_client_known_by_its_network_stays_known_under_tls() -> None:
    run_every_way(lambda: start(tls_active=False, authorized=True), [EHLO_KNOWN, STARTTLS, EHLO_TLS, MAIL])


@pytest.mark.parametrize(
    "injected",
    [b"EHLO evil\r\n", b"MAIL FROM:<a@example.com>\r\n", b"x", b"NOOP\r\n" * 1_000, b"\x16\x03\x01" + b"\0" * 3_000],
)
def test_plaintext_behind_starttls_is_never_executed(injected: bytes) -> None:
    driver = clear()
    driver.send(EHLO_PLAIN[0])
    driver.answer()
    driver.send(b"STARTTLS\r\n" + injected)
    assert b"503 5.5.1 Nothing may follow" in driver.answer()
    assert driver.session.action is Action.CLOSE
    assert not driver.session.tls_active
    assert driver.policy.calls == []


def test_plaintext_in_a_second_segment_before_the_handshake_is_never_executed() -> None:
    driver = clear()
    driver.send(EHLO_PLAIN[0])
    driver.session.receive(b"STARTTLS\r\n")
    before = driver.session.action
    driver.session.receive(b"RSET\r\n")
    assert (before, driver.session.action) == (Action.START_TLS, Action.CLOSE)


@pytest.mark.parametrize(
    ("turns", "refusal"),
    [
        ([EHLO_PLAIN[0], STARTTLS[0], EHLO_TLS[0], STARTTLS[0]], b"503 5.5.1 TLS is active"),
        ([EHLO_PLAIN[0], b"STARTTLS now\r\n"], b"501 5.5.4"),
        ([STARTTLS[0]], b"503 5.5.1 EHLO first"),
    ],
)
def test_rfc3207_4_starttls_where_it_has_no_place(turns: list[bytes], refusal: bytes) -> None:
    driver = clear()
    for sent in turns:
        driver.answer()
        driver.send(sent)
    assert driver.answer().startswith(refusal)
    assert driver.session.action is Action.NONE


def test_starttls_inside_a_transaction_is_refused() -> None:
    run_every_way(
        lambda: start(tls_active=False, authorized=True),
        [EHLO_KNOWN, MAIL, (STARTTLS[0], b"503 5.5.1 STARTTLS comes before")],
    )


def test_starttls_after_auth_is_refused() -> None:
    driver = clear()
    for sent in (EHLO_PLAIN[0], STARTTLS[0], EHLO_TLS[0], AUTH_PLAIN):
        driver.send(sent)
    driver.answer()
    driver.send(STARTTLS[0])
    assert driver.answer().startswith(b"503 5.5.1 TLS is active")


def test_a_port_without_tls_offers_and_takes_neither_starttls_nor_auth() -> None:
    run_every_way(plain, [EHLO_BARE, (STARTTLS[0], b"502 5.5.1"), (AUTH_PLAIN, b"503 5.5.1 AUTH is not offered")])


# --- AUTH ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turns",
    [
        [LOGGED_IN],
        [(AUTH_PLAIN.replace(b"PLAIN", b"plain"), b"235 2.7.0")],
        [(AUTH_PLAIN.replace(b"AUTH", b"auth"), b"235 2.7.0")],
        [(b"AUTH PLAIN\r\n", b"334 "), (AUTH_PLAIN[11:], b"235 2.7.0")],
        [(b"AUTH PLAIN " + base64.b64encode(b"app\0app\0secret") + b"\r\n", b"235 2.7.0")],
        [(b"AUTH LOGIN\r\n", b"334 VXNlcm5hbWU6"), (USER, b"334 UGFzc3dvcmQ6"), (RIGHT, b"235 2.7.0")],
        [(b"AUTH login " + USER, b"334 UGFzc3dvcmQ6"), (RIGHT, b"235 2.7.0")],
    ],
)
def test_rfc4954_4_auth_plain_and_login(turns: list[Turn]) -> None:
    driver = run_every_way(encrypted, [EHLO_TLS, *turns, MAIL])
    assert driver.policy.calls[0] == ("authenticate", "app", "secret")
    assert driver.session.timer is Timer.COMMAND


@pytest.mark.parametrize(
    ("turns", "refusal"),
    [
        ([b"AUTH PLAIN\r\n", b"*\r\n"], b"501 5.7.0"),
        ([b"AUTH LOGIN\r\n", b"*\r\n"], b"501 5.7.0"),
        ([b"AUTH LOGIN\r\n", USER, b"*\r\n"], b"501 5.7.0"),
        ([b"AUTH PLAIN =\r\n"], b"535 5.7.8"),
        ([b"AUTH PLAIN !!!\r\n"], b"501 5.5.2"),
        ([b"AUTH PLAIN\r\n", b"a\r\n"], b"501 5.5.2"),
        ([b"AUTH PLAIN\r\n", b"\r\n"], b"535 5.7.8"),
        ([b"AUTH\r\n"], b"501 5.5.4"),
        ([b"AUTH CRAM-MD5\r\n"], b"504 5.5.4"),
        ([b"AUTH XOAUTH2 abc=\r\n"], b"504 5.5.4"),
        ([b"AUTH PLAIN " + base64.b64encode(b"other\0app\0secret") + b"\r\n"], b"535 5.7.8"),
        ([b"AUTH PLAIN " + base64.b64encode(b"app\0secret") + b"\r\n"], b"535 5.7.8"),
        ([b"AUTH PLAIN " + base64.b64encode(b"\0app\0secret\0x") + b"\r\n"], b"535 5.7.8"),
        ([b"AUTH LOGIN\r\n", USER, WRONG], b"535 5.7.8"),
        ([b"AUTH LOGIN\r\n", base64.b64encode(b"\xff\xfe") + b"\r\n", WRONG], b"535 5.7.8"),
    ],
)
def test_rfc4954_4_an_exchange_that_fails_leaves_the_session_as_it_was(turns: list[bytes], refusal: bytes) -> None:
    driver = encrypted()
    driver.send(EHLO_TLS[0])
    for sent in turns:
        driver.answer()
        driver.send(sent)
    assert driver.answer().startswith(refusal)
    driver.send(MAIL[0])
    assert driver.answer().startswith(b"530 5.7.0")
    driver.send(AUTH_PLAIN)
    assert driver.answer().startswith(b"235")


def test_rfc4954_4_auth_is_refused_twice_inside_a_transaction_and_before_ehlo() -> None:
    run_every_way(
        encrypted,
        [(AUTH_PLAIN, b"503 5.5.1 EHLO"), EHLO_TLS, LOGGED_IN, (AUTH_PLAIN, b"503 5.5.1 Authenticated already")],
    )
    run_every_way(start, [EHLO_TLS, MAIL, (AUTH_PLAIN, b"503 5.5.1 AUTH comes before")])


def test_auth_in_clear_is_refused_before_anything_of_it_is_looked_at() -> None:
    driver = run_every_way(clear, [EHLO_PLAIN, (AUTH_PLAIN, b"538 5.7.11"), (b"AUTH CRAM-MD5\r\n", b"538 5.7.11")])
    assert driver.policy.calls == []


def test_lines_that_follow_a_refused_auth_are_never_echoed() -> None:
    secret = base64.b64encode(b"canary-password")
    driver = clear()
    for sent in (EHLO_PLAIN[0], b"AUTH LOGIN\r\n", USER, secret + b"\r\n"):
        driver.send(sent)
    answer = driver.answer()
    assert secret not in answer
    assert answer.endswith(b"500 5.5.2 Command not recognized\r\n")


def test_a_login_pipelined_behind_auth_closes_and_is_not_looked_at() -> None:
    for group in (b"AUTH LOGIN\r\n" + USER + RIGHT, b"AUTH LOGIN " + USER + RIGHT, AUTH_PLAIN + MAIL[0]):
        for make in (clear, encrypted):
            driver = make()
            driver.send(EHLO_TLS[0])
            driver.answer()
            driver.send(group)
            assert b"503 5.5.1 Nothing may follow" in driver.answer()
            assert driver.session.action is Action.CLOSE
            assert ("mail", "a@example.com") not in driver.policy.calls


def test_failed_logins_are_capped_for_a_session() -> None:
    wrong = b"AUTH PLAIN " + base64.b64encode(b"\0app\0wrong") + b"\r\n"
    refused = (wrong, b"535 5.7.8")
    driver = run_every_way(encrypted, [EHLO_TLS, refused, refused, (wrong, b"535 5.7.8\r\n421 4.7.0")])
    assert driver.session.action is Action.CLOSE


def test_a_fault_while_checking_a_login_is_temporary_and_no_failed_attempt() -> None:
    driver = encrypted(Recorder(broken=RuntimeError("x")))
    driver.send(EHLO_TLS[0])
    driver.answer()
    for _ in range(5):
        driver.send(AUTH_PLAIN)
        assert driver.answer().startswith(b"451 4.3.0 Internal error")
    assert driver.session.action is Action.NONE


def test_rfc4954_4_long_lines_are_allowed_in_auth_and_only_there() -> None:
    long = base64.b64encode(b"\0app\0" + b"x" * 8_000)
    assert 2_048 < len(long) < 12_288
    driver = run_every_way(
        encrypted,
        [
            EHLO_TLS,
            (b"AUTH PLAIN " + long + b"\r\n", b"535 5.7.8"),
            (b"AUTH PLAIN\r\n", b"334"),
            (long + b"\r\n", b"535 5.7.8"),
            (b"NOOP " + long + b"\r\n", b"500 5.5.2"),
        ],
    )
    assert driver.session.action is Action.NONE
    too_long = b"A" * 12_288
    run_every_way(
        encrypted,
        [
            EHLO_TLS,
            (b"AUTH PLAIN\r\n", b"334"),
            (too_long + b"\r\n", b"500 5.5.6"),
            (b"AUTH PLAIN " + too_long + b"\r\n", b"500 5.5.2"),
            LOGGED_IN,
        ],
    )


def test_a_login_may_be_refused_for_now() -> None:
    class Throttling(Recorder):
        def authenticate(self, username: str, secret: str) -> replies.Reply | None:
            return replies.AUTH_THROTTLED

    driver = encrypted(Throttling())
    driver.send(EHLO_TLS[0])
    driver.answer()
    driver.send(AUTH_PLAIN)
    assert driver.answer().startswith(b"454 4.7.0")


def test_mail_without_auth_is_refused_on_every_kind_of_port() -> None:
    ports = ((clear, EHLO_PLAIN, b"530 5.7.0"), (encrypted, EHLO_TLS, b"530 5.7.0"), (plain, EHLO_BARE, b"550 5.7.1"))
    for make, hello, refusal in ports:
        driver = run_every_way(make, [hello, (MAIL[0], refusal), (b"RCPT TO:<b@example.net>\r\n", b"503")])
        assert driver.policy.calls == []
        assert driver.session.timer is Timer.COMMAND_BEFORE_AUTH
