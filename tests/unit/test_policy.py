"""What an account may do: sender domains, credentials, denials, networks."""

from __future__ import annotations

import hashlib

import pytest

from dataplane.core.config import Account, Credential, Denials, Rule, Target
from dataplane.core.policy import (
    Denied,
    compile_account,
    compile_networks,
    denied,
    destination_denied,
    secret_matches,
    split_username,
)
from dataplane.core.routing import may_match

NAME = "accounts/demo"
CREDENTIAL = "accounts/demo/smtpCredentials/app"
NOW_MS = 1_795_171_046_000


def account(*domains: str) -> Account:
    return Account(NAME, "u", 1, sender_domains=domains)


@pytest.mark.parametrize(
    ("domain", "owned"),
    [
        ("example.com", True),
        ("mail.example.com", False),
        ("badexample.com", False),
        ("example.org", False),
        ("a.example.org", True),
        ("b.a.example.org", True),
        ("org", False),
        ("", False),
    ],
)
def test_a_domain_is_owned_exactly_or_below_a_star(domain: str, *, owned: bool) -> None:
    compiled = compile_account(account("example.com", "*.example.org"))
    assert compiled.owns_sender_domain(domain) is owned


def test_every_author_must_be_owned() -> None:
    compiled = compile_account(account("example.com"))
    assert compiled.owns_sender_domains(["example.com"])
    assert compiled.owns_sender_domains([])
    assert not compiled.owns_sender_domains(["example.com", "example.org"])


def test_an_account_without_domains_owns_none() -> None:
    assert not compile_account(account()).owns_sender_domain("example.com")


def test_credentials_and_rules_come_along() -> None:
    credential = Credential(CREDENTIAL, bytes(32))
    rules = (Rule("r", 0, (Target("providers/a"),)),)
    compiled = compile_account(Account(NAME, "u", 1, credentials={CREDENTIAL: credential}, rules=rules))
    assert compiled.credential(CREDENTIAL) is credential
    assert compiled.credential("other") is None
    assert may_match(compiled.rules, "a@b.c", "d@e.f")


def test_a_user_name_names_account_and_credential() -> None:
    assert split_username("demo.app") == (NAME, CREDENTIAL)
    assert split_username("demo") == (NAME, "accounts/demo/smtpCredentials/")
    assert split_username("demo.a.b") == (NAME, "accounts/demo/smtpCredentials/a.b")


def test_the_right_secret_opens_until_it_expires() -> None:
    secret_hash = hashlib.sha256(b"prs_secret").digest()
    good, old = Credential(CREDENTIAL, secret_hash), Credential(CREDENTIAL, secret_hash, NOW_MS)
    assert secret_matches(good, "prs_secret", NOW_MS)
    assert secret_matches(good, b"prs_secret", NOW_MS)
    assert not secret_matches(good, "prs_secret ", NOW_MS)
    assert not secret_matches(good, "", NOW_MS)
    assert not secret_matches(good, "\udcff", NOW_MS)
    assert secret_matches(old, "prs_secret", NOW_MS - 1)
    assert not secret_matches(old, "prs_secret", NOW_MS)


def test_no_secret_opens_a_credential_that_does_not_exist() -> None:
    assert not secret_matches(None, "anything", NOW_MS)
    assert not secret_matches(None, "", NOW_MS)


def test_nothing_is_denied_by_an_empty_set() -> None:
    assert denied(Denials(), NAME, CREDENTIAL, NOW_MS, provider="providers/a") is None


def test_denials_speak_for_account_credential_and_provider() -> None:
    assert denied(Denials(accounts={NAME: 0}), NAME, CREDENTIAL, NOW_MS) is Denied.ACCOUNT
    assert denied(Denials(credentials={CREDENTIAL: 0}), NAME, CREDENTIAL, NOW_MS) is Denied.CREDENTIAL
    providers = Denials(providers={"providers/a": 0})
    assert denied(providers, NAME, CREDENTIAL, NOW_MS, provider="providers/a") is Denied.PROVIDER
    assert denied(providers, NAME, CREDENTIAL, NOW_MS) is None
    assert denied(Denials(credentials={CREDENTIAL: 0}), NAME, "", NOW_MS) is None


def test_a_denial_falls_away_at_its_time() -> None:
    until = Denials(accounts={NAME: NOW_MS})
    assert denied(until, NAME, "", NOW_MS - 1) is Denied.ACCOUNT
    assert denied(until, NAME, "", NOW_MS) is None


@pytest.mark.parametrize(
    ("name", "stopped"),
    [
        ("destinations/example.net", {"a@example.net", "A@EXAMPLE.NET"}),
        ("destinations/*.example.net", {"a@mx.example.net", "a@deep.mx.example.net"}),
        ("destinations/*.net", {"a@example.net", "A@EXAMPLE.NET", "a@mx.example.net", "a@deep.mx.example.net"}),
        (f"{NAME}/destinations/mx.example.net", {"a@mx.example.net"}),
        ("accounts/other/destinations/example.net", set()),
        ("destinations/ample.net", set()),
        ("destinations/[192.0.2.1]", {"a@[192.0.2.1]"}),
    ],
)
def test_a_denied_destination_stops_its_own_recipients(name: str, stopped: set[str]) -> None:
    addresses = ["a@example.net", "A@EXAMPLE.NET", "a@mx.example.net", "a@deep.mx.example.net", "a@[192.0.2.1]"]
    denials = Denials(destinations={name: NOW_MS})
    assert {one for one in addresses if destination_denied(denials, NAME, one, NOW_MS - 1)} == stopped
    assert not any(destination_denied(denials, NAME, one, NOW_MS) for one in addresses)
    assert not any(destination_denied(Denials(), NAME, one, NOW_MS) for one in addresses)


def test_a_denied_credential_stops_only_what_it_submitted_since_then() -> None:
    denials = Denials(credentials={CREDENTIAL: 0}, credentials_since={CREDENTIAL: NOW_MS})
    assert denied(denials, NAME, CREDENTIAL, NOW_MS, accepted_ms=NOW_MS - 1) is None
    assert denied(denials, NAME, CREDENTIAL, NOW_MS, accepted_ms=NOW_MS) is Denied.CREDENTIAL
    assert denied(denials, NAME, CREDENTIAL, NOW_MS) is Denied.CREDENTIAL


def test_the_longest_network_that_holds_an_address_decides() -> None:
    table = compile_networks(
        [
            ("10.0.0.0/8", "a"),
            ("10.1.0.0/16", "b"),
            ("10.1.1.1/32", "c"),
            ("2001:db8::/32", "d"),
            ("2001:db8:1::/48", "e"),
        ]
    )
    expected = {
        "10.2.0.1": "a",
        "10.1.2.3": "b",
        "10.1.1.1": "c",
        "11.0.0.1": None,
        "::ffff:10.1.2.3": "b",
        "::ffff:a01:203": "b",
        "2001:db8:2::1": "d",
        "2001:db8:1::1": "e",
        "2001:db9::1": None,
        "2001:db8:1::1%eth0": "e",
        "10.1.2.3:25": None,
        "unix": None,
        "": None,
    }
    assert {address: table.lookup(address) for address in expected} == expected


def test_an_empty_table_knows_nobody() -> None:
    assert compile_networks([]).lookup("10.0.0.1") is None
