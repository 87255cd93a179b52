"""The folder of a durable spool: who may open it, what is in it, what a restart finds, and what an operator sees."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import apsw
import pytest

from dataplane.adapters.spool_sqlite import SpoolLimits, SqliteSpool, reader
from dataplane.core.idempotency import SubmissionKey
from dataplane.core.queue import TERMINAL, State
from dataplane.ports import Cursor, SpoolError
from support.spools import (
    KEY,
    NOW_MS,
    ManualClock,
    change,
    fail_test,
    make_envelope,
    make_id,
    make_row,
    open_durable,
    settlement,
)

DAY_S = 24 * 3_600.0
CONTENT = b"x" * 4096
LARGE = b"y" * 200_000
FAR_FUTURE_MS = 4_000_000_000_000


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / str(uuid.uuid4())


# --- identity ---


async def test_each_open_is_a_new_incarnation_of_the_same_spool(folder: Path, clock: ManualClock) -> None:
    for incarnation in (1, 2, 3):
        spool = await open_durable(folder, clock)
        assert spool.identity == (type(spool.identity))(folder.name, "node-1", incarnation)
        await spool.close()


async def test_a_second_opener_is_refused_until_the_first_is_done(folder: Path, clock: ManualClock) -> None:
    first = await open_durable(folder, clock)
    with pytest.raises(SpoolError, match="in use by another process"):
        await open_durable(folder, clock)
    await first.close()
    second = await open_durable(folder, clock)
    assert second.identity.incarnation == 2
    await second.close()


async def test_another_nodes_spool_is_refused(folder: Path, clock: ManualClock) -> None:
    await (await open_durable(folder, clock)).close()
    with pytest.raises(SpoolError, match="belongs to node node-1"):
        await SqliteSpool.open(folder, "node-2", clock, on_failed=fail_test)
    await (await open_durable(folder, clock)).close()


async def test_a_copied_spool_is_refused(folder: Path, clock: ManualClock, tmp_path: Path) -> None:
    await (await open_durable(folder, clock)).close()
    copy = tmp_path / str(uuid.uuid4())
    folder.rename(copy)
    with pytest.raises(SpoolError, match="a copied spool"):
        await open_durable(copy, clock)
    (copy / "identity").unlink()
    with pytest.raises(SpoolError, match="belongs to spool"):
        await open_durable(copy, clock)


async def test_a_folder_that_is_not_named_by_a_uuid_is_refused(tmp_path: Path, clock: ManualClock) -> None:
    with pytest.raises(SpoolError, match="named by its UUID"):
        await open_durable(tmp_path / "spool", clock)


async def test_an_unreadable_identity_is_refused(folder: Path, clock: ManualClock) -> None:
    await (await open_durable(folder, clock)).close()
    (folder / "identity").write_text("{")
    with pytest.raises(SpoolError, match="cannot be read"):
        await open_durable(folder, clock)


async def test_the_incarnation_goes_on_when_the_identity_is_lost(folder: Path, clock: ManualClock) -> None:
    for _ in range(2):
        await (await open_durable(folder, clock)).close()
    (folder / "identity").unlink()
    spool = await open_durable(folder, clock)
    assert spool.identity.incarnation == 3
    await spool.close()


async def test_the_incarnation_goes_on_when_the_database_is_lost(folder: Path, clock: ManualClock) -> None:
    for _ in range(2):
        await (await open_durable(folder, clock)).close()
    (folder / "spool.db").unlink()
    spool = await open_durable(folder, clock)
    assert spool.identity.incarnation == 3
    await spool.close()


async def test_nobody_else_may_read_the_folder(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    await spool.accept(make_envelope(), LARGE, [make_row()])
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "identity").stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder / "content").iterdir())
    await spool.close()


# --- the file ---


async def test_the_file_is_made_as_it_has_to_stay(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    writer = spool._commits._connection
    pragmas = ["journal_mode", "synchronous", "auto_vacuum", "page_size", "wal_autocheckpoint", "user_version"]
    assert [writer.execute(f"PRAGMA {name}").get for name in pragmas] == ["wal", 2, 2, 8192, 0, 3]
    await spool.close()


async def test_the_reading_connection_cannot_write(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    with pytest.raises(apsw.ReadOnlyError):
        spool._reader._connection.execute("DELETE FROM message")
    await spool.close()


def set_layout(folder: Path, layout: int, readable_by: int) -> None:
    connection = apsw.Connection(str(folder / "spool.db"))
    connection.execute(f"PRAGMA user_version = {layout}")
    connection.execute("UPDATE state SET readable_by = ?", (readable_by,))
    connection.execute("ALTER TABLE message ADD COLUMN something_new TEXT")
    connection.close()


async def test_a_newer_layout_that_says_so_is_used_by_the_version_before(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    await spool.accept(envelope, CONTENT, [make_row()])
    await spool.close()
    set_layout(folder, 4, 3)
    spool = await open_durable(folder, clock)
    assert await spool.load(envelope.message_id) is not None
    await spool.accept(make_envelope(), CONTENT, [make_row()])
    await spool.close()


async def test_a_newer_layout_that_does_not_is_refused_and_left_alone(folder: Path, clock: ManualClock) -> None:
    await (await open_durable(folder, clock)).close()
    set_layout(folder, 4, 4)
    before = (folder / "spool.db").read_bytes()
    with pytest.raises(SpoolError, match="newer version"):
        await open_durable(folder, clock)
    assert (folder / "spool.db").read_bytes() == before
    assert not (folder / "failed").exists()


@pytest.mark.parametrize("layout", [1, 2])
async def test_a_file_of_an_older_layout_is_given_what_it_lacks(folder: Path, clock: ManualClock, layout: int) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    await spool.accept(envelope, CONTENT, [make_row()])
    await spool.close()
    connection = apsw.Connection(str(folder / "spool.db"))
    if layout == 1:
        connection.execute("DROP TABLE submission_key")
    connection.execute("DROP TABLE opening; ALTER TABLE state DROP COLUMN answered")
    connection.close()
    set_layout(folder, layout, 1)
    for former in range(2):
        spool = await open_durable(folder, clock)
        assert spool.salvage is None
        assert len(spool.openings.former) == former
        assert await spool.load(envelope.message_id) is not None
        key = SubmissionKey(uuid.uuid4().bytes * 2, b"c" * 32)
        await spool.accept(replace(make_envelope(), submission_key=key), CONTENT, [make_row()])
        assert spool.submitted(key.key_hash) is not None
        await spool.close()
    connection = apsw.Connection(str(folder / "spool.db"))
    # What this version writes the one before can go on with.
    assert connection.execute("PRAGMA user_version").get == 3
    assert connection.execute("SELECT readable_by FROM state").get == 1
    connection.close()


async def test_keys_that_are_too_old_are_removed_as_new_ones_come(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    for day in range(4):
        keys = [SubmissionKey(bytes([day, number]) * 16, b"c" * 32) for number in range(200)]
        envelopes = [replace(make_envelope(accepted_ms=clock.now_ms), submission_key=key) for key in keys]
        await asyncio.gather(*(spool.accept(envelope, CONTENT, [make_row()]) for envelope in envelopes))
        assert spool._reader._connection.execute("SELECT count(*) FROM submission_key").get == 200
        assert all(spool.submitted(key.key_hash) is not None for key in keys)
        clock.advance(DAY_S)
    await spool.close()


async def test_keys_that_are_too_old_are_swept_where_no_new_ones_come(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    keys: list[SubmissionKey] = []
    for day in range(2):
        keys = [SubmissionKey(bytes([day, number]) * 16, b"c" * 32) for number in range(250)]
        envelopes = [replace(make_envelope(accepted_ms=clock.now_ms), submission_key=key) for key in keys]
        await asyncio.gather(*(spool.accept(envelope, CONTENT, [make_row()]) for envelope in envelopes))
        assert await spool.forget_keys() == 0
        clock.advance(DAY_S / 2)
    before = spool._commits.commits
    assert await spool.forget_keys() == 250
    assert spool._commits.commits - before == 3, "no commit removes many of them, and there is none without need"
    assert spool.submitted(keys[0].key_hash) is not None
    clock.advance(DAY_S / 2)
    assert await spool.forget_keys() == 250
    await spool.close()


async def test_a_crash_while_the_file_was_made_is_no_harm(folder: Path, clock: ManualClock) -> None:
    folder.mkdir()
    (folder / "spool.db").touch()
    spool = await open_durable(folder, clock)
    await spool.accept(make_envelope(), CONTENT, [make_row()])
    await spool.close()


async def test_free_pages_are_given_back_after_a_queue_has_drained(folder: Path, clock: ManualClock) -> None:
    limits = SpoolLimits(checkpoint_bytes=200_000, vacuum_pages=50)
    spool = await open_durable(folder, clock, limits=limits)
    envelopes = [make_envelope() for _ in range(1_000)]
    await asyncio.gather(*(spool.accept(envelope, CONTENT, [make_row()]) for envelope in envelopes))
    for start in range(0, 1_000, 20):
        part = envelopes[start : start + 20]
        sent = (settlement(envelope.message_id, [change(make_row(), State.SENT)]) for envelope in part)
        await asyncio.gather(*(spool.settle(each) for each in sent))
    full_bytes = 1_000 * len(CONTENT)
    for number in range(150):
        await spool.write_record(b"%d" % number * 10_000)
        await spool.acknowledge(number + 1)
    await spool.close()
    assert (folder / "spool.db").stat().st_size < full_bytes


# --- what a restart finds ---


async def test_everything_is_there_after_a_restart(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    waiting, sending, large = make_envelope(), make_envelope(), make_envelope()
    await spool.accept(waiting, CONTENT, [make_row(0), make_row(1, state=State.HELD)])
    await spool.accept(sending, CONTENT, [make_row(state=State.SENDING, attempt=1)])
    await spool.accept(large, LARGE, [make_row()])
    await spool.settle(settlement(waiting.message_id, [], b"one", reported=True))
    await spool.write_record(b"two")
    await spool.acknowledge(1)
    before = await spool.stats()
    await spool.close()

    spool = await open_durable(folder, clock)
    after = await spool.stats()
    assert after._replace(database_bytes=0, wal_bytes=0, commits=0) == before._replace(
        database_bytes=0, wal_bytes=0, commits=0
    )
    stored = await spool.load(large.message_id)
    assert stored is not None
    assert stored.content == LARGE
    stored = await spool.load(waiting.message_id)
    assert stored is not None
    assert (stored.envelope, stored.reported) == (waiting, True)
    assert await spool.unreported(10) == [sending.message_id, large.message_id]
    assert await spool.records(0, 10, 1_000) == (1, [b"one", b"two"])
    assert await spool.write_record(b"three") == 3
    await spool.close()


async def test_attempts_of_a_former_incarnation_are_interrupted_until_they_are_settled(
    folder: Path, clock: ManualClock
) -> None:
    spool = await open_durable(folder, clock)
    row = make_row(state=State.SENDING, attempt=1)
    handed_on, claimed = make_envelope(), make_envelope()
    await spool.accept(handed_on, CONTENT, [row, make_row(1, state=State.SENDING, attempt=1)])
    await spool.accept(claimed, CONTENT, [make_row()])
    claim = change(make_row(), State.SENDING, new_attempt=1)
    await spool.settle(settlement(claimed.message_id, [claim]))
    assert await spool.interrupted() == []
    await spool.close()

    spool = await open_durable(folder, clock)
    new = make_envelope()
    await spool.accept(new, CONTENT, [row])
    assert await spool.interrupted() == [handed_on.message_id, claimed.message_id]
    await spool.settle(settlement(claimed.message_id, [change(row, State.QUEUED)]))
    assert await spool.interrupted() == [handed_on.message_id]
    await spool.close()


async def test_many_interrupted_messages_are_all_found(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    envelopes = [make_envelope() for _ in range(1_201)]
    rows = [make_row(index, state=State.SENDING, attempt=1) for index in range(2)]
    await asyncio.gather(*(spool.accept(envelope, b"", rows) for envelope in envelopes))
    await spool.close()
    spool = await open_durable(folder, clock)
    assert await spool.interrupted() == [envelope.message_id for envelope in envelopes]
    await spool.close()


async def test_the_tail_counts_from_the_restart(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    for number in range(3):
        await spool.write_record(b"%d" % number)
    await spool.acknowledge(3)
    await spool.close()
    clock.advance(10_000)
    spool = await open_durable(folder, clock)
    await spool.acknowledge(3)
    assert (await spool.stats()).outbox_first == 1
    clock.advance(601)
    await spool.acknowledge(3)
    assert (await spool.stats()).outbox_first == 4
    await spool.close()
    spool = await open_durable(folder, clock)
    assert await spool.write_record(b"numbers go on in an empty outbox") == 4
    await spool.close()


async def test_a_mark_taken_back_in_the_midst_of_trimming_keeps_what_is_above_it(
    folder: Path, clock: ManualClock
) -> None:
    spool = await open_durable(folder, clock)
    for number in range(1, 101):
        await spool.write_record(b"%d" % number)
    await spool.acknowledge(100)
    clock.advance(700)
    await spool.acknowledge(100)
    assert (await spool.stats()).outbox_first == 65, "so many at a time"
    await spool.acknowledge(70)
    for _ in range(3):
        await spool.acknowledge(70)
    assert await spool.records(70, 100, 1_000) == (71, [b"%d" % number for number in range(71, 101)])
    await spool.close()


# --- contents ---


async def test_contents_above_the_threshold_lie_in_files_until_they_are_settled(
    folder: Path, clock: ManualClock
) -> None:
    spool = await open_durable(folder, clock)
    small, large = make_envelope(), make_envelope()
    await spool.accept(small, b"x" * 65_536, [make_row()])
    await spool.accept(large, b"x" * 65_537, [make_row(0), make_row(1)])
    assert [path.name for path in (folder / "content").iterdir()] == [large.message_id.hex()]
    await spool.settle(settlement(large.message_id, [change(make_row(0), State.SENT)]))
    assert len(list((folder / "content").iterdir())) == 1
    await spool.settle(settlement(large.message_id, [change(make_row(1), State.SENT)], b"", reported=True))
    await spool.close()
    assert list((folder / "content").iterdir()) == []


async def test_the_same_id_twice_does_not_touch_the_first_content(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    await spool.accept(envelope, LARGE, [make_row()])
    for content in (b"z" * 100_000, b"short"):
        with pytest.raises(SpoolError):
            await spool.accept(envelope, content, [make_row()])
    first = spool.accept(other := make_envelope(), LARGE, [make_row()])
    with pytest.raises(SpoolError):
        await spool.accept(other, LARGE, [make_row()])
    await first
    for message_id in (envelope.message_id, other.message_id):
        stored = await spool.load(message_id)
        assert stored is not None
        assert stored.content == LARGE
    await spool.close()


async def test_a_file_is_no_orphan_before_its_row_is_committed_nor_while_it_is_removed(
    folder: Path, clock: ManualClock
) -> None:
    spool = await open_durable(folder, clock)
    message_id = make_id()
    storing = spool.accept(make_envelope(message_id), b"submitted to the commit at once", [make_row()])
    assert (storing.done(), spool._is_orphan(message_id)) == (False, False)
    await storing
    assert not spool._is_orphan(message_id)
    await spool.settle(settlement(message_id, [change(make_row(), State.SENT)], b"", reported=True))
    assert spool._is_orphan(message_id)
    removing = spool._remove_files([message_id])
    assert not spool._is_orphan(message_id)
    await removing
    await spool.close()


async def test_orphans_are_swept_by_age_and_owned_files_never(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    await spool.accept(envelope, LARGE, [make_row()])
    orphan = folder / "content" / make_id().hex()
    orphan.write_bytes(b"left by a crash")
    stranger = folder / "content" / "README"
    stranger.write_bytes(b"not ours")
    clock.now_ms = int(orphan.stat().st_mtime * 1_000) + 60_000
    assert await spool.sweep() == 0
    clock.now_ms = FAR_FUTURE_MS
    assert await spool.sweep() == 1
    assert {path.name for path in (folder / "content").iterdir()} == {envelope.message_id.hex(), "README"}
    await spool.close()


async def test_opening_sweeps(folder: Path, clock: ManualClock) -> None:
    await (await open_durable(folder, clock)).close()
    orphan = folder / "content" / make_id().hex()
    orphan.write_bytes(b"left by a crash")
    clock.now_ms = FAR_FUTURE_MS
    spool = await open_durable(folder, clock)
    for _ in range(1_000):
        if not orphan.exists():
            break
        await spool.write_record(b"turn")
    assert not orphan.exists()
    await spool.close()


# --- queries ---


PLANS = {
    reader.KEYS: ("", 10),
    reader.HEADS: (KEY, 0, 0, b"", 0, 10),
    reader.UNREPORTED: (10,),
    reader.INTERRUPTED: (2, b"", 10),
    reader.OLDEST: (),
    reader.RECORDS: (5,),
    reader.MESSAGE: (b"",),
    reader.RECIPIENTS: (b"",),
    reader.ENVELOPE: (b"",),
    reader.WALK: (b"", 0, b"", 10),
    reader.IS_UNREPORTED: (b"",),
    reader.OWNS_CONTENT: (b"",),
}


@pytest.mark.parametrize("sql", PLANS)
async def test_no_query_scans_a_table_or_sorts(folder: Path, clock: ManualClock, sql: str) -> None:
    spool = await open_durable(folder, clock)
    plan = [str(row[3]) for row in spool._reader._connection.execute(f"EXPLAIN QUERY PLAN {sql}", PLANS[sql])]
    walks = [
        step
        for step in plan
        if ("SCAN" in step and "USING COVERING INDEX" not in step and step not in _HARMLESS) or "TEMP B-TREE" in step
    ]
    assert walks == [], plan
    await spool.close()


# The recursion's own rows, the constant row, and a table read from its beginning up to the limit.
_HARMLESS = {"SCAN key", "SCAN CONSTANT ROW", "SCAN unreported"}


async def steps_of(spool: SqliteSpool, sql: str, bindings: tuple[object, ...]) -> int:
    """How many instructions of SQLite's machine a query takes: proof that needs no clock."""
    count = 0

    def note() -> bool:
        nonlocal count
        count += 1
        return False

    connection = spool._reader._connection
    connection.set_progress_handler(note, 1)
    connection.execute(sql, bindings).fetchall()
    connection.set_progress_handler(None)
    return count


async def test_startup_reads_heads_of_keys_never_rows(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    keys = [f"accounts/demo\tprovider-{number}" for number in range(3)]
    queries: list[tuple[str, tuple[object, ...]]] = [
        (reader.KEYS, ("", 100)),
        (reader.HEADS, (keys[1], -(1 << 62), 0, b"", 0, 2)),
        (reader.UNREPORTED, (2,)),
        (reader.INTERRUPTED, (2, b"", 2)),
        (reader.OLDEST, ()),
    ]
    steps: list[list[int]] = []
    for count in (5, 500):
        for _ in range(count):
            rows = [make_row(index, queue_key=key) for index, key in enumerate(keys)]
            spool.accept(make_envelope(), b"", rows)
        await spool.write_record(b"all are stored")
        steps.append([await steps_of(spool, sql, bindings) for sql, bindings in queries])
    few, many = steps
    assert all(later <= earlier + 5 for earlier, later in zip(few, many, strict=True)), steps
    await spool.close()


async def test_a_cursor_deep_in_a_key_is_found_without_walking_there(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    envelopes = [make_envelope() for _ in range(500)]
    await asyncio.gather(*(spool.accept(envelope, b"", [make_row()]) for envelope in envelopes))
    deep = await steps_of(spool, reader.HEADS, (KEY, NOW_MS, 0, envelopes[-3].message_id, 0, 2))
    shallow = await steps_of(spool, reader.HEADS, (KEY, NOW_MS, 0, envelopes[2].message_id, 0, 2))
    assert abs(deep - shallow) <= 20
    after = Cursor(NOW_MS, 0, envelopes[-2].message_id, 0)
    assert [due.message_id for due in await spool.heads(KEY, after, 5)] == [envelopes[-1].message_id]
    await spool.close()


async def test_no_read_is_left_open_so_none_holds_the_wal(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock, limits=SpoolLimits(checkpoint_bytes=100_000))
    for number in range(100):
        await spool.accept(make_envelope(), CONTENT, [make_row()])
        await spool.write_record(b"%d" % number * 1_000)
        await spool.records(0, 2, 1_000)
        await spool.heads(KEY, None, 1)
        await spool.keys()
    assert (await spool.stats()).wal_bytes < 400_000
    await spool.close()


# --- operators ---


OPERATOR = """
import json, sqlite3, sys
connection = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
connection.row_factory = sqlite3.Row
print(json.dumps([dict(row) for row in connection.execute("SELECT * FROM waiting ORDER BY message, recipient")]))
"""


async def test_an_operator_reads_the_queue_while_it_is_in_use(folder: Path, clock: ManualClock) -> None:
    spool = await open_durable(folder, clock)
    envelope = make_envelope()
    await spool.accept(envelope, CONTENT, [make_row(0, priority=4), make_row(2, state=State.HELD)])
    command = [sys.executable, "-c", OPERATOR, str(folder / "spool.db")]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert json.loads(output) == [
        {
            "message": envelope.message_id.hex(),
            "account": "accounts/demo",
            "sender": "app@example.com",
            "recipient": f"user{index}@example.net",
            "state": state,
            "attempt": 0,
            "due": "2026-09-21 14:13:20",
            "priority": priority,
            "queue_key": KEY.replace("\t", " "),
            "content_bytes": len(CONTENT),
        }
        for index, state, priority in [(0, "queued", 4), (2, "held", 0)]
    ]
    await spool.close()


def test_terminal_states_have_the_highest_numbers() -> None:
    assert {state for state in State if state >= min(TERMINAL)} == TERMINAL
