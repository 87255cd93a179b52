"""Who yields: MAIL waits while enough is in hand and the loop is short, accounts in turn, and never for long."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dataplane.ingress.turnstile import AT_ONCE, IDLE_LOOKS, LONGEST_S, LOOK_S, PERIOD_S, REST_S, Pass, Turnstile


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

    def holds(self, account: str = "a") -> bool:
        return self.turnstile.holds(account)

    def wait(self, *names: str) -> None:
        """Set sessions aside; the first letter of a name is the account."""
        for name in names:
            self.turnstile.set_aside(name[0], Session(self, name))

    def enter(self, account: str = "a", count: int = 1) -> list[Pass]:
        return [self.turnstile.entered(account) for _ in range(count)]

    def leave(self, begun: list[Pass]) -> None:
        for each in begun:
            self.turnstile.left(each)
        self.turn()

    def one_left(self) -> None:
        self.turnstile.one_left()
        self.turn()

    def look(self, *, busy_share: float, seconds: float = LOOK_S) -> None:
        """Let the timer come, and the loop turn."""
        self.now_s += seconds
        self.busy_s += seconds * busy_share
        (callback,), self.later = self.later, []
        callback()
        self.turn()

    def turn(self) -> None:
        soon, self.soon = self.soon, []
        for callback in soon:
            callback()

    def turn_all(self) -> None:
        while self.soon:
            self.turn()


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
    bench.enter()
    bench.in_hand = 2
    assert not bench.holds()
    bench.in_hand = 3
    assert bench.holds()


def test_who_comes_later_waits_behind_those_who_wait(bench: Bench) -> None:
    bench.wait("a1")
    assert bench.holds()


def test_each_message_that_leaves_lets_one_go_on(bench: Bench) -> None:
    bench.wait("a1", "a2", "a3")
    bench.in_hand = 3
    bench.one_left()
    assert bench.went == ["a1"]
    bench.one_left()
    assert bench.went == ["a1", "a2"]


def test_nobody_goes_on_within_the_call_that_makes_room(bench: Bench) -> None:
    bench.wait("a1")
    bench.turnstile.one_left()
    assert bench.went == []
    bench.turn()
    assert bench.went == ["a1"]


def test_sessions_whose_transaction_ends_at_once_are_let_go_one_after_the_other(bench: Bench) -> None:
    count = 5_000

    class AtOnce:
        def go_on(self) -> bool:
            bench.went.append("a")
            bench.turnstile.left(bench.turnstile.entered("a"))
            return True

    for _ in range(count):
        bench.turnstile.set_aside("a", AtOnce())
    bench.turnstile.one_left()
    turns = 0
    while bench.soon:
        bench.turn()
        turns += 1
    assert len(bench.went) == count
    assert turns >= count / AT_ONCE
    assert not bench.turnstile.waiting_count


def test_nobody_goes_on_while_too_much_is_in_hand(bench: Bench) -> None:
    bench.wait("a1")
    bench.in_hand = 8
    bench.one_left()
    assert bench.went == []


def test_accounts_take_turns_however_many_sessions_one_has(bench: Bench) -> None:
    bench.wait("a1", "a2", "a3", "a4", "b1")
    for _ in range(3):
        bench.one_left()
    assert bench.went == ["a1", "b1", "a2"]


def test_half_as_much_is_in_hand_while_several_accounts_wait() -> None:
    bench = Bench(mark=16)
    bench.wait("a1", "a2", "b1")
    bench.in_hand = 8
    bench.one_left()
    assert bench.went == []
    bench.in_hand = 7
    bench.one_left()
    bench.in_hand = 15
    assert bench.went == ["a1"]
    bench.one_left()
    assert bench.went == ["a1"]
    bench.in_hand = 7
    bench.one_left()
    assert bench.went == ["a1", "b1"]

    # One account is left.
    bench.in_hand = 15
    bench.one_left()
    assert bench.went == ["a1", "b1", "a2"]


@pytest.mark.parametrize("others_wait", [True, False])
def test_who_sends_little_does_not_wait_for_those_who_flood(*, others_wait: bool) -> None:
    bench = Bench(mark=16)
    bench.enter("a", 8)
    bench.in_hand = 12
    if others_wait:
        bench.wait("a1", "a2")
    # Each of n accounts may have a half of the mark by n at once, whether or not somebody waits.
    share = 16 // (2 * (3 if others_wait else 2))
    begun = []
    for _ in range(share):
        assert not bench.holds("b")
        begun += bench.enter("b")
    assert bench.holds("b")
    bench.leave([begun.pop()])
    assert not bench.holds("b")
    assert bench.went == []


def test_a_first_message_does_not_wait_for_what_another_account_has_left_behind(bench: Bench) -> None:
    bench.in_hand = 5
    assert not bench.holds("b")


def test_an_account_whose_own_sessions_wait_has_no_other_way(bench: Bench) -> None:
    bench.wait("a1")
    assert bench.holds("a")


def test_an_account_that_is_alone_passes_nobody(bench: Bench) -> None:
    bench.enter("a")
    bench.in_hand = 4
    assert bench.holds("a")


def test_many_accounts_with_little_are_bounded_too() -> None:
    bench = Bench(mark=16)
    bench.in_hand = 16
    bench.wait("a1")
    inside = 0
    for number in range(100):
        if not bench.holds(f"account-{number}"):
            bench.enter(f"account-{number}")
            inside += 1
    assert inside == 16


def test_the_turn_of_one_who_left_goes_to_the_next(bench: Bench) -> None:
    bench.turnstile.set_aside("a", Session(bench, "gone", is_there=False))
    bench.wait("a2")
    bench.one_left()
    assert bench.went == ["a2"]
    assert bench.turnstile.waiting_count == 0


def test_a_loop_with_time_to_spare_keeps_nobody_waiting(bench: Bench) -> None:
    bench.enter()
    bench.in_hand = 4
    bench.wait(*[f"a{number}" for number in range(100)])
    bench.look(busy_share=0.5)
    assert len(bench.went) == AT_ONCE
    for _ in range(IDLE_LOOKS - 1):
        bench.look(busy_share=0.5)
    bench.turn_all()
    assert len(bench.went) == 100
    assert not bench.holds()
    bench.now_s += REST_S
    bench.enter()
    assert bench.holds()


def test_one_idle_moment_does_not_open_it_for_all(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait(*[f"a{number}" for number in range(100)])
    for _ in range(IDLE_LOOKS):
        bench.look(busy_share=0.5)
        bench.look(busy_share=1.0)
    assert len(bench.went) == AT_ONCE * IDLE_LOOKS
    assert bench.holds()


def test_a_busy_loop_keeps_them_waiting(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait("a1")
    for _ in range(10):
        bench.look(busy_share=0.95, seconds=0.02)
    assert bench.went == []


def test_letting_many_go_takes_many_turns_of_the_loop(bench: Bench) -> None:
    bench.wait(*[f"a{number}" for number in range(40)])
    bench.turnstile.open()
    for count in (16, 32, 40):
        bench.turn()
        assert len(bench.went) == count
    assert not bench.soon


def test_transactions_that_have_begun_count_until_they_are_over(bench: Bench) -> None:
    begun = bench.enter(count=3)
    bench.in_hand = 1
    bench.wait("a1")
    bench.leave([begun.pop()])
    assert bench.went == ["a1"]
    begun += bench.enter()
    assert bench.holds()
    bench.leave(begun[1:])
    assert not bench.holds()


def test_a_message_that_goes_from_the_transaction_to_the_hand_is_one(bench: Bench) -> None:
    begun = bench.enter(count=2)
    bench.in_hand = 2
    assert bench.holds()
    bench.in_hand = 3
    bench.leave(begun[:1])
    assert bench.holds()
    bench.in_hand = 2
    assert not bench.holds()


@pytest.mark.parametrize("others_come", [True, False])
def test_a_transaction_that_takes_long_takes_nobodys_place(bench: Bench, *, others_come: bool) -> None:
    slow = bench.enter(count=4)
    assert bench.holds()
    for _ in range(3):
        bench.now_s += PERIOD_S
        if others_come:
            bench.leave(bench.enter())
    assert not bench.holds()
    bench.enter()
    bench.leave(slow)
    bench.in_hand = 3
    assert bench.holds(), "what was forgotten is not taken off again"


def test_slow_transactions_take_nobodys_share() -> None:
    bench = Bench(mark=16)
    for number in range(64):
        bench.enter(f"slow-{number}")
    bench.enter("b", 8)
    bench.now_s += 3 * PERIOD_S
    bench.enter("a", 16)
    bench.wait("a1")
    assert not bench.holds("b")
    bench.enter("b")
    assert not bench.holds("b")


def test_places_that_come_free_without_anybodys_leaving_are_given(bench: Bench) -> None:
    bench.enter(count=4)
    bench.wait("a1", "a2")
    bench.look(busy_share=1.0)
    assert bench.went == []
    bench.look(busy_share=1.0, seconds=2.5 * PERIOD_S)
    assert bench.went == ["a1", "a2"]


def test_nobody_waits_for_long_whatever_is_in_hand(bench: Bench) -> None:
    bench.in_hand = 4
    bench.wait(*[f"a{number}" for number in range(40)])
    bench.look(busy_share=1.0, seconds=LONGEST_S)
    assert bench.went == []
    bench.look(busy_share=1.0)
    bench.turn_all()
    assert len(bench.went) == 40


def test_it_stops_looking_when_nobody_waits(bench: Bench) -> None:
    bench.wait("a1")
    bench.one_left()
    bench.look(busy_share=1.0)
    assert not bench.later
