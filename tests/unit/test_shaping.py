from __future__ import annotations

import pytest

from dataplane.core.shaping import CAP_S, Destination, Flow, ForbiddenShapingError


def throttled(now_s: float = 0.0) -> Destination:
    destination = Destination(2)
    destination.connect(now_s)
    assert destination.failed(now_s, 0.0)
    return destination


def test_the_window_bounds_connections() -> None:
    destination = Destination(2)
    destination.connect(0)
    destination.connect(0)
    assert not destination.may_connect(0)
    with pytest.raises(ForbiddenShapingError):
        destination.connect(0)
    destination.succeeded()
    destination.disconnected()
    assert destination.may_connect(0)


def test_a_failure_with_no_connection_left_throttles() -> None:
    destination = throttled()
    assert destination.flow is Flow.THROTTLED
    assert not destination.usable(0.49)
    assert destination.usable(0.5)


def test_a_failure_beside_a_working_connection_only_delays_the_next_one() -> None:
    destination = Destination(5)
    destination.connect(0)
    destination.succeeded()
    destination.connect(0)
    assert not destination.failed(0, 1.0)
    assert destination.flow is Flow.OPEN
    assert destination.usable(0)
    assert not destination.may_connect(0.9)
    assert destination.may_connect(1)


def test_of_many_dials_that_fail_together_the_last_one_throttles() -> None:
    destination = Destination(3)
    for _ in range(3):
        destination.connect(0)
    assert [destination.failed(0, 0.0) for _ in range(3)] == [False, False, True]


def test_one_probe_at_a_time() -> None:
    destination = throttled()
    destination.connect(1)
    assert not destination.may_connect(1)
    assert not destination.usable(1)


def grow(destination: Destination, now_s: float) -> int:
    """Open all that may be opened at once, and let it become ready; how many that were."""
    count = 0
    while destination.may_connect(now_s):
        destination.connect(now_s)
        count += 1
    for _ in range(count):
        destination.succeeded()
    return count


def test_after_an_outage_the_window_begins_with_the_probe_and_doubles_with_each_round() -> None:
    destination = Destination(20)
    destination.connect(0)
    destination.failed(0, 0.0)
    rounds = []
    while destination.connections < 20:
        rounds.append(grow(destination, 1))
    assert rounds == [1, 1, 2, 4, 8, 4]
    assert destination.window(1) == 20


def test_a_destination_that_never_failed_may_use_its_whole_window_at_once() -> None:
    assert grow(Destination(20), 0) == 20


def test_a_refusal_beside_connections_that_work_shrinks_the_window_to_them_and_closed_ones_are_replaced() -> None:
    destination = Destination(20)
    for _ in range(20):
        destination.connect(0)
    for _ in range(5):
        destination.succeeded()
    for _ in range(15):
        assert not destination.failed(0, 0.0)
    assert (destination.window(0.4), destination.connections) == (5, 5)
    destination.disconnected()
    destination.connect(0.4)
    destination.succeeded()
    assert destination.window(0.4) == 5
    assert destination.window(0.5) == 6  # one more is tried, and no cohort
    destination.connect(0.5)
    destination.failed(0.5, 0.0)
    assert destination.window(1.4) == 5
    assert destination.window(1.5) == 6  # and later each time


def test_a_window_that_is_none_any_more_is_found_and_forgotten() -> None:
    destination = Destination(4)
    grow(destination, 0)
    destination.disconnected()
    destination.connect(0)
    destination.failed(0, 0.0)
    assert destination.window(0) == 3
    assert grow(destination, 1) == 1
    assert destination.window(1) == 4
    destination.disconnected()
    destination.connect(1)
    destination.failed(1, 1.0)
    assert destination.retry_at_s == 2  # the timer begins anew


def test_a_cohort_that_fails_is_one_failure() -> None:
    destination = Destination(20)
    for _ in range(20):
        destination.connect(0)
    for place in range(20):
        assert destination.failed(place / 100, 1.0) is (place == 19)
    assert destination.retry_at_s == 1.0
    destination.connect(1)
    destination.failed(1, 1.0)
    assert destination.retry_at_s == 3.0


def test_each_failed_probe_doubles_the_delay_up_to_the_cap() -> None:
    destination = throttled()
    delays = []
    now_s = 0.0
    for _ in range(12):
        now_s = destination.retry_at_s
        destination.connect(now_s)
        destination.failed(now_s, 1.0)
        delays.append(destination.retry_at_s - now_s)
    assert delays[:3] == [2, 4, 8]
    assert delays[-1] == CAP_S == 300


def test_success_forgets_earlier_failures() -> None:
    destination = throttled()
    destination.connect(1)
    destination.succeeded()
    destination.disconnected()
    destination.connect(1)
    assert destination.failed(1, 1.0)
    assert destination.retry_at_s == 2


def test_a_lower_limit_counts_at_once() -> None:
    destination = Destination(10)
    grow(destination, 0)
    destination.limit = 3
    assert destination.window(0) == 3
    assert not destination.may_connect(0)


def test_suspended_means_no_connection_until_resumed() -> None:
    destination = Destination(2)
    destination.connect(0)
    destination.suspend()
    assert not destination.may_connect(0)
    assert not destination.usable(0)
    assert not destination.failed(0, 0.0)
    destination.resume()
    assert destination.flow is Flow.OPEN


def test_forbidden_moves_raise() -> None:
    destination = Destination(1)
    with pytest.raises(ForbiddenShapingError):
        destination.resume()
    with pytest.raises(ForbiddenShapingError):
        destination.disconnected()
    with pytest.raises(ForbiddenShapingError):
        destination.succeeded()
    with pytest.raises(ForbiddenShapingError):
        destination.failed(0, 0.0)
    destination.suspend()
    with pytest.raises(ForbiddenShapingError):
        destination.suspend()
