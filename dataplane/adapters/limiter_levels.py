"""What a worker remembers of long buckets, so that one that Redis lost is not found full.

Contract. A bucket that takes minutes to fill is worth remembering: after FLUSHALL, a restart or a failover its key is
missing, which otherwise means full. Each worker looks once a second at the level of the long buckets that it has drawn
from since. When the epoch of a lot changes (see `core/limiter_functions.lua`) what is remembered of that lot becomes
its seeds: each an upper bound of the true level, aged by the bucket's rate. Those asked for now go out before the wish,
the others with the calls that follow, and the lowest that any worker knows holds. What nobody remembers is full: a
bucket that was never drawn from, or only in the last second.

What a worker before this one remembered (`recalled`, by lot) becomes seeds when the epoch of its lot is first heard of:
all workers may have ended together with Redis.

Bounded: `max_keys` buckets, those learnt longest ago are forgotten first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dataplane.adapters.limiter_wire import Known


class Level(NamedTuple):
    """What a bucket held when it was last looked at, in micro-tokens, and when that was."""

    known: Known
    level: int
    seen_s: float


Recalled = dict[str, dict[str, Level]]
"""Levels by lot and name."""


class Levels:
    """See the module. `clock` is monotonic, in seconds; levels are micro-tokens. Use empties `recalled`."""

    def __init__(self, clock: Callable[[], float], recalled: Recalled | None = None, *, max_keys: int = 10_000) -> None:
        self._clock = clock
        self._recalled = {} if recalled is None else recalled
        self._max_keys = max_keys
        self._levels: Recalled = {}
        self._count = 0
        self._seeds: Recalled = {}
        self._epochs: dict[str, int] = {}
        self._touched: dict[str, dict[str, Known]] = {}

    def __len__(self) -> int:
        return self._count

    def epoch(self, lot: str) -> int:
        """Return the epoch of a lot as it was last heard of; 0 for none."""
        return self._epochs.get(lot, 0)

    def changed(self, lot: str, epoch: int) -> bool:
        """The lot has another epoch. Returns whether one was lost, and not only never heard of."""
        lost = self._epochs.pop(lot, 0) != 0
        self._epochs[lot] = epoch
        if len(self._epochs) > self._max_keys:
            del self._epochs[next(iter(self._epochs))]
        if recalled := self._recalled.pop(lot, None):
            kept = self._levels.get(lot, {})
            self._levels[lot] = {**recalled, **kept}
            self._count += len(self._levels[lot]) - len(kept)
        if lot in self._levels:
            self._seeds[lot] = dict(self._levels[lot])
        return lost

    @property
    def remembered(self) -> Recalled:
        """What is known now; not for keeps."""
        return self._levels

    # --- looking

    def touch(self, lot: str, buckets: dict[str, Known]) -> None:
        """Note that these buckets, by name, are drawn from."""
        noted = self._touched.get(lot)
        if noted is None:
            self._touched[lot] = buckets
        else:
            noted.update(buckets)

    @property
    def anything_touched(self) -> bool:
        """Whether there is something to look at."""
        return bool(self._touched)

    def take_touched(self, max_lots: int) -> dict[str, dict[str, Known]]:
        """Return what to look at now, by lot."""
        lots = list(self._touched)[:max_lots]
        return {lot: self._touched.pop(lot) for lot in lots}

    def learn(self, lot: str, buckets: Sequence[Known], levels: Sequence[int]) -> None:
        """These were the levels just now. ValueError unless there are as many."""
        now_s = self._clock()
        owed = self._seeds.get(lot, {})
        kept = self._levels.pop(lot, {})
        self._count -= len(kept)
        for known, level in zip(buckets, levels, strict=True):
            if known.name not in owed:
                kept.pop(known.name, None)
                kept[known.name] = Level(known, level, now_s)
        if kept:
            self._levels[lot] = kept
            self._count += len(kept)
        while self._count > self._max_keys:
            self._forget_one()

    def _forget_one(self) -> None:
        lot = next(iter(self._levels))
        kept = self._levels[lot]
        del kept[next(iter(kept))]
        self._count -= 1
        if not kept:
            del self._levels[lot]

    # --- seeding

    @property
    def lots_to_seed(self) -> list[str]:
        """Lots of which seeds have not left yet."""
        return list(self._seeds)

    def take_seeds(self, lot: str, first: Sequence[str], most: int) -> list[tuple[Known, int]]:
        """Return seeds of a lot and forget that they are owed: those named `first`, then others up to `most`."""
        owed = self._seeds.get(lot)
        if owed is None:
            return []
        chosen = [owed.pop(name) for name in first if name in owed]
        while owed and len(chosen) < most:
            chosen.append(owed.pop(next(iter(owed))))
        if not owed:
            del self._seeds[lot]
        now_s = self._clock()
        return [(level.known, aged(level, now_s)) for level in chosen]

    def owe_again(self, lot: str, names: Sequence[str]) -> None:
        """These seeds did not arrive."""
        kept = self._levels.get(lot, {})
        found = {name: kept[name] for name in names if name in kept}
        if found:
            self._seeds[lot] = {**found, **self._seeds.get(lot, {})}


def aged(level: Level, now_s: float) -> int:
    """What it holds now at the most."""
    known = level.known
    return min(known.capacity, level.level + int(max(0.0, now_s - level.seen_s) * known.rate_per_s))
