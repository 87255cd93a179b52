"""Reads the content of DATA: finds its end, undoes dot-stuffing, and holds it to its budgets of bytes and lines.

Contract. `feed` takes octets as they come and returns None, or, once the end was seen, what came behind it. Only CR LF
dot CR LF ends the content (RFC 5321, section 4.1.1.4); nothing else about a dot does. The result does not depend on
how the octets were cut. Memory: the content as far as nobody took it (`take`), plus one unfinished line of at most
1,000 octets; content that has a problem is forgotten at once and the rest is read over until its end, or until
`drain_bytes` above the limit.

What is wrong is kept as `problem`, the first one found, and is told once, after the end of the data:

    problem        what                                                            decision
    STRAY          CR or LF that is no part of CR LF                               refused, never repaired
    NUL            a NUL octet                                                     refused
    LONG_LINE      a line of more than 998 octets, stuffed dot and CR LF aside     refused
    TOO_BIG        more than the limit, counted after dot-stuffing was undone      refused

Content above the limit by more than `drain_bytes` makes the reader `exhausted`: nobody waits for its end.
Refusing stray CR and LF is what keeps this server from being the first half of SMTP smuggling: what another server
could read as an end of data never leaves here.
"""

from __future__ import annotations

from enum import IntEnum

MAX_LINE_OCTETS = 998
_LINE_WITH_CRLF = MAX_LINE_OCTETS + 2
_END = b".\r\n"
_NOT_LINE_ENDS = bytes(octet for octet in range(256) if octet not in b"\r\n\0")
_SMALL_CHUNK_OCTETS = 16_384
_LONG_LINE_STAND_IN = b"x"
"""Stands for the beginning of a line that was forgotten, so that its rest cannot look like the start of one."""


class Problem(IntEnum):
    """What is wrong with the content; a problem is replaced by a graver (greater) one only."""

    NONE = 0
    LONG_LINE = 1
    TOO_BIG = 2
    NUL = 3
    STRAY = 4


class ContentReader:
    """One message's content. After `feed` returned other than None, or `exhausted` is true, it takes no more."""

    __slots__ = (
        "_carry",
        "_chunks",
        "_discarding",
        "_drain_bytes",
        "_max_bytes",
        "_taken_bytes",
        "problem",
        "received_bytes",
        "size_bytes",
    )

    def __init__(self, max_bytes: int, drain_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._drain_bytes = drain_bytes
        self._chunks: list[bytes] = []
        self._carry = b""
        self._discarding = False
        self._taken_bytes = 0
        self.problem = Problem.NONE
        self.received_bytes = 0
        self.size_bytes = 0

    @property
    def exhausted(self) -> bool:
        """Whether the end need not be waited for."""
        return self.size_bytes > self._max_bytes + self._drain_bytes

    @property
    def held_bytes(self) -> int:
        """Octets of content in memory now."""
        return 0 if self._discarding else self.size_bytes - self._taken_bytes

    def feed(self, data: bytes) -> bytes | None:
        """Take octets; return None before the end of data, and what stands behind it after it."""
        self.received_bytes += len(data)
        if self._carry:
            data = self._carry + data
        if data.startswith(_END):
            self._carry = b""
            return data[3:]
        # Most messages hold no line with a leading dot: the first CR LF dot found is the end.
        dot = data.find(b"\r\n.")
        if dot >= 0:
            end = dot if data.startswith(b"\r\n", dot + 3) else data.find(b"\r\n.\r\n", dot)
            if end >= 0:
                self._carry = b""
                self._take_lines(data[: end + 2], stuffed=end != dot or data[0] == 0x2E)
                return data[end + 5 :]
        cut = data.rfind(b"\r\n") + 2
        if cut > 1:
            self._take_lines(data[:cut], stuffed=dot >= 0 or data[0] == 0x2E)
            data = data[cut:]
        within = len(data) < _LINE_WITH_CRLF + data.startswith(b".")
        self._carry = data if within else self._forget_line(data)
        return None

    def discard(self) -> None:
        """Forget the content and store no more of it; its end is still looked for."""
        self._discarding = True
        self._chunks.clear()

    def begins_with_header(self, enough_bytes: int) -> bool:
        """Whether what came holds the end of a header, or so much that it need not; or its beginning was taken."""
        if self._taken_bytes or self.size_bytes > enough_bytes:
            return True
        return bool(self._chunks) and b"\r\n\r\n" in self._chunks[0]

    def take(self) -> list[bytes]:
        """Return the whole lines that came so far, in pieces, and let go of them; `content` is the rest then."""
        pieces, self._chunks = self._chunks, []
        self._taken_bytes = self.size_bytes
        return pieces

    def content(self) -> bytes:
        """Return the content that nobody took, joined once, with canonical line ends and without dot-stuffing."""
        chunks = self._chunks
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _take_lines(self, lines: bytes, *, stuffed: bool) -> None:
        """Take whole lines: they begin where a line begins and end with CR LF."""
        line_ends = lines.translate(None, _NOT_LINE_ENDS)
        if len(line_ends) != 2 * lines.count(b"\r\n"):
            self._note(Problem.STRAY if _has_strays(lines) else Problem.NUL)
        if stuffed:
            # A leading dot goes away whatever follows it (RFC 5321, section 4.5.2), not only before another.
            lines = (lines[1:] if lines.startswith(b".") else lines).replace(b"\r\n.", b"\r\n")
        if len(lines) > _LINE_WITH_CRLF and _has_long_line(lines):
            self._note(Problem.LONG_LINE)
        self._grow(len(lines))
        if not self._discarding:
            self._keep(lines)

    def _keep(self, lines: bytes) -> None:
        """Store lines; small pieces are put together, or an object for each would cost many times the content."""
        chunks = self._chunks
        if chunks and len(chunks[-1]) < _SMALL_CHUNK_OCTETS:
            chunks[-1] += lines
        else:
            chunks.append(lines)

    def _forget_line(self, line: bytes) -> bytes:
        """Note that an unfinished line is too long; return what must be remembered of it."""
        kept = b"\r" if line.endswith(b"\r") else b""
        body = line[: len(line) - len(kept)]
        self._note(Problem.LONG_LINE)
        if b"\r" in body or b"\n" in body:
            self._note(Problem.STRAY)
        elif b"\0" in body:
            self._note(Problem.NUL)
        self._grow(len(body) - len(_LONG_LINE_STAND_IN))
        return _LONG_LINE_STAND_IN + kept

    def _grow(self, octets: int) -> None:
        self.size_bytes += octets
        if self.size_bytes > self._max_bytes:
            self._note(Problem.TOO_BIG)

    def _note(self, problem: Problem) -> None:
        self.problem = max(self.problem, problem)
        self.discard()


def content_problem(content: bytes, max_bytes: int) -> Problem:
    """Return what a `ContentReader` would find wrong with a content that is there as a whole; its last line has an end.

    The order of graveness is the reader's.
    """
    if _has_strays(content):
        return Problem.STRAY
    if b"\0" in content:
        return Problem.NUL
    if len(content) > max_bytes:
        return Problem.TOO_BIG
    return Problem.LONG_LINE if len(content) > _LINE_WITH_CRLF and _has_long_line(content) else Problem.NONE


def _has_strays(lines: bytes) -> bool:
    return lines.count(b"\r") + lines.count(b"\n") != 2 * lines.count(b"\r\n")


def _has_long_line(lines: bytes) -> bool:
    """Whether a line is above the limit: hop from one line end to the last one within reach of it."""
    position, length = 0, len(lines)
    while length - position > _LINE_WITH_CRLF:
        line_end = lines.rfind(b"\r\n", position, position + _LINE_WITH_CRLF)
        if line_end < 0:
            return True
        position = line_end + 2
    return False
