"""The change feed and the leader's lock on a PostgreSQL that cuts their connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

import asyncpg
import pytest

from controlplane.adapters.postgres.feed import ChangeFeed
from controlplane.adapters.postgres.leader import PostgresJobs, PostgresLeadership
from controlplane.domain.errors import UnavailableError
from support.databases import Database
from support.fleet import NOW, execute, fetch, fleet_database, role_dsn
from support.nodes_port import until


class Scans:
    """Counts scans; the next ones fail while `failure` is set."""

    def __init__(self) -> None:
        self.count = 0
        self.failure: Exception | None = None

    async def __call__(self) -> None:
        self.count += 1
        if self.failure is not None:
            raise self.failure

    def more_than(self, count: int) -> Callable[[], bool]:
        return lambda: self.count > count


@asynccontextmanager
async def _feed(database: Database, scans: Scans, poll_s: float) -> AsyncIterator[ChangeFeed]:
    feed = ChangeFeed(await role_dsn(database, "postroad_fleet"), scans, poll_s=poll_s)
    task = asyncio.create_task(feed.run())
    try:
        yield feed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _cut(database: Database, application: str) -> int:
    rows = await fetch(
        database,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1 AND datname = $2",
        application,
        database.name,
    )
    return len(rows)


@pytest.mark.parametrize("channel", ["postroad_config", "postroad_denials", "postroad_commands"])
async def test_a_hint_causes_a_scan_at_once(migrated_database: Database, channel: str) -> None:
    scans = Scans()
    async with _feed(migrated_database, scans, poll_s=60):
        await until(scans.more_than(0))

        await execute(migrated_database, f"NOTIFY {channel}")

        await until(scans.more_than(1))


async def test_a_listener_that_was_cut_listens_again_and_scans_what_it_missed(migrated_database: Database) -> None:
    scans = Scans()
    async with _feed(migrated_database, scans, poll_s=60):
        await until(scans.more_than(0))

        assert await _cut(migrated_database, "postroad-feed") == 1
        await until(scans.more_than(1))

        await execute(migrated_database, "NOTIFY postroad_config")
        await until(scans.more_than(2))


async def test_without_any_hint_it_polls(migrated_database: Database) -> None:
    scans = Scans()
    async with _feed(migrated_database, scans, poll_s=0.02):
        await until(scans.more_than(5))


@pytest.mark.parametrize("failure", [RuntimeError("bad row"), ConnectionError()])
async def test_a_scan_that_fails_does_not_end_the_feed(migrated_database: Database, failure: Exception) -> None:
    scans = Scans()
    scans.failure = failure
    async with _feed(migrated_database, scans, poll_s=0.02) as feed:
        await until(scans.more_than(3))
        late = feed.seconds_since_success()
        scans.failure = None
        await until(lambda: feed.seconds_since_success() < late)


async def test_one_process_leads_and_another_takes_over_when_its_connection_dies(
    migrated_database: Database,
) -> None:
    dsn = await role_dsn(migrated_database, "postroad_fleet")
    first, second = PostgresLeadership(dsn), PostgresLeadership(dsn)
    try:
        assert await first.acquire()
        assert not await second.acquire()
        assert await first.is_held()

        await _cut(migrated_database, "postroad-leader")

        assert not await first.is_held()
        await until(second.acquire)
        assert not await first.acquire()
    finally:
        await first.release()
        await second.release()


async def test_jobs_make_and_drop_partitions(migrated_database: Database) -> None:
    async def days() -> list[str]:
        rows = await fetch(
            migrated_database,
            """
            SELECT child.relname FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
            WHERE inhparent = 'postroad.messages'::regclass ORDER BY 1
            """,
        )
        return [row["relname"] for row in rows]

    async with fleet_database(migrated_database) as database:
        jobs = PostgresJobs(database)
        today = NOW.date()
        await jobs.ensure_partitions(today - timedelta(days=40), 2)
        await jobs.ensure_partitions(today - timedelta(days=1), 5)
        await jobs.ensure_partitions(today - timedelta(days=1), 5)
        assert len(await days()) == 7

        assert await jobs.drop_partitions(today - timedelta(days=30)) == 6
        assert len(await days()) == 5


async def test_old_revisions_go_in_batches_and_the_current_one_stays(migrated_database: Database) -> None:
    async def revisions() -> list[tuple[str, int]]:
        rows = await fetch(migrated_database, "SELECT bundle, revision FROM postroad.config_revisions ORDER BY 1, 2")
        return [(row["bundle"], row["revision"]) for row in rows]

    for bundle, current, content in [("deleted", 4, None), ("quiet", 3, b"x"), ("young", 3, b"x")]:
        await execute(
            migrated_database,
            """
            INSERT INTO postroad.config_bundles (node_pool, bundle, kind, revision, hash, content)
            VALUES ('default', $1, 2, $2, $3, $4)
            """,
            *(bundle, current, content and bytes(32), content),
        )
        await execute(
            migrated_database,
            """
            INSERT INTO postroad.config_revisions (
                node_pool, bundle, revision, kind, hash, content, principal, create_time
            )
            SELECT 'default', $1, n, 2, $2, 'x', 'test', $3 FROM generate_series(1, 3) AS n
            """,
            *(bundle, bytes(32), NOW - timedelta(days=29 if bundle == "young" else 31)),
        )
    # Of the same name and revision as the current one, but of another pool, that has none.
    await execute(
        migrated_database,
        """
        INSERT INTO postroad.config_revisions SELECT 'gone', bundle, revision, kind, account, hash, content,
            principal, create_time FROM postroad.config_revisions WHERE bundle = 'quiet' AND revision = 3
        """,
    )

    async with fleet_database(migrated_database) as database:
        jobs, before = PostgresJobs(database), NOW - timedelta(days=30)
        assert [await jobs.delete_config_revisions(before, 4) for _ in range(3)] == [4, 2, 0]

    assert await revisions() == [("quiet", 3), ("young", 1), ("young", 2), ("young", 3)]


async def _add_denials(database: Database, ends: dict[str, datetime | None]) -> None:
    for denial, end in ends.items():
        await execute(
            database, "INSERT INTO postroad.denials (denial, kind, expire_time) VALUES ($1, 2, $2)", denial, end
        )


async def _denials(database: Database) -> tuple[int, list[str]]:
    """Their version, and which there are."""
    (state,) = await fetch(database, "SELECT version FROM postroad.denial_state")
    rows = await fetch(database, "SELECT denial FROM postroad.denials ORDER BY 1")
    return state["version"], [row["denial"] for row in rows]


async def test_denials_that_ended_go_and_move_the_version_once(migrated_database: Database) -> None:
    a_second = timedelta(seconds=1)
    await _add_denials(
        migrated_database, {"a": NOW - a_second, "b": NOW, "c": NOW - 2 * a_second, "d": NOW + a_second, "e": None}
    )
    scans = Scans()
    async with fleet_database(migrated_database) as database, _feed(migrated_database, scans, poll_s=60):
        jobs = PostgresJobs(database)
        await until(scans.more_than(0))

        assert await jobs.delete_denials(NOW, 2) == 2
        first, left = await _denials(migrated_database)
        assert (first > 1, left) == (True, ["b", "d", "e"])
        await until(scans.more_than(1))

        assert await jobs.delete_denials(NOW, 2) == 1
        second, left = await _denials(migrated_database)
        assert (second > first, left) == (True, ["d", "e"])
        assert await jobs.delete_denials(NOW, 2) == 0
        assert await _denials(migrated_database) == (second, left)


async def test_a_denial_that_is_renewed_while_it_is_being_deleted_stays(migrated_database: Database) -> None:
    await _add_denials(migrated_database, {"a": NOW})
    renewal = await asyncpg.connect(migrated_database.dsn())
    try:
        async with fleet_database(migrated_database) as database:
            async with renewal.transaction():
                await renewal.execute("UPDATE postroad.denials SET expire_time = $1", NOW + timedelta(days=31))
                deletion = asyncio.create_task(PostgresJobs(database).delete_denials(NOW, 10))
                await until(lambda: _waits_for_a_lock(migrated_database))
            assert await deletion == 0
    finally:
        await renewal.close()
    assert await _denials(migrated_database) == (1, ["a"])


async def _waits_for_a_lock(database: Database) -> bool:
    sql = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = $1"
    return bool(await fetch(database, sql, database.name))


async def test_a_transaction_that_is_cancelled_leaves_no_trace_on_its_connection(migrated_database: Database) -> None:
    async with fleet_database(migrated_database) as database:
        begun = asyncio.Event()

        async def sleep_inside() -> None:
            async with database.transaction("test") as connection:
                await connection.execute("UPDATE postroad.denial_state SET version = 77")
                begun.set()
                await connection.execute("SELECT pg_sleep(60)")

        task = asyncio.create_task(sleep_inside())
        await begun.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        async with database.transaction("test") as connection:
            assert await connection.fetchval("SELECT version FROM postroad.denial_state") == 1


async def test_a_server_that_does_not_answer_in_time_is_unavailable(migrated_database: Database) -> None:
    async with fleet_database(migrated_database) as database:
        database._transaction_timeout_s = 0.05
        with pytest.raises(UnavailableError):
            async with database.transaction("test") as connection:
                await connection.execute("SELECT pg_sleep(60)")
