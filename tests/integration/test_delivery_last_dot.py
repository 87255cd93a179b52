"""The final dot of a message that a slow next hop has not taken: after a suspension is in force it does not leave.

Nor does it after a lease, not even of a process that stood still meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from dataplane.core.client import BLOCK_TIMEOUT_S, Phase
from dataplane.core.config import Denials, TlsPolicy
from dataplane.core.queue import State
from dataplane.core.transaction import DOT_APART_BYTES
from dataplane.delivery.connection import Connection
from dataplane.link import DenialsApplied, DenialsChanged, Message
from dataplane.worker_side import WorkerParts, WorkerSide
from support.delivery import ACCOUNT, A, Bench, delivery_bench
from support.narrow_path import NarrowPath, narrow_path
from support.next_hop import STALL, Behaviour, NextHop, next_hop
from support.relay_pki import RelayPki

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what it has not sent")

LINE = b"x" * 78 + b"\r\n"
SMALL, LARGE = (b"Subject: x\r\n\r\n" + LINE * (size // len(LINE)) for size in (DOT_APART_BYTES - 100, 100_000))
TLS = pytest.mark.parametrize("tls", ["clear", "starttls", "implicit"])


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> RelayPki:
    return RelayPki(tmp_path_factory.mktemp("pki"))


class Slow(NamedTuple):
    """A next hop that stops reading behind the envelope, and who sends to it."""

    bench: Bench
    hop: NextHop
    path: NarrowPath

    @property
    def connection(self) -> Connection:
        (pool,) = self.bench.engine.pools
        (connection,) = pool._jobs
        return connection

    @property
    def connection_count(self) -> int:
        return sum(len(pool._jobs) for pool in self.bench.engine.pools)

    async def stands_still(self, content: bytes, **changes: Any) -> None:
        """Submit, and return when the content has begun and the rest of it cannot go."""
        await self.bench.submit(content=content, envelope=self.bench.envelope(content, **changes))
        await self.bench.until(lambda: "DATA" in self.hop.commands)
        await self.bench.until(lambda: self.connection._client.phase is Phase.CONTENT)
        # As much as the path and the kernel take, and a look at what they have not.
        await self.bench.until(lambda: self.connection._dot_waits or not self.connection._client.content_left)
        assert self.connection._unsent() > 0

    async def reads_on(self) -> None:
        """Let the next hop read all that comes."""
        self.path.open()
        async with asyncio.timeout(10):
            await self.path.ended.wait()


@asynccontextmanager
async def slow(pki: RelayPki, tls: str, holds: Callable[[int], bool] | None = None) -> AsyncIterator[Slow]:
    context = pki.server()
    behaviour = Behaviour(tls=context if tls == "starttls" else None)
    async with (
        next_hop(behaviour, implicit_tls=context if tls == "implicit" else None) as hop,
        narrow_path(hop.port) as path,
        delivery_bench(holds=holds) as bench,
    ):

        def recipient(_: str) -> bytes:
            path.shut()
            return b"250 2.1.5 ok\r\n"

        behaviour.recipient = recipient
        policy = TlsPolicy.NONE if tls == "clear" else TlsPolicy.REQUIRED
        bench.config.add_provider(A, path.port, tls_policy=policy, implicit_tls=tls == "implicit")
        bench.config.route_to(A)
        yield Slow(bench, hop, path)


def suspend(bench: Bench) -> None:
    """A worker confirms the suspension in the turn of the loop after this."""
    bench.config.denials = Denials(1, accounts={ACCOUNT: 0})
    bench.engine.denials_changed()


@TLS
async def test_after_a_suspension_the_dot_of_a_slow_next_hop_stays_here_and_it_was_no_attempt(
    pki: RelayPki, tls: str
) -> None:
    async with slow(pki, tls) as one:
        await one.stands_still(LARGE)
        suspend(one.bench)
        await one.reads_on()
        await one.bench.until(lambda: one.bench.engine.counters.put_back == 1)
        assert (one.hop.messages, one.bench.events) == ([], [])


@TLS
async def test_a_dot_that_only_the_kernel_has_does_not_leave_either_and_is_uncertain(pki: RelayPki, tls: str) -> None:
    """Between the look and the end of the connection it may have left, and nobody would know."""
    async with slow(pki, tls) as one:
        await one.stands_still(SMALL)
        assert one.connection._held() == 0
        suspend(one.bench)
        assert one.connection_count == 0
        await one.reads_on()
        (event,) = await one.bench.events_come(1)
        assert (event.type.name, event.reply_text) == ("UNCERTAIN", "stopped by a denial")
        assert (one.hop.messages, one.bench.states()) == ([], ["DEFERRED"])
        assert one.path.forwarded_count < len(SMALL)


class Agent:
    """What the agent hears of a worker's denials, and whether a descriptor was open when it did."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.heard = asyncio.Event()
        self.was_open = True

    def send(self, message: Message) -> None:
        assert isinstance(message, DenialsApplied)
        try:
            os.fstat(self._descriptor)
        except OSError:
            self.was_open = False
        self.heard.set()


@TLS
async def test_a_worker_confirms_a_suspension_when_what_it_cut_is_closed(pki: RelayPki, tls: str) -> None:
    async with slow(pki, tls) as one:
        await one.stands_still(SMALL)
        wire = one.connection._wire
        assert wire is not None
        agent: Any = Agent(wire.get_extra_info("socket").fileno())
        view: Any = one.bench.config
        view.load_denials = lambda: setattr(view, "denials", Denials(1, accounts={ACCOUNT: 0}))
        nobody: Any = None
        side = WorkerSide(
            WorkerParts(
                *(0, view, {}, {}, nobody, {"spool": one.bench.engine}, {}, nobody, nobody, nobody, nobody, nobody),
                *(nobody, nobody, one.bench.log),
            )
        )
        giver: Any = SimpleNamespace()
        side.attach(agent, nobody, nobody, giver, nobody)
        following = asyncio.create_task(side._follow_denials())
        side.received(DenialsChanged(1))
        async with asyncio.timeout(10):
            await agent.heard.wait()
        following.cancel()
        assert not agent.was_open


@TLS
async def test_a_dot_that_has_left_is_not_cut(pki: RelayPki, tls: str) -> None:
    async with slow(pki, tls) as one:
        one.hop.behaviour.recipient = lambda _: b"250 2.1.5 ok\r\n"
        one.hop.behaviour.final = lambda _: STALL
        await one.bench.submit(content=LARGE, envelope=one.bench.envelope(LARGE))
        await one.hop.stalled.wait()
        suspend(one.bench)
        assert one.bench.engine.held()["transactions"] == 1


@TLS
@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
async def test_what_a_slow_next_hop_takes_in_the_end_arrives_whole(pki: RelayPki, tls: str, content: bytes) -> None:
    async with slow(pki, tls) as one:
        await one.stands_still(content)
        one.path.open()
        (taken,) = await one.hop.took(1)
        assert taken.content == content
        await one.bench.events_come(1)
        assert one.bench.types() == ["SENT"]


@TLS
@pytest.mark.parametrize(("content", "state"), [(SMALL, State.DEFERRED), (LARGE, State.QUEUED)], ids=["small", "large"])
async def test_after_the_end_of_a_lease_the_dot_stays_here(
    pki: RelayPki, tls: str, content: bytes, state: State
) -> None:
    live = True
    async with slow(pki, tls, lambda _: live) as one:
        await one.stands_still(content, epoch=7)
        live = False
        one.bench.engine.lease_ended()
        await one.reads_on()
        await one.bench.until(lambda: len(one.bench.updates) == 1)
        assert (one.hop.messages, [update.state for update in one.bench.updates]) == ([], [state])


@TLS
async def test_a_lease_that_ended_while_the_process_stood_still_lets_no_dot_leave(pki: RelayPki, tls: str) -> None:
    """The kernel goes on with what it has; nobody tells the engine that the lease is over."""
    live = True
    async with slow(pki, tls, lambda _: live) as one:
        await one.stands_still(LARGE, epoch=7)
        live = False
        await one.reads_on()
        await one.bench.until(lambda: len(one.bench.updates) == 1)
        assert (one.hop.messages, [update.state for update in one.bench.updates]) == ([], [State.QUEUED])
        assert one.path.forwarded_count > len(LARGE)


async def test_a_next_hop_that_takes_nothing_any_more_is_given_up_and_the_dot_was_here(pki: RelayPki) -> None:
    async with slow(pki, "clear") as one:
        await one.stands_still(LARGE)
        for _ in range(2):
            # What was on its way when it stood still has been taken at the first look.
            one.bench.clock.advance(BLOCK_TIMEOUT_S + 1)
            one.bench.engine._deadlines.sweep()
        (event,) = await one.bench.events_come(1)
        assert (event.type.name, event.reply_text) == ("INTERRUPTED", "timeout in CONTENT")
        await one.reads_on()
        assert one.hop.messages == []


async def test_a_next_hop_that_moves_is_not_given_up(pki: RelayPki) -> None:
    async with slow(pki, "clear") as one:
        await one.stands_still(LARGE)
        one.connection._unsent_bytes += 1
        one.bench.clock.advance(BLOCK_TIMEOUT_S + 1)
        one.bench.engine._deadlines.sweep()
        one.path.open()
        await one.bench.events_come(1)
        assert one.bench.types() == ["SENT"]


@TLS
async def test_a_next_hop_that_says_no_more_gets_nothing_more_either(pki: RelayPki, tls: str) -> None:
    """The connection is over before the suspension, and would leave its kernel the dot."""
    async with slow(pki, tls) as one:
        await one.stands_still(SMALL)
        one.path.say_no_more()
        (event,) = await one.bench.events_come(1)
        assert (event.type.name, event.reply_text, one.connection_count) == ("UNCERTAIN", "connection lost", 0)
        suspend(one.bench)
        await one.reads_on()
        assert (one.hop.messages, one.path.forwarded_count < len(SMALL)) == ([], True)


@pytest.mark.parametrize("reply", ["421 4.3.2 going down", "451 4.3.0 not now"])
async def test_what_is_refused_before_it_was_sent_is_not_sent_afterwards(pki: RelayPki, reply: str) -> None:
    async with slow(pki, "clear") as one:
        await one.stands_still(SMALL)
        one.path.say(f"{reply}\r\n".encode())
        (event,) = await one.bench.events_come(1)
        assert (event.type.name, event.reply_text, one.connection_count) == ("DEFERRED", reply[4:], 0)
        await one.reads_on()
        assert (one.hop.messages, one.path.forwarded_count < len(SMALL)) == ([], True)


@TLS
async def test_an_end_in_order_is_no_reset(pki: RelayPki, tls: str) -> None:
    async with slow(pki, tls) as one:
        await one.stands_still(SMALL)
        connection = one.connection
        one.path.open()
        await one.bench.events_come(1)
        connection.leave()
        await one.path.ended.wait()
        assert not one.path.was_reset


async def test_a_port_for_tls_from_the_first_byte_that_speaks_in_clear_gets_nothing(pki: RelayPki) -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, tls_policy=TlsPolicy.REQUIRED, implicit_tls=True)
        bench.config.route_to(A)
        await bench.submit()
        (event,) = await bench.events_come(1)
        assert (event.type.name, event.reply_text.startswith("TLS: ")) == ("DEFERRED", True)
        assert not any(command.startswith(("EHLO", "MAIL")) for command in hop.commands)
