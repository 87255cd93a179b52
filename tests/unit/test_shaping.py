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


def test_a_probe_that_succeeds_opens_the_whole_window() -> None:
    destination = throttled()
    destination.connect(1)
    destination.succeeded()
    assert destination.flow is Flow.OPEN
    assert destination.may_connect(1)


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
    destination.failed(1, 1.0)
    assert destination.retry_at_s == 2


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
    destination.suspend()
    with pytest.raises(ForbiddenShapingError):
        destination.suspend()
