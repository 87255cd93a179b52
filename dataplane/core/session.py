"""The server's side of an SMTP submission session (RFC 5321, 6409) as a machine without I/O: octets in, replies and
actions out.

Contract. `receive` takes octets as they come, cut anywhere; `take_output` gives all replies since the last call, to be
written at once. After each call `action` says what the driver owes the machine before it goes on:

    action     the driver                                              then calls
    NONE       reads on
    MORE       turns to others first: a batch was longer than a turn   resume()
    WAIT       lets the client wait: `gate` held a MAIL back           resume(), which lets this MAIL in
    START_TLS  writes, shakes hands                                    tls_started()
    PERMIT     asks the limiter, reading paused                        permit(None or a refusal)
    COMMIT     stores `take_content()`, reading paused                 committed(reply)
    CLOSE      writes and closes

`timer` names the deadline that applies; `progress` grows with every line understood, so that a client that dribbles
octets does not gain time. Decisions are asked of a `Policy`, synchronously and from memory; an exception in it becomes
`451 4.3.0` with a reference, never a 5xx.

What is strict, and why:
- A command ends in CR LF. One with a bare CR or LF is answered 500 and the session is closed: whoever sends it speaks
  another protocol or tries to smuggle commands.
- Nothing may follow DATA, STARTTLS or AUTH before its reply (RFC 2920, section 3.1; RFC 3207, section 6; RFC 4954,
  section 4). Octets that do are never read as commands: 503 and close. BDAT, which is not offered, closes as well,
  since the chunk behind it would be read as commands.
- Content with stray CR, LF or NUL is answered 550 after its real end, and the session is closed, so that what follows
  it cannot be taken for a second message (see `datastream`).
- Commands are never echoed, for one may be a password sent after a refused AUTH.
"""

from __future__ import annotations

from dataplane.core import replies
from dataplane.core.datastream import ContentReader, Problem
from dataplane.core.dialog import Dialog
from dataplane.core.headers import MAX_HEADER_BYTES
from dataplane.core.replies import Reply
from dataplane.core.session_contract import Action, Limits, Policy, Timer

_CR = 0x0D
_PROBLEM_REPLIES = {
    Problem.LONG_LINE: replies.CONTENT_LINE_TOO_LONG,
    Problem.TOO_BIG: replies.TOO_BIG,
    Problem.NUL: replies.NUL_IN_CONTENT,
    Problem.STRAY: replies.STRAY_LINE_END,
}
_CLOSING_PROBLEMS = frozenset({Problem.NUL, Problem.STRAY})


class Session(Dialog):
    """One session. `authorized` says that the client may send without AUTH (it comes from an account's network)."""

    __slots__ = ("_buffer", "_content", "_overlong_bytes", "_reader", "_shed_reply", "progress")

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        hostname: str,
        *,
        tls_available: bool,
        tls_active: bool,
        authorized: bool = False,
    ) -> None:
        super().__init__(
            policy, limits, hostname, tls_available=tls_available, tls_active=tls_active, authorized=authorized
        )
        self.progress = 0
        self._buffer = b""
        self._content = b""
        self._reader: ContentReader | None = None
        self._shed_reply: Reply | None = None
        self._overlong_bytes = 0

    # --- what the driver asks ------------------------------------------------------------------------------------

    @property
    def timer(self) -> Timer:
        """The deadline that applies now; none while the driver owes the machine something."""
        if self.action > Action.MORE:
            return Timer.NONE
        if self._reader is not None:
            return Timer.DATA
        return Timer.COMMAND if self.authorized else Timer.COMMAND_BEFORE_AUTH

    @property
    def received_bytes(self) -> int:
        """Octets of the present DATA so far, for the minimum rate; 0 outside."""
        return 0 if self._reader is None else self._reader.received_bytes

    @property
    def held_bytes(self) -> int:
        """Octets of content in memory, for the worker's budget."""
        return len(self._content) if self._reader is None else self._reader.held_bytes

    def take_pieces(self) -> list[bytes]:
        """Return what came so far of the content being read, whole lines, and let go of it.

        Nothing as long as its header may not be complete.
        """
        reader = self._reader
        return reader.take() if reader is not None and reader.begins_with_header(MAX_HEADER_BYTES + 4) else []

    def take_content(self) -> bytes:
        """Return the message of a COMMIT, as far as its pieces were not taken, and let go of it."""
        content, self._content = self._content, b""
        return content

    # --- what the driver tells -----------------------------------------------------------------------------------

    def refuse(self, reply: Reply) -> None:
        """End the session with this reply, whatever state it is in but COMMIT."""
        super().refuse(reply)
        self._buffer = b""
        self._reader = None

    def shed(self, reply: Reply) -> None:
        """Forget the content being read, for want of memory; `reply` is given at its end."""
        if self._reader is not None:
            self._reader.discard()
            self._shed_reply = reply

    def receive(self, data: bytes) -> None:
        """Take octets from the client."""
        action = self.action
        if action is Action.NONE:
            self._run(self._buffer + data if self._buffer else data)
        elif action in {Action.COMMIT, Action.MORE, Action.WAIT}:
            # A batch may go on behind the final dot (RFC 2920); the driver pauses reading, so this is one read at most.
            self._buffer += data
            if len(self._buffer) > self._limits.pending_bytes and action is not Action.COMMIT:
                self.refuse(replies.TOO_MANY_ERRORS)
        elif action is not Action.CLOSE:
            self.refuse(replies.NOTHING_MAY_FOLLOW)

    def resume(self) -> None:
        """Go on after MORE or WAIT."""
        if self.action in {Action.MORE, Action.WAIT}:
            self._let_in = self.action is Action.WAIT
            self.action = Action.NONE
            self._run(self._buffer)

    def tls_started(self) -> None:
        """TLS is up: everything that was said before is forgotten (RFC 3207, section 4.2)."""
        self._end_transaction()
        self._policy.forget()
        self.tls_active = True
        self.authorized = self._network_authorized
        self.authenticated = self.esmtp = False
        self.helo = ""
        self._buffer = b""
        self.action = Action.NONE

    def permit(self, refusal: Reply | None) -> None:
        """Answer DATA: None lets the content come, a refusal leaves the transaction as it is."""
        if self.action is not Action.PERMIT:
            return
        self.action = Action.NONE
        if refusal is not None:
            self._reply(refusal)
            return
        self._reader = ContentReader(self._limits.max_message_bytes, self._limits.drain_bytes)
        self._shed_reply = None
        self._reply(replies.START_DATA)

    def committed(self, reply: Reply) -> None:
        """Answer the final dot and go on with what was sent behind it."""
        if self.action is not Action.COMMIT:
            return
        self.action = Action.NONE
        self._finish(reply)
        if len(self._buffer) > self._limits.pending_bytes:
            self.refuse(replies.TOO_MANY_ERRORS)
        elif self._buffer:
            self._run(self._buffer)

    # --- lines ---------------------------------------------------------------------------------------------------

    def _run(self, data: bytes) -> None:
        """Work through octets until they end, a turn is over or the driver owes something."""
        position = 0
        for _ in range(self._limits.commands_per_turn):
            if self._reader is not None:
                rest = self._read_content(self._reader, data[position:] if position else data)
                if rest is None:
                    return
                data, position = rest, 0
            else:
                line_end = data.find(b"\n", position)
                if line_end < 0:
                    self._keep_partial(data[position:] if position else data)
                    return
                line = data[position : line_end - 1]
                if line_end == position or data[line_end - 1] != _CR or b"\r" in line:
                    self._refuse_stray(data[position:line_end])
                    return
                begin, position = position, line_end + 1
                must_be_last = self._take_line(line)
                if must_be_last and position < len(data):
                    self.refuse(replies.NOTHING_MAY_FOLLOW)
                elif self.action is Action.WAIT:
                    # The same line comes again when it is let in.
                    position = begin
            if self.action is not Action.NONE:
                break
        else:
            if position < len(data):
                self.action = Action.MORE
        self._buffer = b"" if self.action is Action.CLOSE else data[position:]

    def _keep_partial(self, data: bytes) -> None:
        """Keep the beginning of a line; forget it where it is too long already."""
        if b"\r" in data[:-1]:
            self._refuse_stray(data)
            return
        if self._overlong_bytes or len(data) > self._line_limit(data):
            kept = b"\r" if data.endswith(b"\r") else b""
            self._overlong_bytes += len(data) - len(kept)
            data = kept
            if self._overlong_bytes > self._limits.overlong_bytes:
                self.refuse(replies.COMMAND_TOO_LONG)
                return
        self._buffer = data

    def _refuse_stray(self, line: bytes) -> None:
        """End the session for a bare CR or LF, or for what came before it where that was too much already."""
        before = self._overlong_bytes + len(line.partition(b"\r")[0])
        overlong = before > self._limits.overlong_bytes
        self.refuse(replies.COMMAND_TOO_LONG if overlong else replies.NOT_CRLF)

    def _line_limit(self, line: bytes) -> int:
        auth = self._login.active or line[:5].upper() == b"AUTH "
        return self._limits.auth_bytes if auth else self._limits.command_bytes

    def _take_line(self, line: bytes) -> bool:
        """Carry out one line; True when nothing may follow it before its reply."""
        self.progress += 1
        length = len(line) + 2
        if self._overlong_bytes or (length > self._limits.command_bytes and length > self._line_limit(line)):
            return self._refuse_overlong(self._overlong_bytes + len(line))
        if self._login.active:
            self._go_on_with_login(self._login.take(line))
            return True
        verb, _, argument = line.partition(b" ")
        command = self._COMMANDS.get(verb) or self._COMMANDS.get(verb.upper())
        if command is None:
            self._error(replies.UNKNOWN_COMMAND)
            return False
        try:
            return command(self, argument.decode())
        except UnicodeDecodeError:
            self._error(replies.NOT_UTF8)
            return False

    def _refuse_overlong(self, length: int) -> bool:
        """Answer a line of `length` octets that was not kept; an authentication exchange ends with it."""
        self._overlong_bytes = 0
        in_login = self._login.active
        self._login.cancel()
        if length > self._limits.overlong_bytes:
            self.refuse(replies.COMMAND_TOO_LONG)
        else:
            self._error(replies.AUTH_TOO_LONG if in_login else replies.COMMAND_TOO_LONG)
        return in_login

    # --- content -------------------------------------------------------------------------------------------------

    def _read_content(self, reader: ContentReader, data: bytes) -> bytes | None:
        """Feed the reader; return what stands behind the content once it is complete."""
        rest = reader.feed(data)
        if reader.exhausted:
            self.refuse(replies.TOO_BIG)
            return None
        if rest is None:
            return None
        self._reader = None
        self.progress += 1
        if self._shed_reply is not None and reader.problem not in _CLOSING_PROBLEMS:
            self._finish(self._shed_reply)
        elif reader.problem:
            self._finish(_PROBLEM_REPLIES[reader.problem])
            if reader.problem in _CLOSING_PROBLEMS:
                self.action = Action.CLOSE
        else:
            self._content = reader.content()
            self.action = Action.COMMIT
        return rest
