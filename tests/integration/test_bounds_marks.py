"""The three marks of memory: kept as ids only, answered late, refused. A long queue is none of them."""

from __future__ import annotations

import asyncio

from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.queue import State
from dataplane.ingress.protocol import Timeouts
from support.ingress import Clock, Node, Peer, make_node, running, until

EHLO = b"EHLO client.example\r\n"
GROUP = b"MAIL FROM:<app@example.com>\r\nRCPT TO:<someone@example.net>\r\nDATA\r\n"
BODY = b"From: App <app@example.com>\r\nSubject: hello\r\n\r\nbody\r\n.\r\n"
TAKEN = b"250 2.0.0 queued as "
BEGUN = b"From: app@example.com\r\n\r\n" + (b"x" * 98 + b"\r\n") * 990


class StrainedSpool(RamSpool):
    """A spool whose disk lags behind as long as the test says so."""

    def __init__(self) -> None:
        super().__init__(Clock())
        self.lags = True

    @property
    def strained(self) -> bool:
        return self.lags


def strained_node(timeouts: Timeouts | None = None) -> tuple[Node, StrainedSpool]:
    spool = StrainedSpool()
    return make_node(spool=spool, timeouts=timeouts), spool


async def submit(node: Node) -> Peer:
    """Send a message as far as its final dot."""
    peer = await node.greeted()
    await peer.ask(EHLO)
    assert (await peer.ask(GROUP, 3)).startswith(b"354")
    peer.writer.write(BODY)
    return peer


async def turns(count: int = 50) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_while_the_disk_lags_the_250_waits_and_the_message_does_not() -> None:
    node, spool = strained_node()
    async with running(node):
        peer = await submit(node)
        await until(lambda: node.counters.answers_delayed == 1)
        assert len(node.delivery.delivered) == 1, "it is stored and on its way"
        assert node.counters.content_bytes == 0, "what waits is a line, not a content"
        peer.writer.write(GROUP)
        await turns()
        assert node.counters.messages_enqueued == 1
        spool.lags = False
        assert (await peer.line()).startswith(TAKEN)
        for _ in range(2):
            assert (await peer.line()).startswith(b"250 ")
        assert (await peer.line()).startswith(b"354")


async def test_content_in_memory_above_its_mark_delays_the_others() -> None:
    node = make_node(delay_bytes=50_000)
    async with running(node):
        large = await node.greeted()
        await large.ask(EHLO)
        await large.ask(GROUP, 3)
        # Small enough to stay in memory all the same.
        large.writer.write(BEGUN[:60_000])
        await until(lambda: node.counters.content_bytes > 50_000)
        peer = await submit(node)
        await until(lambda: node.counters.answers_delayed == 1)
        large.reset()
        assert (await peer.line()).startswith(TAKEN)
        assert (await peer.ask(GROUP, 3)).startswith(b"354")
        assert (await peer.ask(BODY)).startswith(TAKEN)
        assert node.counters.answers_delayed == 1


async def test_a_250_is_held_back_for_a_bounded_time() -> None:
    node, spool = strained_node(Timeouts(answer_delay_s=5.0, commit_s=30.0))
    async with running(node):
        peer = await submit(node)
        await until(lambda: node.counters.answers_delayed == 1)
        wheel = node.ingress.service.wheel
        node.clock.seconds += 4
        wheel.advance()
        await turns()
        assert not any(node.counters.enqueue_seconds.row)
        node.clock.seconds += 2
        wheel.advance()
        assert (await peer.line()).startswith(TAKEN)
        assert spool.lags
        assert not node.counters.commits_late


async def test_a_client_that_leaves_before_its_late_250_is_counted_and_forgotten() -> None:
    node, spool = strained_node()
    async with running(node):
        peer = await submit(node)
        await until(lambda: node.counters.answers_delayed == 1)
        peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
        assert node.counters.answers_lost == 1
        spool.lags = False
        other = await submit(node)
        assert (await other.line()).startswith(TAKEN)
        assert node.counters.answers_lost == 1


async def test_a_client_that_half_closed_gets_its_late_250() -> None:
    node, spool = strained_node()
    async with running(node):
        peer = await submit(node)
        peer.writer.write_eof()
        await until(lambda: node.counters.answers_delayed == 1)
        spool.lags = False
        assert (await peer.end()).startswith(TAKEN)


async def test_a_drain_holds_no_250_back() -> None:
    node, _ = strained_node()
    async with running(node):
        peer = await submit(node)
        await until(lambda: node.counters.answers_delayed == 1)
        draining = asyncio.get_running_loop().create_task(node.ingress.drain(20))
        assert (await peer.line()).startswith(TAKEN)
        assert (await peer.ask(EHLO)).startswith(b"421")
        await peer.close()
        await draining


async def test_refusals_are_never_held_back() -> None:
    node, _ = strained_node()
    async with running(node):
        peer = await node.greeted()
        await peer.ask(EHLO)
        await peer.ask(GROUP, 3)
        assert (await peer.ask(b"From: other@example.org\r\n\r\n.\r\n")).startswith(b"550 5.7.1")


async def test_a_queue_of_any_length_neither_delays_nor_refuses() -> None:
    node = make_node(max_content_bytes=1_000_000, delay_bytes=500_000)
    node.delivery.open = False
    async with running(node):
        peer = await node.greeted()
        await peer.ask(EHLO)
        for _ in range(300):
            assert (await peer.ask(GROUP, 3)).startswith(b"354")
            assert (await peer.ask(BEGUN + b".\r\n")).startswith(TAKEN)
        assert (await node.spool.stats()).database_bytes > 10 * 1_000_000
        assert len(node.delivery.waiting) == 300
        assert {row.state for _, rows in node.delivery.waiting for row in rows} == {State.QUEUED}
        assert node.counters.answers_delayed == 0
