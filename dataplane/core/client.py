"""The SMTP client as a machine without I/O: bytes received go in, bytes to send and outcomes come out (RFC 5321, 2920).

    phase      waits for              goes to
    GREETING   220                    EHLO
    EHLO       capabilities           STARTTLS, AUTH, READY; HELO where EHLO is unknown and nothing needs it
    HELO       250                    READY
    STARTTLS   220                    TLS
    TLS        the driver             EHLO, capabilities forgotten (RFC 3207, section 4.2)
    AUTH       235 or 334             READY
    READY      `begin` or `quit`      ENVELOPE; any byte that comes now closes
    ENVELOPE   MAIL, RCPT, DATA       CONTENT, LONE_DOT (354, yet nobody accepted: RFC 2920, section 3.1), RESET
    CONTENT    the final reply        READY
    LONE_DOT   any reply              READY
    RESET      250                    READY
    QUIT       221                    CLOSED
    CLOSED     nothing

The driver calls `receive`, sends what `take_output` returns, and acts on the signal. A failure before READY stands in
`failure` and is always temporary: it concerns the connection, never a message. The end of a transaction stands in
`outcome`, one verdict for each recipient. No method raises because of what a remote said or did.

Which reply belongs to what is never guessed. Replies are counted; unread bytes at the beginning of a transaction, after
354 or after the last reply close the connection; refusals count only once 354 came in its place or RSET was answered
with 250, so that a stray line of one transaction cannot become the verdict of the next. What is doubtful is temporary.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from enum import IntEnum

from dataplane.core.config import TlsPolicy
from dataplane.core.normalize import enhanced_code, safe_text
from dataplane.core.reply_reader import MalformedReplyError, Reply, ReplyReader
from dataplane.core.transaction import (
    DOT_APART_BYTES,
    Framing,
    Login,
    Transaction,
    Verdict,
    VerdictKind,
    frame_content,
    mail_parameters,
)


class Phase(IntEnum):
    """Where the session stands; see the module's table."""

    GREETING = 1
    EHLO = 2
    HELO = 3
    STARTTLS = 4
    TLS = 5
    AUTH = 6
    READY = 7
    ENVELOPE = 8
    CONTENT = 9
    LONE_DOT = 10
    RESET = 11
    QUIT = 12
    CLOSED = 13


class Signal(IntEnum):
    """What the driver is to do next: go on, give work, read `outcome`, start TLS, or close (see `failure`)."""

    NOTHING = 0
    READY = 1
    DONE = 2
    START_TLS = 3
    CLOSE = 4


# How long each phase may wait for the remote, in seconds (RFC 5321, section 4.5.3.2).
TIMEOUTS_S: dict[Phase, float] = {
    Phase.GREETING: 300.0,
    Phase.EHLO: 300.0,
    Phase.HELO: 300.0,
    Phase.STARTTLS: 120.0,
    Phase.TLS: 30.0,
    Phase.AUTH: 300.0,
    Phase.ENVELOPE: 300.0,
    Phase.CONTENT: 600.0,
    Phase.LONE_DOT: 600.0,
    Phase.RESET: 20.0,
    Phase.QUIT: 5.0,
}
DATA_TIMEOUT_S = 120.0
BLOCK_TIMEOUT_S = 180.0

NOT_PERMITTED = "stopped before the final dot"

_UNKNOWN_COMMAND = frozenset({500, 502})
_SERVICE_CLOSING = 421
_START_MAIL_INPUT = 354

_NO_TRANSACTION = Transaction("", (), b"")
_UNSAID = Verdict(VerdictKind.TEMPORARY, 0, "", "")


class Client:
    """One connection's session.

    `tls_active` says that the connection began with TLS; `tls_verified` that its certificate was verified for the host.
    `hostname` is what EHLO says.
    """

    __slots__ = (
        "_accepted_count",
        "_capabilities",
        "_framing",
        "_handlers",
        "_hostname",
        "_login",
        "_mail_refusal",
        "_output",
        "_pipelining",
        "_position",
        "_reader",
        "_secrets",
        "_tls_active",
        "_tls_policy",
        "_tls_verified",
        "_transaction",
        "_transaction_count",
        "_verdicts",
        "answered",
        "content_left",
        "failure",
        "outcome",
        "phase",
        "reply_count",
        "reusable",
    )

    def __init__(
        self,
        hostname: str,
        tls_policy: TlsPolicy,
        login: Login | None = None,
        *,
        tls_active: bool = False,
        tls_verified: bool = False,
    ) -> None:
        self.phase = Phase.GREETING
        self.failure: Verdict | None = None
        self.outcome: tuple[Verdict, ...] | None = None
        self.answered = False  # whether the present transaction got any reply
        self.content_left = False  # whether `next_piece` has more: then the final dot has not been given out
        self.reusable = False
        self.reply_count = 0  # whole replies so far: what moves a timer
        self._hostname = hostname
        self._tls_policy = tls_policy
        self._tls_active = tls_active
        self._tls_verified = tls_verified
        self._login = login
        self._secrets: list[bytes] = []  # AUTH lines still to be sent, the next one last
        self._reader = ReplyReader()
        self._output: list[bytes] = []
        self._capabilities: dict[str, str] = {}
        self._pipelining = False
        self._transaction = _NO_TRANSACTION
        self._framing: Framing | None = None
        self._transaction_count = 0
        self._verdicts: list[Verdict | None] = []  # None: accepted, or not answered yet
        self._accepted_count = 0
        self._mail_refusal: Verdict | None = None
        self._position = 0  # 0 MAIL, 1..n RCPT, n + 1 DATA: which reply comes next
        self._handlers: dict[Phase, Callable[[Reply], Signal]] = {
            Phase.GREETING: self._on_greeting,
            Phase.EHLO: self._on_ehlo,
            Phase.HELO: self._on_helo,
            Phase.STARTTLS: self._on_starttls,
            Phase.AUTH: self._on_auth,
            Phase.ENVELOPE: self._on_envelope,
            Phase.CONTENT: self._on_content,
            Phase.LONE_DOT: self._on_lone_dot,
            Phase.RESET: self._on_reset,
            Phase.QUIT: self._on_quit,
        }

    # --- what the driver calls --------------------------------------------------------------------------------------

    @property
    def timeout_s(self) -> float:
        """How long the remote may take now; 0 where nothing is awaited of it."""
        if self.phase is Phase.ENVELOPE and self._position > len(self._verdicts):
            return DATA_TIMEOUT_S
        return TIMEOUTS_S.get(self.phase, 0.0)

    @property
    def permitted(self) -> bool:
        """Whether the content may go out and end now; asked before each piece, the last of which is the final dot."""
        permit = self._transaction.permit
        return permit is None or permit()

    @property
    def dot_is_next(self) -> bool:
        """Whether the final dot is what `next_piece` returns next."""
        return self._framing is not None and self._framing.dot_is_next

    def take_output(self) -> list[bytes]:
        """Return what must be sent now, in order, and forget it."""
        output = self._output
        if output:
            self._output = []
        return output

    def next_piece(self) -> bytes:
        """Return what follows of the content, once what was returned before has left; only if `content_left`."""
        if self._framing is None:
            return b""
        piece, is_last = self._framing.next()
        if is_last:
            self._framing = None
            self.content_left = False
        return piece

    def receive(self, data: bytes) -> Signal:
        """Take bytes of the remote. After DONE `outcome` has the transaction's end, after CLOSE the session is over."""
        if self.phase is Phase.CLOSED:
            return Signal.CLOSE
        if self.phase in (Phase.READY, Phase.TLS):
            return self._fail("bytes that nobody asked for")
        self._reader.feed(data)
        signal = Signal.NOTHING
        while signal is Signal.NOTHING:
            try:
                reply = self._reader.next()
            except MalformedReplyError as error:
                return self._out_of_step(f"malformed reply: {error}")
            if reply is None:
                break
            self.reply_count += 1
            signal = self._handlers[self.phase](reply)
        return signal

    def tls_started(self, *, verified: bool) -> Signal:
        """The handshake is done; begin anew. `verified` says whether the certificate holds for the host."""
        self._tls_active = True
        self._tls_verified = verified
        self._reader = ReplyReader()
        self._capabilities = {}
        self._pipelining = False
        return self._say_ehlo()

    def begin(self, transaction: Transaction) -> Signal:
        """Start a transaction; only in READY. DONE at once when this server cannot take the message."""
        self.outcome = None
        self.answered = False
        self.reusable = False
        self._transaction = transaction
        self._transaction_count += 1
        self._verdicts = [None] * len(transaction.recipients)
        self._accepted_count = 0
        self._mail_refusal = None
        self._position = 0
        refusal, parameters = mail_parameters(transaction, self._capabilities)
        if refusal is not None:
            self._transaction_count -= 1
            return self._finish(refusal, reusable=True)
        self.phase = Phase.ENVELOPE
        if self._pipelining:
            recipients = "".join([f"RCPT TO:<{recipient}>\r\n" for recipient in transaction.recipients])
            text = f"MAIL FROM:<{transaction.sender}>{parameters}\r\n{recipients}DATA\r\n"
        else:
            text = f"MAIL FROM:<{transaction.sender}>{parameters}\r\n"
        self._output.append(text.encode("utf-8"))
        return Signal.NOTHING

    def quit(self) -> Signal:
        """Take leave; only in READY."""
        self.phase = Phase.QUIT
        self._output.append(b"QUIT\r\n")
        return Signal.NOTHING

    def lost(self, reason: str, *, dot_may_have_left: bool = True) -> Signal:
        """The connection ended or a timer did; `reason` is ours. Ends what is under way: DONE or CLOSE.

        `dot_may_have_left` is False only when the driver knows that the final dot never reached the network.
        """
        if self._transaction is _NO_TRANSACTION:
            return self._fail(reason)
        self._output = []
        if self.phase is Phase.CONTENT:
            uncertain = dot_may_have_left and not self.content_left
            kind = VerdictKind.UNCERTAIN if uncertain else VerdictKind.INTERRUPTED
            return self._finish(Verdict(kind, 0, "4.4.2", reason), reusable=False)
        verdict = Verdict(VerdictKind.INTERRUPTED, 0, "4.4.2", reason)
        if self.phase is Phase.ENVELOPE:
            return self._end_early(verdict)
        return self._finish(self._mail_refusal or verdict, reusable=False)

    # --- opening the session ----------------------------------------------------------------------------------------

    def _on_greeting(self, reply: Reply) -> Signal:
        if reply.code != 220:
            return self._refuse_session("greeting", reply)
        return self._say_ehlo()

    def _say_ehlo(self) -> Signal:
        if self._reader.pending:
            return self._fail("bytes that nobody asked for")
        self.phase = Phase.EHLO
        self._output.append(f"EHLO {self._hostname}\r\n".encode("ascii"))
        return Signal.NOTHING

    def _on_ehlo(self, reply: Reply) -> Signal:
        tls_needed = self._tls_policy >= TlsPolicy.REQUIRED and not self._tls_active
        if reply.code in _UNKNOWN_COMMAND and not tls_needed and self._login is None and not self._reader.pending:
            self.phase = Phase.HELO
            self._output.append(f"HELO {self._hostname}\r\n".encode("ascii"))
            return Signal.NOTHING
        if reply.code != 250:
            return self._refuse_session("EHLO", reply)
        self._capabilities = _parse_capabilities(reply.lines[1:])
        self._pipelining = "PIPELINING" in self._capabilities
        if self._tls_active or self._tls_policy is TlsPolicy.NONE:
            return self._say_auth()
        if "STARTTLS" in self._capabilities:
            return self._command(Phase.STARTTLS, b"STARTTLS\r\n")
        if tls_needed:
            return self._fail("TLS is required and STARTTLS is not offered")
        return self._say_auth()

    def _on_helo(self, reply: Reply) -> Signal:
        if reply.code != 250:
            return self._refuse_session("HELO", reply)
        return self._become_ready()

    def _on_starttls(self, reply: Reply) -> Signal:
        if self._reader.pending:
            return self._fail("bytes behind the reply to STARTTLS")
        if reply.code == 220:
            self.phase = Phase.TLS
            return Signal.START_TLS
        if self._tls_policy >= TlsPolicy.REQUIRED or reply.code == _SERVICE_CLOSING:
            return self._refuse_session("STARTTLS", reply)
        return self._say_auth()

    def _say_auth(self) -> Signal:
        login = self._login
        if login is None:
            return self._become_ready()
        if not (self._tls_active and self._tls_verified):
            return self._fail("credentials are sent under verified TLS only")
        mechanisms = self._capabilities.get("AUTH", "").upper().split()
        username, password = login.username.encode("utf-8"), login.password.encode("utf-8")
        if "PLAIN" in mechanisms:
            self._secrets = []
            line = b"AUTH PLAIN " + b64encode(b"\0" + username + b"\0" + password) + b"\r\n"
            return self._command(Phase.AUTH, line)
        if "LOGIN" in mechanisms:
            self._secrets = [b64encode(password) + b"\r\n", b64encode(username) + b"\r\n"]
            return self._command(Phase.AUTH, b"AUTH LOGIN\r\n")
        return self._fail("neither AUTH PLAIN nor AUTH LOGIN is offered")

    def _on_auth(self, reply: Reply) -> Signal:
        if reply.code == 334 and self._secrets:
            return self._command(Phase.AUTH, self._secrets.pop())
        if reply.code != 235:
            # The text may repeat what was sent, so that only the codes are kept.
            return self._fail_with(_verdict(reply)._replace(kind=VerdictKind.TEMPORARY, text="AUTH refused"))
        return self._become_ready()

    def _command(self, phase: Phase, line: bytes) -> Signal:
        if self._reader.pending:
            return self._out_of_step("bytes that nobody asked for")
        self.phase = phase
        self._output.append(line)
        return Signal.NOTHING

    def _become_ready(self) -> Signal:
        if self._reader.pending:
            return self._fail("bytes that nobody asked for")
        self._secrets = []
        self._login = None
        self.phase = Phase.READY
        self.reusable = True
        return Signal.READY

    # --- a transaction ----------------------------------------------------------------------------------------------

    def _on_envelope(self, reply: Reply) -> Signal:
        position = self._position
        self._position = position + 1
        self.answered = True
        code = reply.code
        if code == _SERVICE_CLOSING:
            return self._end_early(_verdict(reply))
        if position > len(self._verdicts):
            return self._on_data(reply)
        if 300 <= code < 400:
            return self._out_of_step("reply out of step")
        if position == 0:
            self._mail_refusal = None if code < 300 else _verdict(reply)
        elif code < 300:
            self._accepted_count += 1
        elif self._mail_refusal is None:
            self._verdicts[position - 1] = self._recipient_refusal(reply)
        return Signal.NOTHING if self._pipelining else self._next_command(position)

    def _recipient_refusal(self, reply: Reply) -> Verdict:
        verdict = _verdict(reply)
        # "Too many recipients" had this code in RFC 821; RFC 5321, section 4.5.3.1.10, wants it read as temporary.
        if reply.code == 552 and self._accepted_count and verdict.enhanced in ("", "5.5.3"):
            return verdict._replace(kind=VerdictKind.TEMPORARY)
        return verdict

    def _next_command(self, answered_position: int) -> Signal:
        """Without PIPELINING: one command, one reply."""
        recipients = self._transaction.recipients
        if self._mail_refusal is not None:
            return self._reset()
        if answered_position < len(recipients):
            return self._command(Phase.ENVELOPE, f"RCPT TO:<{recipients[answered_position]}>\r\n".encode())
        if not self._accepted_count:
            return self._reset()
        return self._command(Phase.ENVELOPE, b"DATA\r\n")

    def _on_data(self, reply: Reply) -> Signal:
        if reply.code < 400 and reply.code != _START_MAIL_INPUT:
            return self._out_of_step("reply out of step")
        if reply.code != _START_MAIL_INPUT:
            if self._accepted_count and self._mail_refusal is None:
                self._fill(_verdict(reply))
            return self._reset()
        if self._reader.pending or self._mail_refusal is not None:
            return self._out_of_step("reply out of step")
        if not self._accepted_count:
            self.phase = Phase.LONE_DOT
            self._output.append(b".\r\n")
            return Signal.NOTHING
        self.phase = Phase.CONTENT
        permit = self._transaction.permit
        if permit is not None and not permit():
            return self._finish(Verdict(VerdictKind.INTERRUPTED, 0, "4.3.2", NOT_PERMITTED), reusable=False)
        content = self._transaction.content
        if len(content) > DOT_APART_BYTES:
            self._framing = Framing(content)
            self.content_left = True
        else:
            self._output.extend(frame_content(content))
        return Signal.NOTHING

    def _on_content(self, reply: Reply) -> Signal:
        if 300 <= reply.code < 400:
            return self._out_of_step("malformed reply: 3yz to the final dot")
        if self.content_left:
            # A refusal in the midst is believed, an acceptance cannot be one; either way the rest cannot follow.
            if reply.code < 300:
                return self._out_of_step("reply before the final dot")
            return self._finish(_verdict(reply), reusable=False)
        return self._finish(_verdict(reply), reusable=reply.code != _SERVICE_CLOSING)

    def _on_lone_dot(self, reply: Reply) -> Signal:
        return self._finish(_verdict(reply), reusable=reply.code != _SERVICE_CLOSING)

    def _reset(self) -> Signal:
        if self._reader.pending and self._transaction_count == 1:
            # A farewell behind the refusal. Nothing older can be in this connection, so the refusals stand.
            return self._finish(self._mail_refusal or _UNSAID, reusable=False)
        return self._command(Phase.RESET, b"RSET\r\n")

    def _on_reset(self, reply: Reply) -> Signal:
        in_step = (200 <= reply.code < 300 and not self._reader.pending) or reply.code == _SERVICE_CLOSING
        if not in_step and reply.code not in _UNKNOWN_COMMAND:
            return self._out_of_step("reply out of step")
        return self._finish(self._mail_refusal or _UNSAID, reusable=200 <= reply.code < 300)

    def _on_quit(self, reply: Reply) -> Signal:
        self.phase = Phase.CLOSED
        return Signal.CLOSE

    # --- ends -------------------------------------------------------------------------------------------------------

    def _fill(self, verdict: Verdict) -> None:
        self._verdicts = [verdict if known is None else known for known in self._verdicts]

    def _finish(self, verdict: Verdict, *, reusable: bool) -> Signal:
        """End the transaction; recipients without a verdict get this one."""
        self.outcome = tuple([known or verdict for known in self._verdicts])
        self._transaction = _NO_TRANSACTION
        self._framing = None
        self.content_left = False
        self.reusable = reusable and not self._reader.pending
        self.phase = Phase.READY if self.reusable else Phase.CLOSED
        return Signal.DONE

    def _forget_refusals(self) -> None:
        self._verdicts = [None] * len(self._verdicts)
        self._mail_refusal = None

    def _end_early(self, verdict: Verdict) -> Signal:
        """The remote left within the envelope: on a connection used before, refusals may be another transaction's."""
        if self._transaction_count > 1:
            self._forget_refusals()
        return self._finish(self._mail_refusal or verdict, reusable=False)

    def _out_of_step(self, reason: str) -> Signal:
        """What came cannot have been an answer to what was asked: nothing is believed that 354 did not confirm."""
        if self._transaction is _NO_TRANSACTION:
            return self._fail(reason)
        if self.phase is Phase.CONTENT and not self.content_left:
            return self._finish(Verdict(VerdictKind.UNCERTAIN, 0, "4.5.0", reason), reusable=False)
        if self.phase not in (Phase.LONE_DOT, Phase.CONTENT):
            self._forget_refusals()
        return self._finish(Verdict(VerdictKind.TEMPORARY, 0, "4.5.0", reason), reusable=False)

    def _refuse_session(self, stage: str, reply: Reply) -> Signal:
        verdict = _verdict(reply)
        text = safe_text(f"{stage}: {verdict.text}".encode())
        return self._fail_with(verdict._replace(kind=VerdictKind.TEMPORARY, text=text))

    def _fail(self, reason: str) -> Signal:
        return self._fail_with(Verdict(VerdictKind.TEMPORARY, 0, "4.4.2", reason))

    def _fail_with(self, verdict: Verdict) -> Signal:
        """End a session that has no transaction under way."""
        if self.failure is None and self.phase not in (Phase.QUIT, Phase.CLOSED):
            self.failure = verdict
        self.phase = Phase.CLOSED
        self.reusable = False
        self._output = []
        self._secrets = []
        self._login = None
        return Signal.CLOSE


def _parse_capabilities(lines: tuple[bytes, ...]) -> dict[str, str]:
    """Return keyword → parameters. `AUTH=LOGIN`, the form before RFC 4954, counts as AUTH where that is missing."""
    capabilities: dict[str, str] = {}
    for line in lines:
        keyword, _, parameters = line.decode("ascii", "replace").strip().partition(" ")
        capabilities.setdefault(keyword.upper(), parameters)
    if "AUTH" not in capabilities:
        for keyword, parameters in list(capabilities.items()):
            if keyword.startswith("AUTH="):
                capabilities["AUTH"] = f"{keyword[5:]} {parameters}"
    return capabilities


def _join(reply: Reply) -> bytes:
    return reply.lines[0] if len(reply.lines) == 1 else b" ".join(reply.lines)


def _verdict(reply: Reply) -> Verdict:
    text = _join(reply)
    code = reply.code
    if code < 300:
        kind = VerdictKind.SENT
    elif code < 500:
        kind = VerdictKind.TEMPORARY
    else:
        kind = VerdictKind.PERMANENT
    return Verdict(kind, code, enhanced_code(code, text), safe_text(text))
