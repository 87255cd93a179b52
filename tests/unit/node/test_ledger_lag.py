"""The age of the oldest record that is not stored, from a bounded number of marks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataplane.ledger_lag import MARKS, LedgerLag


def test_nothing_unstored_has_no_age() -> None:
    lag = LedgerLag()
    assert lag.age_s(5.0) == 0.0
    lag.note(10, 10, 6.0)
    assert lag.age_s(9.0) == 0.0


def test_the_age_is_that_of_the_oldest_record_that_is_not_stored() -> None:
    lag = LedgerLag()
    lag.note(10, 0, 100.0)
    lag.note(20, 0, 101.0)
    assert lag.age_s(105.0) == 5.0
    lag.note(20, 10, 102.0)
    assert lag.age_s(105.0) == 4.0
    lag.note(20, 20, 103.0)
    assert lag.age_s(105.0) == 0.0


def test_a_part_that_is_stored_does_not_make_the_rest_young() -> None:
    lag = LedgerLag()
    lag.note(10, 0, 100.0)
    lag.note(10, 9, 101.0)
    assert lag.age_s(110.0) == 10.0


def test_a_day_without_control_plane_takes_no_more_than_the_marks() -> None:
    lag = LedgerLag()
    for second in range(86_400):
        lag.note(second + 1, 0, float(second))
    assert len(lag._marks) <= MARKS
    assert lag.age_s(86_400.0) == 86_400.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=600))
def test_no_record_is_ever_said_to_be_younger_than_it_is(steps: list[tuple[int, int]]) -> None:
    lag, last, stored = LedgerLag(), 0, 0
    written: list[float] = []
    for now, (more, gone) in enumerate(steps):
        last += more
        written += [float(now)] * more
        stored = min(last, stored + gone)
        lag.note(last, stored, float(now))
        oldest = float(now) - written[stored] if stored < last else 0.0
        assert lag.age_s(float(now)) >= oldest
        assert (lag.age_s(float(now)) > 0) <= (stored < last)
