from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load.latency import Timeline, bucket_of, merge, middle_us, percentiles

_SECOND_NS = 1_000_000_000


@given(st.integers(0, 10**12))
def test_a_bucket_stands_for_its_values_to_two_percent(value_us: int) -> None:
    assert middle_us(bucket_of(value_us)) == pytest.approx(value_us, rel=0.016, abs=0.5)


@given(st.lists(st.integers(0, 10**9), min_size=2))
def test_buckets_keep_the_order_of_values(values_us: list[int]) -> None:
    ordered = sorted(values_us)
    buckets = [bucket_of(value) for value in ordered]
    assert buckets == sorted(buckets)


@given(st.lists(st.integers(0, 10**8), min_size=1, max_size=300))
def test_percentiles_are_the_values_that_so_many_do_not_exceed(values_us: list[int]) -> None:
    timeline = Timeline()
    for value in values_us:
        timeline.record(0, value * 1_000)
    found = percentiles(timeline.total())
    ordered = sorted(values_us)
    assert found.values == len(values_us)
    for share, figure in ((0.50, found.p50), (0.95, found.p95), (0.99, found.p99), (1.0, found.max)):
        exact_ms = ordered[max(math.ceil(len(ordered) * share) - 1, 0)] / 1_000
        assert figure == pytest.approx(exact_ms, rel=0.02, abs=0.002)


def test_no_values_have_no_percentiles() -> None:
    assert percentiles({}) == (0, 0.0, 0.0, 0.0, 0.0)


def test_a_clock_that_went_back_counts_as_no_time() -> None:
    assert bucket_of(-5) == 0


def test_a_timeline_knows_what_ended_in_which_second() -> None:
    timeline = Timeline()
    timeline.record(7 * _SECOND_NS + 5, 10_000)
    timeline.record(8 * _SECOND_NS - 1, 20_000)
    timeline.record(8 * _SECOND_NS, 30_000)
    assert timeline.seconds == {7: {10: 1, 20: 1}, 8: {30: 1}}
    assert timeline.take() == {7: {10: 1, 20: 1}, 8: {30: 1}}
    assert timeline.take() == {}


def test_timelines_of_several_processes_add_up_over_json() -> None:
    whole, first, second = Timeline(), Timeline(), Timeline()
    first.record(_SECOND_NS, 10_000)
    second.record(_SECOND_NS, 10_000)
    second.record(2 * _SECOND_NS, 99_000_000)
    for part in (first, second):
        whole.add(json.loads(json.dumps(part.take())))
    assert whole.total() == merge([{10: 2}, {bucket_of(99_000): 1}])
