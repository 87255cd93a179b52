"""What every repository does with rows.

Contract. `meta_of` reads the columns that every resource has. `rows_changed` runs an UPDATE or DELETE that matches
version and uid and returns something; AbortedError when it changed nothing, since the caller has seen the row.
"""

from __future__ import annotations

import asyncpg

from controlplane.adapters.postgres.session import Session
from controlplane.domain.errors import AbortedError, Reason
from controlplane.domain.resources import Meta


def meta_of(row: asyncpg.Record) -> Meta:
    """Return what the server keeps of a resource."""
    return Meta(str(row["uid"]), row["version"], row["create_time"], row["update_time"])


async def rows_changed(session: Session, name: str, sql: str, *arguments: object) -> None:
    """Run an edit that is guarded by an etag."""
    if await session.value(name, sql, *arguments) is None:
        raise AbortedError(Reason.ETAG_MISMATCH, "the resource was changed since it was read: read it again")
