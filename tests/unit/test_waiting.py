"""The digest of those that wait: the same whatever the order, another one for any other set."""

from __future__ import annotations

import secrets
from functools import reduce
from itertools import combinations

from dataplane.core.waiting import MODULUS, Tally, bucket_of, tally, tally_of_sum


def _sum(recipients: list[tuple[bytes, int]]) -> Tally:
    return reduce(Tally.plus, (tally(*one) for one in recipients), Tally())


def test_order_does_not_matter_and_who_leaves_is_taken_back() -> None:
    recipients = [(secrets.token_bytes(16), index) for index in range(20)]

    assert _sum(recipients) == _sum(recipients[::-1])
    assert _sum(recipients).minus(_sum(recipients[3:])) == _sum(recipients[:3])


def test_recipients_of_one_message_are_told_apart() -> None:
    message = secrets.token_bytes(16)

    sums = [_sum([(message, first), (message, second)]) for first, second in combinations(range(40), 2)]

    assert len(set(sums)) == len(sums)


def test_ids_may_be_added_up_before_they_are_weighted() -> None:
    ids = [secrets.token_bytes(16) for _ in range(50)]

    together = tally_of_sum(50, sum(int.from_bytes(one) for one in ids), 7)

    assert together == _sum([(one, 7) for one in ids])
    assert together == tally_of_sum(50, int(b"".join(ids).hex(), 16) % MODULUS, 7)


def test_a_bucket_is_the_last_twelve_bits() -> None:
    assert bucket_of(bytes(14) + b"\xab\xcd") == 0xBCD
