"""Contents that go to their file while they arrive: what is on disk when, and what a fault or a crash leaves."""

from __future__ import annotations

import asyncio
import errno
import os
import uuid
from pathlib import Path
from typing import Any

import apsw
import pytest

from dataplane.adapters.spool_sqlite import SpoolLimits, SqliteSpool
from dataplane.ports import SpoolError, SpoolFailedError, SpoolFullError
from support.spools import ManualClock, make_envelope, make_id, make_row, open_durable

PIECE = bytes(range(256)) * 512


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / str(uuid.uuid4())


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "content").iterdir()}


async def until_gone(spool: SqliteSpool, path: Path) -> None:
    async with asyncio.timeout(20):
        while path.exists():
            await spool.write_record(b"turn")


async def test_pieces_are_in_a_part_until_the_message_is_accepted(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    incoming = spool.receive(envelope.message_id)
    await incoming.write(PIECE)
    part = folder / "content" / f"{envelope.message_id.hex()}.part"
    assert part.read_bytes() == PIECE
    await incoming.write(PIECE)
    assert part.stat().st_size == 2 * len(PIECE)
    await incoming.accept(envelope, [make_row()])
    assert names(folder) == {envelope.message_id.hex()}
    await spool.close()


async def test_a_message_of_pieces_survives_a_restart_with_a_right_checksum(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    incoming = spool.receive(envelope.message_id)
    for _ in range(20):
        incoming.write(PIECE)
    await incoming.accept(envelope, [make_row()])
    await spool.close()
    again = await open_durable(folder, clock)
    stored = await again.load(envelope.message_id)
    assert stored is not None
    assert stored.content == PIECE * 20
    await again.close()


async def test_file_and_folder_are_synced_before_the_row_is_committed(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    part, final = (folder / "content" / f"{envelope.message_id.hex()}{end}" for end in (".part", ""))
    seen: list[tuple[str, int]] = []
    fsync = os.fsync

    def watching(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        fsync(descriptor)
        if target == part:
            seen.append(("file", part.stat().st_size))
        elif target == folder / "content":
            assert final.exists()
            assert not part.exists()
            seen.append(("folder", commits() - before))

    def commits() -> int:
        return spool._commits.commits

    before = commits()
    monkeypatch.setattr(os, "fsync", watching)
    incoming = spool.receive(envelope.message_id)
    incoming.write(PIECE)
    await incoming.accept(envelope, [make_row()])
    assert seen == [("file", len(PIECE)), ("folder", 0)]
    assert commits() == before + 1
    monkeypatch.undo()
    await spool.close()


async def test_parts_left_by_a_crash_are_swept_at_the_next_start_and_those_in_use_never(
    folder: Path, clock: ManualClock
) -> None:
    await (await open_durable(folder, clock)).close()
    orphan = folder / "content" / f"{make_id().hex()}.part"
    orphan.write_bytes(b"left by a crash")
    spool = await open_durable(folder, clock)
    await until_gone(spool, orphan)
    envelope = make_envelope()
    incoming = spool.receive(envelope.message_id)
    await incoming.write(PIECE)
    orphan.write_bytes(b"not ours either")
    assert await spool.sweep() == 1
    await incoming.accept(envelope, [make_row()])
    assert names(folder) == {envelope.message_id.hex()}
    await spool.close()


async def test_closing_removes_what_nobody_accepted(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    waited, unwaited = spool.receive(make_id()), spool.receive(make_id())
    await waited.write(PIECE)
    unwaited.write(PIECE).add_done_callback(asyncio.Future.exception)
    await spool.close()
    assert names(folder) == set()


async def test_closing_waits_for_a_message_whose_content_is_being_synced(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    incoming = spool.receive(envelope.message_id)
    incoming.write(PIECE)
    accepted = incoming.accept(envelope, [make_row()])
    await spool.close()
    await accepted
    assert names(folder) == {envelope.message_id.hex()}


async def test_a_disk_that_fills_up_ends_this_content_only(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[SpoolFailedError] = []
    spool = await open_durable(folder, clock, on_failed=failures.append)
    incoming = spool.receive(make_id())
    await incoming.write(PIECE)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(SpoolFullError):
            await incoming.write(PIECE)
    with pytest.raises(SpoolFullError):
        await incoming.accept(make_envelope(incoming.message_id), [make_row()])
    await spool.accept(make_envelope(), b"the next one", [make_row()])
    assert not failures
    await spool.close()
    assert names(folder) == set()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_a_content_that_gets_no_descriptor_is_refused_and_the_spool_lives(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    failures: list[SpoolFailedError] = []
    spool = await open_durable(folder, clock, on_failed=failures.append)

    def scarce(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", scarce)
        with pytest.raises(SpoolError):
            await spool.receive(make_id()).write(PIECE)
        with pytest.raises(SpoolError):
            await spool.accept(make_envelope(), PIECE, [make_row()])
    assert not failures
    await spool.accept(make_envelope(), PIECE, [make_row()])
    await spool.close()


async def test_contents_that_arrive_at_once_are_counted(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock, limits=SpoolLimits(incoming_count=2))
    first, _ = spool.receive(make_id()), spool.receive(make_id())
    with pytest.raises(SpoolError):
        await spool.receive(make_id()).write(PIECE)
    first.discard()
    await spool.receive(make_id()).write(PIECE)
    await spool.close()


async def test_a_content_is_refused_before_the_disk_falls_below_its_floor(folder: Path, clock: ManualClock) -> None:
    free = 10 * len(PIECE)
    limits = SpoolLimits(floor_bytes=free // 2)
    spool = await open_durable(folder, clock, limits=limits, ask_free_bytes=lambda: free)
    incoming = spool.receive(make_id())
    await incoming.write(PIECE)
    free = free // 2
    clock.advance(1)
    with pytest.raises(SpoolFullError):
        await incoming.write(PIECE)
    await spool.close()
    assert names(folder) == set()


@pytest.mark.parametrize("failing", ["write", "fsync"])
async def test_a_disk_that_fails_is_the_end_of_the_spool(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    failures: list[SpoolFailedError] = []
    spool = await open_durable(folder, clock, on_failed=failures.append)
    envelope = make_envelope()
    incoming = spool.receive(envelope.message_id)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, broken)
        written = incoming.write(PIECE)
        accepted = incoming.accept(envelope, [make_row()])
        results = await asyncio.gather(written, accepted, return_exceptions=True)
    assert isinstance(results[1], SpoolError)
    assert len(failures) == 1
    assert not spool.has_room(1)
    await spool.close()
    assert (folder / "failed").exists()


async def test_a_wal_beyond_half_its_cap_strains_the_spool_until_it_is_checkpointed(
    folder: Path, clock: ManualClock
) -> None:
    spool = await open_durable(folder, clock, limits=SpoolLimits(checkpoint_bytes=100_000, wal_cap_bytes=2_000_000))
    reader = apsw.Connection(str(folder / "spool.db"), flags=apsw.SQLITE_OPEN_READONLY)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM message").fetchall()

    def strained() -> bool:
        return spool.strained

    while not strained():
        await spool.accept(make_envelope(), b"x" * 60_000, [make_row()])
    assert spool.has_room(1), "accepting slows down long before it stops"
    reader.close()
    for _ in range(10):
        await spool.accept(make_envelope(), b"x" * 60_000, [make_row()])
    assert not strained()
    await spool.close()
