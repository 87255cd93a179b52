"""What a spool reports about a message: plain values, encoded by an adapter.

A record says everything that happened since the spool's last record of the message. The envelope goes along in the
first one only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dataplane.core.envelope import Envelope
from dataplane.core.ids import MessageId
from dataplane.core.queue import EventType, State


class RecipientUpdate(NamedTuple):
    """New state of one recipient; `next_attempt_ms` is 0 in terminal states. Times in milliseconds since 1970."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a row
    state: State
    attempt: int
    next_attempt_ms: int
    update_ms: int


@dataclass(frozen=True, slots=True)
class AttemptEvent:
    """How an attempt ended for `indexes`, which share all of it. Text is safe and at most 512 bytes; times in ms."""

    indexes: tuple[int, ...]
    type: EventType
    time_ms: int
    attempt: int
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


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What came of a command in this spool, or, `partial`, of a part of it; `error` is empty when it was done.

    Counts are beside those of earlier results. Messages up to `position` are done, where it is not empty.
    """

    command: str
    changed_count: int
    too_late_count: int
    error: str = ""
    partial: bool = False
    position: bytes = b""


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    """One record. `accepted` and `recipients_accepted` (addresses in RCPT order) only in a message's first record.

    `epoch` is the envelope's.
    """

    message_id: MessageId
    account: str
    accepted: Envelope | None = None
    recipients_accepted: tuple[str, ...] = ()
    updates: tuple[RecipientUpdate, ...] = ()
    events: tuple[AttemptEvent, ...] = ()
    command_result: CommandResult | None = None
    epoch: int = 0
