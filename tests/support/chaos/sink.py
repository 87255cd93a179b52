"""The next hop of the chaos tests: an SMTP server whose ledger is the judge's, and that may misbehave.

A transaction is entered in the books when its dot is read, before anything is answered: whatever becomes of the 250,
this copy has arrived. That the sender went on with the connection afterwards is entered too, for then it has read the
250. How a recipient fares is in its address, so that the judge knows it without asking:

    refuse-…    550 at RCPT, always
    later-…     451 at RCPT the first two times
    others      250

`Manners` are what the server does beside that, drawn anew for each transaction.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from support.chaos.books import Books
from support.chaos.judge import BOUNCED, SENT

_LATER_COUNT = 2


def end_of(address: str) -> int:
    """How mail for this address must end."""
    return BOUNCED if address.startswith("refuse-") else SENT


@dataclass(frozen=True, slots=True)
class Manners:
    """`reply` None hangs up behind the dot; `after_reply` follows it in the same segment; `hang_up` closes then."""

    reply: bytes | None = b"250 2.0.0 taken\r\n"
    after_reply: bytes = b""
    hang_up: bool = False
    delay_s: float = 0.0


POLITE = Manners()
# Told of each command, of the stage `dot` before its answer, and of `answered` behind it.
Watcher = Callable[[str], Awaitable[None]]


class Gate:
    """A watcher that keeps transactions in front of their content, and so of their dot, while it is shut.

    What it keeps goes on at `let_go` only, however others pass meanwhile. To be used from any thread but for the call.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call
        self._gone = asyncio.Event()
        self._shut = False
        self.kept = 0

    def shut(self) -> None:
        """Keep what comes from now on, beside what is kept since it was shut before."""
        if not self._shut:
            self._gone, self._shut, self.kept = asyncio.Event(), True, 0

    def open(self) -> None:
        """Keep no more."""
        self._shut = False

    def let_go(self) -> None:
        """Let go on what is kept."""
        self._call(self._gone.set)

    async def __call__(self, stage: str) -> None:
        if stage == "DATA" and self._shut:
            self.kept += 1
            await self._gone.wait()


@dataclass
class Sink:
    """See the module."""

    books: Books
    manners: Callable[[], Manners] = lambda: POLITE
    pipelining: bool = True
    watcher: Watcher | None = None
    port: int = 0
    _server: asyncio.Server | None = None
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _put_off: Counter[str] = field(default_factory=Counter)
    _tasks: set[asyncio.Task[object]] = field(default_factory=set)

    async def start(self) -> Sink:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=64 * 1024 * 1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await _Session(self, next(self._numbers), reader, writer).run()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # cut off: the books say what had arrived
        finally:
            self._tasks.discard(task)
            writer.close()

    def recipient(self, address: str) -> bytes:
        """The reply to RCPT."""
        if end_of(address) != SENT:
            return b"550 5.1.1 nobody of that name\r\n"
        if address.startswith("later-") and self._put_off[address] < _LATER_COUNT:
            self._put_off[address] += 1
            return b"451 4.2.1 come back later\r\n"
        return b"250 2.1.5 ok\r\n"


class _Session:
    def __init__(self, sink: Sink, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._sink = sink
        self._number = number
        self._reader = reader
        self._writer = writer
        self._recipients: list[str] = []
        self._place: int | None = None

    async def _say(self, reply: bytes) -> None:
        self._writer.write(reply)
        await self._writer.drain()

    async def _tell(self, stage: str) -> None:
        if self._sink.watcher is not None:
            await self._sink.watcher(stage)

    async def run(self) -> None:
        await self._say(b"220 sink ESMTP\r\n")
        while (line := await self._reader.readline()).endswith(b"\r\n"):
            if self._place is not None:
                self._sink.books.note_confirmed(self._place)
                self._place = None
            text = line.decode().rstrip("\r\n")
            verb = text.partition(" ")[0].upper()
            await self._tell(verb)
            if verb == "QUIT":
                await self._say(b"221 bye\r\n")
                return
            if not await self._command(verb, text):
                return

    async def _command(self, verb: str, text: str) -> bool:
        if verb == "EHLO":
            pipelining = b"250-PIPELINING\r\n" if self._sink.pipelining else b""
            await self._say(b"250-sink\r\n" + pipelining + b"250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n")
        elif verb in {"MAIL", "RSET"}:
            self._recipients = []
            await self._say(b"250 2.1.0 ok\r\n")
        elif verb == "RCPT":
            address = text.partition("<")[2].partition(">")[0]
            reply = self._sink.recipient(address)
            if reply.startswith(b"2"):
                self._recipients.append(address)
            await self._say(reply)
        elif verb == "DATA" and self._recipients:
            return await self._data()
        else:
            await self._say(b"503 5.5.1 out of order\r\n")
        return True

    async def _data(self) -> bool:
        await self._say(b"354 go\r\n")
        framed = b"\r\n" + await self._reader.readuntil(b"\r\n.\r\n")
        content = framed[2:-3].replace(b"\r\n..", b"\r\n.")
        content = content[1:] if content.startswith(b"..") else content
        manners = self._sink.manners()
        self._place = self._sink.books.note_copy(content, tuple(self._recipients), self._number)
        await self._tell("dot")
        if manners.delay_s:
            await asyncio.sleep(manners.delay_s)
        if manners.reply is None:
            return False
        await self._say(manners.reply + manners.after_reply)
        await self._tell("answered")
        return not manners.hang_up
