"""Many clients with large contents do not make one turn of the loop long: they are read a few at a time, in order."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from dataplane.ingress.protocol import SmtpProtocol
from dataplane.ingress.reading_turns import LARGE_READ_BYTES, READERS, ReadingTurns
from support.ingress import Peer, make_node, running, until

SENDERS = 24
BODY = b"From: App <app@example.com>\r\nSubject: large\r\n\r\n" + (b"x" * 998 + b"\r\n") * 3_000
GROUP = b"MAIL FROM:<app@example.com>\r\nRCPT TO:<someone@example.net>\r\nDATA\r\n"


class Turns:
    """Numbers the turns of the loop, and counts the large reads in each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: Counter[int] = Counter()
        self.now = 0
        self._task = asyncio.get_running_loop().create_task(self._count())
        received = SmtpProtocol.data_received

        def noted(protocol: SmtpProtocol, data: bytes) -> None:
            if len(data) >= LARGE_READ_BYTES:
                self.reads[self.now] += 1
            received(protocol, data)

        monkeypatch.setattr(SmtpProtocol, "data_received", noted)

    async def _count(self) -> None:
        while True:
            self.now += 1
            await asyncio.sleep(0)

    def end(self) -> list[int]:
        self._task.cancel()
        return list(self.reads.values())


async def test_large_reads_are_a_few_a_turn_once_they_are_seen_to_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(make_node()) as node:
        # A transport asks for the protocol's method once, when it begins.
        turns = Turns(monkeypatch)
        peers = [await node.greeted() for _ in range(SENDERS)]
        for peer in peers:
            await peer.ask(b"EHLO client.example\r\n")
            assert (await peer.ask(GROUP, 3)).endswith(b"\r\n")
        answers = await asyncio.gather(*(peer.ask(BODY + b".\r\n") for peer in peers))
        assert all(answer.startswith(b"250 2.0.0 queued as ") for answer in answers)
        reads = turns.end()
        assert sum(reads) >= SENDERS * 4
        # A large read that follows a small one comes when it comes, the others take turns.
        assert len(reads) >= sum(reads) / (2 * READERS)


async def test_who_rests_reads_on_in_the_order_in_which_they_came() -> None:
    went: list[int] = []

    class Session:
        def __init__(self, number: int) -> None:
            self.number = number

        def read_on(self) -> None:
            went.append(self.number)

    turns = ReadingTurns()
    for number in range(2 * READERS + 1):
        turns.rest(Session(number))
    assert went == []
    await asyncio.sleep(0)
    assert went == list(range(READERS))
    await until(lambda: len(went) == 2 * READERS + 1)
    assert went == list(range(2 * READERS + 1))


async def test_a_client_that_leaves_while_it_rests_takes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[SmtpProtocol] = []
    monkeypatch.setattr(ReadingTurns, "rest", lambda _, session: held.append(session))
    async with running(make_node()) as node:
        peer: Peer = await node.greeted()
        await peer.ask(b"EHLO client.example\r\n")
        await peer.ask(GROUP, 3)
        peer.writer.write(BODY)
        await until(lambda: bool(held))
        # It is not read while it rests: that it left shows behind what it has sent.
        session = held[0]
        peer.writer.transport.abort()

        def everybody_left() -> bool:
            while held:
                held.pop().read_on()
            return node.counters.sessions_active == 0

        await until(everybody_left)
        session.read_on()
        assert node.counters.content_bytes == 0
