"""Full disks, failing disks and readers that hold on: what the durable spool says, and what is there afterwards."""

from __future__ import annotations

import asyncio
import errno
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import apsw
import pytest

from dataplane.adapters.handover_codec import decode_part, encode_given, encode_taken
from dataplane.adapters.spool_sqlite import SpoolLimits, SqliteSpool
from dataplane.core.envelope import Envelope
from dataplane.core.queue import State
from dataplane.handover import Giver, HandoverTools
from dataplane.ports import SpoolError, SpoolFailedError, SpoolFullError
from support.faulty_disk import FaultyDisk
from support.handover import QuietDelivery, QuietLog
from support.spools import ManualClock, change, make_envelope, make_row, open_durable, settlement

CONTENT = b"x" * 4096
LARGE = b"y" * 200_000
SMALL_WAL = SpoolLimits(checkpoint_bytes=100_000, wal_cap_bytes=1_000_000)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / str(uuid.uuid4())


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    faulty = FaultyDisk()
    yield faulty
    faulty.unregister()


@pytest.fixture
def failures() -> list[SpoolFailedError]:
    return []


@pytest.fixture
async def spool(
    folder: Path, clock: ManualClock, disk: FaultyDisk, failures: list[SpoolFailedError]
) -> AsyncIterator[SqliteSpool]:
    opened = await open_durable(folder, clock, vfs=disk.vfs_name, on_failed=failures.append)
    yield opened
    disk.faults.full.clear()
    disk.faults.unsyncable.clear()
    disk.faults.unreadable.clear()
    await opened.close()


async def accept_many(spool: SqliteSpool, count: int, accepted: list[Envelope]) -> None:
    """Accept one by one; `accepted` tells how far it came."""
    for _ in range(count):
        envelope = make_envelope()
        await spool.accept(envelope, CONTENT, [make_row()])
        accepted.append(envelope)


# --- no room ---


async def test_a_full_disk_in_the_midst_of_a_batch_is_452_and_passes_by_itself(
    spool: SqliteSpool, disk: FaultyDisk, failures: list[SpoolFailedError]
) -> None:
    kept, refused, later = make_envelope(), make_envelope(), make_envelope()
    await spool.accept(kept, CONTENT, [make_row()])
    disk.faults.full.add("-wal")
    with pytest.raises(SpoolFullError):
        await spool.accept(refused, CONTENT, [make_row()])
    assert disk.faults.hits
    disk.faults.full.clear()
    await spool.accept(later, CONTENT, [make_row()])
    assert await spool.load(kept.message_id) is not None
    assert await spool.load(refused.message_id) is None
    assert await spool.load(later.message_id) is not None
    assert failures == []


async def test_mail_that_a_full_disk_keeps_from_being_given_up_stays_and_the_drain_says_why(
    spool: SqliteSpool, disk: FaultyDisk
) -> None:
    name, kept = spool.identity.spool, make_envelope()
    await spool.accept(kept, CONTENT, [make_row()])
    tools = HandoverTools({name: QuietDelivery()}, encode_given, encode_taken, decode_part, QuietLog())
    giver = Giver({name: spool}, tools, asyncio.Lock(), lambda _: True)
    giver.tell(wanted=True)
    disk.faults.full.add("-wal")
    with pytest.raises(SpoolFullError):
        await giver.give_all(name, spool)
    disk.faults.full.clear()
    assert giver.given_count == 0
    assert await spool.load(kept.message_id) is not None


async def test_a_full_disk_gives_back_the_numbers_of_records(spool: SqliteSpool, disk: FaultyDisk) -> None:
    assert await spool.write_record(b"one") == 1
    disk.faults.full.add("-wal")
    with pytest.raises(SpoolFullError):
        await spool.write_record(b"lost")
    disk.faults.full.clear()
    assert await spool.write_record(b"two") == 2
    assert await spool.records(0, 10, 1_000) == (1, [b"one", b"two"])


async def test_a_full_disk_leaves_no_file_of_a_large_message(
    spool: SqliteSpool, disk: FaultyDisk, folder: Path
) -> None:
    disk.faults.full.add("-wal")
    with pytest.raises(SpoolFullError):
        await spool.accept(make_envelope(), LARGE, [make_row()])
    disk.faults.full.clear()
    await spool.close()
    assert list((folder / "content").iterdir()) == []


async def test_a_full_disk_at_a_checkpoint_is_no_harm(folder: Path, clock: ManualClock, disk: FaultyDisk) -> None:
    spool = await open_durable(folder, clock, vfs=disk.vfs_name, limits=SpoolLimits(checkpoint_bytes=100_000))
    disk.faults.full.add("spool.db")
    envelopes = [make_envelope() for _ in range(60)]
    for envelope in envelopes:
        await spool.accept(envelope, CONTENT, [make_row()])
    assert disk.faults.hits
    disk.faults.full.clear()
    for envelope in envelopes:
        assert await spool.load(envelope.message_id) is not None
    await spool.close()


async def test_below_the_floor_nothing_is_written_until_space_returns(folder: Path, clock: ManualClock) -> None:
    free = {"bytes": 10 * 1024 * 1024}
    limits = SpoolLimits(floor_bytes=9 * 1024 * 1024)
    spool = await open_durable(folder, clock, limits=limits, ask_free_bytes=lambda: free["bytes"])
    await spool.accept(make_envelope(), CONTENT, [make_row()])
    free["bytes"] = 8 * 1024 * 1024
    clock.advance(1)
    assert not spool.has_room(1)
    with pytest.raises(SpoolFullError):
        await spool.accept(make_envelope(), CONTENT, [make_row()])
    assert await spool.write_record(b"settling goes on") == 1
    free["bytes"] = 20 * 1024 * 1024
    clock.advance(1)
    assert spool.has_room(1)
    await spool.accept(make_envelope(), CONTENT, [make_row()])
    assert (await spool.stats()).waiting_count == 2
    await spool.close()


async def test_a_burst_cannot_slip_below_the_floor_between_two_looks_at_the_disk(
    folder: Path, clock: ManualClock
) -> None:
    limits = SpoolLimits(floor_bytes=1_000_000)
    spool = await open_durable(folder, clock, limits=limits, ask_free_bytes=lambda: 1_100_000)
    futures = [spool.accept(make_envelope(), CONTENT, [make_row()]) for _ in range(40)]
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert sum(result is None for result in results) == 12
    assert all(isinstance(result, SpoolFullError) for result in results[12:])
    await spool.close()


async def test_a_file_system_that_does_not_answer_has_no_room(folder: Path, clock: ManualClock) -> None:
    def fail() -> int:
        raise OSError(errno.EIO, "input/output error")

    spool = await open_durable(folder, clock, ask_free_bytes=fail)
    with pytest.raises(SpoolFullError):
        await spool.accept(make_envelope(), CONTENT, [make_row()])
    await spool.close()


async def test_a_reader_that_holds_the_wal_stops_accepting_at_the_cap_until_it_leaves(
    folder: Path, clock: ManualClock
) -> None:
    spool = await open_durable(folder, clock, limits=SMALL_WAL)
    reader = apsw.Connection(str(folder / "spool.db"), flags=apsw.SQLITE_OPEN_READONLY)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM message").fetchall()
    accepted: list[Envelope] = []
    with pytest.raises(SpoolFullError):
        await accept_many(spool, 1_000, accepted)
    assert 5 < len(accepted) < 100
    row = make_row()
    assert await spool.settle(settlement(accepted[0].message_id, [change(row, State.SENT)])) == 1
    reader.close()
    clock.advance(2)
    # Begins a checkpoint, or where something is still being written leaves that to the next look.
    async with asyncio.timeout(10):
        while not spool.has_room(1):
            await spool.write_record(b"after the checkpoint")
            clock.advance(2)
    await spool.accept(make_envelope(), CONTENT, [make_row()])
    assert (await spool.stats()).wal_bytes < 200_000
    await spool.close()


async def test_the_wal_stays_short_when_nobody_holds_it(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock, limits=SMALL_WAL)
    for _ in range(200):
        await spool.accept(make_envelope(), CONTENT, [make_row()])
    assert (folder / "spool.db-wal").stat().st_size < 300_000
    await spool.close()


async def test_somebody_elses_write_lock_is_a_temporary_error(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    intruder = apsw.Connection(str(folder / "spool.db"))
    intruder.execute("BEGIN IMMEDIATE")
    with pytest.raises(SpoolError) as caught:
        await spool.write_record(b"not now")
    assert type(caught.value) is SpoolError
    intruder.execute("ROLLBACK")
    intruder.close()
    assert await spool.write_record(b"now") == 1
    await spool.close()


# --- a disk that fails ---


async def test_a_commit_that_cannot_be_synced_ends_the_spool(
    spool: SqliteSpool, disk: FaultyDisk, failures: list[SpoolFailedError]
) -> None:
    kept = make_envelope()
    await spool.accept(kept, CONTENT, [make_row()])
    disk.faults.unsyncable.add("-wal")
    futures = [spool.accept(make_envelope(), CONTENT, [make_row()]) for _ in range(3)]
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert all(isinstance(result, SpoolFailedError) for result in results)
    disk.faults.unsyncable.clear()
    hits = disk.faults.hits
    with pytest.raises(SpoolFailedError):
        await spool.accept(make_envelope(), CONTENT, [make_row()])
    with pytest.raises(SpoolFailedError):
        await spool.load(kept.message_id)
    assert not spool.has_room(1)
    assert len(failures) == 1
    assert disk.faults.hits == hits == 1, "a failed fsync is never tried again"


async def test_what_gathered_behind_a_failed_commit_fails_too(
    spool: SqliteSpool, disk: FaultyDisk, failures: list[SpoolFailedError]
) -> None:
    disk.faults.unsyncable.add("-wal")
    first = spool.write_record(b"in the commit")
    await asyncio.sleep(0)
    second = spool.write_record(b"gathered behind it")
    large = spool.accept(make_envelope(), LARGE, [make_row()])
    results = await asyncio.gather(first, second, large, return_exceptions=True)
    assert all(isinstance(result, SpoolFailedError) for result in results)
    assert len(failures) == 1


async def test_after_a_failed_commit_the_next_start_copies_all_that_was_acknowledged_into_a_new_file(
    folder: Path, clock: ManualClock, disk: FaultyDisk, failures: list[SpoolFailedError]
) -> None:
    spool = await open_durable(folder, clock, vfs=disk.vfs_name, on_failed=failures.append)
    kept = [make_envelope() for _ in range(20)]
    for number, envelope in enumerate(kept):
        await spool.accept(envelope, LARGE if number == 3 else CONTENT, [make_row(0), make_row(1)])
    await spool.settle(settlement(kept[0].message_id, [change(make_row(0), State.SENT)], b"one", reported=True))
    disk.faults.unsyncable.add("-wal")
    with pytest.raises(SpoolFailedError):
        await spool.write_record(b"two")
    await spool.close()

    again = await open_durable(folder, clock)
    assert again.salvage is not None
    assert again.salvage.lost_messages == ()
    assert again.salvage.messages_kept == 20
    assert (again.salvage.quarantine / "spool.db").exists()
    for number, envelope in enumerate(kept):
        stored = await again.load(envelope.message_id)
        assert stored is not None
        assert stored.content == (LARGE if number == 3 else CONTENT)
        assert len(stored.recipients) == (1 if number == 0 else 2)
        assert stored.reported is (number == 0)
    first, records = await again.records(0, 10, 1_000)
    assert (first, records[0]) == (1, b"one")
    assert (await again.stats()).waiting_count == 39
    await again.accept(make_envelope(), CONTENT, [make_row()])
    await again.close()

    third = await open_durable(folder, clock)
    assert third.salvage is None, "once is enough"
    await third.close()


async def test_a_checkpoint_that_cannot_be_synced_ends_the_spool(
    folder: Path, clock: ManualClock, disk: FaultyDisk, failures: list[SpoolFailedError]
) -> None:
    spool = await open_durable(folder, clock, vfs=disk.vfs_name, limits=SMALL_WAL, on_failed=failures.append)
    disk.faults.unsyncable.add("spool.db")
    with pytest.raises(SpoolFailedError):
        await accept_many(spool, 200, [])
    assert len(failures) == 1
    disk.faults.unsyncable.clear()
    await spool.close()
    assert (folder / "failed").exists()


async def test_a_read_that_fails_ends_the_spool(
    folder: Path, clock: ManualClock, disk: FaultyDisk, failures: list[SpoolFailedError]
) -> None:
    envelope = make_envelope()
    spool = await open_durable(folder, clock)
    await spool.accept(envelope, CONTENT, [make_row()])
    await spool.close()
    spool = await open_durable(folder, clock, vfs=disk.vfs_name, on_failed=failures.append)
    disk.faults.unreadable.add("spool.db")
    with pytest.raises(SpoolFailedError):
        await spool.load(envelope.message_id)
    assert len(failures) == 1
    disk.faults.unreadable.clear()
    await spool.close()


async def test_every_commit_syncs_the_wal_before_its_future_is_done(spool: SqliteSpool, disk: FaultyDisk) -> None:
    for _ in range(3):
        before = len(disk.faults.syncs)
        await spool.accept(make_envelope(), CONTENT, [make_row()])
        assert any(path.endswith("-wal") for path in disk.faults.syncs[before:])


async def test_writes_that_come_together_share_one_sync(spool: SqliteSpool, disk: FaultyDisk) -> None:
    await spool.write_record(b"the WAL is begun")
    before = len(disk.faults.syncs)
    await asyncio.gather(*(spool.accept(make_envelope(), CONTENT, [make_row()]) for _ in range(50)))
    assert len(disk.faults.syncs) - before == 1


@pytest.mark.parametrize(
    ("code", "expected"),
    [(errno.EIO, SpoolFailedError), (errno.ENOSPC, SpoolFullError), (errno.EDQUOT, SpoolFullError)],
)
async def test_a_content_file_that_cannot_be_synced(
    spool: SqliteSpool,
    folder: Path,
    failures: list[SpoolFailedError],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    expected: type[SpoolError],
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    envelope = make_envelope()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(expected) as caught:
            await spool.accept(envelope, LARGE, [make_row()])
    assert type(caught.value) is expected
    assert list((folder / "content").iterdir()) == []
    assert len(failures) == (expected is SpoolFailedError)
