"""Transactions of the public API on PostgreSQL: scope, repositories, errors.

Contract. `PostgresDatabase(pool, …)` implements `controlplane.ports.Database` on a pool of role `postroad_api`. The
scope is told to row-level security by set_config(…, true), so that it ends with the transaction. Errors of the driver
become errors of the domain: constraints by `constraints.py`, lost races AbortedError, a database that cannot be reached
or answers too slowly UnavailableError. Nothing here ever ends the process.

    the body raised                   ROLLBACK; the connection goes back clean
    cancelled, timed out, lost        the connection is doubtful: it is terminated, never reused
    COMMIT's answer lost              UnavailableError; a caller with a request_id finds out by asking again
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any

import asyncpg

from controlplane.adapters.postgres.accounts import AccountsRepository
from controlplane.adapters.postgres.book_lists import BooksRepository
from controlplane.adapters.postgres.bundles import BundlesRepository
from controlplane.adapters.postgres.constraints import domain_error
from controlplane.adapters.postgres.credentials import ApiKeysRepository, SmtpCredentialsRepository, find_api_key
from controlplane.adapters.postgres.destinations import DestinationsRepository
from controlplane.adapters.postgres.fleet_database import AWAY
from controlplane.adapters.postgres.idempotency import IdempotencyRepository
from controlplane.adapters.postgres.limits import LimitsRepository
from controlplane.adapters.postgres.messages import MessagesRepository
from controlplane.adapters.postgres.nodes import NodesRepository
from controlplane.adapters.postgres.providers import ProvidersRepository
from controlplane.adapters.postgres.routing_rules import RoutingRulesRepository
from controlplane.adapters.postgres.session import Connection, Session
from controlplane.domain.errors import AbortedError, ControlPlaneError, Reason, UnavailableError, invalid
from controlplane.ports import (
    Accounts,
    ApiKeys,
    AuthenticatedKey,
    Books,
    Bundles,
    Destinations,
    Idempotency,
    Limits,
    Messages,
    Nodes,
    Providers,
    RoutingRules,
    Scope,
    SmtpCredentials,
    Work,
)

Observer = Callable[[str, float, bool], None]
"""Told of each query: its name, its seconds, whether it failed."""

_RETRY_AFTER_S = 2.0
_ROLLBACK_TIMEOUT_S = 2.0
_LOST_RACES = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError)


async def open_api_pool(
    dsn: str, *, connections: int = 10, connect_timeout_s: float = 5.0, statement_timeout_s: float = 15.0
) -> asyncpg.Pool[Any]:
    """Return a pool of role `postroad_api` that opens connections as they are needed, none now.

    The server ends a statement after `statement_timeout_s`, and a transaction that nobody speaks in after twice that;
    the client gives up a little later, for the case that the server does not answer at all.
    """
    limits_ms = {
        "statement_timeout": round(statement_timeout_s * 1000),
        "idle_in_transaction_session_timeout": round(statement_timeout_s * 2000),
    }
    return await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=connections,
        timeout=connect_timeout_s,
        command_timeout=statement_timeout_s + 1,
        # Settings end with their transaction, and every transaction ends: nothing to reset, and a round trip saved.
        reset=_leave_as_it_is,
        server_settings={"application_name": "postroad-api", **{name: str(ms) for name, ms in limits_ms.items()}},
    )


async def _leave_as_it_is(connection: asyncpg.Connection[Any]) -> None:
    del connection


class PostgresWork:
    """`controlplane.ports.Work` on one connection."""

    def __init__(self, session: Session, principal: str) -> None:
        self._session = session
        self.accounts: Accounts = AccountsRepository(session)
        self.api_keys: ApiKeys = ApiKeysRepository(session)
        self.smtp_credentials: SmtpCredentials = SmtpCredentialsRepository(session)
        self.providers: Providers = ProvidersRepository(session)
        self.destinations: Destinations = DestinationsRepository(session)
        self.routing_rules: RoutingRules = RoutingRulesRepository(session)
        self.limits: Limits = LimitsRepository(session)
        self.nodes: Nodes = NodesRepository(session)
        self.bundles: Bundles = BundlesRepository(session, principal)
        self.idempotency: Idempotency = IdempotencyRepository(session, principal)
        self.messages: Messages = MessagesRepository(session)
        self.books: Books = BooksRepository(session)

    async def now(self) -> datetime:
        """The transaction's time."""
        time: datetime = await self._session.value("now", "SELECT transaction_timestamp()")
        return time


class PostgresDatabase:
    """`controlplane.ports.Database`; see the module."""

    def __init__(
        self,
        pool: asyncpg.Pool[Any],
        *,
        acquire_timeout_s: float = 5.0,
        transaction_timeout_s: float = 25.0,
        observe: Observer = lambda _name, _seconds, _failed: None,
    ) -> None:
        self._pool = pool
        self._acquire_timeout_s = acquire_timeout_s
        self._transaction_timeout_s = transaction_timeout_s
        self._observe = observe

    @asynccontextmanager
    async def transaction(self, scope: Scope) -> AsyncIterator[Work]:
        """As `controlplane.ports.Database.transaction`."""
        settings = {
            "postroad.account": scope.account,
            "postroad.principal": scope.principal,
            "postroad.request_id": scope.request_id,
        }
        async with self._transaction(settings) as session:
            yield PostgresWork(session, scope.principal)

    async def find_api_key(self, lookup: str) -> AuthenticatedKey | None:
        """As `controlplane.ports.Database.find_api_key`."""
        async with self._session() as session:
            return await find_api_key(session, lookup)

    @asynccontextmanager
    async def authentication(self, lookup: str) -> AsyncIterator[Work]:
        """As `controlplane.ports.Database.authentication`."""
        async with self._transaction({"postroad.account": "", "postroad.api_key_lookup": lookup}) as session:
            yield PostgresWork(session, "")

    @asynccontextmanager
    async def _transaction(self, settings: dict[str, str]) -> AsyncIterator[Session]:
        async with self._session() as session:
            await session.run("begin", _begin(settings))
            yield session
            await session.run("commit", "COMMIT")

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[Session]:
        session: Session | None = None
        try:
            async with self._connection() as connection, asyncio.timeout(self._transaction_timeout_s):
                session = Session(connection, self._observe)
                yield session
        except ControlPlaneError:
            raise
        except _LOST_RACES as error:
            raise AbortedError(Reason.CONCURRENT_EDIT) from error
        except asyncpg.CharacterNotInRepertoireError as error:
            # The one character that text in PostgreSQL cannot hold.
            raise invalid("request", "must not hold the character NUL") from error
        except asyncpg.IntegrityConstraintViolationError as error:
            known = domain_error(error.constraint_name or "", session.subject if session is not None else "")
            if known is None:
                raise
            raise known from error
        except AWAY as error:
            raise UnavailableError(
                Reason.DATABASE_UNAVAILABLE, "the database cannot be reached", retry_after_s=_RETRY_AFTER_S
            ) from error

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        async with asyncio.timeout(self._acquire_timeout_s):
            connection = await self._pool.acquire()
        clean = False
        try:
            try:
                yield connection
                clean = True
            except AWAY:
                raise
            except Exception:
                # Refused by us or by the server, which still answers: the transaction can be ended in words.
                clean = await _roll_back(connection)
                raise
        finally:
            # Cancelled or doubtful: what the connection is in the middle of is not known.
            if not clean:
                # One that the server closed is out of the pool already, and says so.
                with suppress(asyncpg.InterfaceError):
                    connection.terminate()
            await self._pool.release(connection)


def _begin(settings: dict[str, str]) -> str:
    """Begin a transaction and tell it its settings in one round trip, which takes no arguments: values go as hex."""
    values = ", ".join(
        rf"set_config('{name}', convert_from('\x{value.encode().hex()}', 'UTF8'), true)"
        for name, value in settings.items()
    )
    return f"BEGIN; SELECT {values}"


async def _roll_back(connection: Connection) -> bool:
    try:
        async with asyncio.timeout(_ROLLBACK_TIMEOUT_S):
            await connection.execute("ROLLBACK")
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return False
    return True
