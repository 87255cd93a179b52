"""A node whose disk is put back: what waited on the copy was sent since, and is not sent again."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import pytest

from dataplane.spool_folders import is_refused
from support.chaos.application import Message
from support.chaos.judge import check
from support.chaos.lone_node import lone_node
from support.node_process import log_events, wait_gone

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

_COUNT = 10


def _message(name: str) -> Message:
    return Message(name, (f"to-{name}@example.net",), b"body\r\n")


class _Closed:
    """A watcher of the sink that answers nothing until it is opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, stage: str) -> None:
        if stage == "EHLO":
            await self.open.wait()


async def test_what_was_sent_since_a_copy_of_the_disk_is_not_sent_again(tmp_path: Path) -> None:
    async with lone_node(tmp_path) as node:
        node.sink.watcher = closed = _Closed()
        for number in range(_COUNT):
            assert await node.submit_once(_message(f"m{number}")) == 250
        pids = list(node.process.ready["processes"].values())
        await node.process.stop(signal.SIGKILL)
        for pid in pids:
            await wait_gone(pid)
        spools, copy = node.process.data_dir / "spool", tmp_path / "copy"
        shutil.copytree(spools, copy)
        closed.open.set()
        async with node.again():
            await node.quiet()
            assert await node.process.stop() == 0
        case = check(node.case())
        assert len(case.copies) == _COUNT
        shutil.rmtree(spools)
        copy.rename(spools)
        node.plane.judging.clear()
        async with node.again():
            # It works as always, but for what it held; the control plane takes its time.
            assert await node.submit_once(_message("new")) == 250
            await node.until(lambda: len(node.books.copies) > _COUNT, "new mail is sent")
            node.plane.judging.set()
            await node.until(lambda: all(map(is_refused, spools.iterdir())), "the copy is refused")
            assert await node.submit_once(_message("refused")) == 451
            assert await node.process.stop() == 0
        assert [copy.token for copy in node.books.copies[_COUNT:]] == ["new.1"]
        assert not log_events(node.settings_file, "spool.unconfirmed")


async def test_mail_of_before_the_start_does_not_wait_for_a_control_plane_that_is_away(tmp_path: Path) -> None:
    async with lone_node(tmp_path) as node:
        node.sink.watcher = closed = _Closed()
        assert await node.submit_once(_message("m")) == 250
        pids = list(node.process.ready["processes"].values())
        await node.process.stop(signal.SIGKILL)
        for pid in pids:
            await wait_gone(pid)
        closed.open.set()
        await node.plane.stop()
        async with node.again():
            await node.until(lambda: len(node.books.copies) == 1, "it is sent")
            assert await node.process.stop() == 0
        assert len(log_events(node.settings_file, "spool.unconfirmed")) == 1
