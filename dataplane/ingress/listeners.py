"""Accepts connections on sockets that were bound elsewhere, and turns away whom no session should be spent on.

Contract. `Ingress.start` takes bound sockets with their modes and serves until `drain`. Before a session exists the
total and per-address caps, the address's bucket and a client that talks before the greeting are dealt with, on the bare
socket; so is everybody while the node is closed to mail. Addresses of networks that are bound to an account are bound
by the total cap only. When descriptors or memory run out, accepting pauses for a second: the kernel's queue waits,
nobody is told a lie.

    mode      TLS                       AUTH             without AUTH
    starttls  after STARTTLS            under TLS only   clients of an account's networks
    tls       from the first octet      yes              clients of an account's networks
    plain     never                     not offered      clients of an account's networks
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum

from dataplane.core import replies
from dataplane.core.limits import counting_key, normalize_address
from dataplane.core.replies import Reply
from dataplane.ingress.protocol import SmtpProtocol, Timeouts
from dataplane.ingress.service import Service
from dataplane.ingress.submission import Submission
from dataplane.ingress.tls import TlsHolder

_BACKLOG = 4_096
_ACCEPTS_PER_TURN = 64
_PAUSE_S = 1.0


class Mode(StrEnum):
    """How a listener deals with TLS; the words of the settings."""

    STARTTLS = "starttls"
    TLS = "tls"
    PLAIN = "plain"


class Ingress:
    """All listeners of a worker. `tls` may be None when every mode is plain."""

    def __init__(self, submission: Submission, tls: TlsHolder | None, timeouts: Timeouts) -> None:
        self.service = Service(submission, tls, timeouts)
        self._acceptors: list[_Acceptor] = []

    def start(self, listeners: Sequence[tuple[socket.socket, Mode]]) -> None:
        """Serve these bound sockets on the running loop. ValueError for a mode that needs a certificate."""
        if self.service.tls is None and any(mode is not Mode.PLAIN for _, mode in listeners):
            raise ValueError("a certificate is needed by listeners that are not plain")
        self.service.wheel.start()
        for bound, mode in listeners:
            acceptor = _Acceptor(self.service, bound, mode)
            acceptor.start()
            self._acceptors.append(acceptor)

    async def drain(self, deadline_s: float) -> None:
        """Accept no more, end the sessions within the deadline, close the sockets."""
        for acceptor in self._acceptors:
            acceptor.stop()
        await self.service.drain(deadline_s)

    def close_to_mail(self, *, wanted: bool) -> None:
        """Answer everybody 421 and let the sessions that there are come to their end, or serve again."""
        if wanted:
            self.service.close_to_mail()
        else:
            self.service.draining = False

    def held(self) -> Mapping[str, int]:
        """Return what still holds a drain up, by label."""
        return {"sessions": self.service.active}


class _Acceptor:
    """One listening socket."""

    def __init__(self, service: Service, bound: socket.socket, mode: Mode) -> None:
        self._service = service
        self._socket = bound
        self._mode = mode
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._socket.setblocking(False)
        self._socket.listen(_BACKLOG)
        self._watch()

    def stop(self) -> None:
        if self._socket.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._answer_who_waits()
        self._socket.close()

    def _answer_who_waits(self) -> None:
        """Closing the socket would reset those in its queue."""
        with suppress(OSError):
            while True:
                self._turn_away(self._socket.accept()[0], replies.SHUTTING_DOWN)

    def _watch(self) -> None:
        self._pause = None
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        """Take what waits, but not without end: others want the loop too."""
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                connection, peer = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._rest(error)
                return
            connection.setblocking(False)
            self._take(connection, normalize_address(peer[0]))

    def _rest(self, error: OSError) -> None:
        """Out of descriptors or memory: let the ones there are finish."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket.fileno())
        self._pause = loop.call_later(_PAUSE_S, self._watch)
        self._service.submission.log.warning("listener.paused", error=str(error), seconds=_PAUSE_S)

    def _take(self, connection: socket.socket, address: str) -> None:
        submission = self._service.submission
        if self._service.draining:
            self._refuse(connection, address, replies.SHUTTING_DOWN)
            return
        listed = submission.config.account_of_network(address) is not None
        refusal = submission.admission.admit(address, counted=not listed)
        if refusal is not None:
            self._service.counters.connections_over_cap += 1
            self._refuse(connection, address, refusal)
            return
        self._service.spawn(self._open(connection, address, listed=listed))

    async def _open(self, connection: socket.socket, address: str, *, listed: bool) -> None:
        """Make a session of a connection; until it exists, giving back its place is our business."""
        session: SmtpProtocol | None = None
        try:
            refusal = await self._rate_refusal(address, listed=listed)
            if refusal is None and self._mode is not Mode.TLS and _talks_early(connection):
                self._service.counters.connections_early_talker += 1
                refusal = replies.EARLY_TALKER
            if refusal is None:
                session = self._session(address)
                await self._connect(session, connection)
            else:
                self._refuse(connection, address, refusal)
        except OSError:
            if self._mode is Mode.TLS:
                self._service.counters.connections_tls_failed += 1
            else:
                self._service.counters.connections_failed += 1
        finally:
            if session is None or not session.opened:
                self._service.submission.admission.leave(address)
                connection.close()

    async def _rate_refusal(self, address: str, *, listed: bool) -> Reply | None:
        submission = self._service.submission
        takes = submission.limits.of_connection(submission.config.settings, counting_key(address), listed=listed)
        if not takes:
            return None
        grant = await submission.limiter.take(takes)
        if grant.allowed:
            return None
        self._service.counters.connections_over_rate += 1
        return replies.too_many_connections(grant.wait_s)

    def _session(self, address: str) -> SmtpProtocol:
        service = self._service
        return SmtpProtocol(
            service,
            service.submission.submitter(address),
            service.limits,
            tls_available=self._mode is not Mode.PLAIN,
            tls_active=self._mode is Mode.TLS,
        )

    async def _connect(self, session: SmtpProtocol, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        holder = self._service.tls
        if self._mode is Mode.TLS and holder is not None:
            await loop.connect_accepted_socket(
                lambda: session,
                connection,
                ssl=holder.context,
                ssl_handshake_timeout=self._service.timeouts.handshake_s,
            )
        else:
            await loop.connect_accepted_socket(lambda: session, connection)

    def _refuse(self, connection: socket.socket, address: str, refusal: Reply) -> None:
        self._service.submission.log.info("connection.refused", address=address, reason=refusal.reason)
        self._turn_away(connection, refusal)

    def _turn_away(self, connection: socket.socket, refusal: Reply) -> None:
        """Say why, where the client can read it, and close; nobody waits for it."""
        with suppress(OSError):
            if self._mode is not Mode.TLS:
                connection.send(refusal.wire)
        connection.close()


def _talks_early(connection: socket.socket) -> bool:
    """Whether the client sent octets before the greeting; they are taken, or closing would reset our reply."""
    try:
        return bool(connection.recv(65_536))
    except BlockingIOError:
        return False
