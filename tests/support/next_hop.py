"""A next hop on loopback that does what a test tells it: a small honest SMTP server with replies that can be replaced.

`Behaviour` says how; `NextHop.messages` is what it took. A reply may be bytes, None (hang up), or STALL (say nothing).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

STALL = b"stall"
Reply = bytes | None


@dataclass
class Behaviour:
    greeting: Reply = b"220 sink ESMTP\r\n"
    capabilities: tuple[str, ...] = ("PIPELINING", "SIZE 30000000", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES")
    tls: ssl.SSLContext | None = None
    starttls: Reply = b"220 go\r\n"
    auth: Reply = b"235 2.7.0 ok\r\n"
    mail: Callable[[str], Reply] = lambda _: b"250 2.1.0 ok\r\n"
    recipient: Callable[[str], Reply] = lambda _: b"250 2.1.5 ok\r\n"
    data: Reply = b"354 go\r\n"
    final: Callable[[int], Reply] = lambda number: b"250 2.0.0 queued as %d\r\n" % number
    after_final: bytes = b""
    hang_up_after_final: bool = False


@dataclass
class Taken:
    sender: str
    recipients: list[str]
    content: bytes
    tls: str


@dataclass
class NextHop:
    port: int
    behaviour: Behaviour
    messages: list[Taken] = field(default_factory=list)
    connections: int = 0
    commands: list[str] = field(default_factory=list)
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[object]] = field(default_factory=set)
    _condition: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def took(self, count: int) -> list[Taken]:
        """Wait until that many messages were taken."""
        async with self._condition:
            await self._condition.wait_for(lambda: len(self.messages) >= count)
        return self.messages

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await _Session(self, reader, writer).run()
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError, asyncio.CancelledError):
            pass  # the test is over, or the client has gone
        finally:
            self._tasks.discard(task)
            writer.close()

    async def end(self) -> None:
        """End what is still connected."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    async def take(self, taken: Taken) -> None:
        async with self._condition:
            self.messages.append(taken)
            self._condition.notify_all()


class _HangUpError(ConnectionError):
    pass


class _Session:
    def __init__(self, hop: NextHop, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hop = hop
        self.reader = reader
        self.writer = writer
        self.sender = ""
        self.mail_accepted = False
        self.recipients: list[str] = []
        self.tls = ""

    async def say(self, reply: Reply) -> None:
        if reply is None:
            raise _HangUpError
        if reply == STALL:
            self.hop.stalled.set()
            await self.reader.read()  # until the client gives up
            raise _HangUpError
        self.writer.write(reply)
        await self.writer.drain()

    async def run(self) -> None:
        await self.say(self.hop.behaviour.greeting)
        while line := await self.reader.readline():
            text = line.decode().rstrip("\r\n")
            self.hop.commands.append(text)
            verb = text.partition(" ")[0].upper()
            if verb == "QUIT":
                await self.say(b"221 bye\r\n")
                return
            await self.command(verb, text)

    async def command(self, verb: str, text: str) -> None:
        behaviour = self.hop.behaviour
        match verb:
            case "EHLO":
                await self.say(self.ehlo())
            case "STARTTLS":
                await self.say(behaviour.starttls)
                if behaviour.tls is not None:
                    await self.writer.start_tls(behaviour.tls)
                    self.tls = self.writer.get_extra_info("ssl_object").version()
            case "AUTH":
                await self.say(behaviour.auth)
            case "MAIL":
                self.sender = text[len("MAIL FROM:<") :].partition(">")[0]
                self.recipients = []
                reply = behaviour.mail(self.sender)
                self.mail_accepted = (reply or b"").startswith(b"2")
                await self.say(reply)
            case "RCPT":
                await self.rcpt(text[len("RCPT TO:<") :].partition(">")[0])
            case "DATA":
                await self.data()
            case "RSET":
                await self.say(b"250 2.0.0 ok\r\n")
            case _:
                await self.say(b"502 5.5.1 what\r\n")

    def ehlo(self) -> bytes:
        capabilities = self.hop.behaviour.capabilities
        if self.hop.behaviour.tls is not None and not self.tls:
            capabilities = (*capabilities, "STARTTLS")
        lines = ["sink", *capabilities]
        return "".join(
            f"250{' ' if place == len(lines) - 1 else '-'}{line}\r\n" for place, line in enumerate(lines)
        ).encode()

    async def rcpt(self, address: str) -> None:
        reply = self.hop.behaviour.recipient(address) if self.mail_accepted else b"503 5.5.1 MAIL first\r\n"
        if reply is not None and reply.startswith(b"2"):
            self.recipients.append(address)
        await self.say(reply)

    async def data(self) -> None:
        behaviour = self.hop.behaviour
        if not self.recipients:
            await self.say(b"554 5.5.1 no valid recipients\r\n")
            return
        await self.say(behaviour.data)
        if not (behaviour.data or b"").startswith(b"354"):
            return
        content = (b"\r\n" + await self.reader.readuntil(b"\r\n.\r\n"))[2:-3]
        reply = behaviour.final(len(self.hop.messages) + 1)
        if reply is not None and reply.startswith(b"2"):
            plain = content[1:] if content.startswith(b"..") else content
            await self.hop.take(Taken(self.sender, self.recipients, plain.replace(b"\r\n..", b"\r\n."), self.tls))
        await self.say(None if reply is None else reply + behaviour.after_final)
        if behaviour.hang_up_after_final:
            raise _HangUpError


@asynccontextmanager
async def next_hop(
    behaviour: Behaviour | None = None, *, implicit_tls: ssl.SSLContext | None = None
) -> AsyncIterator[NextHop]:
    hop = NextHop(0, behaviour or Behaviour())
    server = await asyncio.start_server(hop.serve, "127.0.0.1", 0, limit=64 * 1024 * 1024, ssl=implicit_tls)
    hop.port = server.sockets[0].getsockname()[1]
    try:
        yield hop
    finally:
        server.close()
        await hop.end()
