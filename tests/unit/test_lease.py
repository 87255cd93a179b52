"""The lease machine: counted from the sending, over before the database thinks so, never the same again."""

from __future__ import annotations

from dataplane.core.lease import MARGIN_S, Lease


def test_a_lease_counts_from_the_sending_of_its_renewal() -> None:
    lease = Lease()
    assert not lease.holds(0, 0.0)
    lease.renewed(7, 15.0, sent_s=100.0)
    assert lease.holds(7, 114.9 - MARGIN_S)
    assert not lease.holds(7, 115.0 - MARGIN_S)
    assert lease.left_s(200.0) == 0.0


def test_a_sleep_ends_it_whatever_was_renewed_before() -> None:
    lease = Lease()
    lease.renewed(7, 15.0, sent_s=100.0)
    lease.renewed(7, 15.0, sent_s=105.0)
    assert lease.holds(7, 110.0)
    assert not lease.holds(7, 110.0 + 3_600.0)


def test_a_renewal_in_time_is_the_same_epoch_and_another_one_makes_all_void() -> None:
    lease = Lease()
    assert not lease.renewed(7, 15.0, sent_s=100.0)
    assert not lease.renewed(7, 15.0, sent_s=120.0)
    assert lease.holds(7, 121.0)
    assert lease.renewed(8, 15.0, sent_s=140.0)
    assert not lease.holds(7, 141.0)
    assert lease.holds(8, 141.0)


def test_an_answer_that_was_overtaken_takes_nothing_away() -> None:
    lease = Lease()
    lease.renewed(7, 15.0, sent_s=105.0)
    lease.renewed(7, 15.0, sent_s=100.0)
    assert lease.holds(7, 118.0)


def test_what_is_abandoned_holds_nothing() -> None:
    lease = Lease()
    lease.renewed(7, 15.0, sent_s=100.0)
    lease.abandon()
    assert not lease.holds(7, 101.0)
    assert lease.epoch == 0
    assert not lease.renewed(8, 15.0, sent_s=102.0)
