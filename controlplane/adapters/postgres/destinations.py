"""Suspended destinations, of accounts and of all together.

Contract. Implements `controlplane.ports.Destinations`. Who suspends holds the lock of the account or the pools.
"""

from __future__ import annotations

import asyncpg

from controlplane.adapters.postgres.session import Session
from controlplane.domain import names
from controlplane.domain.resources import Destination


class DestinationsRepository:
    """`controlplane.ports.Destinations`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def get(self, account: str | None, destination: str) -> Destination:
        """As the port says."""
        row = await self._session.row(
            "destination_get",
            """
            SELECT * FROM postroad.suspended_destinations
            WHERE account IS NOT DISTINCT FROM $1 AND destination = $2
            """,
            *(account, destination),
        )
        return Destination(account, destination) if row is None else _destination(row)

    async def list_page(self, account: str | None, after: str, limit: int) -> list[Destination]:
        """As the port says."""
        rows = await self._session.rows(
            "destination_list",
            """
            SELECT * FROM postroad.suspended_destinations WHERE account IS NOT DISTINCT FROM $1 AND destination > $2
            ORDER BY destination LIMIT $3
            """,
            *(account, after, limit),
        )
        return [_destination(row) for row in rows]

    async def count(self, account: str | None) -> int:
        """As the port says."""
        count: int = await self._session.value(
            "destination_count",
            "SELECT count(*) FROM postroad.suspended_destinations WHERE account IS NOT DISTINCT FROM $1",
            account,
        )
        return count

    async def suspend(self, account: str | None, destination: str, reason: str) -> None:
        """As the port says."""
        self._session.subject = names.destination_name(account, destination)
        await self._session.run(
            "destination_suspend",
            """
            INSERT INTO postroad.suspended_destinations (account, destination, suspend_reason) VALUES ($1, $2, $3)
            ON CONFLICT (account, destination) DO UPDATE SET suspend_reason = excluded.suspend_reason
            """,
            *(account, destination, reason),
        )

    async def resume(self, account: str | None, destination: str) -> None:
        """As the port says."""
        await self._session.run(
            "destination_resume",
            """
            DELETE FROM postroad.suspended_destinations
            WHERE account IS NOT DISTINCT FROM $1 AND destination = $2
            """,
            *(account, destination),
        )


def _destination(row: asyncpg.Record) -> Destination:
    return Destination(row["account"], row["destination"], row["suspend_time"], row["suspend_reason"])
