"""Who yields: MAIL waits while enough is in hand and the loop is short, accounts in turn, and never for long."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dataplane.ingress.turnstile import IDLE_LOOKS, LONGEST_S, LOOK_S, PERIOD_S, REST_S, Turnstile


class Bench:
    """A loop of our own, its clock, and how much of the time it was busy."""

    def __init__(self, mark: int = 4) -> None:
        self.now_s = 100.0
        self.busy_s = 0.0
        self.in_hand = 0
        self.soon: list[Callable[[], None]] = []
        self.later: list[Callable[[], None]] = []
        self.went: list[str] = []
        self.turnstile = Turnstile(lambda: self.in_hand, lambda: self.now_s, lambda: self.busy_s, self, mark)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        self.soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None], /) -> None:
        assert delay == LOOK_S
        self.later.append(callback)

    def wait(self, *names: str) -> None:
        for name in names:
            assert self.turnstile.holds(name[0])
            self.turnstile.set_aside(name[0], Session(self, name))

    def look(self, *, busy_share: float, seconds: float = LOOK_S) -> None:
        """Let the timer come."""
        self.now_s += seconds
        self.busy_s += seconds * busy_share
        (callback,), self.later = self.later, []
        callback()

    def turn(self) -> None:
        soon, self.soon = self.soon, []
        for callback in soon:
            callback()


class Session:
    def __init__(self, bench: Bench, name: str, *, is_there: bool = True) -> None:
        self._bench = bench
        self._name = name
        self._is_there = is_there

    def go_on(self) -> bool:
        if self._is_there:
            self._bench.went.append(self._name)
        return self._is_there


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_below_the_mark_nobody_waits(bench: Bench) -> None:
    bench.in_hand = 3
    assert not bench.turnstile.holds("a")
    bench.in_hand = 4
    assert bench.turnstile.holds("a")


def test_who_comes_later_waits_behind_those_who_wait(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait("a1")
    bench.in_hand = 0
    assert bench.turnstile.holds("a")


def test_each_message_that_leaves_lets_one_go_on(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait("a1", "a2", "a3")
    bench.in_hand = 3
    bench.turnstile.one_left()
    assert bench.went == ["a1"]
    bench.turnstile.one_left()
    assert bench.went == ["a1", "a2"]


def test_nobody_goes_on_while_too_much_is_in_hand(bench: Bench) -> None:
    bench.in_hand = 9
    bench.wait("a1")
    bench.in_hand = 8
    bench.turnstile.one_left()
    assert bench.went == []


def test_accounts_take_turns_however_many_sessions_one_has(bench: Bench) -> None:
    bench.in_hand = 4
    bench.turnstile.entered("b")
    bench.wait("a1", "a2", "a3", "a4", "b1")
    bench.in_hand = 0
    for _ in range(3):
        bench.turnstile.one_left()
    assert bench.went == ["a1", "b1", "a2"]


def test_who_sends_little_does_not_wait_for_those_who_wait() -> None:
    bench = Bench(mark=16)
    bench.in_hand = 16
    bench.wait("a1", "a2")
    # Of two accounts each may have a quarter of the mark at once, so that all of them have half of it at the most.
    begun = []
    for _ in range(4):
        assert not bench.turnstile.holds("b")
        begun.append(bench.turnstile.entered("b"))
    assert bench.turnstile.holds("b")
    bench.turnstile.left(begun.pop())
    assert not bench.turnstile.holds("b")
    assert bench.went == []


def test_an_account_whose_own_sessions_wait_has_no_other_way(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait("a1")
    assert bench.turnstile.holds("a")


def test_many_accounts_with_little_wait_like_one_with_much() -> None:
    bench = Bench(mark=16)
    bench.in_hand = 16
    bench.wait("a1")
    inside = 0
    for number in range(100):
        if not bench.turnstile.holds(f"account-{number}"):
            bench.turnstile.entered(f"account-{number}")
            inside += 1
    assert inside == 8


def test_the_turn_of_one_who_left_goes_to_the_next(bench: Bench) -> None:
    bench.in_hand = 4
    bench.turnstile.set_aside("a", Session(bench, "gone", is_there=False))
    bench.wait("a2")
    bench.in_hand = 3
    bench.turnstile.one_left()
    assert bench.went == ["a2"]
    assert bench.turnstile.waiting_count == 0


def test_a_loop_with_time_to_spare_keeps_nobody_waiting(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait(*[f"a{number}" for number in range(100)])
    bench.look(busy_share=0.5)
    assert len(bench.went) == 16
    for _ in range(IDLE_LOOKS - 1):
        bench.look(busy_share=0.5)
    while bench.soon:
        bench.turn()
    assert len(bench.went) == 100
    assert not bench.turnstile.holds("a")
    bench.now_s += REST_S
    assert bench.turnstile.holds("a")


def test_one_idle_moment_does_not_open_it_for_all(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait(*[f"a{number}" for number in range(100)])
    for _ in range(IDLE_LOOKS):
        bench.look(busy_share=0.5)
        bench.look(busy_share=1.0)
    assert len(bench.went) == 16 * IDLE_LOOKS
    assert bench.turnstile.holds("a")


def test_a_busy_loop_keeps_them_waiting(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait("a1")
    for _ in range(10):
        bench.look(busy_share=0.95, seconds=0.02)
    assert bench.went == []


def test_letting_many_go_takes_many_turns_of_the_loop(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait(*[f"a{number}" for number in range(40)])
    bench.turnstile.open()
    assert len(bench.went) == 16
    bench.turn()
    assert len(bench.went) == 32
    bench.turn()
    assert len(bench.went) == 40
    assert not bench.soon


def test_transactions_that_have_begun_count_until_they_are_over(bench: Bench) -> None:
    bench.in_hand = 1
    begun = [bench.turnstile.entered("a") for _ in range(3)]
    bench.wait("a1")
    bench.turnstile.left(begun.pop())
    assert bench.went == ["a1"]
    begun.append(bench.turnstile.entered("a"))
    assert bench.turnstile.holds("a")
    for each in begun:
        bench.turnstile.left(each)
    assert not bench.turnstile.holds("a")


def test_a_message_that_goes_from_the_transaction_to_the_hand_is_one(bench: Bench) -> None:
    begun = bench.turnstile.entered("a")
    bench.in_hand = 3
    assert bench.turnstile.holds("a")
    bench.in_hand = 4
    bench.turnstile.left(begun)
    assert bench.turnstile.holds("a")
    bench.in_hand = 3
    assert not bench.turnstile.holds("a")


@pytest.mark.parametrize("others_come", [True, False])
def test_a_transaction_that_takes_long_takes_nobodys_place(bench: Bench, *, others_come: bool) -> None:
    slow = [bench.turnstile.entered("a") for _ in range(4)]
    assert bench.turnstile.holds("a")
    for _ in range(3):
        bench.now_s += PERIOD_S
        if others_come:
            bench.turnstile.left(bench.turnstile.entered("a"))
    assert not bench.turnstile.holds("a")
    for each in slow:
        bench.turnstile.left(each)
    bench.in_hand = 4
    assert bench.turnstile.holds("a"), "what was forgotten is not taken off again"


def test_nobody_waits_for_long_whatever_is_in_hand(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait("a1")
    bench.look(busy_share=1.0, seconds=LONGEST_S)
    assert bench.went == []
    bench.look(busy_share=1.0)
    assert bench.went == ["a1"]


def test_it_stops_looking_when_nobody_waits(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait("a1")
    bench.in_hand = 3
    bench.turnstile.one_left()
    bench.look(busy_share=1.0)
    assert not bench.later
