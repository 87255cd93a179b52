"""Ledger records as rows: decodes what a spool wrote and merges a run of records into column lists for one
transaction.

Contract. `RecordRows.add` takes one serialised LedgerRecord and raises `RecordError` for what can never be
stored; what it added before stays whole. Within a run the first terminal state of a recipient wins, and a
later one becomes an event `conflicting_outcome`, as in the database. Results of a command add up until it
is done; what comes after that is a repetition. Names lose their collection
(`accounts/demo` → `demo`) for accounts only. Times stay in milliseconds since 1970. Nothing here talks to a
database.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from asyncpg.pgproto.pgproto import UUID
from google.protobuf.message import DecodeError

from dataplane.core.queue import TERMINAL, EventType, State
from postroad.node.v1.ledger_pb2 import AcceptedMessage, AttemptEvent, CommandResult, LedgerRecord

DAY_MS = 86_400_000

_STATES = frozenset(int(state) for state in State)
_TERMINAL = frozenset(int(state) for state in TERMINAL)
_EVENTS = frozenset(int(one) for one in EventType) - {EventType.ACCEPTED, EventType.CONFLICTING_OUTCOME}
_QUEUED = int(State.QUEUED)
_SCHEDULED = int(State.SCHEDULED)
_PRIORITIES = range(-9, 10)
_CONFLICT = int(EventType.CONFLICTING_OUTCOME)
_UNCERTAIN = int(EventType.UNCERTAIN)
_ACCOUNT_PREFIX = "accounts/"
_STORED_TEXT_LIMIT = 4_096
_HASH_BYTES = 32

# Positions in a recipient's row.
STATE, _UPDATE_MS = 4, 7


class RecordError(Exception):
    """A record that can never be stored; `reason` is short and stable, the text is for people."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class KeyRow(NamedTuple):
    """Which message has an Idempotency-Key; the time is that of its acceptance. No `content_hash`: it was not told."""

    account: str
    key_hash: bytes
    message_id: UUID
    accept_time_ms: int
    checked: bool
    content_hash: bytes | None


class IdBounds(NamedTuple):
    """Message ids that can be stored: made in `first_ms` to `last_ms`."""

    first_ms: int
    last_ms: int


class CommandProgress(NamedTuple):
    """What a run of records says of a command; counts are beside those of earlier runs."""

    command: str
    changed_count: int = 0
    too_late_count: int = 0
    error: str = ""
    is_done: bool = False
    position: UUID | None = None


class GivenRow(NamedTuple):
    """A message that the spool gave up; `what` is a serialised HandedOver, its content came in so many pieces."""

    message_id: UUID
    account: str
    what: bytes
    piece_count: int
    content_bytes: int


class PieceRow(NamedTuple):
    """A piece of the content of a message that the spool gives up."""

    message_id: UUID
    account: str
    piece: int
    data: bytes


Key = tuple[bytes, int]
"""A recipient: message id, position in the envelope."""


class QueueReport(NamedTuple):
    """What a spool says of a recipient that it holds under a lease; `uncertain`: nobody saw its attempt end.

    `wait_ms` is how long the next attempt is to wait, `provider` whom it was tried with, empty for none.
    """

    message_id: UUID
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a row
    epoch: int
    state: int
    attempt: int
    wait_ms: int
    uncertain: bool
    provider: str


class RecordRows:
    """Rows of a run of records. `clean` replaces what PostgreSQL's text cannot hold."""

    def __init__(self, bounds: IdBounds, *, clean: bool = False) -> None:
        self._bounds = bounds
        self.is_clean = clean
        self.messages: list[tuple[Any, ...]] = []
        self.keys: list[KeyRow] = []
        # Rows are lists: a later record of the run may change them.
        self.accepted: dict[Key, list[Any]] = {}
        self.changed: dict[Key, list[Any]] = {}
        self.events: list[tuple[Any, ...]] = []
        self.results: dict[str, CommandProgress] = {}
        # What concerns the replicated queue; only the newest of a recipient counts there.
        self.reports: dict[Key, QueueReport] = {}
        # Message ids and the leases under which something is said of them.
        self.leases: set[tuple[UUID, int]] = set()
        # Message id and account of what the spool took over, before anything else is said of it.
        self.taken: list[tuple[UUID, str]] = []
        self.pieces: list[PieceRow] = []
        # After all else that is said of it.
        self.given: list[GivenRow] = []

    def add(self, raw: bytes) -> None:
        """Take one record; RecordError leaves everything as it was."""
        try:
            record = LedgerRecord.FromString(raw)
        except DecodeError as error:
            raise RecordError("UNDECODABLE", "no LedgerRecord") from error
        has_result = record.HasField("command_result")
        if record.message_id or not has_result:
            self._add_message(record)
        if has_result:
            self._add_result(record.command_result)

    def days(self) -> set[int]:
        """Days since 1970 whose partitions the accepted messages need."""
        return {_id_ms(row[0].bytes) // DAY_MS for row in self.messages}

    def _add_message(self, record: LedgerRecord) -> None:
        handover = record.WhichOneof("handover")
        if handover is not None:
            # There for code that does not know what follows.
            del record.recipients[:]
        self._check(record)
        message_id, account = UUID(record.message_id), record.account[len(_ACCOUNT_PREFIX) :]
        last_event: dict[int, AttemptEvent] = {}
        for event in record.events:
            for index in event.indexes:
                last_event[index] = event
                self.events.append(self._event_row(message_id, account, index, event))
        updates = {update.index: update for update in record.recipients}
        if record.epoch:
            self.leases.add((message_id, record.epoch))
        if record.HasField("accepted"):
            self._add_accepted(message_id, account, record)
        for index, update in updates.items():
            row = [message_id, index, account, "", update.state, update.attempts, update.next_attempt_ms]
            row += [update.update_ms, *self._outcome(last_event.get(index))]
            self._change((record.message_id, index), row)
            if record.epoch:
                last = last_event.get(index)
                uncertain = last is not None and last.type == _UNCERTAIN
                provider = self._text(last.provider) if last is not None else ""
                # By the node's clock, whatever that shows: the queue has its own.
                wait_ms = max(0, update.next_attempt_ms - update.update_ms)
                said = (update.state, update.attempts, wait_ms, uncertain, provider)
                self.reports[(record.message_id, index)] = QueueReport(message_id, index, record.epoch, *said)
        if handover is not None:
            self._add_handover(message_id, account, record)

    def _add_handover(self, message_id: UUID, account: str, record: LedgerRecord) -> None:
        match record.WhichOneof("handover"):
            case "taken_over":
                self.taken.append((message_id, account))
            case "handover_content":
                piece = record.handover_content
                self.pieces.append(PieceRow(message_id, account, piece.piece, piece.data))
            case _:
                what = record.handed_over
                given = (what.SerializeToString(), what.piece_count, what.content_bytes)
                self.given.append(GivenRow(message_id, account, *given))

    def _check(self, record: LedgerRecord) -> None:
        raw_id = record.message_id
        if len(raw_id) != 16 or raw_id[6] >> 4 != 7:
            raise RecordError("BAD_MESSAGE_ID", "the message id is no UUIDv7")
        made_ms = _id_ms(raw_id)
        if not self._bounds.first_ms <= made_ms <= self._bounds.last_ms:
            raise RecordError("MESSAGE_ID_OUT_OF_RANGE", f"the message id was made at {made_ms} ms")
        if not record.account.startswith(_ACCOUNT_PREFIX):
            raise RecordError("BAD_ACCOUNT", "the record names no account")
        count = _check_accepted(record.accepted, made_ms) if record.HasField("accepted") else None
        for update in record.recipients:
            if update.state not in _STATES or not _is_index(update.index, count):
                raise RecordError("BAD_RECIPIENT", f"recipient {update.index} in state {update.state}")
        for event in record.events:
            if event.type not in _EVENTS or not all(_is_index(index, count) for index in event.indexes):
                raise RecordError("BAD_EVENT", f"an event of type {event.type}")

    def _add_accepted(self, message_id: UUID, account: str, record: LedgerRecord) -> None:
        accepted, raw_id = record.accepted, record.message_id
        self.messages.append(
            self._row(
                message_id,
                account,
                accepted.accept_time_ms,
                accepted.sender,
                accepted.size_bytes,
                accepted.header_message_id,
                accepted.subject,
                accepted.credential,
                accepted.client_address,
                accepted.client_helo,
                accepted.client_tls,
                accepted.session,
                accepted.send_time_ms,
                accepted.priority,
            )
        )
        time_ms, send_ms = accepted.accept_time_ms, accepted.send_time_ms
        state = _SCHEDULED if send_ms else _QUEUED
        if accepted.submission_key_hash:
            key = (account, accepted.submission_key_hash, message_id, time_ms, accepted.submission_key_checked)
            self.keys.append(KeyRow(*key, accepted.submission_content_hash or None))
        for index, address in enumerate(accepted.recipients):
            row = [message_id, index, account, self._text(address), state, 0, send_ms, time_ms, 0, "", "", ""]
            self.accepted[(raw_id, index)] = row

    def _change(self, key: Key, row: list[Any]) -> None:
        rows = self.accepted if key in self.accepted else self.changed
        former = rows.get(key)
        if former is None:
            rows[key] = row
            return
        if former[STATE] in _TERMINAL:
            if row[STATE] in _TERMINAL and row[STATE] != former[STATE]:
                self.events.append(conflict_event(row, former[STATE]))
            return
        if not any(row[8:]):
            row[8:] = former[8:]
        row[3] = former[3]
        rows[key] = row

    def _event_row(self, message_id: UUID, account: str, index: int, event: AttemptEvent) -> tuple[Any, ...]:
        return self._row(
            message_id,
            index,
            account,
            event.type,
            event.time_ms,
            event.attempt,
            event.bundle_revision,
            event.rule,
            event.provider,
            event.remote_host,
            event.tls,
            event.reply_code,
            event.enhanced_code,
            event.reply_text,
            event.queued_ms,
            event.waiting_ms,
            event.connecting_ms,
            event.transferring_ms,
        )

    def _outcome(self, event: AttemptEvent | None) -> tuple[Any, ...]:
        if event is None:
            return (0, "", "", "")
        return self._row(event.reply_code, event.enhanced_code, event.reply_text, event.provider)

    def _add_result(self, result: CommandResult) -> None:
        former = self.results.get(result.command, CommandProgress(result.command))
        if former.is_done:
            return
        self.results[result.command] = CommandProgress(
            result.command,
            former.changed_count + result.changed_count,
            former.too_late_count + result.too_late_count,
            self._text(result.error),
            not result.partial,
            UUID(result.position) if len(result.position) == 16 else former.position,
        )

    def _row(self, *values: Any) -> tuple[Any, ...]:
        if self.is_clean:
            return tuple(self._text(value) if isinstance(value, str) else value for value in values)
        return values

    def _text(self, text: str) -> str:
        if self.is_clean:
            return text.replace("\0", "\ufffd")[:_STORED_TEXT_LIMIT]
        return text


def conflict_event(row: list[Any], former_state: int) -> tuple[Any, ...]:
    """The event that says that `row`'s terminal state came after another one."""
    text = f"{State(row[STATE]).name.lower()} after {State(former_state).name.lower()}"
    recipient = (row[0], row[1], row[2])
    return (*recipient, _CONFLICT, row[_UPDATE_MS], row[5], 0, "", "", "", "", 0, "", text, 0, 0, 0, 0)


def columns(rows: Iterable[Iterable[Any]], width: int) -> list[list[Any]]:
    """Rows turned into `width` lists, also when there are none."""
    turned = [list(column) for column in zip(*rows, strict=True)]
    return turned or [[] for _ in range(width)]


def _check_accepted(accepted: AcceptedMessage, made_ms: int) -> int:
    """Return how many recipients were accepted."""
    if abs(accepted.accept_time_ms - made_ms) > DAY_MS:
        raise RecordError("MESSAGE_ID_OUT_OF_RANGE", "message id and time of acceptance are a day apart")
    if accepted.priority not in _PRIORITIES or accepted.send_time_ms < 0:
        raise RecordError("BAD_ACCEPTANCE", f"priority {accepted.priority}, held until {accepted.send_time_ms} ms")
    if not {len(accepted.submission_key_hash), len(accepted.submission_content_hash)} <= {0, _HASH_BYTES}:
        raise RecordError("BAD_SUBMISSION_KEY", "the hash of a submission key is none")
    return len(accepted.recipients)


def _is_index(index: int, count: int | None) -> bool:
    return index >= 0 and (count is None or index < count)


def _id_ms(raw_id: bytes) -> int:
    return int.from_bytes(raw_id[:6], "big")
