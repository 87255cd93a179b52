"""Drives one session machine by a transport: writes what it says, does what it asks, holds it to its deadlines.

Contract. A protocol of callbacks: no task, no stream reader. What must wait (the limiter, a handshake) is a task of
`Service.spawn`; what the spool does is a callback of its future. All replies of a turn leave in one write. Reading
pauses while the client does not read our replies, and as soon as octets come that nobody can take yet.

    the machine asks   done here                                       meanwhile the client may
    MORE               resume on the loop's next turn                  send: kept, bounded
    WAIT               its turn (`turnstile`)                          the same
    START_TLS          handshake with a deadline; failure closes       send only TLS
    PERMIT             limiter; nothing to ask: answered at once       not send (RFC 2920): closes
    COMMIT             spool; over its deadline 451                    send the next batch, half-close or leave
                       strained: the 250 waits (docs/bounds.md)        the same

A commit is never cancelled: a client that half-closed gets its reply, one that left is stored all the same. Deadlines
run per command, not per octet; DATA must bring `data_bytes_per_s` in each window of 30 s.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from dataplane.core import replies
from dataplane.core.replies import Reply
from dataplane.core.session import Session
from dataplane.core.session_contract import Action, Limits, Timer
from dataplane.ingress.reading_turns import LARGE_READ_BYTES
from dataplane.ingress.submission import Hello, Submitter
from dataplane.ingress.timers import Timed
from dataplane.ingress.turnstile import Pass
from dataplane.ports import Grant, Take

if TYPE_CHECKING:
    from dataplane.ingress.service import Service

_DATA_WINDOW_S = 30.0
_LINGER_S = 5.0
_MAX_LINGER_OCTETS = 4_194_304
_MAX_EARLY_OCTETS = 262_144
_STORED = 250


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Deadlines in seconds, and the rate that DATA must keep."""

    command_s: float = 300.0
    command_before_auth_s: float = 30.0
    handshake_s: float = 30.0
    commit_s: float = 30.0
    answer_delay_s: float = 5.0
    data_bytes_per_s: int = 500


class SmtpProtocol(asyncio.Protocol, Timed):
    """One connection. Counted by its `Service` from `connection_made` to `connection_lost`."""

    __slots__ = (
        "_charged_bytes",
        "_closing",
        "_commit",
        "_delayed",
        "_early",
        "_half_closed",
        "_handshaking",
        "_inside",
        "_lost",
        "_passed_over_bytes",
        "_progress",
        "_reading_paused",
        "_resting",
        "_service",
        "_spilling_bytes",
        "_stored_last",
        "_submitter",
        "_tls",
        "_transport",
        "_window_bytes",
        "_writing_paused",
        "address",
        "opened",
        "session",
    )

    def __init__(
        self, service: Service, submitter: Submitter, limits: Limits, *, tls_available: bool, tls_active: bool
    ) -> None:
        Timed.__init__(self)
        self._service = service
        self._submitter = submitter
        self._transport: asyncio.Transport | None = None
        self.address = submitter.address
        self.opened = False
        self._tls = ""
        self._early = b""
        self._closing = False
        self._passed_over_bytes = 0
        self._handshaking = False
        self._half_closed = False
        self._lost = False
        self._reading_paused = False
        self._resting = False
        self._writing_paused = False
        self._progress = -1
        self._window_bytes = 0
        self._charged_bytes = 0
        self._spilling_bytes = 0
        self._commit = 0
        self._delayed: tuple[int, float, Reply] | None = None
        self._stored_last = False
        self._inside: Pass | None = None
        self.session = Session(
            submitter,
            limits,
            service.hostname,
            tls_available=tls_available,
            tls_active=tls_active,
            authorized=submitter.bound_by_network,
        )
        if service.turnstile is not None:
            self.session.gate = self._must_wait

    # --- what the transport tells --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet. Under implicit TLS the handshake is over by now."""
        # uvloop's transports have the methods and not the base class.
        stream = cast("asyncio.Transport", transport)
        self._transport = stream
        self._note_tls(stream)
        self.opened = True
        self._service.opened(self)
        self.session.greet()
        self._react()

    def data_received(self, data: bytes) -> None:
        """Feed the machine. During a handshake octets come from inside TLS: the client was quicker than our task."""
        self._stored_last = False
        if self._closing:
            self._pass_over(data)
            return
        if self._handshaking:
            self._early += data
            if len(self._early) > _MAX_EARLY_OCTETS:
                self.abort()
            return
        session = self.session
        if session.action is not Action.NONE:
            # Somebody must be waited for: this joins the batch behind a commit, or broke the rules.
            session.receive(data)
            if session.action is Action.CLOSE:
                self._react()
            else:
                self._pause_reading()
            return
        if self._service.draining and not session.in_transaction:
            session.refuse(replies.SHUTTING_DOWN)
        else:
            session.receive(data)
        self._react()
        if len(data) >= LARGE_READ_BYTES and self.session.action is Action.NONE and not self._spilling_bytes:
            self._rest()

    def _rest(self) -> None:
        if not self._resting:
            self._resting = True
            self._pause_reading()
            self._service.reading_turns.rest(self)

    def read_on(self) -> None:
        """Go on reading a large content."""
        self._resting = False
        if self.session.action is Action.NONE and not self._lost and not self._closing:
            self._react()

    # --- whose turn it is ----------------------------------------------------------------------------------------

    def _must_wait(self) -> bool:
        """Asked before a transaction begins: whether it waits while the worker has enough in hand."""
        turnstile = self._service.turnstile
        if turnstile is None:
            return False
        self._leave()
        account = self._submitter.account_name
        if turnstile.holds(account):
            return True
        self._inside = turnstile.entered(account)
        return False

    def _wait_for_turn(self) -> None:
        # Reading goes on: most clients send nothing before the reply, and to stop and start costs system calls.
        self._service.wheel.arm(self, self._service.timeouts.command_s)
        if self._service.turnstile is not None:
            self._service.turnstile.set_aside(self._submitter.account_name, self)

    def go_on(self) -> bool:
        """Take up the MAIL that was set aside; False when the client has left or the session has ended."""
        session, turnstile = self.session, self._service.turnstile
        if self._lost or session.action is not Action.WAIT or turnstile is None:
            return False
        if self._service.draining:
            session.refuse(replies.SHUTTING_DOWN)
        else:
            self._inside = turnstile.entered(self._submitter.account_name)
            session.resume()
        self._react()
        return True

    def _leave(self) -> None:
        """The transaction is over, or there was none."""
        turnstile, begun, self._inside = self._service.turnstile, self._inside, None
        if turnstile is not None and begun is not None:
            turnstile.left(begun)

    def eof_received(self) -> bool:
        """Keep the way back open while a commit owes the client its reply; TLS has no half that stays open."""
        if not self._closing:
            # Behind our own end it says nothing of what the client has heard.
            self._half_closed = True
        return not self._tls and self.session.action in {Action.COMMIT, Action.MORE, Action.WAIT}

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything but a commit. A client that ends with nothing said since a 250 may not have heard it."""
        # One that half-closed behind its dot may as well have gone for good: both look the same from here.
        if self._stored_last and (self._half_closed or not self._closing):
            self._service.counters.answers_lost += 1
        self._lose()

    def pause_writing(self) -> None:
        """The client does not read: neither do we."""
        self._writing_paused = True
        self._pause_reading()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writing_paused = False
        if self.session.action is Action.MORE:
            self._next_turn()
        else:
            self._react()

    # --- deadlines -----------------------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """A deadline has passed."""
        session = self.session
        if self._lost or self._transport is None:
            return
        if session.action is Action.CLOSE:
            # Closed, and the client does not take what is left for it.
            self.abort()
        elif self._delayed is not None:
            self.answer_delayed()
        elif session.action is Action.COMMIT:
            self._service.counters.commits_late += 1
            self._finish_commit(self._commit, replies.COMMIT_TIMEOUT)
        elif session.timer is Timer.DATA and self._fast_enough():
            self._service.wheel.arm(self, _DATA_WINDOW_S)
        else:
            self._service.counters.connections_timed_out += 1
            session.refuse(replies.TOO_SLOW if session.timer is Timer.DATA else replies.TIMEOUT)
            self._react()

    def _fast_enough(self) -> bool:
        received = self.session.received_bytes
        brought = received - self._window_bytes
        self._window_bytes = received
        return brought >= self._service.timeouts.data_bytes_per_s * _DATA_WINDOW_S

    def _arm(self) -> None:
        """Give the next line, or the content, its deadline: once, when it begins."""
        session = self.session
        if session.progress == self._progress:
            return
        self._progress = session.progress
        timeouts = self._service.timeouts
        seconds = timeouts.command_s if session.authorized else timeouts.command_before_auth_s
        self._service.wheel.arm(self, seconds)

    # --- what the service tells ----------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self.session.action is Action.NONE and not self.session.in_transaction

    @property
    def committing(self) -> bool:
        """Whether a message is with the spool."""
        return self.session.action is Action.COMMIT

    def end(self, reply: Reply) -> None:
        """Close with a last reply, whatever is under way but a commit."""
        if not self.committing and self.session.action is not Action.CLOSE and not self._handshaking:
            self.session.refuse(reply)
            self._react()

    def abort(self) -> None:
        """Close at once; what was not sent is lost."""
        if self._transport is not None:
            self._transport.abort()

    # --- what the machine asks -----------------------------------------------------------------------------------

    def _react(self) -> None:
        """Write and do what the machine asks, until it wants octets or somebody must be waited for."""
        session = self.session
        while True:
            action = session.action
            if action is Action.PERMIT:
                # The replies before it wait for its own: the client reads them together or not at all.
                if not self._permit_at_once():
                    return
                continue
            self._write()
            if action is Action.NONE:
                held_bytes = session.held_bytes
                self._charge(held_bytes)
                if held_bytes > self._service.least_spill_bytes and held_bytes > self._service.spill_bytes:
                    self._spill()
                self._await_octets()
                return
            if action is Action.COMMIT:
                self._begin_commit()
                return
            if action is Action.WAIT:
                self._wait_for_turn()
                return
            if action is Action.MORE:
                self._pause_reading()
                asyncio.get_running_loop().call_soon(self._next_turn)
                return
            if action is Action.START_TLS:
                self._pause_reading()
                self._begin_handshake()
                return
            self._close()
            return

    def _await_octets(self) -> None:
        if self._inside is not None and not self.session.in_transaction:
            self._leave()
        if self._half_closed:
            # Nothing more can come, and everything that came was answered.
            self._close()
            return
        self._arm()
        if not self._writing_paused and not self._spilling_bytes and not self._resting:
            self._resume_reading()

    def _next_turn(self) -> None:
        if self.session.action is Action.MORE and not self._writing_paused and not self._lost:
            self.session.resume()
            self._react()

    def _write(self) -> None:
        output = self.session.take_output()
        if output and self._transport is not None:
            self._transport.write(output)

    def _close(self) -> None:
        """Say no more, and read on for a while: to close on unread octets would reset the connection and our reply."""
        self._charge(0)
        self._leave()
        transport = self._transport
        if transport is None or self._closing or transport.is_closing():
            return
        self._closing = True
        self._service.wheel.arm(self, _LINGER_S)
        if self._half_closed or self._tls:
            # TLS takes its leave by itself, reading until the other side has.
            transport.close()
        else:
            self._resume_reading()
            transport.write_eof()

    def _pass_over(self, data: bytes) -> None:
        self._passed_over_bytes += len(data)
        if self._passed_over_bytes > _MAX_LINGER_OCTETS:
            self.abort()

    def _lose(self) -> None:
        """The connection is gone: give back what it held. A commit that runs holds what it needs itself."""
        if not self._lost:
            self._lost = True
            self._service.wheel.disarm(self)
            self._charge(0)
            self._submitter.drop()
            self.answer_delayed()
            self._leave()
            if self.opened:
                self._service.closed(self)

    def _pause_reading(self) -> None:
        transport = self._transport
        if not self._reading_paused and transport is not None and not transport.is_closing():
            self._reading_paused = True
            transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._reading_paused and self._transport is not None and not self._transport.is_closing():
            self._reading_paused = False
            self._transport.resume_reading()

    # --- before the content --------------------------------------------------------------------------------------

    def _permit_at_once(self) -> bool:
        """Answer DATA if nobody must be asked; else ask, and return False."""
        session, submitter = self.session, self._submitter
        try:
            refusal = submitter.refusal_before_data(session.parameters.size_bytes)
            takes = () if refusal is not None else submitter.takes()
        except Exception as error:  # noqa: BLE001 - a fault of ours is 451, whatever it is
            refusal, takes = replies.internal_error(submitter.failed(error)), ()
        if takes:
            grant = submitter.ask(takes)
            if not grant.done():
                grant.add_done_callback(partial(self._asked, takes))
                return False
            refusal = submitter.permit(takes, grant.result())
        self._permit(refusal)
        return True

    def _asked(self, takes: tuple[Take, ...], grant: asyncio.Future[Grant]) -> None:
        """The limiter has answered. Who left meanwhile is not charged."""
        refusal = self._submitter.permit(takes, grant.result())
        if self._lost or self.session.action is not Action.PERMIT:
            self._submitter.give_back()
            return
        self._permit(refusal)
        self._react()

    def _permit(self, refusal: Reply | None) -> None:
        self.session.permit(refusal)
        if refusal is None:
            self._window_bytes = 0
            self._progress = self.session.progress
            self._service.wheel.arm(self, _DATA_WINDOW_S)

    def _charge(self, held_bytes: int) -> None:
        """Keep the worker's count of content in memory; too much of it, and this message is let go."""
        if held_bytes == self._charged_bytes:
            return
        self._service.counters.content_bytes += held_bytes - self._charged_bytes
        self._charged_bytes = held_bytes
        if held_bytes and self._service.over_budget:
            self._shed(replies.OVERLOADED)

    def _shed(self, reply: Reply) -> None:
        """Let go of the content that is coming; the client is told at its end."""
        self.session.shed(reply)
        self._submitter.drop()
        self._service.counters.content_bytes -= self._charged_bytes
        self._charged_bytes = 0

    def _spill(self) -> None:
        """Put what came of a large content into its file; nothing more is read before it is there."""
        session = self.session
        # Nothing is charged for what was let go of at this very moment.
        pieces = session.take_pieces() if self._charged_bytes and not self._spilling_bytes else []
        if not pieces:
            return
        try:
            written = self._submitter.spill(pieces, Hello(session.helo, session.esmtp, self._tls))
        except Exception as error:  # noqa: BLE001 - as in _permit_at_once
            written = replies.internal_error(self._submitter.failed(error))
        if isinstance(written, Reply):
            self._shed(written)
            return
        # These octets count until they are in the file, whatever becomes of the connection.
        self._spilling_bytes, self._charged_bytes = self._charged_bytes, 0
        self._pause_reading()
        written.add_done_callback(partial(self._spilled, self._spilling_bytes))

    def _spilled(self, size_bytes: int, written: asyncio.Future[None]) -> None:
        self._service.counters.content_bytes -= size_bytes
        self._spilling_bytes = 0
        error = written.exception()
        if self._lost or self._closing:
            return
        if error is not None:
            self._shed(self._submitter.storage_refusal(error))
        if self.session.action is Action.NONE:
            self._rest()

    # --- the commit ----------------------------------------------------------------------------------------------

    def _begin_commit(self) -> None:
        """Give the message to the use case; its octets count until the commit is over, whoever still waits for it."""
        session, counters = self.session, self._service.counters
        content = session.take_content()
        counters.content_bytes += len(content) - self._charged_bytes
        self._charged_bytes = 0
        self._commit += 1
        answer = partial(self._committed, self._commit, len(content), self._service.wheel.now())
        if self._service.over_budget:
            answer(replies.OVERLOADED)
            return
        self._service.wheel.arm(self, self._service.timeouts.commit_s)
        try:
            self._submitter.accept(content, Hello(session.helo, session.esmtp, self._tls), answer)
        except Exception as error:  # noqa: BLE001 - as in _permit_at_once
            answer(replies.internal_error(self._submitter.failed(error)))

    def _committed(self, number: int, size_bytes: int, ended_s: float, reply: Reply) -> None:
        counters = self._service.counters
        counters.content_bytes -= size_bytes
        if reply.code == _STORED and self._service.strained and number == self._commit and not self._lost:
            self._delayed = number, ended_s, reply
            self._service.delay(self)
            self._service.wheel.arm(self, self._service.timeouts.answer_delay_s)
        else:
            self._answer(number, ended_s, reply)

    def answer_delayed(self) -> None:
        """Give the 250 that was held back, if one was: the strain is over, or it has waited long enough."""
        delayed, self._delayed = self._delayed, None
        if delayed is not None:
            self._service.undelay(self)
            self._answer(*delayed)

    def _answer(self, number: int, ended_s: float, reply: Reply) -> None:
        counters = self._service.counters
        told = self._finish_commit(number, reply)
        if reply.code == _STORED:
            # What has a key is not stored twice, however often it comes.
            may_come_twice = reply.reason == replies.QUEUED
            self._stored_last = told and may_come_twice
            if told:
                counters.enqueue_seconds.observe(self._service.wheel.now() - ended_s)
            else:
                counters.answers_lost += may_come_twice

    def _finish_commit(self, number: int, reply: Reply) -> bool:
        """Answer the dot, unless the client is gone or was answered when the deadline passed; say whether."""
        if number != self._commit or not self.committing or self._lost:
            return False
        self._commit += 1
        self.session.committed(reply)
        self._react()
        return True

    # --- STARTTLS ------------------------------------------------------------------------------------------------

    def _begin_handshake(self) -> None:
        self._handshaking = True
        self._service.wheel.disarm(self)
        self._service.spawn(self._shake_hands())

    async def _shake_hands(self) -> None:
        """Put TLS on the connection; whatever goes wrong, or cancels it, closes the connection."""
        loop = asyncio.get_running_loop()
        plain, holder = self._transport, self._service.tls
        encrypted: asyncio.Transport | None = None
        try:
            if plain is not None and holder is not None:
                encrypted = await loop.start_tls(
                    plain,
                    self,
                    holder.context,
                    server_side=True,
                    ssl_handshake_timeout=self._service.timeouts.handshake_s,
                )
        except OSError:
            self._service.counters.connections_tls_failed += 1
        finally:
            if encrypted is None or self._lost:
                self.abort()
                self._lose()
        if encrypted is not None and not self._lost:
            self._go_on_encrypted(encrypted)

    def _go_on_encrypted(self, transport: asyncio.Transport) -> None:
        """Everything before is forgotten; what came behind the handshake inside TLS is the client's first line."""
        self._transport = transport
        self._handshaking = self._reading_paused = False
        self._note_tls(transport)
        self.session.tls_started()
        early, self._early = self._early, b""
        if early:
            self.session.receive(early)
        self._react()

    def _note_tls(self, transport: asyncio.Transport) -> None:
        encrypted: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        self._tls = "" if encrypted is None else encrypted.version() or "TLS"
