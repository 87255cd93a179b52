"""What accepting costs in one process: sockets, session machine, policy, headers and a spool that keeps nothing.

Run by `python -m benchmarks.ingress [--sessions 100] [--messages 20000] [--size 4096]`. Clients are a process of their
own, on kept sessions, MAIL, RCPT and DATA in one group. The figure is CPU, user and system, of the serving process for
each message, with the loop's share of everything but the spool's disk.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import resource
import socket
import time
from collections.abc import Callable, Sequence

import uvloop

from dataplane.adapters.spool_null import NullSpool
from dataplane.clock import SystemClock
from dataplane.core.config import Account, Denials, NodeSettings, Rule, SealedValue, SmtpProvider, Target
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.policy import CompiledAccount, compile_account, compile_networks
from dataplane.ingress.admission import Admission
from dataplane.ingress.counters import IngressCounters
from dataplane.ingress.idempotency import Submissions
from dataplane.ingress.listeners import Ingress, Mode
from dataplane.ingress.protocol import Timeouts
from dataplane.ingress.submission import Submission
from dataplane.ports import Grant, Slot, Take

_LINE = b"The quick brown fox jumps over the lazy dog, and the dog lets it.\r\n"
_HEADER = b"From: App <app@example.com>\r\nTo: x@example.net\r\nSubject: load\r\n\r\n"
_ACCOUNT = Account(
    name="accounts/demo",
    uid="demo",
    revision=1,
    sender_domains=("example.com",),
    rules=(Rule("accounts/demo/routingRules/default", 1, (Target("providers/inbox"),)),),
)


class _Config:
    """One account, bound to loopback."""

    def __init__(self) -> None:
        self.settings = NodeSettings(account_messages_per_hour=0)
        self.denials = Denials()
        self.loaded = True
        self.stale = False
        self._account = compile_account(_ACCOUNT)
        self._networks = compile_networks([("127.0.0.0/8", _ACCOUNT.name)])

    def account(self, name: str) -> CompiledAccount | None:
        return self._account if name == _ACCOUNT.name else None

    def account_of_network(self, address: str) -> str | None:
        return self._networks.lookup(address)

    def provider(self, name: str) -> SmtpProvider | None:
        return None

    def unseal(self, value: SealedValue, account: str, resource: str, field: str) -> bytes:
        raise KeyError(value.key_id)


class _Nobody:
    """Limits, delivery and log that do nothing."""

    def ask(self, takes: Sequence[Take]) -> asyncio.Future[Grant]:
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        answer.set_result(Grant(allowed=True, wait_s=0.0, refused_key="", local=False))
        return answer

    async def take(self, takes: Sequence[Take]) -> Grant:
        return await self.ask(takes)

    def refund(self, takes: Sequence[Take]) -> None:
        return

    async def hold(self, slots: Sequence[Slot]) -> Grant:
        return Grant(allowed=True, wait_s=0.0, refused_key="", local=False)

    def release(self, slots: Sequence[Slot]) -> None:
        return

    async def close(self) -> None:
        return

    def next_hop(self, account: str, targets: Sequence[Target]) -> str:
        return targets[0].provider

    def admit(self, held_bytes: int, queue_key: str) -> bool:
        return True

    def deliver(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> None:
        return

    def queued(self, envelope: Envelope, recipients: Sequence[RecipientRow]) -> None:
        return

    def wake(self, queue_key: str) -> None:
        return

    def info(self, event: str, **fields: object) -> None:
        return

    def warning(self, event: str, **fields: object) -> None:
        return


class _Client(asyncio.Protocol):
    """Sends its share and notes when it is done."""

    def __init__(self, messages: int, content: bytes, done: asyncio.Future[None]) -> None:
        self._left = messages
        self._content = content
        self._done = done
        self._wanted = [b"220 ", b"250 HELP"]
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's own classes

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        if data.startswith(b"354 ") or b"\r\n354 " in data:
            self._transport.write(self._content)
        elif data.startswith(b"220 "):
            self._transport.write(b"EHLO bench\r\n")
        elif data.startswith(b"250") and self._left:
            self._left -= 1
            self._transport.write(b"MAIL FROM:<app@example.com>\r\nRCPT TO:<x@example.net>\r\nDATA\r\n")
        elif data.startswith(b"250"):
            self._transport.write(b"QUIT\r\n")
        else:
            assert data.startswith(b"221"), data
            self._transport.close()
            self._done.set_result(None)


async def _load(port: int, sessions: int, messages: int, size_bytes: int) -> None:
    loop = asyncio.get_running_loop()
    content = _HEADER + _LINE * max(1, (size_bytes - len(_HEADER)) // len(_LINE)) + b".\r\n"
    waits = []
    for _ in range(sessions):
        done: asyncio.Future[None] = loop.create_future()
        share = messages // sessions
        await loop.create_connection(lambda done=done, share=share: _Client(share, content, done), "127.0.0.1", port)  # type: ignore[misc]  # defaults bind
        waits.append(done)
    await asyncio.gather(*waits)


def _run_load(port: int, sessions: int, messages: int, size_bytes: int) -> None:
    uvloop.run(_load(port, sessions, messages, size_bytes))


async def _until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not reached():  # noqa: ASYNC110 - a hundredth of a second is nothing beside the run
            await asyncio.sleep(0.01)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def quiet_submission() -> Submission:
    """Return a submission of one account, bound to loopback, behind which nothing is asked, kept or told."""
    nobody, spool, counters = _Nobody(), NullSpool(), IngressCounters()
    return Submission(
        config=_Config(),
        spool=spool,
        limiter=nobody,
        handover=nobody,
        clock=SystemClock(),
        log=nobody,
        admission=Admission(100_000, 100_000),
        counters=counters,
        hostname="bench",
        random=os.urandom,
        max_content_bytes=1 << 28,
        keyed=Submissions(spool, None, counters, nobody),
    )


async def _serve(sessions: int, messages: int, size_bytes: int) -> None:
    submission = quiet_submission()
    counters = submission.counters
    ingress = Ingress(submission, None, Timeouts())
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    port = bound.getsockname()[1]
    ingress.start([(bound, Mode.PLAIN)])
    load = multiprocessing.get_context("spawn").Process(target=_run_load, args=(port, sessions, messages, size_bytes))
    load.start()
    await _until(lambda: counters.messages_enqueued > 0)
    cpu, wall, before = _cpu_s(), time.monotonic(), counters.messages_enqueued
    await _until(lambda: counters.sessions_active == 0)
    cpu, wall = _cpu_s() - cpu, time.monotonic() - wall
    load.join()
    done = counters.messages_enqueued - before
    await ingress.drain(1)
    print(f"{cpu / done * 1e6:.1f} us of CPU a message, {done / wall:.0f} messages/s, {done} messages of {size_bytes}")


def main() -> None:
    """Print the figure."""
    parser = argparse.ArgumentParser(description="cost of accepting mail")
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=4_096, help="octets of a message")
    arguments = parser.parse_args()
    uvloop.run(_serve(arguments.sessions, arguments.messages, arguments.size))


if __name__ == "__main__":
    main()
