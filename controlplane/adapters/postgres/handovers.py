"""Mail between two owners in PostgreSQL: who may take it, what it is, and when a drain is over.

Contract. Implements `ports_queue.HandoverStore`. What a spool was given is its own, however often it asks: until it
says that it has it, it is given the same again, and no other spool is. A spool that asks before all that it said of
earlier ones is stored is given nothing. Rows that another transaction gives away are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.ports_queue import Handover, HandoverCounts

TAKEN_MESSAGES = 200
TAKEN_BYTES = 8 * 1024 * 1024
# What was set aside may be needed, for as long as somebody waits for it.
_ORPHAN_AGE = timedelta(days=2)

# Those to whom something was given already, and those that may be given what waits in their pool.
_INVITED = """
SELECT s.spool FROM postroad.spools AS s JOIN postroad.nodes AS n USING (node)
WHERE s.spool = ANY ($1::uuid[]) AND s.accepted AND n.state = 2 AND (
    EXISTS (SELECT FROM postroad.handovers AS h WHERE h.spool = s.spool)
    OR n.drain IS NULL
    AND EXISTS (SELECT FROM postroad.handovers AS h WHERE h.spool IS NULL AND h.node_pool = n.node_pool)
)
"""
_TAKER = """
SELECT s.node, s.accepted, s.cursor, n.node_pool, n.drain
FROM postroad.spools AS s JOIN postroad.nodes AS n USING (node)
WHERE s.spool = $1 FOR UPDATE OF s
"""
_GIVEN = """
SELECT message_id, account, what, content_bytes FROM postroad.handovers WHERE spool = $1
ORDER BY create_time, message_id LIMIT $2
"""
_WAITING = """
SELECT message_id, account, what, content_bytes FROM postroad.handovers
WHERE spool IS NULL AND node_pool = $1 ORDER BY create_time, message_id LIMIT $2 FOR UPDATE SKIP LOCKED
"""
# By the node's own words nothing is left.
_EMPTY = """
SELECT d.drain, d.node FROM postroad.node_drains AS d
JOIN postroad.nodes AS n ON n.drain = d.drain JOIN postroad.node_status AS t ON t.node = n.node
WHERE d.end_time IS NULL AND t.closed
    AND NOT EXISTS (SELECT FROM postroad.spools AS s WHERE s.node = n.node AND s.waiting_count > 0)
    AND NOT EXISTS (
        SELECT FROM postroad.handovers AS h JOIN postroad.spools AS s ON s.spool = h.from_spool WHERE s.node = n.node
    )
"""
# What it gave up and the ledger has not heard of yet waits there still.
_END_DRAIN = """
UPDATE postroad.node_drains SET end_time = $3 WHERE drain = $1 AND end_time IS NULL AND NOT EXISTS (
    SELECT FROM postroad.recipients AS r JOIN postroad.messages AS m USING (message_id)
    WHERE r.state < 6 AND NOT m.replicated AND m.spool IN (SELECT s.spool FROM postroad.spools AS s WHERE s.node = $2)
)
RETURNING node
"""


class PostgresHandovers:
    """`ports_queue.HandoverStore`; see the module."""

    def __init__(self, database: FleetDatabase) -> None:
        self._database = database

    async def invited(self, spools: Sequence[str]) -> list[str]:
        """As the port says."""
        async with self._database.transaction("handovers_invited") as connection:
            if not await connection.fetchval("SELECT EXISTS (SELECT FROM postroad.handovers)"):
                return []
            rows = await connection.fetch(_INVITED, [UUID(spool) for spool in spools])
        return [str(row["spool"]) for row in rows]

    async def take(self, node_id: str, spool: str, after_record: int) -> list[Handover]:
        """As the port says."""
        async with self._database.transaction("handovers_take") as connection:
            taker = await connection.fetchrow(_TAKER, UUID(spool))
            if taker is None or taker["node"] != node_id or not taker["accepted"] or taker["cursor"] < after_record:
                return []
            found = await connection.fetch(_GIVEN, UUID(spool), TAKEN_MESSAGES)
            if not found and taker["drain"] is None:
                found = await connection.fetch(_WAITING, taker["node_pool"], TAKEN_MESSAGES)
                found = found[: _fitting([row["content_bytes"] for row in found])]
                message_ids = [row["message_id"] for row in found]
                await connection.execute(
                    "UPDATE postroad.handovers SET spool = $2 WHERE message_id = ANY ($1::uuid[])",
                    message_ids,
                    UUID(spool),
                )
        return [
            Handover(row["message_id"].bytes, row["account"], row["what"], row["content_bytes"])
            for row in found[: _fitting([row["content_bytes"] for row in found])]
        ]

    async def piece(self, message_id: bytes, piece: int) -> bytes | None:
        """As the port says."""
        async with self._database.transaction("handovers_piece") as connection:
            data: bytes | None = await connection.fetchval(
                "SELECT data FROM postroad.handover_contents WHERE message_id = $1 AND piece = $2",
                *(UUID(bytes=message_id), piece),
            )
        return data

    async def end_drains(self, now: datetime) -> list[str]:
        """As the port says."""
        async with self._database.transaction("drains_end") as connection:
            ended = [
                await connection.fetchval(_END_DRAIN, row["drain"], row["node"], now)
                for row in await connection.fetch(_EMPTY)
            ]
        return [node for node in ended if node is not None]

    async def sweep(self, now: datetime) -> HandoverCounts:
        """As the port says."""
        async with self._database.transaction("handovers_sweep") as connection:
            await connection.execute(
                """
                DELETE FROM postroad.handover_contents AS c
                WHERE c.create_time < $1
                    AND NOT EXISTS (SELECT FROM postroad.handovers AS h WHERE h.message_id = c.message_id)
                    AND NOT EXISTS (
                        SELECT FROM postroad.recipients AS r WHERE r.message_id = c.message_id AND r.state < 6
                    )
                """,
                now - _ORPHAN_AGE,
            )
            row = await connection.fetchrow(
                "SELECT count(*) AS count, min(create_time) AS oldest FROM postroad.handovers"
            )
        oldest = row["oldest"] if row is not None else None
        return HandoverCounts(row["count"] if row else 0, (now - oldest).total_seconds() if oldest else 0.0)


def _fitting(sizes: Sequence[int]) -> int:
    """How many of these, in order, are taken at once; at least one if there is any."""
    left = TAKEN_BYTES
    for place, size in enumerate(sizes):
        left -= size
        if left < 0 and place:
            return place
    return len(sizes)
