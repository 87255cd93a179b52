"""A MAIL that is set aside is answered later, with all that came behind it, and keeps nobody from leaving."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from dataplane.ingress.turnstile import MARK, Turnstile
from support.ingress import Peer, make_node, running, until

EHLO = b"EHLO client.example\r\n"
BATCH = b"MAIL FROM:<app@example.com>\r\nRCPT TO:<someone@example.net>\r\nDATA\r\n"
BODY = b"From: App <app@example.com>\r\n\r\nbody\r\n.\r\n"


class Busy:
    """A worker that has `in_hand` messages in hand, and a loop that is never idle."""

    def __init__(self, in_hand: int = 2 * MARK, mark: int = MARK) -> None:
        self.in_hand = in_hand
        self.turnstile = Turnstile(lambda: self.in_hand, lambda: 0.0, lambda: 0.0, self, mark)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        asyncio.get_running_loop().call_soon(callback)

    def call_later(self, delay: float, callback: Callable[[], None], /) -> None:
        """Never: what sets the sessions free is what the tests say."""


async def set_aside(peer: Peer, busy: Busy, batch: bytes = BATCH) -> None:
    waiting = busy.turnstile.waiting_count
    await peer.ask(EHLO)
    peer.writer.write(batch)
    await until(lambda: busy.turnstile.waiting_count == waiting + 1)


async def test_a_message_that_leaves_lets_the_next_mail_in() -> None:
    busy = Busy()
    async with running(make_node(turnstile=busy.turnstile)) as node:
        peer = await node.greeted()
        await set_aside(peer, busy)
        busy.in_hand = MARK - 1
        busy.turnstile.one_left()
        assert [(await peer.line())[:3] for _ in range(3)] == [b"250", b"250", b"354"]
        assert (await peer.ask(BODY)).startswith(b"250 2.0.0 queued as ")


async def test_a_client_that_says_no_more_behind_its_batch_is_answered() -> None:
    busy = Busy()
    async with running(make_node(turnstile=busy.turnstile)) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        # In one write, so that it is one read: what stands behind DATA is a fault of the client, which is told so.
        peer.writer.write(BATCH + BODY)
        peer.writer.write_eof()
        await until(lambda: busy.turnstile.waiting_count == 1)
        busy.turnstile.open()
        assert (await peer.end()).endswith(b"503 5.5.1 Nothing may follow that command before its reply\r\n")


async def test_what_follows_a_mail_that_waits_is_bounded() -> None:
    busy = Busy()
    async with running(make_node(turnstile=busy.turnstile)) as node:
        peer = await node.greeted()
        await set_aside(peer, busy)
        sent_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while sent_bytes < 64 * 1024 * 1024:
                    peer.writer.write(b"NOOP\r\n" * 10_000)
                    await peer.writer.drain()
                    sent_bytes += 60_000
        assert sent_bytes < 64 * 1024 * 1024


async def test_a_client_that_left_gives_its_turn_away() -> None:
    busy = Busy()
    async with running(make_node(turnstile=busy.turnstile)) as node:
        first, second = await node.greeted(), await node.greeted()
        await set_aside(first, busy)
        await set_aside(second, busy)
        await first.close()
        # Its reading is paused: that it left shows when it is let go.
        busy.turnstile.open()
        assert (await second.line()).startswith(b"250 ")
        assert busy.turnstile.waiting_count == 0


async def test_a_drain_keeps_nobody_waiting() -> None:
    busy = Busy()
    async with running(make_node(turnstile=busy.turnstile)) as node:
        peer = await node.greeted()
        await set_aside(peer, busy)
        async with asyncio.TaskGroup() as group:
            group.create_task(node.ingress.drain(0.5))
            assert (await peer.end()).startswith((b"250 ", b"421 "))
        assert busy.turnstile.waiting_count == 0


@pytest.mark.parametrize(
    "before",
    [b"NOOP\r\n", b"RSET\r\nNOOP\r\n", b"mAIL FROM:<>\r\nRSET\r\n"],
)
async def test_no_way_of_writing_it_leads_past(before: bytes) -> None:
    busy = Busy()
    async with running(make_node(turnstile=busy.turnstile)) as node:
        peer = await node.greeted()
        await set_aside(peer, busy, before + BATCH.replace(b"MAIL", b"Mail"))
        busy.turnstile.open()
        answers = [(await peer.line())[:3] for _ in range(before.count(b"\n") + 3)]
        assert answers[-3:] == [b"250", b"250", b"354"]
        assert (await peer.ask(BODY)).startswith(b"250 2.0.0 queued as ")


async def test_a_mail_behind_a_final_dot_waits_too() -> None:
    busy = Busy(in_hand=0)
    async with running(make_node(turnstile=busy.turnstile)) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        await peer.ask(BATCH, 3)
        busy.in_hand = 2 * MARK
        peer.writer.write(BODY + BATCH)
        assert (await peer.line()).startswith(b"250 2.0.0 queued as ")
        await until(lambda: busy.turnstile.waiting_count == 1)
        busy.turnstile.open()
        assert [(await peer.line())[:3] for _ in range(3)] == [b"250", b"250", b"354"]


async def test_who_may_not_send_is_told_at_once() -> None:
    busy = Busy()
    async with running(make_node(turnstile=busy.turnstile, networks=())) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        assert (await peer.ask(b"MAIL FROM:<app@example.com>\r\n")).startswith(b"5")
        assert busy.turnstile.waiting_count == 0


async def test_hundreds_of_mails_that_are_refused_at_once_do_no_harm() -> None:
    busy = Busy()
    async with running(make_node(turnstile=busy.turnstile)) as node:
        peers = [await node.greeted() for _ in range(300)]
        for peer in peers:
            await peer.ask(EHLO)
            peer.writer.write(b"MAIL FROM:<app@elsewhere.example>\r\nRSET\r\n")
        await until(lambda: busy.turnstile.waiting_count == len(peers))
        busy.in_hand = 0
        busy.turnstile.one_left()
        for peer in peers:
            assert (await peer.line()).startswith(b"5")
            assert (await peer.line()).startswith(b"250 ")
        busy.in_hand = MARK - 1
        assert not busy.turnstile.holds("accounts/another")


@pytest.mark.parametrize(
    ("said", "replies"),
    [
        (b"RSET\r\n", [b"250"]),
        (b"EHLO again.example\r\n", [b"250"]),
        (b"RCPT TO:<someone@example.net>\r\nDATA\r\n", [b"250", b"354"]),
        (b"QUIT\r\n", [b"221"]),
        (b"", []),
    ],
)
async def test_a_transaction_counts_until_it_is_over_however_it_ends(said: bytes, replies: list[bytes]) -> None:
    busy = Busy(in_hand=1, mark=1)
    async with running(make_node(turnstile=busy.turnstile)) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        assert (await peer.ask(b"MAIL FROM:<app@example.com>\r\n")).startswith(b"250 ")
        assert busy.turnstile.holds("another")
        if said:
            peer.writer.write(said)
            assert [(await peer.line())[:3] for _ in replies] == replies
            if replies[-1] == b"354":
                assert busy.turnstile.holds("another")
                assert (await peer.ask(BODY)).startswith(b"250 2.0.0 queued as ")
        else:
            await peer.close()
        await until(lambda: not busy.turnstile.holds("another"))


async def test_a_mail_that_is_refused_does_not_count() -> None:
    busy = Busy(in_hand=1, mark=1)
    async with running(make_node(turnstile=busy.turnstile)) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        assert (await peer.ask(b"MAIL FROM:<app@elsewhere.example>\r\n")).startswith(b"5")
        assert not busy.turnstile.holds("another")
