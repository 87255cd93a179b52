"""What is sent, and how a sink knows it again: every message carries its stream, number and time in its Message-ID.

Contract. A mark is `<pb.STREAM.NUMBER.TIME@…>`: the stream is one load process in one run, the number counts from 0
within it, the time is the machine's monotonic clock in nanoseconds when the message was meant to be sent. Servers leave
a Message-ID that is there alone, so it survives any relay. Sizes are those of the content with its header, as on the
wire, without the final dot.
"""

from __future__ import annotations

from typing import NamedTuple

_BEGIN = b"Message-ID: <pb."
_END = b"@bench.example.org>\r\n"
_LINE = b"The quick brown fox jumps over the lazy dog, and the dog lets it.\r\n"
# Digits of a mark differ by a few bytes; sizes are of a mark of this length.
_USUAL_MARK_BYTES = len(_BEGIN + b"1.12345.1234567890123456" + _END)


class Mark(NamedTuple):
    """Where a message belongs; see the module."""

    stream: int
    number: int
    time_ns: int


def make_rest(size_bytes: int, sender: str, recipient: str) -> bytes:
    """Return all of a message behind its mark, so that both have `size_bytes` together, or a little more if small."""
    header = (
        f"From: Load <{sender}>\r\nTo: <{recipient}>\r\nDate: Fri, 20 Nov 2026 12:00:00 +0000\r\n"
        "Subject: a message of the load harness\r\n\r\n"
    ).encode("ascii")
    left = max(size_bytes - _USUAL_MARK_BYTES - len(header), 2)
    lines, odd = divmod(left - 2, len(_LINE))
    return header + _LINE * lines + b"x" * odd + b"\r\n"


def make_mark(stream: int, number: int, time_ns: int) -> bytes:
    """Return the first line of a message."""
    return b"Message-ID: <pb.%d.%d.%d@bench.example.org>\r\n" % (stream, number, time_ns)


def find_mark(content: bytes) -> Mark | None:
    """Return the mark, None when the content is not ours."""
    begin = content.find(_BEGIN)
    end = content.find(_END, begin)
    if begin < 0 or end < 0:
        return None
    try:
        stream, number, time_ns = content[begin + len(_BEGIN) : end].split(b".")
        return Mark(int(stream), int(number), int(time_ns))
    except ValueError:
        return None
