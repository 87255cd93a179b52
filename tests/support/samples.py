"""Messages that mail programs and the people behind them really send, each with what is added to it on the way.

Line ends are CRLF, and each content ends with one, for that is what DATA carries.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from support.arrivals import ALL_ADDED

_HEADER = b"From: App <app@example.com>\r\nTo: someone@example.net\r\nSubject: A sample\r\n"
_DATE = b"Date: Fri, 20 Nov 2026 10:00:00 +0100\r\n"
_MESSAGE_ID = b"Message-ID: <sample@example.com>\r\n"
_LINE_OCTETS = 998
_LONG_OCTETS = 1_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """A content, the fields added on top, and whether a blank line must part them from a content without header."""

    name: str
    content: bytes
    added: tuple[str, ...] = ALL_ADDED
    body_only: bool = False

    def __str__(self) -> str:
        return self.name


def _binary_lines() -> bytes:
    """Lines of exactly 998 octets of all values but NUL, CR and LF; some begin with a dot."""
    choose = random.Random(998)
    octets = bytes(set(range(1, 256)) - {10, 13})
    lines = [bytes(choose.choices(octets, k=_LINE_OCTETS)) for _ in range(40)]
    lines[3] = b"." + lines[3][1:]
    lines[4] = b".." + lines[4][2:]
    return b"".join(line + b"\r\n" for line in lines)


def _long_text() -> bytes:
    line = b"All work and no play makes mail a dull protocol, said the relay.\r\n.hidden\r\n"
    return line * (_LONG_OCTETS // len(line) + 1)


_EIGHT_BIT = (
    b"MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"
    + "Grüße aus Köln, Привет, 你好 \t \r\n".encode()
    + b"and octets that are no UTF-8: \xff\xfe\x80\xc0\r\n"
)

SAMPLES = (
    Sample("seven-bit-text", _HEADER + b"\r\nHello.\r\n"),
    Sample("eight-bit-body", _HEADER + _EIGHT_BIT),
    Sample("dots-first-in-lines", _HEADER + b"\r\n.\r\n..\r\n.one\r\n..two\r\n...\r\n. \r\nend.\r\n.\r\n"),
    Sample("one-megabyte", _HEADER + b"\r\n" + _long_text()),
    Sample("subject-in-utf-8", "From: app@example.com\r\nSubject: Grüße, 你好\r\n\r\nraw\r\n".encode()),
    Sample("subject-encoded", b"From: app@example.com\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n\r\nencoded\r\n"),
    Sample("binary-lines-of-998", _HEADER + b"\r\n" + _binary_lines()),
    Sample("white-space-at-ends", _HEADER + b"X-Folded: one\r\n\ttwo  \r\n\r\n \t \r\nend \r\n\r\n\r\n"),
    Sample("empty-body", _HEADER + b"\r\n"),
    Sample("header-without-blank-line", _HEADER),
    Sample("blank-line-first", b"\r\nno header at all\r\n"),
    Sample("no-header", b"just words, and no field among them\r\nmore\r\n", body_only=True),
    Sample("date-and-message-id-there", _DATE + _HEADER + _MESSAGE_ID + b"\r\nmine\r\n", added=("Received",)),
    Sample("date-there", _DATE + _HEADER + b"\r\nmine\r\n", added=("Received", "Message-ID")),
    Sample("message-id-there", _HEADER + _MESSAGE_ID.lower() + b"\r\nmine\r\n", added=("Received", "Date")),
    Sample("bcc-kept", _HEADER + b"Bcc: hidden@example.net\r\n\r\nbcc\r\n"),
)

TEXT = SAMPLES[0].content
DOTS = SAMPLES[2].content
