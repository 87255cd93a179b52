"""One connection inside a transaction, as the repositories use it.

Contract. Every query has a name, under which its duration and failure are reported. `subject` is the resource that the
work is about, for errors that a constraint raises. Rows come back as asyncpg's records. Errors of the driver pass
through; `PostgresDatabase` turns them into the domain's.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import asyncpg

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = PoolConnectionProxy[asyncpg.Record]
else:
    Connection = Any

Answer = TypeVar("Answer")


class Session:
    """Named queries on one connection."""

    def __init__(self, connection: Connection, observe: Callable[[str, float, bool], None]) -> None:
        self._connection = connection
        self._observe = observe
        self.subject = ""

    async def rows(self, name: str, sql: str, *arguments: object) -> list[asyncpg.Record]:
        """All rows."""
        return await self._timed(name, self._connection.fetch(sql, *arguments))

    async def row(self, name: str, sql: str, *arguments: object) -> asyncpg.Record | None:
        """The first row, or None."""
        return await self._timed(name, self._connection.fetchrow(sql, *arguments))

    async def value(self, name: str, sql: str, *arguments: object) -> Any:
        """The first value of the first row, or None."""
        return await self._timed(name, self._connection.fetchval(sql, *arguments))

    async def run(self, name: str, sql: str, *arguments: object) -> None:
        """Nothing to read."""
        await self._timed(name, self._connection.execute(sql, *arguments))

    async def _timed(self, name: str, query: Awaitable[Answer]) -> Answer:
        begun, failed = time.monotonic(), True
        try:
            answer = await query
            failed = False
            return answer
        finally:
            self._observe(name, time.monotonic() - begun, failed)
