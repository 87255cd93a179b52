"""Mail on its way from one spool to another, as values: what is given up, and what arrives of it.

A message is given up whole, with all recipients that are not terminal, none of which is being sent. States, attempts,
due times and queue keys stay what they were.
"""

from __future__ import annotations

from typing import NamedTuple

from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.ids import MessageId

PIECE_BYTES = 256 * 1024


class HandedOver(NamedTuple):
    """A message without its content."""

    envelope: Envelope
    recipients: tuple[RecipientRow, ...]
    content_bytes: int


class HandoverPart(NamedTuple):
    """A part of what a spool is given for its Take of this number; see postroad.node.v1.LedgerHandover."""

    spool: str
    number: int
    message_id: MessageId
    handed_over: HandedOver | None
    content: bytes
    last: bool


class DamagedHandoverError(Exception):
    """What arrived is no message that this version can read."""
