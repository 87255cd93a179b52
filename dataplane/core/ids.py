"""Message ids: UUIDv7 values (RFC 9562, section 5.7) as 16 raw bytes.

Inputs are the wall clock and random bytes, given by the caller; outputs are values. Ids made in one process in one
millisecond are not ordered among each other: only the millisecond is relied on, since it picks the day's partition.
"""

from __future__ import annotations

import uuid
from typing import NewType

MessageId = NewType("MessageId", bytes)

_VERSION_7 = 0x7000
_VARIANT = 0x8000000000000000


def new_message_id(now_ms: int, random: bytes) -> MessageId:
    """Return the id for a message accepted at `now_ms` (milliseconds since 1970); `random` is 10 random bytes."""
    high = (now_ms << 16) | _VERSION_7 | (int.from_bytes(random[:2], "big") & 0x0FFF)
    low = _VARIANT | (int.from_bytes(random[2:10], "big") & 0x3FFFFFFFFFFFFFFF)
    return MessageId(high.to_bytes(8, "big") + low.to_bytes(8, "big"))


def first_message_id(at_ms: int) -> MessageId:
    """Return the least id of a millisecond since 1970."""
    return MessageId(at_ms.to_bytes(6, "big") + bytes(10))


def format_message_id(message_id: bytes) -> str:
    """Return the usual text form, as the 250 and the API show it."""
    text = message_id.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def parse_message_id(text: str) -> MessageId:
    """Return the id that `text` names; ValueError when it is no UUIDv7 in its usual form."""
    value = uuid.UUID(text)
    if value.version != 7 or str(value) != text.lower():
        msg = "not a UUIDv7 in its usual form"
        raise ValueError(msg)
    return MessageId(value.bytes)


def message_id_time_ms(message_id: bytes) -> int:
    """Return the millisecond since 1970 in which the id was made."""
    return int.from_bytes(message_id[:6], "big")
