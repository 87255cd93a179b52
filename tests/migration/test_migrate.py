from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from controlplane.adapters.postgres import migrate
from controlplane.adapters.postgres.migrate import (
    MigrationError,
    load_migrations,
    migrate_down,
    migrate_up,
    migration_status,
    migrations_folder,
    verify,
)
from controlplane.adapters.postgres.roles import API, OWNER, ROLES, ensure_roles
from postroad.localstack import PostgresServer
from support.databases import Database, create_database, drop_database

# What a schema is made of, in words; partitions and the runner's own table aside.
_CATALOG = """
SELECT 'column' AS kind, c.relname || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' '
    || a.attnotnull || ' ' || coalesce(pg_get_expr(d.adbin, d.adrelid), '') AS text
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (c.oid, attnum)
WHERE c.relnamespace = 'postroad'::regnamespace AND attnum > 0 AND NOT attisdropped
UNION ALL SELECT 'constraint', conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'postroad'::regnamespace
UNION ALL SELECT 'index', indexdef FROM pg_indexes WHERE schemaname = 'postroad'
UNION ALL SELECT 'function', p.oid::regprocedure || ' ' || md5(pg_get_functiondef(p.oid)) FROM pg_proc p
WHERE pronamespace = 'postroad'::regnamespace
UNION ALL SELECT 'policy', tablename || ' ' || policyname || ' ' || cmd || ' ' || coalesce(qual, '') FROM pg_policies
UNION ALL SELECT 'trigger', pg_get_triggerdef(t.oid) FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
WHERE c.relnamespace = 'postroad'::regnamespace AND NOT tgisinternal
UNION ALL SELECT 'grant', c.relname || ' ' || coalesce(c.relacl::text, '') FROM pg_class c
WHERE c.relnamespace = 'postroad'::regnamespace AND c.relname <> 'schema_migrations'
ORDER BY 1, 2
"""


async def fetch(dsn: str, sql: str, *arguments: object) -> list[Any]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(sql, *arguments)
    finally:
        await connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the migrations that a test may change."""
    copy = tmp_path / "migrations"
    shutil.copytree(migrations_folder(), copy)
    return copy


async def test_each_migration_can_be_undone_and_done_again(postgres_dsn: str) -> None:
    for migration in load_migrations():
        await migrate_up(postgres_dsn, to=migration.number)
        once = await fetch(postgres_dsn, _CATALOG)
        assert await migrate_down(postgres_dsn, to=migration.number - 1) == [migration.name]
        await migrate_up(postgres_dsn, to=migration.number)
        assert await fetch(postgres_dsn, _CATALOG) == once, migration.name


async def test_undoing_everything_leaves_nothing_but_the_runners_own_table(postgres_dsn: str) -> None:
    applied = await migrate_up(postgres_dsn)
    assert await migrate_down(postgres_dsn, to=0) == applied[::-1]
    left = await fetch(postgres_dsn, "SELECT relname FROM pg_class WHERE relnamespace = 'postroad'::regnamespace")
    assert {row["relname"] for row in left} == {"schema_migrations", "pk_schema_migrations"}
    functions = await fetch(postgres_dsn, "SELECT 1 FROM pg_proc WHERE pronamespace = 'postroad'::regnamespace")
    assert functions == []


async def test_running_again_does_nothing_and_verify_is_content(postgres_dsn: str) -> None:
    before = await verify(postgres_dsn)
    assert all("is not applied" in problem for problem in before)
    assert len(before) == len(load_migrations())
    await migrate_up(postgres_dsn)
    assert await migrate_up(postgres_dsn) == []
    assert await verify(postgres_dsn) == []
    status = await migration_status(postgres_dsn)
    assert all(row is not None and row.duration_ms >= 0 for _, row in status)


async def test_a_file_that_was_changed_after_it_was_applied_is_refused(postgres_dsn: str, folder: Path) -> None:
    await migrate_up(postgres_dsn, folder, to=2)
    file = next(folder.glob("0002_*.down.sql"))
    file.write_text(file.read_text() + "-- another word\n")
    with pytest.raises(MigrationError, match=r"0002_\w+ was changed"):
        await migrate_up(postgres_dsn, folder)
    assert any("was changed" in problem for problem in await verify(postgres_dsn, folder))


async def test_a_migration_that_fails_is_undone_and_the_ones_before_stay(postgres_dsn: str, folder: Path) -> None:
    number = len(load_migrations(folder)) + 1
    name = f"{number:04}_pre_broken"
    (folder / f"{name}.up.sql").write_text("CREATE TABLE postroad.half (); SELECT 1 / 0;")
    (folder / f"{name}.down.sql").write_text("DROP TABLE postroad.half;")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate_up(postgres_dsn, folder)
    assert await fetch(postgres_dsn, "SELECT 1 FROM pg_class WHERE relname = 'half'") == []
    assert await verify(postgres_dsn, folder) == [f"{name} is not applied: run `migrate up`"]


async def test_a_migration_without_transaction_may_build_an_index_concurrently(postgres_dsn: str, folder: Path) -> None:
    number = len(load_migrations(folder)) + 1
    name = f"{number:04}_pre_index"
    index = "CREATE INDEX CONCURRENTLY ix_accounts_display_name ON postroad.accounts (display_name)"
    (folder / f"{name}.up.sql").write_text(f"-- no-transaction\n{index};\n")
    (folder / f"{name}.down.sql").write_text("DROP INDEX postroad.ix_accounts_display_name;\n")
    assert (await migrate_up(postgres_dsn, folder))[-1] == name
    assert await fetch(postgres_dsn, "SELECT 1 FROM pg_class WHERE relname = 'ix_accounts_display_name'")


async def test_two_runners_take_turns(postgres_dsn: str) -> None:
    first, second = await asyncio.gather(migrate_up(postgres_dsn), migrate_up(postgres_dsn))
    assert sorted([*first, *second]) == [one.name for one in load_migrations()]
    assert [] in (first, second)


async def until_a_runner_polls(connection: asyncpg.Connection[Any]) -> None:
    for _ in range(400):
        polls = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND query LIKE '%pg_try_advisory_lock%'"
        )
        if polls:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("no runner came")


async def test_a_runner_that_waits_holds_no_snapshot_against_an_index_build(postgres_dsn: str) -> None:
    await migrate_up(postgres_dsn)
    holder = await asyncpg.connect(postgres_dsn)
    await holder.execute("SELECT pg_advisory_lock($1)", migrate._ADVISORY_LOCK)
    waiting = asyncio.create_task(migrate_up(postgres_dsn))
    await until_a_runner_polls(holder)
    async with asyncio.timeout(20):
        await holder.execute("CREATE INDEX CONCURRENTLY ix_try ON postroad.accounts (display_name)")
    assert not waiting.done()
    await holder.close()
    assert await waiting == []


async def test_a_runner_that_never_gets_the_lock_says_so(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "_LOCK_WAIT_S", 0.0)
    holder = await asyncpg.connect(postgres_dsn)
    await holder.execute("SELECT pg_advisory_lock($1)", migrate._ADVISORY_LOCK)
    with pytest.raises(MigrationError, match="another runner"):
        await migrate_up(postgres_dsn)
    await holder.close()


async def test_code_that_is_too_old_for_the_schema_is_told(postgres_dsn: str) -> None:
    await migrate_up(postgres_dsn)
    await fetch(postgres_dsn, "UPDATE postroad.schema_compat SET oldest_code = 1000")
    assert await verify(postgres_dsn) == ["the schema wants code of version 1000 or newer, this is 1"]


async def test_the_owner_alone_can_migrate_and_others_are_refused(postgres_server: PostgresServer) -> None:
    database: Database = await asyncio.to_thread(create_database, postgres_server)
    try:
        await ensure_roles(database.dsn(), dict.fromkeys(ROLES, "only-for-tests"))
        with pytest.raises(MigrationError, match="not as postroad_api"):
            await migrate_up(database.dsn(API, "only-for-tests"))
        await migrate_up(database.dsn(OWNER, "only-for-tests"))
        assert await verify(database.dsn(API, "only-for-tests")) == []
    finally:
        await asyncio.to_thread(drop_database, database)


@pytest.mark.parametrize("name", ["0001_pre_x.up.sql", "two_pre_x.up.sql", "0002_soon_x.up.sql"])
def test_badly_named_or_half_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("SELECT 1")
    with pytest.raises(MigrationError):
        load_migrations(tmp_path)
