"""Databases for tests: migrated once into a template, then cloned for each test in a few milliseconds.

Everything here is synchronous, so that fixtures serve sync tests (Hypothesis machines) and async ones on any
loop; each call runs asyncpg on a short-lived loop of its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import asyncpg

from postroad.localstack import PostgresServer

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Database:
    """One database on the tests' PostgreSQL."""

    name: str
    server: PostgresServer

    def dsn(self, user: str = "postgres", password: str | None = None) -> str:
        """Where to connect; as the superuser unless another role is named (with its password)."""
        return self.server.dsn(user, self.name, password=password)


def create_database(server: PostgresServer, template: str = "template1") -> Database:
    """A new database, a copy of `template`."""
    name = f"test_{next(_numbers)}"
    execute(server, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    return Database(name, server)


def drop_database(database: Database) -> None:
    """Drop it, whoever is still connected."""
    execute(database.server, f'DROP DATABASE IF EXISTS "{database.name}" WITH (FORCE)')


def create_migrated_template(server: PostgresServer) -> str:
    """A database with all migrations applied that nobody can connect to; returns its name."""
    database = create_database(server)
    run(_migrate(database.dsn()))
    execute(server, f'ALTER DATABASE "{database.name}" WITH ALLOW_CONNECTIONS false')
    return database.name


async def _migrate(dsn: str) -> None:
    from controlplane.adapters.postgres.migrate import migrate_up

    await migrate_up(dsn)


def execute(server: PostgresServer, statement: str) -> None:
    """Run one statement as the superuser, outside a transaction."""
    run(_execute(server.dsn(), statement))


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on a loop of its own, leaving the thread's current loop alone."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(work)
