"""What commands on waiting mail do to a recipient: decisions from values, carried out by `dataplane.commands`.

    verb      changes                                     to         leaves alone
    cancel    scheduled, queued, deferred, held           cancelled
    bounce    scheduled, queued, deferred, held           failed
    hold      scheduled, queued, deferred                 held       held
    release   held                                        queued     the others that wait
    retry     scheduled; queued and deferred, due later   queued     held; what is due
    reroute   scheduled, queued, deferred, held           the same   what goes by that provider already

What is being sent is too late for all but release, which does not mean it. What is scheduled has its time by the wall
clock, which nobody asks here: a retry makes it due in any case, and what was held once is scheduled no more. A hold
takes a number of its own, one above the attempts begun, so that a claim that failed and is tried again finds another
one; release gives it back.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from dataplane.core.envelope import RecipientRow, make_queue_key, pinned_provider, split_queue_key
from dataplane.core.ids import MessageId
from dataplane.core.queue import WAITING, EventType, State, Verb, check_move

EVERY_ACCOUNT = "accounts/-"
NO_MESSAGE = MessageId(b"")


EVENTS: dict[Verb, EventType] = {
    Verb.CANCEL: EventType.CANCELLED,
    Verb.HOLD: EventType.HELD,
    Verb.RELEASE: EventType.RELEASED,
    Verb.RETRY: EventType.RETRIED,
    Verb.BOUNCE: EventType.FAILED,
    Verb.REROUTE: EventType.REROUTED,
}


_GOING = frozenset({State.SCHEDULED, State.QUEUED, State.DEFERRED, State.SENDING})
CONCERNED: dict[Verb, frozenset[State]] = {
    Verb.CANCEL: WAITING | {State.SENDING},
    Verb.HOLD: _GOING,
    Verb.RELEASE: frozenset({State.HELD}),
    Verb.RETRY: _GOING,
    Verb.BOUNCE: WAITING | {State.SENDING},
    Verb.REROUTE: WAITING | {State.SENDING},
}
"""States that a verb may change or is too late for."""


class Filter(NamedTuple):
    """Which recipients: those of messages with ids above `after` and accepted before, and all that is not empty."""

    before_ms: int
    after: MessageId = NO_MESSAGE
    provider: str = ""
    recipient_domain: str = ""
    states: tuple[int, ...] = ()

    def wants(self, account: str, state: State, queue_key: str) -> bool:
        """Whether it may mean a recipient of which this is known; the domain is not looked at."""
        owner, next_hop = split_queue_key(queue_key)
        return (
            account in (owner, EVERY_ACCOUNT)
            and (not self.provider or next_hop == self.provider)
            and (not self.states or state in self.states)
        )

    def wants_address(self, address: str) -> bool:
        """Whether the domain is the one meant."""
        return not self.recipient_domain or address.rpartition("@")[2] == self.recipient_domain


class Other(Enum):
    """Why a recipient is not changed."""

    TOO_LATE = 1
    NOTHING_TO_DO = 2


class Outcome(NamedTuple):
    """What a recipient becomes; `attempts` is what people are shown."""

    row: RecipientRow
    attempts: int


def decide(verb: Verb, row: RecipientRow, provider: str, due_ms: int) -> Outcome | Other:
    """Return what becomes of a recipient that is not terminal. `due_ms` is now, by the clock of due times."""
    state, attempts = row.state, attempts_of(row)
    if state is State.SENDING:
        return Other.NOTHING_TO_DO if verb is Verb.RELEASE else Other.TOO_LATE
    match verb:
        case Verb.CANCEL | Verb.BOUNCE:
            end = State.CANCELLED if verb is Verb.CANCEL else State.FAILED
            changed = row._replace(state=end, due_ms=0)
        case Verb.HOLD if state is not State.HELD:
            changed = row._replace(state=State.HELD, attempt=row.attempt + 1)
        case Verb.RELEASE if state is State.HELD:
            changed = row._replace(state=State.QUEUED, attempt=attempts, due_ms=due_ms)
        case Verb.RETRY if state is State.SCHEDULED or (state is not State.HELD and row.due_ms > due_ms):
            changed = row._replace(state=State.QUEUED, due_ms=due_ms)
        case Verb.REROUTE if pinned_provider(row.queue_key) != provider:
            account, _ = split_queue_key(row.queue_key)
            changed = row._replace(queue_key=make_queue_key(account, provider, row.priority, pinned=True))
        case _:
            return Other.NOTHING_TO_DO
    if changed.state is not state:
        check_move(state, changed.state)
    return Outcome(changed, attempts)


def attempts_of(row: RecipientRow) -> int:
    """Return the attempts begun: a hold's number is none of them."""
    return max(0, row.attempt - 1) if row.state is State.HELD else row.attempt
