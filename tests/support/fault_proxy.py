"""A TCP proxy that breaks what passes through it: in this process, on any link, as a seed says.

A fault strikes a connection in one direction, after so many octets of it; `plan` chooses it for each new connection,
`strike` breaks those that are open. Octets before the fault are passed on one by one as they came, those behind it
never. Everything runs on the loop that called `start`; `in_thread` gives synchronous code a loop of its own.

    kind         what happens after `after_bytes`
    CUT          both sides are closed
    RESET        both sides are reset: what was not read yet is lost, too
    HALF_CLOSE   this direction ends; the other one goes on
    BLACK_HOLE   nothing passes any more in either direction, and nothing is closed; from 0 it is not even connected
    DELAY        each piece waits `seconds`
    DRIP         each octet waits `seconds`
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

_PIECE = 65_536
# uvloop tells of a transport that was closed by RuntimeError.
_GONE = (OSError, RuntimeError)
_LINGER_NOT = struct.pack("ii", 1, 0)


class Kind(enum.Enum):
    """See the module."""

    CUT = "cut"
    RESET = "reset"
    HALF_CLOSE = "half-close"
    BLACK_HOLE = "black hole"
    DELAY = "delay"
    DRIP = "drip"


@dataclass(frozen=True, slots=True)
class Fault:
    """`upstream` is the direction from the client to the server."""

    kind: Kind
    after_bytes: int = 0
    upstream: bool = True
    seconds: float = 0.0

    def __str__(self) -> str:
        way = "to the server" if self.upstream else "to the client"
        pace = f" of {self.seconds:.3f} s" if self.seconds else ""
        return f"{self.kind.value}{pace} after {self.after_bytes} octets {way}"


Plan = Callable[[], Fault | None]


class FaultProxy:
    """One link. `passed` counts octets by direction over all connections (upstream, downstream)."""

    def __init__(self, target_port: int, plan: Plan = lambda: None) -> None:
        self.target_port = target_port
        self.plan = plan
        self.port = 0
        self.passed = [0, 0]
        self.connections = 0
        self.struck = 0
        self._server: asyncio.Server | None = None
        self._open: set[_Passage] = set()

    async def start(self, port: int = 0) -> FaultProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Cut everything and stop listening."""
        if self._server is not None:
            self._server.close()
        await self.strike(Fault(Kind.CUT))
        for passage in list(self._open):
            passage.task.cancel()
        if self._open:
            await asyncio.wait({passage.task for passage in self._open}, timeout=5)

    async def strike(self, fault: Fault) -> int:
        """Break what is open now, without counting octets; how many connections that were."""
        struck = list(self._open)
        for passage in struck:
            passage.strike(fault)
        self.struck += len(struck)
        await asyncio.sleep(0)
        return len(struck)

    async def ended(self) -> None:
        """Wait until no connection is open, so that `passed` is the last word."""
        while self._open:
            await asyncio.wait({passage.task for passage in self._open})

    async def heal(self) -> None:
        """Break no new connection, and end those that hang in a black hole."""
        self.plan = lambda: None
        for passage in list(self._open):
            passage.heal()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections += 1
        passage = _Passage(self, task, (reader, writer), self.plan())
        self._open.add(passage)
        try:
            await passage.run()
        except (*_GONE, asyncio.CancelledError):
            pass  # one of the sides is gone: that is what this is for
        finally:
            self._open.discard(passage)
            passage.close()


Side = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Passage:
    """One connection on its way through."""

    def __init__(self, proxy: FaultProxy, task: asyncio.Task[Any], client: Side, fault: Fault | None) -> None:
        self.task = task
        self._proxy = proxy
        self._client = client
        self._server: Side | None = None
        self._fault = fault
        self._hole = asyncio.Event()
        self._healed = asyncio.Event()

    async def run(self) -> None:
        if self._fault is not None and self._fault.kind is Kind.BLACK_HOLE and not self._fault.after_bytes:
            self._proxy.struck += 1
            await self._healed.wait()
            return
        self._server = await asyncio.open_connection("127.0.0.1", self._proxy.target_port)
        ways = [
            asyncio.ensure_future(self._pump(self._client[0], self._server[1], upstream=True)),
            asyncio.ensure_future(self._pump(self._server[0], self._client[1], upstream=False)),
        ]
        try:
            await asyncio.gather(*ways)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upstream: bool) -> None:
        left = None
        if self._fault is not None and self._fault.upstream is upstream:
            left = self._fault.after_bytes
        while True:
            if left == 0:
                left = None
                if await self._break(writer):
                    return
            piece = await reader.read(_PIECE if left is None else left)
            if self._hole.is_set():
                await self._healed.wait()
                self.close()
                return
            if not piece:
                with contextlib.suppress(*_GONE):
                    writer.write_eof()
                return
            await self._pass(piece, writer, upstream=upstream)
            left = None if left is None else left - len(piece)

    async def _pass(self, piece: bytes, writer: asyncio.StreamWriter, *, upstream: bool) -> None:
        fault = self._fault
        self._proxy.passed[0 if upstream else 1] += len(piece)
        if fault is not None and fault.seconds and fault.upstream is upstream and not self._healed.is_set():
            step = 1 if fault.kind is Kind.DRIP else len(piece)
            for start in range(0, len(piece), step):
                if not self._healed.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._healed.wait(), fault.seconds)
                writer.write(piece[start : start + step])
                await writer.drain()
            return
        writer.write(piece)
        await writer.drain()

    async def _break(self, writer: asyncio.StreamWriter) -> bool:
        """Do what the fault says; whether this direction is over."""
        assert self._fault is not None
        kind = self._fault.kind
        if kind in {Kind.DELAY, Kind.DRIP}:
            return False
        self._proxy.struck += 1
        if kind is Kind.HALF_CLOSE:
            with contextlib.suppress(*_GONE):
                writer.write_eof()
            return True
        self.strike(self._fault)
        if kind is Kind.BLACK_HOLE:
            await self._healed.wait()
            self.close()
        return True

    def strike(self, fault: Fault) -> None:
        self._fault = fault
        if fault.kind is Kind.BLACK_HOLE:
            self._hole.set()
        elif fault.kind is Kind.RESET:
            self._reset()
        elif fault.kind is Kind.CUT:
            self.close()

    def heal(self) -> None:
        self._healed.set()

    def close(self) -> None:
        for side in (self._client, self._server):
            if side is not None:
                side[1].close()

    def _reset(self) -> None:
        for side in (self._client, self._server):
            if side is not None:
                raw = side[1].get_extra_info("socket")
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
                side[1].transport.abort()


class LoopThread:
    """A loop in a thread, for synchronous tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-loop", daemon=True)
        self._thread.start()

    def run(self, work: Any, timeout_s: float = 30.0) -> Any:
        """Run a coroutine there and wait for its result."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout_s)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function there, without waiting."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()


@contextlib.contextmanager
def in_thread() -> Iterator[LoopThread]:
    """A loop in a thread, ended at the end."""
    thread = LoopThread()
    try:
        yield thread
    finally:
        thread.end()
