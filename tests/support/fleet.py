"""The fleet's side of the control plane on a test's database: pools of the right role, nodes, records."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg

from controlplane.adapters.postgres.fleet_database import FleetDatabase, open_pool
from controlplane.adapters.postgres.roles import API, FLEET, OWNER, ensure_roles
from postroad.node.v1.ledger_pb2 import (
    AcceptedMessage,
    AttemptEvent,
    EventType,
    LedgerRecord,
    RecipientState,
    RecipientUpdate,
)
from support.databases import Database

PASSWORD = "only-for-tests"
NOW = datetime.now(UTC)
NOW_MS = int(NOW.timestamp() * 1000)


async def role_dsn(database: Database, role: str) -> str:
    """A DSN of one of the three roles on this database."""
    await ensure_roles(database.dsn(), {API: PASSWORD, FLEET: PASSWORD, OWNER: PASSWORD})
    return database.dsn(role, PASSWORD)


@asynccontextmanager
async def fleet_pool(database: Database) -> AsyncIterator[asyncpg.Pool[Any]]:
    pool = await open_pool(await role_dsn(database, FLEET), 4)
    try:
        yield pool
    finally:
        async with asyncio.timeout(10):
            await pool.close()


@asynccontextmanager
async def fleet_database(database: Database) -> AsyncIterator[FleetDatabase]:
    async with fleet_pool(database) as pool:
        yield FleetDatabase(pool)


async def execute(database: Database, sql: str, *arguments: object) -> None:
    """One statement as the superuser."""
    await fetch(database, sql, *arguments)


async def accept_spools(database: Database) -> None:
    """As AcceptSpool does it for one, for every spool that was refused."""
    await execute(
        database,
        """
        UPDATE postroad.spools
        SET accepted = true, incarnation = reported_incarnation, cursor = resume_record, opening = reported_opening
        WHERE NOT accepted
        """,
    )
    await execute(database, "SELECT pg_notify('postroad_commands', '')")


async def fetch(database: Database, sql: str, *arguments: object) -> list[asyncpg.Record]:
    """Rows as the superuser, whom row-level security does not bind."""
    connection = await asyncpg.connect(database.dsn())
    try:
        return await connection.fetch(sql, *arguments)
    finally:
        await connection.close()


async def add_node(database: Database, node: str = "edge-1", pool: str = "default", serial: str = "aa") -> None:
    """An enrolled node of a pool, which is made where it is missing."""
    await execute(database, "INSERT INTO postroad.node_pools (node_pool) VALUES ($1) ON CONFLICT DO NOTHING", pool)
    await execute(
        database,
        """
        INSERT INTO postroad.nodes (node, node_pool, state, certificate_serial, certificate_not_after)
        VALUES ($1, $2, 2, $3, now() + interval '30 days')
        """,
        node,
        pool,
        serial,
    )


def message_id(at_ms: int = NOW_MS) -> bytes:
    """A UUIDv7 made at `at_ms`."""
    random = bytearray(secrets.token_bytes(16))
    random[:6] = at_ms.to_bytes(6, "big")
    random[6] = 0x70 | random[6] & 0x0F
    random[8] = 0x80 | random[8] & 0x3F
    return bytes(random)


def text_id(raw: bytes) -> uuid.UUID:
    return uuid.UUID(bytes=raw)


def accepted(
    raw_id: bytes, *recipients: str, account: str = "accounts/demo", state: int = 0, **more: Any
) -> LedgerRecord:
    """A message's first record; with `state` every recipient has it already."""
    at_ms = int.from_bytes(raw_id[:6], "big")
    addresses = recipients or ("to@example.net",)
    record = LedgerRecord(
        message_id=raw_id,
        account=account,
        accepted=AcceptedMessage(
            accept_time_ms=at_ms, sender="from@example.com", recipients=addresses, **{"size_bytes": 100, **more}
        ),
    )
    if state:
        for index in range(len(addresses)):
            record.recipients.append(update(index, state))
    return record


def update(index: int, state: int, *, attempts: int = 1, at_ms: int = NOW_MS) -> RecipientUpdate:
    return RecipientUpdate(index=index, state=RecipientState.ValueType(state), attempts=attempts, update_ms=at_ms)


def changed(raw_id: bytes, *updates: RecipientUpdate, events: tuple[AttemptEvent, ...] = ()) -> LedgerRecord:
    """A later record."""
    return LedgerRecord(message_id=raw_id, account="accounts/demo", recipients=updates, events=events)


def event(kind: EventType.ValueType, *indexes: int, text: str = "ok", code: int = 250, **more: Any) -> AttemptEvent:
    return AttemptEvent(indexes=indexes, type=kind, time_ms=NOW_MS, attempt=1, reply_code=code, reply_text=text, **more)
