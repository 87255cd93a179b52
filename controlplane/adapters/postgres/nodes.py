"""Nodes, node pools and what hangs on them.

Contract. Implements `controlplane.ports.Nodes`. What a node reports of itself is written by the fleet's side into
`node_status` and `spools`, and only read here, but for AcceptSpool, AttachSpool and GiveUpSpool. Drains are asked for
here, and ended here or by the fleet's side, which also counts who took what.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import asyncpg

from controlplane.adapters.postgres.rows import meta_of, rows_changed
from controlplane.adapters.postgres.session import Session
from controlplane.domain import names
from controlplane.domain.drains import Drain, DrainTarget
from controlplane.domain.errors import FailedPreconditionError, NotFoundError, Reason
from controlplane.domain.etags import Etag
from controlplane.domain.resources import Node, NodePool, NodeState, Spool, SubmissionLimits
from controlplane.domain.suspensions import Receipt

COMMANDS_CHANNEL = "postroad_commands"

_SELECT = """
SELECT n.*, s.connected, s.last_seen_time, s.software_version, s.config_status, s.config_error, s.denials_version, (
    SELECT coalesce(
        jsonb_agg(
            jsonb_build_object(
                'spool', p.spool, 'incarnation', p.incarnation, 'cursor', p.cursor, 'accepted', p.accepted,
                'waiting_count', p.waiting_count, 'lost_messages', p.lost_messages, 'lost_count', p.lost_count,
                'unnamed_losses', p.unnamed_losses
            )
            ORDER BY p.spool
        ),
        '[]'
    )
    FROM postroad.spools p WHERE p.node = n.node
) AS spools, (
    SELECT max(t.expire_time) FROM postroad.enrollment_tokens t WHERE t.node = n.node AND t.use_time IS NULL
) AS enrollment_expire_time
FROM postroad.nodes n LEFT JOIN postroad.node_status s ON s.node = n.node
"""


_TAKER = """
SELECT EXISTS (
    SELECT FROM postroad.nodes n JOIN postroad.node_status s USING (node)
    WHERE n.node_pool = $1 AND n.node <> $2 AND n.state = $3 AND n.drain IS NULL AND s.connected
)
"""
_HAS_MAIL = """
SELECT EXISTS (
    SELECT FROM postroad.recipients r JOIN postroad.messages m USING (message_id)
    WHERE r.state < 6 AND NOT m.replicated AND m.spool IN (SELECT p.spool FROM postroad.spools p WHERE p.node = $1)
)
"""
_IN_USE = """
SELECT n.state <> $4 AND p.update_time >= $3
FROM postroad.spools p JOIN postroad.nodes n USING (node) WHERE p.node = $1 AND p.spool = $2 FOR UPDATE OF p
"""
_DRAIN = """
SELECT d.*, coalesce(s.closed, false) AND n.drain = d.drain AS closed, (
    SELECT coalesce(sum(p.waiting_count), 0)::bigint FROM postroad.spools p WHERE p.node = d.node
) AS waiting_count, (
    SELECT count(*) FROM postroad.handovers h WHERE h.drain = d.drain
) AS moving_count
FROM postroad.node_drains d
LEFT JOIN postroad.nodes n ON n.node = d.node LEFT JOIN postroad.node_status s ON s.node = d.node
WHERE d.drain = $1
"""


class NodesRepository:
    """`controlplane.ports.Nodes`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def get(self, node: str) -> Node:
        """As the port says."""
        row = await self._session.row("node_get", _SELECT + "WHERE n.node = $1", node)
        if row is None:
            raise NotFoundError(names.format_name(names.NODE, node))
        return _node(row)

    async def list_page(self, after: str, limit: int) -> list[Node]:
        """As the port says."""
        rows = await self._session.rows(
            "node_list", _SELECT + "WHERE n.node > $1 ORDER BY n.node LIMIT $2", after, limit
        )
        return [_node(row) for row in rows]

    async def insert(self, node: Node) -> None:
        """As the port says."""
        self._session.subject = names.format_name(names.NODE, node.node)
        await self._session.run(
            "node_insert",
            "INSERT INTO postroad.nodes (node, display_name, node_pool) VALUES ($1, $2, $3)",
            *(node.node, node.display_name, node.node_pool),
        )

    async def update(self, node: Node, etag: Etag) -> None:
        """As the port says."""
        self._session.subject = names.format_name(names.NODE, node.node)
        await rows_changed(
            self._session,
            "node_update",
            """
            UPDATE postroad.nodes SET display_name = $4, node_pool = $5
            WHERE node = $1 AND left(uid::text, 8) = $2 AND version = $3 RETURNING 1
            """,
            *(node.node, *etag, node.display_name, node.node_pool),
        )

    async def revoke(self, node: str) -> None:
        """As the port says."""
        await self._session.run(
            "node_revoke", "UPDATE postroad.nodes SET state = $2 WHERE node = $1", node, NodeState.REVOKED
        )
        await self._clear_tokens(node)
        await self._session.run("notify", "SELECT pg_notify($1, $2)", COMMANDS_CHANNEL, node)

    async def delete(self, node: Node, etag: Etag) -> None:
        """As the port says."""
        await rows_changed(
            self._session,
            "node_delete",
            "DELETE FROM postroad.nodes WHERE node = $1 AND left(uid::text, 8) = $2 AND version = $3 RETURNING 1",
            *(node.node, *etag),
        )

    async def replace_token(self, node: str, sha256: bytes, expire_time: datetime) -> None:
        """As the port says."""
        await self._clear_tokens(node)
        await self._session.run(
            "enrollment_token_insert",
            "INSERT INTO postroad.enrollment_tokens (token_sha256, node, expire_time) VALUES ($1, $2, $3)",
            *(sha256, node, expire_time),
        )

    async def accept_spool(self, node: str, spool: str) -> bool:
        """As the port says."""
        accepted = await self._session.value(
            "spool_find", "SELECT accepted FROM postroad.spools WHERE node = $1 AND spool = $2 FOR UPDATE", node, spool
        )
        if accepted is None:
            raise NotFoundError(f"{names.format_name(names.NODE, node)} spool {spool}")
        if accepted:
            return False
        await self._session.run(
            "spool_accept",
            """
            UPDATE postroad.spools
            SET accepted = true, incarnation = reported_incarnation, cursor = resume_record,
                opening = reported_opening, update_time = transaction_timestamp()
            WHERE node = $1 AND spool = $2
            """,
            *(node, spool),
        )
        await self._session.run("notify", "SELECT pg_notify($1, $2)", COMMANDS_CHANNEL, node)
        return True

    async def give_up_spool(self, node: str, spool: str, silent_since: datetime) -> bool:
        """As the port says."""
        in_use = await self._session.value("spool_in_use", _IN_USE, *(node, spool, silent_since, NodeState.REVOKED))
        if in_use is None:
            raise NotFoundError(f"{names.format_name(names.NODE, node)} spool {spool}")
        if in_use:
            return False
        await self._session.run(
            "spool_give_up", "INSERT INTO postroad.given_up_spools (spool, node) VALUES ($1, $2)", *(spool, node)
        )
        await self._session.run("spool_delete", "DELETE FROM postroad.spools WHERE spool = $1", spool)
        await self._session.run("notify", "SELECT pg_notify($1, $2)", COMMANDS_CHANNEL, node)
        return True

    async def lock_spool(self, spool: str) -> str:
        """As the port says."""
        node: str | None = await self._session.value(
            "spool_lock", "SELECT node FROM postroad.spools WHERE spool = $1 FOR UPDATE", spool
        )
        if node is None:
            raise NotFoundError(f"spool {spool}")
        return node

    async def move_spool(self, spool: str, node: str) -> None:
        """As the port says."""
        await self._session.run(
            "spool_move",
            "UPDATE postroad.spools SET node = $2, update_time = transaction_timestamp() WHERE spool = $1",
            *(spool, node),
        )
        # Both nodes: the one that may send now, and the one that may not.
        await self._session.run("notify", "SELECT pg_notify($1, $2)", COMMANDS_CHANNEL, node)

    async def has_taker(self, node: Node) -> bool:
        """As the port says."""
        found: bool = await self._session.value("node_taker", _TAKER, *(node.node_pool, node.node, NodeState.ENROLLED))
        return found

    async def has_mail(self, node: str) -> bool:
        """As the port says."""
        found: bool = await self._session.value("node_mail", _HAS_MAIL, node)
        return found

    async def start_drain(self, node: str) -> str:
        """As the port says."""
        drain = await self._session.value(
            "drain_insert", "INSERT INTO postroad.node_drains (node) VALUES ($1) RETURNING drain", node
        )
        await self._session.run("node_drain", "UPDATE postroad.nodes SET drain = $2 WHERE node = $1", node, drain)
        await self._session.run("notify", "SELECT pg_notify($1, $2)", COMMANDS_CHANNEL, node)
        return str(drain)

    async def end_drain(self, node: str) -> None:
        """As the port says."""
        await self._session.run(
            "drain_end",
            """
            UPDATE postroad.node_drains d SET end_time = transaction_timestamp(), undrained = true
            FROM postroad.nodes n WHERE n.node = $1 AND d.drain = n.drain AND d.end_time IS NULL
            """,
            node,
        )
        await self._session.run("node_undrain", "UPDATE postroad.nodes SET drain = NULL WHERE node = $1", node)
        await self._session.run("notify", "SELECT pg_notify($1, $2)", COMMANDS_CHANNEL, node)

    async def get_drain(self, drain: str) -> Drain:
        """As the port says."""
        row = await self._session.row("drain_get", _DRAIN, drain)
        if row is None:
            raise NotFoundError(names.format_name(names.OPERATION, "-", drain))
        targets = await self._session.rows(
            "drain_targets", "SELECT * FROM postroad.drain_targets WHERE drain = $1 ORDER BY node", drain
        )
        return Drain(
            drain=str(row["drain"]),
            node=row["node"],
            create_time=row["create_time"],
            end_time=row["end_time"],
            undrained=row["undrained"],
            closed=bool(row["closed"]),
            waiting_count=row["waiting_count"],
            moving_count=row["moving_count"],
            targets=tuple(DrainTarget(one["node"], one["message_count"], one["recipient_count"]) for one in targets),
        )

    async def get_pool(self, node_pool: str) -> NodePool:
        """As the port says."""
        row = await self._session.row(
            "node_pool_get", "SELECT * FROM postroad.node_pools WHERE node_pool = $1", node_pool
        )
        if row is None:
            raise NotFoundError(names.format_name(names.NODE_POOL, node_pool))
        return _pool(row)

    async def list_pools(self, after: str, limit: int) -> list[NodePool]:
        """As the port says."""
        rows = await self._session.rows(
            "node_pool_list",
            "SELECT * FROM postroad.node_pools WHERE node_pool > $1 ORDER BY node_pool LIMIT $2",
            *(after, limit),
        )
        return [_pool(row) for row in rows]

    async def lock_pool(self, node_pool: str) -> NodePool:
        """As the port says."""
        row = await self._session.row(
            "node_pool_lock", "SELECT * FROM postroad.node_pools WHERE node_pool = $1 FOR NO KEY UPDATE", node_pool
        )
        if row is None:
            name = names.format_name(names.NODE_POOL, node_pool)
            raise FailedPreconditionError(Reason.NODE_POOL_MISSING, f"{name} does not exist", subject=name)
        return _pool(row)

    async def lock_pools(self) -> list[NodePool]:
        """As the port says."""
        rows = await self._session.rows(
            "node_pools_lock", "SELECT * FROM postroad.node_pools ORDER BY node_pool FOR NO KEY UPDATE"
        )
        return [_pool(row) for row in rows]

    async def insert_pool(self, pool: NodePool) -> None:
        """As the port says."""
        self._session.subject = names.format_name(names.NODE_POOL, pool.node_pool)
        await self._session.run(
            "node_pool_insert",
            """
            INSERT INTO postroad.node_pools (
                node_pool, display_name, account_messages_per_hour, credential_messages_per_hour,
                address_connections_per_minute, max_message_bytes, max_recipients, max_connections,
                max_connections_per_address, log_level
            )
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
            """,
            *(pool.node_pool, *_pool_values(pool)),
        )

    async def update_pool(self, pool: NodePool, etag: Etag) -> None:
        """As the port says."""
        await rows_changed(
            self._session,
            "node_pool_update",
            """
            UPDATE postroad.node_pools
            SET display_name = $4, account_messages_per_hour = $5, credential_messages_per_hour = $6,
                address_connections_per_minute = $7, max_message_bytes = $8, max_recipients = $9,
                max_connections = $10, max_connections_per_address = $11, log_level = $12
            WHERE node_pool = $1 AND left(uid::text, 8) = $2 AND version = $3 RETURNING 1
            """,
            *(pool.node_pool, *etag, *_pool_values(pool)),
        )

    async def delete_pool(self, pool: NodePool, etag: Etag) -> None:
        """As the port says."""
        name = names.format_name(names.NODE_POOL, pool.node_pool)
        in_use = await self._session.value(
            "node_pool_in_use",
            """
            SELECT EXISTS (SELECT FROM postroad.nodes WHERE node_pool = $1)
                OR EXISTS (SELECT FROM postroad.accounts WHERE node_pool = $1)
            """,
            pool.node_pool,
        )
        if in_use:
            raise FailedPreconditionError(Reason.NODE_POOL_IN_USE, f"nodes or accounts belong to {name}", subject=name)
        await rows_changed(
            self._session,
            "node_pool_delete",
            """
            DELETE FROM postroad.node_pools
            WHERE node_pool = $1 AND left(uid::text, 8) = $2 AND version = $3 RETURNING 1
            """,
            *(pool.node_pool, *etag),
        )

    async def count_nodes(self, node_pool: str) -> int:
        """As the port says."""
        count: int = await self._session.value(
            "node_count",
            "SELECT count(*) FROM postroad.nodes WHERE node_pool = $1 AND state <> $2",
            *(node_pool, NodeState.REVOKED),
        )
        return count

    async def receipts(self, node_pool: str | None, kind: int) -> list[Receipt]:
        """As the port says."""
        rows = await self._session.rows(
            "denial_receipts", "SELECT * FROM postroad.denial_receipts($1, $2::smallint)", node_pool, kind
        )
        return [Receipt(*row) for row in rows]

    async def add_pool_key(self, node_pool: str, key_id: str, key_sealed: bytes) -> None:
        """As the port says."""
        await self._session.run(
            "pool_key_insert",
            "INSERT INTO postroad.pool_keys (node_pool, key_id, key_sealed) VALUES ($1, $2, $3)",
            *(node_pool, key_id, key_sealed),
        )

    async def newest_pool_key(self, node_pool: str) -> tuple[str, bytes]:
        """As the port says."""
        row = await self._session.row(
            "pool_key_newest",
            """
            SELECT key_id, key_sealed FROM postroad.pool_keys WHERE node_pool = $1
            ORDER BY create_time DESC, key_id DESC LIMIT 1
            """,
            node_pool,
        )
        if row is None:
            raise NotFoundError(names.format_name(names.NODE_POOL, node_pool))
        return row["key_id"], row["key_sealed"]

    async def _clear_tokens(self, node: str) -> None:
        await self._session.run(
            "enrollment_tokens_clear", "DELETE FROM postroad.enrollment_tokens WHERE node = $1", node
        )


def _pool_values(pool: NodePool) -> tuple[object, ...]:
    limits = pool.submission_limits
    return (
        pool.display_name,
        limits.account_messages_per_hour,
        limits.credential_messages_per_hour,
        limits.address_connections_per_minute,
        pool.max_message_bytes or None,
        pool.max_recipients or None,
        pool.max_connections or None,
        pool.max_connections_per_address or None,
        pool.log_level or None,
    )


def _pool(row: asyncpg.Record) -> NodePool:
    return NodePool(
        node_pool=row["node_pool"],
        display_name=row["display_name"],
        submission_limits=SubmissionLimits(
            row["account_messages_per_hour"],
            row["credential_messages_per_hour"],
            row["address_connections_per_minute"],
        ),
        max_message_bytes=row["max_message_bytes"] or 0,
        max_recipients=row["max_recipients"] or 0,
        max_connections=row["max_connections"] or 0,
        max_connections_per_address=row["max_connections_per_address"] or 0,
        log_level=row["log_level"] or "",
        meta=meta_of(row),
    )


def _node(row: asyncpg.Record) -> Node:
    return Node(
        node=row["node"],
        display_name=row["display_name"],
        node_pool=row["node_pool"],
        state=NodeState(row["state"]),
        enrollment_expire_time=row["enrollment_expire_time"],
        certificate_not_before=row["certificate_not_before"],
        certificate_not_after=row["certificate_not_after"],
        connected=bool(row["connected"]),
        last_seen_time=row["last_seen_time"],
        software_version=row["software_version"] or "",
        config_status=row["config_status"] or 2,
        config_error=row["config_error"] or "",
        denials_version=row["denials_version"] or 0,
        spools=tuple(_spool(one) for one in json.loads(row["spools"])),
        drain=str(row["drain"] or ""),
        meta=meta_of(row),
    )


def _spool(fields: dict[str, Any]) -> Spool:
    return Spool(**{**fields, "lost_messages": tuple(fields["lost_messages"])})
