"""The replicated queue in PostgreSQL under the rules of waiting mail, beside the plain model of `test_queue_machine`.

Two nodes claim, confirm, settle, give back and lose leases; what was claimed under a lease that ended, or is not
confirmed, returns; what a lost lease says comes too late. No recipient is lost, none is with two nodes at a time, and
an attempt's number is nobody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
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

from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.queue import PostgresQueue
from controlplane.adapters.postgres.queue_commands import QUEUE_SPOOL
from controlplane.ports_queue import Claimed
from dataplane.core.queue import TERMINAL, State, Verb
from support.databases import Database
from support.fleet import NOW_MS, add_node, changed, execute, fetch, fleet_database, text_id, update
from support.replicated import Holder, add_account, end_lease

Result = TypeVar("Result")

NODES = ("edge-1", "edge-2")
FAR_MS = NOW_MS + 86_400_000
TABLES = (
    "replicated_queue, queue_recipients, queue_contents, node_leases, commands, messages, recipients, delivery_events,"
    " spools, nodes, accounts"
)
OUTCOMES = [State.SENT, State.BOUNCED, State.EXPIRED, State.DEFERRED, State.QUEUED]


@dataclass
class Recipient:
    """What the model knows: its state, how many attempts began, and whether it is due."""

    state: State
    begun: int
    due: bool = True


@dataclass
class Message:
    """Recipients that have not ended, the lease that holds it (0: none), and whether that was confirmed."""

    recipients: dict[int, Recipient]
    epoch: int = 0
    claim_id: str = ""


@dataclass
class Attempt:
    """What a node holds on to of a message that it claimed or sends."""

    node: str
    raw_id: bytes
    epoch: int
    rows: dict[int, int] = field(default_factory=dict)  # index to attempt


class ReplicatedMachine(RuleBasedStateMachine):
    database: ClassVar[Database]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.holders: dict[str, Holder] = {}
        self.model: dict[bytes, Message] = {}
        self.ends: dict[tuple[bytes, int], State] = {}
        self.accepted: dict[bytes, int] = {}
        self.attempts: list[Attempt] = []
        self.claims: list[Attempt] = []
        self.later = timedelta()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    @initialize()
    def begin(self) -> None:
        self.run(self._begin())

    async def _begin(self) -> None:
        await execute(self.database, f"TRUNCATE postroad.{TABLES.replace(', ', ', postroad.')} CASCADE")
        await add_account(self.database)
        fleet = await self.stack.enter_async_context(fleet_database(self.database))
        ledger = PostgresLedger(fleet, retention=timedelta(days=30))
        for node in NODES:
            await add_node(self.database, node)
            self.holders[node] = await Holder(PostgresQueue(fleet, ledger), ledger, node).begin()

    # --- rules

    @rule(node=st.sampled_from(NODES), count=st.integers(1, 3), sending=st.booleans())
    def store(self, node: str, count: int, *, sending: bool) -> None:
        holder = self.holders[node]
        names = [f"{index}@example.net" for index in range(count)]
        raw_id = self.run(holder.store(*names, sending=sending))
        state, begun = (State.SENDING, 1) if sending else (State.QUEUED, 0)
        self.model[raw_id] = Message({index: Recipient(state, begun) for index in range(count)})
        self.accepted[raw_id] = count
        if sending:
            self.model[raw_id].epoch = holder.epoch
            self.attempts.append(Attempt(node, raw_id, holder.epoch, dict.fromkeys(range(count), 1)))

    @rule(node=st.sampled_from(NODES))
    def claim(self, node: str) -> None:
        self.took(node, *self.run(self.holders[node].claim(adopt=False)))

    @rule(node=st.sampled_from(NODES))
    def claim_a_little_later(self, node: str) -> None:
        """What was claimed and not confirmed for a minute returns, and was no attempt."""
        for message in self.model.values():
            if message.claim_id:
                self.return_(message, uncertain=False)
        self.later += timedelta(seconds=120)
        self.took(node, *self.run(self.holders[node].claim(now=datetime.now(UTC) + self.later, adopt=False)))

    @rule(node=st.sampled_from(NODES))
    def lose_the_lease(self, node: str) -> None:
        """It ends, the other node adopts what it held, and the loser begins a new one."""
        holder, other = self.holders[node], self.holders[NODES[node == NODES[0]]]
        self.run(end_lease(self.database, holder.epoch))
        for message in self.model.values():
            if message.epoch == holder.epoch:
                self.return_(message, uncertain=not message.claim_id)
        self.took(other.node, *self.run(other.claim()))
        holder.epoch = self.run(holder.queue.renew(holder.node, holder.spool, holder.epoch)).epoch

    def return_(self, message: Message, *, uncertain: bool) -> None:
        for known in message.recipients.values():
            if known.state is State.SENDING:
                known.state, known.due = State.QUEUED, True
                known.begun -= not uncertain
        message.epoch, message.claim_id = 0, ""

    def took(self, node: str, claim_id: str, claimed: list[Claimed]) -> None:
        """Exactly what is due and nobody's is given, each with its next attempt."""
        waiting = {
            raw_id
            for raw_id, message in self.model.items()
            if not message.epoch and any(one.due and one.state is not State.HELD for one in message.recipients.values())
        }
        assert {one.message_id for one in claimed} == waiting
        assert len(claimed) == len(waiting)
        for one in claimed:
            message = self.model[one.message_id]
            for known in message.recipients.values():
                if known.due and known.state is not State.HELD:
                    known.state = State.SENDING
                    known.begun += 1
            message.epoch, message.claim_id = self.holders[node].epoch, claim_id
            rows = {index: known.begun for index, known in message.recipients.items() if known.state is State.SENDING}
            assert {row.index: row.attempt for row in one.recipients} == rows
            self.claims.append(Attempt(node, one.message_id, message.epoch, rows))

    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        """Begin to send what was claimed; another lease that names it gets nothing."""
        claims = sorted({(one.epoch, one.claim_id) for one in self.model.values() if one.claim_id})
        if not claims:
            return
        self.confirm_claim(*data.draw(st.sampled_from(claims)))

    def confirm_claim(self, epoch: int, claim_id: str) -> None:
        raw_ids = [raw_id for raw_id, one in self.model.items() if one.claim_id == claim_id]
        for holder in self.holders.values():
            named = [Claimed(raw_id, b"", (), None) for raw_id in raw_ids]
            confirmed = self.run(holder.confirm(claim_id, named))
            assert sorted(confirmed) == (sorted(raw_ids) if holder.epoch == epoch else [])
        for raw_id in raw_ids:
            message = self.model[raw_id]
            message.claim_id = ""
            rows = {index: one.begun for index, one in message.recipients.items() if one.state is State.SENDING}
            node = next(node for node, holder in self.holders.items() if holder.epoch == epoch)
            self.attempts.append(Attempt(node, raw_id, epoch, rows))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), states=st.lists(st.sampled_from(OUTCOMES), min_size=3, max_size=3), far=st.booleans())
    def report(self, data: st.DataObject, states: list[State], *, far: bool) -> None:
        """An attempt ends, or is given back; one whose lease was lost may say what it likes of what did not end."""
        attempt = self.attempts.pop(data.draw(st.integers(0, len(self.attempts) - 1)))
        message = self.model.get(attempt.raw_id)
        holder = next((one for one in self.holders.values() if one.epoch == attempt.epoch), None)
        is_lost = holder is None or message is None or message.epoch != attempt.epoch
        said = []
        for (index, number), drawn in zip(attempt.rows.items(), states, strict=False):
            state = State.DEFERRED if is_lost and drawn in TERMINAL else drawn
            told = update(index, state, attempts=number - (state is State.QUEUED))
            if state not in TERMINAL:
                told.next_attempt_ms = FAR_MS if far else NOW_MS
            said.append(told)
            if not is_lost and message is not None:
                self.end(attempt.raw_id, index, state, due=not far)
        self.run(self.holders[attempt.node].report(changed(attempt.raw_id, *said), epoch=attempt.epoch))
        if not is_lost and message is not None:
            self.release(attempt.raw_id)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def speak_of_a_claim(self, data: st.DataObject) -> None:
        """What was not confirmed is nobody's to speak of: the number may be another node's attempt by now."""
        self.speak_of(data.draw(st.sampled_from(self.claims)))

    def speak_of(self, claim: Attempt) -> None:
        message = self.model.get(claim.raw_id)
        if message is None or message.epoch != claim.epoch or message.claim_id:
            said = [update(index, State.DEFERRED, attempts=number) for index, number in claim.rows.items()]
            self.run(self.holders[claim.node].report(changed(claim.raw_id, *said), epoch=claim.epoch))

    @rule(node=st.sampled_from(NODES))
    def claim_too_slowly(self, node: str) -> None:
        """A node does not confirm what it claimed, and speaks of it when another one is sending it."""
        self.claim(node)
        slow = [claim for claim in self.claims if claim.node == node]
        other = NODES[node == NODES[0]]
        self.claim_a_little_later(other)
        for epoch, claim_id in {(one.epoch, one.claim_id) for one in self.model.values() if one.claim_id}:
            self.confirm_claim(epoch, claim_id)
        for claim in slow:
            self.speak_of(claim)

    def end(self, raw_id: bytes, index: int, state: State, *, due: bool) -> None:
        known = self.model[raw_id].recipients[index]
        if state in TERMINAL:
            self.ends[raw_id, index] = state
            del self.model[raw_id].recipients[index]
        else:
            known.begun -= state is State.QUEUED
            known.state, known.due = state, due

    def release(self, raw_id: bytes) -> None:
        message = self.model[raw_id]
        if not message.recipients:
            del self.model[raw_id]
        elif all(one.state is not State.SENDING for one in message.recipients.values()):
            message.epoch = 0

    @precondition(lambda self: self.model)
    @rule(data=st.data(), node=st.sampled_from(NODES))
    def cancel(self, data: st.DataObject, node: str) -> None:
        """A command is carried out by the next claim; what is being sent is too late for it."""
        raw_id = data.draw(st.sampled_from(sorted(self.model)))
        self.run(
            execute(
                self.database,
                "INSERT INTO postroad.commands (command, account, verb, spool, message_ids)"
                " VALUES (gen_random_uuid(), 'demo', $1, $2, $3)",
                *(int(Verb.CANCEL), QUEUE_SPOOL, [text_id(raw_id)]),
            )
        )
        message = self.model[raw_id]
        waiting = [index for index, one in message.recipients.items() if one.state is not State.SENDING]
        for index in waiting:
            self.end(raw_id, index, State.CANCELLED, due=False)
        if waiting:
            self.release(raw_id)
        self.claim(node)

    # --- what always holds

    @invariant()
    def the_queue_is_that_of_the_model(self) -> None:
        rows = self.run(
            fetch(
                self.database,
                "SELECT message_id, recipient_index, state, attempt FROM postroad.queue_recipients",
            )
        )
        assert {(row[0].bytes, row[1]): (row[2], row[3]) for row in rows} == {
            (raw_id, index): (one.state, one.begun)
            for raw_id, message in self.model.items()
            for index, one in message.recipients.items()
        }
        held = self.run(fetch(self.database, "SELECT message_id, epoch, claim_id FROM postroad.replicated_queue"))
        assert {row[0].bytes: (row[1] or 0, str(row[2] or "")) for row in held} == {
            raw_id: (message.epoch, message.claim_id) for raw_id, message in self.model.items()
        }

    @invariant()
    def the_ledger_has_each_end_and_no_other(self) -> None:
        rows = self.run(fetch(self.database, "SELECT message_id, recipient_index, state FROM postroad.recipients"))
        assert {(row[0].bytes, row[1]): row[2] for row in rows if row[2] in TERMINAL} == self.ends
        assert len(rows) == sum(self.accepted.values())
        assert len(self.ends) + sum(len(one.recipients) for one in self.model.values()) == len(rows)

    def teardown(self) -> None:
        self.run(self.stack.aclose())
        self.runner.close()


_short = settings(
    max_examples=5,
    stateful_step_count=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.mark.timeout(180)
def test_the_replicated_queue_is_that_of_the_model(migrated_database: Database) -> None:
    """The same runs every time; the nightly ones are others each time."""
    run(migrated_database, _short)


@pytest.mark.nightly
@pytest.mark.timeout(1_800)
def test_many_long_runs_of_the_replicated_queue(migrated_database: Database) -> None:
    run(migrated_database, settings(_short, max_examples=100, stateful_step_count=40, derandomize=False))


def run(given: Database, chosen: settings) -> None:
    class Machine(ReplicatedMachine):
        database = given

    run_state_machine_as_test(Machine, settings=chosen)
