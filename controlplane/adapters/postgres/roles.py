"""The three roles that Postroad's PostgreSQL needs, and how they come to be.

Contract. `ensure_roles(dsn, passwords)` connects as a superuser (or, on a managed PostgreSQL, as a role with CREATEROLE
that owns the database), makes the roles that are missing, sets the passwords that are given and lets the owner create
the schema in that database. It may be called again at any time and takes nothing away. A role without a password cannot
log in over the network.

    role             does
    postroad_owner   owns schema `postroad` and runs migrations; serves nothing
    postroad_api     the public API: sees the rows of one account, or all after an operator was authorised
    postroad_fleet   ledger ingest, config stream, jobs: its own policies on what nodes report and receive

None of them has BYPASSRLS. Where the database is managed by somebody else, the same is done by hand:
`CREATE ROLE … LOGIN NOBYPASSRLS PASSWORD …` three times, and `GRANT CREATE, CONNECT ON DATABASE … TO postroad_owner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import asyncpg

OWNER = "postroad_owner"
API = "postroad_api"
FLEET = "postroad_fleet"
ROLES = (OWNER, API, FLEET)


async def ensure_roles(dsn: str, passwords: Mapping[str, str] | None = None) -> None:
    """Make the roles and set the passwords given by role name; asyncpg's errors when the caller may not."""
    connection = await asyncpg.connect(dsn)
    try:
        await make_roles(connection, passwords or {})
    finally:
        await connection.close()


async def make_roles(connection: asyncpg.Connection[Any], passwords: Mapping[str, str]) -> None:
    """As `ensure_roles`, on a connection that is open."""
    for role in ROLES:
        await _make_role(connection, role)
        if role in passwords:
            await connection.execute(f"ALTER ROLE {role} PASSWORD {await _literal(connection, passwords[role])}")
    database = await connection.fetchval("SELECT quote_ident(current_database())")
    await connection.execute(f"GRANT CREATE, CONNECT ON DATABASE {database} TO {OWNER}")
    await connection.execute(f"GRANT CONNECT ON DATABASE {database} TO {API}, {FLEET}")


async def _make_role(connection: asyncpg.Connection[Any], role: str) -> None:
    if await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", role):
        return
    try:
        await connection.execute(f"CREATE ROLE {role} LOGIN NOBYPASSRLS")
    except (asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError):
        # Another process makes the same roles at this moment; they belong to the whole server.
        return


async def _literal(connection: asyncpg.Connection[Any], text: str) -> str:
    # ALTER ROLE takes no parameters.
    return str(await connection.fetchval("SELECT quote_literal($1::text)", text))
