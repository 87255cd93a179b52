from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataplane.core.config import RetryPolicy
from dataplane.core.retry import FLOOR_S, RetryClock, backoff_s, is_expired

policies = st.builds(
    RetryPolicy,
    base_s=st.floats(1, 600),
    factor=st.floats(1, 10),
    cap_s=st.floats(1, 86_400),
    lifetime_s=st.floats(60, 1e6),
)


@given(policies, st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_a_delay_lies_between_floor_and_cap(policy: RetryPolicy, attempt: int, random: float) -> None:
    assert FLOOR_S <= backoff_s(policy, attempt, random) <= max(FLOOR_S, policy.cap_s)


@given(policies, st.integers(1, 500), st.floats(0, 1, exclude_max=True))
def test_a_later_attempt_never_waits_less_for_the_same_draw(policy: RetryPolicy, attempt: int, random: float) -> None:
    assert backoff_s(policy, attempt + 1, random) >= backoff_s(policy, attempt, random)


@given(st.lists(st.tuples(st.integers(0, 60_000), st.integers(-(10**9), 10**9)), max_size=20))
def test_steady_time_grows_with_the_monotonic_clock_whatever_the_wall_does(steps: list[tuple[int, int]]) -> None:
    clock = RetryClock(10**12, 0.0)
    wall_ms, monotonic_ms = 10**12, 0
    for count, (elapsed_ms, jump_ms) in enumerate(steps, start=1):
        jump = jump_ms if abs(jump_ms) > 2_000 else 0
        wall_ms += elapsed_ms + jump
        monotonic_ms += elapsed_ms
        steady_ms = clock.read(wall_ms, monotonic_ms / 1000)
        # Each reading rounds by less than a millisecond.
        assert abs(steady_ms - (10**12 + monotonic_ms)) <= count
        assert not is_expired(RetryPolicy(), 10**12, wall_ms, steady_ms)
