"""A provider that is away, with much waiting for it, and one that comes back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import pytest

from dataplane.core.config import Account, Denials, Rule, SmtpProvider, Target
from dataplane.core.envelope import RecipientRow, make_queue_key
from dataplane.core.policy import compile_account
from dataplane.core.queue import State
from dataplane.core.shaping import CAP_S
from dataplane.delivery import engine
from dataplane.delivery.connection import Connection
from dataplane.delivery.engine import AHEAD
from support.delivery import ACCOUNT_UID, CONTENT, A, B, Bench, delivery_bench
from support.next_hop import Behaviour, next_hop

CONNECTIONS = 20
ACCOUNTS = [f"accounts/a{number}" for number in range(100)]


def add_accounts(bench: Bench) -> None:
    for name in ACCOUNTS:
        rules = (
            Rule(f"{name}/routingRules/b", 1, (Target(B),), recipient_patterns=("@b.test",)),
            Rule(f"{name}/routingRules/a", 2, (Target(A),)),
        )
        bench.config.accounts[name] = compile_account(Account(name, ACCOUNT_UID, revision=7, rules=rules))


async def put(bench: Bench, provider: str, count: int, accounts: int = len(ACCOUNTS)) -> None:
    """Messages that lie in the spool, of so many accounts by turns, oldest first."""
    domain = "b.test" if provider == B else "a.test"
    for number in range(count):
        account = ACCOUNTS[number % accounts]
        envelope = bench.envelope(account=account, credential=f"{account}/smtpCredentials/app")
        due_ms = bench.clock.wall_ms() - count + number
        key = make_queue_key(account, provider)
        row = RecipientRow(0, f"{number}@{domain}", State.QUEUED, 0, due_ms, 0, key)
        await bench.spool.accept(envelope, CONTENT, [row])


@dataclass
class Dials:
    """What each dial found: connections of its provider that were being opened or open, itself included, and ready."""

    found: list[tuple[int, int]] = field(default_factory=list)


@asynccontextmanager
async def watched_dials(bench: Bench) -> AsyncIterator[Dials]:
    dials = Dials()
    dial = bench.engine.pools.dialer

    async def watch(provider: SmtpProvider) -> Connection:
        pool = bench.engine.pools.find(provider.name)
        assert pool is not None
        dials.found.append((pool.destination.connections, len(pool._jobs)))
        return await dial(provider)

    bench.engine.pools.dialer = watch
    yield dials


async def pass_time(bench: Bench, seconds: float) -> None:
    """Let time pass, and what is due by it happen."""
    bench.clock.advance(seconds)
    bench.engine.wake(make_queue_key("accounts/nobody", "providers/nobody"))
    await quiet(bench)


async def quiet(bench: Bench) -> None:
    """Wait until nothing can go on by itself."""
    made = bench.engine

    def rests() -> bool:
        return (
            made._scheduler.is_idle
            and not made.counters.connections_now
            and not made._settler.pending_count
            and not made.counters.window_bytes
        )

    rested = 0
    for _ in range(10_000):
        await asyncio.sleep(0.001)
        rested = rested + 1 if rests() else 0
        if rested == 10:
            return
    raise AssertionError("never quiet")


@pytest.mark.parametrize(("waiting", "accounts"), [(100, 100), (10_000, 100), (1_000, 1)])
async def test_a_dead_provider_costs_a_probe_each_time_whatever_waits_for_it(waiting: int, accounts: int) -> None:
    async with next_hop(Behaviour(greeting=b"554 5.3.2 no\r\n")) as dead, delivery_bench(start=False) as bench:
        bench.config.add_provider(A, dead.port, max_connections=CONNECTIONS)
        add_accounts(bench)
        await put(bench, A, waiting, accounts)
        await bench.engine.start()
        await quiet(bench)
        # Nobody knew that it was dead: one round of connections, and one attempt that tells.
        assert dead.connections <= CONNECTIONS
        assert len(bench.events) == 1
        claimed = bench.engine.counters.put_back
        assert claimed <= CONNECTIONS + AHEAD
        first = dead.connections
        for probe in range(1, 12):
            await pass_time(bench, CAP_S + 1.0)
            assert dead.connections == first + probe
            assert len(bench.events) == 1 + probe
            assert bench.engine.counters.throttled == 1, "a probe that fails finds nothing new"
        assert bench.engine.counters.attempts == 0
        assert bench.engine.counters.put_back <= claimed + 11


async def test_probes_come_after_delays_that_double_to_five_minutes() -> None:
    async with next_hop(Behaviour(greeting=b"554 5.3.2 no\r\n")) as dead, delivery_bench(start=False) as bench:
        bench.config.add_provider(A, dead.port, max_connections=CONNECTIONS)
        add_accounts(bench)
        await put(bench, A, 1_000)
        await bench.engine.start()
        await quiet(bench)
        begun_s, seen = bench.clock.monotonic(), dead.connections
        times: list[float] = []
        for _ in range(2_000):
            await pass_time(bench, 0.5 if len(times) < 6 else 5.0)
            if dead.connections > seen:
                assert dead.connections == seen + 1
                seen += 1
                times.append(bench.clock.monotonic() - begun_s)
            if len(times) == 11:
                break
        delays = [later - earlier for earlier, later in pairwise([0.0, *times])]
        # `random` is 0.5 here: three quarters of 1, 2, 4 … seconds.
        wanted = [0.75 * min(CAP_S, 2.0**place) for place in range(11)]
        assert delays == pytest.approx(wanted, abs=5.6)
        assert delays[:6] == pytest.approx(wanted[:6], abs=0.6)


async def test_a_dead_provider_does_not_delay_what_goes_to_another() -> None:
    async with (
        next_hop(Behaviour(greeting=b"554 5.3.2 no\r\n")) as dead,
        next_hop() as alive,
        delivery_bench(start=False) as bench,
    ):
        bench.config.add_provider(A, dead.port, max_connections=CONNECTIONS)
        bench.config.add_provider(B, alive.port, max_connections=CONNECTIONS)
        add_accounts(bench)
        await put(bench, A, 5_000)
        await put(bench, B, 500)
        loads = 0
        load = bench.spool.load

        async def counted(message_id: object) -> object:
            nonlocal loads
            loads += 1
            return await load(message_id)  # type: ignore[arg-type] # handed through

        bench.spool.load = counted  # type: ignore[method-assign,assignment] # to count reads
        await bench.engine.start()
        loads = 0  # without those of acceptances that were still to be recorded
        await bench.until(lambda: bench.engine.counters.sent == 500)
        # Each message of B once, and of A a few for each of its keys.
        assert loads <= 500 + 5 * len(ACCOUNTS) + CONNECTIONS + AHEAD
        assert len(alive.messages) == 500


async def test_a_provider_that_comes_back_is_met_by_few_and_then_more_and_takes_everything_by_turns() -> None:
    behaviour = Behaviour(greeting=b"554 5.3.2 no\r\n")
    async with next_hop(behaviour) as hop, delivery_bench(start=False) as bench:
        bench.config.add_provider(A, hop.port, max_connections=CONNECTIONS)
        add_accounts(bench)
        await put(bench, A, 1_000)
        await bench.engine.start()
        await quiet(bench)
        behaviour.greeting = b"220 sink\r\n"
        async with watched_dials(bench) as dials:
            bench.clock.advance(CAP_S)
            bench.engine.wake(make_queue_key("accounts/nobody", "providers/nobody"))
            # The one that told of the outage is due later.
            await bench.until(lambda: bench.engine.counters.sent >= 999)
            assert all(connections <= min(CONNECTIONS, max(1, 2 * ready)) for connections, ready in dials.found)
            assert max(connections for connections, _ in dials.found) >= 4
        sent = [int(taken.recipients[0].partition("@")[0]) for taken in hop.messages]
        for account in range(len(ACCOUNTS)):
            ours = [number for number in sent if number % len(ACCOUNTS) == account]
            late = sum(later < earlier for earlier, later in pairwise(ours))
            assert late <= 1  # in order of due, but for what was tried before
        # Accounts by turns: after half of it each has had about half of its ten.
        for account in range(len(ACCOUNTS)):
            half = sum(number % len(ACCOUNTS) == account for number in sent[:500])
            assert 3 <= half <= 7


async def test_a_provider_that_allows_fewer_connections_is_used_by_as_many_as_it_allows() -> None:
    async with next_hop() as hop, delivery_bench(start=False) as bench:
        bench.config.add_provider(A, hop.port, max_connections=CONNECTIONS, max_messages_per_connection=1_000)
        add_accounts(bench)
        await put(bench, A, 600)
        serve = hop.serve
        refused = 0

        async def crowded(reader: object, writer: object) -> None:
            nonlocal refused
            if len(hop._tasks) >= 3:
                refused += 1
                hop.behaviour = Behaviour(greeting=b"421 4.7.0 too many\r\n")
            else:
                hop.behaviour = Behaviour()
            await serve(reader, writer)  # type: ignore[arg-type] # handed through

        hop.serve = crowded  # type: ignore[method-assign] # what a connection meets
        await bench.engine.start()
        await bench.until(lambda: bench.engine.counters.sent == 600)
        assert refused <= CONNECTIONS
        assert bench.engine.counters.throttled == 0


async def test_a_provider_that_was_deleted_while_it_was_dead_leaves_nothing_behind() -> None:
    async with next_hop(Behaviour(greeting=b"554 5.3.2 no\r\n")) as dead, delivery_bench(start=False) as bench:
        add_accounts(bench)
        bench.config.add_provider(A, dead.port)
        await put(bench, A, 10)
        await bench.engine.start()
        await quiet(bench)
        assert list(bench.engine.pools)
        del bench.config.providers[A]
        bench.engine.config_changed()
        assert not list(bench.engine.pools)


async def test_what_is_remembered_of_denied_mail_is_bounded_by_recipients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DENIED_LIMIT", 25)
    async with delivery_bench() as bench:
        add_accounts(bench)
        bench.config.add_provider(A, 1)
        credential = f"{ACCOUNTS[0]}/smtpCredentials/app"
        bench.config.denials = Denials(1, credentials={credential: 0})
        for _ in range(10):
            envelope = bench.envelope(account=ACCOUNTS[0], credential=credential)
            key = make_queue_key(ACCOUNTS[0], A)
            due_ms = bench.clock.wall_ms()
            rows = [RecipientRow(index, f"{index}@a.test", State.QUEUED, 0, due_ms, 0, key) for index in range(10)]
            await bench.spool.accept(envelope, CONTENT, rows)
            bench.engine.queued(envelope, rows)
        await quiet(bench)
        assert sum(len(rows) for rows in bench.engine._denied.values()) == 20


async def test_retries_of_messages_that_failed_together_do_not_come_together() -> None:
    later = Behaviour(mail=lambda _: b"451 4.3.0 later\r\n")
    async with next_hop(later) as hop, delivery_bench(start=False) as bench:
        bench.engine._dispatcher._random = Random(7).random
        bench.config.add_provider(A, hop.port)
        add_accounts(bench)
        await put(bench, A, 120)
        await bench.engine.start()
        await bench.events_come(120)
        now_ms = bench.clock.wall_ms()
        seconds = Counter((update.next_attempt_ms - now_ms) // 1_000 for update in bench.updates)
        assert max(seconds.values()) <= 10  # 2 each second on average, and the floor of one second
        assert max(seconds) <= 60
        assert len(seconds) > 40


def sizes(made: engine.DeliveryEngine) -> dict[str, int]:
    """How much each part of the engine holds: lengths of all its containers."""
    parts = [made, made._scheduler, made._reporter, made._settler, made._dispatcher, made._deadlines, made.pools]
    return {
        f"{type(part).__name__}.{name}": len(value)
        for part in [*parts, *made.pools, *made._scheduler._hops.values()]
        for name in getattr(type(part), "__slots__", None) or vars(part)
        if hasattr(type(value := getattr(part, name)), "__len__") and not isinstance(value, (str, bytes, tuple))
    }


async def test_an_hour_without_the_provider_leaves_memory_as_it_was() -> None:
    async with next_hop(Behaviour(greeting=b"554 5.3.2 no\r\n")) as dead, delivery_bench() as bench:
        bench.config.add_provider(A, dead.port, max_connections=CONNECTIONS)
        add_accounts(bench)
        seen = []
        for minute in range(60):
            for account in ACCOUNTS[:20]:
                envelope = bench.envelope(account=account, credential=f"{account}/smtpCredentials/app")
                await bench.submit(f"{minute}@a.test", envelope=envelope, key=make_queue_key(account, A))
            await pass_time(bench, 60.0)
            bench.engine._reporter.look()
            seen.append(sizes(bench.engine))
        assert bench.engine.counters.window_bytes == 0
        assert len(bench.records) >= 1_200  # each acceptance is recorded all the same
        early, late = seen[10], seen[59]
        assert {name: late[name] for name in late if late[name] > early.get(name, 0) + 8} == {}
        assert dead.connections <= CONNECTIONS + 60
