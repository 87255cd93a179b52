"""Damaged databases and files: what can be read is kept, what cannot is named, and the old file is kept aside."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from dataclasses import replace
from pathlib import Path

import apsw
import pytest

from dataplane.adapters.spool_sqlite import SalvageReport, SqliteSpool
from dataplane.core.envelope import Envelope
from dataplane.core.idempotency import SubmissionKey, Submitted
from dataplane.core.ids import format_message_id
from dataplane.core.queue import State
from dataplane.ports import SpoolError, SpoolFailedError
from support.spools import ManualClock, change, make_envelope, make_row, open_durable, settlement

CONTENT = bytes(range(256)) * 16
LARGE = bytes(range(256)) * 1_000
COUNT = 300
FAR_FUTURE_MS = 4_000_000_000_000


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / str(uuid.uuid4())


async def fill(folder: Path, clock: ManualClock) -> list[Envelope]:
    """A spool with messages, half of them reported, and records; closed, so that all lies in the file."""
    spool = await open_durable(folder, clock)
    envelopes = [make_envelope() for _ in range(COUNT)]
    await asyncio.gather(*(spool.accept(envelope, CONTENT, [make_row(0), make_row(1)]) for envelope in envelopes))
    for number, envelope in enumerate(envelopes[::2]):
        await spool.settle(settlement(envelope.message_id, [], b"record %d " % number * 50, reported=True))
    await spool.acknowledge(7)
    await spool.close()
    return envelopes


def pages(folder: Path, table: str, kind: str = "leaf") -> list[int]:
    """Numbers of a table's or index's pages, in its order."""
    connection = apsw.Connection(str(folder / "spool.db"), flags=apsw.SQLITE_OPEN_READONLY)
    rows = connection.execute("SELECT pageno FROM dbstat WHERE name = ? AND pagetype = ? ORDER BY path", (table, kind))
    found = [int(row[0]) for row in rows]
    connection.close()
    return found


def destroy(folder: Path, page: int, page_bytes: int = 8192) -> None:
    """Overwrite a page with noise, as a broken sector would."""
    with (folder / "spool.db").open("r+b") as database:
        database.seek((page - 1) * page_bytes)
        database.write(random.Random(page).randbytes(page_bytes))


async def use_everything(spool: SqliteSpool, envelopes: list[Envelope]) -> None:
    """Read and change all there is, so that no page stays unseen."""
    for envelope in envelopes:
        await spool.load(envelope.message_id)
    await spool.records(0, 1_000, 1 << 30)
    for index in range(COUNT):
        await spool.accept(make_envelope(), CONTENT, [make_row(index)])
    ends = [change(make_row(index), State.SENT) for index in range(2)]
    await asyncio.gather(*(spool.settle(settlement(envelope.message_id, ends)) for envelope in envelopes))


async def reopen_after_failure(folder: Path, clock: ManualClock, envelopes: list[Envelope]) -> SqliteSpool:
    """Use the spool until it finds the damage, and start again as the supervisor would."""
    failures: list[SpoolFailedError] = []
    spool = await open_durable(folder, clock, on_failed=failures.append)
    with pytest.raises(SpoolFailedError):
        await use_everything(spool, envelopes)
    assert len(failures) == 1
    await spool.close()
    return await open_durable(folder, clock)


async def check_kept(spool: SqliteSpool, envelopes: list[Envelope], report: SalvageReport) -> None:
    """Every message is whole or named as lost."""
    lost = set(report.lost_messages)
    for envelope in envelopes:
        stored = await spool.load(envelope.message_id)
        assert (stored is None) == (format_message_id(envelope.message_id) in lost)
        if stored is not None:
            assert stored.envelope == envelope
            assert stored.content == CONTENT
            assert stored.recipients == (make_row(0), make_row(1))


async def test_a_destroyed_page_of_messages_loses_those_on_it_and_names_them(folder: Path, clock: ManualClock) -> None:
    envelopes = await fill(folder, clock)
    for page in pages(folder, "message")[10:12]:
        destroy(folder, page)
    spool = await reopen_after_failure(folder, clock, envelopes)
    report = spool.salvage
    assert report is not None
    assert 1 <= len(report.lost_messages) <= 6
    assert report.messages_kept >= COUNT - 6
    assert report.damaged_places >= 1
    await check_kept(spool, envelopes, report)
    heads = await spool.heads(make_row().queue_key, None, 10_000)
    assert len(heads) == (await spool.stats()).waiting_count
    await spool.close()


async def test_a_destroyed_page_of_recipients_loses_only_messages_without_any(folder: Path, clock: ManualClock) -> None:
    envelopes = await fill(folder, clock)
    destroy(folder, pages(folder, "recipient")[1])
    spool = await reopen_after_failure(folder, clock, envelopes)
    report = spool.salvage
    assert report is not None
    assert 0 < len(report.lost_messages) < 100
    kept = [envelope for envelope in envelopes if format_message_id(envelope.message_id) not in report.lost_messages]
    assert report.messages_kept == len(kept) > 200
    for envelope in kept:
        stored = await spool.load(envelope.message_id)
        assert stored is not None
        assert stored.recipients
    await spool.close()


@pytest.mark.parametrize("index", ["ix_recipient_waiting", "sqlite_autoindex_message_1"])
async def test_a_destroyed_index_loses_nothing(folder: Path, clock: ManualClock, index: str) -> None:
    envelopes = await fill(folder, clock)
    destroy(folder, pages(folder, index)[0])
    spool = await reopen_after_failure(folder, clock, envelopes)
    report = spool.salvage
    assert report is not None
    assert report.lost_messages == ()
    assert report.messages_kept >= COUNT
    await check_kept(spool, envelopes, report)
    await spool.close()


async def test_destroyed_marks_make_messages_be_recorded_again(folder: Path, clock: ManualClock) -> None:
    envelopes = await fill(folder, clock)
    (folder / "failed").write_text("a test says so")
    destroy(folder, pages(folder, "unreported")[0])
    spool = await open_durable(folder, clock)
    report = spool.salvage
    assert report is not None
    assert report.lost_messages == ()
    assert len(await spool.unreported(10_000)) == COUNT
    assert envelopes
    await spool.close()


async def test_marks_that_can_be_read_are_kept(folder: Path, clock: ManualClock) -> None:
    await fill(folder, clock)
    (folder / "failed").write_text("a test says so")
    spool = await open_durable(folder, clock)
    assert len(await spool.unreported(10_000)) == COUNT // 2
    await spool.close()


async def test_lost_records_leave_empty_ones_so_that_numbers_have_no_gaps(folder: Path, clock: ManualClock) -> None:
    envelopes = await fill(folder, clock)
    leaves = pages(folder, "outbox")
    destroy(folder, leaves[1])
    spool = await reopen_after_failure(folder, clock, envelopes)
    report = spool.salvage
    assert report is not None
    assert report.lost_records
    first, records = await spool.records(0, 1_000, 1 << 30)
    assert (first, len(records)) == (1, COUNT // 2)
    for number, record in enumerate(records, start=1):
        lost = number in report.lost_records
        assert record == (b"" if lost else b"record %d " % (number - 1) * 50)
    stats = await spool.stats()
    assert (stats.acknowledged, stats.outbox_last) == (7, COUNT // 2)
    assert await spool.write_record(b"next") == COUNT // 2 + 1
    await spool.close()


async def test_lost_records_at_the_end_keep_their_numbers_too(folder: Path, clock: ManualClock) -> None:
    await fill(folder, clock)
    (folder / "failed").write_text("a test says so")
    destroy(folder, pages(folder, "outbox")[-1])
    spool = await open_durable(folder, clock)
    assert await spool.write_record(b"next") == COUNT // 2 + 1
    await spool.close()


async def test_a_destroyed_first_page_is_kept_aside_and_the_spool_starts_empty(
    folder: Path, clock: ManualClock
) -> None:
    await fill(folder, clock)
    destroy(folder, 1)
    spool = await open_durable(folder, clock)
    report = spool.salvage
    assert report is not None
    assert report.messages_kept == 0
    assert report.damaged_places >= 1
    assert (report.quarantine / "spool.db").stat().st_size > COUNT * len(CONTENT)
    assert spool.identity.incarnation == 2
    await spool.accept(make_envelope(), CONTENT, [make_row()])
    await spool.close()


async def test_the_report_is_kept_beside_the_old_file(folder: Path, clock: ManualClock) -> None:
    envelopes = await fill(folder, clock)
    (folder / "failed").write_text("a test says so")
    destroy(folder, pages(folder, "message")[3])
    spool = await open_durable(folder, clock)
    report = spool.salvage
    assert report is not None
    fields = json.loads((report.quarantine / "report.json").read_text())
    assert fields["reason"] == "a test says so"
    assert tuple(fields["lost_messages"]) == report.lost_messages
    assert set(report.lost_messages) <= {format_message_id(envelope.message_id) for envelope in envelopes}
    await spool.close()


async def test_the_file_of_a_lost_message_goes_to_the_quarantine_not_to_the_sweep(
    folder: Path, clock: ManualClock
) -> None:
    spool = await open_durable(folder, clock)
    envelopes = [make_envelope() for _ in range(200)]
    await asyncio.gather(*(spool.accept(envelope, LARGE, [make_row()]) for envelope in envelopes))
    await spool.close()
    (folder / "failed").write_text("a test says so")
    destroy(folder, pages(folder, "message")[1])
    spool = await open_durable(folder, clock)
    report = spool.salvage
    assert report is not None
    assert report.lost_messages
    moved = {entry.name for entry in (report.quarantine / "content").iterdir()}
    assert moved == {text.replace("-", "") for text in report.lost_messages}
    kept = {entry.name for entry in (folder / "content").iterdir()}
    assert len(kept) == report.messages_kept == 200 - len(moved)
    await spool.close()


@pytest.mark.parametrize("is_moved", [False, True], ids=["before the old file moved", "after"])
async def test_an_exchange_of_files_that_a_crash_cut_is_finished(
    folder: Path, clock: ManualClock, *, is_moved: bool
) -> None:
    envelopes = await fill(folder, clock)
    (folder / "failed").write_text("a test says so")
    spool = await open_durable(folder, clock)
    assert spool.salvage is not None
    quarantine = spool.salvage.quarantine
    await spool.close()
    # As it was in the midst: the new file is whole, the old one is moved or not.
    (folder / "failed").write_text("a test says so")
    (folder / "identity").write_text((folder / "identity").read_text().replace('"incarnation":2', '"incarnation":1'))
    (folder / "spool.db").rename(folder / "spool.db.new")
    (folder / "spool.db-wal").unlink(missing_ok=True)
    if not is_moved:
        (quarantine / "spool.db").rename(folder / "spool.db")
    spool = await open_durable(folder, clock)
    report = spool.salvage
    assert report is not None
    assert report.messages_kept == COUNT
    assert not (folder / "failed").exists()
    assert not (folder / "spool.db.new").exists()
    await check_kept(spool, envelopes, report)
    await spool.close()


async def test_a_flipped_bit_in_a_content_quarantines_that_message_alone(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    damaged, sound = make_envelope(), make_envelope()
    await spool.accept(damaged, b"find-this-text " * 100, [make_row(0), make_row(1)])
    await spool.accept(sound, CONTENT, [make_row()])
    await spool.close()
    database = (folder / "spool.db").read_bytes()
    (folder / "spool.db").write_bytes(database.replace(b"find-this-text", b"find-that-text", 1))
    spool = await open_durable(folder, clock)
    with pytest.raises(SpoolError) as caught:
        await spool.load(damaged.message_id)
    assert type(caught.value) is SpoolError
    assert await spool.load(damaged.message_id) is None
    assert await spool.load(sound.message_id) is not None
    assert [due.message_id for due in await spool.heads(make_row().queue_key, None, 10)] == [sound.message_id]
    assert damaged.message_id not in await spool.unreported(10)
    stats = await spool.stats()
    assert (stats.quarantined_count, stats.waiting_count) == (1, 1)
    await spool.close()
    again = await open_durable(folder, clock)
    assert (await again.stats()).quarantined_count == 1
    await again.close()


@pytest.mark.parametrize("what", ["flipped", "short", "gone"])
async def test_a_damaged_content_file_quarantines_the_message(folder: Path, clock: ManualClock, what: str) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    await spool.accept(envelope, LARGE, [make_row()])
    path = folder / "content" / envelope.message_id.hex()
    if what == "flipped":
        path.write_bytes(b"\xff" + LARGE[1:])
    elif what == "short":
        path.write_bytes(LARGE[:-1])
    else:
        path.unlink()
    with pytest.raises(SpoolError, match="quarantined"):
        await spool.load(envelope.message_id)
    assert await spool.keys() == []
    assert (await spool.stats()).quarantined_count == 1
    clock.now_ms = FAR_FUTURE_MS
    assert await spool.sweep() == 0, "what is quarantined keeps its file"
    assert path.exists() == (what != "gone")
    await spool.close()


async def test_a_flipped_bit_in_a_recipient_is_found(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    await spool.accept(envelope, CONTENT, [make_row(attempt=3)])
    await spool.close()
    connection = apsw.Connection(str(folder / "spool.db"))
    connection.execute("UPDATE recipient SET attempt = 2")
    connection.close()
    spool = await open_durable(folder, clock)
    with pytest.raises(SpoolError, match="quarantined"):
        await spool.load(envelope.message_id)
    await spool.close()


async def fill_keys(folder: Path, clock: ManualClock) -> list[Envelope]:
    """A spool whose messages have keys; closed."""
    spool = await open_durable(folder, clock)
    keys = [SubmissionKey(number.to_bytes(32, "big"), b"c" * 32) for number in range(COUNT)]
    envelopes = [replace(make_envelope(), submission_key=key) for key in keys]
    await asyncio.gather(*(spool.accept(envelope, CONTENT, [make_row(0), make_row(1)]) for envelope in envelopes))
    await spool.close()
    return envelopes


def answers(spool: SqliteSpool, envelope: Envelope) -> bool:
    """Whether the key names its message; never another one."""
    assert envelope.submission_key is not None
    submitted = spool.submitted(envelope.submission_key.key_hash)
    assert submitted in {None, Submitted(b"c" * 32, envelope.message_id)}
    return submitted is not None


async def test_keys_that_can_be_read_are_kept(folder: Path, clock: ManualClock) -> None:
    envelopes = await fill_keys(folder, clock)
    (folder / "failed").write_text("a test says so")
    destroy(folder, pages(folder, "submission_key")[1])
    spool = await open_durable(folder, clock)
    assert spool.salvage is not None
    assert spool.salvage.lost_messages == ()
    assert spool.salvage.damaged_places == 1
    kept = [answers(spool, envelope) for envelope in envelopes].count(True)
    assert COUNT // 2 < kept < COUNT
    await spool.close()


async def test_a_flipped_bit_in_a_key_is_found_and_never_answers(folder: Path, clock: ManualClock) -> None:
    envelopes = await fill_keys(folder, clock)
    connection = apsw.Connection(str(folder / "spool.db"))
    connection.execute("UPDATE submission_key SET content_hash = zeroblob(32) WHERE number = 7")
    connection.close()
    failures: list[SpoolFailedError] = []
    spool = await open_durable(folder, clock, on_failed=failures.append)
    with pytest.raises(SpoolError):
        [answers(spool, envelope) for envelope in envelopes]
    assert len(failures) == 1
    await spool.close()
    spool = await open_durable(folder, clock)
    assert [answers(spool, envelope) for envelope in envelopes].count(False) == 1
    await spool.close()


async def test_a_file_of_the_first_layout_is_salvaged_all_the_same(folder: Path, clock: ManualClock) -> None:
    envelopes = await fill(folder, clock)
    connection = apsw.Connection(str(folder / "spool.db"))
    connection.execute("DROP TABLE submission_key; DROP TABLE opening; ALTER TABLE state DROP COLUMN answered")
    connection.execute("PRAGMA user_version = 1")
    connection.close()
    (folder / "failed").write_text("a test says so")
    spool = await open_durable(folder, clock)
    assert spool.salvage is not None
    await check_kept(spool, envelopes, spool.salvage)
    assert spool.submitted(b"k" * 32) is None
    await spool.close()
