"""Large contents on their way: memory is bounded, what is stored is what was sent, what ends early leaves nothing."""

from __future__ import annotations

import asyncio
import hashlib
import random
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dataplane.adapters.spool_ram import RamIncoming, RamSpool
from dataplane.adapters.spool_sqlite import SpoolLimits, SqliteSpool
from dataplane.core.envelope import recipient_bytes
from dataplane.core.ids import MessageId
from dataplane.ingress.submission import SPILL_BYTES
from dataplane.ports import SpoolFullError
from support.ingress import Clock, Node, Peer, make_node, running, until
from support.spools import open_durable

EHLO = b"EHLO client.example\r\n"
TAKEN = b"250 2.0.0 queued as "
HEADER = b"From: App <app@example.com>\r\nSubject: large\r\n\r\n"
MIB = 1024 * 1024
# What one turn of the loop may bring: uvloop's and asyncio's reads are no larger.
READ_BYTES = 256 * 1024


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / str(uuid.uuid4())


@pytest.fixture
async def spool(folder: Path) -> AsyncIterator[SqliteSpool]:
    opened = await open_durable(folder, Clock())
    yield opened
    await opened.close()


def contents(folder: Path) -> list[str]:
    return [path.name for path in (folder / "content").iterdir()]


def make_body(size_bytes: int, seed: int = 1) -> bytes:
    """Lines of any length, many with leading dots, one in a hundred 8-bit."""
    choice = random.Random(seed)
    lines = [b"", b".", b"..", b".leading", b"\xc3\xa4" * 40, *(b"x" * choice.randrange(998) for _ in range(200))]
    body = bytearray(HEADER)
    while len(body) < size_bytes - 1_000:
        body += choice.choice(lines) + b"\r\n"
    body += b"y" * (size_bytes - len(body) - 2) + b"\r\n" if size_bytes - len(body) > 2 else b""
    return bytes(body)


def stuffed(body: bytes) -> bytes:
    return body.replace(b"\r\n.", b"\r\n..")


async def open_data(peer: Peer, declared_bytes: int = 0) -> bytes:
    await peer.ask(EHLO)
    size = b" SIZE=%d" % declared_bytes if declared_bytes else b""
    group = b"MAIL FROM:<app@example.com>%s\r\nRCPT TO:<someone@example.net>\r\nDATA\r\n" % size
    return await peer.ask(group, 3)


async def send(peer: Peer, octets: bytes, seed: int = 1) -> None:
    """Write in pieces of any size, waiting where the server does not read."""
    choice, position = random.Random(seed), 0
    while position < len(octets):
        end = position + choice.choice([1, 2, 3, 1_000, 65_536, 300_000])
        peer.writer.write(octets[position:end])
        await peer.writer.drain()
        position = end


class Watched:
    """The greatest number of octets in memory that a node counts."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._task = asyncio.get_running_loop().create_task(self._watch())
        self.most_bytes = 0

    async def _watch(self) -> None:
        while True:
            self.most_bytes = max(self.most_bytes, self._node.counters.content_bytes)
            await asyncio.sleep(0)

    def end(self) -> int:
        self._task.cancel()
        return self.most_bytes


async def test_25_mib_are_stored_octet_by_octet_and_never_in_memory_at_once(spool: SqliteSpool, folder: Path) -> None:
    async with running(make_node(spool=spool)) as node:
        peer = await node.greeted()
        body = make_body(25 * MIB)
        await open_data(peer, len(body))
        watched = Watched(node)
        await send(peer, stuffed(body))
        answer = await peer.ask(b".\r\n")
        assert answer.startswith(TAKEN)
        assert SPILL_BYTES < watched.end() <= SPILL_BYTES + 2 * READ_BYTES
        assert node.counters.content_bytes == 0
        envelope, rows = node.delivery.waiting[0]
        assert [(row.state.name, row.attempt) for row in rows] == [("QUEUED", 0)]
        stored = await spool.load(envelope.message_id)
        assert stored is not None
        added, separator, rest = stored.content.partition(HEADER)
        assert hashlib.sha256(separator + rest).digest() == hashlib.sha256(body).digest()
        assert added.startswith(b"Received: from client.example ([127.0.0.1])\r\n")
        assert envelope.size_bytes == len(stored.content)
        assert envelope.body_8bit
        assert contents(folder) == [envelope.message_id.hex()]
        assert answer.decode().split()[-1] in added.decode()
        assert (await peer.ask(b"NOOP\r\n")).startswith(b"250")


async def test_a_client_that_leaves_in_the_midst_leaves_no_file(spool: SqliteSpool, folder: Path) -> None:
    async with running(make_node(spool=spool)) as node:
        peer = await node.greeted()
        await open_data(peer)
        await send(peer, stuffed(make_body(2 * MIB)))
        await until(lambda: contents(folder) != [])
        peer.reset()
        await until(lambda: contents(folder) == [] and not node.counters.sessions_active)
        assert node.counters.content_bytes == 0
        assert (await spool.stats()).waiting_count == 0


@pytest.mark.parametrize(
    ("ending", "answer"),
    [
        (b"x" * 2_000 + b"\r\n.\r\n", b"550 5.6.0 Message has a line above"),
        (b"a\0b\r\n.\r\n", b"550 5.6.0 Message has NUL"),
        (b"a\nb\r\n.\r\n", b"550 5.6.0 Message has CR or LF"),
    ],
    ids=["a long line", "NUL", "a bare LF"],
)
async def test_a_fault_at_the_end_of_a_large_content_leaves_no_file(
    spool: SqliteSpool, folder: Path, ending: bytes, answer: bytes
) -> None:
    async with running(make_node(spool=spool)) as node:
        peer = await node.greeted()
        await open_data(peer)
        await send(peer, stuffed(make_body(2 * MIB)))
        assert (await peer.ask(ending)).startswith(answer)
        await until(lambda: contents(folder) == [])
        assert node.counters.content_bytes == 0
        assert not node.counters.messages_enqueued


async def test_a_content_above_the_limit_is_552_and_leaves_no_file(spool: SqliteSpool, folder: Path) -> None:
    async with running(make_node(spool=spool)) as node:
        peer = await node.greeted()
        await open_data(peer)
        limit = node.config.settings.max_message_bytes
        await send(peer, stuffed(make_body(limit + 1_000)))
        assert (await peer.ask(b".\r\n")).startswith(b"552 5.3.4")
        await until(lambda: contents(folder) == [])
        assert (await peer.ask(b"NOOP\r\n")).startswith(b"250")


@pytest.mark.parametrize(
    ("header", "answer"),
    [
        (b"From: other@example.org\r\n\r\n", b"550 5.7.1 From names a domain"),
        (b"From: app@example.com\r\nno field\r\n\r\n", b"550 5.6.0 The header"),
        (b"From: app@example.com\r\n" + b"X: y\r\n" * 60_000, b"552 5.3.4 The header is larger"),
    ],
    ids=["another's From", "a line that is no field", "a header that does not end"],
)
async def test_a_bad_header_is_found_in_the_beginning_and_told_at_the_end(
    spool: SqliteSpool, folder: Path, header: bytes, answer: bytes
) -> None:
    async with running(make_node(spool=spool)) as node:
        peer = await node.greeted()
        await open_data(peer)
        watched = Watched(node)
        await send(peer, header + b"x\r\n" * (MIB // 3) + b"y\r\n" * (3 * MIB // 3))
        assert contents(folder) == []
        assert (await peer.ask(b".\r\n")).startswith(answer)
        assert watched.end() <= SPILL_BYTES + READ_BYTES
        assert node.counters.messages_refused == 1
        assert (await open_data(peer)).startswith(b"354")


async def test_a_disk_that_fills_up_meanwhile_is_452_and_the_session_goes_on(folder: Path) -> None:
    clock = Clock()
    free = 100 * MIB
    spool = await open_durable(folder, clock, limits=SpoolLimits(floor_bytes=50 * MIB), ask_free_bytes=lambda: free)
    async with running(make_node(spool=spool)) as node:
        peer = await node.greeted()
        await open_data(peer)
        await send(peer, stuffed(make_body(2 * MIB)))
        await until(lambda: contents(folder) != [])
        free = 49 * MIB
        clock.seconds += 1
        await send(peer, stuffed(make_body(2 * MIB)))
        assert (await peer.ask(b".\r\n")).startswith(b"452 4.3.1")
        await until(lambda: contents(folder) == [])
        assert (await open_data(peer)).startswith(b"452 4.3.1")
        free = 100 * MIB
        clock.seconds += 1
        assert (await peer.ask(b"RSET\r\n")).startswith(b"250")
        assert (await open_data(peer)).startswith(b"354")
    await spool.close()


class SlowIncoming(RamIncoming):
    """Pieces that stay in memory until the test lets them go."""

    def write(self, *pieces: bytes) -> asyncio.Future[None]:
        super().write(*pieces)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        assert isinstance(self._spool, SlowSpool)
        self._spool.writes.append((sum(map(len, pieces)), future))
        return future


class SlowSpool(RamSpool):
    """A spool with a disk that stands still."""

    def __init__(self) -> None:
        super().__init__(Clock())
        self.writes: list[tuple[int, asyncio.Future[None]]] = []

    def receive(self, message_id: MessageId) -> SlowIncoming:
        return SlowIncoming(self, message_id)

    async def go_on(self) -> None:
        """Let every piece go, one a turn, until cancelled."""
        position = 0
        while True:
            if position < len(self.writes):
                self.writes[position][1].set_result(None)
                position += 1
            await asyncio.sleep(0)


async def test_a_slow_disk_stops_the_reading_not_the_worker() -> None:
    spool = SlowSpool()
    async with running(make_node(spool=spool)) as node:
        slow, other = await node.greeted(), await node.greeted()
        await open_data(slow)
        body = make_body(20 * MIB)
        sending = asyncio.get_running_loop().create_task(send(slow, stuffed(body)))
        await until(lambda: len(spool.writes) == 1)
        for _ in range(200):
            assert (await other.ask(b"NOOP\r\n")).startswith(b"250")
        assert len(spool.writes) == 1, "one piece at a time"
        assert node.counters.content_bytes <= SPILL_BYTES + 2 * READ_BYTES
        assert not sending.done()
        disk = asyncio.get_running_loop().create_task(spool.go_on())
        await sending
        assert (await slow.ask(b".\r\n")).startswith(TAKEN)
        disk.cancel()
        assert max(size_bytes for size_bytes, _ in spool.writes) <= SPILL_BYTES + 2 * READ_BYTES
        stored = await spool.load(node.delivery.waiting[0][0].message_id)
        assert stored is not None
        assert stored.content.endswith(body)


async def test_octets_on_their_way_to_the_disk_count_after_their_client_has_left() -> None:
    spool = SlowSpool()
    async with running(make_node(spool=spool, max_content_bytes=MIB)) as node:
        peer = await node.greeted()
        await open_data(peer)
        peer.writer.write(stuffed(make_body(SPILL_BYTES + 100_000)))
        await until(lambda: len(spool.writes) == 1)
        # Nobody reads, so nobody would hear of a client's reset: the deadline of DATA ends such a session.
        (session,) = node.ingress.service._sessions
        session.abort()
        await until(lambda: not node.counters.sessions_active)
        assert node.counters.content_bytes > SPILL_BYTES
        again = await node.greeted()
        assert (await open_data(again, 10 * MIB)).startswith(b"452 4.3.1")
        spool.writes[0][1].set_result(None)
        await until(lambda: node.counters.content_bytes == recipient_bytes("someone@example.net"))
        assert (await again.ask(b"DATA\r\n")).startswith(b"354")


async def test_a_write_that_fails_is_told_at_the_end_of_the_content() -> None:
    spool = SlowSpool()
    async with running(make_node(spool=spool)) as node:
        peer = await node.greeted()
        await open_data(peer)
        peer.writer.write(stuffed(make_body(SPILL_BYTES + 100_000)))
        await until(lambda: len(spool.writes) == 1)
        spool.writes[0][1].set_exception(SpoolFullError("full"))
        assert (await peer.ask(b".\r\n")).startswith(b"452 4.3.1")
        assert node.counters.content_bytes == 0
        assert (await peer.ask(b"NOOP\r\n")).startswith(b"250")


async def test_where_memory_is_short_contents_go_to_their_files_earlier(spool: SqliteSpool, folder: Path) -> None:
    body = stuffed(make_body(300_000)) + b".\r\n"
    assert len(body) < SPILL_BYTES
    async with running(make_node(spool=spool, delay_bytes=MIB, max_content_bytes=32 * MIB)) as node:
        watched = Watched(node)
        peers = [await node.greeted() for _ in range(60)]
        for peer in peers:
            assert (await open_data(peer)).startswith(b"354")
        # All but the end of them would be 18 MB.
        await asyncio.gather(*(send(peer, body[:-3]) for peer in peers))
        await until(lambda: len(contents(folder)) > 40)
        await until(lambda: node.counters.content_bytes < 9 * MIB)
        for peer in peers:
            assert (await peer.ask(body[-3:])).startswith(TAKEN)
        assert watched.end() <= 32 * MIB
        assert node.counters.content_bytes == 0
        for envelope, _ in node.delivery.waiting:
            stored = await spool.load(envelope.message_id)
            assert stored is not None
            assert stored.content.endswith(make_body(300_000))


async def test_a_header_that_is_not_complete_yet_keeps_its_content_in_memory(spool: SqliteSpool, folder: Path) -> None:
    header = b"From: app@example.com\r\n" + b"X-Filling: " + b"y" * 900 + b"\r\n"
    async with running(make_node(spool=spool, delay_bytes=1)) as node:
        peer = await node.greeted()
        await open_data(peer)
        peer.writer.write(header + b"X-Filling: y\r\n" * 900 * 10)
        await until(lambda: node.counters.content_bytes > 120_000)
        assert contents(folder) == []
        peer.writer.write(b"\r\n" + b"body\r\n" * 100_000)
        assert (await peer.ask(b".\r\n")).startswith(b"552 5.3.4 The header has more")


async def test_many_large_submissions_into_a_small_budget_are_taken_or_452_and_memory_stays_within_it(
    spool: SqliteSpool, folder: Path
) -> None:
    budget = 4 * MIB
    body = stuffed(make_body(MIB)) + b".\r\n"
    async with running(make_node(spool=spool, max_content_bytes=budget)) as node:
        watched = Watched(node)

        async def submit() -> bytes:
            peer = await node.greeted()
            opened = await open_data(peer, len(body))
            if not opened.startswith(b"354"):
                return opened
            await send(peer, body)
            return await peer.line()

        answers = await asyncio.gather(*(submit() for _ in range(50)))
        taken = [answer for answer in answers if answer.startswith(TAKEN)]
        refused = [answer for answer in answers if answer.startswith(b"452 4.3.1")]
        assert len(taken) + len(refused) == 50
        assert taken
        assert refused, "fifty at once are too many for this budget"
        # Each session finds out by what it has just read.
        assert watched.end() <= budget + READ_BYTES
        assert node.counters.content_bytes == 0
        assert len(contents(folder)) == len(taken) == node.counters.messages_enqueued
        assert (await submit()).startswith(TAKEN), "it recovers by itself"
