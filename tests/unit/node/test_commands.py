"""Cancelling: caught before the scheduler, told in one transaction, the same answer twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dataplane.adapters.ledger_codec import encode_record
from dataplane.adapters.spool_ram import RamSpool
from dataplane.commands import CommandRunner
from dataplane.core.envelope import Envelope
from dataplane.core.queue import State
from dataplane.forwarding import RecordForwarder, pause_after
from dataplane.link import LedgerRecords, Message, RunCommand
from dataplane.ports import RecipientChange, Settlement
from postroad.node.v1.ledger_pb2 import (
    EVENT_TYPE_CANCELLED,
    RECIPIENT_STATE_CANCELLED,
    LedgerRecord,
)
from support.spools import KEY, ManualClock, make_envelope, make_row


class Log:
    def info(self, event: str, **fields: object) -> None:
        pass

    def warning(self, event: str, **fields: object) -> None:
        pass


class Bench:
    """A spool with its command runner, and what was woken."""

    def __init__(self) -> None:
        clock = ManualClock()
        self.spool = RamSpool(clock)
        self.name = self.spool.identity.spool
        self.woken: list[tuple[str, str]] = []
        self.runner = CommandRunner(
            {self.name: self.spool}, encode_record, clock, Log(), lambda spool, key: self.woken.append((spool, key))
        )

    async def accept(self, count: int = 1, **row: Any) -> Envelope:
        envelope = make_envelope()
        await self.spool.accept(envelope, b"content", [make_row(index, **row) for index in range(count)])
        return envelope

    def cancel(
        self, *envelopes: Envelope, command: str = "c1", account: str = "accounts/demo", verb: int = 1
    ) -> RunCommand:
        return RunCommand(command, self.name, verb, account, tuple(e.message_id for e in envelopes))

    async def records(self) -> list[LedgerRecord]:
        _, encoded = await self.spool.records(0, 100, 1 << 20)
        return [LedgerRecord.FromString(record) for record in encoded]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.spool.close()


async def test_waiting_recipients_are_cancelled_and_the_one_record_says_everything(bench: Bench) -> None:
    envelope = await bench.accept(2)
    await bench.runner.run(bench.cancel(envelope))
    (record,) = await bench.records()
    assert [update.state for update in record.recipients] == [RECIPIENT_STATE_CANCELLED] * 2
    assert [update.attempts for update in record.recipients] == [0, 0]
    assert [(event.type, list(event.indexes)) for event in record.events] == [(EVENT_TYPE_CANCELLED, [0, 1])]
    assert list(record.accepted.recipients) == [make_row(0).address, make_row(1).address]
    assert (record.command_result.command, record.command_result.changed_count) == ("c1", 2)
    assert record.command_result.too_late_count == 0
    assert await bench.spool.load(envelope.message_id) is None
    assert bench.woken == [(bench.name, KEY)]


async def test_what_is_being_sent_is_too_late(bench: Bench) -> None:
    envelope = await bench.accept(2)
    claim = RecipientChange(0, 0, State.SENDING, 1, 0, KEY)
    await bench.spool.settle(Settlement(envelope.message_id, (claim,), None, reported=False))
    await bench.runner.run(bench.cancel(envelope))
    (record,) = await bench.records()
    assert (record.command_result.changed_count, record.command_result.too_late_count) == (1, 1)
    assert [update.index for update in record.recipients] == [1]


async def test_a_claim_that_was_on_its_way_loses_against_a_cancel_that_came_first(bench: Bench) -> None:
    envelope = await bench.accept()
    held = RecipientChange(0, 0, State.HELD, 1, 0, KEY)
    claim = RecipientChange(0, 0, State.SENDING, 1, 0, KEY)
    await bench.spool.settle(Settlement(envelope.message_id, (held,), None, reported=False))
    assert await bench.spool.settle(Settlement(envelope.message_id, (claim,), None, reported=False)) == 0
    await bench.runner.run(bench.cancel(envelope))
    assert await bench.spool.load(envelope.message_id) is None


async def test_messages_that_are_gone_or_somebody_elses_are_too_late_alike(bench: Bench) -> None:
    envelope = await bench.accept()
    await bench.runner.run(bench.cancel(envelope, account="accounts/other"))
    await bench.runner.run(bench.cancel(make_envelope(), command="c2"))
    results = [record.command_result for record in await bench.records()]
    assert [(r.changed_count, r.too_late_count) for r in results] == [(0, 1), (0, 1)]
    assert await bench.spool.load(envelope.message_id) is not None


async def test_many_messages_give_one_result_in_the_last_record(bench: Bench) -> None:
    first, second = await bench.accept(), await bench.accept()
    await bench.runner.run(bench.cancel(first, make_envelope(), second))
    records = await bench.records()
    assert [record.HasField("command_result") for record in records] == [False, True]
    result = records[1].command_result
    assert (result.changed_count, result.too_late_count) == (2, 1)


async def test_the_same_command_twice_answers_the_same(bench: Bench) -> None:
    envelope = await bench.accept()
    await bench.runner.run(bench.cancel(envelope))
    await bench.runner.run(bench.cancel(envelope))
    results = [record.command_result for record in await bench.records()]
    assert results[0] == results[1]


async def test_an_unknown_verb_is_reported_as_failed(bench: Bench) -> None:
    envelope = await bench.accept()
    await bench.runner.run(bench.cancel(envelope, verb=99))
    (record,) = await bench.records()
    assert "99" in record.command_result.error
    assert await bench.spool.load(envelope.message_id) is not None


async def test_a_command_for_a_spool_of_others_is_ignored(bench: Bench) -> None:
    await bench.runner.run(RunCommand("c", "other", 1, "accounts/demo", ()))
    assert await bench.records() == []


class Agent:
    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, message: Message) -> bool:
        self.sent.append(message)
        return True


async def test_records_go_out_when_they_are_wanted_and_once(bench: Bench) -> None:
    agent = Agent()
    forwarder = RecordForwarder({bench.name: bench.spool}, agent.send, Log())
    await bench.spool.write_record(b"one")
    await bench.spool.write_record(b"two")
    assert not await forwarder.answer()
    forwarder.pull(bench.name, 0)
    await forwarder.answer()
    await forwarder.answer()
    assert agent.sent == [LedgerRecords(bench.name, 1, 1, [b"one", b"two"])]
    forwarder.stored(bench.name, 2)
    forwarder.pull(bench.name, 2)
    await forwarder.answer()
    assert len(agent.sent) == 1
    await bench.spool.write_record(b"a commit later")
    assert (await bench.spool.stats()).acknowledged == 2


async def test_a_full_batch_is_followed_at_once(bench: Bench) -> None:
    agent = Agent()
    forwarder = RecordForwarder({bench.name: bench.spool}, agent.send, Log())
    await asyncio.gather(*(bench.spool.write_record(b"r") for _ in range(1_500)))
    forwarder.pull(bench.name, 0)
    assert pause_after(await forwarder.answer()) == 0.0
    forwarder.pull(bench.name, 1_000)
    assert pause_after(await forwarder.answer()) > 0.0
    assert [len(m.records) for m in agent.sent if isinstance(m, LedgerRecords)] == [1_000, 500]


def test_batches_gather_longer_while_records_come_fast() -> None:
    assert 0.0 < pause_after(0) == pause_after(19) < pause_after(20) == pause_after(999)


async def test_a_pause_and_a_lost_agent_take_the_wish_back(bench: Bench) -> None:
    agent = Agent()
    forwarder = RecordForwarder({bench.name: bench.spool}, agent.send, Log())
    await bench.spool.write_record(b"one")
    forwarder.pull(bench.name, 0)
    assert forwarder.is_served(bench.name)
    forwarder.pause(bench.name)
    assert not forwarder.is_served(bench.name)
    forwarder.pull("unknown", 0)
    await forwarder.answer()
    forwarder.pull(bench.name, 0)
    forwarder.agent_lost()
    await forwarder.answer()
    assert agent.sent == []
