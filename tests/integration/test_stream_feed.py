"""The change feed and the leader's lock on a PostgreSQL that cuts their connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

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
