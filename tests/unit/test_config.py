"""Configuration: what is good, and that every single thing that may be wrong is found and named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dataplane.core.config import (
    Account,
    Credential,
    Endpoint,
    HeaderCondition,
    NodeSettings,
    Problem,
    RetryPolicy,
    Rule,
    SealedValue,
    SmtpProvider,
    Target,
    TlsPolicy,
    seal_context,
    validate_account,
    validate_account_networks,
    validate_networks,
    validate_provider,
    validate_retry_policy,
    validate_rule,
    validate_settings,
)

NAME = "accounts/demo"
CREDENTIAL = Credential(f"{NAME}/smtpCredentials/app", bytes(32))
SEALED = SealedValue("key-1", bytes(28))
PROVIDER = SmtpProvider(f"{NAME}/providers/relay", NAME, (Endpoint("relay.example.net", 587),), TlsPolicy.OPPORTUNISTIC)
RULE = Rule(
    f"{NAME}/routingRules/default",
    100,
    (Target(PROVIDER.name, "", 10), Target("providers/shared")),
    sender_patterns=("a@example.com", "@example.com", "*.example.com", "<>"),
    recipient_patterns=("b@example.org", "@example.org", "*.example.org"),
    headers=(HeaderCondition("subject", "*sale?"), HeaderCondition("x-postroad-campaign-1", "a")),
    min_size_bytes=1,
    max_size_bytes=2,
)
ACCOUNT = Account(
    NAME,
    "6f9c2a0e-3c55-4f6e-9d0a-0b8f0c6f7a11",
    3,
    sender_domains=("example.com", "*.example.com", "xn--bcher-kva.example", "localhost"),
    credentials={CREDENTIAL.name: CREDENTIAL},
    providers={PROVIDER.name: PROVIDER},
    rules=(RULE,),
)


def fields(problems: list[Problem]) -> list[str]:
    assert all(problem.description for problem in problems)
    return [problem.field for problem in problems]


def test_what_is_good_has_no_problems() -> None:
    assert validate_account(ACCOUNT) == []
    assert validate_provider(PROVIDER) == []
    assert validate_settings(NodeSettings()) == []
    assert validate_networks([("10.0.0.0/8", NAME), ("2001:db8::/32", "accounts/other")]) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "demo",
        "accounts/",
        "accounts/1a",
        "accounts/A",
        "accounts/a-",
        "accounts/a/b",
        f"accounts/{'a' * 64}",
        "accounts/a\n",
    ],
)
def test_account_names_are_held_to_their_pattern(name: str) -> None:
    assert "name" in fields(validate_account(Account(name, ACCOUNT.uid, 1)))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"uid": "x"}, "uid"),
        ({"uid": ACCOUNT.uid.upper()}, "uid"),
        ({"sender_domains": ("Example.com",)}, "sender_domains[0]"),
        ({"sender_domains": ("a.b", "b\u00fccher.example")}, "sender_domains[1]"),
        ({"sender_domains": ("*.com",)}, "sender_domains[0]"),
        ({"sender_domains": ("*",)}, "sender_domains[0]"),
        ({"sender_domains": ("*.*.a.b",)}, "sender_domains[0]"),
        ({"sender_domains": ("a.b:25",)}, "sender_domains[0]"),
        ({"sender_domains": ("a.b.",)}, "sender_domains[0]"),
        ({"sender_domains": ("[192.0.2.1]",)}, "sender_domains[0]"),
        ({"sender_domains": ("a.b", "a.b")}, "sender_domains[1]"),
        ({"sender_domains": tuple(f"d{n}.example" for n in range(501))}, "sender_domains"),
        ({"credentials": {"x": CREDENTIAL}}, 'credentials["x"].name'),
        ({"providers": {"x": PROVIDER}}, 'providers["x"]'),
        ({"providers": {"providers/a": replace(PROVIDER, name="providers/a", account="")}}, 'providers["providers/a"]'),
        ({"rules": (RULE, RULE)}, f'rules["{RULE.name}"]'),
        ({"rules": (replace(RULE, priority=-1),)}, f'rules["{RULE.name}"].priority'),
        ({"retry_policy": RetryPolicy(base_s=0)}, "retry_policy.base"),
    ],
)
def test_each_thing_wrong_in_an_account_is_named(change: dict[str, Any], field: str) -> None:
    assert fields(validate_account(replace(ACCOUNT, **change))) == [field]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "accounts/other/smtpCredentials/app"}, "name"),
        ({"name": f"{NAME}/smtpCredentials/App"}, "name"),
        ({"secret_sha256": bytes(31)}, "secret_sha256"),
        ({"expire_ms": -1}, "expire_time"),
    ],
)
def test_each_thing_wrong_in_a_credential_is_named(change: dict[str, Any], field: str) -> None:
    credential = replace(CREDENTIAL, **change)
    problems = validate_account(replace(ACCOUNT, credentials={credential.name: credential}))
    assert fields(problems) == [f'credentials["{credential.name}"].{field}']


def test_rules_without_address_conditions_are_few() -> None:
    rules = tuple(Rule(f"{NAME}/routingRules/r{n}", n, (Target("providers/a"),), min_size_bytes=n) for n in range(501))
    assert validate_account(replace(ACCOUNT, rules=rules[:500])) == []
    assert fields(validate_account(replace(ACCOUNT, rules=rules))) == ["rules"]


def test_rules_and_patterns_of_an_account_are_bounded() -> None:
    rule = replace(RULE, headers=())
    many = tuple(replace(rule, name=f"{NAME}/routingRules/r{n}") for n in range(10_001))
    assert fields(validate_account(replace(ACCOUNT, rules=many))) == ["rules"]
    patterns = tuple(f"@d{n}.example" for n in range(500))
    wide = tuple(replace(rule, name=f"{NAME}/routingRules/r{n}", recipient_patterns=patterns) for n in range(200))
    assert fields(validate_account(replace(ACCOUNT, rules=wide))) == ["rules"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "providers/relay"}, "name"),
        ({"name": "accounts/other/providers/relay"}, "name"),
        ({"account": ""}, "name"),
        ({"endpoints": ()}, "smtp.endpoints"),
        ({"endpoints": tuple(Endpoint("a.b", n) for n in range(1, 12))}, "smtp.endpoints"),
        ({"endpoints": (Endpoint("a.b", 1), Endpoint("a.b", 1))}, "smtp.endpoints[1]"),
        ({"endpoints": (Endpoint("a.b", 0),)}, "smtp.endpoints[0].port"),
        ({"endpoints": (Endpoint("a.b", 65_536),)}, "smtp.endpoints[0].port"),
        (
            {"endpoints": (Endpoint("a.b", 1, implicit_tls=True),), "tls_policy": TlsPolicy.NONE},
            "smtp.endpoints[0].implicit_tls",
        ),
        ({"ca_pem": "no certificate"}, "smtp.ca_pem"),
        ({"ca_pem": "-----BEGIN CERTIFICATE----------END CERTIFICATE-----" + "x" * 65_536}, "smtp.ca_pem"),
        ({"password": SEALED}, "smtp.password"),
        ({"max_connections": 0}, "smtp.max_connections"),
        ({"max_connections": 1_001}, "smtp.max_connections"),
        ({"max_messages_per_connection": 0}, "smtp.max_messages_per_connection"),
        ({"max_messages_per_connection": 100_001}, "smtp.max_messages_per_connection"),
    ],
)
def test_each_thing_wrong_in_a_provider_is_named(change: dict[str, Any], field: str) -> None:
    assert fields(validate_provider(replace(PROVIDER, **change))) == [field]


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "relay", "Relay.Example.NET", "xn--bcher-kva.example"])
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    assert validate_provider(replace(PROVIDER, endpoints=(Endpoint(host, 25),))) == []


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        "a b",
        "a.b\r\nQUIT",
        "a\0",
        "a.b:25",
        "[192.0.2.1]",
        "[::1]",
        "fe80::1%eth0",
        "a.b.",
        "1.2.3",
        "a_b.c",
        "b\u00fccher.example",
        "a/b",
        "user@host",
        "a" * 64,
        "a." * 126 + "aa",
    ],
)
def test_a_host_is_nothing_else(host: str) -> None:
    problems = validate_provider(replace(PROVIDER, endpoints=(Endpoint(host, 25),)))
    assert fields(problems) == ["smtp.endpoints[0].host"]


def test_credentials_go_only_over_verified_tls() -> None:
    with_login = replace(PROVIDER, username="user", password=SEALED)
    for policy in TlsPolicy:
        expected = [] if policy is TlsPolicy.REQUIRED_VERIFIED else ["smtp.tls_policy"]
        assert fields(validate_provider(replace(with_login, tls_policy=policy))) == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"username": "us\r\ner"}, "smtp.username"),
        ({"username": "us\0er"}, "smtp.username"),
        ({"username": "us\x7fer"}, "smtp.username"),
        ({"username": "\u00fc" * 128}, "smtp.username"),
        ({"password": None}, "smtp.password"),
        ({"password": SealedValue("", bytes(28))}, "smtp.password"),
        ({"password": SealedValue("k", bytes(27))}, "smtp.password"),
    ],
)
def test_each_thing_wrong_in_a_login_is_named(change: dict[str, Any], field: str) -> None:
    login = replace(PROVIDER, username="user", password=SEALED, tls_policy=TlsPolicy.REQUIRED_VERIFIED)
    assert fields(validate_provider(replace(login, **change))) == [field]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "accounts/other/routingRules/default"}, "name"),
        ({"name": f"{NAME}/routingRules/"}, "name"),
        ({"priority": 1_000_001}, "priority"),
        ({"sender_patterns": ("A@b.c",)}, "sender_patterns[0]"),
        ({"sender_patterns": ("a@B.c",)}, "sender_patterns[0]"),
        ({"sender_patterns": ("*@b.c",)}, "sender_patterns[0]"),
        ({"sender_patterns": ("b.c",)}, "sender_patterns[0]"),
        ({"sender_patterns": ("*.",)}, "sender_patterns[0]"),
        ({"sender_patterns": ("@",)}, "sender_patterns[0]"),
        ({"sender_patterns": ("*.b*",)}, "sender_patterns[0]"),
        ({"sender_patterns": ("",)}, "sender_patterns[0]"),
        ({"recipient_patterns": ("<>",)}, "recipient_patterns[0]"),
        ({"recipient_patterns": ("a@[192.0.2.1]",)}, "recipient_patterns[0]"),
        ({"recipient_patterns": ("@a.b", "@a.b")}, "recipient_patterns"),
        ({"recipient_patterns": tuple(f"@d{n}.example" for n in range(501))}, "recipient_patterns"),
        ({"headers": (HeaderCondition("received", "x"),)}, "headers[0].name"),
        ({"headers": (HeaderCondition("Subject", "x"),)}, "headers[0].name"),
        ({"headers": (HeaderCondition("x-postroad-", "x"),)}, "headers[0].name"),
        ({"headers": (HeaderCondition("x-postroad-a:b", "x"),)}, "headers[0].name"),
        ({"headers": (HeaderCondition("subject", ""),)}, "headers[0].pattern"),
        ({"headers": (HeaderCondition("subject", "X"),)}, "headers[0].pattern"),
        ({"headers": (HeaderCondition("subject", "x" * 201),)}, "headers[0].pattern"),
        ({"headers": (HeaderCondition("subject", "a\nb"),)}, "headers[0].pattern"),
        ({"headers": (HeaderCondition("subject", "x"),) * 21}, "headers"),
        ({"min_size_bytes": -1}, "min_size_bytes"),
        ({"max_size_bytes": -1}, "max_size_bytes"),
        ({"min_size_bytes": 5, "max_size_bytes": 4}, "max_size_bytes"),
        ({"targets": ()}, "targets"),
        ({"targets": tuple(Target(f"providers/p{n}") for n in range(11))}, "targets"),
        ({"targets": (Target("accounts/other/providers/a"),)}, "targets[0].provider"),
        ({"targets": (Target("relay"),)}, "targets[0].provider"),
        ({"targets": (Target("providers/a"), Target("providers/a"))}, "targets[1].provider"),
        ({"targets": (Target("providers/a", "egressSources/x"),)}, "targets[0].egress_source"),
        ({"targets": (Target("providers/a", "", -1),)}, "targets[0].weight"),
        ({"targets": (Target("providers/a", "", 1_001),)}, "targets[0].weight"),
    ],
)
def test_each_thing_wrong_in_a_rule_is_named(change: dict[str, Any], field: str) -> None:
    assert fields(validate_rule(replace(RULE, **change), NAME)) == [field]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"base_s": 0.5}, ["base"]),
        ({"base_s": 86_401.0, "cap_s": 90_000.0}, ["base"]),
        ({"factor": 0.9}, ["factor"]),
        ({"factor": 10.1}, ["factor"]),
        ({"factor": float("nan")}, ["factor"]),
        ({"base_s": float("nan")}, ["base", "cap"]),
        ({"cap_s": 59.0}, ["cap"]),
        ({"cap_s": float("inf")}, ["cap"]),
        ({"lifetime_s": 59.0}, ["lifetime"]),
        ({"lifetime_s": 2_592_001.0}, ["lifetime"]),
    ],
)
def test_each_thing_wrong_in_a_retry_policy_is_named(change: dict[str, Any], found: list[str]) -> None:
    assert fields(validate_retry_policy(replace(RetryPolicy(), **change))) == found


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("account_messages_per_hour", 0, 10**12),
        ("credential_messages_per_hour", 0, 10**12),
        ("address_connections_per_minute", 0, 10**12),
        ("max_message_bytes", 1_024, 268_435_456),
        ("max_recipients", 1, 10_000),
        ("node_count", 1, 1_000_000),
        ("max_connections", 0, 1_000_000),
        ("max_connections_per_address", 0, 1_000_000),
    ],
)
def test_settings_have_bounds(name: str, lowest: int, highest: int) -> None:
    def problems(value: int) -> list[Problem]:
        change: dict[str, Any] = {name: value}
        return validate_settings(replace(NodeSettings(), **change))

    assert problems(lowest) == problems(highest) == []
    assert fields(problems(lowest - 1)) == fields(problems(highest + 1)) == [name]


@pytest.mark.parametrize(
    "network",
    ["0.0.0.0/0", "::/0", "::/1", "::ffff:10.0.0.0/104", "10.0.0.1/8", "10.0.0.0/33", "x", "", "10.0.0.0/8\n"],
)
def test_networks_that_hold_too_much_or_say_nothing_are_refused(network: str) -> None:
    assert fields(validate_networks([(network, NAME)])) == ["bindings[0].network"]


def test_networks_of_two_accounts_never_touch() -> None:
    other = "accounts/other"
    assert fields(validate_networks([("10.1.0.0/16", NAME), ("10.0.0.0/8", other)])) == ["bindings[0].network"]
    assert fields(validate_networks([("10.0.0.0/8", NAME), ("10.0.0.0/8", other)])) == ["bindings[1].network"]
    nested = [("10.0.0.0/8", NAME), ("10.1.0.0/16", NAME), ("10.1.1.0/24", other), ("10.2.0.0/16", NAME)]
    assert fields(validate_networks(nested)) == ["bindings[2].network"]
    assert validate_networks([("10.0.0.0/9", NAME), ("10.128.0.0/9", other), ("a::/16", other)]) == []


def test_one_account_may_nest_networks_but_not_repeat_one() -> None:
    assert validate_networks([("10.0.0.0/8", NAME), ("10.1.0.0/16", NAME)]) == []
    assert fields(validate_networks([("10.0.0.0/8", NAME), ("10.0.0.0/8", NAME)])) == ["bindings[1].network"]


def test_a_binding_names_an_account() -> None:
    assert fields(validate_networks([("10.0.0.0/8", "demo")])) == ["bindings[0].account"]


def test_networks_of_an_account_are_named_by_their_place() -> None:
    assert validate_account_networks(["10.0.0.0/8"]) == []
    assert fields(validate_account_networks(["10.0.0.0/8", "0.0.0.0/0"])) == ["networks[1]"]
    assert fields(validate_account_networks([f"10.0.{n}.0/24" for n in range(101)])) == ["networks"]


def test_a_seal_is_bound_to_account_resource_and_field() -> None:
    assert seal_context(NAME, PROVIDER.name, "password") == (
        b"postroad/v1\0accounts/demo\0accounts/demo/providers/relay\0password"
    )
    assert seal_context("", "providers/a", "password") == b"postroad/v1\0\0providers/a\0password"
