"""The stack's database on its own PostgreSQL: database `postroad`, and the three roles with passwords of their own.

Contract. `prepare_database` may be called at any time again and takes nothing away. The control plane serves as
`postroad_api` and `postroad_fleet` and migrates as `postroad_owner`; none of them is a superuser or may pass over
row-level security. The superuser's password never leaves this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import asyncpg

from postroad.localstack.postgres import PostgresServer

DATABASE = "postroad"
OWNER, API, FLEET = ROLES = ("postroad_owner", "postroad_api", "postroad_fleet")


async def prepare_database(server: PostgresServer, passwords: Mapping[str, str]) -> None:
    """Make what is missing and set the roles' passwords; asyncpg's errors when the server refuses."""
    connection = await asyncpg.connect(server.dsn())
    try:
        for role in ROLES:
            await _make_role(connection, role, passwords[role])
        if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
            await connection.execute(f"CREATE DATABASE {DATABASE} OWNER {OWNER}")
    finally:
        await connection.close()


async def forget_first_key(server: PostgresServer) -> None:
    """Delete the operator's key that a bootstrap made and nobody has seen: it was cut off before it could be kept."""
    connection = await asyncpg.connect(server.dsn(database=DATABASE))
    try:
        await connection.execute("DELETE FROM postroad.api_keys WHERE account IS NULL AND api_key = 'bootstrap'")
    finally:
        await connection.close()


async def _make_role(connection: asyncpg.Connection[Any], role: str, password: str) -> None:
    known = await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", role)
    # These statements take no parameters; the server itself quotes the password.
    literal = await connection.fetchval("SELECT quote_literal($1::text)", password)
    await connection.execute(
        f"{'ALTER' if known else 'CREATE'} ROLE {role} LOGIN NOSUPERUSER NOBYPASSRLS PASSWORD {literal}"
    )
