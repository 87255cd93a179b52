"""What is asked of a next hop and how it ends: transactions, verdicts, and a message's bytes on the wire.

Pure values and functions. Content is what was accepted: it is framed, never altered. A message that this server cannot
take as it is gets a refusal by us instead of a transaction:

    5.1.3   control characters in an address (they were refused at acceptance already)
    5.6.0   bare CR or LF in the content (likewise)
    5.6.3   8-bit content without 8BITMIME: RFC 6152, section 3, leaves conversion or refusal, and nothing is converted
    5.6.7   needs SMTPUTF8, and the server does not offer it (RFC 6531, section 3.2)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class VerdictKind(IntEnum):
    """How it ended for a recipient. REFUSED is by us; INTERRUPTED was cut before the dot, UNCERTAIN after it."""

    SENT = 1
    TEMPORARY = 2
    PERMANENT = 3
    REFUSED = 4
    INTERRUPTED = 5
    UNCERTAIN = 6


class Verdict(NamedTuple):
    """One recipient's end. `code` is 0 without a reply; `enhanced` may be empty; `text` is safe to store."""

    kind: VerdictKind
    code: int
    enhanced: str
    text: str


class Transaction(NamedTuple):
    """A message for recipients of one next hop. `content` has CRLF line ends; `sender` may be empty.

    `verified` says that this process has just seen that the line ends are right; otherwise they are counted again. A
    `priority` that is not 0 is handed on where the server knows priorities (RFC 6710, section 4.2). `permit` is asked
    right before the final dot, where there is one: False ends the transaction without it.
    """

    sender: str
    recipients: tuple[str, ...]
    content: bytes
    smtputf8: bool = False
    body_8bit: bool = False
    verified: bool = False
    priority: int = 0
    permit: Callable[[], bool] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Login:
    """User and password of a provider; its repr shows neither."""

    username: str
    password: str


def mail_parameters(transaction: Transaction, capabilities: Mapping[str, str]) -> tuple[Verdict | None, str]:
    """Return why a server with these capabilities cannot take the message, or None, and the parameters of MAIL."""
    sender, recipients, content, smtputf8, body_8bit, verified, priority, _ = transaction
    addresses = sender + "".join(recipients)
    if not addresses.isprintable() and any(character < " " or character == "\x7f" for character in addresses):
        return _refusal("5.1.3", "control characters in an address"), ""
    if not verified and not is_canonical(content):
        return _refusal("5.6.0", "content with bare CR or LF"), ""
    parameters = f" SIZE={len(content)}" if "SIZE" in capabilities else ""
    if body_8bit:
        if "8BITMIME" not in capabilities:
            return _refusal("5.6.3", "8-bit content, and the next hop does not offer 8BITMIME"), ""
        parameters += " BODY=8BITMIME"
    if priority and "MT-PRIORITY" in capabilities:
        parameters += f" MT-PRIORITY={priority}"
    if smtputf8 or not addresses.isascii():
        if "SMTPUTF8" in capabilities:
            parameters += " SMTPUTF8"
        elif not addresses.isascii() or not _header_block(content).isascii():
            return _refusal("5.6.7", "the message needs SMTPUTF8, and the next hop does not offer it"), ""
    return None, parameters


PIECE_BYTES = 128 * 1024
"""What is framed in one go: stuffing, and encrypting it afterwards, may not hold a loop up."""

DOT_APART_BYTES = 32 * 1024
"""A content up to so much goes with its dot: a next hop that has read the envelope has room for it, as a rule."""


class Framing:
    """The same as `frame_content`, piece by piece, the final dot apart: what follows 354 for a content not so small."""

    __slots__ = ("_content", "_piece_bytes", "_position")

    def __init__(self, content: bytes, piece_bytes: int = PIECE_BYTES) -> None:
        self._content = content
        self._piece_bytes = piece_bytes
        self._position = 0

    def next(self) -> tuple[bytes, bool]:
        """Return the next piece and whether it was the last one, the final dot. Not to be called after that."""
        content, start = self._content, self._position
        if start == len(content):
            return _final_dot(content), True
        end = self._cut(start)
        piece = content[start:end]
        self._position = end
        if b"\r\n." in piece:
            piece = piece.replace(b"\r\n.", b"\r\n..")
        if piece[:1] == b"." and (start == 0 or content.endswith(b"\r\n", 0, start)):
            piece = b"." + piece
        return piece, False

    @property
    def dot_is_next(self) -> bool:
        """Whether all but the final dot was returned."""
        return self._position == len(self._content)

    def _cut(self, start: int) -> int:
        """Where the piece ends: behind a line where one ends in it, never between the octets before a dot."""
        content = self._content
        end = start + self._piece_bytes
        if end >= len(content):
            return len(content)
        line_end = content.rfind(b"\r\n", start, end)
        if line_end > start:
            return line_end + 2
        return end - content.endswith(b"\r", start, end)


def frame_content(content: bytes) -> list[bytes]:
    """Return what follows 354: the content with dots stuffed where a line begins with one, and the final dot."""
    if b"\r\n." in content:
        content = content.replace(b"\r\n.", b"\r\n..")
    if content[:1] == b".":
        content = b"." + content
    return [content, _final_dot(content)] if content else [_final_dot(content)]


def _final_dot(content: bytes) -> bytes:
    return b".\r\n" if content[-2:] == b"\r\n" or not content else b"\r\n.\r\n"


def is_canonical(content: bytes, piece_bytes: int = PIECE_BYTES) -> bool:
    """Whether CR and LF stand in it as CR LF only. Looks piece by piece: in a thread, others get their turns."""
    for start in range(0, len(content), piece_bytes):
        end = start + piece_bytes
        lines = content.count(b"\r\n", start, end + 1)
        line_feeds = content.count(b"\n", start + 1 if start else 0, end + 1)
        if line_feeds != lines or content.count(b"\r", start, end) != lines:
            return False
    return True


def _refusal(enhanced: str, text: str) -> Verdict:
    return Verdict(VerdictKind.REFUSED, 0, enhanced, text)


def _header_block(content: bytes) -> bytes:
    end = content.find(b"\r\n\r\n")
    return content if end < 0 else content[:end]
