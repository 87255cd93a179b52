"""Who yields where accepting and delivering share a loop: with enough messages in hand, the next MAIL waits.

A sender in a closed loop is served faster than its mail leaves, for to accept is less work than to deliver. Without a
brake the surplus goes to the disk and is read back, is recorded twice, and costs half as much again. So from `mark`
messages in hand (on their way in, or accepted and on their way out in memory) a session that says MAIL is set aside,
and each one that leaves the hand lets one go on: accounts in turn, so that no account's sessions wait behind all of
another's. An account of which nothing waits and less than its share is inside goes on at once, up to twice the mark in
all: who sends little does not wait for those who send as fast as they can. While several accounts wait the mark is half
as high: more in hand would serve none of them faster, and make the loop's turns longer for who sends little. A
transaction counts for PERIOD_S to twice that: a client that is slow takes nobody's place.

That is right only while the loop itself is what is short. A timer looks whether it is: when the loop was idle for a
part of the time, a few go on; when that is so IDLE_LOOKS times in a row, it is the next hops that are slow. Then all go
on, mail that delivery cannot take goes to the disk, and for a while no MAIL waits.

    state    a MAIL                         what comes next
    open     goes on below the mark,        waiting, with the first that is set aside
             else it is set aside
    waiting  is set aside                   open: the last one went on; resting: the loop is not short
    resting  goes on                        open, after REST_S

Nobody waits longer than about LONGEST_S, whatever becomes of the messages in hand. Who is let go on goes on in the
loop's next turn, AT_ONCE in each: never within the call that made room, which may be the end of a delivery or of
another session's transaction.
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
AT_ONCE = 16

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
        self._owed = 0  # how many may go on
        self._will_pay = False
        self._rest_ends_s = 0.0
        self._looked = (0.0, 0.0)  # clock and busy time at the last look
        self._will_look = False
        self._idle_looks = 0  # in a row
        # Sessions between their MAIL and the answer to their dot, by when they came in: this period, the one before.
        self._inside: dict[str, list[int]] = {}
        self._inside_count = [0, 0]
        self._period = 1
        self._period_ends_s = 0.0
        self.waiting_count = 0
        self.waited_count = 0

    def holds(self, account: str) -> bool:
        """Whether a MAIL of this account must be set aside now."""
        self._turn_period()
        held = self._held()
        if not self.waiting_count and held < self._mark:
            return False
        if self._clock() < self._rest_ends_s:
            return False
        if account in self._waiting or held >= 2 * self._mark:
            return True
        inside = sum(self._inside.get(account, ()))
        if inside == 0:
            return False
        if not self.waiting_count and len(self._inside) == 1:
            # Alone, it is itself what it would pass.
            return True
        return inside >= self._mark // (2 * (len(self._inside) + len(self._waiting)))

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
        self._inside.setdefault(account, [0, 0])[0] += 1
        self._inside_count[0] += 1
        return account, self._period

    def left(self, begun: Pass) -> None:
        """A transaction is over; its message, if there is one, is in hand by now."""
        account, period = begun
        age = self._period - period
        if age < len(self._inside_count):
            inside = self._inside[account]
            inside[age] -= 1
            self._inside_count[age] -= 1
            if not any(inside):
                del self._inside[account]
            self.one_left()

    def one_left(self) -> None:
        """A message is in hand no more: somebody may go on in its place."""
        if self.waiting_count and self._held() < self._room():
            self._let_go(1)

    def open(self) -> None:
        """Let everybody go on, a few in each turn of the loop, and nobody wait for a while."""
        self._rest_ends_s = self._clock() + REST_S
        self._let_go(self.waiting_count)

    def _room(self) -> int:
        """How many messages may be in hand while somebody waits."""
        return self._mark if len(self._waiting) == 1 else self._mark // 2

    def _held(self) -> int:
        return self._in_hand() + sum(self._inside_count)

    def _turn_period(self) -> None:
        now_s = self._clock()
        if now_s < self._period_ends_s:
            return
        is_next = now_s < self._period_ends_s + PERIOD_S
        self._inside = {account: [0, now] for account, (now, _) in self._inside.items() if now} if is_next else {}
        self._inside_count = [0, self._inside_count[0] if is_next else 0]
        self._period += 1 if is_next else 2
        self._period_ends_s = now_s + PERIOD_S

    def _let_go(self, count: int) -> None:
        self._owed += count
        if not self._will_pay:
            self._will_pay = True
            self._timers.call_soon(self._pay)

    def _pay(self) -> None:
        """Accounts in turn; who left in the meantime gives his turn away."""
        self._will_pay = False
        for _ in range(AT_ONCE):
            if not self._owed or not self._waiting:
                break
            if self._take_next().go_on():
                self._owed -= 1
        self._owed = min(self._owed, self.waiting_count)
        if self._owed:
            self._let_go(0)

    def _take_next(self) -> Waiting:
        account = next(iter(self._waiting))
        sessions = self._waiting.pop(account)
        session = sessions.popleft()[1]
        self.waiting_count -= 1
        if sessions:
            self._waiting[account] = sessions
        return session

    def _look_later(self) -> None:
        self._will_look = True
        self._looked = (self._clock(), self._busy())
        self._timers.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._will_look = False
        if not self.waiting_count:
            return
        self._turn_period()
        began_s, busy_s = self._looked
        now_s = self._clock()
        is_idle = self._busy() - busy_s < BUSY_SHARE * (now_s - began_s)
        self._idle_looks = self._idle_looks + 1 if is_idle else 0
        if self._idle_looks == IDLE_LOOKS:
            self._idle_looks = 0
            self.open()
        elif self._oldest_s() < now_s - LONGEST_S:
            self._let_go(self.waiting_count)
        else:
            # Places come free without anybody's leaving as well: slow clients are forgotten.
            free = AT_ONCE if is_idle else min(AT_ONCE, self._room() - self._held() - self._owed)
            self._let_go(max(0, free))
        self._look_later()

    def _oldest_s(self) -> float:
        return min(sessions[0][0] for sessions in self._waiting.values())
