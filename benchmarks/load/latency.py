"""Latencies in buckets: cheap to record, small to send, exact to about 1 %, kept for each second.

Contract. A bucket's number stands for a range of microseconds: up to 127 one each, above that 64 to every doubling, so
that a percentile is off by less than 1.6 % whatever its size. `Timeline` keeps one dictionary a second; what it holds
is bounded by its seconds, never by messages. Percentiles are of all values, in milliseconds, 0 where there are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

_EXACT = 128
_BITS = 7
_HALF = 64

Buckets = dict[int, int]


class Percentiles(NamedTuple):
    """Milliseconds, of `values` latencies."""

    values: int
    p50: float
    p95: float
    p99: float
    max: float


def bucket_of(value_us: int) -> int:
    """Return the bucket of a latency; negative ones, of clocks that disagree, count as 0."""
    if value_us < _EXACT:
        return max(value_us, 0)
    shift = value_us.bit_length() - _BITS
    return shift * _HALF + (value_us >> shift)


def middle_us(bucket: int) -> float:
    """Return the middle of a bucket's range in microseconds."""
    if bucket < _EXACT:
        return float(bucket)
    shift = bucket // _HALF - 1
    return ((bucket - shift * _HALF) + 0.5) * (1 << shift) - 0.5


def percentiles(buckets: Mapping[int, int]) -> Percentiles:
    """Return the usual ones: the p-th is the least value that at least p % of all do not exceed."""
    total = sum(buckets.values())
    if not total:
        return Percentiles(0, 0.0, 0.0, 0.0, 0.0)
    ordered = sorted(buckets.items())
    found = [_at(ordered, total, share) for share in (0.50, 0.95, 0.99, 1.0)]
    return Percentiles(total, *(round(middle_us(bucket) / 1_000, 3) for bucket in found))


def _at(ordered: list[tuple[int, int]], total: int, share: float) -> int:
    reached = 0
    for bucket, count in ordered:
        reached += count
        if reached >= total * share:
            return bucket
    return ordered[-1][0]


def merge(many: Iterable[Mapping[int, int]]) -> Buckets:
    """Return the sum of several."""
    merged: Buckets = {}
    for buckets in many:
        for bucket, count in buckets.items():
            merged[bucket] = merged.get(bucket, 0) + count
    return merged


class Timeline:
    """Latencies by second of the machine's monotonic clock, in the order of time."""

    def __init__(self) -> None:
        self.seconds: dict[int, Buckets] = {}
        self._second = -1
        self._current: Buckets = {}

    def record(self, now_ns: int, value_ns: int) -> None:
        """Note a latency that ended at `now_ns`."""
        second = now_ns // 1_000_000_000
        if second != self._second:
            self._second = second
            self._current = self.seconds.setdefault(second, {})
        bucket = bucket_of(value_ns // 1_000)
        self._current[bucket] = self._current.get(bucket, 0) + 1

    def take(self) -> dict[int, Buckets]:
        """Return what was recorded since the last call, and forget it."""
        taken, self.seconds, self._second, self._current = self.seconds, {}, -1, {}
        return taken

    def add(self, seconds: Mapping[str, Mapping[str, int]]) -> None:
        """Add what another process took; keys are texts, as JSON has them."""
        for second, buckets in seconds.items():
            mine = self.seconds.setdefault(int(second), {})
            for bucket, count in buckets.items():
                mine[int(bucket)] = mine.get(int(bucket), 0) + count

    def total(self) -> Buckets:
        """Return all seconds as one."""
        return merge(self.seconds.values())
