"""Messages as the ledger knows them, and what is asked about them: plain values.

Contract. `message_state` derives a message's state from its recipients: the least finished one, in the order that the
API states. `first_id_at` gives the least UUIDv7 of a moment (RFC 9562, section 5.7), so that a range of times is a
range of ids. A `Position` orders all that the ledger learnt; its text form is what a watcher resumes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from controlplane.domain.errors import invalid
from dataplane.core.queue import EventType, State, Verb

_LEAST_FINISHED_FIRST = (
    State.SENDING,
    State.QUEUED,
    State.DEFERRED,
    State.SCHEDULED,
    State.HELD,
    State.FAILED,
    State.BOUNCED,
    State.EXPIRED,
    State.CANCELLED,
    State.SENT,
)
_POSITION = re.compile(r"([0-9]{1,19})-([0-9]{1,18})")
_LAST_MS = (1 << 48) - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EVERY_ACCOUNT = "-"
"""Stands for an account's id in commands on the mail of all."""
LEAST_ID = "00000000-0000-0000-0000-000000000000"


class Position(NamedTuple):
    """Transaction and number of an event."""

    transaction: int
    number: int

    def __str__(self) -> str:
        """As the API shows it."""
        return f"{self.transaction}-{self.number}"


def parse_position(text: str) -> Position:
    """Return the position in `text`; InvalidArgumentError when it is none of ours."""
    match = _POSITION.fullmatch(text)
    if match is None or int(match[1]) >= 1 << 63:
        raise invalid("position", "is none of ours")
    return Position(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Recipient:
    """One recipient; `next_attempt_time` is None in terminal states."""

    index: int
    address: str
    state: State
    attempts: int
    next_attempt_time: datetime | None
    update_time: datetime
    reply_code: int
    enhanced_code: str
    reply_text: str
    provider: str


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; `recipient_index` is None for the whole message. Times in ms."""

    message_id: str
    account: str
    position: Position
    recipient_index: int | None
    recipient: str
    type: EventType
    event_time: datetime
    node: str
    spool: str
    attempt: int = 0
    bundle_revision: int = 0
    rule: str = ""
    provider: str = ""
    remote_host: str = ""
    tls: str = ""
    reply_code: int = 0
    enhanced_code: str = ""
    reply_text: str = ""
    queued_ms: int = 0
    waiting_ms: int = 0
    connecting_ms: int = 0
    transferring_ms: int = 0
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


class EventPage(NamedTuple):
    """A part of a watch: what it shows, and the position after all that was read for it."""

    events: Sequence[Event]
    position: Position


@dataclass(frozen=True, slots=True)
class Message:
    """An accepted message; `events` are filled in for one message only, oldest first.

    `send_time` is until when the submitter had it held, None when it was due at once. `duplicate_of` is the id of the
    message that had been stored under its Idempotency-Key, empty for none. A `replicated` one waits in no spool but in
    the replicated queue; `spool` is the one that accepted it.
    """

    message_id: str
    account: str
    accept_time: datetime
    sender: str
    header_message_id: str
    subject: str
    size_bytes: int
    credential: str
    client_address: str
    client_helo: str
    client_tls: str
    session: str
    node: str
    spool: str
    send_time: datetime | None = None
    priority: int = 0
    replicated: bool = False
    recipients: tuple[Recipient, ...] = ()
    events: tuple[Event, ...] = ()
    duplicate_of: str = ""
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """Derived from the recipients."""
        return message_state(recipient.state for recipient in self.recipients)


@dataclass(frozen=True, slots=True)
class MessageQuery:
    """Which messages of an account: newest first, below `before_id`."""

    account: str
    limit: int
    before_id: str | None = None
    state: State | None = None
    recipient: str = ""
    from_id: str | None = None
    to_id: str | None = None
    tag: str = ""


@dataclass(frozen=True, slots=True)
class MessageFilter:
    """Which recipients that wait; all that is not empty must hold. `provider` is a full name."""

    provider: str = ""
    recipient_domain: str = ""
    min_age: timedelta = timedelta()
    states: tuple[State, ...] = ()


@dataclass(frozen=True, slots=True)
class CommandOrder:
    """What a caller asks for: for one message, or for what `filter` describes. `provider` is where a reroute leads."""

    account: str
    verb: Verb
    message_id: str = ""
    filter: MessageFilter | None = None
    provider: str = ""


@dataclass(frozen=True, slots=True)
class SpoolProgress:
    """How far a command is in one spool; done when `is_done`. `node` is empty when the spool is gone."""

    spool: str
    node: str
    changed_count: int = 0
    too_late_count: int = 0
    error: str = ""
    update_time: datetime | None = None
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """An edge verb on its way to one or more spools, in order, and what came of it."""

    command: str
    order: CommandOrder
    create_time: datetime
    spools: tuple[SpoolProgress, ...]

    @property
    def is_done(self) -> bool:
        """Whether every spool has answered."""
        return all(spool.is_done for spool in self.spools)

    @property
    def changed_count(self) -> int:
        """Recipients changed so far."""
        return sum(spool.changed_count for spool in self.spools)

    @property
    def too_late_count(self) -> int:
        """Recipients that it was too late for so far."""
        return sum(spool.too_late_count for spool in self.spools)

    @property
    def error(self) -> str:
        """Why no spool did anything; empty when one did or may."""
        errors = [spool.error for spool in self.spools]
        return errors[0] if all(errors) else ""


def message_state(states: Iterable[State]) -> State:
    """Return the state that stands for all; QUEUED where the ledger knows no recipient yet."""
    present = set(states)
    return next((state for state in _LEAST_FINISHED_FIRST if state in present), State.QUEUED)


def milliseconds_at(time: datetime) -> int:
    """Return the milliseconds since 1970, rounded down; exactly, which floats are not."""
    return (time - _EPOCH) // timedelta(milliseconds=1)


def first_id_at(time: datetime) -> str:
    """Return the least id of the millisecond in which `time` lies."""
    milliseconds = min(max(milliseconds_at(time), 0), _LAST_MS)
    text = f"{milliseconds:012x}" + "0" * 20
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
