"""An old copy of a spool's disk is told from the live one, whatever it did since: real disks, and a real ledger."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from controlplane.adapters.postgres.fleet import PostgresFleet
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.domain.openings import Openings
from controlplane.ports_fleet import Cursor, RawBatch, Refusal, RefusalReason, SpoolOpening, SpoolStatus, Stored
from dataplane.adapters.spool_sqlite import SqliteSpool, openings
from dataplane.spool_folders import is_refused
from postroad.control.v1 import node_service_pb2
from support.databases import Database
from support.fleet import NOW, accept_spools, accepted, add_node, execute, fetch, fleet_database, message_id, text_id
from support.node_process import running
from support.nodes import Fleet, serving_fleet, submit
from support.nodes_port import until
from support.spools import ManualClock, copy_as_it_lies, fail_test, open_durable

NODE = "edge-1"
RECORD = b"no record that anybody can read"


@pytest.fixture
async def ledger(migrated_database: Database) -> AsyncIterator[PostgresLedger]:
    await add_node(migrated_database)
    async with fleet_database(migrated_database) as database:
        yield PostgresLedger(database, retention=timedelta(days=30))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / str(uuid.uuid4())


async def start(disk: Path) -> SqliteSpool:
    return await open_durable(disk, ManualClock())


async def opened(ledger: PostgresLedger, spool: SqliteSpool) -> Cursor | Refusal:
    """What the control plane says when the spool's node opens it on its stream."""
    stats, told = await spool.stats(), spool.openings
    former = tuple((one.id, one.last_record) for one in told.former)
    numbers = (spool.identity.incarnation, stats.acknowledged, stats.outbox_first, stats.outbox_last)
    opening = SpoolOpening(spool.identity.spool, *numbers, Openings(told.present, former))
    return await ledger.open_spool(NODE, opening, NOW)


async def report(ledger: PostgresLedger, spool: SqliteSpool, *, answered: bool = True) -> None:
    """Let the control plane take the spool and all its records; the last answer may be lost."""
    answer = await opened(ledger, spool)
    assert isinstance(answer, Cursor), answer
    first, records = await spool.records(answer.cursor, 1_000, 1 << 20)
    if records:
        stored = await ledger.store(NODE, RawBatch(answer.spool, spool.identity.incarnation, first, records), NOW)
        assert isinstance(stored.answer, Cursor)
        answer = stored.answer
    if answered:
        await spool.acknowledge(answer.cursor)


async def record(spool: SqliteSpool, count: int) -> None:
    for _ in range(count):
        await spool.write_record(RECORD)


async def alone(disk: Path, *, times: int = 1, records: int = 0) -> None:
    """Open the disk so often, and record so much, without its control plane."""
    for number in range(times):
        spool = await start(disk)
        await record(spool, records if number == 0 else 0)
        await spool.close()


async def is_believed(ledger: PostgresLedger, disk: Path) -> bool:
    spool = await start(disk)
    answer = await opened(ledger, spool)
    await spool.close()
    if isinstance(answer, Refusal):
        assert answer.reason is RefusalReason.WENT_BACKWARDS
    return isinstance(answer, Cursor)


async def test_a_copy_that_was_started_as_often_and_recorded_as_much_is_refused(
    ledger: PostgresLedger, disk: Path, tmp_path: Path
) -> None:
    spool = await start(disk)
    await record(spool, 3)
    await report(ledger, spool)
    await spool.close()
    copy = tmp_path / "copy" / disk.name
    shutil.copytree(disk, copy)
    spool = await start(disk)
    await record(spool, 5)
    await report(ledger, spool)
    await spool.close()

    await alone(copy, times=3, records=40)

    assert not await is_believed(ledger, copy)


async def test_a_copy_of_a_disk_in_use_that_recorded_as_much_is_refused(
    ledger: PostgresLedger, disk: Path, tmp_path: Path
) -> None:
    spool = await start(disk)
    await record(spool, 3)
    await report(ledger, spool)
    copy = tmp_path / "copy" / disk.name
    copy_as_it_lies(disk, copy)
    # The live one goes on under the opening that the copy knows.
    await record(spool, 5)
    await report(ledger, spool)
    await spool.close()

    await alone(copy, records=40)

    assert not await is_believed(ledger, copy)


async def test_what_a_refused_copy_says_changes_nothing_for_the_live_disk_once_that_is_accepted(
    ledger: PostgresLedger, migrated_database: Database, disk: Path, tmp_path: Path
) -> None:
    await alone(disk)
    copy = tmp_path / "copy" / disk.name
    shutil.copytree(disk, copy)
    assert await is_believed(ledger, disk)
    assert not await is_believed(ledger, copy)

    assert not await is_believed(ledger, disk)
    await accept_spools(migrated_database)

    assert not await is_believed(ledger, copy)
    await execute(migrated_database, "UPDATE postroad.spools SET accepted = true")
    assert await is_believed(ledger, disk)


@pytest.mark.parametrize("restarted", [False, True], ids=["goes on", "restarted"])
@pytest.mark.parametrize("by", ["ledger", "status"])
async def test_what_a_machine_recorded_that_got_its_memory_back_is_stored_once_it_is_accepted(
    ledger: PostgresLedger, migrated_database: Database, by: str, *, restarted: bool
) -> None:
    spool = str(uuid.uuid4())
    first, second = (bytes([number]) * 16 for number in (1, 2))
    assert await ledger.open_spool(NODE, SpoolOpening(spool, 1, 0, 1, 0, Openings(first)), NOW) == Cursor(spool, 0)
    records = [accepted(message_id()).SerializeToString() for _ in range(6)]
    await ledger.store(NODE, RawBatch(spool, 1, 1, records), NOW)

    # It is of the time of record 1, and recorded two of its own as 2 and 3; the worker starts anew when it is refused.
    incarnation, openings = (2, Openings(second, ((first, 3),))) if restarted else (1, Openings(first))
    opening = SpoolOpening(spool, incarnation, 1, 1, 3, openings)
    if by == "ledger":
        assert isinstance(await ledger.open_spool(NODE, opening, NOW), Refusal)
    else:
        status = SpoolStatus(spool, incarnation, 1, 3, 0, open=True, refused=True, openings=openings)
        async with fleet_database(migrated_database) as database:
            (owner,) = await PostgresFleet(database, lambda _pool, _key, sealed: sealed).report_spools(
                NODE, [status], NOW
            )
        assert not owner.accepted
    await accept_spools(migrated_database)

    assert await ledger.open_spool(NODE, opening, NOW) == Cursor(spool, 1)
    own = [message_id(), message_id()]
    raw = [accepted(raw_id).SerializeToString() for raw_id in own]
    stored = await ledger.store(NODE, RawBatch(spool, incarnation, 2, raw), NOW)
    assert stored == Stored(Cursor(spool, 3), 2, 0)
    rows = await fetch(migrated_database, "SELECT message_id FROM postroad.messages")
    assert len(rows) == 8
    assert {text_id(raw_id) for raw_id in own} <= {row["message_id"] for row in rows}


async def test_restarts_while_the_control_plane_is_away_are_believed(ledger: PostgresLedger, disk: Path) -> None:
    spool = await start(disk)
    await record(spool, 3)
    await report(ledger, spool)
    await spool.close()
    await alone(disk, times=50, records=20)
    assert await is_believed(ledger, disk)


async def test_restarts_after_an_answer_that_was_lost_are_believed(ledger: PostgresLedger, disk: Path) -> None:
    await alone(disk, times=30)
    spool = await start(disk)
    await record(spool, 3)
    await report(ledger, spool)
    await spool.close()
    spool = await start(disk)
    await record(spool, 3)
    await report(ledger, spool, answered=False)
    await spool.close()
    await alone(disk, times=50)
    assert await is_believed(ledger, disk)


async def test_a_control_plane_that_lost_the_last_openings_believes_the_disk(
    ledger: PostgresLedger, migrated_database: Database, disk: Path
) -> None:
    spool = await start(disk)
    await record(spool, 3)
    await report(ledger, spool)
    await spool.close()
    (former,) = await fetch(migrated_database, "SELECT incarnation, cursor, opening FROM postroad.spools")
    for _ in range(5):
        spool = await start(disk)
        await record(spool, 1)
        await report(ledger, spool)
        await spool.close()
    await execute(migrated_database, "UPDATE postroad.spools SET incarnation = $1, cursor = $2, opening = $3", *former)
    assert await is_believed(ledger, disk)


async def test_a_salvaged_disk_is_the_same_one(ledger: PostgresLedger, disk: Path) -> None:
    spool = await start(disk)
    await record(spool, 3)
    await report(ledger, spool)
    await spool.close()
    (disk / "failed").write_text("a test says so")
    assert await is_believed(ledger, disk)


async def test_openings_are_kept_as_long_as_somebody_may_ask_for_them(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openings, "UNANSWERED_KEPT", 30)
    kept = openings.ANSWERED_KEPT
    ids: list[bytes] = []

    async def known(*, answered: bool = False) -> list[bytes]:
        spool = await start(disk)
        ids.append(spool.openings.present)
        if answered:
            await spool.acknowledge(0)
        former = [one.id for one in spool.openings.former]
        await spool.close()
        return former

    for _ in range(20):
        await known(answered=True)
    answered_ids = ids[-kept:]
    for _ in range(40):
        await known()
    # All that are answered, and of the others the newest.
    assert await known() == answered_ids + ids[:-1][-30:]
    assert len(set(ids)) == len(ids)
    await known(answered=True)
    assert await known() == ids[:-1][-kept:]


@pytest.fixture
async def fleet(migrated_database: Database, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with serving_fleet(migrated_database, tmp_path) as made:
        yield made


@pytest.mark.timeout(300)
async def test_a_node_sends_nothing_from_a_copy_that_caught_up_until_it_is_accepted(fleet: Fleet) -> None:
    settings = await fleet.node("mx1")
    async with running(settings) as node:
        await fleet.in_use("mx1")
        await fleet.provider("Suspend")
        await submit(node, ["one", "two"])
        assert await node.stop() == 0
    (disk,) = (settings.parent / "data" / "spool").iterdir()
    copy = fleet.folder / "copy" / disk.name
    shutil.copytree(disk, copy)
    async with running(settings) as node:
        await fleet.in_use("mx1")
        await fleet.provider("Resume")
        await fleet.arrive(2)
        await fleet.all_sent(2)
        assert await node.stop() == 0
    assert sorted(fleet.arrived.elements()) == ["one", "two"]
    shutil.rmtree(disk)
    shutil.copytree(copy, disk)
    for _ in range(2):
        spool = await SqliteSpool.open(disk, "nodes/mx1", ManualClock(), on_failed=fail_test)
        await record(spool, 50)
        await spool.close()
    async with running(settings) as node:
        await until(lambda: is_refused(disk), 60)
        assert fleet.nothing_came()
        (spool_row,) = (await fleet.get("mx1")).spools
        assert not spool_row.accepted
        request = node_service_pb2.AcceptSpoolRequest(name="nodes/mx1", spool=disk.name)
        await fleet.client.nodes.AcceptSpool(request)
        await until(lambda: not is_refused(disk), 60)
        # Then the operator has his way: what waits on the copy goes out.
        await fleet.arrive(4)
        assert await node.stop() == 0
    assert fleet.arrived == {"one": 2, "two": 2}
