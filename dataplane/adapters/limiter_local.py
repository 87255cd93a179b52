"""Limits in memory: what one worker decides alone while the shared ones cannot be asked.

Contract. A `Limiter` of `dataplane.ports`, and `take_now` and `hold_now` for those who cannot wait. Each bucket has its
share of the limit: capacity and rate divided by `share()` (nodes times workers), but room for one token at least, so
that small limits still let one through at a time; of slots, too, one at least. A bucket grants when it holds the cost
or is full, and goes into debt by what it does not hold, at most MAX_TOKENS. A capacity of 0 is no limit. A clock that
goes back counts as no time. Nothing raises.

Memory is bounded: with `max_keys` buckets the one that was touched longest ago is forgotten, which lets at most one
share of its capacity pass once more, and forgives its debt; the same for keys of slots.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dataplane.core.limits import LONGEST_WAIT_S, MAX_TOKENS
from dataplane.ports import Grant, Slot, Take

MICRO = 1_000_000
DAY_S = 86_400.0
_DEEPEST = -MAX_TOKENS * MICRO
_HOLD_AGAIN_S = 1.0
_GRANTED = Grant(allowed=True, wait_s=0.0, refused_key="", local=True)


class MicroTake(NamedTuple):
    """A Take in micro-tokens, the unit of both kinds of buckets; a rate may be less than one of them a second."""

    capacity: int
    rate_per_s: float
    cost: int


def micro_take(take: Take, share: int = 1) -> MicroTake:
    """Return the wish in micro-tokens, against one of `share` parts of the bucket."""
    whole = min(max(take.capacity, 0), MAX_TOKENS) * MICRO
    capacity = max(whole // share, min(whole, MICRO))
    rate = min(max(take.rate_per_s, 0.0), MAX_TOKENS) * MICRO / share
    return MicroTake(capacity, rate, min(max(take.cost, 0), MAX_TOKENS) * MICRO)


class LocalLimiter:
    """See the module. `clock` is monotonic, in seconds."""

    def __init__(
        self, clock: Callable[[], float], share: Callable[[], int] = lambda: 1, *, max_keys: int = 100_000
    ) -> None:
        self._clock = clock
        self._share = share
        self._max_keys = max_keys
        # Level in micro-tokens and the microsecond when it was so; touched longest ago first.
        self._buckets: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._slots: OrderedDict[str, dict[str, float]] = OrderedDict()  # holder and when its time is over

    def __len__(self) -> int:
        return len(self._buckets)

    def ask(self, takes: Sequence[Take]) -> asyncio.Future[Grant]:
        """Take all or none; the answer is there."""
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        answer.set_result(self.take_now(takes))
        return answer

    async def take(self, takes: Sequence[Take]) -> Grant:
        """Take all or none."""
        return self.take_now(takes)

    async def hold(self, slots: Sequence[Slot]) -> Grant:
        """Hold all or none."""
        return self.hold_now(slots)

    def take_now(self, takes: Sequence[Take]) -> Grant:
        """Take all or none."""
        now_us = int(self._clock() * MICRO)
        share = max(1, self._share())
        levels: dict[str, int] = {}
        wait_s, refused_key = 0.0, ""
        for take in takes:
            wish = micro_take(take, share)
            if not wish.capacity:
                continue
            key = take.tag + take.key
            level = levels[key] if key in levels else self._level(key, wish, now_us)
            levels[key] = level - wish.cost
            missing = min(wish.cost, wish.capacity) - level
            if missing > 0:
                needs_s = min(LONGEST_WAIT_S, missing / wish.rate_per_s) if wish.rate_per_s else DAY_S
                if needs_s > wait_s:
                    wait_s, refused_key = needs_s, take.key
        if refused_key:
            return Grant(allowed=False, wait_s=wait_s, refused_key=refused_key, local=True)
        for key, level in levels.items():
            self._buckets[key] = (level, now_us)
            self._buckets.move_to_end(key)
        while len(self._buckets) > self._max_keys:
            self._buckets.popitem(last=False)
        return _GRANTED

    def _level(self, key: str, wish: MicroTake, now_us: int) -> int:
        bucket = self._buckets.get(key)
        if bucket is None:
            return wish.capacity
        level, since_us = bucket
        elapsed_us = max(0, now_us - since_us)
        return min(wish.capacity, level + int(elapsed_us * wish.rate_per_s / MICRO))

    def refund(self, takes: Sequence[Take]) -> None:
        """Give back, never above the capacity; a negative cost takes more, and goes into debt."""
        now_us = int(self._clock() * MICRO)
        share = max(1, self._share())
        for take in takes:
            key = take.tag + take.key
            wish = micro_take(take, share)
            if wish.capacity and (key in self._buckets or take.cost < 0):
                level = self._level(key, wish, now_us) + take.cost * MICRO
                self._buckets[key] = (max(_DEEPEST, min(wish.capacity, level)), now_us)

    def hold_now(self, slots: Sequence[Slot]) -> Grant:
        """Hold all or none."""
        now_s = self._clock()
        share = max(1, self._share())
        wanted: dict[str, int] = {}
        for slot in slots:
            key = slot.tag + slot.key
            held = self._held(key, now_s)
            if slot.holder in held:
                continue
            wanted[key] = wanted.get(key, 0) + 1
            if len(held) + wanted[key] > max(1, slot.capacity // share):
                wait_s = min(_HOLD_AGAIN_S, min(held.values(), default=now_s) - now_s)
                return Grant(allowed=False, wait_s=max(wait_s, 1 / MICRO), refused_key=slot.key, local=True)
        for slot in slots:
            key = slot.tag + slot.key
            self._slots.setdefault(key, {})[slot.holder] = now_s + slot.ttl_s
            self._slots.move_to_end(key)
        while len(self._slots) > self._max_keys:
            self._slots.popitem(last=False)
        return _GRANTED

    def release(self, slots: Sequence[Slot]) -> None:
        """Give slots back."""
        for slot in slots:
            key = slot.tag + slot.key
            held = self._slots.get(key)
            if held is not None:
                held.pop(slot.holder, None)
                if not held:
                    del self._slots[key]

    def _held(self, key: str, now_s: float) -> dict[str, float]:
        """Return who holds slots of this key; those whose time is over are gone."""
        held = self._slots.get(key, {})
        for holder in [holder for holder, end_s in held.items() if end_s <= now_s]:
            del held[holder]
        return held

    async def close(self) -> None:
        """Forget everything."""
        self._buckets.clear()
        self._slots.clear()
