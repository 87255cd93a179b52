"""Recipients are memory: those of open transactions count as content, those in delivery count in its window."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.config import Account, Rule, Target
from dataplane.core.envelope import (
    COMMITTING_BYTES,
    RECIPIENT_BYTES,
    Envelope,
    RecipientRow,
    message_bytes,
    recipient_bytes,
)
from dataplane.core.policy import compile_account
from dataplane.core.queue import State
from dataplane.ports import SpoolFailedError
from support.delivery import ACCOUNT, ACCOUNT_UID, CONTENT, KEY_A, A, delivery_bench
from support.ingress import Clock, Node, Peer, make_node, running, until
from support.next_hop import STALL, Behaviour, next_hop

EHLO = b"EHLO client.example\r\n"
MAIL = b"MAIL FROM:<app@example.com>\r\n"
BODY = b"From: App <app@example.com>\r\n\r\nbody\r\n.\r\n"
FOREIGN_BODY = b"From: Eve <eve@example.org>\r\n\r\nbody\r\n.\r\n"
TAKEN = b"250 2.0.0 queued as "
FULL = b"452 4.3.1 "
EACH = recipient_bytes("someone@example.net")


class GatedSpool(RamSpool):
    """Holds commits until the test ends them."""

    def __init__(self) -> None:
        super().__init__(Clock())
        self.futures: list[asyncio.Future[None]] = []

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]


async def begin(node: Node) -> Peer:
    peer = await node.greeted()
    await peer.ask(EHLO)
    assert (await peer.ask(MAIL)).startswith(b"250 ")
    return peer


async def add(peer: Peer, count: int = 1) -> list[bytes]:
    """The replies to that many recipients."""
    peer.writer.write(b"RCPT TO:<someone@example.net>\r\n" * count)
    return [await peer.line() for _ in range(count)]


def accepted(answers: Sequence[bytes]) -> int:
    return sum(answer.startswith(b"250 2.1.5") for answer in answers)


async def test_recipients_of_open_transactions_stay_within_the_budget_and_others_are_put_off() -> None:
    budget = 150 * EACH + 10
    async with running(make_node(max_content_bytes=budget)) as node:
        peers = [await begin(node) for _ in range(5)]
        answers = [await add(peer, 100) for peer in peers]
        assert [accepted(of_peer) for of_peer in answers] == [100, 50, 0, 0, 0]
        assert all(answer.startswith((b"250 ", FULL)) for of_peer in answers for answer in of_peer)
        assert node.counters.content_bytes == 150 * EACH
        # Without memory there is no DATA either, but the session goes on with what it has.
        assert (await peers[0].ask(b"DATA\r\n")).startswith(b"354 ")
        peers[1].reset()
        await until(lambda: node.counters.content_bytes <= 100 * EACH)
        assert (await peers[0].ask(BODY)).startswith(TAKEN)
        assert len(node.delivery.delivered[0][2]) == 100
        assert node.counters.content_bytes == 0
        assert accepted(await add(peers[2], 100)) == 100


async def test_a_refused_recipient_leaves_those_before_it() -> None:
    async with running(make_node(max_content_bytes=3 * EACH)) as node:
        peer, other = await begin(node), await begin(node)
        await add(other)
        answers = await add(peer, 3)
        assert accepted(answers) == 2
        assert answers[2].startswith(FULL)
        assert (await other.ask(b"RSET\r\n")).startswith(b"250 ")
        assert (await peer.ask(b"DATA\r\n")).startswith(b"354 ")
        assert (await peer.ask(BODY)).startswith(TAKEN)
        assert len(node.delivery.delivered[0][2]) == 2


@pytest.mark.parametrize("end", ["RSET", "EHLO client.example", "HELO client.example", "QUIT"])
async def test_a_transaction_that_is_given_up_gives_its_recipients_back(end: str) -> None:
    async with running(make_node()) as node:
        peer = await begin(node)
        assert accepted(await add(peer, 10)) == 10
        assert node.counters.content_bytes == 10 * EACH
        assert (await peer.ask(end.encode() + b"\r\n")).startswith(b"2")
        assert node.counters.content_bytes == 0


@pytest.mark.parametrize("data", [False, True], ids=["before DATA", "in DATA"])
async def test_a_client_that_is_lost_gives_its_recipients_back(*, data: bool) -> None:
    async with running(make_node()) as node:
        peer = await begin(node)
        await add(peer, 10)
        if data:
            assert (await peer.ask(b"DATA\r\n")).startswith(b"354 ")
            peer.writer.write(BODY[:20])
        peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
        assert node.counters.content_bytes == 0


async def test_a_message_refused_for_its_content_gives_its_recipients_back() -> None:
    async with running(make_node()) as node:
        peer = await begin(node)
        await add(peer, 10)
        assert (await peer.ask(b"DATA\r\n")).startswith(b"354 ")
        assert (await peer.ask(FOREIGN_BODY)).startswith(b"550 5.7.1")
        assert node.counters.content_bytes == 0


async def test_recipients_count_until_their_commit_is_over_though_the_client_has_left() -> None:
    spool = GatedSpool()
    async with running(make_node(spool=spool)) as node:
        peers = [await begin(node) for _ in range(2)]
        for peer in peers:
            await add(peer, 10)
            assert (await peer.ask(b"DATA\r\n")).startswith(b"354 ")
            peer.writer.write(BODY)
        await until(lambda: len(spool.futures) == 2)
        for peer in peers:
            peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
        assert node.counters.content_bytes >= 20 * (EACH + COMMITTING_BYTES)
        spool.futures[0].set_result(None)
        spool.futures[1].set_exception(SpoolFailedError("no"))
        await until(lambda: node.counters.content_bytes == 0)
        assert len(node.delivery.delivered) == 1


async def test_delivery_is_asked_for_room_for_what_it_will_count() -> None:
    async with running(make_node()) as node:
        peer = await begin(node)
        await add(peer, 10)
        assert (await peer.ask(b"DATA\r\n")).startswith(b"354 ")
        assert (await peer.ask(BODY)).startswith(TAKEN)
        _, content, rows = node.delivery.delivered[0]
        assert node.delivery.asked_bytes == [message_bytes(len(content), [row.address for row in rows])]


async def test_small_messages_with_many_recipients_fill_the_window_and_the_others_go_by_the_spool() -> None:
    addresses = [f"{number}@example.net" for number in range(100)]
    each = message_bytes(len(CONTENT), addresses)
    assert each > 100 * RECIPIENT_BYTES
    stalled = Behaviour(final=lambda _: STALL)
    async with next_hop(stalled) as hop, delivery_bench(window_bytes=10 * each) as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        bench.config.route_to(A)
        for _ in range(40):
            await bench.submit(*addresses)
        # Of a window of ten one account has eight, and one more may have been read back.
        held_count = bench.engine.counters.window_messages
        assert held_count in {8, 9}
        assert bench.engine.counters.window_bytes == bench.engine._dispatcher.held_bytes(ACCOUNT) == held_count * each
        assert not bench.engine.admit(each, KEY_A)
        await bench.engine.stop(0.0)
        assert bench.engine.counters.window_bytes == bench.engine._dispatcher.held_bytes(ACCOUNT) == 0


async def test_recipients_read_back_count_in_the_window_until_they_are_delivered() -> None:
    addresses = [f"{number}@example.net" for number in range(100)]
    each = message_bytes(len(CONTENT), addresses)
    async with next_hop() as hop, delivery_bench(window_bytes=2 * each, start=False) as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        rule = Rule(f"{ACCOUNT}/routingRules/r", 1, (Target(A),))
        bench.config.accounts[ACCOUNT] = compile_account(Account(ACCOUNT, ACCOUNT_UID, revision=7, rules=(rule,)))
        for _ in range(20):
            rows = [
                RecipientRow(index, address, State.QUEUED, 0, bench.clock.wall_ms(), 0, KEY_A)
                for index, address in enumerate(addresses)
            ]
            await bench.spool.accept(bench.envelope(), CONTENT, rows)
        peak = 0

        def delivered() -> bool:
            nonlocal peak
            peak = max(peak, bench.engine.counters.window_bytes)
            return bench.engine.counters.sent == 20 * len(addresses)

        await bench.engine.start()
        await bench.until(delivered)
        assert each <= peak <= 3 * each, "the window and the one message that was being read back"
        await bench.until(lambda: bench.engine.counters.window_bytes == 0)
        assert bench.engine._dispatcher.held_bytes(ACCOUNT) == 0


def test_a_wide_address_counts_as_what_it_takes() -> None:
    address = "\U0001f600" + "a" * 100 + "@example.net"
    assert recipient_bytes(address) == RECIPIENT_BYTES + 4 * len(address)
    assert recipient_bytes("a@example.net") == RECIPIENT_BYTES + 13
