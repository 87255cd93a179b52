"""Applies `migrations/NNNN_<pre|post>_<what>.{up,down}.sql` to a database, and says where it stands.

Contract. Each function takes a DSN of `postroad_owner`, or of a superuser, who then makes the roles that are
missing and steps down to `postroad_owner` before anything is created. One runner works at a time: a session advisory
lock on a direct connection (not through a transaction pooler), taken by polling the try form, because a runner that
blocks in the waiting form holds a snapshot and deadlocks with an index built concurrently. One transaction per file,
unless its first line is `-- no-transaction`. Applied files never change: another checksum than the stored one is
refused before anything runs.

    on failure       what is left
    in a file        that file is undone, the ones before it are applied; no-transaction files must be repeatable
    lock not had     nothing was done; MigrationError after 60 s
    cancelled        as "in a file"; the lock goes with the connection
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import asyncpg

from controlplane.adapters.postgres.roles import OWNER, make_roles

# What this code can serve; `schema_compat.oldest_code` names the least that may.
CODE_SCHEMA_VERSION = 1

_ADVISORY_LOCK = 0x706F7374726F6164  # "postroad"
_LOCK_WAIT_S = 60.0
_LOCK_POLL_S = 0.1
_NAME = re.compile(r"(\d{4})_(pre|post)_[a-z0-9_]+")
_NO_TRANSACTION = "-- no-transaction"
_TABLE = """
CREATE TABLE postroad.schema_migrations (
    number integer NOT NULL,
    name text NOT NULL,
    checksum bytea NOT NULL,
    duration_ms bigint NOT NULL,
    apply_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT pk_schema_migrations PRIMARY KEY (number)
)"""


class MigrationError(Exception):
    """The migrations and the database do not fit together; the text says how."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One pair of files."""

    number: int
    name: str
    up_sql: str
    down_sql: str

    @property
    def checksum(self) -> bytes:
        """SHA-256 over both files."""
        return hashlib.sha256(f"{self.up_sql}\0{self.down_sql}".encode()).digest()


@dataclass(frozen=True, slots=True)
class Applied:
    """One row of schema_migrations."""

    number: int
    name: str
    checksum: bytes
    duration_ms: int
    apply_time: datetime


def migrations_folder() -> Path:
    """Where the files lie: inside an installed wheel, or in the repository."""
    installed = Path(str(files("controlplane"))) / "_migrations"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "migrations"


def load_migrations(folder: Path | None = None) -> list[Migration]:
    """Read all pairs in order; MigrationError for a bad name, a gap in the numbers or a missing half."""
    folder = folder or migrations_folder()
    migrations: list[Migration] = []
    for up in sorted(folder.glob("*.up.sql")):
        name = up.name.removesuffix(".up.sql")
        down = folder / f"{name}.down.sql"
        match = _NAME.fullmatch(name)
        if match is None or not down.is_file() or int(match[1]) != len(migrations) + 1:
            raise MigrationError(f"{up.name}: wants NNNN_<pre|post>_<what>, numbers without gaps and a .down.sql")
        migrations.append(Migration(int(match[1]), name, up.read_text("utf-8"), down.read_text("utf-8")))
    if not migrations:
        raise MigrationError(f"no migrations in {folder}")
    return migrations


async def migrate_up(dsn: str, folder: Path | None = None, *, to: int | None = None) -> list[str]:
    """Apply what is missing, up to number `to` when given; returns the names applied."""
    migrations = load_migrations(folder)
    async with _runner(dsn) as connection:
        applied = await _applied(connection)
        _refuse_differences(migrations, applied)
        wanted = [one for one in migrations[len(applied) :] if to is None or one.number <= to]
        for migration in wanted:
            await _apply(connection, migration)
    return [one.name for one in wanted]


async def migrate_down(dsn: str, folder: Path | None = None, *, to: int) -> list[str]:
    """Undo everything above number `to`, newest first; returns the names undone."""
    migrations = load_migrations(folder)
    async with _runner(dsn) as connection:
        applied = await _applied(connection)
        _refuse_differences(migrations, applied)
        wanted = [migrations[row.number - 1] for row in reversed(applied) if row.number > to]
        for migration in wanted:
            await _undo(connection, migration)
    return [one.name for one in wanted]


async def migration_status(dsn: str, folder: Path | None = None) -> list[tuple[Migration, Applied | None]]:
    """Every migration with the row that says it was applied; takes no lock."""
    migrations = load_migrations(folder)
    connection = await asyncpg.connect(dsn)
    try:
        applied = {row.number: row for row in await _applied(connection)}
    finally:
        await connection.close()
    return [(one, applied.get(one.number)) for one in migrations]


async def verify(dsn: str, folder: Path | None = None) -> list[str]:
    """What keeps this code from serving this database, in words; empty when nothing does."""
    migrations = load_migrations(folder)
    connection = await asyncpg.connect(dsn)
    try:
        return await schema_problems(connection, migrations)
    finally:
        await connection.close()


async def schema_problems(connection: asyncpg.Connection[Any], migrations: list[Migration]) -> list[str]:
    """As `verify`, on a connection that is open; any of the three roles may ask."""
    applied = await _applied(connection)
    problems = _differences(migrations, applied)
    problems += [f"{one.name} is not applied: run `migrate up`" for one in migrations[len(applied) :]]
    if await connection.fetchval("SELECT to_regclass('postroad.schema_compat') IS NOT NULL"):
        oldest = await connection.fetchval("SELECT oldest_code FROM postroad.schema_compat")
        if oldest > CODE_SCHEMA_VERSION:
            problems.append(f"the schema wants code of version {oldest} or newer, this is {CODE_SCHEMA_VERSION}")
    return problems


@asynccontextmanager
async def _runner(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(dsn)
    try:
        await _take_lock(connection)
        await _prepare(connection)
        yield connection
    finally:
        await connection.close(timeout=10)


async def _take_lock(connection: asyncpg.Connection[Any]) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _ADVISORY_LOCK):
        if time.monotonic() > deadline:
            raise MigrationError("another runner holds the migration lock")
        await asyncio.sleep(_LOCK_POLL_S)


async def _prepare(connection: asyncpg.Connection[Any]) -> None:
    if await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"):
        await make_roles(connection, {})
        await connection.execute(f"SET ROLE {OWNER}")
    user = await connection.fetchval("SELECT current_user")
    if user != OWNER:
        raise MigrationError(f"migrations run as {OWNER} or as a superuser, not as {user}")
    if await connection.fetchval("SELECT to_regnamespace('postroad') IS NULL"):
        await connection.execute("CREATE SCHEMA postroad")
    if await connection.fetchval("SELECT to_regclass('postroad.schema_migrations') IS NULL"):
        await connection.execute(_TABLE)


async def _applied(connection: asyncpg.Connection[Any]) -> list[Applied]:
    try:
        rows = await connection.fetch(
            "SELECT number, name, checksum, duration_ms, apply_time FROM postroad.schema_migrations ORDER BY number"
        )
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError, asyncpg.InsufficientPrivilegeError):
        # Before the first migration there is no table, or nobody was allowed to read it yet.
        return []
    return [Applied(*row) for row in rows]


def _differences(migrations: list[Migration], applied: list[Applied]) -> list[str]:
    known = {one.number: one for one in migrations}
    problems = []
    for row in applied:
        if row.number not in known:
            problems.append(f"{row.name} was applied and is not known to this code")
        elif known[row.number].checksum != row.checksum:
            problems.append(f"{row.name} was changed after it was applied")
    return problems


def _refuse_differences(migrations: list[Migration], applied: list[Applied]) -> None:
    problems = _differences(migrations, applied)
    if problems:
        raise MigrationError("; ".join(problems))


async def _apply(connection: asyncpg.Connection[Any], migration: Migration) -> None:
    begun = time.monotonic()
    async with _statements(connection, migration.up_sql):
        await connection.execute(
            "INSERT INTO postroad.schema_migrations (number, name, checksum, duration_ms) VALUES ($1, $2, $3, $4)",
            migration.number,
            migration.name,
            migration.checksum,
            round((time.monotonic() - begun) * 1000),
        )


async def _undo(connection: asyncpg.Connection[Any], migration: Migration) -> None:
    async with _statements(connection, migration.down_sql):
        await connection.execute("DELETE FROM postroad.schema_migrations WHERE number = $1", migration.number)


@asynccontextmanager
async def _statements(connection: asyncpg.Connection[Any], sql: str) -> AsyncIterator[None]:
    """Run `sql`, then the body, in one transaction where the file allows it."""
    if sql.startswith(_NO_TRANSACTION):
        await connection.execute("SET lock_timeout = '2s'; SET statement_timeout = 0")
        await connection.execute(sql)
        yield
        return
    async with connection.transaction():
        await connection.execute("SET LOCAL lock_timeout = '2s'; SET LOCAL statement_timeout = '60s'")
        await connection.execute(sql)
        yield
