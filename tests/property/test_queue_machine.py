"""The rules by which mail waits, is sent and ends, on real spools beside a plain model: nothing lost, nothing twice.

What is accepted, claimed, settled, put back, held, released, cancelled, expired and, where the spool is durable, cut by
a crash and recovered, goes by the code that workers run. The model is a state and a count of attempts for each
recipient. The ledger is what the spool's own records say when they are read in order, as the control plane reads them:
each recipient ends there once at most, is sent once at most, and what has not ended waits in the spool.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dataplane.adapters.spool_ram import RamSpool
from dataplane.adapters.spool_sqlite import SpoolLimits, SqliteSpool
from dataplane.commands import CommandRunner, Tools
from dataplane.core.config import RetryPolicy
from dataplane.core.envelope import RecipientRow
from dataplane.core.ids import MessageId
from dataplane.core.ledger import LedgerRecord
from dataplane.core.queue import TERMINAL, EventType, State, Verb
from dataplane.core.transaction import Verdict, VerdictKind
from dataplane.delivery.attempt import Message
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.held import HeldMail
from dataplane.delivery.outcome import Concluder, Facts, Moment, claim, claimed, put_back
from dataplane.delivery.recovery import Recovery
from dataplane.delivery.settler import Settler
from dataplane.link import RunCommand
from dataplane.ports import StoredMessage
from support.ingress import Log
from support.spools import KEY, ManualClock, copy_as_it_lies, make_envelope, make_row, open_durable

Result = TypeVar("Result")

POLICY = RetryPolicy()
SMALL = SpoolLimits(inline_bytes=64, checkpoint_bytes=50_000)
DUE = {State.QUEUED, State.DEFERRED}
ENDS = {
    VerdictKind.SENT: State.SENT,
    VerdictKind.PERMANENT: State.BOUNCED,
    VerdictKind.REFUSED: State.FAILED,
    VerdictKind.TEMPORARY: State.DEFERRED,
    VerdictKind.INTERRUPTED: State.DEFERRED,
    VerdictKind.UNCERTAIN: State.DEFERRED,
}
COMMANDS = {
    Verb.CANCEL: (DUE | {State.HELD}, State.CANCELLED),
    Verb.BOUNCE: (DUE | {State.HELD}, State.FAILED),
    Verb.HOLD: (DUE, State.HELD),
    Verb.RELEASE: ({State.HELD}, State.QUEUED),
}


@dataclass
class Recipient:
    """What the model knows: its state, and how many attempts began."""

    state: State
    begun: int = 0


@dataclass
class Attempt:
    """What somebody who sends holds on to: the message as it was read, and its rows as they were claimed."""

    message: Message
    rows: tuple[RecipientRow, ...]


@dataclass
class Ledger:
    """What the records say. `ends` and `sent` count by recipient."""

    accepted: dict[MessageId, int] = field(default_factory=dict)
    states: dict[tuple[MessageId, int], State] = field(default_factory=dict)
    ends: dict[tuple[MessageId, int], int] = field(default_factory=dict)
    sent: dict[tuple[MessageId, int], list[int]] = field(default_factory=dict)

    def read(self, records: Iterable[LedgerRecord]) -> Ledger:
        for record in records:
            message_id = record.message_id
            if record.accepted is not None:
                assert message_id not in self.accepted, "an acceptance is told once"
                self.accepted[message_id] = len(record.recipients_accepted)
            for update in record.updates:
                key = (message_id, update.index)
                self.states[key] = State(update.state)
                self.ends[key] = self.ends.get(key, 0) + (update.state in TERMINAL)
            for event in record.events:
                for index in event.indexes if event.type is EventType.SENT else ():
                    self.sent.setdefault((message_id, index), []).append(event.attempt)
        return self


class Resting:
    """A `commands.Delivery` that has nothing on its way."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock

    def lock(self, message_id: MessageId) -> bool:
        return False

    def unlock(self, message_ids: Iterable[MessageId], queue_keys: Iterable[str]) -> None:
        pass

    def due_now_ms(self) -> int:
        return self._clock.wall_ms()


class QueueMachine(RuleBasedStateMachine):
    durable: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = Path(tempfile.mkdtemp(prefix="postroad-queue-"))
        self.clock = ManualClock()
        self.model: dict[MessageId, dict[int, Recipient]] = {}
        self.accepted: dict[MessageId, tuple[int, int]] = {}  # when, and for how many
        self.ends: dict[tuple[MessageId, int], State] = {}
        self.under_way: list[Attempt] = []
        self.superseded: list[Attempt] = []
        self.told: list[LedgerRecord] = []
        self.incarnation = 1
        self.folder = self.root / "1" / str(uuid.uuid4())
        self.spool: SqliteSpool | RamSpool

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    async def open(self) -> SqliteSpool | RamSpool:
        return await open_durable(self.folder, self.clock, limits=SMALL) if self.durable else RamSpool(self.clock)

    @initialize()
    def begin(self) -> None:
        self.spool = self.run(self.open())

    # --- what the code under test is given ---

    def encode(self, record: LedgerRecord) -> bytes:
        """A record by its number; which of them count is up to the spool."""
        self.told.append(record)
        return str(len(self.told) - 1).encode()

    def moment(self) -> Moment:
        return Moment(self.clock.wall_ms(), self.clock.wall_ms())

    @property
    def concluder(self) -> Concluder:
        return Concluder(self.encode)

    async def settle(self, made: Any) -> int:
        return await self.spool.settle(made)

    def load(self, message_id: MessageId) -> StoredMessage | None:
        return self.run(self.spool.load(message_id))

    def choose(self, data: st.DataObject) -> MessageId:
        return data.draw(st.sampled_from(sorted(self.model)))

    # --- the rules ---

    @rule(count=st.integers(1, 3), handed_on=st.booleans(), size=st.sampled_from([10, 5_000]))
    def accept(self, count: int, size: int, *, handed_on: bool) -> None:
        """`handed_on`: as for a message that goes on in memory, which is committed as its first attempt."""
        state, attempt = (State.SENDING, 1) if handed_on else (State.QUEUED, 0)
        envelope = make_envelope(accepted_ms=self.clock.wall_ms())
        rows = tuple(
            make_row(index, state=state, attempt=attempt, due_ms=self.clock.wall_ms()) for index in range(count)
        )

        async def work() -> None:
            await self.spool.accept(envelope, b"x" * size, rows)

        self.run(work())
        self.model[envelope.message_id] = {row.index: Recipient(state, attempt) for row in rows}
        self.accepted[envelope.message_id] = (envelope.accepted_ms, count)
        if handed_on:
            addresses = tuple(row.address for row in rows)
            self.under_way.append(Attempt(Message(envelope, b"", addresses, reported=False), rows))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        """Begin an attempt of what is due; one who read before somebody else began it begins nothing."""
        stored = self.load(self.choose(data))
        assert stored is not None
        rows = tuple(row for row in stored.recipients if row.state in DUE and row.due_ms <= self.clock.wall_ms())
        if not rows:
            return
        message = self.message_of(stored)
        assert self.run(self.settle(claim(message, rows))) == len(rows)
        assert self.run(self.settle(claim(message, rows))) == 0, "an attempt begins once"
        for row in rows:
            known = self.model[message.envelope.message_id][row.index]
            known.state = State.SENDING
            known.begun += 1
        self.under_way.append(Attempt(message, claimed(rows)))

    def message_of(self, stored: StoredMessage) -> Message:
        addresses = () if stored.reported else tuple(row.address for row in stored.recipients)
        return Message(stored.envelope, b"", addresses, stored.reported)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), kinds=st.lists(st.sampled_from(list(VerdictKind)), min_size=3, max_size=3))
    def conclude(self, data: st.DataObject, kinds: list[VerdictKind]) -> None:
        """An attempt ends, each recipient in its way: for good, deferred, or expired when its lifetime is over."""
        attempt = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        self.superseded.append(attempt)
        ends = [(row, Verdict(kind, 0, "", "")) for row, kind in zip(attempt.rows, kinds, strict=False)]
        # The envelope is in the first record that tells of the message, whoever wrote it.
        stored = self.load(attempt.message.envelope.message_id)
        attempt.message.reported = stored is not None and stored.reported
        made = self.concluder.conclude(attempt.message, ends, Facts(), POLICY, self.moment(), 0.5)
        assert self.run(self.settle(made.settlement)) == len(ends)
        for row, verdict in ends:
            state = ENDS[verdict.kind]
            over = self.is_over(attempt.message.envelope.message_id)
            self.move(attempt.message.envelope.message_id, row.index, State.EXPIRED if state in DUE and over else state)

    @precondition(lambda self: any(map(self.is_past, self.superseded)))
    @rule(data=st.data())
    def conclude_once_more(self, data: st.DataObject) -> None:
        """An outcome of an attempt that is no more changes nothing, and no record tells of it."""
        attempt = data.draw(st.sampled_from([one for one in self.superseded if self.is_past(one)]))
        ends = [(row, Verdict(VerdictKind.SENT, 0, "", "")) for row in attempt.rows]
        message = Message(attempt.message.envelope, b"", (), reported=True)
        made = self.concluder.conclude(message, ends, Facts(), POLICY, self.moment(), 0.5)
        assert self.run(self.settle(made.settlement)) == 0

    def is_past(self, attempt: Attempt) -> bool:
        """Whether its number is no recipient's: ended, held, or in a later attempt."""
        recipients = self.model.get(attempt.message.envelope.message_id, {})
        known = [(recipients.get(row.index), row.attempt) for row in attempt.rows]
        return all(one is None or one.state is State.HELD or one.begun > number for one, number in known)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        """An attempt is taken back before it began to be sent: it was none."""
        # Another one gets its number, so that nothing tells its outcome from that one's.
        attempt = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        made = put_back(attempt.message, attempt.rows, self.clock.wall_ms())
        assert self.run(self.settle(made)) == len(attempt.rows)
        for row in attempt.rows:
            known = self.model[attempt.message.envelope.message_id][row.index]
            known.state, known.begun = State.QUEUED, known.begun - 1

    @precondition(lambda self: self.model)
    @rule(data=st.data(), verb=st.sampled_from(list(COMMANDS)))
    def command(self, data: st.DataObject, verb: Verb) -> None:
        """Hold, release, cancel or give up what waits; what is being sent is too late for it."""
        message_id = self.choose(data)
        self.carry_out(verb, message_id)
        concerned, state = COMMANDS[verb]
        for index, known in list(self.model[message_id].items()):
            if known.state in concerned:
                self.move(message_id, index, state)

    def carry_out(self, verb: Verb, message_id: MessageId) -> None:
        engines = {"spool": Resting(self.clock)}
        runner = CommandRunner({"spool": self.spool}, Tools(engines, self.encode, self.clock, Log()))
        self.run(runner.run(RunCommand(str(uuid.uuid4()), "spool", verb, "accounts/demo", (message_id,))))

    @rule(seconds=st.sampled_from([1, 60, 3_600, 86_400, 6 * 86_400]))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule(outlived=st.booleans())
    def end_held_mail(self, *, outlived: bool) -> None:
        """What is held ends with its lifetime, though no attempt of it fails; nothing else ends by it."""
        self.clock.advance(POLICY.lifetime_s if outlived else 0)
        keeper = HeldMail(self.spool, self.encode, self.moment, lambda _: POLICY, DeliveryCounters(), Log())
        self.run(keeper.look())
        for message_id in [one for one in self.model if self.is_over(one)]:
            for index, known in list(self.model[message_id].items()):
                if known.state is State.HELD:
                    self.move(message_id, index, State.EXPIRED)

    @precondition(lambda self: self.durable)
    @rule(orderly=st.booleans())
    def crash(self, *, orderly: bool) -> None:
        """The worker ends, its folder is as it lies on disk, and the next one puts back what was being sent."""
        self.incarnation += 1
        if orderly:
            self.run(self.spool.close())
        else:
            former, self.folder = self.folder, self.root / str(self.incarnation) / self.folder.name
            copy_as_it_lies(former, self.folder)
            self.run(self.spool.close())
        self.spool = self.run(self.open())
        self.superseded += self.under_way
        self.under_way.clear()
        self.run(self.recover())
        for message_id, recipients in self.model.items():
            for index, known in recipients.items():
                if known.state is State.SENDING:
                    self.move(message_id, index, State.QUEUED)

    async def recover(self) -> None:
        counters, log = DeliveryCounters(), Log()
        settler = Settler(self.spool, counters, log)
        recovery = Recovery(
            self.spool, settler, self.concluder, counters, log, self.moment, lambda: 0.5, lambda _: POLICY
        )
        await recovery.recover_interrupted()
        await recovery.report_unreported()
        assert log.events().count("delivery.settle_failed") == 0

    # --- the model ---

    def is_over(self, message_id: MessageId) -> bool:
        return self.clock.wall_ms() - self.accepted[message_id][0] >= POLICY.lifetime_s * 1_000

    def move(self, message_id: MessageId, index: int, state: State) -> None:
        self.model[message_id][index].state = state
        if state in TERMINAL:
            self.ended(message_id, index, state)

    def ended(self, message_id: MessageId, index: int, state: State) -> None:
        self.ends[message_id, index] = state
        del self.model[message_id][index]
        if not self.model[message_id]:
            del self.model[message_id]

    # --- what always holds ---

    @invariant()
    def who_has_not_ended_is_in_the_spool(self) -> None:
        for message_id in self.accepted:
            stored = self.load(message_id)
            found = {row.index: (row.state, row.attempt) for row in (stored.recipients if stored else ())}
            expected = {
                index: (one.state, one.begun + (one.state is State.HELD))
                for index, one in self.model.get(message_id, {}).items()
            }
            assert found == expected
        due = self.run(self.spool.heads(KEY, None, 1_000))
        assert sorted((one.message_id, one.index) for one in due) == sorted(
            (message_id, index)
            for message_id, recipients in self.model.items()
            for index, one in recipients.items()
            if one.state in DUE
        )

    @invariant()
    def the_ledger_tells_each_end_once(self) -> None:
        ledger = self.ledger()
        assert ledger.accepted == {
            message_id: count
            for message_id, (_, count) in self.accepted.items()
            if message_id not in self.model or self.is_told(message_id)
        }
        ends = {key: ledger.states[key] for key, count in ledger.ends.items() if count}
        assert ends == self.ends
        assert set(ledger.ends.values()) <= {0, 1}
        assert {key for key, attempts in ledger.sent.items() if len(attempts) == 1} == {
            key for key, state in self.ends.items() if state is State.SENT
        }

    def is_told(self, message_id: MessageId) -> bool:
        stored = self.load(message_id)
        return stored is not None and stored.reported

    def ledger(self) -> Ledger:
        first, records = self.run(self.spool.records(0, 10_000, 1 << 24))
        assert first == 1
        return Ledger().read(self.told[int(one)] for one in records)

    def teardown(self) -> None:
        """Whatever happened, all mail can be brought to its end."""
        try:
            self.finish()
            assert len(self.ends) == sum(count for _, count in self.accepted.values())
            self.the_ledger_tells_each_end_once()
        finally:
            self.run(self.spool.close())
            self.runner.close()
            shutil.rmtree(self.root)

    def finish(self) -> None:
        while self.under_way:
            self.end(self.under_way.pop())
        for message_id in list(self.model):
            self.carry_out(Verb.RELEASE, message_id)
        self.clock.advance(3_600)
        for message_id in list(self.model):
            stored = self.load(message_id)
            assert stored is not None
            assert self.run(self.settle(claim(self.message_of(stored), stored.recipients))) == len(stored.recipients)
            self.end(Attempt(self.message_of(stored), claimed(stored.recipients)))

    def end(self, attempt: Attempt) -> None:
        """Sent to all of its recipients."""
        message_id = attempt.message.envelope.message_id
        attempt.message.reported = self.is_told(message_id)
        ends = [(row, Verdict(VerdictKind.SENT, 250, "", "")) for row in attempt.rows]
        made = self.concluder.conclude(attempt.message, ends, Facts(), POLICY, self.moment(), 0.5)
        assert self.run(self.settle(made.settlement)) == len(ends)
        for row in attempt.rows:
            self.move(message_id, row.index, State.SENT)


class DurableMachine(QueueMachine):
    durable = True


class RamMachine(QueueMachine):
    durable = False


_slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
# The same runs every time; the nightly ones are others each time.
_short = settings(max_examples=25, stateful_step_count=25, derandomize=True, deadline=None, suppress_health_check=_slow)
TestDurableQueue = DurableMachine.TestCase
TestDurableQueue.settings = _short
TestRamQueue = RamMachine.TestCase
TestRamQueue.settings = settings(_short, max_examples=50)


@pytest.mark.nightly
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("machine", [DurableMachine, RamMachine])
def test_many_long_runs_of_the_queue(machine: type[QueueMachine]) -> None:
    long = settings(max_examples=400, stateful_step_count=50, deadline=None, suppress_health_check=_slow)
    run_state_machine_as_test(machine, settings=long)
