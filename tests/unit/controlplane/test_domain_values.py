from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain import secrets
from controlplane.domain.access import METHOD_SCOPES, Caller, Scope
from controlplane.domain.errors import InvalidArgumentError, PermissionDeniedError
from controlplane.domain.hosts import HostPolicy
from controlplane.domain.masks import Field, Fields, changed_paths, merge
from controlplane.domain.messages import first_id_at, message_state, parse_position
from controlplane.domain.paging import PageTokens, coerce_page_size
from controlplane.domain.resources import ACCOUNT_FIELDS, PROVIDER_FIELDS, Account, Provider, RetryPolicy, SmtpSettings
from dataplane.core.ids import format_message_id, new_message_id
from dataplane.core.queue import State

WORDS = st.lists(st.text(max_size=20), max_size=4)


@given(WORDS, WORDS)
def test_a_page_token_gives_its_position_back_to_the_same_arguments(position: list[str], arguments: list[str]) -> None:
    tokens = PageTokens(b"key")
    assert tokens.open(tokens.seal(position, arguments), arguments) == tuple(position)


@given(WORDS, WORDS, st.integers(0, 200))
def test_a_page_token_that_was_touched_is_refused(position: list[str], arguments: list[str], place: int) -> None:
    tokens = PageTokens(b"key")
    token = tokens.seal(position, arguments)
    place %= len(token)
    changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
    # The last character carries bits that count for nothing.
    if place < len(token) - 1:
        with pytest.raises(InvalidArgumentError) as refused:
            tokens.open(changed, arguments)
        assert refused.value.reason == "PAGE_TOKEN_INVALID"
    for others in ([*arguments, "more"], ["x", *arguments]):
        with pytest.raises(InvalidArgumentError):
            tokens.open(token, others)
    with pytest.raises(InvalidArgumentError):
        PageTokens(b"other").open(token, arguments)


@pytest.mark.parametrize(("asked", "given_"), [(0, 50), (1, 1), (1_000, 1_000), (5_000, 1_000)])
def test_page_sizes_are_coerced(asked: int, given_: int) -> None:
    assert coerce_page_size(asked) == given_


def test_an_api_key_is_found_by_its_readable_part_and_matched_by_all_of_it() -> None:
    made = secrets.make_api_key(bytes(6), bytes(range(32)))
    assert len(made.secret) == len("prk_") + 8 + 1 + 43
    assert secrets.lookup_of(made.secret) == made.lookup == "AAAAAAAA"
    assert secrets.matches(made.secret, made.sha256)
    assert not secrets.matches(made.secret[:-1] + "A", made.sha256)
    assert secrets.lookup_of(made.secret + "x") is None
    assert secrets.lookup_of("prs_" + "A" * 43) is None


def test_the_scram_verifier_is_that_of_rfc_7677_section_3() -> None:
    salt = b"W22ZaJ0SNY7soEsUEjb6gQ=="
    import base64

    verifier = secrets.make_scram_verifier("pencil", base64.b64decode(salt), 4_096)
    salted = hashlib.pbkdf2_hmac("sha256", b"pencil", base64.b64decode(salt), 4_096)
    first = "n=user,r=rOprNGfwEbeRWgbNEkqO"
    server_first = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    final = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    message = f"{first},{server_first},{final}".encode()
    signature = base64.b64encode(hmac.digest(verifier.server_key, message, "sha256"))
    assert signature == b"6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
    proof = base64.b64decode(b"dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
    client_signature = hmac.digest(verifier.stored_key, message, "sha256")
    client_key = bytes(a ^ b for a, b in zip(proof, client_signature, strict=True))
    assert hashlib.sha256(client_key).digest() == verifier.stored_key
    assert client_key == hmac.digest(salted, b"Client Key", "sha256")


def test_a_mask_takes_what_it_names_and_leaves_the_rest() -> None:
    stored = Account("a", display_name="kept", sender_domains=("x.example",), retry_policy=RetryPolicy(5, 2, 9))
    sent = Account("a", display_name="sent", retry_policy=RetryPolicy(base_s=7))
    by_path = merge(stored, sent, ["retry_policy.base"], [], ACCOUNT_FIELDS)
    assert by_path.retry_policy == RetryPolicy(7, 2, 9)
    assert by_path.display_name == "kept"
    assert merge(stored, sent, [], ["display_name"], ACCOUNT_FIELDS).display_name == "sent"
    full = merge(stored, sent, ["*"], [], ACCOUNT_FIELDS)
    assert (full.display_name, full.sender_domains, full.retry_policy) == ("sent", (), RetryPolicy(7))
    assert merge(stored, sent, ["state", "uid", "etag", "name"], [], ACCOUNT_FIELDS) == stored
    provider = Provider(None, "p")
    assert (
        merge(
            provider, Provider(None, "p", smtp=SmtpSettings(username="u")), ["smtp.password_set"], [], PROVIDER_FIELDS
        )
        == provider
    )


@pytest.mark.parametrize("path", ["colour", "retry_policy.colour", "display_name.x", "", "retry_policy."])
def test_an_unknown_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        merge(Account("a"), Account("a"), [path], [], ACCOUNT_FIELDS)
    assert refused.value.violations[0].field == "update_mask"


def test_touched_fields_are_named_by_their_first_part() -> None:
    assert changed_paths(["retry_policy.base", "state"], [], ACCOUNT_FIELDS) == {"retry_policy"}
    assert changed_paths(["*"], [], Fields({"a": Field("a")}, frozenset())) == {"a"}
    assert changed_paths([], ["networks"], ACCOUNT_FIELDS) == {"networks"}


PRIVATE = [
    *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
    *("255.255.255.255", "192.0.2.1", "198.18.0.1", "::", "::1", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1"),
    *("64:ff9b::a00:1", "64:ff9b:1::a00:1", "2002:a00:1::", "2001:db8::1", "fe80::1%eth0", "localhost", "", "1.2.3"),
    *("0x7f000001", "2130706433", "127.1", "010.0.0.1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_nothing_but_public_addresses_may_be_connected_to(address: str) -> None:
    assert not HostPolicy().permits(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_public_addresses_may(address: str) -> None:
    assert HostPolicy().permits(address)


def test_a_deployment_may_allow_its_own_networks() -> None:
    policy = HostPolicy([ip_network("10.0.0.0/8"), ip_network("fd00::/8")])
    assert policy.permits("10.1.2.3")
    assert policy.permits("::ffff:10.1.2.3")
    assert policy.permits("fd00::1")
    assert not policy.permits("127.0.0.1")
    assert policy.problem("10.1.2.3") == ""
    assert policy.problem("relay.example.com") == ""
    assert policy.problem("127.0.0.1")
    assert policy.problem("LOCALHOST.")


def test_an_account_key_reaches_its_own_account_with_its_own_scopes() -> None:
    caller = Caller("accounts/a/apiKeys/k", "a", frozenset({Scope.CONFIG_READ}))
    caller.require(Scope.CONFIG_READ)
    caller.require_account("a")
    attempts: tuple[Callable[[], None], ...] = (
        lambda: caller.require(Scope.CONFIG_WRITE),
        lambda: caller.require_account("b"),
        lambda: caller.require_account(None),
        caller.require_operator,
    )
    for refused in attempts:
        with pytest.raises(PermissionDeniedError):
            refused()
    assert caller.visible_account == "a"


def test_an_operator_reaches_everything_and_a_key_of_neither_kind_nothing() -> None:
    operator = Caller("apiKeys/k", None, frozenset({Scope.OPERATOR}))
    for scope in set(METHOD_SCOPES.values()):
        operator.require(scope)
    operator.require_account("a")
    operator.require_account(None)
    assert operator.visible_account == "*"
    assert Caller("x", None, frozenset()).visible_account == ""
    # The scope alone makes no operator of an account's key.
    assert not Caller("x", "a", frozenset({Scope.OPERATOR})).is_operator


@given(st.integers(1, 7_258_118_400_000))
def test_the_first_id_of_a_moment_lies_below_every_id_made_then(now_ms: int) -> None:
    time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=now_ms)
    assert first_id_at(time) <= format_message_id(new_message_id(now_ms, bytes(10)))
    assert format_message_id(new_message_id(now_ms - 1, b"\xff" * 10)) < first_id_at(time)


def test_a_message_is_in_the_state_of_its_least_finished_recipient() -> None:
    assert message_state([State.SENT, State.DEFERRED, State.BOUNCED]) is State.DEFERRED
    assert message_state([State.SENT, State.CANCELLED]) is State.CANCELLED
    assert message_state([State.SENT]) is State.SENT
    assert message_state([]) is State.QUEUED
    for state in State:
        assert message_state([state]) is state


@pytest.mark.parametrize("text", ["", "1", "1-2-3", "-1-2", "9223372036854775808-1", "1-1 "])
def test_strange_positions_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_position(text)


def test_a_position_is_read_back() -> None:
    assert str(parse_position("12-34")) == "12-34"
