from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain import names
from controlplane.domain.errors import InvalidArgumentError
from controlplane.domain.etags import format_etag, parse_etag

IDS = st.from_regex(r"\A[a-z]([a-z0-9-]{0,61}[a-z0-9])?\Z")


@given(IDS, IDS)
def test_a_name_that_was_formatted_is_parsed_back(account: str, rule: str) -> None:
    name = names.format_name(names.ROUTING_RULE, account, rule)
    assert names.parse_name(name, names.ROUTING_RULE) == (account, rule)


@given(st.text(max_size=80))
def test_whatever_is_no_id_is_refused_and_nothing_else_is_raised(text: str) -> None:
    if re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", text):
        assert names.parse_name(f"accounts/{text}", names.ACCOUNT) == (text,)
        return
    with pytest.raises(InvalidArgumentError) as refused:
        names.parse_name(f"accounts/{text}", names.ACCOUNT)
    assert refused.value.violations[0].field == "name"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "accounts",
        "accounts/",
        "accounts/a/",
        "/accounts/a",
        "accounts/a/routingRules",
        "accounts/a\n",
        "Accounts/a",
    ],
)
def test_other_shapes_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        names.parse_name(name, names.ACCOUNT)


def test_what_belongs_to_nobody_has_no_account() -> None:
    assert names.parse_owned("providers/p", names.PROVIDER, names.SHARED_PROVIDER) == (None, "p")
    assert names.parse_owned("accounts/a/providers/p", names.PROVIDER, names.SHARED_PROVIDER) == ("a", "p")
    assert names.provider_name(None, "p") == "providers/p"
    assert names.api_key_name("a", "k") == "accounts/a/apiKeys/k"
    assert names.parse_parent("") is None


def test_messages_and_operations_are_named_by_uuids() -> None:
    with pytest.raises(InvalidArgumentError):
        names.parse_name("accounts/a/messages/m", names.MESSAGE)
    one = "0192f8a0-0000-7000-8000-000000000000"
    assert names.parse_name(f"accounts/a/messages/{one}", names.MESSAGE) == ("a", one)
    with pytest.raises(InvalidArgumentError):
        names.parse_name(f"accounts/a/messages/{one.upper()}", names.MESSAGE)


@given(st.uuids(), st.integers(1, 10**17))
def test_an_etag_is_parsed_back(uid: object, version: int) -> None:
    assert parse_etag(format_etag(str(uid), version)) == (str(uid)[:8], version)


@pytest.mark.parametrize("text", ["1", '"1"', '"abcdefgh-1"', '"01234567-0"', '"01234567-1" ', '"01234567--1"'])
def test_strange_etags_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_etag(text)
    assert refused.value.reason == "ETAG_INVALID"
