"""Who yields where accepting and delivering share a loop: with enough messages in hand, the next MAIL waits.

A sender in a closed loop is served faster than its mail leaves, for to accept is less work than to deliver. Without a
brake the surplus goes to the disk and is read back, is recorded twice, and costs half as much again. So from `mark`
messages in hand (on their way in, or accepted and on their way out in memory) a session that says MAIL is set aside,
and each one that leaves the hand lets one go on: accounts in turn, so that no account's sessions wait behind all of
another's. An account that has less than its share inside, while only others' sessions wait, goes on at once: who sends
little does not wait for those who send as fast as they can. A transaction counts for PERIOD_S to twice that: a client
that is slow takes nobody's place.

That is right only while the loop itself is what is short. A timer looks whether it is: when the loop was idle for a
part of the time, a few go on; when that is so IDLE_LOOKS times in a row, it is the next hops that are slow. Then all go
on, mail that delivery cannot take goes to the disk, and for a while no MAIL waits.

    state    a MAIL                         what comes next
    open     goes on below the mark,        waiting, with the first that is set aside
             else it is set aside
    waiting  is set aside                   open: the last one went on; resting: the loop is not short
    resting  goes on                        open, after REST_S

Nobody waits longer than about LONGEST_S, whatever becomes of the messages in hand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

MARK = 128
PERIOD_S = 1.0
LOOK_S = 0.005
BUSY_SHARE = 0.7
IDLE_LOOKS = 4
REST_S = 1.0
LONGEST_S = 5.0
_AT_ONCE = 16

# The account of a transaction that has begun, and the period in which it did.
Pass = tuple[str, int]


class Waiting(Protocol):
    """A session that was set aside."""

    def go_on(self) -> bool:
        """Go on, or say that there is nobody any more."""
        ...


class Timers(Protocol):
    """What is used of the event loop."""

    def call_soon(self, callback: Callable[[], None], /) -> object:
        """In the next turn."""
        ...

    def call_later(self, delay: float, callback: Callable[[], None], /) -> object:
        """After so many seconds."""
        ...


class Turnstile:
    """State of one worker.

    `in_hand` counts messages on their way in memory; `clock` is monotonic, and `busy` the time that the loop's thread
    has worked or waited for a processor, both in seconds.
    """

    def __init__(
        self,
        in_hand: Callable[[], int],
        clock: Callable[[], float],
        busy: Callable[[], float],
        timers: Timers,
        mark: int = MARK,
    ) -> None:
        self._in_hand = in_hand
        self._clock = clock
        self._busy = busy
        self._timers = timers
        self._mark = mark
        self._waiting: dict[str, deque[tuple[float, Waiting]]] = {}
        self._rest_ends_s = 0.0
        self._looked = (0.0, 0.0)  # clock and busy time at the last look
        self._will_look = False
        self._idle_looks = 0  # in a row
        # Sessions between their MAIL and the answer to their dot, by when they came in: this period, the one before.
        self._inside = [0, 0]
        self._inside_by_account: dict[str, int] = {}
        self._period = 1
        self._period_ends_s = 0.0
        self.waiting_count = 0
        self.waited_count = 0

    def holds(self, account: str) -> bool:
        """Whether a MAIL of this account must be set aside now."""
        self._turn_period()
        if self.waiting_count:
            if account not in self._waiting and self._inside_by_account.get(account, 0) < self._share():
                return False
        elif self._held() < self._mark:
            return False
        return self._clock() >= self._rest_ends_s

    def _share(self) -> int:
        """How many transactions of an account go on at once, so that those of all are half the mark at the most."""
        return self._mark // (2 * (len(self._inside_by_account) + len(self._waiting)))

    def set_aside(self, account: str, session: Waiting) -> None:
        """Let this session wait for its turn."""
        self._waiting.setdefault(account, deque()).append((self._clock(), session))
        self.waiting_count += 1
        self.waited_count += 1
        if not self._will_look:
            self._look_later()

    def entered(self, account: str) -> Pass:
        """A transaction has begun; returns what `left` wants to have of it."""
        self._turn_period()
        self._inside[0] += 1
        self._inside_by_account[account] = self._inside_by_account.get(account, 0) + 1
        return account, self._period

    def _turn_period(self) -> None:
        now_s = self._clock()
        if now_s >= self._period_ends_s:
            is_next = now_s < self._period_ends_s + PERIOD_S
            self._inside = [0, self._inside[0] if is_next else 0]
            self._period += 1 if is_next else 2
            self._period_ends_s = now_s + PERIOD_S

    def left(self, begun: Pass) -> None:
        """A transaction is over; its message, if there is one, is in hand by now."""
        account, period = begun
        remaining = self._inside_by_account[account] - 1
        if remaining:
            self._inside_by_account[account] = remaining
        else:
            del self._inside_by_account[account]
        age = self._period - period
        if age < len(self._inside):
            self._inside[age] -= 1
            self.one_left()

    def one_left(self) -> None:
        """A message is in hand no more: somebody may go on in its place."""
        if self.waiting_count and self._held() < self._mark:
            self._let_go(1)

    def _held(self) -> int:
        return self._in_hand() + sum(self._inside)

    def open(self) -> None:
        """Let everybody go on, a few in each turn of the loop, and nobody wait for a while."""
        self._rest_ends_s = self._clock() + REST_S
        self._empty()

    def _empty(self) -> None:
        self._let_go(_AT_ONCE)
        if self.waiting_count:
            self._timers.call_soon(self._empty)

    def _let_go(self, count: int) -> None:
        """Accounts in turn; who left in the meantime gives his turn away."""
        while count and self._waiting:
            account = next(iter(self._waiting))
            sessions = self._waiting.pop(account)
            session = sessions.popleft()[1]
            self.waiting_count -= 1
            if sessions:
                self._waiting[account] = sessions
            if session.go_on():
                count -= 1

    def _look_later(self) -> None:
        self._will_look = True
        self._looked = (self._clock(), self._busy())
        self._timers.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._will_look = False
        if not self.waiting_count:
            return
        began_s, busy_s = self._looked
        now_s = self._clock()
        is_idle = self._busy() - busy_s < BUSY_SHARE * (now_s - began_s)
        self._idle_looks = self._idle_looks + 1 if is_idle else 0
        if self._idle_looks == IDLE_LOOKS:
            self._idle_looks = 0
            self.open()
            return
        if is_idle or self._oldest_s() < now_s - LONGEST_S:
            self._let_go(_AT_ONCE)
        if self.waiting_count:
            self._look_later()

    def _oldest_s(self) -> float:
        return min(sessions[0][0] for sessions in self._waiting.values())
