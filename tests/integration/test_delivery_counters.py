"""What delivery counts of attempts and of a recipient's time in the queue, and where something may be sent twice."""

from __future__ import annotations

from dataplane.histogram import Histogram
from support.delivery import A, delivery_bench
from support.next_hop import Behaviour, next_hop


def count(histogram: Histogram) -> int:
    return int(sum(histogram.row[:-1]))


async def test_a_recipients_time_is_counted_once_when_it_ended_and_from_its_acceptance() -> None:
    answers = [b"451 4.3.0 later\r\n", b"250 ok\r\n"]
    async with next_hop(Behaviour(mail=lambda _: answers[0])) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit("b@example.net", "c@example.net")
        await bench.events_come(1)
        lifetime = bench.engine.counters.lifetime_seconds
        assert count(lifetime) == 0, "deferred is no end"
        del answers[0]
        await bench.retry(200.0)
        await bench.events_come(2)
        assert count(lifetime) == 2
        assert lifetime.row[-1] == 400.0
        assert lifetime.row[12] == 2  # above one minute, up to five


async def test_stages_are_counted_for_each_attempt_that_had_them() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        bench.config.route_to(A)
        for number in range(3):
            await bench.submit()
            await bench.events_come(number + 1)
        counters = bench.engine.counters
        assert (count(counters.waiting_seconds), count(counters.transferring_seconds)) == (3, 3)
        assert count(counters.connecting_seconds) <= 1, "one connection was opened"


async def test_an_attempt_without_a_connection_transfers_nothing() -> None:
    async with delivery_bench() as bench:
        bench.config.add_provider(A, 1)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        counters = bench.engine.counters
        assert (count(counters.waiting_seconds), count(counters.transferring_seconds)) == (1, 0)


async def test_a_cut_after_the_dot_makes_a_window_and_one_before_it_makes_none() -> None:
    behaviour = Behaviour(final=lambda _: None)
    async with next_hop(behaviour) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        windows = [row for row in bench.engine.counters.samples() if row[0] == "duplicate_windows_total"]
        assert windows == [("duplicate_windows_total", ("W2",), 1)]
        behaviour.data = None
        await bench.retry()
        await bench.events_come(2)
        assert bench.types() == ["UNCERTAIN", "INTERRUPTED"]
        windows = [row for row in bench.engine.counters.samples() if row[0] == "duplicate_windows_total"]
        assert windows == [("duplicate_windows_total", ("W2",), 1)]
