"""A node whose worker is killed while it stores a message with an Idempotency-Key: sent again, it arrives once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import redis

from dataplane.core.idempotency import PENDING_MS
from postroad.node.v1.ledger_pb2 import AcceptedMessage, LedgerRecord
from support.chaos.application import Message, answers
from support.chaos.lone_node import LoneNode, lone_node

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120)]

_LARGE = (b"y" * 900 + b"\r\n") * 1_000


class Keyed(Message):
    """A message that is the same at each try."""

    def content(self, token: str) -> bytes:
        head = (
            "From: <app@example.com>\r\nTo: <someone@example.net>\r\nIdempotency-Key: order-4711\r\n"
            f"X-Token: {self.name}\r\nMessage-ID: <{self.name}@example.com>\r\n"
            "Date: Fri, 20 Nov 2026 10:00:00 +0000\r\n\r\n"
        )
        return head.encode() + self.body


class Point(NamedTuple):
    """A failpoint, and whether the message is there when it has struck."""

    name: str
    passes: int
    is_stored: bool


_POINTS = [
    Point("accept.received", 1, is_stored=False),
    Point("spool.before_commit", 2, is_stored=False),
    # The first commit of a node belongs to no message.
    Point("spool.committed", 2, is_stored=True),
    Point("accept.stored", 1, is_stored=True),
]


@pytest.mark.parametrize("body", [b"body\r\n", _LARGE], ids=["small", "large"])
@pytest.mark.parametrize("point", _POINTS, ids=[point.name for point in _POINTS])
async def test_a_message_with_a_key_arrives_once_whenever_its_worker_is_killed(
    tmp_path: Path, valkey_url: str, point: Point, body: bytes
) -> None:
    message = Keyed("once", ("to-once@example.net",), body)
    async with lone_node(tmp_path, f"{point.name}:{point.passes}", redis_url=valkey_url) as node:
        await node.has_committed()
        assert await node.submit_once(message) == 0
        assert node.spent
        await node.until(lambda: answers(node.process.smtp_port), "the node answers")
        if not point.is_stored:
            assert await node.submit_once(message) == 451
            let_the_mark_end(valkey_url)
        assert await node.submit_once(message) == 250
        assert await node.submit_once(message) == 250
        await node.quiet()
        _, copies, _, _ = node.books.snapshot()
        assert len(copies) == 1
        (accepted,) = accepted_by(node)
        assert len(accepted.submission_key_hash) == 32
        assert accepted.submission_key_checked
        assert await node.process.stop() == 0


def let_the_mark_end(url: str) -> None:
    """What five minutes do."""
    with redis.Redis.from_url(url) as client:
        (name,) = client.scan_iter("postroad:{i:*")
        assert 0 < client.pttl(name) <= PENDING_MS
        client.delete(name)


def accepted_by(node: LoneNode) -> Iterator[AcceptedMessage]:
    for records in node.plane.records.values():
        for raw in records:
            record = LedgerRecord.FromString(raw)
            if record.HasField("accepted"):
                yield record.accepted
