"""The server's side of an SMTP submission session (RFC 5321, 6409) as a machine without I/O: octets in, replies and
actions out.

Contract. `receive` takes octets as they come, cut anywhere; `take_output` gives all replies since the last call, to be
written at once. After each call `action` says what the driver owes the machine before it goes on:

    action     the driver                                              then calls
    NONE       reads on
    MORE       turns to others first: a batch was longer than a turn   resume()
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

from collections.abc import Callable
from typing import ClassVar

from dataplane.core import replies
from dataplane.core.address import AddressError, NonAsciiAddressError, parse_path
from dataplane.core.datastream import ContentReader, Problem
from dataplane.core.login import Credentials, LoginExchange
from dataplane.core.replies import Reply
from dataplane.core.session_contract import (
    NO_PARAMETERS,
    Action,
    Limits,
    Policy,
    Timer,
    parse_parameters,
)

_CR = 0x0D
_MAX_HELLO_OCTETS = 255
_PROBLEM_REPLIES = {
    Problem.LONG_LINE: replies.CONTENT_LINE_TOO_LONG,
    Problem.TOO_BIG: replies.TOO_BIG,
    Problem.NUL: replies.NUL_IN_CONTENT,
    Problem.STRAY: replies.STRAY_LINE_END,
}
_CLOSING_PROBLEMS = frozenset({Problem.NUL, Problem.STRAY})


class Session:
    """One session. `authorized` says that the client may send without AUTH (it comes from an account's network)."""

    __slots__ = (
        "_auth_failures",
        "_buffer",
        "_content",
        "_errors",
        "_hostname",
        "_idle_commands",
        "_in_transaction",
        "_limits",
        "_login",
        "_output",
        "_overlong_bytes",
        "_policy",
        "_reader",
        "_recipient_count",
        "_shed_reply",
        "_tls_available",
        "action",
        "authenticated",
        "authorized",
        "esmtp",
        "helo",
        "parameters",
        "progress",
        "tls_active",
    )

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
        self._policy = policy
        self._limits = limits
        self._hostname = hostname
        self._tls_available = tls_available
        self.tls_active = tls_active
        self.authorized = authorized
        self.authenticated = False
        self.action = Action.NONE
        self.progress = 0
        self.helo = ""
        self.esmtp = False
        self.parameters = NO_PARAMETERS
        self._buffer = b""
        self._output: list[bytes] = []
        self._content = b""
        self._reader: ContentReader | None = None
        self._shed_reply: Reply | None = None
        self._in_transaction = False
        self._recipient_count = 0
        self._login = LoginExchange()
        self._overlong_bytes = 0
        self._errors = 0
        self._auth_failures = 0
        self._idle_commands = 0

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
    def recipient_count(self) -> int:
        """How many recipients the transaction has."""
        return self._recipient_count

    @property
    def received_bytes(self) -> int:
        """Octets of the present DATA so far, for the minimum rate; 0 outside."""
        return 0 if self._reader is None else self._reader.received_bytes

    @property
    def held_bytes(self) -> int:
        """Octets of content in memory, for the worker's budget."""
        return len(self._content) if self._reader is None else self._reader.held_bytes

    @property
    def in_transaction(self) -> bool:
        """Whether MAIL was accepted and its transaction is not over."""
        return self._in_transaction

    def take_output(self) -> bytes:
        """Return what is to be written, in one piece."""
        output = self._output
        if not output:
            return b""
        wire = output[0] if len(output) == 1 else b"".join(output)
        output.clear()
        return wire

    def take_content(self) -> bytes:
        """Return the complete message of a COMMIT and let go of it."""
        content, self._content = self._content, b""
        return content

    # --- what the driver tells -----------------------------------------------------------------------------------

    def greet(self) -> None:
        """Open the session."""
        self._reply(replies.greeting(self._hostname))

    def refuse(self, reply: Reply) -> None:
        """End the session with this reply, whatever state it is in but COMMIT."""
        self._reply(reply)
        self._end_transaction()
        self._buffer = b""
        self._reader = None
        self.action = Action.CLOSE

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
        elif action in {Action.COMMIT, Action.MORE}:
            # A batch may go on behind the final dot (RFC 2920); the driver pauses reading, so this is one read at most.
            self._buffer += data
            if len(self._buffer) > self._limits.pending_bytes and action is Action.MORE:
                self.refuse(replies.TOO_MANY_ERRORS)
        elif action is not Action.CLOSE:
            self.refuse(replies.NOTHING_MAY_FOLLOW)

    def resume(self) -> None:
        """Go on after MORE."""
        if self.action is Action.MORE:
            self.action = Action.NONE
            self._run(self._buffer)

    def tls_started(self) -> None:
        """TLS is up: everything that was said before is forgotten (RFC 3207, section 4.2)."""
        self._end_transaction()
        self._policy.forget()
        self.tls_active = True
        self.authorized = self.authenticated = self.esmtp = False
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
                    self.refuse(replies.NOT_CRLF)
                    return
                position = line_end + 1
                must_be_last = self._take_line(line)
                if must_be_last and position < len(data):
                    self.refuse(replies.NOTHING_MAY_FOLLOW)
            if self.action is not Action.NONE:
                break
        else:
            if position < len(data):
                self.action = Action.MORE
        self._buffer = b"" if self.action is Action.CLOSE else data[position:]

    def _keep_partial(self, data: bytes) -> None:
        """Keep the beginning of a line; forget it where it is too long already."""
        if b"\r" in data[:-1]:
            self.refuse(replies.NOT_CRLF)
            return
        if self._overlong_bytes or len(data) > self._line_limit(data):
            kept = b"\r" if data.endswith(b"\r") else b""
            self._overlong_bytes += len(data) - len(kept)
            data = kept
            if self._overlong_bytes > self._limits.overlong_bytes:
                self.refuse(replies.COMMAND_TOO_LONG)
                return
        self._buffer = data

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

    def _reply(self, reply: Reply) -> None:
        self._output.append(reply.wire)

    def _error(self, reply: Reply) -> None:
        """Answer a mistake in the protocol; a client that makes too many is sent away."""
        self._errors += 1
        if self._errors >= self._limits.max_errors:
            self._reply(reply)
            self.refuse(replies.TOO_MANY_ERRORS)
        else:
            self._reply(reply)

    def _idle(self, reply: Reply) -> None:
        """Answer a command that moves no mail; it may not be repeated without end."""
        self._idle_commands += 1
        limits = self._limits
        allowed = limits.max_idle_commands if self.authorized else limits.max_idle_commands_before_auth
        if self._idle_commands > allowed:
            self.refuse(replies.TOO_MANY_ERRORS)
        else:
            self._reply(reply)

    # --- the transaction -----------------------------------------------------------------------------------------

    def _mail(self, argument: str) -> bool:
        if argument[:5].upper() != "FROM:":
            self._error(replies.BAD_ARGUMENT)
        elif not self.helo:
            self._error(replies.HELLO_FIRST)
        elif not self.authorized:
            self._error(replies.AUTH_REQUIRED)
        elif self._in_transaction:
            self._error(replies.NESTED_MAIL)
        else:
            self._begin_transaction(argument)
        return False

    def _begin_transaction(self, argument: str) -> None:
        try:
            sender, parameter_text = parse_path(argument[5:], smtputf8=True)
        except AddressError:
            self._reply(replies.BAD_SENDER)
            return
        parameters = parse_parameters(parameter_text) if parameter_text else NO_PARAMETERS
        if isinstance(parameters, Reply):
            self._error(parameters)
        elif not parameters.smtputf8 and not argument.isascii():
            self._reply(replies.NEEDS_SMTPUTF8)
        elif parameters.size_bytes > self._limits.max_message_bytes:
            self._reply(replies.TOO_BIG)
        else:
            try:
                refusal = self._policy.mail(sender, parameters)
            except Exception as error:  # noqa: BLE001 - a fault of ours is 451, whatever it is
                refusal = replies.internal_error(self._policy.failed(error))
            if refusal is None:
                self._in_transaction = True
                self.parameters = parameters
            self._reply(refusal or replies.SENDER_OK)

    def _recipient(self, argument: str) -> bool:
        if argument[:3].upper() != "TO:":
            self._error(replies.BAD_ARGUMENT)
        elif not self._in_transaction:
            self._error(replies.MAIL_FIRST)
        elif self._recipient_count >= self._limits.max_recipients:
            self._reply(replies.TOO_MANY_RECIPIENTS)
        else:
            self._add_recipient(argument)
        return False

    def _add_recipient(self, argument: str) -> None:
        try:
            address, parameters = parse_path(argument[3:], smtputf8=self.parameters.smtputf8, recipient=True)
        except NonAsciiAddressError:
            self._reply(replies.NEEDS_SMTPUTF8)
            return
        except AddressError:
            self._reply(replies.BAD_RECIPIENT)
            return
        if parameters or address is None:
            self._error(replies.UNKNOWN_PARAMETER)
            return
        try:
            refusal = self._policy.recipient(address)
        except Exception as error:  # noqa: BLE001 - as in _begin_transaction
            refusal = replies.internal_error(self._policy.failed(error))
        if refusal is None:
            self._recipient_count += 1
            self._output.append(replies.RECIPIENT_OK.wire)
        else:
            self._reply(refusal)

    def _data(self, argument: str) -> bool:
        if argument.strip():
            self._error(replies.BAD_ARGUMENT)
        elif not self._in_transaction:
            self._error(replies.MAIL_FIRST)
        elif not self._recipient_count:
            self._reply(replies.NO_VALID_RECIPIENT)
        else:
            self.action = Action.PERMIT
        return True

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

    def _finish(self, reply: Reply) -> None:
        """Answer the final dot; the transaction is over either way (RFC 5321, section 4.1.1.4)."""
        self._end_transaction()
        self._idle_commands = self._errors = 0
        self._reply(reply)

    def _end_transaction(self) -> None:
        self._in_transaction = False
        self._recipient_count = 0
        self.parameters = NO_PARAMETERS
        self._shed_reply = None
        self._policy.reset()

    # --- greeting, TLS, AUTH -------------------------------------------------------------------------------------

    def _hello(self, argument: str) -> bool:
        if self._greeted_by(argument):
            self.esmtp = False
            self._idle(replies.make_reply(250, "", self._hostname, "hello"))
        return False

    def _extended_hello(self, argument: str) -> bool:
        if self._greeted_by(argument):
            self.esmtp = True
            wire = replies.hello(
                self._hostname,
                self._limits.max_message_bytes,
                starttls=self._tls_available and not self.tls_active,
                auth=self.tls_active,
            )
            self._idle(Reply(250, "", "", "hello", wire))
        return False

    def _greeted_by(self, argument: str) -> bool:
        """Take a client's name and forget the transaction (RFC 5321, section 4.1.4); False when it is no name."""
        name = argument.strip(" ")
        if not 0 < len(name) <= _MAX_HELLO_OCTETS or not name.isascii() or not name.isprintable() or " " in name:
            self._error(replies.BAD_HELLO)
            return False
        self._end_transaction()
        self.helo = name
        return True

    def _start_tls(self, argument: str) -> bool:
        if argument.strip():
            self._error(replies.BAD_ARGUMENT)
        elif self.tls_active:
            self._error(replies.TLS_ACTIVE)
        elif not self._tls_available:
            self._error(replies.NOT_IMPLEMENTED)
        elif self.authenticated or self._in_transaction:
            self._error(replies.TLS_TOO_LATE)
        elif not self.helo:
            self._error(replies.HELLO_FIRST)
        else:
            self._reply(replies.READY_FOR_TLS)
            self.action = Action.START_TLS
        return True

    def _authenticate(self, argument: str) -> bool:
        mechanism, _, initial = argument.strip(" ").partition(" ")
        refusal = self._login_refusal()
        if refusal is not None:
            self._error(refusal)
        elif not mechanism:
            self._error(replies.BAD_ARGUMENT)
        else:
            self._go_on_with_login(self._login.begin(mechanism, initial))
        return True

    def _login_refusal(self) -> Reply | None:
        if not self.tls_active:
            return replies.AUTH_NEEDS_TLS if self._tls_available else replies.AUTH_UNAVAILABLE
        if not self.helo:
            return replies.HELLO_FIRST
        if self.authenticated:
            return replies.AUTH_TWICE
        return replies.AUTH_IN_TRANSACTION if self._in_transaction else None

    def _go_on_with_login(self, step: Reply | Credentials) -> None:
        if isinstance(step, Credentials):
            self._check_login(step)
        elif step.code == 334:
            self._reply(step)
        else:
            self._error(step)

    def _check_login(self, credentials: Credentials) -> None:
        try:
            refusal = self._policy.authenticate(credentials.username, credentials.secret)
        except Exception as error:  # noqa: BLE001 - as in _begin_transaction
            self._reply(replies.internal_error(self._policy.failed(error)))
            return
        if refusal is None:
            self.authenticated = self.authorized = True
            self._idle_commands = 0
            self._reply(replies.AUTHENTICATED)
            return
        self._reply(refusal)
        self._auth_failures += 1
        if self._auth_failures >= self._limits.max_auth_failures:
            self.refuse(replies.TOO_MANY_AUTH_FAILURES)

    # --- the rest ------------------------------------------------------------------------------------------------

    def _reset(self, argument: str) -> bool:
        if argument.strip():
            self._error(replies.BAD_ARGUMENT)
        else:
            self._end_transaction()
            self._idle(replies.OK)
        return False

    def _no_operation(self, argument: str) -> bool:
        self._idle(replies.OK)
        return False

    def _verify(self, argument: str) -> bool:
        # The same answer for everybody and every name, or VRFY would tell who exists.
        self._idle(replies.NOT_VERIFIED if argument.strip() else replies.BAD_ARGUMENT)
        return False

    def _help(self, argument: str) -> bool:
        self._idle(replies.HELP)
        return False

    def _not_implemented(self, argument: str) -> bool:
        self._error(replies.NOT_IMPLEMENTED)
        return False

    def _chunk(self, argument: str) -> bool:
        self.refuse(replies.NOT_IMPLEMENTED)
        return True

    def _quit(self, argument: str) -> bool:
        self.refuse(replies.BYE)
        return False

    _COMMANDS: ClassVar[dict[bytes, Callable[[Session, str], bool]]] = {
        b"MAIL": _mail,
        b"RCPT": _recipient,
        b"DATA": _data,
        b"EHLO": _extended_hello,
        b"HELO": _hello,
        b"RSET": _reset,
        b"QUIT": _quit,
        b"AUTH": _authenticate,
        b"STARTTLS": _start_tls,
        b"NOOP": _no_operation,
        b"VRFY": _verify,
        b"EXPN": _not_implemented,
        b"HELP": _help,
        b"BDAT": _chunk,
    }
