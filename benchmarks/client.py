"""What delivering a message costs here: microseconds of processor time, by the client machine alone and over a socket.

Run by `python -m benchmarks.client [--size 4096] [--messages 20000]`. One recipient, kept connections, PIPELINING, no
TLS. `machine` is the machine with replies fed to it; `connection` adds `delivery.connection` on uvloop and a loopback
socket, with a peer in another process that only answers, so that the figure is of the client's side. The least of five
rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from typing import cast

import uvloop

from dataplane.clock import SystemClock
from dataplane.core.client import Client, Signal
from dataplane.core.config import TlsPolicy
from dataplane.core.transaction import Transaction, Verdict, VerdictKind
from dataplane.delivery.connection import Connection
from dataplane.delivery.deadlines import Deadlines

_LINE = b"The quick brown fox jumps over the lazy dog, and the dog lets it.\r\n"
_EHLO = b"250-peer\r\n250-PIPELINING\r\n250-SIZE 30000000\r\n250 8BITMIME\r\n"
_ENVELOPE = b"250 2.1.0 ok\r\n250 2.1.5 ok\r\n354 go\r\n"
_FINAL = b"250 2.0.0 queued as 0190f5d2-0000-7000-8000-000000000000\r\n"
_ROUNDS = 5


def _transaction(size_bytes: int) -> Transaction:
    content = (b"Subject: x\r\n\r\n" + _LINE * (size_bytes // len(_LINE) + 1))[: size_bytes - 2] + b"\r\n"
    return Transaction("app@example.com", ("someone@example.net",), content, verified=True)


def measure_machine(size_bytes: int, messages: int) -> float:
    """Return microseconds a message of the machine alone."""
    client = Client("bench", TlsPolicy.NONE)
    client.receive(b"220 peer\r\n")
    client.receive(_EHLO)
    transaction = _transaction(size_bytes)
    begin = time.process_time()
    for _ in range(messages):
        client.take_output()
        client.begin(transaction)
        client.take_output()
        client.receive(_ENVELOPE)
        client.take_output()
        while client.content_left:
            client.next_piece()
        signal = client.receive(_FINAL)
        assert signal is Signal.DONE
    return (time.process_time() - begin) / messages * 1e6


async def _send(port: int, size_bytes: int, messages: int) -> float:
    loop = asyncio.get_running_loop()
    clock = SystemClock()
    deadlines = Deadlines(clock)
    connection = Connection(Client("bench", TlsPolicy.NONE), "peer", clock, deadlines)
    await loop.create_connection(lambda: connection, "127.0.0.1", port)
    await connection.opening
    transaction = _transaction(size_bytes)
    finished = loop.create_future()
    left = messages

    def done(_: Connection, verdicts: tuple[Verdict, ...]) -> None:
        nonlocal left
        assert verdicts[0].kind is VerdictKind.SENT
        left -= 1
        if left:
            # Not from within: a reply's callback ends before the next message begins, as in the pool's loop.
            loop.call_soon(connection.send, transaction)
        else:
            finished.set_result(None)

    connection.on_done = done
    begin = time.process_time()
    connection.send(transaction)
    await finished
    cost = (time.process_time() - begin) / messages * 1e6
    connection.leave()
    deadlines.close()
    return cost


class Peer(asyncio.Protocol):
    """Answers without looking further than it must. `taken` is called for each message."""

    def __init__(self) -> None:
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(b"220 peer\r\n")

    def data_received(self, data: bytes) -> None:
        """Answer what the last octets ask for."""
        tail = self._tail + data[-16:]
        if tail.endswith(b"\r\n.\r\n"):
            self.taken()
            self._transport.write(_FINAL)
        elif tail.endswith(b"DATA\r\n"):
            self._transport.write(_ENVELOPE)
        elif tail.endswith(b"QUIT\r\n"):
            self._transport.close()
        elif data.startswith(b"EHLO"):
            self._transport.write(_EHLO)
        self._tail = tail[-16:]

    def taken(self) -> None:
        """Take note of a message; here of none."""


def _serve(pipe: Pipe) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Peer, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


@contextlib.contextmanager
def serve_peer() -> Iterator[int]:
    """Run a peer that only answers in another process; gives its port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    peer = context.Process(target=_serve, args=(theirs,))
    peer.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        peer.join()


def measure_connection(size_bytes: int, messages: int) -> float:
    """Return microseconds a message of machine, connection, loop and socket."""
    with serve_peer() as port, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return min(runner.run(_send(port, size_bytes, messages)) for _ in range(_ROUNDS))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="cost of delivering a message, client side")
    parser.add_argument("--size", type=int, default=4_096, help="octets of a message")
    parser.add_argument("--messages", type=int, default=20_000, help="messages of a round")
    arguments = parser.parse_args()
    machine = min(measure_machine(arguments.size, arguments.messages) for _ in range(_ROUNDS))
    print(f"machine     {machine:6.1f} us a message of {arguments.size} octets")
    print(f"connection  {measure_connection(arguments.size, arguments.messages):6.1f} us")


if __name__ == "__main__":
    main()
