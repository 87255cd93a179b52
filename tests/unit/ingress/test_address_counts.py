"""The cap of an address over all workers of a node: counts in shared memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dataplane.core import replies
from dataplane.ingress.address_counts import AddressCounts
from dataplane.ingress.admission import Admission
from dataplane.settings_handover import anonymous_file

WORKERS = 3


@pytest.fixture
def descriptor() -> Iterator[int]:
    made = anonymous_file("counts")
    yield made
    os.close(made)


def workers(descriptor: int) -> list[AddressCounts]:
    AddressCounts.create(descriptor, WORKERS)
    return [AddressCounts(descriptor, index) for index in range(WORKERS)]


def test_a_cap_of_an_address_holds_over_all_workers(descriptor: int) -> None:
    admissions = [Admission(10, 2, shared=counts) for counts in workers(descriptor)]
    assert admissions[0].admit("192.0.2.1", counted=True) is None
    assert admissions[1].admit("192.0.2.1", counted=True) is None
    assert admissions[2].admit("192.0.2.1", counted=True) is replies.TOO_MANY_CONNECTIONS
    assert admissions[2].admit("192.0.2.2", counted=True) is None
    admissions[0].leave("192.0.2.1")
    assert admissions[2].admit("192.0.2.1", counted=True) is None


def test_an_address_has_its_whole_cap_on_whichever_worker_its_connections_fall(descriptor: int) -> None:
    admission, *_ = [Admission(100, 50, shared=counts) for counts in workers(descriptor)]
    assert [admission.admit("192.0.2.1", counted=True) for _ in range(50)] == [None] * 50


def test_the_connections_of_a_worker_that_died_are_forgotten_and_no_others(descriptor: int) -> None:
    supervisor = AddressCounts.create(descriptor, WORKERS)
    first, second, _ = [AddressCounts(descriptor, index) for index in range(WORKERS)]
    first.add("192.0.2.1")
    second.add("192.0.2.1")
    supervisor.clear(0)
    assert second.count("192.0.2.1") == 1
    supervisor.clear(1)
    assert first.count("192.0.2.1") == 0


def test_many_addresses_are_hardly_ever_taken_for_one_another(descriptor: int) -> None:
    counts, *_ = workers(descriptor)
    addresses = [f"10.{number >> 8}.{number & 255}.1" for number in range(2_000)]
    for address in addresses:
        counts.add(address)
    # Both places of an address are taken by others with a chance of about (2,000 / 32,768)² each.
    assert sum(counts.count(address) > 1 for address in addresses) < 40
    for address in addresses:
        counts.remove(address)
    assert all(counts.count(address) == 0 for address in addresses)


def test_where_addresses_fall_differs_from_node_to_node(descriptor: int) -> None:
    one, *_ = workers(descriptor)
    other_descriptor = anonymous_file("other")
    other = AddressCounts.create(other_descriptor, 1)
    places = [f"192.0.2.{number}" for number in range(9)]
    assert [one._places(key) for key in places] != [other._places(key) for key in places]
    os.close(other_descriptor)


def test_caps_change_and_send_nobody_away() -> None:
    admission = Admission(max_connections=3, max_per_address=3)
    for _ in range(3):
        assert admission.admit("192.0.2.1", counted=True) is None
    admission.bound(2, 1)
    assert admission.total == 3
    assert admission.admit("192.0.2.2", counted=True) is replies.TOO_MANY_CONNECTIONS
    admission.bound(9, 4)
    assert admission.admit("192.0.2.1", counted=True) is None
    assert admission.admit("192.0.2.1", counted=True) is replies.TOO_MANY_CONNECTIONS
