"""Transactions of the fleet's side on PostgreSQL, as role `postroad_fleet`, on a pool or a connection of their
own.

Contract. `transaction(name)` gives a connection inside a transaction, committed when the block ends; `statement(name)`
one for a single statement. Duration and failure are reported under `name`. While PostgreSQL cannot be asked, or answers
too slowly, UnavailableError; errors of data pass.

    body raised an error of the server's     ROLLBACK; the connection goes back clean
    cancelled, timed out, lost, anything     the connection is doubtful: terminated without a word, never reused
    COMMIT's answer lost                     UnavailableError; the cursor in the database tells what happened
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from controlplane.adapters.postgres.session import Connection
from controlplane.domain.errors import Reason, UnavailableError

Observer = Callable[[str, float, bool], None]
"""Told of each transaction: its name, its seconds, whether it failed."""

# What connecting and asking outside a transaction can raise. asyncpg says InternalClientError when a connection dies
# between two steps of its own.
CONNECTION_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.InvalidAuthorizationSpecificationError,
    # The database itself is missing: being restored, perhaps.
    asyncpg.InvalidCatalogNameError,
)
_RETRY_AFTER_S = 2.0
_ROLLBACK_TIMEOUT_S = 2.0


async def open_pool(dsn: str, size: int, *, connect_timeout_s: float = 5.0) -> asyncpg.Pool[Any]:
    """A pool that connects when it is first used, so that a process can start before PostgreSQL."""
    return await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        timeout=connect_timeout_s,
        # No session state is ever set on these connections: nothing to reset, and a round trip saved.
        reset=_leave_as_it_is,
        server_settings={"application_name": "postroad-controlplane"},
    )


async def _leave_as_it_is(connection: asyncpg.Connection[Any]) -> None:
    del connection


class FleetDatabase:
    """See the module."""

    def __init__(
        self,
        pool: asyncpg.Pool[Any],
        *,
        acquire_timeout_s: float = 5.0,
        transaction_timeout_s: float = 15.0,
        observe: Observer = lambda _name, _seconds, _failed: None,
    ) -> None:
        self._pool = pool
        self._acquire_timeout_s = acquire_timeout_s
        self._transaction_timeout_s = transaction_timeout_s
        self._observe = observe

    @asynccontextmanager
    async def transaction(self, name: str) -> AsyncIterator[Connection]:
        """See the module."""
        async with self.statement(name) as connection:
            await connection.execute("BEGIN")
            yield connection
            await connection.execute("COMMIT")

    @asynccontextmanager
    async def statement(self, name: str) -> AsyncIterator[Connection]:
        """Give a connection outside a transaction, for one statement, which is one by itself: two round trips less."""
        begun, failed = time.monotonic(), True
        try:
            async with self._connection() as connection, asyncio.timeout(self._transaction_timeout_s):
                yield connection
            failed = False
        except AWAY as error:
            raise UnavailableError(
                Reason.DATABASE_UNAVAILABLE, "the database cannot be reached", retry_after_s=_RETRY_AFTER_S
            ) from error
        finally:
            self._observe(name, time.monotonic() - begun, failed)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        async with asyncio.timeout(self._acquire_timeout_s):
            connection = await self._pool.acquire()
        clean = False
        try:
            try:
                yield connection
                clean = True
            except asyncpg.PostgresError:
                clean = await self._roll_back(connection)
                raise
        finally:
            if not clean:
                connection.terminate()
            await self._pool.release(connection)

    async def _roll_back(self, connection: Connection) -> bool:
        try:
            async with asyncio.timeout(_ROLLBACK_TIMEOUT_S):
                await connection.execute("ROLLBACK")
        except CONNECTION_ERRORS:
            return False
        return True
