"""One conversation of a client with a node, step by step: what was sent, what was answered, and where it ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from support.chaos.application import SENDER, Message
from support.chaos.books import Try, digest

WAIT_S = 20.0
# Told when a step's reply has come: its verb, `HALF` when half of the content was sent, `DOT` when all of it was.
Listener = Callable[[str], Awaitable[None]]


class Talk:
    """One try. `dot_at` counts the octets up to the end of the dot once it was written; `code` 0 is no reply."""

    def __init__(self, message: Message, number: int, listener: Listener | None = None) -> None:
        self.code, self.text = 0, ""
        self.dot_at = 0
        self._message = message
        self._token = f"{message.name}.{number}"
        self._content = message.content(self._token)
        self._listener = listener

    def entry(self) -> Try:
        """What goes into the books."""
        found = self.text.partition("queued as ")[2][:36]
        left = self.dot_at > 0
        return Try(self._token, self._message.recipients, digest(self._content), left, self.code, self.text, found)

    async def run(self, port: int) -> None:
        """Talk until the reply to the dot and QUIT, or to a refusal. OSError or EOFError when the node goes away."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        steps = [
            ("CONNECT", b"", 220),
            ("EHLO", b"EHLO app.example\r\n", 250),
            ("MAIL", f"MAIL FROM:<{SENDER}>\r\n".encode(), 250),
            *(("RCPT", f"RCPT TO:<{address}>\r\n".encode(), 250) for address in self._message.recipients),
            ("DATA", b"DATA\r\n", 354),
        ]
        sent = 0
        try:
            for verb, command, wanted in steps:
                writer.write(command)
                sent += len(command)
                code, text = await _reply(reader)
                if code != wanted:
                    self.code, self.text = code, text
                    return
                await self._tell(verb)
            await self._send_content(writer, sent)
            self.code, self.text = await _reply(reader)
            writer.write(b"QUIT\r\n")
            await _reply(reader)
        finally:
            writer.transport.abort()

    async def _send_content(self, writer: asyncio.StreamWriter, sent: int) -> None:
        stuffed = self._content.replace(b"\r\n.", b"\r\n..") + b".\r\n"
        half = len(stuffed) // 2
        if self._listener is not None:
            writer.write(stuffed[:half])
            await self._tell("HALF")
            writer.write(stuffed[half:])
        else:
            writer.write(stuffed)
        self.dot_at = sent + len(stuffed)
        await self._tell("DOT")

    async def _tell(self, step: str) -> None:
        if self._listener is not None:
            await self._listener(step)


async def hold_talk(port: int, message: Message, number: int, listener: Listener | None = None) -> Talk:
    """A whole conversation, wherever it ends."""
    talk = Talk(message, number, listener)
    with contextlib.suppress(OSError, EOFError, ValueError):
        async with asyncio.timeout(WAIT_S):
            await talk.run(port)
    return talk


async def _reply(reader: asyncio.StreamReader) -> tuple[int, str]:
    while True:
        line = await reader.readuntil(b"\r\n")
        if line[3:4] == b" ":
            return int(line[:3]), line[4:].decode().strip()
