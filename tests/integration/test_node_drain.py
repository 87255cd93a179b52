"""The end of a node: within its time, with a line on what is held, and nothing lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from support.node_mail import Sink, configure, connect, listening_sink, send
from support.node_plane import ControlPlane, Pki, control_plane
from support.node_process import log_events, running, write_settings

pytestmark = pytest.mark.timeout(180)

DRAIN_S = 30.0


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    async with listening_sink() as made:
        yield made


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with control_plane(Pki()) as made:
        yield made


async def test_a_drain_that_is_held_up_says_by_what_and_ends_in_time_with_nothing_lost(
    tmp_path: Path, plane: ControlPlane, sink: Sink
) -> None:
    plane.pki.write_identity(tmp_path / "data")
    settings_file = write_settings(tmp_path, plane.address, workers=2)
    async with running(settings_file) as node:
        await configure(plane, sink)
        # A next hop that never answers the final dot, and a client that stays within its content.
        sink.open.clear()
        await send(node, "held")
        assert b"Subject: held" in await sink.next()
        client = await connect(node)
        assert (await client.line()).startswith(b"220 ")
        for command in (b"EHLO c", b"MAIL FROM:<app@example.com>", b"RCPT TO:<x@example.net>"):
            assert (await client.ask(command)).startswith(b"250 ")
        assert (await client.ask(b"DATA")).startswith(b"354 ")
        client.writer.write(b"Subject: half\r\n")
        began = time.monotonic()
        node.process.send_signal(signal.SIGTERM)
        await node.wait_said("node.draining")
        async with asyncio.timeout(DRAIN_S + 10):
            code = await node.process.wait()
        assert code == 0
        assert time.monotonic() - began < DRAIN_S
        # The half of a message was not answered 250: it ended with a 421.
        assert (await client.line()).startswith(b"421 ")
        client.close()
    told = log_events(settings_file, "drain.waiting")
    assert sum(line.get("transactions", 0) for line in told) == 1
    assert not log_events(settings_file, "ledger.unreadable")
    (waited,) = log_events(settings_file, "node.waiting")
    assert waited["processes"]
    sink.open.set()
    async with running(settings_file) as node:
        assert b"Subject: held" in await sink.next()
        assert await node.stop() == 0


async def readyz(port: int) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/readyz") as response:
        return response.status, await response.text()


async def test_a_node_that_drains_is_not_ready_and_a_second_signal_does_not_wait_for_deliveries(
    tmp_path: Path, plane: ControlPlane, sink: Sink
) -> None:
    plane.pki.write_identity(tmp_path / "data")
    settings_file = write_settings(tmp_path, plane.address, drain_timeout_s=600)
    async with running(settings_file) as node:
        await configure(plane, sink)
        sink.open.clear()
        await send(node, "held")
        assert b"Subject: held" in await sink.next()
        assert (await readyz(node.metrics_port))[0] == 200
        node.process.send_signal(signal.SIGTERM)
        await node.wait_said("node.draining")
        async with asyncio.timeout(DRAIN_S):
            status, text = await readyz(node.metrics_port)
            while status == 200:
                status, text = await readyz(node.metrics_port)
        assert "the node drains" in text
        node.process.send_signal(signal.SIGTERM)
        assert await node.ended() == 0
    # What was cut says nothing of the next hop.
    assert not log_events(settings_file, "delivery.throttled")
    sink.open.set()
    async with running(settings_file) as node:
        assert b"Subject: held" in await sink.next()
        assert await node.stop() == 0
