"""A client's half of SMTP for load: bytes in, bytes out, no more checks than figures need.

Contract. `receive(data)` takes what came and says what to do; `output` is then what must be sent, and is the caller's
to forget. One recipient a message. Replies are believed to be well-formed: a peer that sends anything else ends up as
LOST. Commands wait for their replies, as most mail libraries do it, or go in one group with PIPELINING (RFC 2920).

    GREETING → EHLO → [STARTTLS → (handshake) → EHLO] → [AUTH] → READY
    READY  --begin()-->  ENVELOPE → CONTENT → READY (DONE with `code`)
                         refused:   RESET   → READY (DONE with `code`)
    READY  --quit()-->   QUIT → CLOSED
"""

from __future__ import annotations

from base64 import b64encode
from enum import IntEnum
from typing import NamedTuple


class Step(IntEnum):
    """What the caller has to do, beside sending `output`."""

    NOTHING = 0
    # The session can take a message.
    READY = 1
    # The dot has to be sent with `output`: the moment from which dot to 250 counts.
    DOT = 2
    # The message has its answer in `code`; the session can take the next.
    DONE = 3
    START_TLS = 4
    # The session was refused or said goodbye; `code` is the reply's, 0 after our own QUIT.
    CLOSED = 5


class _State(IntEnum):
    GREETING = 0
    EHLO = 1
    STARTTLS = 2
    TLS = 3
    AUTH = 4
    READY = 5
    ENVELOPE = 6
    CONTENT = 7
    RESET = 8
    QUIT = 9


class Envelope(NamedTuple):
    """Sender and recipient of every message of a session, and how they are said."""

    sender: str
    recipient: str
    pipelining: bool


class Access(NamedTuple):
    """How a session gets in; no TLS and no AUTH unless said."""

    tls: bool = False
    username: str = ""
    password: str = ""


class Dialog:
    """One session; see the module."""

    __slots__ = (
        "_access",
        "_commands",
        "_content",
        "_pending",
        "_position",
        "_secure",
        "_state",
        "code",
        "greeted",
        "output",
    )

    def __init__(self, envelope: Envelope, access: Access) -> None:
        self._access = access
        mail = f"MAIL FROM:<{envelope.sender}>\r\n".encode("ascii")
        recipient = f"RCPT TO:<{envelope.recipient}>\r\n".encode("ascii")
        commands = [mail, recipient, b"DATA\r\n"]
        self._commands = [b"".join(commands)] if envelope.pipelining else commands
        self._state = _State.GREETING
        self._secure = False
        self._pending = b""
        self._content = b""
        self._position = 0
        self.output = b""
        self.code = 0
        self.greeted = False

    @property
    def is_sending(self) -> bool:
        """Whether a message is under way."""
        return _State.ENVELOPE <= self._state <= _State.RESET

    def begin(self, content: bytes) -> None:
        """Start a message; `content` ends with its final dot. Only after READY or DONE."""
        self._content = content
        self._state = _State.ENVELOPE
        self._position = 0
        self.code = 0
        self.output = self._commands[0]

    def quit(self) -> None:
        """Take leave; only after READY or DONE."""
        self._state = _State.QUIT
        self.output = b"QUIT\r\n"

    def tls_started(self) -> None:
        """Begin anew inside TLS (RFC 3207, section 4.2)."""
        self._secure = True
        self._say_ehlo()

    def receive(self, data: bytes) -> Step:
        """Take replies; the last step counts, and none follows DOT or DONE in the same bytes."""
        if self._pending:
            data = self._pending + data
        begin, step = 0, Step.NOTHING
        while (end := data.find(b"\n", begin)) >= 0:
            if data[begin + 3 : begin + 4] != b"-":
                step = self._on_reply(int(data[begin : begin + 3]))
            begin = end + 1
        self._pending = data[begin:]
        return step

    def _on_reply(self, code: int) -> Step:
        state = self._state
        if state is _State.ENVELOPE:
            return self._on_envelope(code)
        if state is _State.CONTENT:
            self._state = _State.READY
            self.code = code
            return Step.CLOSED if code == 421 else Step.DONE
        if state is _State.RESET:
            self._state = _State.READY
            return Step.DONE
        if state is _State.QUIT:
            self.code = 0
            return Step.CLOSED
        return self._on_opening(code)

    def _on_envelope(self, code: int) -> Step:
        position = self._position
        self._position = position + 1
        if code >= 400 and not self.code:
            self.code = code
        if code == 421:
            return Step.CLOSED
        if len(self._commands) == 1:
            if position < 2:
                return Step.NOTHING
        elif position < 2 and not self.code:
            self.output = self._commands[position + 1]
            return Step.NOTHING
        if self.code:
            self._state = _State.RESET
            self.output = b"RSET\r\n"
            return Step.NOTHING
        self._state = _State.CONTENT
        self.output = self._content
        return Step.DOT

    def _on_opening(self, code: int) -> Step:
        if code >= 400:
            self.code = code
            return Step.CLOSED
        state = self._state
        if state is _State.GREETING:
            self.greeted = True
            self._say_ehlo()
        elif state is _State.STARTTLS:
            self._state = _State.TLS
            return Step.START_TLS
        elif state is _State.EHLO and self._access.tls and not self._secure:
            self._state = _State.STARTTLS
            self.output = b"STARTTLS\r\n"
        elif state is _State.EHLO and self._access.username:
            secret = f"\0{self._access.username}\0{self._access.password}".encode()
            self._state = _State.AUTH
            self.output = b"AUTH PLAIN " + b64encode(secret) + b"\r\n"
        elif state in (_State.EHLO, _State.AUTH):
            self._state = _State.READY
            return Step.READY
        return Step.NOTHING

    def _say_ehlo(self) -> None:
        self._state = _State.EHLO
        self.output = b"EHLO load.example.org\r\n"
