"""Keys of queues: each part is read as it was written, whichever others there are."""

from __future__ import annotations

from itertools import product

import pytest

from dataplane.core.envelope import is_pinned, make_queue_key, pinned_provider, queue_priority, split_queue_key

ACCOUNTS = ("accounts/a", "")
NEXT_HOPS = ("providers/p", "accounts/a/providers/pinned", "example.net", "")
PRIORITIES = (-9, -1, 0, 1, 9)
COMBINATIONS = list(product(ACCOUNTS, NEXT_HOPS, PRIORITIES, (False, True)))


@pytest.mark.parametrize(("account", "next_hop", "priority", "pinned"), COMBINATIONS)
def test_each_part_is_read_as_it_was_written(account: str, next_hop: str, priority: int, *, pinned: bool) -> None:
    key = make_queue_key(account, next_hop, priority, pinned=pinned)
    assert split_queue_key(key) == (account, next_hop)
    assert queue_priority(key) == priority
    assert is_pinned(key) is pinned
    assert pinned_provider(key) == (next_hop if pinned else "")


def test_no_two_are_alike() -> None:
    keys = {make_queue_key(account, hop, priority, pinned=pinned) for account, hop, priority, pinned in COMBINATIONS}
    assert len(keys) == len(COMBINATIONS)


def test_a_key_is_as_short_as_what_it_tells() -> None:
    assert make_queue_key("a", "b") == "a\tb"
    assert make_queue_key("a", "b", 4) == "a\tb\t4"
    assert make_queue_key("a", "b", pinned=True) == "a\tb\tpinned"
    assert make_queue_key("a", "b", -4, pinned=True) == "a\tb\t-4\tpinned"
