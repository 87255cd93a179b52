from __future__ import annotations

import pytest

from dataplane.core.config import RetryPolicy
from dataplane.core.retry import FLOOR_S, RetryClock, backoff_s, is_expired, next_attempt_ms, rebase_due

POLICY = RetryPolicy()
DAY_MS = 86_400_000
HOUR_MS = 3_600_000


@pytest.mark.parametrize(("attempt", "bound_s"), [(1, 60), (2, 120), (3, 240), (6, 1920), (7, 3600), (5_000, 3600)])
def test_the_bound_doubles_up_to_the_cap(attempt: int, bound_s: float) -> None:
    assert backoff_s(POLICY, attempt, 0.5) == bound_s / 2


def test_full_jitter_reaches_down_to_the_floor() -> None:
    assert backoff_s(POLICY, 1, 0.0) == FLOOR_S == 1.0


def test_due_time_is_now_plus_the_delay() -> None:
    assert next_attempt_ms(POLICY, 1, 1_000_000, 0.5) == 1_030_000


def test_a_message_expires_when_its_lifetime_is_over_by_both_clocks() -> None:
    lifetime_ms = 5 * DAY_MS
    assert is_expired(POLICY, 0, lifetime_ms, lifetime_ms)
    assert not is_expired(POLICY, 0, lifetime_ms - 1, lifetime_ms - 1)


def test_a_jump_of_the_wall_clock_expires_nothing() -> None:
    clock = RetryClock(0, 0.0)
    wall_ms = 400 * DAY_MS
    assert not is_expired(POLICY, 0, wall_ms, clock.read(wall_ms, 10.0))


def test_mail_accepted_after_a_backward_jump_does_not_expire_early() -> None:
    clock = RetryClock(10 * DAY_MS, 0.0)
    steady_ms = clock.read(0, 1.0)
    assert steady_ms == 10 * DAY_MS + 1_000
    assert not is_expired(POLICY, 0, 1_000, steady_ms)


@pytest.mark.parametrize("jump_ms", [HOUR_MS, -HOUR_MS, 1_500, -1_500])
def test_jumps_are_taken_out_and_stay_out(jump_ms: int) -> None:
    clock = RetryClock(HOUR_MS * 10, 100.0)
    assert clock.read(HOUR_MS * 10 + 1_000, 101.0) == HOUR_MS * 10 + 1_000
    assert clock.read(HOUR_MS * 10 + 2_000 + jump_ms, 102.0) == HOUR_MS * 10 + 2_000
    assert clock.read(HOUR_MS * 10 + 3_000 + jump_ms, 103.0) == HOUR_MS * 10 + 3_000
    assert clock.offset_ms == jump_ms


def test_small_corrections_are_followed() -> None:
    clock = RetryClock(0, 0.0)
    assert clock.read(1_900, 1.0) == 1_900
    assert clock.offset_ms == 0


def test_a_retry_beyond_the_longest_delay_is_brought_back() -> None:
    assert rebase_due(DAY_MS, 0, POLICY.cap_s) == HOUR_MS
    assert rebase_due(1_000, 0, POLICY.cap_s) == 1_000
