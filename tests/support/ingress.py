"""A worker's ingress on loopback sockets, with a spool in memory and everything around it in the test's hands."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.config import Account, Credential, Denials, NodeSettings, Rule, SealedValue, SmtpProvider, Target
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.policy import CompiledAccount, NetworkTable, compile_account, compile_networks
from dataplane.ingress.admission import Admission
from dataplane.ingress.counters import IngressCounters
from dataplane.ingress.idempotency import Submissions
from dataplane.ingress.listeners import Ingress, Mode
from dataplane.ingress.protocol import Timeouts
from dataplane.ingress.submission import DELAY_BYTES, SPILL_BYTES, Submission
from dataplane.ingress.tls import TlsHolder
from dataplane.ingress.turnstile import Turnstile
from dataplane.ports import Claims, Grant, ReplicatedQueue, Slot, Spool, Take

HOSTNAME = "relay.example"
SECRET = "prs_a-secret-that-is-in-no-log"
ACCOUNT = Account(
    name="accounts/demo",
    uid="uid-demo",
    revision=7,
    sender_domains=("example.com",),
    credentials={
        "accounts/demo/smtpCredentials/app": Credential(
            "accounts/demo/smtpCredentials/app", hashlib.sha256(SECRET.encode()).digest()
        )
    },
    rules=(
        Rule("accounts/demo/routingRules/net", 1, (Target("providers/inbox"),), recipient_patterns=("@example.net",)),
        Rule(
            "accounts/demo/routingRules/large",
            2,
            (Target("providers/large"),),
            recipient_patterns=("@example.org",),
            min_size_bytes=10_000,
        ),
    ),
)


@dataclass
class Clock:
    """A clock that stands until the test moves it."""

    seconds: float = 1_000.0

    def wall_ms(self) -> int:
        return 1_760_000_000_000 + int(self.seconds * 1000)

    def monotonic(self) -> float:
        return self.seconds


@dataclass
class Config:
    """A `ConfigView` of plain attributes."""

    settings: NodeSettings = field(default_factory=lambda: NodeSettings(address_connections_per_minute=0))
    denials: Denials = field(default_factory=Denials)
    loaded: bool = True
    stale: bool = False
    accounts: dict[str, CompiledAccount] = field(default_factory=dict)
    networks: NetworkTable = field(default_factory=lambda: compile_networks([]))
    providers: dict[str, SmtpProvider] = field(default_factory=dict)

    def set_account(self, account: Account) -> None:
        self.accounts[account.name] = compile_account(account)

    def account(self, name: str) -> CompiledAccount | None:
        return self.accounts.get(name)

    def account_of_network(self, address: str) -> str | None:
        return self.networks.lookup(address)

    def provider(self, name: str) -> SmtpProvider | None:
        return self.providers.get(name)

    def unseal(self, value: SealedValue, account: str, resource: str, field: str) -> bytes:
        raise KeyError(value.key_id)


ALLOWED = Grant(allowed=True, wait_s=0.0, refused_key="", local=False)


@dataclass
class Limits:
    """A limiter that answers what the test says and notes what it was asked."""

    grant: Grant = ALLOWED
    takes: list[tuple[Take, ...]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    refunds: list[tuple[Take, ...]] = field(default_factory=list)

    def ask(self, takes: Sequence[Take]) -> asyncio.Future[Grant]:
        if self.gate is not None:
            return asyncio.ensure_future(self.take(takes))
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self.takes.append(tuple(takes))
        self.asked.set()
        answer.set_result(self.grant)
        return answer

    async def take(self, takes: Sequence[Take]) -> Grant:
        self.takes.append(tuple(takes))
        self.asked.set()
        if self.gate is not None:
            await self.gate.wait()
        return self.grant

    def refund(self, takes: Sequence[Take]) -> None:
        self.refunds.append(tuple(takes))

    async def hold(self, slots: Sequence[Slot]) -> Grant:
        return self.grant

    def release(self, slots: Sequence[Slot]) -> None:
        return

    async def close(self) -> None:
        return


@dataclass
class Delivery:
    """A `Handover` that notes what it is given."""

    open: bool = True
    dead: frozenset[str] = frozenset()
    asked_bytes: list[int] = field(default_factory=list)
    delivered: list[tuple[Envelope, bytes, list[RecipientRow]]] = field(default_factory=list)
    waiting: list[tuple[Envelope, list[RecipientRow]]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def next_hop(self, account: str, targets: Sequence[Target]) -> str:
        return next((target.provider for target in targets if target.provider not in self.dead), targets[0].provider)

    def admit(self, held_bytes: int, queue_key: str) -> bool:
        self.asked_bytes.append(held_bytes)
        return self.open

    def deliver(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> None:
        self.delivered.append((envelope, content, list(recipients)))
        self.arrived.set()

    def queued(self, envelope: Envelope, recipients: Sequence[RecipientRow]) -> None:
        self.waiting.append((envelope, list(recipients)))
        self.arrived.set()

    def wake(self, queue_key: str) -> None:
        return


@dataclass
class Log:
    """Keeps the lines."""

    lines: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def info(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))

    warning = info

    def events(self) -> list[str]:
        return [event for event, _ in self.lines]


@dataclass
class Node:
    """An ingress and all that stands around it."""

    ingress: Ingress
    config: Config
    spool: Spool
    limiter: Limits
    delivery: Delivery
    clock: Clock
    log: Log
    admission: Admission
    counters: IngressCounters
    ports: dict[Mode, int] = field(default_factory=dict)
    peers: list[Peer] = field(default_factory=list)

    async def connect(self, mode: Mode = Mode.PLAIN, **options: Any) -> Peer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[mode], **options)
        peer = Peer(reader, writer)
        self.peers.append(peer)
        return peer

    async def greeted(self, mode: Mode = Mode.PLAIN, **options: Any) -> Peer:
        peer = await self.connect(mode, **options)
        assert (await peer.line()).startswith(b"220 ")
        return peer


async def until(reached: Callable[[], bool]) -> None:
    """Let the loop turn until something has come about; bounded."""
    async with asyncio.timeout(20):
        while not reached():  # noqa: ASYNC110 - plain numbers of the code under test: nothing signals them
            await asyncio.sleep(0)


@dataclass
class Peer:
    """A client that types lines."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def line(self) -> bytes:
        async with asyncio.timeout(10):
            return await self.reader.readline()

    async def ask(self, data: bytes, replies: int = 1) -> bytes:
        """Send octets and return the last of so many replies, all their lines."""
        self.writer.write(data)
        answer = b""
        for _ in range(replies):
            answer = await self._reply()
        return answer

    async def _reply(self) -> bytes:
        answer = b""
        while True:
            line = await self.line()
            answer += line
            if line[3:4] != b"-":
                return answer

    async def end(self) -> bytes:
        """What comes until the other side closes."""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                return await self.reader.read()
            return b""

    def reset(self) -> None:
        """End the connection by RST: nothing can be sent to this client any more."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


def make_node(
    *,
    tls: TlsHolder | None = None,
    spool: Spool | None = None,
    networks: Sequence[str] = ("127.0.0.0/8",),
    admission: Admission | None = None,
    max_content_bytes: int = 268_435_456,
    spill_bytes: int = SPILL_BYTES,
    delay_bytes: int = DELAY_BYTES,
    timeouts: Timeouts | None = None,
    turnstile: Turnstile | None = None,
    claims: Claims | None = None,
    config: Config | None = None,
    replicated: ReplicatedQueue | None = None,
    halted: bool = False,
) -> Node:
    """Everything but sockets; clients of `networks` may send for the account without AUTH."""
    clock, config, counters = Clock(), config or Config(), IngressCounters()
    config.set_account(ACCOUNT)
    config.networks = compile_networks([(network, ACCOUNT.name) for network in networks])
    limiter, delivery, log = Limits(), Delivery(), Log()
    admission = admission or Admission(10_000, 50)
    spool = spool or RamSpool(clock)
    submission = Submission(
        config=config,
        spool=spool,
        limiter=limiter,
        handover=delivery,
        clock=clock,
        log=log,
        admission=admission,
        counters=counters,
        hostname=HOSTNAME,
        random=os.urandom,
        max_content_bytes=max_content_bytes,
        spill_bytes=spill_bytes,
        keyed=Submissions(spool, claims, counters, log),
        turnstile=turnstile,
        delay_bytes=delay_bytes,
        replicated=replicated,
        halted=halted,
    )
    ingress = Ingress(submission, tls, timeouts or Timeouts())
    return Node(ingress, config, spool, limiter, delivery, clock, log, admission, counters)


@contextlib.asynccontextmanager
async def running(node: Node, *modes: Mode) -> AsyncIterator[Node]:
    """Serve on ports of the kernel's choice."""
    listeners = []
    for mode in modes or (Mode.PLAIN,):
        bound = socket.socket()
        bound.bind(("127.0.0.1", 0))
        node.ports[mode] = bound.getsockname()[1]
        listeners.append((bound, mode))
    node.ingress.start(listeners)
    try:
        yield node
    finally:
        for peer in node.peers:
            await peer.close()
        await node.ingress.drain(0.2)


def with_settings(node: Node, **changes: Any) -> None:
    node.config.settings = replace(node.config.settings, **changes)
