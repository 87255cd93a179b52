"""The metrics of a node whose processes are killed, stopped and short of a control plane."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from support.node_mail import Sink, configure, listening_sink, send
from support.node_plane import WAIT_S, ControlPlane, Pki, control_plane
from support.node_process import NodeProcess, running, write_settings

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    async with listening_sink() as made:
        yield made


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with control_plane(Pki()) as made:
        yield made


@pytest.fixture
def settings_file(tmp_path: Path, plane: ControlPlane) -> Path:
    plane.pki.write_identity(tmp_path / "data")
    return write_settings(tmp_path, plane.address)


async def scrape(node: NodeProcess) -> dict[str, float]:
    """Values by name and labels as they stand in the text."""
    url = f"http://127.0.0.1:{node.metrics_port}/metrics"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(WAIT_S)) as http, http.get(url) as answer:
        text = await answer.text()
    return {key: float(value) for key, value in re.findall(r"^([a-z_]+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


async def until(node: NodeProcess, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    async with asyncio.timeout(WAIT_S):
        while True:
            values = await scrape(node)
            if holds(values):
                return values
            await asyncio.sleep(0.05)


async def test_sums_go_on_when_a_worker_is_killed_and_say_so(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        for number in range(3):
            await send(node, f"first-{number}")
            await sink.next()
        before = await until(node, lambda values: values['delivery_attempts_total{result="sent"}'] == 3)
        assert before['process_restarts_total{process="worker-0"}'] == 0
        former_pid = node.ready["processes"]["worker-0"]

        os.kill(former_pid, signal.SIGKILL)
        await node.wait_ready()
        await send(node, "second")
        await sink.next()

        after = await until(node, lambda values: values.get('delivery_attempts_total{result="sent"}', 0) >= 4)
        assert after["smtp_message_enqueued_total"] == 4
        assert after["smtp_enqueue_duration_seconds_count"] == 4
        assert after["queue_processing_duration_seconds_count"] == 4
        assert after['process_restarts_total{process="worker-0"}'] == 1
        assert await node.stop() == 0


async def test_a_stopped_worker_is_shown_as_it_last_was(settings_file: Path, plane: ControlPlane, sink: Sink) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        await send(node, "first")
        await sink.next()
        await until(node, lambda values: values['delivery_attempts_total{result="sent"}'] == 1)
        pid = node.ready["processes"]["worker-0"]
        os.kill(pid, signal.SIGSTOP)
        try:
            values = await scrape(node)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert values["workers_late"] == 1
        assert values["smtp_message_enqueued_total"] == 1
        assert (await until(node, lambda values: values["workers_late"] == 0))["smtp_message_enqueued_total"] == 1
        assert await node.stop() == 0


async def test_records_that_nobody_stores_grow_old(settings_file: Path, plane: ControlPlane, sink: Sink) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        await plane.stop()
        await send(node, "first")
        await sink.next()
        values = await until(node, lambda values: values["ledger_lag_seconds"] > 0.5)
        assert values["ledger_unacknowledged_records"] >= 1
        assert values['control_plane_connected_state{stream="ledger"}'] == 0
        assert await node.stop() == 0
    await plane.start(plane.port)
