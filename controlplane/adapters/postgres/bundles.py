"""Bundles, their revisions, and denials, with the hints that wake the replicas.

Contract. Implements `controlplane.ports.Bundles`. A bundle whose content did not change keeps its revision and wakes
nobody. A deleted bundle stays as a row without content, so that its revision never goes backwards; across pools the
revisions of a name grow together. NOTIFY goes out at commit, on `postroad_config` with the pool and `postroad_denials`.
Callers hold the lock of the account or the pools, so that two edits never write the same bundle at a time.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from controlplane.adapters.postgres.session import Session

CONFIG_CHANNEL = "postroad_config"
DENIALS_CHANNEL = "postroad_denials"
# Versions follow the clock: one that a PostgreSQL that failed over has lost was told to nodes, and must not come again.
MOVE_DENIALS = """
UPDATE postroad.denial_state SET version = greatest(version + 1, (extract(epoch FROM clock_timestamp()) * 1000)::bigint)
RETURNING version
"""


class BundlesRepository:
    """`controlplane.ports.Bundles`."""

    def __init__(self, session: Session, principal: str) -> None:
        self._session = session
        self._principal = principal

    async def put(self, node_pool: str, bundle: str, kind: int, account: str | None, content: bytes) -> int | None:
        """As the port says."""
        digest = hashlib.sha256(content).digest()
        revision: int | None = await self._session.value(
            "bundle_put",
            """
            INSERT INTO postroad.config_bundles AS b (node_pool, bundle, kind, account, revision, hash, content)
            SELECT $1, $2, $3, $4, coalesce(max(revision), 0) + 1, $5, $6
            FROM postroad.config_bundles WHERE bundle = $2
            ON CONFLICT (node_pool, bundle) DO UPDATE
            SET revision = excluded.revision, hash = excluded.hash, content = excluded.content,
                update_time = transaction_timestamp(), change_xid = pg_current_xact_id()
            WHERE b.hash IS DISTINCT FROM excluded.hash
            RETURNING revision
            """,
            *(node_pool, bundle, kind, account, digest, content),
        )
        if revision is None:
            return None
        await self._session.run(
            "revision_insert",
            """
            INSERT INTO postroad.config_revisions (
                node_pool, bundle, revision, kind, account, hash, content, principal
            )
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
            """,
            *(node_pool, bundle, revision, kind, account, digest, content, self._principal),
        )
        await self._notify(CONFIG_CHANNEL, node_pool)
        return revision

    async def remove(self, bundle: str, *, except_pool: str = "") -> None:
        """As the port says."""
        rows = await self._session.rows(
            "bundle_remove",
            """
            UPDATE postroad.config_bundles
            SET hash = NULL, content = NULL, revision = revision + 1,
                update_time = transaction_timestamp(), change_xid = pg_current_xact_id()
            WHERE bundle = $1 AND node_pool <> $2 AND content IS NOT NULL
            RETURNING node_pool
            """,
            *(bundle, except_pool),
        )
        for row in rows:
            await self._notify(CONFIG_CHANNEL, row["node_pool"])

    async def remove_pool(self, node_pool: str) -> None:
        """As the port says."""
        await self._session.run(
            "bundle_remove_pool",
            """
            UPDATE postroad.config_bundles
            SET hash = NULL, content = NULL, revision = revision + 1,
                update_time = transaction_timestamp(), change_xid = pg_current_xact_id()
            WHERE node_pool = $1 AND content IS NOT NULL
            """,
            node_pool,
        )
        await self._notify(CONFIG_CHANNEL, node_pool)

    async def deny(
        self,
        denial: str,
        kind: int,
        account: str | None,
        expire_time: datetime | None,
        since_time: datetime | None = None,
    ) -> None:
        """As the port says."""
        await self._session.run(
            "denial_insert",
            """
            INSERT INTO postroad.denials (denial, kind, account, expire_time, since_time)
            VALUES ($1, $2, $3, $4, coalesce($5, transaction_timestamp()))
            ON CONFLICT (denial) DO UPDATE SET expire_time = excluded.expire_time
            """,
            *(denial, kind, account, expire_time, since_time),
        )
        # The version is locked last, as by all who change the set.
        version = await self._move_denials()
        await self._session.run(
            "denial_set_version", "UPDATE postroad.denials SET version = $2 WHERE denial = $1", denial, version
        )

    async def denial_version(self, denial: str) -> int | None:
        """As the port says."""
        version: int | None = await self._session.value(
            "denial_version_of",
            """
            SELECT version FROM postroad.denials
            WHERE denial = $1 AND (expire_time IS NULL OR expire_time > transaction_timestamp())
            """,
            denial,
        )
        return version

    async def denials_version(self) -> int:
        """As the port says."""
        version: int = await self._session.value("denials_version_now", "SELECT version FROM postroad.denial_state")
        return version

    async def lift(self, denial: str) -> None:
        """As the port says."""
        lifted = await self._session.value(
            "denial_delete", "DELETE FROM postroad.denials WHERE denial = $1 RETURNING 1", denial
        )
        if lifted:
            await self._move_denials()

    async def lift_account(self, account: str) -> None:
        """As the port says."""
        lifted = await self._session.rows(
            "denial_delete_account", "DELETE FROM postroad.denials WHERE account = $1 RETURNING 1", account
        )
        if lifted:
            await self._move_denials()

    async def denials_full_until(self, account: str, kind: int, limit: int) -> datetime | None:
        """As the port says."""
        until: datetime | None = await self._session.value(
            "denials_full_until",
            """
            SELECT expire_time FROM postroad.denials
            WHERE account = $1 AND kind = $2 AND expire_time > transaction_timestamp()
            ORDER BY expire_time DESC OFFSET $3 LIMIT 1
            """,
            *(account, kind, limit - 1),
        )
        return until

    async def _move_denials(self) -> int:
        # The row lock orders the versions as the transactions commit.
        version: int = await self._session.value("denial_version", MOVE_DENIALS)
        await self._notify(DENIALS_CHANNEL, "")
        return version

    async def _notify(self, channel: str, payload: str) -> None:
        await self._session.run("notify", "SELECT pg_notify($1, $2)", channel, payload)
