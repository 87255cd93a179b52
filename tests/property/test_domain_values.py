"""Values of the control plane: what is made is read back, and anything else is the caller's error and nothing worse."""

from __future__ import annotations

import itertools
import uuid

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from controlplane.domain import names
from controlplane.domain.errors import InvalidArgumentError
from controlplane.domain.etags import Etag, format_etag, parse_etag
from controlplane.domain.messages import Position, message_state, parse_position
from controlplane.domain.paging import PageTokens
from controlplane.domain.secrets import lookup_of, make_api_key, matches
from dataplane.core.queue import State

PATTERNS = (names.ACCOUNT, names.PROVIDER, names.SHARED_PROVIDER, names.ROUTING_RULE, names.MESSAGE, names.NODE)
IDS = st.from_regex(r"\A[a-z]([a-z0-9-]{0,61}[a-z0-9])?\Z")
TEXTS = st.lists(st.text(max_size=20), max_size=4)
KEYS = st.binary(min_size=32, max_size=32)


@given(st.sampled_from(PATTERNS), IDS, IDS, st.uuids())
def test_a_name_that_was_made_is_taken_apart_again(pattern: str, first: str, second: str, message: uuid.UUID) -> None:
    ids = (first, str(message) if "messages" in pattern else second)[: pattern.count("*")]
    assert names.parse_name(names.format_name(pattern, *ids), pattern) == ids


@given(st.sampled_from(PATTERNS), st.text() | st.from_regex(r"\A[a-z/*.%-]{0,40}\Z"))
def test_any_text_is_a_name_or_an_error_of_the_caller(pattern: str, text: str) -> None:
    try:
        ids = names.parse_name(text, pattern)
    except InvalidArgumentError:
        return
    assert names.format_name(pattern, *ids) == text


@given(KEYS, TEXTS, TEXTS)
def test_a_page_token_gives_its_position_back(key: bytes, position: list[str], arguments: list[str]) -> None:
    tokens = PageTokens(key)
    assert tokens.open(tokens.seal(position, arguments), arguments) == tuple(position)


@given(KEYS, TEXTS, TEXTS, TEXTS)
def test_a_page_token_is_refused_with_other_arguments(
    key: bytes, position: list[str], arguments: list[str], others: list[str]
) -> None:
    assume(others != arguments)
    tokens = PageTokens(key)
    with pytest.raises(InvalidArgumentError):
        tokens.open(tokens.seal(position, arguments), others)


@given(KEYS, KEYS, TEXTS, TEXTS)
def test_a_page_token_of_another_key_is_refused(
    key: bytes, other: bytes, position: list[str], arguments: list[str]
) -> None:
    assume(other != key)
    with pytest.raises(InvalidArgumentError):
        PageTokens(other).open(PageTokens(key).seal(position, arguments), arguments)


@given(KEYS, st.text(min_size=1))
def test_any_text_as_a_page_token_is_an_error_of_the_caller(key: bytes, text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        PageTokens(key).open(text, ())


@given(st.uuids(), st.integers(1, 10**17))
def test_an_etag_gives_its_version_back(uid: uuid.UUID, version: int) -> None:
    assert parse_etag(format_etag(str(uid), version)) == Etag(str(uid)[:8], version)


@given(st.text() | st.from_regex(r'\A"[0-9a-f-]{0,30}"\Z'))
def test_any_text_as_an_etag_is_one_of_ours_or_an_error_of_the_caller(text: str) -> None:
    try:
        etag = parse_etag(text)
    except InvalidArgumentError:
        return
    assert format_etag(etag.uid_prefix, etag.version) == text


@given(st.integers(1, (1 << 63) - 1), st.integers(1, 10**17))
def test_a_position_is_read_back(transaction: int, number: int) -> None:
    position = Position(transaction, number)
    assert parse_position(str(position)) == position


@given(st.text() | st.from_regex(r"\A[0-9-]{0,50}\Z"))
def test_any_text_as_a_position_is_one_of_ours_or_an_error_of_the_caller(text: str) -> None:
    try:
        position = parse_position(text)
    except InvalidArgumentError:
        return
    assert min(position) >= 0


@given(st.binary(min_size=6, max_size=6), KEYS, KEYS)
def test_only_the_secret_itself_matches_its_hash(lookup: bytes, random: bytes, other: bytes) -> None:
    assume(other != random)
    key = make_api_key(lookup, random)
    assert lookup_of(key.secret) == key.lookup
    assert matches(key.secret, key.sha256)
    assert not matches(make_api_key(lookup, other).secret, key.sha256)


@given(st.lists(st.sampled_from(State), min_size=1, max_size=5))
def test_a_messages_state_is_one_of_its_recipients_in_whatever_order(states: list[State]) -> None:
    found = {message_state(order) for order in itertools.permutations(states)}
    assert len(found) == 1
    assert found <= set(states)
