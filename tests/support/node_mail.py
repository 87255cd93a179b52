"""Mail through a node of processes: a configuration for it, a next hop, clients, and which worker serves whom."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import smtplib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any, NamedTuple

from aiosmtpd.smtp import SMTP

from postroad.config.v1 import bundle_pb2 as pb
from postroad.node.v1.config_stream_service_pb2 import Snapshot, StreamConfigResponse
from support.node_plane import WAIT_S, ControlPlane, Stream
from support.node_process import NodeProcess

_LISTEN = "0A"


def bundle(name: str, kind: pb.BundleKind.ValueType, content: bytes) -> pb.Bundle:
    return pb.Bundle(name=name, kind=kind, revision=1, hash=hashlib.sha256(content).digest(), content=content)


def demo_snapshot(sink_port: int, nonce: str = "n1", **settings: Any) -> StreamConfigResponse:
    """An account that this machine belongs to, whose mail goes to the sink; `settings` are the pool's."""
    account = pb.AccountBundle(
        account="accounts/demo", uid="3b1c1bb0-29f5-4d6c-8f0c-0d6d1f2a7c11", sender_domains=["example.com"]
    )
    account.retry_policy.base.seconds = 1
    account.retry_policy.factor = 1
    account.retry_policy.cap.seconds = 1
    account.retry_policy.lifetime.seconds = 432_000
    provider = account.providers.add(name="accounts/demo/providers/out")
    provider.smtp.endpoints.add(host="127.0.0.1", port=sink_port)
    provider.smtp.tls_policy = pb.SmtpProvider.TLS_POLICY_NONE
    provider.smtp.max_connections = 20
    provider.smtp.max_messages_per_connection = 100
    rule = account.rules.add(name="accounts/demo/routingRules/default", priority=1)
    rule.targets.add(provider="accounts/demo/providers/out")
    networks = pb.NetworksBundle(bindings=[pb.NetworksBundle.Binding(network="127.0.0.0/8", account="accounts/demo")])
    pool = pb.NodeSettingsBundle(max_message_bytes=26_214_400, max_recipients=1_000, node_count=1, **settings)
    bundles = [
        bundle("accounts/demo", pb.BUNDLE_KIND_ACCOUNT, account.SerializeToString()),
        bundle("pools/default/networks", pb.BUNDLE_KIND_NETWORKS, networks.SerializeToString()),
        bundle("pools/default/settings", pb.BUNDLE_KIND_NODE_SETTINGS, pool.SerializeToString()),
    ]
    return StreamConfigResponse(
        snapshot=Snapshot(nonce=nonce, complete=True, bundle_count=3, bundles=bundles, node_pool="nodePools/default")
    )


async def configure(plane: ControlPlane, sink: Sink) -> Stream:
    """Wait for the node's stream, send it the configuration, wait until it is in use."""
    stream = await plane.next_stream()
    stream.send(demo_snapshot(sink.port))
    await stream.ack("n1")
    return stream


class Sink:
    """An SMTP server that takes everything; once `open` is clear, it leaves the final dot without an answer.

    While it is `refusing` it defers everybody. While `gate` is clear nobody gets beyond RCPT, so no dot can have left.
    """

    def __init__(self) -> None:
        self.received: asyncio.Queue[bytes] = asyncio.Queue()
        self.port = 0
        self.reply = "250 taken"
        self.refusing = False
        self.open = asyncio.Event()
        self.open.set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        await self.gate.wait()
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_MAIL(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        if self.refusing:
            return "451 4.3.2 later"
        envelope.mail_from = address
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.received.put_nowait(envelope.content)
        await self.open.wait()
        return self.reply

    async def next(self) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return await self.received.get()


@contextlib.asynccontextmanager
async def listening_sink() -> AsyncIterator[Sink]:
    made = Sink()
    loop = asyncio.get_running_loop()
    transports: list[asyncio.BaseTransport] = []

    class Session(SMTP):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transports.append(transport)
            super().connection_made(transport)

    server = await loop.create_server(lambda: Session(made, loop=loop), "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    made.open.set()
    made.gate.set()
    server.close()
    # A next hop that is gone, for those as well that closed without a word.
    for transport in transports:
        transport.close()


def send_now(port: int, subject: str) -> None:
    message = EmailMessage()
    message["From"] = "app@example.com"
    message["To"] = "someone@example.net"
    message["Subject"] = subject
    message.set_content("Hello")
    with smtplib.SMTP("127.0.0.1", port, local_hostname="client.example", timeout=WAIT_S) as client:
        client.send_message(message)


async def send(node: NodeProcess, subject: str) -> None:
    await asyncio.to_thread(send_now, node.smtp_port, subject)


@dataclass
class Connection:
    """A client's connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def line(self) -> bytes:
        """The next line; empty when the other side has closed. ConnectionResetError."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.readline()

    async def ask(self, command: bytes) -> bytes:
        """Send a command, return the last line of its reply."""
        self.writer.write(command + b"\r\n")
        while (line := await self.line())[3:4] == b"-":
            pass
        return line

    @property
    def port(self) -> int:
        """Where it comes from."""
        port: int = self.writer.get_extra_info("sockname")[1]
        return port

    def close(self) -> None:
        self.writer.transport.abort()


async def submit(connection: Connection, subject: str) -> None:
    """Send a message over a connection that was greeted."""
    for command in (b"EHLO client.example", b"MAIL FROM:<app@example.com>", b"RCPT TO:<someone@example.net>"):
        assert (await connection.ask(command)).startswith(b"250 ")
    assert (await connection.ask(b"DATA")).startswith(b"354 ")
    assert (await connection.ask(f"Subject: {subject}\r\n\r\nHello\r\n.".encode())).startswith(b"250 ")


async def connect(node: NodeProcess) -> Connection:
    """A connection, whoever may serve it or when."""
    return Connection(*await asyncio.open_connection("127.0.0.1", node.smtp_port))


@contextlib.asynccontextmanager
async def connected(node: NodeProcess) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    connection = await connect(node)
    try:
        async with asyncio.timeout(WAIT_S):
            yield connection.reader, connection.writer
    finally:
        connection.close()


class _Row(NamedTuple):
    """A line of /proc/net/tcp."""

    local_port: int
    remote_port: int
    state: str
    waiting: int
    inode: int


def server_of(node: NodeProcess, connection: Connection) -> str:
    """The name of the worker that accepted the connection; empty while none has. Linux only."""
    return accepted_by(workers_of(node.ready), node.smtp_port, connection.port)


def workers_of(ready: Mapping[str, Any]) -> dict[str, int]:
    """Names and processes of the workers that a `node.ready` tells of."""
    return {name: pid for name, pid in ready["processes"].items() if name != "agent"}


def accepted_by(workers: Mapping[str, int], listening_port: int, client_port: int) -> str:
    """The name of the worker that accepted the connection from this port; empty while none has. Linux only."""
    inodes = {row.inode for row in _rows() if row.local_port == listening_port and row.remote_port == client_port}
    return next((name for name, pid in workers.items() if _sockets(pid) & inodes - {0}), "")


def waiting_for(node: NodeProcess, worker: str) -> int:
    """Connections that wait in the queue of the worker's listening socket. Linux only."""
    held = _sockets(node.ready["processes"][worker])
    return sum(row.waiting for row in _rows() if row.state == _LISTEN and row.inode in held)


def _sockets(pid: int) -> set[int]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return found


def _rows() -> list[_Row]:
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    return [_row(line.split()) for line in lines]


def _row(fields: list[str]) -> _Row:
    return _Row(
        int(fields[1].rpartition(":")[2], 16),
        int(fields[2].rpartition(":")[2], 16),
        fields[3],
        int(fields[4].rpartition(":")[2], 16),
        int(fields[9]),
    )
