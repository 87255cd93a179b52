"""What the agent and the workers of a node say to each other over `run/agent.sock`.

A frame is a length (4 bytes, big endian, of what follows), a type (1 byte) and a payload: JSON for the rare
messages, packed bytes for ledger records and mail, which nobody on the way looks into. `FrameDecoder` and `encode`
know no socket; `LinkProtocol` carries them over one. The worker calls, the agent listens; the socket's folder
is closed to other users.

    worker -> agent     WorkerHello first, then ConfigApplied, DenialsApplied, LedgerRecords, LedgerStatement,
                        LedgerTake, QueueCall, WorkerStatus
    agent -> worker     ConfigChanged, DenialsChanged, ContactTime, DrainNode, LedgerPull, LedgerPause, LedgerCursor,
                        LedgerQuestion, LedgerInvitation, LedgerHandover, QueueAnswer, RunCommand, SpoolVerdict,
                        StatusRequest

Records are pulled: a worker sends one LedgerRecords for each LedgerPull, as soon as there is a record behind
`after`, so that what the agent holds is bounded by what it asked for. Nothing here is durable: a side that
reconnects begins anew with WorkerHello. A frame that is too long, of an unknown type or does not decode
raises LinkError, and the connection is closed.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias, cast

from dataplane.core.commands import Filter
from dataplane.core.ids import MessageId

MAX_FRAME_BYTES = 16 * 1024 * 1024
SOCKET_PATH = "run/agent.sock"
UNASKED = 0
"""Number of a status that nobody has asked for; requests count from 1."""

_LENGTH = struct.Struct(">I")
_RECORDS_HEAD = struct.Struct(">36sqqI")
_CALL_HEAD = struct.Struct(">qBI")
_ANSWER_HEAD = struct.Struct(">qB")


class LinkError(Exception):
    """The other side sent something that is no message; the connection is of no more use."""


class SpoolState(NamedTuple):
    """A spool that a worker has open; `oldest_record` is the oldest it can still send, 0 for none written
    yet. `refused`: nothing is sent from it. Then come what it lost, as in `ports.SpoolLosses`, and its openings as in
    `ports.Openings`, ids in hexadecimal.
    """

    spool: str
    incarnation: int
    acknowledged: int
    oldest_record: int
    last_record: int
    waiting_count: int
    refused: bool = False
    lost_messages: tuple[str, ...] = ()
    lost_count: int = 0
    unnamed_losses: bool = False
    opening: str = ""
    former_openings: tuple[tuple[str, int], ...] = ()


class WorkerHello(NamedTuple):
    """First message of a worker: what it has open and what it has in use."""

    worker: int
    pid: int
    config_digest: str
    denials_version: int
    spools: tuple[SpoolState, ...]


class ConfigChanged(NamedTuple):
    """The last-known-good file now holds the configuration with this digest (hex): use it, answer
    ConfigApplied.
    """

    digest: str


class ConfigApplied(NamedTuple):
    """The configuration in use has this digest (hex); `error` says why the one on disk could not be taken."""

    digest: str
    error: str


class DenialsChanged(NamedTuple):
    """The denials file now holds this version: use it, answer DenialsApplied."""

    version: int


class DenialsApplied(NamedTuple):
    """Denials of this version are in force: no dot leaves against them. `error` as in ConfigApplied."""

    version: int
    error: str


class ContactTime(NamedTuple):
    """When the control plane last said that the configuration is current, in milliseconds since 1970."""

    wall_ms: int


class LedgerPull(NamedTuple):
    """Send the records behind `after`; replaces an unanswered pull of the same spool."""

    spool: str
    after: int


class LedgerPause(NamedTuple):
    """Nobody takes records of this spool now; an unanswered pull is void."""

    spool: str


class LedgerRecords(NamedTuple):
    """Records of a spool in order, `first` is the number of the first one."""

    spool: str
    incarnation: int
    first: int
    records: list[bytes]


class LedgerCursor(NamedTuple):
    """Records up to `cursor` are stored by the control plane."""

    spool: str
    cursor: int


class LedgerQuestion(NamedTuple):
    """Answer with a LedgerStatement; the fields are those of `core.waiting.WaitingQuestion`."""

    spool: str
    number: int
    as_of_record: int
    account: str
    buckets: tuple[int, ...]


class LedgerStatement(NamedTuple):
    """A serialised postroad.node.v1.LedgerStatement."""

    statement: bytes


class LedgerInvitation(NamedTuple):
    """Mail waits that this spool may take over: answer with a LedgerTake when it can."""

    spool: str


class LedgerTake(NamedTuple):
    """A spool takes mail over; the fields are those of postroad.node.v1.LedgerTake."""

    spool: str
    number: int
    after_record: int


class LedgerHandover(NamedTuple):
    """A serialised postroad.node.v1.LedgerHandover."""

    part: bytes


class DrainNode(NamedTuple):
    """Whether to take no mail and to hand over what waits."""

    wanted: bool


class RunCommand(NamedTuple):
    """A command for a spool; its result goes by the ledger. `verb` is the number in postroad.node.v1.

    With a `filter` there are no message ids; `provider` is where a reroute leads.
    """

    command: str
    spool: str
    verb: int
    account: str
    message_ids: tuple[bytes, ...]
    provider: str = ""
    filter: Filter | None = None


class SpoolVerdict(NamedTuple):
    """Whether the control plane refuses the spool (it came back older than it was, or is another node's): then
    nothing is sent from it.
    """

    spool: str
    refused: bool


class StatusRequest(NamedTuple):
    """Answer with a WorkerStatus of the same number."""

    number: int


class QueueMethod(IntEnum):
    """Methods of postroad.node.v1.QueueService."""

    RENEW_LEASE = 1
    STORE_CONTENT = 2
    STORE_MESSAGES = 3
    CLAIM_MESSAGES = 4
    FETCH_CONTENT = 5
    CONFIRM_CLAIM = 6


class QueueCall(NamedTuple):
    """Make a call to the control plane; `payload` is the request, which the agent does not look into."""

    number: int
    method: QueueMethod
    timeout_ms: int
    payload: bytes


class QueueAnswer(NamedTuple):
    """What came of the call of that number: the response, or a text where `status`, a gRPC code, is not 0."""

    number: int
    status: int
    payload: bytes


class Sample(NamedTuple):
    """One counted or measured value: a metric's name, its label values in the order of its declaration, the
    value, which for a histogram is its row.
    """

    metric: str
    labels: tuple[str, ...]
    value: float | tuple[float, ...]


class WorkerStatus(NamedTuple):
    """How a worker is now; `closed`: it was told to drain, and no session is left."""

    number: int
    draining: bool
    waiting_count: int
    oldest_accepted_ms: int
    spools: tuple[SpoolState, ...]
    samples: tuple[Sample, ...]
    closed: bool = False


Message: TypeAlias = (
    WorkerHello
    | ConfigChanged
    | ConfigApplied
    | DenialsChanged
    | DenialsApplied
    | ContactTime
    | LedgerPull
    | LedgerPause
    | LedgerRecords
    | LedgerCursor
    | LedgerQuestion
    | LedgerStatement
    | QueueCall
    | QueueAnswer
    | LedgerInvitation
    | LedgerTake
    | LedgerHandover
    | DrainNode
    | RunCommand
    | SpoolVerdict
    | StatusRequest
    | WorkerStatus
)


def _spools(rows: list[list[Any]]) -> tuple[SpoolState, ...]:
    return tuple(_spool(*row) for row in rows)


def _spool(*fields: Any) -> SpoolState:
    state = SpoolState(*fields)
    former = tuple((opening, last_record) for opening, last_record in state.former_openings)
    return state._replace(lost_messages=tuple(state.lost_messages), former_openings=former)


def _read_hello(fields: list[Any]) -> WorkerHello:
    *plain, spools = fields
    return WorkerHello._make([*plain, _spools(spools)])


def _read_command(fields: list[Any]) -> RunCommand:
    *plain, message_ids, provider, wanted = fields
    if wanted is not None:
        before_ms, after, by_provider, domain, states = wanted
        wanted = Filter(before_ms, MessageId(bytes.fromhex(after)), by_provider, domain, tuple(states))
    return RunCommand._make([*plain, tuple(bytes.fromhex(text) for text in message_ids), provider, wanted])


def _read_question(fields: list[Any]) -> LedgerQuestion:
    *plain, buckets = fields
    return LedgerQuestion._make([*plain, tuple(buckets)])


def _read_status(fields: list[Any]) -> WorkerStatus:
    *plain, spools, samples, closed = fields
    read = tuple(
        Sample(metric, tuple(labels), tuple(value) if isinstance(value, list) else value)
        for metric, labels, value in samples
    )
    return WorkerStatus._make([*plain, _spools(spools), read, closed])


# The numbers are what travels; both ends are of one release, since the supervisor starts both.
_READERS: dict[int, Callable[[list[Any]], Message]] = {
    1: _read_hello,
    2: lambda fields: ConfigChanged(*fields),
    3: lambda fields: ConfigApplied(*fields),
    4: lambda fields: DenialsChanged(*fields),
    5: lambda fields: DenialsApplied(*fields),
    6: lambda fields: ContactTime(*fields),
    7: lambda fields: LedgerPull(*fields),
    8: lambda fields: LedgerPause(*fields),
    10: lambda fields: LedgerCursor(*fields),
    11: _read_command,
    12: lambda fields: SpoolVerdict(*fields),
    13: lambda fields: StatusRequest(*fields),
    14: _read_status,
    15: _read_question,
    16: lambda fields: LedgerStatement(bytes.fromhex(fields[0])),
    19: lambda fields: LedgerInvitation(*fields),
    20: lambda fields: LedgerTake(*fields),
    22: lambda fields: DrainNode(*fields),
}
_RECORDS_TYPE = 9
_CALL_TYPE = 17
_ANSWER_TYPE = 18
_HANDOVER_TYPE = 21
_TYPES: dict[type[Message], int] = {
    WorkerHello: 1,
    ConfigChanged: 2,
    ConfigApplied: 3,
    DenialsChanged: 4,
    DenialsApplied: 5,
    ContactTime: 6,
    LedgerPull: 7,
    LedgerPause: 8,
    LedgerRecords: _RECORDS_TYPE,
    LedgerCursor: 10,
    RunCommand: 11,
    SpoolVerdict: 12,
    StatusRequest: 13,
    WorkerStatus: 14,
    LedgerQuestion: 15,
    LedgerStatement: 16,
    QueueCall: _CALL_TYPE,
    QueueAnswer: _ANSWER_TYPE,
    LedgerInvitation: 19,
    LedgerTake: 20,
    LedgerHandover: _HANDOVER_TYPE,
    DrainNode: 22,
}


def encode(message: Message) -> bytes:
    """Return the frame of a message; LinkError when it is too long to be taken by the other side."""
    if isinstance(message, LedgerRecords):
        payload = _pack_records(message)
    elif isinstance(message, QueueCall):
        payload = _CALL_HEAD.pack(*message[:3]) + message.payload
    elif isinstance(message, QueueAnswer):
        payload = _ANSWER_HEAD.pack(*message[:2]) + message.payload
    elif isinstance(message, LedgerHandover):
        payload = message.part
    else:
        fields: list[Any] = list(message)
        if isinstance(message, RunCommand):
            fields[4] = [message_id.hex() for message_id in message.message_ids]
            if message.filter is not None:
                before_ms, after, *rest = message.filter
                fields[6] = [before_ms, after.hex(), *rest]
        elif isinstance(message, LedgerStatement):
            fields = [message.statement.hex()]
        payload = json.dumps(fields, separators=(",", ":")).encode()
    if len(payload) + 1 > MAX_FRAME_BYTES:
        raise LinkError(f"a {type(message).__name__} of {len(payload)} bytes is too long")
    return _LENGTH.pack(len(payload) + 1) + bytes((_TYPES[type(message)],)) + payload


def _pack_records(message: LedgerRecords) -> bytes:
    head = _RECORDS_HEAD.pack(message.spool.encode("ascii"), message.incarnation, message.first, len(message.records))
    lengths = struct.pack(f">{len(message.records)}I", *map(len, message.records))
    return b"".join((head, lengths, *message.records))


def _unpack_records(payload: memoryview) -> LedgerRecords:
    spool, incarnation, first, count = _RECORDS_HEAD.unpack_from(payload)
    lengths = struct.unpack_from(f">{count}I", payload, _RECORDS_HEAD.size)
    position = _RECORDS_HEAD.size + 4 * count
    if position + sum(lengths) != len(payload):
        raise ValueError("the lengths of the records are not the frame's")
    records = []
    for length in lengths:
        records.append(bytes(payload[position : position + length]))
        position += length
    return LedgerRecords(spool.decode("ascii").rstrip("\0"), incarnation, first, records)


def _decode(frame_type: int, payload: memoryview) -> Message:
    try:
        if frame_type == _RECORDS_TYPE:
            return _unpack_records(payload)
        if frame_type == _CALL_TYPE:
            number, method, timeout_ms = _CALL_HEAD.unpack_from(payload)
            return QueueCall(number, QueueMethod(method), timeout_ms, bytes(payload[_CALL_HEAD.size :]))
        if frame_type == _ANSWER_TYPE:
            number, status = _ANSWER_HEAD.unpack_from(payload)
            return QueueAnswer(number, status, bytes(payload[_ANSWER_HEAD.size :]))
        if frame_type == _HANDOVER_TYPE:
            return LedgerHandover(bytes(payload))
        return _READERS[frame_type](json.loads(bytes(payload)))
    except (KeyError, ValueError, TypeError, IndexError, struct.error) as error:
        raise LinkError(f"a frame of type {frame_type} that is no message") from error


class FrameDecoder:
    """Bytes in, messages out, however the bytes are cut; holds at most one unfinished frame."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that are whole now. LinkError for what is no frame or no message."""
        self._buffer += data
        messages: list[Message] = []
        start = 0
        with memoryview(self._buffer) as view:
            while len(view) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, start)
                if not 1 <= length <= MAX_FRAME_BYTES:
                    raise LinkError(f"a frame of {length} bytes")
                end = start + _LENGTH.size + length
                if len(view) < end:
                    break
                with view[start + _LENGTH.size + 1 : end] as payload:
                    messages.append(_decode(view[start + _LENGTH.size], payload))
                start = end
        if start:
            del self._buffer[:start]
        return messages


class LinkProtocol(asyncio.Protocol):
    """One connection of either side: calls `on_message` for each message and `on_lost` once at the end.

    A LinkError, or an exception of `on_message`, closes the connection; `on_lost` is told which.
    """

    def __init__(
        self,
        on_message: Callable[[LinkProtocol, Message], None],
        on_lost: Callable[[LinkProtocol, Exception | None], None],
    ) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._decoder = FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; loops hand protocols what `create_unix_connection` promises."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand over each message as it becomes whole."""
        try:
            for message in self._decoder.feed(data):
                self._on_message(self, message)
        except Exception as error:  # noqa: BLE001 - told to on_lost, which reports it
            self._error = error
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner, with the error that made us close if there was one."""
        self._transport = None
        self._on_lost(self, self._error or exc)

    def send(self, message: Message) -> bool:
        """Queue a message; False when the connection is gone."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.write(encode(message))
        return True

    def abort(self) -> None:
        """Close at once; what was queued is lost."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Close after what was queued has left."""
        if self._transport is not None:
            self._transport.close()
