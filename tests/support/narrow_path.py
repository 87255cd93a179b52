"""A TCP path that stops reading when a test says so, with as little room as the system allows: a next hop that is slow.

It knows nothing of what passes, so that TLS passes as well. `shut` stops what comes from the client, `open` lets it go
on; `ended` is set when the client's side has ended, by FIN or by a reset (`was_reset`). `say` and `say_no_more` speak
to the client for the next hop, in clear.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_ROOM_BYTES = 4_096
_PIECE_BYTES = 2_048


@dataclass
class NarrowPath:
    port: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    forwarded_count: int = 0
    """Octets of the client that were passed on."""
    was_reset: bool = False
    _is_open: asyncio.Event = field(default_factory=asyncio.Event)
    _client: socket.socket | None = None

    def shut(self) -> None:
        self._is_open.clear()

    def open(self) -> None:
        self._is_open.set()

    def say(self, octets: bytes) -> None:
        assert self._client is not None
        assert self._client.send(octets) == len(octets)

    def say_no_more(self) -> None:
        """Half-close: what comes from the client is taken as before."""
        assert self._client is not None
        self._client.shutdown(socket.SHUT_WR)

    async def forward(self, listening: socket.socket, hop_port: int) -> None:
        """Pass one connection on."""
        loop = asyncio.get_running_loop()
        client, _ = await loop.sock_accept(listening)
        self._client = client
        reader, writer = await asyncio.open_connection("127.0.0.1", hop_port)
        back = loop.create_task(self._back(reader, client))
        try:
            await self._there(client, writer)
        finally:
            back.cancel()
            writer.close()
            client.close()

    async def _there(self, client: socket.socket, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._is_open.wait()
                octets = await loop.sock_recv(client, _PIECE_BYTES)
                if not octets:
                    break
                writer.write(octets)
                await writer.drain()
                self.forwarded_count += len(octets)
        except ConnectionError:
            self.was_reset = True
        self.ended.set()

    async def _back(self, reader: asyncio.StreamReader, client: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while octets := await reader.read(_PIECE_BYTES):
                await asyncio.get_running_loop().sock_sendall(client, octets)


@asynccontextmanager
async def narrow_path(hop_port: int) -> AsyncIterator[NarrowPath]:
    path = NarrowPath()
    path.open()
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM_BYTES)
        listening.setblocking(False)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        path.port = listening.getsockname()[1]
        task = asyncio.get_running_loop().create_task(path.forward(listening, hop_port))
        try:
            yield path
        finally:
            task.cancel()
            await asyncio.wait([task])
