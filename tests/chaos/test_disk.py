"""A running node on a disk that is full, fails to sync, or forgets at a power cut what was not synced."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from support.chaos.application import Message, draw_message
from support.chaos.disk import fail_next_fsync, full_disk
from support.chaos.lone_node import lone_node

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

_CLIENTS = 4


def message(name: str) -> Message:
    return Message(name, (f"to-{name}@example.net",), b"body\r\n")


@pytest.mark.parametrize("told", [True, False])
async def test_a_full_disk_is_452_and_passes_with_what_was_accepted_before_it(tmp_path: Path, told: bool) -> None:  # noqa: FBT001 - a table
    async with lone_node(tmp_path) as node:
        node.sink.watcher = hold = _Hold()
        assert await node.submit_once(message("before")) == 250
        with full_disk(node.disk, told=told):
            # Free space is asked for twenty times a second at most.
            await asyncio.sleep(0.1)
            hold.gate.set()
            codes = [await node.submit_once(message(f"full-{number}")) for number in range(5)]
            assert set(codes) == {452}
            assert [entry.dot_left for entry in node.books.tries[1:]] == [not told] * 5
        assert (await node.submit(message("after")))[-1] == 250
        await node.judged()
        assert {copy.token for copy in node.books.copies} >= {"before.1"}


async def test_a_failed_fsync_is_no_250_and_the_worker_that_comes_after_serves(tmp_path: Path) -> None:
    async with lone_node(tmp_path) as node:
        assert await node.submit_once(message("before")) == 250
        await node.quiet()
        worker = node.process.ready["processes"]["worker-0"]
        failing = asyncio.create_task(asyncio.to_thread(fail_next_fsync, node.disk))
        await node.until((node.disk / "fsync").exists, "the next fsync is to fail")
        code = await node.submit_once(message("failed"))
        assert await failing
        assert code in {0, 451}, "the commit that failed is told, or the worker was gone before it could"
        assert (await node.submit(message("after")))[-1] == 250
        await node.until(lambda: node.process.ready["processes"]["worker-0"] != worker, "another worker serves")
        await node.judged()


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(2, 9))])
async def test_what_was_answered_outlives_power_cuts(tmp_path: Path, seed: int) -> None:
    """SIGKILL alone would prove nothing: it leaves the system's cache. Here what was not synced is gone with it."""
    chooser = random.Random(seed)
    async with lone_node(tmp_path, loses=True) as node:

        async def client(name: str) -> None:
            for number in range(25):
                await node.submit(draw_message(f"{name}.{number}", chooser))

        clients = [asyncio.create_task(client(f"c{number}")) for number in range(_CLIENTS)]
        stuck = ""
        try:
            for _ in range(3):
                wanted = node.books.acknowledged() + chooser.randrange(5, 25)
                await node.until(lambda wanted=wanted: node.books.acknowledged() >= wanted, "mail flows")  # type: ignore[misc]  # bound
                node.kill_worker()
            await asyncio.gather(*clients)
        except AssertionError as error:
            # A spool that has lost what it had told is refused, and takes no more. What it has lost is worse.
            stuck = str(error)
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        await node.judged()
        assert not stuck, stuck


class _Hold:
    """A watcher of the sink that keeps the first delivery back until the test lets it go."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def __call__(self, stage: str) -> None:
        if stage == "dot":
            await self.gate.wait()
