"""REPLICATED mail in delivery: sent under a lease only, never kept here, and PostgreSQL told of all of it."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from dataplane.core.config import Denials
from dataplane.core.envelope import RecipientRow, make_queue_key
from dataplane.core.queue import State
from dataplane.delivery.dispatch import DENIED_DELAY_MS
from dataplane.delivery.engine import AHEAD_BYTES
from support.delivery import ACCOUNT, CONTENT, KEY_A, A, B, Config, delivery_bench
from support.next_hop import STALL, Behaviour, next_hop
from support.spools import ManualClock, make_envelope, open_durable

LARGE = b"Subject: large\r\n\r\n" + b"x" * 60 + b"\r\n" * 200_000


def routed(port: int) -> Config:
    config = Config()
    config.add_provider(A, port)
    config.route_to(A)
    return config


class Lease:
    """What `holds` asks; `looks` counts down to the look at which it is over."""

    def __init__(self, looks: int = 1_000_000) -> None:
        self.looks = looks
        self.asked: list[int] = []

    def __call__(self, epoch: int) -> bool:
        self.asked.append(epoch)
        self.looks -= 1
        return self.looks >= 0


async def test_an_outcome_names_the_lease_and_no_envelope() -> None:
    """PostgreSQL recorded the acceptance before the 250."""
    async with next_hop() as hop, delivery_bench(config=routed(hop.port), holds=Lease()) as bench:
        await bench.submit(envelope=bench.envelope(epoch=7))
        await bench.events_come(1)
        (record,) = bench.records
        assert (record.epoch, record.accepted, bench.types()) == (7, None, ["SENT"])


async def test_local_mail_asks_for_no_lease() -> None:
    lease = Lease(0)
    async with next_hop() as hop, delivery_bench(config=routed(hop.port), holds=lease) as bench:
        await bench.submit()
        await bench.events_come(1)
        assert (bench.types(), bench.records[0].epoch, lease.asked) == (["SENT"], 0, [])


async def test_what_was_deferred_waits_in_postgresql_and_not_here() -> None:
    behaviour = Behaviour(mail=lambda _: b"451 later\r\n")
    async with next_hop(behaviour) as hop, delivery_bench(config=routed(hop.port), holds=Lease()) as bench:
        envelope = await bench.submit(envelope=bench.envelope(epoch=7))
        await bench.events_come(1)
        (update,) = bench.updates
        assert (update.state, update.attempt) == (State.DEFERRED, 1)
        assert update.next_attempt_ms > bench.clock.wall_ms()
        await bench.until(lambda: bench.engine.held()["settlements"] == 0)
        assert await bench.spool.load(envelope.message_id) is None
        assert await bench.spool.keys() == []


async def test_its_lifetime_begins_when_it_is_released() -> None:
    """As that of LOCAL mail: held for longer than its lifetime, it is tried again all the same."""
    behaviour = Behaviour(mail=lambda _: b"451 later\r\n")
    async with next_hop(behaviour) as hop, delivery_bench(config=routed(hop.port), holds=Lease()) as bench:
        now_ms = bench.clock.wall_ms()
        accepted_ms = now_ms - 10 * 86_400_000
        await bench.submit(envelope=replace(bench.envelope(epoch=7), accepted_ms=accepted_ms, send_time_ms=now_ms))
        await bench.submit(envelope=replace(bench.envelope(epoch=7), accepted_ms=accepted_ms))
        await bench.events_come(2)
        assert [update.state for update in bench.updates] == [State.DEFERRED, State.EXPIRED]


async def test_without_a_lease_nothing_is_begun_and_it_was_no_attempt() -> None:
    async with next_hop() as hop, delivery_bench(config=routed(hop.port), holds=Lease(0)) as bench:
        envelope = await bench.submit(envelope=bench.envelope(epoch=7))
        await bench.until(lambda: len(bench.updates) == 1)
        (update,) = bench.updates
        assert (update.state, update.attempt) == (State.QUEUED, 0)
        await bench.until(lambda: bench.engine.held()["settlements"] == 0)
        assert await bench.spool.load(envelope.message_id) is None
        assert not any(command.startswith("MAIL") for command in hop.commands)


async def test_what_outlived_its_lifetime_before_a_dead_next_hop_expires() -> None:
    """PostgreSQL gives it out again and again; it must not do so for ever."""
    async with next_hop() as hop:
        config = routed(hop.port)
    async with delivery_bench(config=config, holds=Lease()) as bench:
        await bench.submit(envelope=bench.envelope(epoch=7))
        await bench.events_come(1)
        old = bench.envelope(epoch=7, accepted_ms=bench.clock.wall_ms() - 6 * 86_400_000)
        rows = [RecipientRow(0, "b@x.test", State.SENDING, 5, bench.clock.wall_ms(), 0, KEY_A)]
        await bench.spool.accept(old, b"x\r\n", rows)
        bench.engine.deliver(old, b"x\r\n", rows)
        await bench.until(lambda: bench.states()[-1:] == ["EXPIRED"])
        assert bench.events[-1].enhanced_code == "4.4.7"


@pytest.mark.parametrize("content", [b"Subject: small\r\n\r\nhi\r\n", LARGE])
async def test_a_lease_that_ends_after_the_envelope_lets_no_dot_leave(content: bytes) -> None:
    lease = Lease(1)
    async with next_hop() as hop, delivery_bench(config=routed(hop.port), holds=lease) as bench:
        await bench.submit(envelope=bench.envelope(content, epoch=7), content=content)
        await bench.until(lambda: len(bench.updates) == 1)
        assert any(command.startswith("DATA") for command in hop.commands)
        assert [(update.state, update.attempt) for update in bench.updates] == [(State.QUEUED, 0)]
        assert hop.messages == []
        assert lease.asked[:2] == [7, 7]


async def test_a_lease_that_ends_within_a_large_content_lets_no_dot_leave() -> None:
    async with next_hop() as hop, delivery_bench(config=routed(hop.port), holds=Lease(3)) as bench:
        await bench.submit(envelope=bench.envelope(LARGE, epoch=7), content=LARGE)
        await bench.until(lambda: len(bench.updates) == 1)
        assert [(update.state, update.attempt) for update in bench.updates] == [(State.QUEUED, 0)]
        assert hop.messages == []


async def test_no_more_is_wanted_of_accounts_that_are_suspended_or_have_enough_in_memory() -> None:
    behaviour = Behaviour(data=STALL)
    async with next_hop(behaviour) as hop, delivery_bench(config=routed(hop.port), holds=Lease()) as bench:
        assert bench.engine.left_out() == set()
        now_ms = bench.clock.wall_ms()
        bench.config.denials = Denials(accounts={"accounts/stopped": 0, "accounts/again": now_ms})
        assert bench.engine.left_out() == {"accounts/stopped"}
        large = b"x" * 78 + b"\r\n"
        content = b"Subject: large\r\n\r\n" + large * (AHEAD_BYTES // len(large))
        await bench.submit(envelope=bench.envelope(content, epoch=7), content=content)
        assert bench.engine.left_out() == {"accounts/stopped", ACCOUNT}


async def test_what_a_command_bound_to_a_provider_goes_there_whatever_the_rules_say() -> None:
    async with next_hop() as hop, next_hop() as other, delivery_bench(holds=Lease()) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.add_provider(B, other.port)
        bench.config.route_to(A)
        envelope = bench.envelope(epoch=7)
        bound = RecipientRow(
            *(0, "b@example.net", State.SENDING, 1, 0, 0), make_queue_key(envelope.account, B, pinned=True)
        )
        await bench.spool.accept(envelope, CONTENT, [bound])
        bench.engine.deliver(envelope, CONTENT, [bound])
        await bench.events_come(1)
        assert (len(hop.messages), len(other.messages)) == (0, 1)


async def test_whose_mail_was_given_back_is_told_once() -> None:
    async with next_hop() as hop, delivery_bench(config=routed(hop.port), holds=Lease(0)) as bench:
        await bench.submit(envelope=bench.envelope(epoch=7))
        await bench.until(lambda: len(bench.updates) == 1)
        assert (bench.engine.take_given_back(), bench.engine.take_given_back()) == ({ACCOUNT}, set())


async def test_mail_for_a_denied_destination_waits_in_postgresql_and_keeps_no_other_back() -> None:
    async with next_hop() as hop, delivery_bench(config=routed(hop.port), holds=Lease()) as bench:
        bench.config.denials = Denials(1, destinations={"destinations/example.net": 0})
        await bench.submit("a@example.net", "b@example.org", envelope=bench.envelope(epoch=7))
        await bench.until(lambda: len(bench.updates) == 2)
        waits, sent = sorted(bench.updates, key=lambda update: update.index)
        assert (waits.state, waits.attempt, sent.state) == (State.QUEUED, 0, State.SENT)
        assert waits.next_attempt_ms == bench.clock.wall_ms() + DENIED_DELAY_MS
        assert [taken.recipients for taken in hop.messages] == [["b@example.org"]]
        assert bench.engine.take_given_back() == set()
        assert await bench.spool.keys() == []


async def test_the_end_of_a_lease_cuts_what_waits_for_a_reply_before_the_dot() -> None:
    lease = Lease()
    behaviour = Behaviour(data=STALL)
    async with next_hop(behaviour) as hop, delivery_bench(config=routed(hop.port), holds=lease) as bench:
        await bench.submit(envelope=bench.envelope(epoch=7))
        await hop.stalled.wait()
        lease.looks = 0
        bench.engine.lease_ended()
        await bench.until(lambda: len(bench.updates) == 1)
        assert [(update.state, update.attempt) for update in bench.updates] == [(State.QUEUED, 0)]


async def test_a_start_reports_what_nobody_saw_end_and_leaves_it_to_postgresql(tmp_path: Path) -> None:
    clock, folder = ManualClock(), tmp_path / str(uuid.uuid4())
    spool = await open_durable(folder, clock)
    envelope = replace(make_envelope(accepted_ms=clock.wall_ms()), epoch=7)
    await spool.accept(envelope, b"x\r\n", [RecipientRow(0, "b@x.test", State.SENDING, 2, clock.wall_ms(), 0, KEY_A)])
    await spool.close()
    spool = await open_durable(folder, clock)
    async with next_hop() as hop, delivery_bench(spool, clock=clock, config=routed(hop.port)) as bench:
        await bench.events_come(1)
        (record,) = bench.records
        assert (record.epoch, record.accepted, bench.types()) == (7, None, ["UNCERTAIN"])
        assert [(update.state, update.attempt) for update in bench.updates] == [(State.QUEUED, 2)]
        await bench.until(lambda: bench.engine.held()["settlements"] == 0)
        assert await spool.load(envelope.message_id) is None
        assert hop.messages == []
    await spool.close()
