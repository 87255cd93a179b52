"""What the workers of a node counted, so that a sum over them never goes back when one of them ends.

Contract. Each worker tells its totals since its start. `began` says which process a worker is now: what its former
process counted is kept for good. `told` takes a worker's samples, `lost` says that it is not connected: its counters
stay, what it measured (gauges) goes. `samples` is all of it, to be merged. What a process counted after it was last
asked is lost with it; what an agent kept is lost with the agent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dataplane.link import Sample
from dataplane.telemetry import SampleRow, SampleValue, is_cumulative, merge_values


class WorkerTotals:
    """State: the last samples of each worker, and the sums of those that are no more."""

    def __init__(self) -> None:
        self._processes: dict[int, int] = {}
        self._last: dict[int, tuple[Sample, ...]] = {}
        self._ended: dict[tuple[str, tuple[str, ...]], SampleValue] = {}

    def began(self, worker: int, pid: int) -> None:
        """The worker is this process from now on."""
        if self._processes.get(worker) != pid:
            self._processes[worker] = pid
            for name, labels, value in self._last.pop(worker, ()):
                if is_cumulative(name):
                    kept = self._ended.get((name, labels))
                    self._ended[name, labels] = value if kept is None else merge_values(name, kept, value)

    def told(self, worker: int, samples: Iterable[Sample]) -> None:
        """The worker says what it counted and measured."""
        self._last[worker] = tuple(samples)

    def lost(self, worker: int) -> None:
        """The worker is not connected; whether its process ended will show."""
        self._last[worker] = tuple(sample for sample in self._last.get(worker, ()) if is_cumulative(sample.metric))

    def samples(self) -> Iterator[SampleRow]:
        """Everything, several rows to a metric."""
        for (name, labels), value in self._ended.items():
            yield name, labels, value
        for told in self._last.values():
            yield from told
