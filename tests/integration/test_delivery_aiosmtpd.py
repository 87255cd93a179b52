"""Delivery to a server that is not ours: aiosmtpd takes what the engine sends, byte for byte."""

from __future__ import annotations

import asyncio

from aiosmtpd.smtp import SMTP, Envelope, Session

from support.delivery import A, delivery_bench

CONTENTS = [
    b"Subject: dots\r\n\r\n.\r\n..\r\n.leading\r\nlast line\r\n",
    b"\r\n",
    b"Subject: long\r\n\r\n" + b"x" * 900 + b"\r\n" + b"\r\n" * 3_000 + b"end\r\n",
    b"Subject: eight\r\n\r\n" + bytes(range(128, 256)) + b"\r\n",
]


class Inbox:
    """A handler that keeps envelopes."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        self.envelopes.append(envelope)
        return "250 2.0.0 taken"


async def test_a_foreign_server_gets_exactly_what_was_accepted() -> None:
    inbox = Inbox()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(inbox, hostname="sink.test", loop=loop), "127.0.0.1", 0)
    async with delivery_bench() as bench:
        bench.config.add_provider(A, server.sockets[0].getsockname()[1], max_connections=1)
        bench.config.route_to(A)
        for content in CONTENTS:
            envelope = bench.envelope(content, body_8bit=not content.isascii())
            await bench.submit("a@x.test", "b@x.test", content=content, envelope=envelope)
        await bench.events_come(len(CONTENTS))
        assert bench.types() == ["SENT"] * len(CONTENTS)
        assert [envelope.original_content for envelope in inbox.envelopes] == CONTENTS
        assert all(envelope.rcpt_tos == ["a@x.test", "b@x.test"] for envelope in inbox.envelopes)
        assert {event.remote_host for event in bench.events} == {bench.events[0].remote_host}
    server.close()
