"""Caps on connections and failed logins, and the buckets that are asked."""

from __future__ import annotations

import pytest

from dataplane.core import replies
from dataplane.core.config import NodeSettings
from dataplane.ingress.admission import Admission, counting_key, normalize_address
from dataplane.ingress.buckets import connection_takes, message_takes
from dataplane.ingress.counters import IngressCounters
from dataplane.telemetry import METRICS


@pytest.mark.parametrize(
    ("address", "normal", "key"),
    [
        ("192.0.2.1", "192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::1", "fe80::"),
    ],
)
def test_addresses_are_counted_by_what_a_client_cannot_choose(address: str, normal: str, key: str) -> None:
    assert normalize_address(address) == normal
    assert counting_key(normal) == key


def test_an_address_and_its_neighbours_in_64_bits_share_a_cap() -> None:
    admission = Admission(max_connections=10, max_per_address=2)
    assert admission.admit("2001:db8::1", counted=True) is None
    assert admission.admit("2001:db8::2", counted=True) is None
    assert admission.admit("2001:db8::3", counted=True) is replies.TOO_MANY_CONNECTIONS
    assert admission.admit("2001:db8:0:1::3", counted=True) is None
    admission.leave("2001:db8::1")
    assert admission.admit("2001:db8::4", counted=True) is None


def test_the_total_binds_everybody_and_nothing_is_kept_of_who_left() -> None:
    admission = Admission(max_connections=3, max_per_address=1)
    for _ in range(3):
        assert admission.admit("192.0.2.1", counted=False) is None
    assert admission.admit("192.0.2.9", counted=False) is replies.TOO_MANY_CONNECTIONS
    for _ in range(3):
        admission.leave("192.0.2.1")
    assert admission.total == 0
    assert not admission._connections


def test_failed_logins_are_forgotten_after_a_minute_and_bounded_in_number() -> None:
    admission = Admission(10, 10, max_auth_failures=2, max_tracked=5)
    for number in range(50):
        admission.note_auth_failure(f"192.0.2.{number}", 0.0)
    assert len(admission._failures) == 5
    for _ in range(2):
        admission.note_auth_failure("192.0.2.200", 1.0)
    assert admission.auth_throttled("192.0.2.200", 2.0)
    assert not admission.auth_throttled("192.0.2.201", 2.0)
    assert not admission.auth_throttled("192.0.2.200", 61.0)


def test_a_limit_of_0_asks_nobody() -> None:
    settings = NodeSettings(
        account_messages_per_hour=0, credential_messages_per_hour=0, address_connections_per_minute=0
    )
    assert message_takes(settings, "accounts/a", "accounts/a/smtpCredentials/c") == ()
    assert connection_takes(settings, "192.0.2.1") == ()


def test_default_buckets_hold_a_tenth_and_share_the_accounts_tag() -> None:
    account, credential = message_takes(NodeSettings(), "accounts/a", "accounts/a/smtpCredentials/c")
    assert (account.capacity, round(account.rate_per_s * 3600), account.cost) == (10_000, 100_000, 1)
    assert (credential.capacity, round(credential.rate_per_s * 3600)) == (5_000, 50_000)
    assert account.tag == credential.tag
    assert account.key != credential.key
    (connections,) = connection_takes(NodeSettings(), "192.0.2.1")
    assert (connections.capacity, round(connections.rate_per_s * 60)) == (10, 10)


def test_a_client_known_by_its_network_has_no_bucket_of_a_credential() -> None:
    assert len(message_takes(NodeSettings(), "accounts/a", "")) == 1


def test_every_sample_is_a_metric_that_the_node_exports() -> None:
    specs = {spec.name: len(spec.labels) for spec in METRICS}
    rows = list(IngressCounters(messages_enqueued=3).samples())
    assert all(specs[name] == len(labels) for name, labels, _ in rows)
    assert ("smtp_message_enqueued_total", (), 3) in rows
