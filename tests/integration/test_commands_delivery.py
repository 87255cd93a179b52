"""Commands beside a delivery engine that works: what is held is not sent, what is let go goes, mail takes the way that
it was given, and all of that survives a restart.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataplane.commands import CommandRunner, Tools
from dataplane.core.commands import Filter
from dataplane.core.config import Denials
from dataplane.core.envelope import Envelope, RecipientRow, make_queue_key
from dataplane.core.queue import State, Verb
from dataplane.link import RunCommand
from support.delivery import ACCOUNT, CONTENT, A, B, Bench, Config, delivery_bench
from support.next_hop import Behaviour, next_hop
from support.spools import ManualClock, open_durable

HOUR_MS = 3_600_000
LATER = b"451 4.3.0 later\r\n"
PINNED_B = make_queue_key(ACCOUNT, B, pinned=True)


def routed(port: int, *others: tuple[str, int]) -> Config:
    """All mail goes to A, and there are other providers."""
    config = Config()
    config.add_provider(A, port)
    for name, other_port in others:
        config.add_provider(name, other_port)
    config.route_to(A)
    return config


async def command(bench: Bench, verb: Verb, *envelopes: Envelope, provider: str = "", **wanted: Any) -> tuple[int, int]:
    """Run a command for messages, or with a filter on all; returns how many were changed and how many too late."""
    name = bench.spool.identity.spool
    surroundings = bench.surroundings
    tools = Tools({name: bench.engine}, surroundings.encode, surroundings.clock, bench.log)
    described = None if envelopes else Filter(bench.clock.wall_ms() + 1, **wanted)
    message_ids = tuple(envelope.message_id for envelope in envelopes)
    run = RunCommand(uuid.uuid4().hex, name, verb, ACCOUNT, message_ids, provider, described)
    await CommandRunner({name: bench.spool}, tools).run(run)
    told: dict[str, Any] = [fields for event, fields in bench.log.lines if event == "command.done"][-1]
    return told["changed"], told["too_late"]


async def rows_of(bench: Bench, envelope: Envelope) -> list[RecipientRow]:
    stored = await bench.spool.load(envelope.message_id)
    return list(stored.recipients) if stored else []


async def settled(bench: Bench) -> None:
    """Wait until no settlement is on its way and nothing is due."""
    await bench.until(lambda: not bench.engine.held()["settlements"], "settlements end")
    await bench.until(lambda: bench.engine._scheduler.is_idle, "the scheduler rests")


async def test_held_mail_is_not_sent_survives_a_restart_and_goes_at_once_when_released(tmp_path: Path) -> None:
    clock, folder = ManualClock(), tmp_path / str(uuid.uuid4())
    spool = await open_durable(folder, clock)
    async with next_hop(Behaviour(mail=lambda _: LATER)) as hop:
        async with delivery_bench(spool, clock=clock, config=routed(hop.port)) as bench:
            envelope = await bench.submit("one@x.test", "two@x.test")
            await bench.events_come(1)
            await settled(bench)
            assert await command(bench, Verb.HOLD, envelope) == (2, 0)
            await bench.retry()
            await settled(bench)
            assert bench.types() == ["DEFERRED", "HELD"]
        await spool.close()
        spool = await open_durable(folder, clock)
        async with delivery_bench(spool, clock=clock, config=routed(hop.port)) as bench:
            await bench.retry()
            await settled(bench)
            assert [row.state for row in await rows_of(bench, envelope)] == [State.HELD] * 2
            assert (await bench.spool.depth()).held == 2
            hop.behaviour.mail = lambda _: b"250 2.1.0 ok\r\n"
            assert await command(bench, Verb.RELEASE, envelope) == (2, 0)
            await hop.took(1)
            await bench.events_come(2)
            assert bench.types() == ["RELEASED", "SENT"]
            # The hold was no attempt.
            assert bench.events[1].attempt == 2
    await spool.close()


async def test_held_mail_ends_with_its_lifetime_and_not_before() -> None:
    async with next_hop(Behaviour(mail=lambda _: LATER)) as hop, delivery_bench(config=routed(hop.port)) as bench:
        held = await bench.submit("one@x.test", "two@x.test")
        await bench.events_come(1)
        await settled(bench)
        await command(bench, Verb.HOLD, held)
        await bench.engine.held_mail.look()
        assert [row.state for row in await rows_of(bench, held)] == [State.HELD] * 2
        bench.clock.advance(6 * 86_400)
        await bench.engine.held_mail.look()
        assert await rows_of(bench, held) == []
        assert bench.types()[-1] == "EXPIRED"
        assert [(one.state, one.attempt) for one in bench.updates[-2:]] == [(State.EXPIRED, 1)] * 2
        await bench.engine.held_mail.look()
        assert bench.types().count("EXPIRED") == 1


async def test_a_retry_goes_now_and_what_is_due_or_held_is_left_alone() -> None:
    async with next_hop(Behaviour(mail=lambda _: LATER)) as hop, delivery_bench(config=routed(hop.port)) as bench:
        first, held = await bench.submit(), await bench.submit()
        await bench.events_come(2)
        await settled(bench)
        await command(bench, Verb.HOLD, held)
        hop.behaviour.mail = lambda _: b"250 2.1.0 ok\r\n"
        assert await command(bench, Verb.RETRY) == (1, 0)
        await hop.took(1)
        await bench.until(lambda: bench.types()[-1] == "SENT")
        await settled(bench)
        assert await rows_of(bench, first) == []
        assert [row.state for row in await rows_of(bench, held)] == [State.HELD]


async def test_what_waits_for_a_dead_provider_goes_by_another_one() -> None:
    async with next_hop() as other, delivery_bench(config=routed(1, (B, other.port))) as bench:
        envelopes = [await bench.submit() for _ in range(5)]
        await bench.events_come(1)
        await settled(bench)
        assert await command(bench, Verb.REROUTE, provider=B) == (5, 0)
        # Those that were tried wait for their time, which a reroute leaves alone.
        await bench.retry(key=PINNED_B)
        await other.took(5)
        await bench.until(lambda: bench.types().count("SENT") == 5)
        await settled(bench)
        assert all([not await rows_of(bench, envelope) for envelope in envelopes])
        sent = [event for event in bench.events if event.type.name == "SENT"]
        assert {(event.provider, event.rule) for event in sent} == {(B, "")}


async def test_a_bound_recipient_stays_bound_through_failures_and_restarts_until_the_provider_is_gone(
    tmp_path: Path,
) -> None:
    clock, folder = ManualClock(), tmp_path / str(uuid.uuid4())
    spool = await open_durable(folder, clock)
    async with next_hop() as hop, next_hop(Behaviour(mail=lambda _: LATER)) as other:
        hop.behaviour.mail = lambda _: LATER
        config = routed(hop.port, (B, other.port))
        async with delivery_bench(spool, clock=clock, config=config) as bench:
            envelope = await bench.submit()
            await bench.events_come(1)
            await settled(bench)
            await command(bench, Verb.REROUTE, envelope, provider=B)
            await bench.retry(key=PINNED_B)
            await bench.until(lambda: bench.types() == ["DEFERRED", "REROUTED", "DEFERRED"])
            assert bench.events[2].provider == B
            await settled(bench)
        await spool.close()
        spool = await open_durable(folder, clock)
        async with delivery_bench(spool, clock=clock, config=config) as bench:
            assert [row.queue_key for row in await rows_of(bench, envelope)] == [PINNED_B]
            await bench.retry(7_200, key=PINNED_B)
            await bench.events_come(1)
            assert bench.events[0].provider == B
            await settled(bench)
            del config.providers[B]
            bench.engine.config_changed()
            hop.behaviour.mail = lambda _: b"250 2.1.0 ok\r\n"
            await bench.retry(14_400, key=PINNED_B)
            await hop.took(1)
            await bench.until(lambda: bench.types()[-1] == "SENT")
            assert bench.events[-1].provider == A
    await spool.close()


async def test_another_accounts_provider_is_as_good_as_gone() -> None:
    config = Config()
    async with next_hop() as hop, next_hop() as foreign, delivery_bench(config=config) as bench:
        config.add_provider(A, hop.port)
        provider = config.add_provider(B, foreign.port)
        config.loaded = False
        envelope = await bench.submit()
        await command(bench, Verb.REROUTE, envelope, provider=B)
        config.providers[B] = replace(provider, account="accounts/other")
        config.route_to(A)
        go(bench)
        await hop.took(1)
        assert foreign.messages == []


async def test_mail_that_a_denial_held_back_keeps_what_a_command_made_of_it() -> None:
    async with next_hop() as hop, next_hop() as other:
        config = routed(hop.port, (B, other.port))
        credential = "accounts/demo/smtpCredentials/app"
        async with delivery_bench(config=config) as bench:
            config.denials = Denials(1, credentials={credential: 0})
            envelope = await bench.submit()
            await bench.until(lambda: bench.engine._denied_count == 1)
            await settled(bench)
            await command(bench, Verb.REROUTE, envelope, provider=B)
            config.denials = Denials(2)
            bench.engine.denials_changed()
            await bench.retry(600, key=PINNED_B)
            await other.took(1)
            assert hop.messages == []


async def test_a_hold_of_everything_beside_deliveries_sends_or_holds_each_once(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = await open_durable(tmp_path / str(uuid.uuid4()), clock)
    count = 300
    async with next_hop() as hop, delivery_bench(spool, clock=clock, config=routed(hop.port)) as bench:
        bench.config.loaded = False
        envelopes = [await bench.submit(f"r{number}@x.test") for number in range(count)]
        await settled(bench)
        # Both begin at once; who gets which message is left to them.
        holding = asyncio.create_task(command(bench, Verb.HOLD))
        go(bench)
        changed_count, late_count = await holding
        await bench.until(lambda: bench.types().count("SENT") + changed_count == count)
        await settled(bench)
        states = [row.state for envelope in envelopes for row in await rows_of(bench, envelope)]
        assert states == [State.HELD] * changed_count
        addresses = [taken.recipients[0] for taken in hop.messages]
        assert len(addresses) == len(set(addresses)) == count - changed_count
        assert late_count <= count - changed_count
    await spool.close()


async def test_a_retry_sends_scheduled_mail_at_once_and_release_what_was_held_of_it() -> None:
    async with next_hop() as hop, delivery_bench(config=routed(hop.port)) as bench:
        # Their time is past by the steady clock, which is not theirs.
        bench.clock.now_ms -= 2 * HOUR_MS
        now, held, cancelled = [await put_scheduled(bench) for _ in range(3)]
        bench.clock.now_ms -= HOUR_MS
        bench.clock.advance(3_600)
        await settled(bench)
        assert await command(bench, Verb.CANCEL, cancelled) == (1, 0)
        assert await command(bench, Verb.HOLD, held) == (1, 0)
        assert await command(bench, Verb.RETRY) == (1, 0)
        await hop.took(1)
        await bench.until(lambda: bench.types()[-1] == "SENT")
        await settled(bench)
        assert await rows_of(bench, now) == await rows_of(bench, cancelled) == []
        assert [row.state for row in await rows_of(bench, held)] == [State.HELD]
        assert await command(bench, Verb.RELEASE, held) == (1, 0)
        await hop.took(2)
        await bench.until(lambda: bench.types()[-1] == "SENT")
        assert bench.types() == ["CANCELLED", "HELD", "RETRIED", "SENT", "RELEASED", "SENT"]


async def test_a_reroute_of_scheduled_mail_keeps_its_time_and_its_priority() -> None:
    async with (
        next_hop() as hop,
        next_hop() as other,
        delivery_bench(config=routed(hop.port, (B, other.port))) as bench,
    ):
        envelope = await put_scheduled(bench, priority=5)
        (row,) = await rows_of(bench, envelope)
        assert await command(bench, Verb.REROUTE, envelope, provider=B) == (1, 0)
        await settled(bench)
        bound = make_queue_key(ACCOUNT, B, 5, pinned=True)
        assert await rows_of(bench, envelope) == [row._replace(queue_key=bound)]
        bench.clock.advance(3_600)
        bench.engine.wake(bound)
        await other.took(1)
        assert hop.messages == []


async def test_what_has_a_priority_is_bound_with_it_and_waits_with_it_after_a_failure() -> None:
    async with (
        next_hop() as hop,
        next_hop(Behaviour(mail=lambda _: LATER)) as other,
        delivery_bench(config=routed(hop.port, (B, other.port))) as bench,
    ):
        bench.config.loaded = False
        usual, urgent = [
            await bench.submit(envelope=bench.envelope(priority=priority), key=make_queue_key(ACCOUNT, A, priority))
            for priority in (0, 5)
        ]
        await settled(bench)
        assert await command(bench, Verb.REROUTE, provider=B) == (2, 0)
        go(bench)
        await bench.until(lambda: bench.types().count("DEFERRED") == 2)
        await settled(bench)
        for envelope, priority in ((usual, 0), (urgent, 5)):
            (row,) = await rows_of(bench, envelope)
            assert row.queue_key == make_queue_key(ACCOUNT, B, priority, pinned=True)
        assert hop.messages == []


async def test_held_mail_that_was_scheduled_has_its_lifetime_from_its_time() -> None:
    async with next_hop() as hop, delivery_bench(config=routed(hop.port)) as bench:
        envelope = await put_scheduled(bench, hold_s=10 * 86_400)
        await command(bench, Verb.HOLD, envelope)
        bench.clock.advance(9 * 86_400)
        await bench.engine.held_mail.look()
        assert [row.state for row in await rows_of(bench, envelope)] == [State.HELD]
        bench.clock.advance(7 * 86_400)
        await bench.engine.held_mail.look()
        assert bench.types() == ["HELD", "EXPIRED"]


async def put_scheduled(bench: Bench, *, hold_s: int = 3_600, priority: int = 0) -> Envelope:
    """A message with HOLDFOR as ingress commits it."""
    envelope = bench.envelope(send_time_ms=bench.clock.wall_ms() + hold_s * 1_000, priority=priority)
    key = make_queue_key(ACCOUNT, A, priority)
    row = RecipientRow(0, "b@example.net", State.SCHEDULED, 0, envelope.send_time_ms, priority, key)
    await bench.spool.accept(envelope, CONTENT, [row])
    bench.engine.queued(envelope, [row])
    return envelope


def go(bench: Bench) -> None:
    """Mail may go from now on."""
    bench.config.loaded = True
    bench.engine.config_changed()
