"""Who runs the jobs, and what they do to PostgreSQL.

Contract. `PostgresLeadership` is a session advisory lock on a direct connection of its own: held as long as
that connection lives and answers, so that a leader that is cut off stops within `is_held`'s timeout and the
server frees the lock. `PostgresJobs` implements `ports_fleet.JobStore` on the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import date, datetime
from typing import Any
from uuid import UUID

import asyncpg

from controlplane.adapters.postgres.book_entries import BY_DAY, Entered, enter_queue
from controlplane.adapters.postgres.bundles import DENIALS_CHANNEL, MOVE_DENIALS
from controlplane.adapters.postgres.fleet_database import CONNECTION_ERRORS, FleetDatabase
from controlplane.adapters.postgres.given_up import end_given_up
from controlplane.adapters.postgres.queue_commands import QUEUE_SPOOL, expire_held, run_commands
from controlplane.ports_fleet import WAITING_DAYS
from dataplane.core.queue import TERMINAL, State

_DAYS_THAT_WAIT = """
SELECT coalesce(array_agg(day), '{}')
FROM (SELECT $1::date - n AS day FROM generate_series(1, $2::integer) AS n) AS days
WHERE EXISTS (
    SELECT FROM postroad.recipients AS r
    WHERE r.message_id >= postroad.message_id_bound(day) AND r.message_id < postroad.message_id_bound(day + 1)
        AND r.state < 6
)
"""
_LOCK = 0x706F73746C656164  # "postlead"
_TIMEOUT_S = 5.0


_SWEEP_CONTENTS = """
DELETE FROM postroad.queue_contents AS c
WHERE c.message_id < $1 AND NOT EXISTS (SELECT FROM postroad.replicated_queue AS q WHERE q.message_id = c.message_id)
"""
# Whose mail waits, found by one step down the index for each account.
_LEFT_BEHIND = """
WITH RECURSIVE owners (account_uid) AS (
    (
        SELECT account_uid FROM postroad.replicated_queue WHERE epoch IS NULL AND account_uid IS NOT NULL
        ORDER BY account_uid LIMIT 1
    )
    UNION ALL
    SELECT next.account_uid FROM owners AS o CROSS JOIN LATERAL (
        SELECT q.account_uid FROM postroad.replicated_queue AS q
        WHERE q.epoch IS NULL AND q.account_uid > o.account_uid ORDER BY q.account_uid LIMIT 1
    ) AS next
)
SELECT q.message_id FROM owners AS o JOIN postroad.replicated_queue AS q USING (account_uid)
WHERE q.epoch IS NULL AND NOT EXISTS (SELECT FROM postroad.accounts AS a WHERE a.uid = o.account_uid)
LIMIT $1 FOR UPDATE OF q SKIP LOCKED
"""
# A uid that nobody has stands for an account that is gone.
_GIVE_UIDS = """
UPDATE postroad.replicated_queue AS q
SET account_uid = coalesce((SELECT a.uid FROM postroad.accounts AS a WHERE a.account = q.account), gen_random_uuid())
WHERE q.message_id IN (
    SELECT message_id FROM postroad.replicated_queue WHERE epoch IS NULL AND account_uid IS NULL
    LIMIT $1 FOR UPDATE SKIP LOCKED
)
"""
_TERMINAL = [int(state) for state in TERMINAL]
_FAIL = f"""
WITH written AS (
UPDATE postroad.recipients AS r
SET state = {int(State.FAILED)}, next_attempt_time = NULL, update_time = transaction_timestamp(),
    enhanced_code = '5.7.1', reply_text = 'the account is deleted'
FROM postroad.queue_recipients AS q
WHERE q.message_id = ANY ($1) AND r.message_id = q.message_id AND r.recipient_index = q.recipient_index
    AND r.message_id BETWEEN $2 AND $3 AND r.state <> ALL ($4::smallint[])
RETURNING r.tableoid AS partition, r.account, r.state
)
{BY_DAY}
"""


class PostgresLeadership:
    """`ports_fleet.Leadership`; see the module."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: asyncpg.Connection[Any] | None = None

    async def acquire(self) -> bool:
        """As the port says."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                if self._connection is None:
                    self._connection = await asyncpg.connect(
                        self._dsn, server_settings={"application_name": "postroad-leader"}
                    )
                held: bool = await self._connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK)
        except CONNECTION_ERRORS:
            self._drop()
            return False
        if not held:
            await self.release()
        return held

    async def is_held(self) -> bool:
        """As the port says."""
        if self._connection is None or self._connection.is_closed():
            self._drop()
            return False
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._connection.fetchval("SELECT 1")
        except CONNECTION_ERRORS:
            self._drop()
            return False
        return True

    async def release(self) -> None:
        """As the port says."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*CONNECTION_ERRORS):
                await connection.close(timeout=_TIMEOUT_S)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


class PostgresJobs:
    """`ports_fleet.JobStore`."""

    def __init__(self, database: FleetDatabase) -> None:
        self._database = database

    async def ensure_partitions(self, first: date, days: int) -> None:
        """As the port says."""
        async with self._database.transaction("job_ensure_partitions") as connection:
            await connection.execute("SELECT postroad.ensure_partitions($1, $2)", first, days)

    async def drop_partitions(self, before: date) -> int:
        """As the port says."""
        async with self._database.transaction("job_drop_partitions") as connection:
            kept = await connection.fetchval(_DAYS_THAT_WAIT, before, WAITING_DAYS)
            count: int = await connection.fetchval("SELECT postroad.drop_partitions($1, $2)", before, kept)
        return count

    async def delete_idempotency_keys(self, before: datetime) -> int:
        """As the port says."""
        return await self._delete("DELETE FROM postroad.idempotency WHERE create_time < $1", before)

    async def delete_submission_keys(self, before: datetime, limit: int) -> int:
        """As the port says."""
        return await self._delete(
            """
            DELETE FROM postroad.submission_keys WHERE accept_time < $1 AND (account, key_hash) IN (
                SELECT account, key_hash FROM postroad.submission_keys WHERE accept_time < $1
                ORDER BY accept_time LIMIT $2
            )
            """,
            *(before, limit),
        )

    async def delete_enrollment_tokens(self, before: datetime) -> int:
        """As the port says."""
        return await self._delete("DELETE FROM postroad.enrollment_tokens WHERE expire_time < $1", before)

    async def delete_config_revisions(self, before: datetime, limit: int) -> int:
        """As the port says."""
        return await self._delete(
            """
            DELETE FROM postroad.config_revisions WHERE (node_pool, bundle, revision) IN (
                SELECT r.node_pool, r.bundle, r.revision FROM postroad.config_revisions r
                WHERE r.create_time < $1 AND NOT EXISTS (
                    SELECT FROM postroad.config_bundles b
                    WHERE b.node_pool = r.node_pool AND b.bundle = r.bundle AND b.revision = r.revision
                )
                LIMIT $2
            )
            """,
            *(before, limit),
        )

    async def sweep_queue(self, before: datetime) -> None:
        """As the port says."""
        async with self._database.transaction("job_sweep_queue") as connection:
            await connection.execute(_SWEEP_CONTENTS, least_message_id(before))

    async def expire_held(self, limit: int) -> int:
        """As the port says."""
        async with self._database.transaction("job_expire_held") as connection:
            return await expire_held(connection, await connection.fetchval("SELECT transaction_timestamp()"), limit)

    async def end_left_behind(self, limit: int) -> int:
        """As the port says."""
        async with self._database.transaction("job_end_left_behind") as connection:
            given = int((await connection.execute(_GIVE_UIDS, limit)).rpartition(" ")[2])
            message_ids = [row["message_id"] for row in await connection.fetch(_LEFT_BEHIND, limit)]
            if message_ids:
                entered = Entered()
                bounds = (min(message_ids), max(message_ids))
                entered.changed(await connection.fetch(_FAIL, message_ids, *bounds, _TERMINAL))
                await enter_queue(connection, QUEUE_SPOOL, entered)
                for table in ("queue_recipients", "queue_contents", "replicated_queue"):
                    await connection.execute(f"DELETE FROM postroad.{table} WHERE message_id = ANY ($1)", message_ids)
        return max(given, len(message_ids))

    async def end_given_up(self, limit: int) -> int:
        """As the port says."""
        async with self._database.transaction("job_end_given_up") as connection:
            return await end_given_up(connection, limit)

    async def run_queue_commands(self, limit: int) -> int:
        """As the port says."""
        return await run_commands(self._database, limit)

    async def delete_leases(self, before: datetime) -> None:
        """As the port says."""
        await self._delete("DELETE FROM postroad.node_leases WHERE closed AND lease_until < $1", before)

    async def delete_denials(self, now: datetime, limit: int) -> int:
        """As the port says."""
        async with self._database.transaction("job_delete_denials") as connection:
            # The time is asked again outside: one that is renewed meanwhile must stay.
            answer = await connection.execute(
                """
                DELETE FROM postroad.denials WHERE expire_time <= $1 AND denial IN (
                    SELECT denial FROM postroad.denials WHERE expire_time <= $1 ORDER BY expire_time LIMIT $2
                )
                """,
                *(now, limit),
            )
            count = _count(answer)
            if count:
                await connection.execute(MOVE_DENIALS)
                await connection.execute("SELECT pg_notify($1, '')", DENIALS_CHANNEL)
        return count

    async def _delete(self, sql: str, *arguments: object) -> int:
        async with self._database.transaction("job_delete") as connection:
            answer = await connection.execute(sql, *arguments)
        return _count(answer)


def least_message_id(moment: datetime) -> UUID:
    """The least UUIDv7 made then."""
    return UUID(int=int(moment.timestamp() * 1000) << 80)


def _count(answer: str) -> int:
    return int(answer.rpartition(" ")[2])
