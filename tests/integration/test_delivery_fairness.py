"""Accounts beside each other on the way to a provider: in memory, from disk, and when one of them floods."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.config import Account, Rule, Target
from dataplane.core.envelope import Envelope, RecipientRow, make_queue_key, message_bytes
from dataplane.core.policy import compile_account
from dataplane.core.queue import State
from dataplane.delivery.engine import HANDED_OVER_LIMIT, DeliveryEngine
from support.delivery import ACCOUNT_UID, CONTENT, A, B, Bench, delivery_bench
from support.next_hop import STALL, Behaviour, NextHop, next_hop

FLOOD, SMALL = "accounts/flood", "accounts/small"
HELD_BYTES = message_bytes(len(CONTENT), ("0@small.test",))


def add_account(bench: Bench, name: str, *targets: str, weight: int = 1) -> None:
    rule = Rule(f"{name}/routingRules/r", 1, tuple(Target(target) for target in targets or (A,)))
    account = Account(name, ACCOUNT_UID, revision=7, rules=(rule,), delivery_weight=weight)
    bench.config.accounts[name] = compile_account(account)


def envelope_of(bench: Bench, account: str) -> Envelope:
    return bench.envelope(account=account, credential=f"{account}/smtpCredentials/app")


async def submit(bench: Bench, account: str, number: int = 0, provider: str = A) -> None:
    """A message whose recipient names the account."""
    address = f"{number}@{account.partition('/')[2]}.test"
    await bench.submit(address, envelope=envelope_of(bench, account), key=make_queue_key(account, provider))


async def put(bench: Bench, account: str, count: int, provider: str = A) -> None:
    """Messages that lie in the spool."""
    domain = account.partition("/")[2]
    for number in range(count):
        due_ms = bench.clock.wall_ms() - count + number
        row = RecipientRow(0, f"{number}@{domain}.test", State.QUEUED, 0, due_ms, 0, make_queue_key(account, provider))
        await bench.spool.accept(envelope_of(bench, account), CONTENT, [row])


def senders(hop: NextHop) -> list[str]:
    """Whose messages the next hop took, in order."""
    return ["accounts/" + taken.recipients[0].partition("@")[2].removesuffix(".test") for taken in hop.messages]


async def test_a_message_just_accepted_passes_what_another_account_handed_over_before_it() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        for name in (FLOOD, SMALL):
            add_account(bench, name)
        await asyncio.gather(*(submit(bench, FLOOD, number) for number in range(300)))
        for number in range(3):
            await submit(bench, SMALL, number)
        taken = len(hop.messages)
        assert taken < 150  # else nothing would be shown
        await bench.until(lambda: bench.engine.counters.sent == 303)
        # One of the flood between two of them, and what was on its way when the first one came.
        places = [place for place, name in enumerate(senders(hop)) if name == SMALL]
        assert places[0] <= taken + 3
        assert places[2] - places[0] <= 4
        assert [bench.engine._dispatcher.held_bytes(name) for name in (FLOOD, SMALL)] == [0, 0]
        assert not bench.engine._dispatcher._held_bytes


async def test_mail_just_accepted_passes_the_backlog_of_another_account() -> None:
    async with next_hop() as hop, delivery_bench(start=False) as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        for name in (FLOOD, SMALL):
            add_account(bench, name)
        await put(bench, FLOOD, 300)
        await bench.engine.start()
        await bench.until(lambda: bench.engine.counters.sent >= 20)
        await submit(bench, SMALL)
        taken = len(hop.messages)
        await bench.until(lambda: SMALL in senders(hop))
        assert senders(hop).index(SMALL) <= taken + 3


async def test_what_waits_on_disk_comes_back_by_turns_of_the_accounts() -> None:
    async with next_hop() as hop, delivery_bench(start=False) as bench:
        bench.config.add_provider(A, hop.port, max_connections=2)
        for name in (FLOOD, SMALL):
            add_account(bench, name)
        await put(bench, FLOOD, 400)
        await put(bench, SMALL, 20)
        await bench.engine.start()
        await bench.until(lambda: bench.engine.counters.sent == 420)
        last = max(place for place, name in enumerate(senders(hop)) if name == SMALL)
        assert last < 80


async def test_shares_of_a_provider_follow_the_weights_of_the_accounts() -> None:
    async with next_hop() as hop, delivery_bench(start=False) as bench:
        bench.config.add_provider(A, hop.port, max_connections=2)
        add_account(bench, FLOOD)
        add_account(bench, SMALL, weight=3)
        for name in (FLOOD, SMALL):
            await put(bench, name, 300)
        await bench.engine.start()
        await bench.until(lambda: bench.engine.counters.sent >= 200)
        assert senders(hop)[:200].count(SMALL) == pytest.approx(150, abs=20)


async def test_a_flood_leaves_others_their_share_of_a_providers_line() -> None:
    async with next_hop(Behaviour(final=lambda _: STALL)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        for name in (FLOOD, SMALL):
            add_account(bench, name)
        await submit(bench, FLOOD)
        await hop.stalled.wait()
        key = make_queue_key(FLOOD, A)
        count = 0
        while bench.engine.admit(HELD_BYTES, key) and count <= HANDED_OVER_LIMIT:
            await submit(bench, FLOOD)
            count += 1
        assert count == pytest.approx(HANDED_OVER_LIMIT * 4 / 5, abs=2)
        assert bench.engine.admit(HELD_BYTES, make_queue_key(SMALL, A))


async def test_a_flood_leaves_others_their_share_of_memory_and_takes_all_but_that() -> None:
    size = HELD_BYTES
    async with next_hop(Behaviour(final=lambda _: STALL)) as hop, delivery_bench(window_bytes=100 * size) as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        for name in (FLOOD, SMALL):
            add_account(bench, name)
        for number in range(150):
            await submit(bench, FLOOD, number)
        held = bench.engine.counters.window_bytes
        assert 75 * size <= held <= 85 * size
        assert not bench.engine.admit(size, make_queue_key(FLOOD, A))
        for number in range(10):
            await submit(bench, SMALL, number)
        assert bench.engine.counters.window_bytes - held == 10 * size


async def test_what_a_flood_read_back_does_not_keep_others_from_being_read_back() -> None:
    size = HELD_BYTES
    stalled = Behaviour(final=lambda _: STALL)
    async with (
        next_hop(stalled) as slow,
        next_hop() as hop,
        delivery_bench(window_bytes=10 * size, start=False) as bench,
    ):
        bench.config.add_provider(A, slow.port, max_connections=1)
        bench.config.add_provider(B, hop.port, max_connections=1)
        add_account(bench, FLOOD, A)
        add_account(bench, SMALL, B)
        await put(bench, FLOOD, 50)
        await put(bench, SMALL, 50, B)
        await bench.engine.start()
        await bench.until(lambda: bench.engine.counters.sent == 50)
        assert len(hop.messages) == 50
        assert bench.engine.counters.window_bytes <= 9 * size


@contextmanager
def two_engines(first: Bench) -> Iterator[Bench]:
    """A second spool of the same worker."""
    spool = RamSpool(first.clock)
    surroundings = first.surroundings._replace(spool=spool)
    engine = DeliveryEngine(surroundings, pools=first.engine.pools)
    yield Bench(engine, spool, first.config, first.clock, first.log, first.records, surroundings)


async def test_spools_of_one_worker_share_the_connections_of_a_provider() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=3)
        add_account(bench, FLOOD)
        add_account(bench, SMALL)
        with two_engines(bench) as other:
            await put(other, SMALL, 50)
            await other.engine.start()
            peak = 0
            for number in range(50):
                await submit(bench, FLOOD, number)
                peak = max(peak, bench.engine.counters.connections_now + other.engine.counters.connections_now)
            await bench.until(lambda: bench.engine.counters.sent == other.engine.counters.sent == 50)
            assert peak <= 3
            assert hop.connections <= 3
            assert (bench.engine.counters.connections_opened, other.engine.counters.connections_opened) == (
                hop.connections,
                0,
            )
            await asyncio.gather(bench.engine.stop(0.0), other.engine.stop(0.0))


async def test_spools_that_share_connections_stop_together_and_lose_nothing() -> None:
    async with next_hop(Behaviour(final=lambda _: STALL)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        add_account(bench, FLOOD)
        add_account(bench, SMALL)
        with two_engines(bench) as other:
            await other.engine.start()
            await submit(bench, FLOOD)
            await hop.stalled.wait()
            await submit(bench, FLOOD)
            await submit(other, SMALL)
            await asyncio.gather(bench.engine.stop(0.01), other.engine.stop(0.01))
            left = [head.queue_key for each in (bench, other) for head in await each.spool.keys()]
            assert left == [make_queue_key(FLOOD, A), make_queue_key(SMALL, A)]
            assert bench.types() == ["UNCERTAIN"]
            assert other.engine.counters.put_back == 1


async def test_a_stop_ends_as_soon_as_the_last_transaction_of_any_spool_ends() -> None:
    async with next_hop(Behaviour(final=lambda _: STALL)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        add_account(bench, FLOOD)
        with two_engines(bench) as other:
            await other.engine.start()
            await submit(bench, FLOOD)
            await hop.stalled.wait()
            stopping = asyncio.gather(bench.engine.stop(60.0), other.engine.stop(60.0))
            await bench.until(lambda: bench.engine.pools.stopping)
            await hop.end()
            await asyncio.wait_for(stopping, 5)
