"""Reads SMTP replies out of a byte stream (RFC 5321, section 4.2), strictly: no verdict may be open to interpretation.

Input is bytes in any pieces; output is replies. MalformedReplyError when a line does not begin with three ASCII digits
from 200 to 599 followed by a space, a hyphen or the line's end, when the lines of one reply carry different codes, when
a line does not end in CRLF, and when a reply is larger than 32 KiB or longer than 500 lines. After an error the stream
is useless.

Lenient in two points, since both are common and neither is ambiguous: a second digit above 5, and a reply without text.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_REPLY_BYTES = 32_768
MAX_REPLY_LINES = 500

_CODES = {b"%d" % code: code for code in range(200, 600)}
_CARRIAGE_RETURN = ord("\r")
_LAST_LINE = (b" ", b"")


class MalformedReplyError(Exception):
    """What came is no reply: nothing that follows on this connection can be trusted."""


class Reply(NamedTuple):
    """A whole reply: its code and the raw text of each line, without code, separator and line end."""

    code: int
    lines: tuple[bytes, ...]


class ReplyReader:
    """Collects bytes and hands out whole replies."""

    __slots__ = ("_buffer", "_code", "_lines", "_scanned", "_size_bytes", "_start")

    def __init__(self) -> None:
        self._buffer = b""
        self._start = 0  # of the present line
        self._scanned = 0  # no line end before this
        self._code = 0  # of the reply begun, 0 between replies
        self._lines: list[bytes] = []
        self._size_bytes = 0  # of the reply's lines read so far

    @property
    def pending(self) -> bool:
        """Whether anything was received that no reply has used up."""
        return self._code != 0 or self._start < len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take what was received."""
        if self._start == len(self._buffer):
            self._buffer = data
            self._start = self._scanned = 0
        else:
            self._buffer = self._buffer[self._start :] + data
            self._scanned -= self._start
            self._start = 0

    def next(self) -> Reply | None:
        """Return the next whole reply, or None when more bytes are needed. MalformedReplyError."""
        while True:
            buffer, start = self._buffer, self._start
            end = buffer.find(b"\n", self._scanned)
            if end < 0:
                self._scanned = len(buffer)
                if self._size_bytes + self._scanned - start > MAX_REPLY_BYTES:
                    raise MalformedReplyError("reply too large")
                return None
            self._start = self._scanned = end + 1
            if self._size_bytes + end - start >= MAX_REPLY_BYTES:
                raise MalformedReplyError("reply too large")
            line = buffer[start : end - 1]
            code = _CODES.get(line[:3])
            if code is None or buffer[end - 1] != _CARRIAGE_RETURN:
                raise MalformedReplyError("not a reply line")
            separator = line[3:4]
            if separator in _LAST_LINE:
                if self._code == 0:
                    return Reply(code, (line[4:],))
                return self._finish(code, line)
            if separator != b"-":
                raise MalformedReplyError("neither space nor hyphen after the code")
            self._continue(code, line)

    def _finish(self, code: int, line: bytes) -> Reply:
        self._continue(code, line)
        reply = Reply(code, tuple(self._lines))
        self._code = self._size_bytes = 0
        self._lines = []
        return reply

    def _continue(self, code: int, line: bytes) -> None:
        if self._code not in (0, code):
            raise MalformedReplyError("the lines of one reply carry different codes")
        if len(self._lines) == MAX_REPLY_LINES:
            raise MalformedReplyError("too many lines")
        self._code = code
        self._size_bytes += len(line) + 2
        self._lines.append(line[4:])
