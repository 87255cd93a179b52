"""From verdicts to one settlement: new states, events and the ledger record of an attempt, in one spool transaction.

Pure: clocks, random number and encoder are arguments. Each recipient's verdict becomes a state by this table;
recipients with the same verdict share an event.

    verdict       state               event         when the lifetime is over
    SENT          sent                SENT
    PERMANENT     bounced             BOUNCED
    REFUSED       failed              FAILED
    TEMPORARY     deferred            DEFERRED      expired, EXPIRED
    INTERRUPTED   deferred            INTERRUPTED   expired, EXPIRED
    UNCERTAIN     deferred            UNCERTAIN     expired, UNCERTAIN and EXPIRED

Of REPLICATED mail the record says all this and the spool forgets what has to wait: PostgreSQL gives it out again.
Every move is checked against the one table in core/queue. Texts are safe already, so that nothing a remote says can
keep an outcome from being stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dataplane.core.config import RetryPolicy
from dataplane.core.envelope import RecipientRow
from dataplane.core.ledger import AttemptEvent, LedgerRecord, RecipientUpdate
from dataplane.core.queue import EventType, State, check_move
from dataplane.core.retry import is_expired, next_attempt_ms
from dataplane.core.transaction import Verdict, VerdictKind
from dataplane.delivery.attempt import Message
from dataplane.ports import RecipientChange, RecordEncoder, Settlement

_ENDS: dict[VerdictKind, tuple[State, EventType]] = {
    VerdictKind.SENT: (State.SENT, EventType.SENT),
    VerdictKind.PERMANENT: (State.BOUNCED, EventType.BOUNCED),
    VerdictKind.REFUSED: (State.FAILED, EventType.FAILED),
    VerdictKind.TEMPORARY: (State.DEFERRED, EventType.DEFERRED),
    VerdictKind.INTERRUPTED: (State.DEFERRED, EventType.INTERRUPTED),
    VerdictKind.UNCERTAIN: (State.DEFERRED, EventType.UNCERTAIN),
}


class Moment(NamedTuple):
    """Now: the wall clock that records carry, and the steady clock that due times follow, in milliseconds."""

    wall_ms: int
    steady_ms: int


class Facts(NamedTuple):
    """What an attempt's events say beside the verdict."""

    bundle_revision: int = 0
    rule: str = ""
    provider: str = ""
    remote_host: str = ""
    tls: str = ""
    queued_ms: int = 0
    waiting_ms: int = 0
    connecting_ms: int = 0
    transferring_ms: int = 0


class Conclusion(NamedTuple):
    """The settlement and the events in it."""

    settlement: Settlement
    events: tuple[AttemptEvent, ...]


class Concluder:
    """Makes settlements. `encode` turns records into bytes."""

    def __init__(self, encode: RecordEncoder) -> None:
        self._encode = encode

    def conclude(
        self,
        message: Message,
        ends: Sequence[tuple[RecipientRow, Verdict]],
        facts: Facts,
        policy: RetryPolicy,
        moment: Moment,
        random: float,
    ) -> Conclusion:
        """End an attempt (or refuse without one) for these recipients. Marks the message as reported."""
        changes: list[RecipientChange] = []
        updates: list[RecipientUpdate] = []
        indexes: dict[tuple[int, EventType, Verdict], list[int]] = {}
        for row, verdict in ends:
            state, event = _ENDS[verdict.kind]
            due_ms = 0
            if state is State.DEFERRED:
                if is_expired(policy, message.envelope.released_ms, moment.wall_ms, moment.steady_ms):
                    state = State.EXPIRED
                    if event is EventType.UNCERTAIN:
                        indexes.setdefault((row.attempt, event, verdict), []).append(row.index)
                    event = EventType.EXPIRED
                else:
                    due_ms = next_attempt_ms(policy, row.attempt, moment.steady_ms, random)
            check_move(row.state, state)
            kept = state if state is not State.DEFERRED else _kept(message, state)
            changes.append(RecipientChange(row.index, row.attempt, kept, row.attempt, due_ms, row.queue_key))
            shown_ms = due_ms + moment.wall_ms - moment.steady_ms if due_ms else 0
            updates.append(RecipientUpdate(row.index, state, row.attempt, shown_ms, moment.wall_ms))
            indexes.setdefault((row.attempt, event, verdict), []).append(row.index)
        events = tuple(
            _event(tuple(found), attempt, event, verdict, facts, moment.wall_ms)
            for (attempt, event, verdict), found in indexes.items()
        )
        return Conclusion(self._settlement(message, changes, tuple(updates), events), events)

    def recover(self, message: Message, rows: Sequence[RecipientRow], due_ms: int, moment: Moment) -> Conclusion:
        """Put back recipients whose attempt ended with nobody watching: the dot may have left, so it is uncertain."""
        verdict = Verdict(VerdictKind.UNCERTAIN, 0, "4.3.0", "the worker ended during the attempt")
        changes: list[RecipientChange] = []
        updates: list[RecipientUpdate] = []
        shown_ms = due_ms + moment.wall_ms - moment.steady_ms
        for row in rows:
            check_move(row.state, State.QUEUED)
            kept = _kept(message, State.QUEUED)
            changes.append(RecipientChange(row.index, row.attempt, kept, row.attempt, due_ms, row.queue_key))
            updates.append(RecipientUpdate(row.index, State.QUEUED, row.attempt, shown_ms, moment.wall_ms))
        events = tuple(
            _event(tuple(found), attempt, EventType.UNCERTAIN, verdict, Facts(), moment.wall_ms)
            for attempt, found in _by_attempt(rows).items()
        )
        return Conclusion(self._settlement(message, changes, tuple(updates), events), events)

    def give_back(self, message: Message, rows: Sequence[RecipientRow], due_ms: int, moment: Moment) -> Settlement:
        """Return recipients of REPLICATED mail to PostgreSQL as if their attempt had not begun; due by wall clock."""
        changes: list[RecipientChange] = []
        updates: list[RecipientUpdate] = []
        for row in rows:
            check_move(row.state, State.QUEUED)
            kept = _kept(message, State.QUEUED)
            changes.append(RecipientChange(row.index, row.attempt, kept, row.attempt, 0, row.queue_key))
            updates.append(RecipientUpdate(row.index, State.QUEUED, row.attempt - 1, due_ms, moment.wall_ms))
        return self._settlement(message, changes, tuple(updates), ())

    def report(self, message: Message) -> Settlement:
        """Tell that a message was accepted; until it is told otherwise the ledger shows its recipients as queued.

        As scheduled where the envelope has a time.
        """
        return self._settlement(message, (), (), ())

    def _settlement(
        self,
        message: Message,
        changes: Sequence[RecipientChange],
        updates: tuple[RecipientUpdate, ...],
        events: tuple[AttemptEvent, ...],
    ) -> Settlement:
        envelope = message.envelope
        first = not message.reported
        record = LedgerRecord(
            envelope.message_id,
            envelope.account,
            envelope if first else None,
            message.addresses if first else (),
            updates,
            events,
            epoch=envelope.epoch,
        )
        message.reported = True
        return Settlement(envelope.message_id, changes, self._encode(record), reported=True)


def _kept(message: Message, state: State) -> State:
    """What becomes of a row that has to wait: that of REPLICATED mail leaves the spool, it waits in PostgreSQL."""
    return State.CANCELLED if message.envelope.epoch else state


def put_back(message: Message, rows: Sequence[RecipientRow], due_ms: int) -> Settlement:
    """Return recipients to the queue as if their attempt had not begun; nobody needs to hear of it."""
    changes: list[RecipientChange] = []
    for row in rows:
        check_move(row.state, State.QUEUED)
        changes.append(RecipientChange(row.index, row.attempt, State.QUEUED, row.attempt - 1, due_ms, row.queue_key))
    return Settlement(message.envelope.message_id, changes, None, reported=False)


def claim(message: Message, rows: Sequence[RecipientRow]) -> Settlement:
    """Begin an attempt: `sending`, attempt number one higher. What was scheduled is released by it."""
    changes: list[RecipientChange] = []
    for row in rows:
        check_move(released(row.state), State.SENDING)
        changes.append(
            RecipientChange(row.index, row.attempt, State.SENDING, row.attempt + 1, row.due_ms, row.queue_key)
        )
    return Settlement(message.envelope.message_id, changes, None, reported=False)


def released(state: State) -> State:
    """Return the state of a recipient whose time has come."""
    if state is not State.SCHEDULED:
        return state
    check_move(state, State.QUEUED)
    return State.QUEUED


def claimed(rows: Sequence[RecipientRow]) -> tuple[RecipientRow, ...]:
    """Return the rows as they are after `claim`."""
    return tuple(row._replace(state=State.SENDING, attempt=row.attempt + 1) for row in rows)


def _by_attempt(rows: Sequence[RecipientRow]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(row.attempt, []).append(row.index)
    return found


def _event(
    indexes: tuple[int, ...], attempt: int, event: EventType, verdict: Verdict, facts: Facts, time_ms: int
) -> AttemptEvent:
    return AttemptEvent(
        indexes,
        event,
        time_ms,
        attempt,
        facts.bundle_revision,
        facts.rule,
        facts.provider,
        facts.remote_host,
        facts.tls,
        verdict.code,
        verdict.enhanced,
        verdict.text,
        facts.queued_ms,
        facts.waiting_ms,
        facts.connecting_ms,
        facts.transferring_ms,
    )
