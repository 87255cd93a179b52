"""One timer wheel for all sessions of a loop: a deadline costs an assignment, not a handle of the loop.

Contract. Each `Timed` has its deadline in seconds of the monotonic clock; `arm` moves it, `disarm` takes it away. Once
the clock has passed it, `expire(now)` is called once, at most a tick late, and may arm anew. A deadline that moves
further away costs nothing: its owner is looked at in its old slot and put where it now belongs. `advance` does the
work and is all that a test needs; `start` lets the loop call it every tick until `stop`.

    slot of an owner      deadline           what advance does
    passed                passed             expire
    passed                later              into the slot of the deadline
    passed                none               drop
    in a later slot, while armed earlier     the owner stands in both; the later one is stale and dropped
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

NEVER = math.inf


class Timed:
    """Something with a deadline; subclasses say what happens when it has passed."""

    __slots__ = ("deadline", "slot")

    def __init__(self) -> None:
        self.deadline = NEVER
        self.slot = -1

    def expire(self, now: float) -> None:
        """The deadline has passed."""
        raise NotImplementedError


class TimerWheel:
    """Deadlines of one loop; `monotonic` is the clock."""

    __slots__ = ("_handle", "_monotonic", "_next_slot", "_slots", "_tick_s")

    def __init__(self, monotonic: Callable[[], float], tick_s: float = 0.5) -> None:
        self._monotonic = monotonic
        self._tick_s = tick_s
        self._slots: dict[int, list[Timed]] = {}
        self._next_slot = self._slot_of(monotonic())
        self._handle: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return sum(len(owners) for owners in self._slots.values())

    def now(self) -> float:
        """Seconds of the clock."""
        return self._monotonic()

    def arm(self, owner: Timed, seconds: float) -> None:
        """Let the owner expire in `seconds`, whatever it was armed for before."""
        deadline = self._monotonic() + seconds
        owner.deadline = deadline
        slot = int(deadline / self._tick_s) + 1
        if owner.slot < 0 or slot < owner.slot:
            self._put(owner, slot)

    @staticmethod
    def disarm(owner: Timed) -> None:
        """Take the deadline away; the owner is forgotten when its slot comes."""
        owner.deadline = NEVER

    def advance(self) -> None:
        """Expire what is due by the clock."""
        now = self._monotonic()
        last = self._slot_of(now)
        if last - self._next_slot > len(self._slots):
            # The clock leapt (the machine slept): go through the slots that exist, not through all that passed.
            passed = sorted(slot for slot in self._slots if slot <= last)
        else:
            passed = list(range(self._next_slot, last + 1))
        self._next_slot = max(self._next_slot, last + 1)
        for slot in passed:
            for owner in self._slots.pop(slot, ()):
                if owner.slot == slot:
                    owner.slot = -1
                    self._look_at(owner, now)

    def start(self) -> None:
        """Advance every tick by the running loop."""
        self._handle = asyncio.get_running_loop().call_later(self._tick_s, self._turn)

    def stop(self) -> None:
        """Advance no more; deadlines stay as they are."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _turn(self) -> None:
        self.start()
        self.advance()

    def _look_at(self, owner: Timed, now: float) -> None:
        if owner.deadline <= now:
            owner.deadline = NEVER
            owner.expire(now)
        elif owner.deadline is not NEVER:
            self._put(owner, self._slot_of(owner.deadline) + 1)

    def _put(self, owner: Timed, slot: int) -> None:
        slot = max(slot, self._next_slot)
        owner.slot = slot
        self._slots.setdefault(slot, []).append(owner)

    def _slot_of(self, time_s: float) -> int:
        return int(time_s / self._tick_s)
