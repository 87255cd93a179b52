"""Limits, of accounts and shared.

Contract. Implements `controlplane.ports.Limits`.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from controlplane.adapters.postgres.rows import meta_of, rows_changed
from controlplane.adapters.postgres.session import Session
from controlplane.domain.errors import NotFoundError
from controlplane.domain.etags import Etag
from controlplane.domain.limits import Limit
from controlplane.domain.names import limit_name
from dataplane.core.limits import LimitScope, LimitUnit

_EVERYTHING = 1_000_000

_SUBJECTS = {
    LimitScope.ACCOUNT: """
        SELECT 'accounts/' || account AS name FROM postroad.accounts WHERE $1::text IS NULL OR account = $1
        ORDER BY account LIMIT $2
    """,
    LimitScope.CREDENTIAL: """
        SELECT 'accounts/' || account || '/smtpCredentials/' || smtp_credential AS name FROM postroad.smtp_credentials
        WHERE ($1::text IS NULL OR account = $1) AND revoke_time IS NULL
        ORDER BY account, smtp_credential LIMIT $2
    """,
    LimitScope.PROVIDER: """
        SELECT coalesce('accounts/' || account || '/', '') || 'providers/' || provider AS name FROM postroad.providers
        WHERE $1::text IS NULL OR account = $1
        ORDER BY account NULLS FIRST, provider LIMIT $2
    """,
}


class LimitsRepository:
    """`controlplane.ports.Limits`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def get(self, account: str | None, limit: str) -> Limit:
        """As the port says."""
        row = await self._session.row(
            "limit_get",
            "SELECT * FROM postroad.limit_policies WHERE account IS NOT DISTINCT FROM $1 AND limit_id = $2",
            *(account, limit),
        )
        if row is None:
            raise NotFoundError(limit_name(account, limit))
        return _limit(row)

    async def list_page(self, account: str | None, after: str, limit: int) -> list[Limit]:
        """As the port says."""
        rows = await self._session.rows(
            "limit_list",
            """
            SELECT * FROM postroad.limit_policies WHERE account IS NOT DISTINCT FROM $1 AND limit_id > $2
            ORDER BY limit_id LIMIT $3
            """,
            *(account, after, limit),
        )
        return [_limit(row) for row in rows]

    async def list_all(self, account: str | None) -> list[Limit]:
        """As the port says."""
        return await self.list_page(account, "", _EVERYTHING)

    async def list_of(self, accounts: Sequence[str]) -> list[Limit]:
        """As the port says."""
        rows = await self._session.rows(
            "limit_list_of",
            "SELECT * FROM postroad.limit_policies WHERE account = ANY($1::text[]) ORDER BY account, limit_id",
            list(accounts),
        )
        return [_limit(row) for row in rows]

    async def subjects(self, scope: LimitScope, account: str | None, limit: int) -> list[str]:
        """As the port says."""
        if scope not in _SUBJECTS:
            return []
        rows = await self._session.rows("limit_subjects", _SUBJECTS[scope], account, limit)
        return [row["name"] for row in rows]

    async def insert(self, limit: Limit) -> None:
        """As the port says."""
        self._session.subject = limit_name(limit.account, limit.limit)
        await self._session.run(
            "limit_insert",
            """
            INSERT INTO postroad.limit_policies (
                account, limit_id, display_name, scope, subject, unit, amount, period_s, burst
            )
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
            """,
            *(limit.account, limit.limit, *_values(limit)),
        )

    async def update(self, limit: Limit, etag: Etag) -> None:
        """As the port says."""
        self._session.subject = limit_name(limit.account, limit.limit)
        await rows_changed(
            self._session,
            "limit_update",
            """
            UPDATE postroad.limit_policies
            SET display_name = $4, scope = $5, subject = $6, unit = $7, amount = $8, period_s = $9, burst = $10
            WHERE uid = $1 AND left(uid::text, 8) = $2 AND version = $3
            RETURNING 1
            """,
            *(limit.meta.uid, *etag, *_values(limit)),
        )

    async def delete(self, limit: Limit, etag: Etag) -> None:
        """As the port says."""
        await rows_changed(
            self._session,
            "limit_delete",
            """
            DELETE FROM postroad.limit_policies WHERE uid = $1 AND left(uid::text, 8) = $2 AND version = $3
            RETURNING 1
            """,
            *(limit.meta.uid, *etag),
        )


def _values(limit: Limit) -> tuple[object, ...]:
    return (
        *(limit.display_name, limit.scope, limit.subject, limit.unit, limit.amount),
        *(limit.period_s, limit.burst),
    )


def _limit(row: asyncpg.Record) -> Limit:
    return Limit(
        account=row["account"],
        limit=row["limit_id"],
        display_name=row["display_name"],
        scope=LimitScope(row["scope"]),
        subject=row["subject"],
        unit=LimitUnit(row["unit"]),
        amount=row["amount"],
        period_s=row["period_s"],
        burst=row["burst"],
        meta=meta_of(row),
    )
