"""A provider that is down: however much mail waits for it, delivery keeps no more of it in memory."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import uuid
from collections.abc import Sized
from pathlib import Path

import pytest

from dataplane.core.envelope import message_bytes
from support.delivery import A, Bench, delivery_bench
from support.next_hop import STALL, Behaviour, next_hop
from support.spools import ManualClock, open_durable

BATCH = 100
FIRST, MORE, ROUNDS = 5_000, 15_000, 3
CONTENT = b"Subject: hello\r\n\r\n" + b"x" * 2_000 + b"\r\n"
HELD_BYTES = message_bytes(len(CONTENT), ("b@example.net",))
WINDOW_BYTES = 100 * HELD_BYTES


def closed_port() -> int:
    """A port that refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


def contained(root: object) -> int:
    """Elements of all containers that belong to an object of the data plane, without what they refer to outside."""
    seen: set[int] = set()
    total, todo = 0, [root]
    while todo:
        found = todo.pop()
        if id(found) in seen or isinstance(found, type | str | bytes):
            continue
        seen.add(id(found))
        if isinstance(found, dict | list | set | tuple) or type(found).__name__ == "deque":
            assert isinstance(found, Sized)
            total += len(found)
            todo += gc.get_referents(found)
        elif type(found).__module__.startswith("dataplane."):
            todo += gc.get_referents(found)
    return total


async def settled(bench: Bench) -> None:
    """Let records leave and settlements be committed; an instant passes by the engine's clock."""
    bench.clock.advance(0.4)
    await bench.until(lambda: bench.engine.held()["settlements"] == 0, "settlements end")
    for _ in range(20):
        await asyncio.sleep(0)
    await bench.spool.acknowledge((await bench.spool.stats()).outbox_last)


async def submit(bench: Bench, count: int) -> None:
    for _ in range(count // BATCH):
        await asyncio.gather(*(bench.submit(content=CONTENT) for _ in range(BATCH)))
        await settled(bench)
        bench.records.clear()
        bench.log.lines.clear()


async def grown(bench: Bench) -> tuple[int, int, int]:
    """Bytes of the window, elements of the engine's containers, and blocks of Python's allocator."""
    async with asyncio.timeout(20):
        while await bench.spool.unreported(1):
            await settled(bench)
    bench.records.clear()
    bench.log.lines.clear()
    gc.collect()
    return bench.engine.counters.window_bytes, contained(bench.engine), sys.getallocatedblocks()


async def check_flat(bench: Bench) -> None:
    """Submit many and many more: memory must be the same, content within the window."""
    await submit(bench, FIRST)
    measured = [await grown(bench)]
    grew: list[tuple[int, int]] = []
    # What the process of the tests does beside them grows once; what a message leaves, with each round.
    while len(grew) < ROUNDS and not any(max(one) < MORE / 10 for one in grew):
        await submit(bench, MORE)
        measured.append(await grown(bench))
        former, last = measured[-2:]
        grew.append((last[1] - former[1], last[2] - former[2]))
    stats = await bench.spool.stats()
    assert stats.waiting_count == FIRST + len(grew) * MORE
    assert stats.quarantined_count == 0
    assert max(window_bytes for window_bytes, _, _ in measured) <= WINDOW_BYTES + HELD_BYTES
    # A tenth of an element or a block for each message would show.
    assert any(max(one) < MORE / 10 for one in grew), grew
    assert bench.engine.counters.sent == 0


@pytest.mark.timeout(240)
async def test_mail_for_a_dead_provider_waits_on_disk_and_leaves_memory_flat(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = await open_durable(tmp_path / str(uuid.uuid4()), clock)
    async with delivery_bench(spool, clock=clock, window_bytes=WINDOW_BYTES) as bench:
        bench.config.add_provider(A, closed_port())
        bench.config.route_to(A)
        await check_flat(bench)
        assert bench.engine.counters.window_bytes == 0
    await spool.close()


@pytest.mark.timeout(240)
async def test_mail_for_a_provider_that_never_answers_fills_the_window_and_no_more(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = await open_durable(tmp_path / str(uuid.uuid4()), clock)
    async with (
        next_hop(Behaviour(final=lambda _: STALL)) as hop,
        delivery_bench(spool, clock=clock, window_bytes=WINDOW_BYTES) as bench,
    ):
        bench.config.add_provider(A, hop.port, max_connections=5)
        bench.config.route_to(A)
        await check_flat(bench)
        assert bench.engine.counters.window_bytes >= HELD_BYTES
    await spool.close()
