"""A sum over workers never goes back: counters of processes that ended are kept, and what they measured is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataplane.agent.totals import WorkerTotals
from dataplane.histogram import LATENCY_BOUNDS_S, Histogram
from dataplane.link import Sample
from dataplane.telemetry import SampleValue, merge_values

COUNTER = "smtp_message_enqueued_total"
GAUGE = "smtp_active_sessions"
HISTOGRAM = "smtp_enqueue_duration_seconds"


def total(totals: WorkerTotals, name: str) -> SampleValue | None:
    merged: SampleValue | None = None
    for found, _, value in totals.samples():
        if found == name:
            merged = value if merged is None else merge_values(name, merged, value)
    return merged


def counted(number: float) -> list[Sample]:
    return [Sample(COUNTER, (), number), Sample(GAUGE, (), number)]


def test_what_an_ended_process_counted_stays_and_what_it_measured_goes() -> None:
    totals = WorkerTotals()
    totals.began(0, 100)
    totals.told(0, counted(7))
    totals.lost(0)
    assert (total(totals, COUNTER), total(totals, GAUGE)) == (7, None)
    totals.began(0, 101)
    assert total(totals, COUNTER) == 7
    totals.told(0, counted(2))
    assert (total(totals, COUNTER), total(totals, GAUGE)) == (9, 2)


def test_a_worker_that_only_lost_its_connection_is_not_counted_twice() -> None:
    totals = WorkerTotals()
    totals.began(0, 100)
    totals.told(0, counted(7))
    totals.lost(0)
    totals.began(0, 100)
    totals.told(0, counted(8))
    assert total(totals, COUNTER) == 8


def test_histograms_are_kept_bucket_by_bucket() -> None:
    histogram = Histogram(LATENCY_BOUNDS_S)
    histogram.observe(0.003)
    totals = WorkerTotals()
    for pid in (100, 101, 102):
        totals.began(0, pid)
        totals.told(0, [Sample(HISTOGRAM, (), histogram.row)])
    assert total(totals, HISTOGRAM) == tuple(3 * number for number in histogram.row)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.one_of(st.just("end"), st.just("lose"), st.integers(0, 5))), max_size=40)
)
def test_the_sum_never_goes_back_whatever_ends_and_comes_again(steps: list[tuple[int, str | int]]) -> None:
    totals, pids, counts, before = WorkerTotals(), [10, 20, 30], [0, 0, 0], 0.0
    for worker, pid in enumerate(pids):
        totals.began(worker, pid)
    for worker, step in steps:
        if step == "end":
            totals.lost(worker)
            pids[worker] += 1
            counts[worker] = 0
            totals.began(worker, pids[worker])
        elif isinstance(step, int):
            counts[worker] += step
            totals.told(worker, counted(counts[worker]))
        else:
            totals.lost(worker)
        now = total(totals, COUNTER) or 0.0
        assert isinstance(now, float | int)
        assert now >= before
        before = now
    assert before == sum(step for _, step in steps if isinstance(step, int))
