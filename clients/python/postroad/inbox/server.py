"""The inbox's SMTP server: takes every mail, on one port of the loopback, and stores it before it says 250.

Contract. `serve` listens until `stop` is set. `250 2.0.0 stored as <number>` means: on the disk, with fsync; tests
of "nothing is lost" judge by it. A mail that cannot be stored, or an error of ours, is answered with 451, never
with 5xx. A connection that ends before its answer does not undo the storing. 8BITMIME, SMTPUTF8, SIZE (64 MiB)
and PIPELINING are offered; neither TLS nor AUTH, for it serves this machine only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope, Session

from postroad.inbox.store import Inbox, ReceivedMail

MAX_CONTENT_BYTES = 64 * 1024 * 1024
_MAX_LINE_BYTES = 64 * 1024
_STOP_TIMEOUT_S = 5.0

# aiosmtpd logs every command line at INFO, and for each connection what it found by reflection.
logging.getLogger("mail.log").setLevel(logging.WARNING)


class InboxHandler:
    """The hooks of aiosmtpd: store at DATA, and turn every failure of ours into 451."""

    def __init__(self, inbox: Inbox, on_received: Callable[[ReceivedMail], None]) -> None:
        self._inbox = inbox
        self._on_received = on_received
        self._storing: set[asyncio.Task[str]] = set()

    async def handle_EHLO(  # noqa: N802 - aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        """Offer PIPELINING: the reader keeps what arrives early, in order, also behind DATA's end."""
        session.host_name = hostname
        return [*responses[:-1], "250-PIPELINING", responses[-1]]

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - as above
        """Store, and answer; the storing goes on when the connection is lost meanwhile."""
        task = asyncio.create_task(self._store(session, envelope))
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)
        return await asyncio.shield(task)

    async def handle_exception(self, error: Exception) -> str:
        """451: by itself aiosmtpd answers 500 with the exception's text, a permanent failure for our own fault."""
        logging.getLogger("postroad.inbox").error("inbox.failed", exc_info=error)
        return "451 4.3.0 the inbox failed, try again later"

    async def finished(self) -> None:
        """Return when nothing is being stored any more."""
        while self._storing:
            await asyncio.wait(self._storing)

    async def _store(self, session: Session, envelope: Envelope) -> str:
        try:
            mail = await asyncio.to_thread(
                self._inbox.add,
                envelope.original_content or b"",
                # The null sender arrives with its brackets, every other address without.
                sender="" if envelope.mail_from in {None, "<>"} else str(envelope.mail_from),
                recipients=[str(recipient) for recipient in envelope.rcpt_tos],
                receive_time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                helo=session.host_name or "",
                peer=str((session.peer or ("",))[0]),
                options=[str(option) for option in envelope.mail_options],
            )
        except OSError as error:
            logging.getLogger("postroad.inbox").error("inbox.not_stored: %s", error)  # noqa: TRY400 - the disk's words
            return "451 4.3.1 the inbox cannot store the mail, try again later"
        self._on_received(mail)
        return f"250 2.0.0 stored as {mail.number}"


async def serve(
    inbox: Inbox,
    host: str,
    port: int,
    *,
    stop: asyncio.Event,
    on_ready: Callable[[int], None],
    on_received: Callable[[ReceivedMail], None],
) -> None:
    """Serve until `stop` is set; `on_ready` gets the real port. OSError when the port cannot be had."""
    loop = asyncio.get_running_loop()
    handler = InboxHandler(inbox, on_received)
    connections: set[asyncio.BaseTransport] = set()

    def protocol() -> SMTP:
        return _InboxSession(connections, handler, loop)

    server = await loop.create_server(protocol, host, port, backlog=1024)
    try:
        on_ready(server.sockets[0].getsockname()[1])
        await stop.wait()
    finally:
        server.close()
        # What was received whole is stored and answered; then the rest is cut.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await handler.finished()
        for transport in tuple(connections):
            transport.close()
        await server.wait_closed()


class _InboxSession(SMTP):
    """A session whose transport is known to the server, so that stopping can close it."""

    # A judge takes more than the RFC's 998 octets a line: what arrives is to be seen as it is.
    line_length_limit = _MAX_LINE_BYTES

    def __init__(self, connections: set[asyncio.BaseTransport], handler: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            handler,
            data_size_limit=MAX_CONTENT_BYTES,
            enable_SMTPUTF8=True,
            hostname="inbox.localhost",
            ident="Postroad inbox",
            loop=loop,
        )
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport in."""
        self._connections.add(transport)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        """Let go of it."""
        if self.transport is not None:
            self._connections.discard(self.transport)
        super().connection_lost(error)
