"""Room that is kept for a full disk: opening and settling go on, accepting does not eat it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw
import pytest

from dataplane.adapters.spool_sqlite import SpoolLimits, SqliteSpool, schema
from dataplane.core.queue import State
from dataplane.files import Reserve
from dataplane.ports import Settlement, SpoolFailedError, SpoolFullError
from support.faulty_disk import Faults, FaultyDisk
from support.spools import ManualClock, change, make_envelope, make_row, open_durable, settlement

KIB = 1024
LIMITS = SpoolLimits(reserve_bytes=256 * KIB)


@dataclass
class FullWhileReserved(Faults):
    """Every write finds the disk full as long as the reserve takes the last of its room."""

    reserve: Path = Path()

    def strikes(self, names: set[str], path: str) -> bool:
        return self.reserve.exists() and super().strikes(names, path)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / str(uuid.uuid4())


@pytest.fixture
def disk(folder: Path) -> Iterator[FaultyDisk]:
    faulty = FaultyDisk()
    faulty.faults = FullWhileReserved(reserve=folder / "reserve")
    yield faulty
    faulty.unregister()


async def until_reserved(spool: SqliteSpool, folder: Path) -> None:
    for _ in range(1_000):
        if (folder / "reserve").exists():
            return
        await spool.write_record(b"turn")
    pytest.fail("no reserve is made")


async def settle_in_the_end(spool: SqliteSpool, end: Settlement) -> None:
    """As delivery does: a settlement that the disk has no room for is tried again."""
    for _ in range(200):
        try:
            assert await spool.settle(end) == 1
        except SpoolFullError:
            continue
        return
    pytest.fail("the disk stays full")


async def test_opening_makes_a_reserve_that_really_takes_room(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock, limits=LIMITS)
    await until_reserved(spool, folder)
    await spool.close()
    assert (folder / "reserve").stat().st_blocks * 512 >= 256 * KIB


async def test_a_worker_starts_on_a_disk_that_is_full_to_the_last_byte(
    folder: Path, clock: ManualClock, disk: FaultyDisk
) -> None:
    spool = await open_durable(folder, clock, limits=LIMITS)
    envelope, row = make_envelope(), make_row()
    await spool.accept(envelope, b"waits", [row])
    await until_reserved(spool, folder)
    await spool.close()
    disk.faults.full |= {"spool.db", "-wal"}
    again = await open_durable(folder, clock, vfs=disk.vfs_name, limits=LIMITS, ask_free_bytes=lambda: 0)
    assert disk.faults.hits
    assert again.salvage is None, "a full disk is no damage"
    assert again.identity.incarnation == 2
    assert not again.has_room(1)
    await settle_in_the_end(again, settlement(envelope.message_id, [change(row, State.SENT)], b"", reported=True))
    await again.close()


async def test_without_a_reserve_a_full_disk_does_not_let_a_worker_start(
    folder: Path, clock: ManualClock, disk: FaultyDisk
) -> None:
    await (await open_durable(folder, clock, limits=LIMITS)).close()
    (folder / "reserve").unlink(missing_ok=True)
    disk.faults = Faults(full={"spool.db", "-wal"})
    with pytest.raises(SpoolFullError):
        await open_durable(folder, clock, vfs=disk.vfs_name, limits=LIMITS)
    assert not (folder / "failed").exists(), "a full disk is no reason to salvage"
    disk.faults.full.clear()
    await (await open_durable(folder, clock, limits=LIMITS)).close()


async def test_a_settlement_goes_through_once_the_reserve_is_given_up(
    folder: Path, clock: ManualClock, disk: FaultyDisk
) -> None:
    failures: list[SpoolFailedError] = []
    spool = await open_durable(folder, clock, vfs=disk.vfs_name, limits=LIMITS, on_failed=failures.append)
    envelope, row = make_envelope(), make_row()
    await spool.accept(envelope, b"x" * 2_000, [row])
    await until_reserved(spool, folder)
    disk.faults.full.add("-wal")
    end = settlement(envelope.message_id, [change(row, State.SENT)], b"", reported=True)
    await settle_in_the_end(spool, end)
    assert disk.faults.hits
    assert not (folder / "reserve").exists()
    assert not failures
    await spool.close()


def test_a_reserve_is_made_only_where_room_is_ample(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free_bytes = status.f_bavail * status.f_frsize
    reserve = Reserve(tmp_path / "reserve", free_bytes // 4)
    reserve.hold()
    assert not (tmp_path / "reserve").exists()
    assert not reserve.give_up()
    small = Reserve(tmp_path / "reserve", 64 * KIB)
    small.hold()
    small.hold()
    assert (tmp_path / "reserve").stat().st_size == 64 * KIB
    assert small.give_up()
    assert not small.give_up()


def test_a_reserve_fails_nobody(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "no such folder" / "reserve", 64 * KIB)
    reserve.hold()
    assert not reserve.give_up()


async def test_an_index_of_the_wal_that_cannot_grow_is_a_full_disk_and_no_damage(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await (await open_durable(folder, clock, limits=LIMITS)).close()
    (folder / "reserve").unlink(missing_ok=True)
    error = apsw.IOError("disk I/O error")
    error.extendedresult = apsw.SQLITE_IOERR_SHMSIZE  # type: ignore[attr-defined]  # apsw reads it, its stubs do not

    def full(*_: object) -> apsw.Connection:
        raise error

    monkeypatch.setattr(schema, "prepare", full)
    with pytest.raises(SpoolFullError):
        await open_durable(folder, clock, limits=LIMITS)
    assert not (folder / "failed").exists()
