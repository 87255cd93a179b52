"""Limits of providers and destinations on the way out: what waits, what goes on, what is held and given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from typing import Any

import pytest

from dataplane.adapters import limiter_local
from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.core.config import Account, NodeSettings
from dataplane.core.envelope import make_queue_key
from dataplane.core.limits import Limit, LimitScope, LimitUnit
from dataplane.core.policy import compile_account
from dataplane.core.queue import State
from dataplane.delivery.limits import DeliveryLimits
from dataplane.ports import Grant, Slot, Take
from support.delivery import ACCOUNT, CONTENT, KEY_A, A, B, Bench, Config, delivery_bench
from support.ingress import Log
from support.next_hop import Behaviour, next_hop
from support.spools import ManualClock

HOST = "127.0.0.1"
KEY_B = make_queue_key(ACCOUNT, B)


class Counting(LocalLimiter):
    """A limiter in memory that counts what it is asked, and keeps answers back while the test says so."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock.monotonic)
        self.asked: list[tuple[Take, ...]] = []
        self.held: list[Slot] = []
        self.refunded: list[Take] = []
        self.kept_back: list[asyncio.Future[Grant]] | None = None

    def ask(self, takes: Sequence[Take]) -> asyncio.Future[Grant]:
        self.asked.append(tuple(takes))
        if self.kept_back is None:
            return super().ask(takes)
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self.kept_back.append(answer)
        return answer

    def refund(self, takes: Sequence[Take]) -> None:
        self.refunded += takes
        super().refund(takes)

    async def hold(self, slots: Sequence[Slot]) -> Grant:
        self.held += slots
        return await super().hold(slots)

    def holders(self, key: str) -> int:
        """How many hold slots under this key now."""
        return len(self._slots.get(key, {}))


class Limited(Bench):
    """A bench with limits."""

    limiter: Counting
    limits: DeliveryLimits


def shared(scope: LimitScope, unit: LimitUnit, amount: int, period_s: float = 60.0, subject: str = "") -> Limit:
    return Limit("limits/l", scope, unit, amount, period_s, amount if period_s else 0, subject)


@asynccontextmanager
async def limited(*limits: Limit, **options: Any) -> AsyncIterator[Limited]:
    clock, config = ManualClock(), Config(settings=NodeSettings(limits=limits))
    limiter = Counting(clock)
    delivery = DeliveryLimits(limiter, config, "worker", Log())
    async with delivery_bench(clock=clock, config=config, limits=delivery, **options) as bench:
        made = Limited(**{each.name: getattr(bench, each.name) for each in fields(bench)})
        made.limiter, made.limits = limiter, delivery
        yield made
    delivery.close()


async def turns(count: int = 300) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def states(bench: Bench, key: str = KEY_A) -> list[State]:
    heads = await bench.spool.heads(key, None, 100)
    found = []
    for head in heads:
        stored = await bench.spool.load(head.message_id)
        assert stored is not None
        found += [row.state for row in stored.recipients]
    return found


async def test_a_provider_gets_what_its_limit_allows_and_the_rest_waits_without_an_attempt() -> None:
    limit = shared(LimitScope.PROVIDER, LimitUnit.MESSAGE, 3, 3.0, A)
    async with next_hop() as hop, limited(limit) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        for _ in range(5):
            await bench.submit()
        await hop.took(3)
        await bench.until(lambda: bench.engine.counters.limited > 0)
        await turns()
        asked = len(bench.limiter.asked)
        await turns()
        assert len(bench.limiter.asked) == asked  # nobody asks before the time is over
        assert len(hop.messages) == 3
        assert bench.types() == ["SENT"] * 3
        bench.clock.advance(2.0)
        await hop.took(5)
        await bench.events_come(5)
        assert bench.types() == ["SENT"] * 5
        assert {event.attempt for event in bench.events} == {1}


async def test_other_providers_go_on() -> None:
    limit = shared(LimitScope.PROVIDER, LimitUnit.MESSAGE, 1, 3.0, A)
    async with next_hop() as slow, next_hop() as quick, limited(limit) as bench:
        bench.config.add_provider(A, slow.port)
        bench.config.add_provider(B, quick.port)
        bench.config.route_to(A)
        for _ in range(3):
            await bench.submit()
        await slow.took(1)
        bench.config.route_to(B)
        for _ in range(10):
            await bench.submit(key=KEY_B)
        await quick.took(10)
        assert len(slow.messages) == 1


@pytest.mark.parametrize(
    ("unit", "amount"), [(LimitUnit.RECIPIENT, 4), (LimitUnit.BYTE, 2 * len(CONTENT) + 1)], ids=["recipient", "byte"]
)
async def test_recipients_and_octets_are_counted(unit: LimitUnit, amount: int) -> None:
    async with next_hop() as hop, limited(shared(LimitScope.DESTINATION, unit, amount, 3.0, HOST)) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        for _ in range(4):
            await bench.submit("a@example.net", "b@example.net")
        await hop.took(2)
        await bench.until(lambda: bench.engine.counters.limited > 0)
        assert len(hop.messages) == 2
        bench.clock.advance(3.0)
        await hop.took(4)


async def test_a_destination_is_counted_over_all_providers_that_lead_there() -> None:
    limit = shared(LimitScope.DESTINATION, LimitUnit.MESSAGE, 3, 3.0)
    async with next_hop() as first, next_hop() as second, limited(limit) as bench:
        bench.config.add_provider(A, first.port)
        bench.config.add_provider(B, second.port)
        for name, key in ((A, KEY_A), (B, KEY_B)):
            bench.config.route_to(name)
            for _ in range(3):
                await bench.submit(key=key)
        await bench.until(lambda: len(first.messages) + len(second.messages) == 3)
        await bench.until(lambda: bench.engine.counters.limited > 0)
        await turns()
        assert len(first.messages) + len(second.messages) == 3


async def test_what_would_wait_for_long_goes_back_to_the_spool() -> None:
    async with next_hop() as hop, limited(shared(LimitScope.PROVIDER, LimitUnit.MESSAGE, 2, 7_200.0, A)) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        for _ in range(6):
            await bench.submit()
        await hop.took(2)
        await bench.until(lambda: bench.engine.counters.window_bytes == 0)
        await bench.until(lambda: bench.engine._settler.pending_count == 0)
        assert await states(bench) == [State.QUEUED] * 4
        assert not bench.engine.admit(len(CONTENT), KEY_A)
        assert bench.types() == ["SENT"] * 2
        bench.clock.advance(3_601.0)
        bench.engine._scheduler._event.set()
        await hop.took(3)
        await bench.until(lambda: bench.engine.counters.window_bytes == 0)
        assert len(hop.messages) == 3
        # Who raises a limit need not wait for the old one.
        bench.config.settings = replace(bench.config.settings, limits=())
        bench.engine.config_changed()
        await hop.took(6)


async def test_what_would_wait_for_long_goes_to_the_next_target_where_there_is_one() -> None:
    limit = shared(LimitScope.PROVIDER, LimitUnit.MESSAGE, 2, 7_200.0, A)
    async with next_hop() as first, next_hop() as second, limited(limit) as bench:
        bench.config.add_provider(A, first.port)
        bench.config.add_provider(B, second.port)
        bench.config.route_to(A, B)
        for _ in range(5):
            await bench.submit()
        await second.took(3)
        await bench.events_come(5)
        assert len(first.messages) == 2
        assert bench.types() == ["SENT"] * 5


# --- connections


async def test_connections_at_once_are_held_over_the_fleet() -> None:
    limit = shared(LimitScope.DESTINATION, LimitUnit.CONNECTION, 2, 0.0, HOST)
    async with next_hop() as hop, limited(limit) as bench:
        bench.config.add_provider(A, hop.port, max_connections=10)
        bench.config.route_to(A)
        # Another worker of the fleet has one of the two.
        await bench.limiter.hold([Slot("destination:slots", f"d:{HOST}", 2, 60.0, "another")])
        for _ in range(20):
            await bench.submit()
        await hop.took(20)
        assert hop.connections == 1
        assert bench.limiter.holders(f"d:{HOST}destination:slots") == 2


async def test_a_slot_that_comes_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter_local, "_HOLD_AGAIN_S", 0.01)
    limit = shared(LimitScope.PROVIDER, LimitUnit.CONNECTION, 1, 0.0)
    taken = Slot("provider:slots", f"p:{A}", 1, 600.0, "another")
    async with next_hop() as hop, limited(limit) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.limiter.hold([taken])
        await bench.submit()
        await bench.until(lambda: bench.engine.counters.limited > 1)
        assert hop.connections == 0
        assert bench.engine.pools.find(A) is not None
        bench.limiter.release([taken])
        await hop.took(1)
        await bench.events_come(1)
        assert bench.types() == ["SENT"]


async def test_without_a_slot_for_long_mail_goes_back_to_the_spool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter_local, "_HOLD_AGAIN_S", 0.01)
    async with next_hop() as hop, limited(shared(LimitScope.PROVIDER, LimitUnit.CONNECTION, 1, 0.0)) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.limiter.hold([Slot("provider:slots", f"p:{A}", 1, 600.0, "another")])
        await bench.submit()
        await bench.until(lambda: bench.engine.counters.limited > 1)
        bench.clock.advance(6.0)
        await bench.until(lambda: bench.engine.counters.window_bytes == 0)
        await bench.until(lambda: bench.engine._settler.pending_count == 0)
        assert await states(bench) == [State.QUEUED]
        assert hop.connections == 0


async def test_a_connection_gives_its_slot_back_when_it_closes() -> None:
    async with next_hop() as hop, limited(shared(LimitScope.PROVIDER, LimitUnit.CONNECTION, 5, 0.0)) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await hop.took(1)
        await bench.events_come(1)
        assert bench.limiter.holders(f"p:{A}provider:slots") == 1
        pool = bench.engine.pools.find(A)
        assert pool is not None
        pool.close_idle()
        await bench.until(lambda: bench.limiter.holders(f"p:{A}provider:slots") == 0)


async def test_a_dial_that_fails_gives_its_slot_back() -> None:
    async with limited(shared(LimitScope.PROVIDER, LimitUnit.CONNECTION, 5, 0.0)) as bench:
        bench.config.add_provider(A, 1)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        assert bench.types() == ["DEFERRED"]
        assert bench.limiter.held
        assert bench.limiter.holders(f"p:{A}provider:slots") == 0


async def test_slots_are_renewed_while_the_connection_is_open() -> None:
    async with next_hop() as hop, limited(shared(LimitScope.PROVIDER, LimitUnit.CONNECTION, 1, 0.0)) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        for _ in range(4):
            bench.clock.advance(20.0)
            await bench.limits.renew_all()
        other = Slot("provider:slots", f"p:{A}", 1, 60.0, "another")
        assert not (await bench.limiter.hold([other])).allowed


async def test_a_connection_whose_slot_is_lost_closes_after_its_message() -> None:
    async with next_hop() as hop, limited(shared(LimitScope.PROVIDER, LimitUnit.CONNECTION, 1, 0.0)) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        bench.clock.advance(61.0)
        other = Slot("provider:slots", f"p:{A}", 1, 60.0, "another")
        assert (await bench.limiter.hold([other])).allowed
        await bench.limits.renew_all()
        await bench.submit()
        await bench.until(lambda: bench.engine.counters.connections_now == 0)
        # It gave back nothing that is somebody else's by now.
        assert bench.limiter.holders(f"p:{A}provider:slots") == 1
        assert len(hop.messages) == 1
        bench.limiter.release([other])
        await hop.took(2)


async def test_connections_a_period_wait_without_making_the_destination_dead() -> None:
    limit = shared(LimitScope.PROVIDER, LimitUnit.CONNECTION, 1, 1.0)
    async with next_hop() as hop, limited(limit) as bench:
        bench.config.add_provider(A, hop.port, max_messages_per_connection=1)
        bench.config.route_to(A)
        for _ in range(3):
            await bench.submit()
        await hop.took(1)
        await bench.until(lambda: bench.engine.counters.limited > 0)
        await turns()
        assert hop.connections == 1
        pool = bench.engine.pools.find(A)
        assert pool is not None
        assert (pool.is_open, pool.destination.retry_at_s) == (True, 0.0)
        for count in (2, 3):
            bench.clock.advance(1.0)
            await hop.took(count)
        await bench.events_come(3)
        assert bench.types() == ["SENT"] * 3
        assert (bench.engine.counters.throttled, bench.engine.counters.connections_failed) == (0, 0)


# --- while the limiter is asked


async def test_who_stops_while_the_limiter_is_asked_leaves_nothing_sending() -> None:
    async with next_hop() as hop, limited(shared(LimitScope.PROVIDER, LimitUnit.MESSAGE, 5)) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        bench.limiter.kept_back = []
        await bench.submit()
        await bench.until(lambda: bool(bench.limiter.kept_back))
        await bench.engine.stop(0.0)
        assert await states(bench) == [State.QUEUED]
        bench.limiter.kept_back[0].set_result(Grant(allowed=True, wait_s=0.0, refused_key="", local=False))
        await turns()
        assert [take.key for take in bench.limiter.refunded] == ["provider:message"]
        assert hop.messages == []


async def test_a_connection_that_closes_while_the_limiter_is_asked_costs_nothing() -> None:
    async with next_hop() as hop, limited(shared(LimitScope.PROVIDER, LimitUnit.MESSAGE, 5)) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        bench.limiter.kept_back = []
        await bench.submit()
        await bench.until(lambda: bool(bench.limiter.kept_back))
        first = bench.limiter.kept_back[0]
        await hop.end()
        await bench.until(lambda: bench.engine.counters.connections_now == 0)
        bench.limiter.kept_back = None
        first.set_result(Grant(allowed=True, wait_s=0.0, refused_key="", local=False))
        await hop.took(1)
        await bench.events_come(1)
        assert bench.types() == ["SENT"]
        assert hop.connections == 2
        assert len(bench.limiter.refunded) == 1


async def test_a_message_that_is_denied_while_the_limiter_is_asked_costs_nothing() -> None:
    async with next_hop() as hop, limited(shared(LimitScope.PROVIDER, LimitUnit.MESSAGE, 5)) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        bench.limiter.kept_back = []
        await bench.submit()
        await bench.until(lambda: bool(bench.limiter.kept_back))
        bench.config.denials = replace(bench.config.denials, version=1, accounts={ACCOUNT: 0})
        bench.limiter.kept_back[0].set_result(Grant(allowed=True, wait_s=0.0, refused_key="", local=False))
        await bench.until(lambda: len(bench.limiter.refunded) == 1)
        assert hop.messages == []


# --- what counts


def compiled(config: Config) -> DeliveryLimits:
    return DeliveryLimits(LocalLimiter(lambda: 0.0), config, "worker", Log())


def test_without_limits_nobody_is_asked() -> None:
    config = Config()
    provider = config.add_provider(A, 25)
    assert compiled(config).takes(provider, HOST, 5, 5_000) == ()


def test_an_accounts_own_provider_is_held_to_its_own_limit() -> None:
    name = f"{ACCOUNT}/providers/own"
    own = Limit(f"{ACCOUNT}/limits/l", LimitScope.PROVIDER, LimitUnit.MESSAGE, 7, 60.0, 7)
    config = Config(settings=NodeSettings(limits=(shared(LimitScope.PROVIDER, LimitUnit.MESSAGE, 9),)))
    config.accounts[ACCOUNT] = compile_account(Account(ACCOUNT, "uid", 1, limits=(own,)))
    mine = replace(config.add_provider(name, 25), account=ACCOUNT)
    common = config.add_provider(A, 25)
    limits = compiled(config)
    assert [(take.tag, take.capacity) for take in limits.takes(mine, HOST, 1, 1)] == [(f"p:{name}", 7)]
    assert [(take.tag, take.capacity) for take in limits.takes(common, HOST, 1, 1)] == [(f"p:{A}", 9)]


def test_what_counts_follows_the_configuration() -> None:
    config = Config()
    provider = config.add_provider(A, 25)
    limits = compiled(config)
    assert limits.takes(provider, "MX.example.net", 1, 1) == ()
    limit = shared(LimitScope.DESTINATION, LimitUnit.MESSAGE, 3, 60.0, "mx.example.net")
    config.settings = NodeSettings(limits=(limit,))
    takes = limits.takes(provider, "MX.example.net", 1, 1)
    assert [(take.tag, take.cost) for take in takes] == [("d:mx.example.net", 1)]
    assert limits.takes(provider, "MX.example.net", 1, 1) is takes


async def test_a_refused_recipient_leaves_the_tokens_spent() -> None:
    behaviour = Behaviour(recipient=lambda _: b"550 5.1.1 nobody\r\n")
    async with next_hop(behaviour) as hop, limited(shared(LimitScope.PROVIDER, LimitUnit.MESSAGE, 2)) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        assert bench.types() == ["BOUNCED"]
        assert bench.limiter.refunded == []


async def test_a_destination_is_one_in_whatever_way_its_address_is_written() -> None:
    limit = shared(LimitScope.DESTINATION, LimitUnit.MESSAGE, 3, subject="2001:db8::1")
    async with limited(limit) as bench:
        bench.config.add_provider(A, 25)
        provider = bench.config.provider(A)
        assert provider is not None
        takes = [bench.limits.takes(provider, host, 1, 1) for host in ("2001:db8::1", "2001:DB8:0::1", "2001:db8::2")]
        assert [[take.tag for take in every] for every in takes] == [["d:2001:db8::1"]] * 2 + [[]]


async def test_an_attempt_above_the_burst_is_paid_whole_before_the_next() -> None:
    limit = replace(shared(LimitScope.DESTINATION, LimitUnit.RECIPIENT, 3_600, 3_600.0, HOST), burst=2)
    async with next_hop() as hop, limited(limit) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        for _ in range(2):
            await bench.submit(*[f"to-{number}@example.net" for number in range(12)])
        await bench.until(lambda: bench.engine.counters.limited > 0)
        await bench.until(lambda: bench.engine.counters.window_bytes == 0)
        assert len(hop.messages) == 1
        # 10 are owed and 2 make the bucket full: that is for long, so that the second message does not wait in memory.
        again = await bench.limiter.take([bench.limiter.asked[0][0]])
        assert (again.allowed, again.wait_s) == (False, 12.0)
