"""Content that goes to the spool while it arrives: however its octets are cut, what is stored is what was sent."""

from __future__ import annotations

import asyncio
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.adapters.spool_ram import RamSpool
from support.ingress import Clock, Node, make_node, until
from support.octets import LINES, OPENING, open_session

HEADER = b"From: app@example.com\r\nSubject: large\r\n\r\n"
# Below it nothing is spilled, and it holds the header of these messages.
SPILL_BYTES = 100


async def store(lines: list[bytes], places: list[int], spill_bytes: int) -> tuple[bytes, Node]:
    """Send a message in pieces; return what was stored, without the fields that were added."""
    node = make_node(spool=RamSpool(Clock()), spill_bytes=spill_bytes)
    session, transport = open_session(node)
    session.data_received(OPENING)
    await until(lambda: b"354 " in transport.said)
    body = HEADER + b"".join(line + b"\r\n" for line in lines)
    stuffed = body.replace(b"\r\n.", b"\r\n..") + b".\r\n"
    marks = sorted({place % len(stuffed) for place in places} | {0, len(stuffed)})
    for start, end in itertools.pairwise(marks):
        await until(lambda: not transport.paused)
        session.data_received(stuffed[start:end])
    await until(lambda: b"queued as" in transport.said)
    envelope = node.delivery.waiting[0][0] if node.delivery.waiting else node.delivery.delivered[0][0]
    stored = await node.spool.load(envelope.message_id)
    assert stored is not None
    assert len(stored.content) == stored.envelope.size_bytes
    assert stored.envelope.body_8bit is not body.isascii()
    assert stored.envelope.subject == "large"
    added, separator, rest = stored.content.partition(HEADER)
    assert added.startswith(b"Received: from c ")
    assert added.count(b"\r\nDate: ") == added.count(b"\r\nMessage-ID: ") == 1
    assert node.counters.content_bytes == 0
    session.connection_lost(None)
    return separator + rest, node


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, max_size=40), st.lists(st.integers(0, 20_000), max_size=12))
def test_any_splitting_stores_the_same_octets(lines: list[bytes], places: list[int]) -> None:
    body = HEADER + b"".join(line + b"\r\n" for line in lines)
    content, _ = asyncio.run(store(lines, places, SPILL_BYTES))
    assert content == body


@settings(max_examples=20, deadline=None)
@given(st.lists(LINES, min_size=20, max_size=40))
def test_octet_by_octet_stores_the_same_octets(lines: list[bytes]) -> None:
    body = HEADER + b"".join(line + b"\r\n" for line in lines)
    content, node = asyncio.run(store(lines, list(range(20_000)), SPILL_BYTES))
    assert content == body
    assert bool(node.delivery.waiting) is (len(body) > SPILL_BYTES + 2)
