"""The commands of an SMTP submission session: what each one does to the dialog, and what it is answered.

Contract. `Dialog` is the half of `session.Session` that knows commands but no octets: a command gets its argument as
text, appends replies to the output and may set `action`. A command returns True when nothing may follow it before its
reply. State that a client can reach:

    state            begins with                  ends with
    greeted          EHLO, HELO                   TLS
    authorized       AUTH, or its network         TLS (a network's stays)
    transaction      MAIL                         dot, RSET, EHLO, HELO, TLS, close
    login exchange   AUTH without all it needs    its last line, "*", a line that is too long

Mistakes in the protocol are counted and end the session at a cap; refusals by the policy are not mistakes. A policy
that raises is answered 451 4.3.0 with a reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar

from dataplane.core import replies
from dataplane.core.address import AddressError, NonAsciiAddressError, Path, parse_path
from dataplane.core.datetimes import format_date_time
from dataplane.core.login import Credentials, LoginExchange
from dataplane.core.replies import Reply
from dataplane.core.session_contract import (
    MAX_HOLD_S,
    NO_PARAMETERS,
    Action,
    Limits,
    Policy,
    parse_parameters,
)

_MAX_HELLO_OCTETS = 255


@lru_cache(maxsize=512)
def _parse_sender(argument: str) -> Path:
    """Applications send as few senders; UTF-8 is taken here and refused below where SMTPUTF8 was not asked for."""
    return parse_path(argument, smtputf8=True)


class Dialog:
    """State and commands of one session; `authorized` says that the client may send without AUTH."""

    __slots__ = (
        "_auth_failures",
        "_errors",
        "_hostname",
        "_idle_commands",
        "_in_transaction",
        "_let_in",
        "_limits",
        "_login",
        "_network_authorized",
        "_output",
        "_policy",
        "_recipient_count",
        "_tls_available",
        "action",
        "authenticated",
        "authorized",
        "esmtp",
        "gate",
        "helo",
        "parameters",
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
        self.authorized = self._network_authorized = authorized
        self.authenticated = False
        self.action = Action.NONE
        self.helo = ""
        self.esmtp = False
        self.parameters = NO_PARAMETERS
        self._output: list[bytes] = []
        self._in_transaction = False
        self._recipient_count = 0
        self._login = LoginExchange()
        self._errors = 0
        self._auth_failures = 0
        self._idle_commands = 0
        self._let_in = False  # the MAIL that comes now has waited
        # Asked before a transaction begins: whether it must wait.
        self.gate: Callable[[], bool] | None = None

    @property
    def recipient_count(self) -> int:
        """How many recipients the transaction has."""
        return self._recipient_count

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

    def greet(self) -> None:
        """Open the session."""
        self._reply(replies.greeting(self._hostname))

    def refuse(self, reply: Reply) -> None:
        """End the session with this reply, whatever state it is in but COMMIT."""
        self._reply(reply)
        self._end_transaction()
        self.action = Action.CLOSE

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
            self.refuse(replies.TOO_MANY_COMMANDS)
        else:
            self._reply(reply)

    # --- the transaction -----------------------------------------------------------------------------------------

    def _mail(self, argument: str) -> bool:
        if argument[:5].upper() != "FROM:":
            self._error(replies.BAD_ARGUMENT)
        elif not self.helo:
            self._error(replies.HELLO_FIRST)
        elif not self.authorized:
            self._error(replies.AUTH_REQUIRED if self.tls_active or self._tls_available else replies.NETWORK_UNBOUND)
        elif self._in_transaction:
            self._error(replies.NESTED_MAIL)
        else:
            self._begin_transaction(argument)
        return False

    def _begin_transaction(self, argument: str) -> None:
        try:
            sender, parameter_text = _parse_sender(argument[5:])
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
        elif parameters.hold_until_ms and parameters.hold_until_ms > self._policy.latest_release_ms():
            self._error(replies.HOLD_TOO_LONG)
        elif self._must_wait():
            self.action = Action.WAIT
        else:
            try:
                refusal = self._policy.mail(sender, parameters)
            except Exception as error:  # noqa: BLE001 - a fault of ours is 451, whatever it is
                refusal = replies.internal_error(self._policy.failed(error))
            if refusal is None:
                self._in_transaction = True
                self.parameters = parameters
            self._reply(refusal or replies.SENDER_OK)

    def _must_wait(self) -> bool:
        let_in, self._let_in = self._let_in, False
        return not let_in and self.gate is not None and self.gate()

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

    def _finish(self, reply: Reply) -> None:
        """Answer the final dot; the transaction is over either way (RFC 5321, section 4.1.1.4)."""
        self._end_transaction()
        self._idle_commands = self._errors = 0
        self._reply(reply)

    def _end_transaction(self) -> None:
        self._in_transaction = False
        self._recipient_count = 0
        self.parameters = NO_PARAMETERS
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
                future_release=self._future_release(),
            )
            self._idle(Reply(250, "", "", "hello", wire))
        return False

    def _future_release(self) -> str:
        """What may be held (RFC 4865, section 3), offered where mail is submitted: most clients ask before AUTH."""
        if not (self.tls_active or self.authorized):
            return ""
        return f"{MAX_HOLD_S} {format_date_time(self._policy.latest_release_ms())}"

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

    _COMMANDS: ClassVar[dict[bytes, Callable[[Dialog, str], bool]]] = {
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
