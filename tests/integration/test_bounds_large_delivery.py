"""Large messages on their way out: from their file, in pieces, with the loop free in between."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from dataplane.core.client import Client, Phase, Signal
from dataplane.core.config import Rule, Target, TlsPolicy
from dataplane.core.policy import compile_account
from dataplane.core.transaction import PIECE_BYTES, Transaction, VerdictKind, frame_content
from dataplane.delivery.connection import Connection
from dataplane.delivery.deadlines import Deadlines
from support.delivery import ACCOUNT, ACCOUNT_UID, A, delivery_bench
from support.ingress import ACCOUNT as SUBMITTING
from support.ingress import make_node, running
from support.next_hop import next_hop
from support.spools import ManualClock, make_envelope, make_row, open_durable

MIB = 1024 * 1024
LINES = b"From: app@example.com\r\n\r\n" + b".leading\r\nand more of it\r\n..\r\n\r\n" * 30_000
LARGE = LINES * 27
ONE = Transaction("a@example.com", ("b@example.net",), LARGE[: 4 * PIECE_BYTES])


def begun(content: bytes = ONE.content) -> Client:
    """A client that was told to send the content."""
    client = Client("relay.test", TlsPolicy.NONE)
    client.receive(b"220 mx\r\n")
    assert client.receive(b"250-mx\r\n250 PIPELINING\r\n") is Signal.READY
    client.begin(ONE._replace(content=content))
    client.take_output()
    assert client.receive(b"250 ok\r\n250 ok\r\n354 go\r\n") is Signal.NOTHING
    return client


def pieces_of(client: Client) -> Iterator[bytes]:
    while client.content_left:
        yield client.next_piece()


def kind(client: Client) -> VerdictKind:
    assert client.outcome is not None
    return client.outcome[0].kind


def test_a_large_content_comes_in_pieces_and_a_small_one_at_once() -> None:
    client = begun()
    assert client.take_output() == []
    pieces = list(pieces_of(client))
    assert len(pieces) > 3
    assert b"".join(pieces) == b"".join(frame_content(ONE.content))
    assert client.receive(b"250 ok\r\n") is Signal.DONE
    assert client.reusable
    small = begun(b"x\r\n")
    assert not small.content_left
    assert small.take_output() == frame_content(b"x\r\n")


@pytest.mark.parametrize(
    ("reply", "verdict"), [(b"552 big\r\n", VerdictKind.PERMANENT), (b"451 no\r\n", VerdictKind.TEMPORARY)]
)
def test_a_refusal_in_the_midst_counts_and_ends_the_connection(reply: bytes, verdict: VerdictKind) -> None:
    client = begun()
    client.next_piece()
    assert client.receive(reply) is Signal.DONE
    assert kind(client) is verdict
    assert client.phase is Phase.CLOSED
    assert not client.content_left


def test_an_acceptance_before_the_dot_is_none() -> None:
    client = begun()
    client.next_piece()
    assert client.receive(b"250 ok\r\n") is Signal.DONE
    assert kind(client) is VerdictKind.TEMPORARY
    assert not client.reusable


def test_what_is_lost_before_its_last_piece_was_not_sent_and_after_it_nobody_knows() -> None:
    client = begun()
    client.next_piece()
    client.lost("gone")
    assert kind(client) is VerdictKind.INTERRUPTED
    client = begun()
    list(pieces_of(client))
    client.lost("gone")
    assert kind(client) is VerdictKind.UNCERTAIN


async def test_25_mib_go_from_their_file_to_the_next_hop_octet_by_octet(tmp_path: Path) -> None:
    clock = ManualClock()
    folder = tmp_path / str(uuid.uuid4())
    spool = await open_durable(folder, clock)
    async with next_hop() as hop, delivery_bench(spool, clock=clock, window_bytes=0) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit(content=LARGE)
        assert (await spool.stats()).waiting_count == 1
    async with next_hop() as hop, delivery_bench(spool, clock=clock) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        bench.engine.config_changed()
        await bench.events_come(1)
        assert bench.states() == ["SENT"]
        assert len(hop.messages) == 1
        assert hop.messages[0].content == LARGE
        assert bench.engine.counters.window_bytes == 0
    await spool.close()
    assert list((folder / "content").iterdir()) == []


async def test_a_content_read_back_from_its_file_was_looked_at_in_the_thread(tmp_path: Path) -> None:
    spool = await open_durable(tmp_path / str(uuid.uuid4()), ManualClock())
    for content, canonical in [(LARGE, True), (LARGE[:-2] + b"x\n", False), (b"x\r\n", False)]:
        envelope = make_envelope()
        await spool.accept(envelope, content, [make_row()])
        stored = await spool.load(envelope.message_id)
        assert stored is not None
        assert stored.canonical is canonical
    await spool.close()


class FullTransport:
    """A transport that is full after every write."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.written: list[bytes] = []
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self.size_bytes = len(data)
        self.connection.pause_writing()

    def make_room(self) -> None:
        self.size_bytes = 0
        self.connection.resume_writing()

    def get_write_buffer_size(self) -> int:
        return self.size_bytes

    def is_closing(self) -> bool:
        return True  # there is no socket to ask

    def close(self) -> None:
        return


async def test_a_next_hop_that_does_not_read_holds_one_piece_and_the_dot_stays_here() -> None:
    clock = ManualClock()
    client = Client("relay.test", TlsPolicy.NONE)
    connection = Connection(client, "mx", clock, Deadlines(clock))
    transport = FullTransport(connection)
    connection.connection_made(cast("asyncio.Transport", transport))
    connection.data_received(b"220 mx\r\n")
    transport.make_room()
    connection.data_received(b"250-mx\r\n250 PIPELINING\r\n")
    connection.send(ONE)
    transport.make_room()
    transport.written.clear()
    connection.data_received(b"250 ok\r\n250 ok\r\n354 go\r\n")
    count = 0
    while client.content_left:
        assert connection.dot_is_here
        for _ in range(5):
            await asyncio.sleep(0)
        count += 1
        assert len(transport.written) == count, "nothing more before the transport has room"
        if client.content_left:
            transport.make_room()
            assert connection.dot_is_here
    assert b"".join(transport.written) == b"".join(frame_content(ONE.content))
    transport.make_room()
    assert not connection.dot_is_here
    assert not connection.reusable


async def test_25_mib_come_in_by_smtp_and_go_out_by_smtp_octet_by_octet(tmp_path: Path) -> None:
    clock = ManualClock()
    folder = tmp_path / str(uuid.uuid4())
    spool = await open_durable(folder, clock)
    node = make_node(spool=spool)
    async with next_hop() as hop, delivery_bench(spool, clock=clock) as bench, running(node):
        bench.config.add_provider(A, hop.port)
        rules = (Rule(f"{ACCOUNT}/routingRules/r", 1, (Target(A),)),)
        account = replace(SUBMITTING, uid=ACCOUNT_UID, rules=rules)
        node.config.set_account(account)
        bench.config.accounts[ACCOUNT] = compile_account(account)
        service = node.ingress.service
        service.submission = replace(service.submission, handover=bench.engine)
        peer = await node.greeted()
        await peer.ask(b"EHLO client.example\r\n")
        await peer.ask(b"MAIL FROM:<app@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n", 3)
        peer.writer.write(LARGE.replace(b"\r\n.", b"\r\n.."))
        assert (await peer.ask(b".\r\n")).startswith(b"250 2.0.0 queued as ")
        (taken,) = await hop.took(1)
        added, begins, rest = taken.content.partition(LARGE[:100])
        assert added.startswith(b"Received: from client.example ")
        assert added.count(b"\r\n") == added.count(b"\n")
        assert begins + rest == LARGE
        await bench.until(lambda: bench.states() == ["SENT"])
        assert bench.engine.counters.window_bytes == 0
        assert node.counters.content_bytes == 0
    await spool.close()
    assert list((folder / "content").iterdir()) == []
