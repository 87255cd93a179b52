"""What ingress counts of the answer to the dot: how long it took, and when it may not have been heard (window W1)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.ingress.admission import Admission
from dataplane.ingress.counters import IngressCounters
from support.ingress import Clock, Node, Peer, make_node, running, until

BODY = b"From: app@example.com\r\nSubject: Hello\r\n\r\nbody\r\n.\r\n"
OPENING = b"EHLO c\r\nMAIL FROM:<app@example.com>\r\nRCPT TO:<user@example.net>\r\nDATA\r\n"


class GatedSpool(RamSpool):
    """Holds commits until the test lets them go."""

    def __init__(self) -> None:
        super().__init__(Clock())
        self.asked = asyncio.Event()
        self.futures: list[asyncio.Future[None]] = []

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.futures.append(future)
        self.asked.set()
        return future


def answered(counters: IngressCounters) -> int:
    """How many answers to dots were timed."""
    return int(sum(counters.enqueue_seconds.row[:-1]))


async def submit(node: Node) -> tuple[Peer, GatedSpool]:
    """A message whose dot was sent and whose commit is open."""
    spool = node.spool
    assert isinstance(spool, GatedSpool)
    peer = await node.greeted()
    assert (await peer.ask(OPENING, 4)).startswith(b"354")
    peer.writer.write(BODY)
    await spool.asked.wait()
    return peer, spool


async def test_the_time_from_dot_to_250_is_counted_in_its_bucket() -> None:
    node = make_node(spool=GatedSpool())
    async with running(node):
        peer, spool = await submit(node)
        node.clock.seconds += 0.06
        spool.futures[0].set_result(None)
        assert (await peer.ask(b"")).startswith(b"250")
        assert answered(node.counters) == 1
        assert node.counters.enqueue_seconds.row[8] == 1  # above 50 ms, up to 75 ms
        assert (await peer.ask(b"QUIT\r\n")).startswith(b"221")
        assert await peer.end() == b""
    assert node.counters.answers_lost == 0


async def test_a_client_that_left_before_its_250_makes_a_window() -> None:
    node = make_node(spool=GatedSpool())
    async with running(node):
        peer, spool = await submit(node)
        peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
        spool.futures[0].set_result(None)
        await node.delivery.arrived.wait()
        await asyncio.sleep(0)
    assert (node.counters.answers_lost, answered(node.counters)) == (1, 0)


async def test_a_250_that_comes_after_a_451_makes_a_window() -> None:
    node = make_node(spool=GatedSpool())
    async with running(node):
        peer, spool = await submit(node)
        node.clock.seconds += 31
        node.ingress.service.wheel.advance()
        assert (await peer.ask(b"")).startswith(b"451")
        spool.futures[0].set_result(None)
        await node.delivery.arrived.wait()
        await until(lambda: node.counters.answers_lost == 1)
    assert answered(node.counters) == 0


@pytest.mark.parametrize("end", [Peer.reset, lambda peer: peer.writer.close()], ids=["broken", "closed"])
async def test_a_connection_that_ends_with_nothing_said_since_the_250_makes_a_window(
    end: Callable[[Peer], None],
) -> None:
    node = make_node(spool=GatedSpool())
    async with running(node):
        peer, spool = await submit(node)
        spool.futures[0].set_result(None)
        assert (await peer.ask(b"")).startswith(b"250")
        end(peer)
        await until(lambda: node.counters.sessions_active == 0)
    assert node.counters.answers_lost == 1


async def test_a_connection_that_breaks_after_the_client_went_on_makes_none() -> None:
    node = make_node(spool=GatedSpool())
    async with running(node):
        peer, spool = await submit(node)
        spool.futures[0].set_result(None)
        assert (await peer.ask(b"")).startswith(b"250")
        assert (await peer.ask(b"NOOP\r\n")).startswith(b"250")
        peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
    assert node.counters.answers_lost == 0


async def test_a_connection_that_we_end_makes_none() -> None:
    node = make_node(spool=GatedSpool())
    async with running(node):
        peer, spool = await submit(node)
        spool.futures[0].set_result(None)
        assert (await peer.ask(b"")).startswith(b"250")
        node.clock.seconds += 301
        node.ingress.service.wheel.advance()
        assert (await peer.line()).startswith(b"421")
        await peer.close()
        await until(lambda: node.counters.sessions_active == 0)
    assert node.counters.answers_lost == 0


async def test_a_refusal_after_the_dot_makes_no_window_and_is_not_timed() -> None:
    node = make_node(spool=GatedSpool())
    async with running(node):
        peer = await node.greeted()
        assert (await peer.ask(OPENING, 4)).startswith(b"354")
        assert (await peer.ask(b"From: other@example.org\r\n\r\nbody\r\n.\r\n")).startswith(b"550")
        peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
    assert (node.counters.answers_lost, answered(node.counters)) == (0, 0)
    assert node.counters.messages_refused == 1


async def test_a_connection_that_is_turned_away_leaves_a_line_with_the_reason() -> None:
    node = make_node(admission=Admission(0, 50))
    async with running(node):
        peer = await node.connect()
        assert (await peer.line()).startswith(b"421")
        await until(lambda: bool(node.log.lines))
    assert node.log.lines == [("connection.refused", {"address": "127.0.0.1", "reason": "too_many_connections"})]
    assert node.counters.connections_over_cap == 1
