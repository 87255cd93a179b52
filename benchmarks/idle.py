"""What an idle connection costs in memory: 10,000 held open by one worker's ingress, plain and under TLS.

Run by `python -m benchmarks.idle [--connections 10000] [--modes plain tls starttls]`. Server and clients are processes
of their own on uvloop. The figure is the growth of the server's resident memory for each connection, once all have said
EHLO, and again once each has sent a message and waits. Beside them a new client is timed from its connection to its
250, which says whether others are still served. Where the descriptors that a process may open do not suffice, fewer are
opened, and a line says so. The kernel's buffers are not counted: it bounds them itself.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import gc
import multiprocessing
import os
import resource
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from benchmarks.ingress import quiet_submission
from dataplane.ingress.listeners import Ingress, Mode
from dataplane.ingress.protocol import Timeouts
from dataplane.ingress.tls import TlsHolder, server_context

# Of a server with nothing open: listening socket, loop, pipes, libraries' files.
_SPARE_DESCRIPTORS = 200
_AT_ONCE = 200
_PROBES = 50
_WARM_UP = 100
_PATIENCE_S = 300
_MESSAGE = (
    b"MAIL FROM:<app@example.com>\r\nRCPT TO:<x@example.net>\r\nDATA\r\n",
    b"From: app@example.com\r\nSubject: idle\r\n\r\n"
    + b"The quick brown fox jumps over the lazy dog.\r\n" * 80
    + b".\r\n",
)


class _Client(asyncio.Protocol):
    """Says what it is told to and notes each reply."""

    def __init__(self) -> None:
        self.transport: asyncio.WriteTransport | None = None
        self._heard = b""
        self._wanted = b""
        self._waiting: asyncio.Future[None] | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Opened; under TLS the handshake is over."""
        self.transport = transport  # type: ignore[assignment]  # uvloop's own classes

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._look()

    def data_received(self, data: bytes) -> None:
        self._heard += data
        self._look()

    def _look(self) -> None:
        if self._waiting is not None and (self.lost or self._wanted in self._heard):
            waiting, self._waiting = self._waiting, None
            if self.lost:
                waiting.set_exception(ConnectionError(f"closed, with {self._heard!r}"))
            else:
                self._heard = b""
                waiting.set_result(None)

    async def hear(self, wanted: bytes) -> None:
        """Wait for a reply that holds this."""
        self._wanted = wanted
        self._waiting = asyncio.get_running_loop().create_future()
        self._look()
        if self._waiting is not None:
            await self._waiting

    async def ask(self, data: bytes, wanted: bytes) -> None:
        """Say something and wait for its reply."""
        assert self.transport is not None
        self.transport.write(data)
        await self.hear(wanted)

    async def send(self) -> None:
        """Send a message."""
        await self.ask(_MESSAGE[0], b"354 ")
        await self.ask(_MESSAGE[1], b"queued as")


async def _open(port: int, mode: Mode, context: ssl.SSLContext) -> _Client:
    loop = asyncio.get_running_loop()
    at_once = context if mode is Mode.TLS else None
    _, client = await loop.create_connection(_Client, "127.0.0.1", port, ssl=at_once)
    await client.hear(b"220 ")
    if mode is Mode.STARTTLS:
        await client.ask(b"EHLO bench\r\n", b"250 HELP")
        await client.ask(b"STARTTLS\r\n", b"220 ")
        assert client.transport is not None
        client.transport = await loop.start_tls(client.transport, client, context)
    await client.ask(b"EHLO bench\r\n", b"250 HELP")
    return client


async def _hold(port: int, count: int, mode: Mode, told: Connection) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    clients: list[_Client] = []
    while len(clients) < count:
        clients += await asyncio.gather(
            *(_open(port, mode, context) for _ in range(min(_AT_ONCE, count - len(clients))))
        )
    told.send("greeted")
    await asyncio.to_thread(told.recv)
    for start in range(0, count, _AT_ONCE):
        await asyncio.gather(*(client.send() for client in clients[start : start + _AT_ONCE]))
    told.send("sent")
    await asyncio.to_thread(told.recv)
    times = []
    for _ in range(_PROBES):
        began_s = time.monotonic()
        probe = await _open(port, mode, context)
        await probe.send()
        times.append(time.monotonic() - began_s)
        assert probe.transport is not None
        probe.transport.abort()
    told.send((sum(client.lost for client in clients), times))
    await asyncio.to_thread(told.recv)
    for client in clients:
        if client.transport is not None:
            client.transport.abort()


def _run_clients(port: int, count: int, mode: Mode, told: Connection) -> None:
    _allow_descriptors()
    uvloop.run(_hold(port, count, mode, told))


def _run_server(folder: str, mode: Mode, told: Connection) -> None:
    _allow_descriptors()
    uvloop.run(_serve(Path(folder), mode, told))


async def _serve(folder: Path, mode: Mode, told: Connection) -> None:
    submission = quiet_submission()
    holder = TlsHolder(server_context(folder / "chain.pem", folder / "key.pem")) if mode is not Mode.PLAIN else None
    ingress = Ingress(submission, holder, Timeouts())
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    ingress.start([(bound, mode)])
    told.send(bound.getsockname()[1])
    while await asyncio.to_thread(told.recv) == "memory":
        gc.collect()
        told.send((_resident_bytes(), submission.counters.sessions_active))
    await ingress.drain(0.1)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _allow_descriptors() -> int:
    """Take what the system gives; return how many descriptors this process may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _make_certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "chain.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


class _Process:
    """A process of this measurement and the pipe to it."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._told, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(*arguments, theirs))
        self._process.start()

    def ask(self, question: str) -> Any:
        self._told.send(question)
        return self.hear()

    def hear(self) -> Any:
        if not self._told.poll(_PATIENCE_S):
            raise TimeoutError("a process of the measurement says nothing")
        return self._told.recv()

    def end(self) -> None:
        self._told.send("end")
        self._process.join(_PATIENCE_S)
        self._process.kill()


class _Memory(NamedTuple):
    """Resident bytes of the server at three moments, connections that were closed, and what new clients waited."""

    greeted_bytes: int
    waiting_bytes: int
    ended_bytes: int
    lost: int
    times_s: list[float]


def _hold_connections(server: _Process, port: int, count: int, mode: Mode) -> _Memory:
    clients = _Process(_run_clients, port, count, mode)
    clients.hear()
    greeted_bytes, _ = server.ask("memory")
    clients.ask("send")
    waiting_bytes, _ = server.ask("memory")
    lost, times_s = clients.ask("probe")
    clients.end()
    for _ in range(1_000):
        ended_bytes, sessions = server.ask("memory")
        if not sessions:
            return _Memory(greeted_bytes, waiting_bytes, ended_bytes, lost, times_s)
        time.sleep(0.05)
    raise TimeoutError("the server does not notice that its clients left")


def measure(mode: Mode, count: int, folder: Path) -> str:
    """Return a row of the table."""
    server = _Process(_run_server, str(folder), mode)
    port = server.hear()
    # What the first connections and messages leave behind is the process's, not theirs.
    base_bytes = _hold_connections(server, port, _WARM_UP, mode).ended_bytes
    memory = _hold_connections(server, port, count, mode)
    server.end()
    greeted, waiting = ((total - base_bytes) / count / 1024 for total in (memory.greeted_bytes, memory.waiting_bytes))
    p95_ms = statistics.quantiles(memory.times_s, n=20)[18] * 1_000
    return f"| {mode} | {count:,} | {greeted:.1f} | {waiting:.1f} | {memory.lost} | {p95_ms:.1f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--modes", nargs="+", choices=list(Mode), default=["plain", "tls", "starttls"])
    options = parser.parse_args(arguments)
    allowed = _allow_descriptors() - _SPARE_DESCRIPTORS
    count = min(options.connections, allowed)
    if count < options.connections:
        sys.stdout.write(f"a process may open {allowed + _SPARE_DESCRIPTORS} descriptors: {count} connections\n")
    sys.stdout.write(
        "| mode | connections | KiB each after EHLO | after a message | lost | p95 of a new client, ms |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as name:
        _make_certificate(Path(name))
        for mode in options.modes:
            sys.stdout.write(measure(Mode(mode), count, Path(name)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
