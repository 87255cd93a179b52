"""Limits as values: which of several counts, what is wrong with one, where it is kept."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from dataplane.core.limits import (
    MAX_TOKENS,
    NO_LIMITS,
    Bucket,
    Limit,
    LimitScope,
    LimitTable,
    LimitUnit,
    bucket_of,
    counting_limit,
    default_burst,
    default_limit,
    destination_of,
    limit_problems,
    precedence,
    server_key,
    slots_of,
)

ACCOUNT = "accounts/a"
CREDENTIAL = f"{ACCOUNT}/smtpCredentials/c"


def limit(
    scope: LimitScope = LimitScope.ACCOUNT,
    unit: LimitUnit = LimitUnit.MESSAGE,
    subject: str = "",
    *,
    own: bool = False,
    amount: int = 100,
    period_s: float = 60.0,
) -> Limit:
    name = f"{ACCOUNT}/limits/l" if own else "limits/l"
    return Limit(name, scope, unit, amount, period_s, 10 if period_s else 0, subject)


def test_an_accounts_limits_come_before_shared_ones_and_named_ones_before_general_ones() -> None:
    ranked = [
        limit(LimitScope.CREDENTIAL, subject=CREDENTIAL, own=True, amount=1),
        limit(LimitScope.CREDENTIAL, own=True, amount=2),
        limit(LimitScope.CREDENTIAL, subject=CREDENTIAL, amount=3),
        limit(LimitScope.CREDENTIAL, amount=4),
        default_limit(LimitScope.CREDENTIAL, LimitUnit.MESSAGE, 5, 3_600.0),
    ]
    assert sorted([ranked[2], ranked[0], ranked[3], ranked[1]], key=precedence) == ranked[:4]
    for best in range(len(ranked)):
        left = ranked[best:]
        own = LimitTable([one for one in left if one.name.startswith("accounts/")])
        shared = LimitTable([one for one in left if not one.name.startswith("accounts/")])
        found = counting_limit(own, shared, LimitScope.CREDENTIAL, LimitUnit.MESSAGE, CREDENTIAL)
        assert found == ranked[best]
    assert counting_limit(NO_LIMITS, NO_LIMITS, LimitScope.CREDENTIAL, LimitUnit.MESSAGE, CREDENTIAL) is None


def test_a_limit_that_names_another_subject_says_nothing() -> None:
    shared = LimitTable([limit(LimitScope.DESTINATION, subject="mx.example.net")])
    assert counting_limit(NO_LIMITS, shared, LimitScope.DESTINATION, LimitUnit.MESSAGE, "mx.example.org") is None


def test_units_and_connections_at_once_are_kinds_of_their_own() -> None:
    slots = limit(LimitScope.PROVIDER, LimitUnit.CONNECTION, period_s=0.0)
    rate = limit(LimitScope.PROVIDER, LimitUnit.CONNECTION)
    table = LimitTable([slots, rate])
    assert table.find(LimitScope.PROVIDER, LimitUnit.CONNECTION, "providers/p", at_once=True) is slots
    assert table.find(LimitScope.PROVIDER, LimitUnit.CONNECTION, "providers/p") is rate
    assert table.find(LimitScope.PROVIDER, LimitUnit.BYTE, "providers/p") is None
    assert table.speaks_of(LimitScope.PROVIDER)
    assert not table.speaks_of(LimitScope.ADDRESS)


def test_what_an_account_says_of_providers_in_general_holds_for_its_own_only() -> None:
    own = LimitTable([limit(LimitScope.PROVIDER, own=True, amount=1)])
    shared = LimitTable([limit(LimitScope.PROVIDER, amount=2)])
    for provider, amount in ((f"{ACCOUNT}/providers/p", 1), ("providers/p", 2)):
        found = counting_limit(own, shared, LimitScope.PROVIDER, LimitUnit.MESSAGE, provider)
        assert found is not None
        assert found.amount == amount


def test_of_two_limits_that_say_the_same_the_first_counts() -> None:
    assert LimitTable([limit(amount=1), limit(amount=2)]).find(LimitScope.ACCOUNT, LimitUnit.MESSAGE, ACCOUNT) == limit(
        amount=1
    )


def test_a_default_keeps_within_what_a_bucket_can_count() -> None:
    made = default_limit(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 10**12, 3_600.0)
    assert (made.amount, made.burst) == (MAX_TOKENS, MAX_TOKENS // 10)


@pytest.mark.parametrize(("amount", "burst"), [(1, 1), (9, 9), (10, 10), (99, 10), (101, 11), (100_000, 10_000)])
def test_a_burst_is_a_tenth_and_ten_where_the_limit_allows(amount: int, burst: int) -> None:
    assert default_burst(amount) == burst


@pytest.mark.parametrize(
    ("scope", "subject", "tag"),
    [
        (LimitScope.ACCOUNT, ACCOUNT, "a:accounts/a"),
        (LimitScope.CREDENTIAL, CREDENTIAL, "a:accounts/a"),
        (LimitScope.ADDRESS, "2001:db8::", "ip:2001:db8::"),
        (LimitScope.PROVIDER, "accounts/a/providers/p", "p:accounts/a/providers/p"),
        (LimitScope.DESTINATION, "mx.example.net", "d:mx.example.net"),
    ],
)
def test_the_tag_of_a_bucket_says_whose_it_is(scope: LimitScope, subject: str, tag: str) -> None:
    assert {bucket_of(scope, unit, subject).tag for unit in LimitUnit} == {tag}
    assert bucket_of(scope, LimitUnit.CONNECTION, subject) != slots_of(scope, subject)
    assert slots_of(scope, subject).tag == tag


def test_no_two_buckets_have_one_key() -> None:
    subjects = {
        LimitScope.ACCOUNT: ("accounts/a", "accounts/b"),
        LimitScope.CREDENTIAL: (CREDENTIAL, f"{ACCOUNT}/smtpCredentials/d"),
        LimitScope.ADDRESS: ("192.0.2.1", "192.0.2.2"),
        LimitScope.PROVIDER: ("providers/p", "accounts/a/providers/p"),
        LimitScope.DESTINATION: ("p", "q"),
    }
    keys = [
        server_key(*bucket_of(scope, unit, subject))
        for (scope, names), unit in itertools.product(subjects.items(), LimitUnit)
        for subject in names
    ]
    assert len(set(keys)) == len(keys)
    assert server_key(*Bucket("a:accounts/a", "account:message")) == "postroad:{a:accounts/a}account:message"


GOOD = [
    (limit(own=True), ACCOUNT),
    (limit(), ""),
    (limit(LimitScope.CREDENTIAL, subject=CREDENTIAL, own=True), ACCOUNT),
    (limit(LimitScope.ADDRESS, LimitUnit.CONNECTION, "192.0.2.1"), ""),
    (limit(LimitScope.ADDRESS, subject="2001:db8::"), ""),
    (limit(LimitScope.PROVIDER, LimitUnit.CONNECTION, "providers/p", period_s=0.0), ""),
    (limit(LimitScope.DESTINATION, LimitUnit.BYTE, "mx.example.net"), ""),
]


@pytest.mark.parametrize(("value", "account"), GOOD)
def test_a_good_limit_has_no_problem(value: Limit, account: str) -> None:
    assert list(limit_problems(value, account)) == []


@pytest.mark.parametrize(
    ("value", "account", "field"),
    [
        (replace(limit(), name="limits/UPPER"), "", "name"),
        (limit(own=True), "accounts/b", "name"),
        (limit(), ACCOUNT, "name"),
        (limit(amount=0), "", "amount"),
        (limit(amount=MAX_TOKENS + 1), "", "amount"),
        (replace(limit(), period_s=0.5), "", "period"),
        (replace(limit(), period_s=32 * 86_400.0), "", "period"),
        (replace(limit(), burst=0), "", "burst"),
        (replace(limit(), burst=101), "", "burst"),
        (limit(period_s=0.0), "", "period"),
        (replace(limit(LimitScope.PROVIDER, LimitUnit.CONNECTION, period_s=0.0), burst=1), "", "burst"),
        (limit(LimitScope.ACCOUNT, LimitUnit.CONNECTION), "", "unit"),
        (limit(LimitScope.CREDENTIAL, LimitUnit.CONNECTION), "", "unit"),
        (limit(LimitScope.ADDRESS, own=True), ACCOUNT, "scope"),
        (limit(LimitScope.DESTINATION, own=True), ACCOUNT, "scope"),
        (limit(subject=ACCOUNT, own=True), ACCOUNT, "subject"),
        (limit(subject="accounts/"), "", "subject"),
        (limit(LimitScope.CREDENTIAL, subject="accounts/b/smtpCredentials/c", own=True), ACCOUNT, "subject"),
        (limit(LimitScope.PROVIDER, subject="providers/p", own=True), ACCOUNT, "subject"),
        (limit(LimitScope.ADDRESS, subject="2001:db8::1"), "", "subject"),
        (limit(LimitScope.ADDRESS, subject="192.0.2.01"), "", "subject"),
        (limit(LimitScope.ADDRESS, subject="mx.example.net"), "", "subject"),
        (limit(LimitScope.DESTINATION, subject="MX.example.net"), "", "subject"),
        (limit(LimitScope.DESTINATION, subject="2001:db8:0::1"), "", "subject"),
        (limit(LimitScope.DESTINATION, subject="mx.example.net."), "", "subject"),
    ],
)
def test_a_bad_limit_names_the_field(value: Limit, account: str, field: str) -> None:
    assert field in [path for path, _ in limit_problems(value, account)]


@pytest.mark.parametrize(
    ("host", "subject"),
    [
        ("MX.Example.net", "mx.example.net"),
        ("mx.example.net.", "mx.example.net"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("2001:0db8::0001", "2001:db8::1"),
        ("::FFFF:192.0.2.1", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        ("192.0.2.1", "192.0.2.1"),
    ],
)
def test_a_host_is_one_destination_in_whatever_way_it_is_written(host: str, subject: str) -> None:
    assert destination_of(host) == subject
