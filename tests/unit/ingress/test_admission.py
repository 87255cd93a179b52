"""Caps on connections and failed logins, and the buckets that are asked."""

from __future__ import annotations

import pytest

from dataplane.core import replies
from dataplane.core.limits import counting_key, normalize_address
from dataplane.ingress.admission import Admission
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


def test_every_sample_is_a_metric_that_the_node_exports() -> None:
    specs = {spec.name: len(spec.labels) for spec in METRICS}
    rows = list(IngressCounters(messages_enqueued=3).samples())
    assert all(specs[name] == len(labels) for name, labels, _ in rows)
    assert ("smtp_message_enqueued_total", (), 3) in rows
