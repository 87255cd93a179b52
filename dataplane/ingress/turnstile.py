"""Who yields where accepting and delivering share a loop: with enough messages in hand, the next MAIL waits.

A sender in a closed loop is served faster than its mail leaves, for to accept is less work than to deliver. Without a
brake the surplus goes to the disk and is read back, is recorded twice, and costs half as much again. So from `mark`
messages in hand (accepted, and on their way in memory) a session that says MAIL is set aside, and each message that
leaves the hand lets one go on: accounts in turn, so that no account's sessions wait behind all of another's.

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

MARK = 256
LOOK_S = 0.005
BUSY_SHARE = 0.7
IDLE_LOOKS = 4
REST_S = 1.0
LONGEST_S = 5.0
_AT_ONCE = 16


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
        self.waiting_count = 0
        self.waited_count = 0

    def holds(self) -> bool:
        """Whether a MAIL must be set aside now."""
        if self._in_hand() < self._mark and not self.waiting_count:
            return False
        return self._clock() >= self._rest_ends_s

    def set_aside(self, account: str, session: Waiting) -> None:
        """Let this session wait for its turn."""
        self._waiting.setdefault(account, deque()).append((self._clock(), session))
        self.waiting_count += 1
        self.waited_count += 1
        if not self._will_look:
            self._look_later()

    def one_left(self) -> None:
        """A message is in hand no more: somebody may go on in its place."""
        if self.waiting_count and self._in_hand() < self._mark:
            self._let_go(1)

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
        # Places get lost: with transactions that end without a message, and messages that wait on the disk.
        if is_idle or self._in_hand() < self._mark // 2 or self._oldest_s() < now_s - LONGEST_S:
            self._let_go(_AT_ONCE)
        if self.waiting_count:
            self._look_later()

    def _oldest_s(self) -> float:
        return min(sessions[0][0] for sessions in self._waiting.values())
