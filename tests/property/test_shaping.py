"""A destination against servers that allow what they like, and change their mind."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataplane.core.shaping import CAP_S, Destination, Flow

RANDOM = st.floats(0, 1, exclude_max=True)


class DestinationMachine(RuleBasedStateMachine):
    """Dials, endings and time in any order."""

    @initialize(limit=st.integers(1, 30))
    def begin(self, limit: int) -> None:
        self.destination = Destination(limit)
        self.now_s = 0.0
        self.opening = 0
        self.open = 0

    @rule(seconds=st.floats(0, 400))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.destination.may_connect(self.now_s))
    @rule()
    def dial(self) -> None:
        self.destination.connect(self.now_s)
        self.opening += 1

    @precondition(lambda self: self.opening > 0)
    @rule()
    def becomes_ready(self) -> None:
        self.destination.succeeded()
        self.opening -= 1
        self.open += 1

    @precondition(lambda self: self.opening > 0)
    @rule(random=RANDOM)
    def fails(self, random: float) -> None:
        throttled = self.destination.failed(self.now_s, random)
        self.opening -= 1
        suspended = self.destination.flow is Flow.SUSPENDED
        assert throttled is (self.opening + self.open == 0 and not suspended)

    @precondition(lambda self: self.open > 0)
    @rule()
    def closes(self) -> None:
        self.destination.disconnected()
        self.open -= 1

    @precondition(lambda self: self.destination.flow is not Flow.SUSPENDED)
    @rule()
    def is_suspended(self) -> None:
        self.destination.suspend()

    @precondition(lambda self: self.destination.flow is Flow.SUSPENDED)
    @rule()
    def is_resumed(self) -> None:
        self.destination.resume()

    @rule(limit=st.integers(1, 30))
    def is_set_anew(self, limit: int) -> None:
        self.destination.limit = limit

    @invariant()
    def counts_agree(self) -> None:
        assert self.destination.connections == self.opening + self.open

    @invariant()
    def nobody_waits_for_ever(self) -> None:
        destination = self.destination
        if destination.flow is not Flow.SUSPENDED and not destination.connections:
            assert destination.may_connect(self.now_s + CAP_S)
        if destination.flow is Flow.OPEN:
            assert 1 <= destination.window(self.now_s) <= destination.limit
            # Whatever is known to work is replaced without a wait.
            assert destination.connections or destination.may_connect(self.now_s)

    @invariant()
    def a_dead_one_is_probed_by_one(self) -> None:
        if self.destination.flow is Flow.THROTTLED:
            assert self.destination.connections <= 1


DestinationMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
TestDestinationMachine = DestinationMachine.TestCase


@given(st.integers(1, 30), st.integers(1, 30), RANDOM)
def test_the_window_finds_what_a_server_allows_and_asks_for_more_ever_less_often(
    limit: int, allowed: int, random: float
) -> None:
    destination = Destination(limit)
    refused: list[float] = []
    open_count = 0
    for second in range(3_600):
        cohort = 0
        while destination.may_connect(second):
            destination.connect(second)
            cohort += 1
        for _ in range(cohort):
            if open_count < allowed:
                open_count += 1
                destination.succeeded()
            else:
                refused.append(second)
                destination.failed(second, random)
        if second % 7 == 0:
            open_count -= 1
            destination.disconnected()
    assert open_count in (min(limit, allowed), min(limit, allowed) - 1)
    # The first cohort tells; after it one dial at a time, 1, 2, 4 … 300 seconds apart or half of that.
    later = [second for second in refused if second > 0]
    assert len(later) <= 9 + 3_600 / 149


@given(st.integers(1, 30), RANDOM)
def test_a_server_that_comes_back_is_never_met_by_more_than_twice_what_it_took(limit: int, random: float) -> None:
    destination = Destination(limit)
    now_s = 0.0
    for _ in range(5):
        now_s = max(now_s, destination.retry_at_s)
        destination.connect(now_s)
        destination.failed(now_s, random)
    now_s = destination.retry_at_s
    ready = 0
    while ready < limit:
        cohort = 0
        while destination.may_connect(now_s):
            destination.connect(now_s)
            cohort += 1
        assert 1 <= cohort <= max(1, ready)
        for _ in range(cohort):
            destination.succeeded()
        ready += cohort
        now_s += 0.1
