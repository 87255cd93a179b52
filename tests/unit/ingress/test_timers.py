"""The timer wheel against its contract: nothing expires early, nothing late by more than a tick, each once."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from dataplane.ingress.timers import NEVER, Timed, TimerWheel

TICK_S = 0.5


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Owner(Timed):
    def __init__(self) -> None:
        super().__init__()
        self.expired: list[float] = []

    def expire(self, now: float) -> None:
        self.expired.append(now)


def test_an_owner_expires_once_and_not_before_its_deadline() -> None:
    clock, owner = Clock(), Owner()
    wheel = TimerWheel(clock, TICK_S)
    wheel.arm(owner, 3.0)
    clock.now += 2.99
    wheel.advance()
    assert owner.expired == []
    clock.now += 0.01 + TICK_S
    wheel.advance()
    wheel.advance()
    assert owner.expired == [clock.now]
    assert len(wheel) == 0


def test_moving_a_deadline_away_costs_no_slot_and_holds() -> None:
    clock, owner = Clock(), Owner()
    wheel = TimerWheel(clock, TICK_S)
    for _ in range(1_000):
        wheel.arm(owner, 10.0)
        clock.now += 0.001
    assert len(wheel) == 1
    clock.now += 9.9
    wheel.advance()
    assert owner.expired == []


def test_a_deadline_may_be_moved_nearer() -> None:
    clock, owner = Clock(), Owner()
    wheel = TimerWheel(clock, TICK_S)
    wheel.arm(owner, 300.0)
    wheel.arm(owner, 1.0)
    clock.now += 1.0 + TICK_S
    wheel.advance()
    assert len(owner.expired) == 1
    clock.now += 400.0
    wheel.advance()
    assert len(owner.expired) == 1


def test_a_disarmed_owner_is_forgotten() -> None:
    clock, owner = Clock(), Owner()
    wheel = TimerWheel(clock, TICK_S)
    wheel.arm(owner, 1.0)
    wheel.disarm(owner)
    clock.now += 5.0
    wheel.advance()
    assert (owner.expired, owner.deadline, len(wheel)) == ([], NEVER, 0)


def test_a_leap_of_the_clock_expires_all_that_is_due_and_walks_no_empty_slots() -> None:
    clock, owners = Clock(), [Owner() for _ in range(3)]
    wheel = TimerWheel(clock, TICK_S)
    for number, owner in enumerate(owners):
        wheel.arm(owner, 10.0 * (number + 1))
    clock.now += 1e12
    wheel.advance()
    assert all(len(owner.expired) == 1 for owner in owners)


@given(
    st.lists(
        st.tuples(st.sampled_from(["arm", "disarm", "move"]), st.integers(0, 3), st.floats(0.0, 40.0)), max_size=60
    )
)
def test_the_wheel_agrees_with_a_list_of_deadlines(steps: list[tuple[str, int, float]]) -> None:
    clock, owners = Clock(), [Owner() for _ in range(4)]
    wheel = TimerWheel(clock, TICK_S)
    deadlines = [NEVER] * 4
    for action, number, seconds in steps:
        if action == "arm":
            wheel.arm(owners[number], seconds)
            deadlines[number] = clock.now + seconds
        elif action == "disarm":
            wheel.disarm(owners[number])
            deadlines[number] = NEVER
        else:
            clock.now += seconds
            wheel.advance()
            for index, owner in enumerate(owners):
                if owner.expired:
                    assert deadlines[index] <= clock.now
                    deadlines[index] = NEVER
                    owner.expired.clear()
                assert deadlines[index] > clock.now - 2 * TICK_S
