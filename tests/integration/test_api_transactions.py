"""What a transaction leaves behind when it does not end as it should."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import grpc
import pytest

from controlplane.adapters.grpc.errors import ApiStatusError, code_of
from controlplane.domain.access import Caller, Scope
from controlplane.domain.errors import UnavailableError
from controlplane.ports import operator_scope
from controlplane.ports import scope_of as scope_of_caller
from postroad.control.v1 import account_service_pb2 as service
from support.api import ApiStack, reading, running_api
from support.databases import Database


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


async def settings_left(stack: ApiStack) -> set[str]:
    """What the pool's connections still say of an account."""
    left = set()
    held = [await stack.pool.acquire() for _ in range(stack.pool.get_size())]
    for connection in held:
        left.add(await connection.fetchval("SELECT coalesce(current_setting('postroad.account', true), '')"))
        await stack.pool.release(connection)
    return left


async def test_a_scope_ends_with_its_transaction(stack: ApiStack) -> None:
    caller = Caller("accounts/acme/apiKeys/k", "acme", frozenset({Scope.CONFIG_READ}))
    async with stack.store.transaction(scope_of_caller(caller)):
        pass
    assert await settings_left(stack) == {""}


async def test_a_transaction_that_is_cancelled_midway_leaks_nothing_to_the_next(stack: ApiStack) -> None:
    begun = asyncio.Event()

    async def work() -> None:
        async with stack.store.transaction(operator_scope("tests")) as transaction:
            begun.set()
            await transaction.accounts.list_page("", 1)
            await asyncio.get_running_loop().create_future()

    for _ in range(5):
        begun.clear()
        task = asyncio.create_task(work())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await settings_left(stack) <= {""}
    await stack.make_account("acme")


async def test_a_call_that_is_cancelled_midway_commits_nothing(stack: ApiStack) -> None:
    await stack.make_account("acme")
    blocker = await asyncpg.connect(stack.database.dsn())
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("SELECT 1 FROM postroad.accounts WHERE account = 'acme' FOR UPDATE")
    request = service.SuspendAccountRequest(name="accounts/acme", reason="late")
    call = asyncio.create_task(stack.operator.account("SuspendAccount", request))
    await until_somebody_waits(blocker)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await transaction.rollback()
    await blocker.close()
    account = await stack.operator.account("GetAccount", service.GetAccountRequest(name="accounts/acme"))
    assert account.suspend_reason == ""


async def test_a_call_that_outlives_its_deadline_says_so_and_commits_nothing(stack: ApiStack) -> None:
    await stack.make_account("acme")
    blocker = await asyncpg.connect(stack.database.dsn())
    try:
        async with blocker.transaction():
            await blocker.execute("SELECT 1 FROM postroad.accounts WHERE account = 'acme' FOR UPDATE")
            request = service.SuspendAccountRequest(name="accounts/acme", reason="late")
            method = "/postroad.control.v1.AccountService/SuspendAccount"
            with pytest.raises(ApiStatusError) as ended:
                await stack.api.registry.call(method, reading(request), stack.operator.metadata, timeout_s=0.3)
            assert code_of(ended.value.status) is grpc.StatusCode.DEADLINE_EXCEEDED
    finally:
        await blocker.close()
    account = await stack.operator.account("GetAccount", service.GetAccountRequest(name="accounts/acme"))
    assert account.suspend_reason == ""


async def until_somebody_waits(connection: asyncpg.Connection) -> None:
    for _ in range(400):
        if await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody waits")


async def test_a_failed_edit_leaves_neither_change_nor_audit(stack: ApiStack) -> None:
    async def fail() -> None:
        async with stack.store.transaction(operator_scope("tests")) as work:
            account = await work.accounts.get("acme")
            await work.accounts.set_state(account)
            raise RuntimeError("between change and commit")

    await stack.make_account("acme")
    (before,) = await stack.as_superuser("SELECT count(*) AS n FROM postroad.audit_log")
    with pytest.raises(RuntimeError):
        await fail()
    (after,) = await stack.as_superuser("SELECT count(*) AS n FROM postroad.audit_log")
    assert after["n"] == before["n"]


async def test_a_lost_connection_is_unavailable_with_a_retry_and_mends_by_itself(stack: ApiStack) -> None:
    await stack.make_account("acme")
    request = service.GetAccountRequest(name="accounts/acme")

    async def work_on_a_lost_connection() -> None:
        async with stack.store.transaction(operator_scope("tests")) as work:
            await work.accounts.get("acme")
            await stack.as_superuser(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postroad_api'"
            )
            await work.accounts.get("acme")

    with pytest.raises(UnavailableError) as lost:
        await work_on_a_lost_connection()
    assert lost.value.retry_after_s > 0
    assert (await stack.operator.account("GetAccount", request)).name == "accounts/acme"


async def test_a_database_that_refuses_connections_is_unavailable(stack: ApiStack) -> None:
    await stack.make_account("acme")
    await stack.as_superuser("ALTER ROLE postroad_api NOLOGIN")
    try:
        await stack.as_superuser(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postroad_api'"
        )
        request = service.GetAccountRequest(name="accounts/acme")
        for _ in range(3):
            error = await stack.operator.refused(stack.operator.account("GetAccount", request))
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
            assert error.details["RetryInfo"].retry_delay.seconds > 0
    finally:
        await stack.as_superuser("ALTER ROLE postroad_api LOGIN")
    assert (await stack.operator.account("GetAccount", request)).name == "accounts/acme"


async def test_a_pool_that_is_used_up_is_unavailable_soon(migrated_database: Database) -> None:
    from controlplane.adapters.postgres.database import PostgresDatabase, open_api_pool
    from controlplane.adapters.postgres.roles import API
    from support.fleet import role_dsn

    pool = await open_api_pool(await role_dsn(migrated_database, API), connections=1)
    store = PostgresDatabase(pool, acquire_timeout_s=0.05)
    async with store.transaction(operator_scope("tests")):
        with pytest.raises(UnavailableError):
            async with store.transaction(operator_scope("tests")):
                pass
    await pool.close()
