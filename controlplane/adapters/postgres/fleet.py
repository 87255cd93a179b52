"""Nodes in PostgreSQL as their own port sees them: certificates, streams, spools, and what their pools shall
hold.

Contract. Implements `ports_fleet.FleetRepository`; each method is one transaction. What a node says goes to
`node_status` and `spools`, never to `nodes`, so that a heartbeat is no edit. `node_status.replica` names
the node's newest stream over all replicas: reports of an older one change nothing. Pool keys are unsealed
by a function that is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from controlplane.adapters.ledger_records import columns
from controlplane.adapters.postgres.bundles import MOVE_DENIALS
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.session import Connection
from controlplane.domain.messages import milliseconds_at
from controlplane.domain.openings import is_old_copy, resume_after
from controlplane.ports_fleet import (
    Bundle,
    BundleListing,
    BundleVersion,
    CertificateRecord,
    CommandFilter,
    ConfigReport,
    Denial,
    DenialSet,
    DenialSubject,
    EnrolledNode,
    NodeHealth,
    NodeHello,
    NodeRecord,
    NodeState,
    PoolKey,
    SpoolCommand,
    SpoolOwner,
    SpoolStatus,
)

Unseal = Callable[[str, str, bytes], bytes]
"""From pool, key id and sealed key to the key."""

_GOOD_ENROLLMENT = """
SELECT t.node, n.node_pool FROM postroad.enrollment_tokens t JOIN postroad.nodes n USING (node)
WHERE t.token_sha256 = $1 AND t.use_time IS NULL AND t.expire_time > $2
"""
_NODES = """
SELECT n.node, n.node_pool, n.state, coalesce(n.certificate_serial, '') AS serial, coalesce(s.replica, '') AS stream,
    n.drain IS NOT NULL AS drains
FROM postroad.nodes n LEFT JOIN postroad.node_status s USING (node)
WHERE n.node = ANY ($1::text[])
"""
_COMMANDS = """
SELECT command, spool, verb, account, message_ids, provider, accepted_before, filter_provider, filter_recipient_domain,
    filter_states, position
FROM postroad.commands
WHERE done_time IS NULL AND spool = ANY ($1::uuid[]) ORDER BY create_time, command LIMIT 1000
"""


class PostgresFleet:
    """See the module."""

    def __init__(self, database: FleetDatabase, unseal: Unseal) -> None:
        self._database = database
        self._unseal = unseal

    # --- enrolment ------------------------------------------------------------------------------------------------

    async def find_enrollment(self, token_sha256: bytes, now: datetime) -> EnrolledNode | None:
        """As the port says."""
        async with self._database.transaction("enrollment_find") as connection:
            row = await connection.fetchrow(_GOOD_ENROLLMENT, token_sha256, now)
        return None if row is None else EnrolledNode(row["node"], row["node_pool"])

    async def complete_enrollment(
        self, token_sha256: bytes, certificate: CertificateRecord, software_version: str, now: datetime
    ) -> bool:
        """As the port says."""
        async with self._database.transaction("enrollment_complete") as connection:
            row = await connection.fetchrow(_GOOD_ENROLLMENT + "FOR UPDATE OF t", token_sha256, now)
            if row is None:
                return False
            await connection.execute(
                "UPDATE postroad.enrollment_tokens SET use_time = $2 WHERE token_sha256 = $1", token_sha256, now
            )
            await connection.execute("SELECT set_config('postroad.principal', $1, true)", f"nodes/{row['node']}")
            await connection.execute(
                """
                UPDATE postroad.nodes
                SET state = $2, certificate_serial = $3, certificate_fingerprint = $4, certificate_not_before = $5,
                    certificate_not_after = $6
                WHERE node = $1
                """,
                row["node"],
                NodeState.ENROLLED,
                certificate.serial,
                certificate.fingerprint,
                certificate.not_before,
                certificate.not_after,
            )
            await connection.execute(
                """
                INSERT INTO postroad.node_status (node, software_version) VALUES ($1, $2)
                ON CONFLICT (node) DO UPDATE SET software_version = excluded.software_version
                """,
                row["node"],
                software_version,
            )
            # A stream that the former certificate opened ends.
            await connection.execute("SELECT pg_notify('postroad_commands', $1)", row["node"])
        return True

    # --- nodes ----------------------------------------------------------------------------------------------------

    async def get_node(self, node_id: str) -> NodeRecord | None:
        """As the port says."""
        found = await self.get_nodes([node_id])
        return found[0] if found else None

    async def get_nodes(self, node_ids: Sequence[str]) -> list[NodeRecord]:
        """As the port says."""
        async with self._database.transaction("nodes_get") as connection:
            rows = await connection.fetch(_NODES, list(node_ids))
        return [
            NodeRecord(
                row["node"], row["node_pool"], NodeState(row["state"]), row["serial"], row["stream"], row["drains"]
            )
            for row in rows
        ]

    async def open_stream(self, node_id: str, stream: str, hello: NodeHello, now: datetime) -> Mapping[str, bytes]:
        """As the port says."""
        async with self._database.transaction("stream_open") as connection:
            former = await connection.fetchrow(
                """
                SELECT software_version, config_refused, destinations_version FROM postroad.node_status
                WHERE node = $1 FOR UPDATE
                """,
                node_id,
            )
            told_since: int | None = None
            if hello.knows_destinations:
                told_since = former["destinations_version"] if former is not None else None
                told_since = await _begin_to_tell(connection) if told_since is None else told_since
            same = former is not None and former["software_version"] == hello.software_version
            refused: dict[str, str] = json.loads(former["config_refused"]) if former is not None and same else {}
            await connection.execute(
                """
                INSERT INTO postroad.node_status (
                    node, connected, replica, boot_id, software_version, last_seen_time, config_status,
                    destinations_version
                )
                VALUES ($1, true, $2, $3, $4, $5, 3, $7)
                ON CONFLICT (node) DO UPDATE
                SET connected = true, replica = $2, boot_id = $3, software_version = $4, last_seen_time = $5,
                    config_status = 3, config_refused = $6, destinations_version = $7
                """,
                node_id,
                stream,
                hello.boot_id,
                hello.software_version,
                now,
                json.dumps(refused),
                told_since,
            )
            # Other replicas close an older stream of this node.
            await connection.execute("SELECT pg_notify('postroad_commands', $1)", node_id)
        return {name: bytes.fromhex(digest) for name, digest in refused.items()}

    async def close_stream(self, node_id: str, stream: str, now: datetime) -> None:
        """As the port says."""
        async with self._database.transaction("stream_close") as connection:
            await connection.execute(
                """
                UPDATE postroad.node_status
                SET connected = false, last_seen_time = $3, config_status = CASE config_status WHEN 4 THEN 4 ELSE 2 END
                WHERE node = $1 AND replica = $2
                """,
                node_id,
                stream,
                now,
            )

    async def report_config(self, node_id: str, stream: str, report: ConfigReport, now: datetime) -> None:
        """As the port says."""
        async with self._database.transaction("node_report_config") as connection:
            await connection.execute(
                """
                UPDATE postroad.node_status
                SET config_status = $3, config_error = $4, denials_version = $5, config_refused = $6,
                    denials_time = CASE denials_version WHEN $5 THEN coalesce(denials_time, $7) ELSE $7 END,
                    last_seen_time = $7
                WHERE node = $1 AND replica = $2
                """,
                node_id,
                stream,
                report.status,
                # NUL is the one character that text cannot hold.
                report.error.replace("\0", ""),
                report.denials_version,
                json.dumps({name: digest.hex() for name, digest in report.refused}),
                now,
            )

    async def report_health(self, node_id: str, stream: str, health: NodeHealth, now: datetime) -> None:
        """As the port says."""
        async with self._database.transaction("node_report_health") as connection:
            await connection.execute(
                """
                UPDATE postroad.node_status
                SET config_digest = $3, draining = $4, queue_depth = $5, oldest_age_s = $6, clock_skew_s = $7,
                    last_seen_time = $8, connected = true, closed = $9
                WHERE node = $1 AND replica = $2
                """,
                node_id,
                stream,
                health.digest,
                health.draining,
                health.queue_depth,
                health.oldest_age_s,
                health.clock_skew_s,
                now,
                health.closed,
            )

    async def report_spools(self, node_id: str, spools: Sequence[SpoolStatus], now: datetime) -> list[SpoolOwner]:
        """As the port says.

        A spool that is in use is not judged here: its openings and records travel on another stream, and that may be
        ahead of what this one says. The ledger judges it. One that the node holds back is judged here as
        `domain.openings` says, since the ledger may have refused to hear of it.
        """
        if not spools:
            return []
        async with self._database.transaction("node_report_spools") as connection:
            by_id = {UUID(spool.spool): spool for spool in spools}
            await connection.execute(
                """
                INSERT INTO postroad.spools (spool, node, incarnation)
                SELECT s, $2, i FROM unnest($1::uuid[], $3::bigint[]) AS u (s, i) ORDER BY s
                ON CONFLICT DO NOTHING
                """,
                *(list(by_id), node_id, [spool.incarnation for spool in spools]),
            )
            known = await connection.fetch(
                """
                SELECT spool, incarnation, cursor, accepted, opening, resume_record FROM postroad.spools
                WHERE spool = ANY ($1) AND node = $2 ORDER BY spool FOR UPDATE
                """,
                *(list(by_id), node_id),
            )
            rows = await connection.fetch(
                """
                UPDATE postroad.spools p
                SET waiting_count = u.w, reported_incarnation = u.i, accepted = u.a, resume_record = u.r,
                    reported_opening = u.o, lost_messages = string_to_array(u.l, ','), lost_count = u.c,
                    unnamed_losses = u.n, update_time = $1
                FROM unnest(
                    $2::uuid[], $3::bigint[], $4::bigint[], $5::boolean[], $6::bigint[], $7::bytea[], $8::text[],
                    $9::bigint[], $10::boolean[]
                ) AS u (s, w, i, a, r, o, l, c, n)
                WHERE p.spool = u.s
                RETURNING p.spool, p.node, p.accepted, p.cursor, p.opening
                """,
                *(now, *columns([_reported(row, by_id[row["spool"]]) for row in known], 9)),
            )
        return [_owner(row) for row in rows]

    async def list_spools(self, node_ids: Sequence[str]) -> list[SpoolOwner]:
        """As the port says."""
        async with self._database.transaction("spools_list") as connection:
            rows = await connection.fetch(
                "SELECT spool, node, accepted, cursor, opening FROM postroad.spools WHERE node = ANY ($1::text[])",
                list(node_ids),
            )
        return [_owner(row) for row in rows]

    # --- what nodes shall hold ------------------------------------------------------------------------------------

    async def bundles_since(self, mark: int) -> BundleListing:
        """As the port says; the mark is a transaction id below which no change can appear any more."""
        async with self._database.transaction("bundles_since") as connection:
            rows = await connection.fetch(
                """
                SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS mark, b.node_pool, b.bundle, b.revision,
                    b.hash
                FROM (SELECT) AS one LEFT JOIN postroad.config_bundles b ON b.change_xid >= $1::text::xid8
                """,
                str(mark),
            )
        pools: dict[str, dict[str, BundleVersion | None]] = {}
        for row in rows:
            if row["bundle"] is not None:
                version = None if row["hash"] is None else BundleVersion(row["revision"], row["hash"])
                pools.setdefault(row["node_pool"], {})[row["bundle"]] = version
        return BundleListing(rows[0]["mark"], pools)

    async def load_bundles(self, pool: str, names: Sequence[str]) -> list[Bundle]:
        """As the port says."""
        async with self._database.transaction("bundles_load") as connection:
            rows = await connection.fetch(
                """
                SELECT bundle, kind, revision, hash, content FROM postroad.config_bundles
                WHERE node_pool = $1 AND bundle = ANY ($2::text[]) AND content IS NOT NULL
                """,
                pool,
                list(names),
            )
        return [Bundle(row["bundle"], row["kind"], row["revision"], row["hash"], row["content"]) for row in rows]

    async def load_pool_keys(self, pool: str) -> tuple[PoolKey, ...]:
        """As the port says."""
        async with self._database.transaction("pool_keys_load") as connection:
            rows = await connection.fetch(
                "SELECT key_id, key_sealed FROM postroad.pool_keys WHERE node_pool = $1 ORDER BY key_id", pool
            )
        return tuple(PoolKey(row["key_id"], self._unseal(pool, row["key_id"], row["key_sealed"])) for row in rows)

    async def denials_version(self) -> int:
        """As the port says."""
        async with self._database.transaction("denials_version") as connection:
            version: int = await connection.fetchval("SELECT version FROM postroad.denial_state")
        return version

    async def move_denials(self, above: int) -> None:
        """As the port says."""
        async with self._database.transaction("denials_move") as connection:
            await connection.execute("UPDATE postroad.denial_state SET version = $1 WHERE version < $1", above + 1)
            await connection.execute(MOVE_DENIALS)

    async def load_denials(self, now: datetime) -> DenialSet:
        """As the port says."""
        async with self._database.transaction("denials_load") as connection:
            # One statement, one snapshot: version and set belong together.
            rows = await connection.fetch(
                """
                SELECT s.version, d.denial, d.kind, d.since_time, d.expire_time
                FROM postroad.denial_state s
                LEFT JOIN postroad.denials d ON d.expire_time IS NULL OR d.expire_time > $1
                ORDER BY d.denial
                """,
                now,
            )
        return DenialSet(rows[0]["version"], tuple(_denial(row) for row in rows if row["denial"] is not None))

    async def open_commands(self, spools: Sequence[str]) -> list[SpoolCommand]:
        """As the port says."""
        async with self._database.transaction("commands_open") as connection:
            rows = await connection.fetch(_COMMANDS, [UUID(spool) for spool in spools])
        return [
            SpoolCommand(
                str(row["command"]),
                str(row["spool"]),
                row["verb"],
                f"accounts/{row['account']}",
                tuple(message_id.bytes for message_id in row["message_ids"]),
                row["provider"],
                _filter(row),
            )
            for row in rows
        ]


async def _begin_to_tell(connection: Connection) -> int:
    """The version of the denials from which on a node that has learnt of destinations has been told of all of them."""
    # While it is locked nobody else denies anything.
    version: int = await connection.fetchval("SELECT version FROM postroad.denial_state FOR UPDATE")
    if await connection.fetchval(
        "SELECT EXISTS (SELECT FROM postroad.denials WHERE kind = $1)", DenialSubject.DESTINATION
    ):
        version = await connection.fetchval(MOVE_DENIALS)
        await connection.execute("SELECT pg_notify('postroad_denials', '')")
    return version


def _filter(row: asyncpg.Record) -> CommandFilter | None:
    if row["accepted_before"] is None:
        return None
    return CommandFilter(
        milliseconds_at(row["accepted_before"]),
        row["position"].bytes,
        row["filter_provider"],
        row["filter_recipient_domain"],
        tuple(row["filter_states"]),
    )


def _denial(row: asyncpg.Record) -> Denial:
    return Denial(DenialSubject(row["kind"]), row["denial"], row["since_time"], row["expire_time"])


def _owner(row: asyncpg.Record) -> SpoolOwner:
    return SpoolOwner(str(row["spool"]), row["node"], row["accepted"], row["cursor"], row["opening"])


def _reported(row: asyncpg.Record, spool: SpoolStatus) -> tuple[Any, ...]:
    """What is written of a spool: its id, what it says, and what that makes of it."""
    accepted, resume_record = row["accepted"], row["resume_record"]
    if spool.refused:
        went_backwards = spool.incarnation < row["incarnation"]
        is_old = is_old_copy(row["opening"], row["cursor"], spool.openings, spool.last_record)
        accepted = accepted and not (went_backwards or is_old)
        resume_record = resume_after(row["opening"], row["cursor"], spool.openings, spool.acknowledged)
    losses = spool.losses
    return (
        *(row["spool"], spool.waiting_count, spool.incarnation, accepted, resume_record),
        *(spool.openings.present or None, ",".join(losses.messages), losses.message_count, losses.unnamed),
    )
