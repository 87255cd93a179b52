"""Rows of the spool to values and back: pure functions; a row that cannot be read raises DamagedRowError.

An envelope is JSON, so that an operator can read it, made by orjson; text that is no Unicode (lone surrogates from raw
8-bit headers) goes through the slower standard encoder, which can carry it. Checksums are CRC-32: they find flipped
bits, not forgery. A recipient's covers what a settlement writes, so that none needs the old row; addresses lie in the
envelope, under the message's checksum. Records are packed many to a row, each behind its length in four bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from dataplane.core.envelope import Envelope, RecipientRow, envelope_fields
from dataplane.core.idempotency import SubmissionKey, Submitted
from dataplane.core.ids import MessageId
from dataplane.core.queue import State


class DamagedRowError(Exception):
    """A row does not match its checksum or cannot be decoded."""


class Recipient(NamedTuple):
    """A row of the table `recipient`, in the order of its columns."""

    message_id: MessageId
    idx: int
    state: int
    attempt: int
    due_ms: int
    rank: int
    incarnation: int
    checksum: int
    queue_key: str


class KeyRow(NamedTuple):
    """A row of the table `submission_key`, in the order of its columns behind `number`."""

    key_hash: bytes
    content_hash: bytes
    message_id: bytes
    time_ms: int
    checksum: int


def encode_envelope(envelope: Envelope, recipients: Sequence[RecipientRow]) -> bytes:
    """Return the JSON of an envelope with the addresses of all its recipients."""
    fields = envelope_fields(envelope, {str(row.index): row.address for row in recipients})
    try:
        return orjson.dumps(fields)
    except TypeError:
        return json.dumps(fields, separators=(",", ":")).encode("ascii")


def decode_envelope(message_id: MessageId, encoded: bytes) -> tuple[Envelope, dict[int, str]]:
    """Return the envelope and the addresses of all its recipients by index. DamagedRowError."""
    try:
        fields: dict[str, Any] = _loads(encoded)
        address, helo, tls = fields["client"]
        envelope = Envelope(
            message_id=message_id,
            account=fields["account"],
            account_uid=fields["account_uid"],
            credential=fields["credential"],
            sender=fields["sender"],
            size_bytes=fields["size_bytes"],
            accepted_ms=fields["accepted_ms"],
            session=fields["session"],
            client_address=address,
            client_helo=helo,
            client_tls=tls,
            header_message_id=fields["header_message_id"],
            subject=fields["subject"],
            smtputf8=fields["smtputf8"],
            body_8bit=fields["body_8bit"],
            headers={name: tuple(values) for name, values in fields["headers"].items()},
            submission_key=_submission_key(fields["submission_key"]) if "submission_key" in fields else None,
            send_time_ms=fields.get("send_time_ms", 0),
            priority=fields.get("priority", 0),
            epoch=fields.get("epoch", 0),
        )
        addresses = {int(index): address for index, address in fields["recipients"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRowError("an envelope cannot be decoded") from error
    return envelope, addresses


def _submission_key(values: list[Any]) -> SubmissionKey:
    key_hash, content_hash, checked = values
    return SubmissionKey(bytes.fromhex(key_hash), bytes.fromhex(content_hash), bool(checked))


def _loads(encoded: bytes) -> Any:
    try:
        return orjson.loads(encoded)
    except orjson.JSONDecodeError:
        return json.loads(encoded)


def message_checksum(message_id: bytes, envelope: bytes, content: bytes) -> int:
    """Checksum of a message wherever its content lies."""
    return crc32(content, crc32(envelope, crc32(message_id)))


def message_checksum_of_parts(message_id: bytes, envelope: bytes, content_checksum: int, content_bytes: int) -> int:
    """Return `message_checksum` for a content of which only CRC-32 and length are known.

    To go on from a CRC over n octets is to multiply it by x to the power of 8n in the field of CRC-32 and to add the
    CRC of those octets.
    """
    return _multiply(_power_of_x(8 * content_bytes), crc32(envelope, crc32(message_id))) ^ content_checksum


# CRC-32 counts the powers of x from the highest bit down.
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_X = 1 << 30


def _multiply(first: int, second: int) -> int:
    product = 0
    while first:
        if first & _ONE:
            product ^= second
        first = first << 1 & 0xFFFFFFFF
        second = second >> 1 ^ (_POLYNOMIAL if second & 1 else 0)
    return product


def _power_of_x(exponent: int) -> int:
    power, square = _ONE, _X
    while exponent:
        if exponent & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        exponent >>= 1
    return power


def recipient_checksum(message_id: bytes, idx: int, state: int, attempt: int, due_ms: int, queue_key: str) -> int:
    """Checksum of what a settlement writes. UnicodeEncodeError for a key that is no text."""
    return crc32(f"{idx} {state} {attempt} {due_ms} {queue_key}".encode(), crc32(message_id))


def encode_recipient(message_id: MessageId, row: RecipientRow, incarnation: int) -> Recipient:
    """Return the row to store."""
    index, _, state, attempt, due_ms, priority, queue_key = row
    number = int(state)
    checksum = recipient_checksum(message_id, index, number, attempt, due_ms, queue_key)
    return Recipient(message_id, index, number, attempt, due_ms, -priority, incarnation, checksum, queue_key)


def check_recipient(row: Recipient) -> None:
    """DamagedRowError unless the row matches its checksum."""
    expected = recipient_checksum(row.message_id, row.idx, row.state, row.attempt, row.due_ms, row.queue_key)
    if expected != row.checksum:
        raise DamagedRowError("a recipient does not match its checksum")


def decode_recipient(row: Recipient, addresses: dict[int, str]) -> RecipientRow:
    """Return the recipient. DamagedRowError for a wrong checksum, state or index."""
    check_recipient(row)
    try:
        return RecipientRow(
            row.idx, addresses[row.idx], State(row.state), row.attempt, row.due_ms, -row.rank, row.queue_key
        )
    except (KeyError, ValueError) as error:
        raise DamagedRowError("a recipient has no address or an unknown state") from error


def pack_records(records: Sequence[bytes]) -> bytes:
    """Return records as one value."""
    return b"".join([part for record in records for part in (len(record).to_bytes(4, "big"), record)])


def unpack_records(packed: bytes, count: int) -> list[bytes]:
    """Return the records of a value. DamagedRowError unless they are `count`."""
    records: list[bytes] = []
    position = 0
    while position < len(packed):
        start = position + 4
        position = start + int.from_bytes(packed[position:start], "big")
        records.append(packed[start:position])
    if len(records) != count or position != len(packed):
        raise DamagedRowError("records do not fill their row")
    return records


def encode_key(envelope: Envelope) -> KeyRow | None:
    """Return the row that keeps the message's submission key; None for a message without one."""
    key = envelope.submission_key
    if key is None:
        return None
    fields = (key.key_hash, key.content_hash, envelope.message_id, envelope.accepted_ms)
    return KeyRow(*fields, key_checksum(*fields))


def key_checksum(key_hash: bytes, content_hash: bytes, message_id: bytes, time_ms: int) -> int:
    """Checksum of a submission key's row."""
    return crc32(b"%b%b%b%d" % (key_hash, content_hash, message_id, time_ms))


def decode_key(row: KeyRow) -> Submitted:
    """Return what the row knows of its key. DamagedRowError for a wrong checksum."""
    if key_checksum(*row[:4]) != row.checksum:
        raise DamagedRowError("a submission key does not match its checksum")
    return Submitted(row.content_hash, row.message_id)
