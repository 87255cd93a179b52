"""Child processes of the local stack, for real: readiness, order, orphans, and what a failure says."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from postroad.localstack import LocalStackError
from postroad.localstack.child import Child
from postroad.localstack.layout import Layout
from postroad.localstack.ports import free_port


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    opened = Layout(tmp_path / ".postroad").open()
    yield opened
    opened.close()


async def _connects(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def _inbox(layout: Layout, port: int) -> Child:
    async def ready() -> bool:
        return child.has_said("inbox.ready")

    arguments = ["-m", "postroad.inbox", "--dir", str(layout / "inbox"), "--port", str(port)]
    child = Child("The inbox", "inbox", arguments, layout, ready=ready, stop_steps=[(signal.SIGTERM, 20.0)])
    return child


@pytest.fixture
async def inbox(layout: Layout) -> AsyncIterator[Child]:
    child = _inbox(layout, free_port())
    await child.start()
    yield child
    await child.stop()


def _exists(pid: int) -> bool:
    # A zombie has ended, too; who reaps it is not our business.
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_child_runs_until_it_is_stopped_and_leaves_nothing(layout: Layout) -> None:
    port = free_port()
    child = _inbox(layout, port)
    await child.start()
    pid = child.pid
    assert pid is not None
    assert await _connects(port)
    assert (layout / "run" / "inbox.pid").read_text(encoding="ascii") == str(pid)
    await child.stop()
    assert not child.is_running
    assert not _exists(pid)
    assert not (layout / "run" / "inbox.pid").exists()


async def test_a_child_that_cannot_start_says_why(layout: Layout) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        child = _inbox(layout, port)
        with pytest.raises(LocalStackError, match=f"cannot listen on 127.0.0.1:{port}"):
            await child.start()
    assert not child.is_running


async def test_a_child_that_is_never_ready_is_killed_and_named(layout: Layout) -> None:
    async def never() -> bool:
        return False

    arguments = ["-m", "postroad.inbox", "--dir", str(layout / "inbox"), "--port", "0"]
    child = Child("The inbox", "inbox", arguments, layout, ready=never, stop_steps=(), start_timeout_s=0.2)
    with pytest.raises(LocalStackError, match="was not ready"):
        await child.start()
    assert not child.is_running


async def test_ended_returns_when_the_child_is_killed(inbox: Child) -> None:
    assert inbox.pid is not None
    os.kill(inbox.pid, signal.SIGKILL)
    assert await asyncio.wait_for(inbox.ended(), 20) == -signal.SIGKILL


async def test_a_child_does_not_get_the_ctrl_c_of_our_terminal(inbox: Child) -> None:
    assert inbox.pid is not None
    assert os.getsid(inbox.pid) == inbox.pid


async def test_an_orphan_is_ended_by_the_next_start_of_the_same_folder(layout: Layout, inbox: Child) -> None:
    old = inbox.pid
    assert old is not None
    another = _inbox(layout, free_port())
    await another.start()
    try:
        assert not _exists(old)
        assert another.is_running
    finally:
        await another.stop()


def test_a_stranger_under_an_old_pid_is_left_alone(layout: Layout) -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as stranger:
        (layout / "run" / "inbox.pid").write_text(str(stranger.pid), encoding="ascii")
        asyncio.run(_inbox(layout, 1).end_orphan())
        assert stranger.poll() is None
        assert not (layout / "run" / "inbox.pid").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next start ends it")
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = """
import asyncio, signal, sys
from pathlib import Path
from postroad.localstack.child import Child
from postroad.localstack.layout import Layout

async def run():
    layout = Layout(Path(sys.argv[1])).open()
    async def ready():
        return child.has_said("inbox.ready")
    arguments = ["-m", "postroad.inbox", "--dir", str(layout / "inbox"), "--port", "0"]
    child = Child("The inbox", "inbox", arguments, layout, ready=ready, stop_steps=[(signal.SIGTERM, 5.0)])
    await child.start()
    print(child.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(run())
"""
    command = [sys.executable, "-c", program, str(tmp_path / ".postroad")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _exists(pid)
        parent.kill()
    asyncio.run(_gone(pid))


async def _gone(pid: int) -> None:
    async with asyncio.timeout(20):
        while _exists(pid):  # noqa: ASYNC110 - a grandchild: nobody tells
            await asyncio.sleep(0.02)


def test_a_folder_has_one_owner_at_a_time(layout: Layout) -> None:
    with pytest.raises(LocalStackError, match="runs already"):
        Layout(layout.root).open()


def test_notes_outlive_the_folder_being_closed(tmp_path: Path) -> None:
    first = Layout(tmp_path / "stack").open()
    first.keep_note("schema", "x")
    first.close()
    second = Layout(tmp_path / "stack").open()
    assert (second.note("schema"), second.note("other")) == ("x", None)
    second.close()


def test_damaged_notes_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{")
    with pytest.raises(LocalStackError, match=r"notes\.json is damaged"):
        Layout(tmp_path).open()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalStackError, match="cannot be used"):
        Layout(tmp_path / "file" / "stack").open()


def test_a_folder_that_lies_too_deep_for_the_spool_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(LocalStackError, match="the path of the folder") as refused:
        Layout(tmp_path.joinpath(*["deep" * 20] * 5) / ".postroad").open()
    assert "--dir" in refused.value.advice
    assert not list(tmp_path.iterdir())
