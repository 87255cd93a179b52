"""Mail on its way between spools as bytes: the records that give it up, the one that takes it over, and what arrives.

Contract. `encode_given` makes the records of a message in the order in which they must be written: pieces of its
content, then the one that gives it up. The envelope travels as spools write it; whoever takes it over may be of another
release, and raises DamagedHandoverError for what it cannot read.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import DecodeError

from dataplane.adapters.ledger_codec import encode_record
from dataplane.adapters.spool_sqlite.codec import DamagedRowError, decode_envelope, encode_envelope
from dataplane.core.envelope import RecipientRow, queue_priority
from dataplane.core.handover import PIECE_BYTES, DamagedHandoverError, HandedOver, HandoverPart
from dataplane.core.ids import MessageId
from dataplane.core.ledger import LedgerRecord
from dataplane.core.queue import WAITING, State
from dataplane.ports import StoredMessage
from postroad.node.v1 import ledger_pb2 as pb
from postroad.node.v1.ledger_service_pb2 import LedgerHandover

# Keeps a control plane that does not know of hand-overs from passing over what it cannot read.
_NOBODY = (pb.RecipientUpdate(index=-1),)


def encode_given(stored: StoredMessage, *, told: bool) -> list[bytes]:
    """Return the records that give the message up; the last one tells of its acceptance too, unless that was `told`."""
    envelope, content = stored.envelope, stored.content
    pieces = list(_pieces(content))
    records = [
        pb.LedgerRecord(
            message_id=envelope.message_id,
            account=envelope.account,
            recipients=_NOBODY,
            handover_content=pb.HandoverContent(piece=number, data=piece),
        ).SerializeToString()
        for number, piece in enumerate(pieces)
    ]
    given = pb.LedgerRecord(message_id=envelope.message_id, account=envelope.account)
    if not told:
        addresses = tuple(row.address for row in stored.recipients)
        given.ParseFromString(
            encode_record(LedgerRecord(envelope.message_id, envelope.account, envelope, recipients_accepted=addresses))
        )
    given.recipients.extend(_NOBODY)
    given.handed_over.envelope = encode_envelope(envelope, stored.recipients)
    given.handed_over.piece_count = len(pieces)
    given.handed_over.content_bytes = len(content)
    for row in stored.recipients:
        given.handed_over.recipients.add(
            index=row.index, state=row.state, attempt=row.attempt, due_ms=row.due_ms, queue_key=row.queue_key
        )
    records.append(given.SerializeToString())
    return records


def encode_taken(handed_over: HandedOver) -> bytes:
    """Return the record that says that the message is the spool's now."""
    envelope = handed_over.envelope
    indexes = [row.index for row in handed_over.recipients]
    return pb.LedgerRecord(
        message_id=envelope.message_id,
        account=envelope.account,
        recipients=_NOBODY,
        taken_over=pb.TakenOver(indexes=indexes),
    ).SerializeToString()


def decode_part(raw: bytes) -> HandoverPart:
    """Return a part of what a spool is given. DamagedHandoverError."""
    try:
        message = LedgerHandover.FromString(raw)
    except DecodeError as error:
        raise DamagedHandoverError("no LedgerHandover") from error
    message_id = MessageId(message.message_id)
    handed_over = _handed_over(message_id, message.handed_over) if message.HasField("handed_over") else None
    return HandoverPart(message.spool, message.number, message_id, handed_over, message.content, message.last)


def _handed_over(message_id: MessageId, message: pb.HandedOver) -> HandedOver:
    try:
        envelope, addresses = decode_envelope(message_id, message.envelope)
        rows = tuple(_row(one, addresses) for one in message.recipients)
    except (DamagedRowError, KeyError, ValueError) as error:
        raise DamagedHandoverError(str(error)) from error
    if not rows:
        raise DamagedHandoverError("nobody waits")
    return HandedOver(envelope, rows, message.content_bytes)


def _row(one: pb.HandoverRecipient, addresses: dict[int, str]) -> RecipientRow:
    state = State(one.state)
    if state not in WAITING:
        raise ValueError("a recipient does not wait")
    priority = queue_priority(one.queue_key)
    return RecipientRow(one.index, addresses[one.index], state, one.attempt, one.due_ms, priority, one.queue_key)


def _pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), PIECE_BYTES):
        yield content[start : start + PIECE_BYTES]
