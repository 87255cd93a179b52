"""Any sequence of writes, restarts and crashes leaves a spool as a dictionary would be, in RAM and in SQLite.

A crash is the folder as it lies on disk at that moment, without SQLite's shared index, opened elsewhere; what was
written and not yet answered may be there whole or not at all.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataplane.adapters.spool_ram import RamSpool
from dataplane.adapters.spool_sqlite import SpoolLimits, SqliteSpool
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.ids import MessageId
from dataplane.core.queue import TERMINAL, State
from dataplane.ports import KeyHead, RecipientChange, SpoolError, StoredMessage
from support.spools import (
    KEY,
    NOW_MS,
    OTHER_KEY,
    ManualClock,
    change,
    copy_as_it_lies,
    make_envelope,
    make_row,
    open_durable,
    settlement,
)

Result = TypeVar("Result")

SENDABLE = {State.SCHEDULED, State.QUEUED, State.DEFERRED}
LIVE = st.sampled_from([state for state in State if state not in TERMINAL])
OUTCOMES = st.sampled_from(list(State))
SMALL = SpoolLimits(inline_bytes=64, checkpoint_bytes=50_000)


@dataclass
class Message:
    envelope: Envelope
    content: bytes
    rows: dict[int, RecipientRow]
    reported: bool
    sending_since: dict[int, int]


class SpoolMachine(RuleBasedStateMachine):
    durable: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = Path(tempfile.mkdtemp(prefix="postroad-machine-"))
        self.clock = ManualClock()
        self.messages: dict[MessageId, Message] = {}
        self.records: list[bytes] = []
        self.acknowledged = 0
        self.incarnation = 1
        self.folder = self.root / "0" / str(uuid.uuid4())
        self.spool: SqliteSpool | RamSpool

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    async def open(self) -> SqliteSpool | RamSpool:
        return await open_durable(self.folder, self.clock, limits=SMALL) if self.durable else RamSpool(self.clock)

    @initialize()
    def begin(self) -> None:
        self.spool = self.run(self.open())

    def teardown(self) -> None:
        self.run(self.spool.close())
        self.runner.close()
        shutil.rmtree(self.root)

    # --- writes ---

    @rule(
        rows=st.lists(
            st.tuples(LIVE, st.integers(0, 3), st.integers(-1, 1), st.sampled_from([KEY, OTHER_KEY])),
            min_size=1,
            max_size=4,
        ),
        size=st.sampled_from([0, 10, 64, 65, 5_000]),
    )
    def accept(self, rows: list[tuple[State, int, int, str]], size: int) -> None:
        message = self.make(rows, size)
        recipients = list(message.rows.values())

        async def work() -> None:
            await self.spool.accept(message.envelope, message.content, recipients)

        self.run(work())
        self.messages[message.envelope.message_id] = message

    def make(self, rows: list[tuple[State, int, int, str]], size: int) -> Message:
        made = {
            index: make_row(index, state=state, due_ms=NOW_MS + due, priority=priority, queue_key=key)
            for index, (state, due, priority, key) in enumerate(rows)
        }
        sending = {index: self.incarnation for index, row in made.items() if row.state is State.SENDING}
        return Message(make_envelope(), b"x" * size, made, reported=False, sending_since=sending)

    @precondition(lambda self: self.messages)
    @rule(
        data=st.data(),
        stale=st.booleans(),
        record=st.none() | st.binary(max_size=20),
        reported=st.booleans(),
        due=st.integers(0, 3),
    )
    def settle(self, data: st.DataObject, record: bytes | None, due: int, *, stale: bool, reported: bool) -> None:
        message_id = data.draw(st.sampled_from(sorted(self.messages)))
        message = self.messages[message_id]
        indexes = data.draw(st.lists(st.sampled_from(sorted(message.rows)), unique=True))
        changes = [
            change(
                message.rows[index],
                data.draw(OUTCOMES),
                attempt=message.rows[index].attempt + stale,
                new_attempt=message.rows[index].attempt + 1,
                due_ms=NOW_MS + due,
                queue_key=data.draw(st.sampled_from([KEY, OTHER_KEY])),
            )
            for index in indexes
        ]

        async def work() -> int:
            return await self.spool.settle(settlement(message_id, changes, record, reported=reported))

        changed = self.run(work())
        assert changed == (0 if stale else len(changes))
        if changes and stale:
            return
        for each in changes:
            self.apply(message, each)
        message.reported |= reported
        if not message.rows:
            del self.messages[message_id]
        if record is not None:
            self.records.append(record)

    def apply(self, message: Message, each: RecipientChange) -> None:
        message.sending_since.pop(each.index, None)
        if each.state in TERMINAL:
            del message.rows[each.index]
            return
        message.rows[each.index] = message.rows[each.index]._replace(
            state=each.state, attempt=each.new_attempt, due_ms=each.due_ms, queue_key=each.queue_key
        )
        if each.state is State.SENDING:
            message.sending_since[each.index] = self.incarnation

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def settle_twice_in_one_commit(self, data: st.DataObject) -> None:
        message_id = data.draw(st.sampled_from(sorted(self.messages)))
        message = self.messages[message_id]
        index = data.draw(st.sampled_from(sorted(message.rows)))
        ends = settlement(message_id, [change(message.rows[index], State.SENT)], b"sent", reported=True)

        async def work() -> list[int]:
            return list(await asyncio.gather(self.spool.settle(ends), self.spool.settle(ends)))

        assert self.run(work()) == [1, 0]
        self.apply(message, ends.changes[0])
        message.reported = True
        if not message.rows:
            del self.messages[message_id]
        self.records.append(b"sent")

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def accept_again_beside_a_record(self, data: st.DataObject) -> None:
        message = self.messages[data.draw(st.sampled_from(sorted(self.messages)))]

        async def work() -> tuple[Any, int]:
            again = self.spool.accept(message.envelope, b"other", [make_row()])
            written = self.spool.write_record(b"beside")
            return (await asyncio.gather(again, return_exceptions=True))[0], await written

        refused, number = self.run(work())
        assert isinstance(refused, SpoolError)
        self.records.append(b"beside")
        assert number == len(self.records)

    @rule(back=st.integers(-1, 5))
    def acknowledge(self, back: int) -> None:
        number = max(len(self.records) - back, 0)

        async def work() -> None:
            await self.spool.acknowledge(number)

        try:
            self.run(work())
        except SpoolError:
            assert number > len(self.records)
        else:
            self.acknowledged = number
            assert number <= len(self.records)

    # --- ends ---

    @precondition(lambda self: self.durable)
    @rule()
    def restart(self) -> None:
        self.run(self.spool.close())
        self.incarnation += 1
        self.spool = self.run(self.open())
        assert self.spool.identity.incarnation == self.incarnation

    @precondition(lambda self: self.durable)
    @rule(sizes=st.lists(st.sampled_from([10, 5_000]), max_size=3), turns=st.integers(0, 4))
    def crash(self, sizes: list[int], turns: int) -> None:
        unanswered = [self.make([(State.SENDING, 0, 0, KEY), (State.QUEUED, 0, 0, KEY)], size) for size in sizes]

        async def work() -> list[asyncio.Future[None]]:
            futures = [
                self.spool.accept(message.envelope, message.content, list(message.rows.values()))
                for message in unanswered
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            return futures

        answered = [future.done() for future in self.run(work())]
        self.incarnation += 1
        former, self.folder = self.folder, self.root / str(self.incarnation) / self.folder.name
        copy_as_it_lies(former, self.folder)
        self.run(self.spool.close())
        self.spool = self.run(self.open())
        for message, is_answered in zip(unanswered, answered, strict=True):
            found = self.run(self.spool.load(message.envelope.message_id))
            assert found is not None or not is_answered
            if found is not None:
                self.withdraw(message, found)

    def withdraw(self, message: Message, found: StoredMessage) -> None:
        """Which of them were stored is up to threads: Hypothesis, which repeats its draws, must not see it."""
        assert (found.envelope, found.content) == (message.envelope, message.content)
        assert found.recipients == tuple(message.rows.values())
        changes = [change(row, State.CANCELLED) for row in found.recipients]

        async def work() -> int:
            return await self.spool.settle(settlement(message.envelope.message_id, changes, None, reported=True))

        assert self.run(work()) == len(changes)

    # --- what always holds ---

    @invariant()
    def messages_are_those_of_the_model(self) -> None:
        for message_id, message in self.messages.items():
            stored = self.run(self.spool.load(message_id))
            assert stored is not None
            assert stored.envelope == message.envelope
            assert stored.content == message.content
            assert stored.recipients == tuple(message.rows[index] for index in sorted(message.rows))
            assert stored.reported == message.reported
        unreported = sorted(key for key, message in self.messages.items() if not message.reported)
        assert self.run(self.spool.unreported(1_000)) == unreported

    @invariant()
    def queue_is_that_of_the_model(self) -> None:
        waiting: dict[str, list[tuple[int, int, MessageId, int]]] = {}
        for message_id, message in self.messages.items():
            for row in message.rows.values():
                if row.state in SENDABLE:
                    waiting.setdefault(row.queue_key, []).append((row.due_ms, -row.priority, message_id, row.index))
        heads = [KeyHead(key, min(places)[0]) for key, places in sorted(waiting.items())]
        assert self.run(self.spool.keys()) == heads
        for key, places in waiting.items():
            found = self.run(self.spool.heads(key, None, 1_000))
            assert [(due.due_ms, -due.priority, due.message_id, due.index) for due in found] == sorted(places)

    @invariant()
    def counters_are_those_of_the_model(self) -> None:
        stats = self.run(self.spool.stats())
        assert stats.waiting_count == sum(len(message.rows) for message in self.messages.values())
        assert stats.outbox_last == len(self.records)
        assert stats.acknowledged == self.acknowledged
        first, records = self.run(self.spool.records(0, 1_000, 1 << 20))
        assert (first, records) == (1, self.records)
        interrupted = sorted(
            key
            for key, message in self.messages.items()
            if any(since < self.incarnation for since in message.sending_since.values())
        )
        assert self.run(self.spool.interrupted()) == interrupted


class DurableMachine(SpoolMachine):
    durable = True


class RamMachine(SpoolMachine):
    durable = False


_slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
TestDurableSpool = DurableMachine.TestCase
TestDurableSpool.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=_slow
)
TestRamSpool = RamMachine.TestCase
TestRamSpool.settings = settings(max_examples=50, stateful_step_count=30, deadline=None, suppress_health_check=_slow)
