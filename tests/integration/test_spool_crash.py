"""SIGKILL at named points and at random ones: what was answered is there, nothing is there by half."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

import support.spool_child as child
from dataplane.adapters.spool_sqlite import SqliteSpool
from dataplane.core.ids import MessageId
from dataplane.failpoints import VARIABLE
from support.spools import ManualClock, make_envelope, make_row, open_durable

ROOT = Path(__file__).parents[2]
# Messages of a sender that is killed long before its last one.
ENDLESS = 100_000
POINTS = ["spool.before_commit", "spool.after_commit", "spool.content_stored", "spool.content_appended"]


def start(
    folder: Path, seed: int, failpoints: str, count: int = ENDLESS, way: str = "mixed"
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        VARIABLE: failpoints,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "clients" / "python")]),
    }
    command = [sys.executable, child.__file__, str(folder), str(seed), str(count), way]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


def said(output: bytes) -> tuple[set[bytes], set[bytes]]:
    """Ids that were said to be accepted and settled, in whole lines."""
    accepted: set[bytes] = set()
    settled: set[bytes] = set()
    for line in output.decode().splitlines():
        verb, _, text = line.partition(" ")
        if verb != "finished":
            (accepted if verb == "accepted" else settled).add(bytes.fromhex(text))
    return accepted, settled


async def check(spool: SqliteSpool, accepted: set[bytes], settled: set[bytes]) -> None:
    first, records = await spool.records(0, 100_000, 1 << 30)
    assert first == 1
    assert (await spool.stats()).outbox_last == len(records)
    recorded = {record[:16] for record in records}
    assert [record for record in records if record != child.record_of(record[:16])] == []
    assert len(recorded) == len(records)
    assert settled <= recorded
    present = set(await spool.unreported(100_000))
    assert present == set(await spool.interrupted())
    assert present.isdisjoint(recorded), "a message is there or recorded, never both"
    assert accepted <= present | recorded, "what was answered is there"
    for message_id in present:
        stored = await spool.load(MessageId(message_id))
        assert stored is not None
        assert stored.content == child.content_of(message_id)
        assert list(stored.recipients) == child.rows_of(message_id)
    waiting_count = sum(len(child.rows_of(message_id)) for message_id in present)
    assert (await spool.stats()).waiting_count == waiting_count
    assert spool.salvage is None


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("seed", [1, 2])
async def test_sigkill_at_a_failpoint_loses_nothing_that_was_answered(tmp_path: Path, point: str, seed: int) -> None:
    folder = tmp_path / str(uuid.uuid4())
    passes = random.Random(f"{point} {seed}").randrange(3, 20)
    process = start(folder, seed, f"{point}:{passes}")
    output, _ = process.communicate(timeout=50)
    assert process.returncode == -signal.SIGKILL
    accepted, settled = said(output)
    spool = await open_durable(folder, ManualClock())
    assert spool.identity.incarnation == 2
    await check(spool, accepted, settled)
    await spool.close()


@pytest.mark.parametrize("way", ["accept", "take"])
async def test_a_claim_or_hand_over_that_a_kill_cut_behind_its_file_comes_again(tmp_path: Path, way: str) -> None:
    """The message is PostgreSQL's, or the other spool's, and has its id; a file of it lies here without a row."""
    folder = tmp_path / str(uuid.uuid4())
    process = start(folder, 3, "spool.content_stored:1", way=way)
    output, _ = process.communicate(timeout=50)
    assert (process.returncode, output) == (-signal.SIGKILL, b"")
    (left,) = (folder / "content").iterdir()
    spool = await open_durable(folder, ManualClock())
    message_id = MessageId(bytes.fromhex(left.name))
    assert await spool.load(message_id) is None
    envelope, content, rows = make_envelope(message_id), b"again" * 50_000, [make_row()]
    if way == "accept":
        await spool.accept(envelope, content, rows)
    else:
        await spool.take(envelope, content, rows, b"taken")
    stored = await spool.load(message_id)
    assert stored is not None
    assert stored.content == content
    await spool.close()
    assert list((folder / "content").iterdir()) == [left]


async def test_sigkill_at_any_time_and_again_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    folder = tmp_path / str(uuid.uuid4())
    accepted: set[bytes] = set()
    settled: set[bytes] = set()
    choice = random.Random(20)
    for round_number in range(3):
        process = start(folder, 100 + round_number, "")
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(choice.randrange(20, 200))]
        process.kill()
        rest, _ = process.communicate(timeout=50)
        assert process.returncode == -signal.SIGKILL
        told = said(b"".join(lines) + rest)
        accepted |= told[0]
        settled |= told[1]
    assert len(accepted) > 50
    spool = await open_durable(folder, ManualClock())
    assert spool.identity.incarnation == 4
    await check(spool, accepted, settled)
    await spool.close()


async def test_without_a_kill_the_same_run_ends_and_leaves_what_it_said(tmp_path: Path) -> None:
    folder = tmp_path / str(uuid.uuid4())
    process = start(folder, 5, "", count=40)
    output, _ = process.communicate(timeout=50)
    assert process.returncode == 0
    accepted, settled = said(output)
    assert len(accepted) == child.SENDERS * 40
    spool = await open_durable(folder, ManualClock())
    await check(spool, accepted, settled)
    assert set(await spool.unreported(100_000)) == accepted - settled
    await spool.close()
