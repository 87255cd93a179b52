"""Commands in a spool: changed and told in one transaction, counted once, the same answer twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from dataplane.adapters.ledger_codec import encode_record
from dataplane.adapters.spool_ram import RamSpool
from dataplane.commands import BATCH_MESSAGES, SLICE_ROWS, CommandRunner, Tools
from dataplane.core.commands import Filter
from dataplane.core.envelope import Envelope, make_queue_key
from dataplane.core.ids import MessageId
from dataplane.core.queue import State, Verb
from dataplane.forwarding import RecordForwarder, pause_after
from dataplane.link import LedgerRecords, Message, RunCommand
from dataplane.ports import RecipientChange, Settlement, SpoolError
from postroad.node.v1.ledger_pb2 import (
    EVENT_TYPE_CANCELLED,
    EVENT_TYPE_FAILED,
    EVENT_TYPE_HELD,
    EVENT_TYPE_RELEASED,
    EVENT_TYPE_REROUTED,
    RECIPIENT_STATE_CANCELLED,
    LedgerRecord,
)
from support.spools import KEY, NOW_MS, OTHER_KEY, ManualClock, make_envelope, make_id, make_row


class Log:
    def info(self, event: str, **fields: object) -> None:
        pass

    def warning(self, event: str, **fields: object) -> None:
        pass


class Engine:
    """What a runner asks of an engine, and what was asked."""

    def __init__(self) -> None:
        self.locked: set[bytes] = set()
        self.ever_locked: list[bytes] = []
        self.woken: set[str] = set()
        self.told = False

    def lock(self, message_id: MessageId) -> bool:
        assert message_id not in self.locked
        self.locked.add(message_id)
        self.ever_locked.append(message_id)
        return self.told

    def unlock(self, message_ids: Iterable[MessageId], queue_keys: Iterable[str]) -> None:
        self.locked.difference_update(message_ids)
        self.woken.update(queue_keys)

    def due_now_ms(self) -> int:
        return NOW_MS + 500


class Bench:
    """A spool with its command runner, and what was woken."""

    def __init__(self) -> None:
        clock = ManualClock()
        self.spool = RamSpool(clock)
        self.name = self.spool.identity.spool
        self.engine = Engine()
        self.tools = Tools({self.name: self.engine}, encode_record, clock, Log())
        self.runner = CommandRunner({self.name: self.spool}, self.tools)

    def restart(self) -> None:
        """A runner that remembers nothing."""
        self.runner = CommandRunner({self.name: self.spool}, self.tools)

    async def accept(self, count: int = 1, accepted_ms: int = NOW_MS, **row: Any) -> Envelope:
        envelope = make_envelope(accepted_ms=accepted_ms)
        await self.spool.accept(envelope, b"content", [make_row(index, **row) for index in range(count)])
        return envelope

    def cancel(
        self, *envelopes: Envelope, command: str = "c1", account: str = "accounts/demo", verb: int = 1
    ) -> RunCommand:
        return RunCommand(command, self.name, verb, account, tuple(e.message_id for e in envelopes))

    def all_of(self, verb: Verb, account: str = "accounts/demo", provider: str = "", **wanted: Any) -> RunCommand:
        """A command with a filter on all mail accepted so far, unless `wanted` says less."""
        described = Filter(wanted.pop("before_ms", NOW_MS + 1), **wanted)
        return RunCommand("f1", self.name, verb, account, (), provider, described)

    async def states(self, *envelopes: Envelope) -> list[list[State]]:
        """States of the recipients that are left of each message."""
        stored = [await self.spool.load(envelope.message_id) for envelope in envelopes]
        return [[row.state for row in one.recipients] if one else [] for one in stored]

    async def records(self) -> list[LedgerRecord]:
        _, encoded = await self.spool.records(0, 10_000, 1 << 24)
        return [LedgerRecord.FromString(record) for record in encoded]

    async def counts(self) -> tuple[int, int, int]:
        """What the ledger adds up: changed, too late, and how many results end the command."""
        results = [one.command_result for one in await self.records() if one.HasField("command_result")]
        changed, late = sum(one.changed_count for one in results), sum(one.too_late_count for one in results)
        return changed, late, sum(not one.partial for one in results)


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
    assert (bench.engine.woken, bench.engine.locked) == ({KEY}, set())


async def test_what_is_being_sent_is_too_late(bench: Bench) -> None:
    envelope = await bench.accept(2)
    claim = RecipientChange(0, 0, State.SENDING, 1, 0, KEY)
    await bench.spool.settle(Settlement(envelope.message_id, (claim,), None, reported=False))
    await bench.runner.run(bench.cancel(envelope))
    (record,) = await bench.records()
    assert (record.command_result.changed_count, record.command_result.too_late_count) == (1, 1)
    assert [update.index for update in record.recipients] == [1]


async def test_a_claim_that_came_first_makes_the_change_void_and_is_too_late(bench: Bench) -> None:
    envelope = await bench.accept(2)
    claim = RecipientChange(0, 0, State.SENDING, 1, 0, KEY)
    # Before the command looks, not yet committed.
    claimed = bench.spool.settle(Settlement(envelope.message_id, (claim,), None, reported=False))
    await bench.runner.run(bench.cancel(envelope))
    assert await claimed == 1
    assert await bench.counts() == (1, 1, 1)
    assert await bench.states(envelope) == [[State.SENDING]]


async def test_what_a_crash_left_held_is_cancelled_with_the_attempts_that_were_begun(bench: Bench) -> None:
    envelope = await bench.accept(state=State.HELD, attempt=3)
    await bench.runner.run(bench.cancel(envelope))
    (record,) = await bench.records()
    assert [update.attempts for update in record.recipients] == [2]


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
    results = [record.command_result for record in await bench.records()]
    assert [result.partial for result in results] == [True, False]
    assert await bench.counts() == (2, 1, 1)


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


async def test_hold_stops_release_lets_go_and_the_ledger_is_told(bench: Bench) -> None:
    envelope = await bench.accept(state=State.DEFERRED, attempt=2, due_ms=NOW_MS + 60_000)
    await bench.runner.run(bench.cancel(envelope, verb=Verb.HOLD))
    assert await bench.states(envelope) == [[State.HELD]]
    await bench.runner.run(bench.cancel(envelope, verb=Verb.RELEASE, command="c2"))
    stored = await bench.spool.load(envelope.message_id)
    assert stored is not None
    assert stored.recipients == (make_row(state=State.QUEUED, attempt=2, due_ms=NOW_MS + 500),)
    held, released = await bench.records()
    assert [
        (int(one.state), one.attempts, one.next_attempt_ms) for one in (*held.recipients, *released.recipients)
    ] == [
        (int(State.HELD), 2, 0),
        (int(State.QUEUED), 2, NOW_MS),
    ]
    assert [event.type for event in (*held.events, *released.events)] == [EVENT_TYPE_HELD, EVENT_TYPE_RELEASED]
    assert held.accepted.recipients
    assert not released.HasField("accepted")


async def test_an_acceptance_that_is_on_its_way_to_the_ledger_is_not_told_again(bench: Bench) -> None:
    envelope = await bench.accept()
    bench.engine.told = True
    await bench.runner.run(bench.cancel(envelope, verb=Verb.HOLD))
    (record,) = await bench.records()
    assert not record.HasField("accepted")


async def test_a_bounce_fails_in_words_of_ours(bench: Bench) -> None:
    envelope = await bench.accept()
    await bench.runner.run(bench.cancel(envelope, verb=Verb.BOUNCE))
    (record,) = await bench.records()
    assert [State(update.state) for update in record.recipients] == [State.FAILED]
    (event,) = record.events
    assert (event.type, event.enhanced_code) == (EVENT_TYPE_FAILED, "5.7.0")
    assert event.reply_text


async def test_a_reroute_tells_the_provider_and_changes_no_state(bench: Bench) -> None:
    envelope = await bench.accept()
    command = bench.cancel(envelope, verb=Verb.REROUTE)._replace(provider="providers/other")
    await bench.runner.run(command)
    pinned = make_queue_key("accounts/demo", "providers/other", pinned=True)
    assert (await bench.spool.walk((MessageId(b""), 0), make_id(), 1))[0].queue_key == pinned
    (record,) = await bench.records()
    assert [(event.type, event.provider) for event in record.events] == [(EVENT_TYPE_REROUTED, "providers/other")]
    assert not record.recipients
    # Both those who waited before and those who go on now are looked at.
    assert bench.engine.woken == {KEY, pinned}


async def test_a_filter_changes_what_it_means_and_nothing_else(bench: Bench) -> None:
    queued, deferred = await bench.accept(), await bench.accept(state=State.DEFERRED)
    elsewhere = await bench.accept(queue_key=OTHER_KEY)
    foreign = await bench.accept(queue_key=make_queue_key("accounts/other", "providers/inbox"))
    later = await bench.accept(accepted_ms=NOW_MS + 10)
    await bench.runner.run(
        bench.all_of(Verb.HOLD, provider="", states=(State.QUEUED,))._replace(
            filter=Filter(NOW_MS + 1, provider="providers/inbox", states=(State.QUEUED,))
        )
    )
    assert await bench.states(queued, deferred, elsewhere, foreign, later) == [
        [State.HELD],
        [State.DEFERRED],
        [State.QUEUED],
        [State.QUEUED],
        [State.QUEUED],
    ]
    assert await bench.counts() == (1, 0, 1)


async def test_a_filter_by_domain_splits_a_message(bench: Bench) -> None:
    envelope = make_envelope()
    rows = [make_row(0)._replace(address="a@example.net"), make_row(1)._replace(address="b@example.org")]
    await bench.spool.accept(envelope, b"content", rows)
    await bench.runner.run(bench.all_of(Verb.CANCEL, recipient_domain="example.org"))
    stored = await bench.spool.load(envelope.message_id)
    assert stored is not None
    assert [row.address for row in stored.recipients] == ["a@example.net"]


async def test_a_filter_for_every_account_reaches_every_account(bench: Bench) -> None:
    envelope = await bench.accept()
    await bench.runner.run(bench.all_of(Verb.CANCEL, account="accounts/-"))
    assert await bench.states(envelope) == [[]]
    assert (await bench.records())[0].account == "accounts/demo"


async def test_an_envelope_of_another_account_is_not_touched_whatever_its_key_says(bench: Bench) -> None:
    envelope = await bench.accept(queue_key=make_queue_key("accounts/other", "providers/inbox"))
    await bench.runner.run(bench.all_of(Verb.CANCEL, account="accounts/other"))
    assert await bench.states(envelope) == [[State.QUEUED]]
    assert await bench.counts() == (0, 0, 1)


async def test_a_filter_of_many_messages_counts_each_recipient_once(bench: Bench) -> None:
    sending = [await bench.accept(3, state=State.SENDING, attempt=1) for _ in range(70)]
    waiting = [await bench.accept(3) for _ in range(200)]
    # More recipients than a slice of the walk has.
    wide = await bench.accept(SLICE_ROWS + 50)
    await bench.runner.run(bench.all_of(Verb.HOLD))
    assert await bench.counts() == (650 + SLICE_ROWS, 210, 1)
    assert await bench.states(sending[0], waiting[-1]) == [[State.SENDING] * 3, [State.HELD] * 3]
    assert set(*await bench.states(wide)) == {State.HELD}
    assert bench.engine.ever_locked.count(wide.message_id) == 1
    assert not bench.engine.locked


async def test_a_message_wider_than_slices_of_the_walk_is_looked_at_once(bench: Bench) -> None:
    for _ in range(BATCH_MESSAGES):
        await bench.accept()
    wide = await bench.accept(3 * SLICE_ROWS, state=State.SENDING, attempt=1)
    await bench.runner.run(bench.all_of(Verb.CANCEL))
    assert await bench.counts() == (BATCH_MESSAGES, 3 * SLICE_ROWS, 1)
    assert bench.engine.ever_locked.count(wide.message_id) == 1


async def test_a_filter_begun_anew_goes_on_behind_what_was_told_and_counts_nothing_twice(bench: Bench) -> None:
    late = [await bench.accept(state=State.SENDING, attempt=1) for _ in range(BATCH_MESSAGES)]
    waiting = [await bench.accept() for _ in range(BATCH_MESSAGES + 5)]
    command = bench.all_of(Verb.HOLD)
    spool: Any = FailingSpool(bench.spool, 3)
    failing = CommandRunner({bench.name: spool}, bench.tools)
    with pytest.raises(SpoolError):
        await failing.run(command)
    assert not bench.engine.locked
    told = [record.command_result for record in await bench.records()]
    position = next(one.position for one in reversed(told) if one.position)
    assert position >= late[-1].message_id
    assert command.filter is not None
    bench.restart()
    again = command._replace(filter=command.filter._replace(after=MessageId(position)))
    await bench.runner.run(again)
    assert await bench.counts() == (len(waiting), len(late), 1)
    # And from the beginning, as if nothing had been told.
    bench.restart()
    await bench.runner.run(command)
    assert (await bench.counts())[0] == len(waiting)


class FailingSpool:
    """A spool that refuses the n-th record of its own: the disk was full for a moment."""

    def __init__(self, spool: RamSpool, left: int) -> None:
        self._spool = spool
        self._left = left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._spool, name)

    def write_record(self, record: bytes) -> asyncio.Future[int]:
        self._left -= 1
        if self._left == 0:
            refused: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            refused.set_exception(SpoolError("full"))
            return refused
        return self._spool.write_record(record)


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
