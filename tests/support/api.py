"""The public API on a real database and a real loopback port, with keys for an operator and for accounts."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any, cast

import asyncpg
import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from controlplane.adapters.grpc.api import Api, ApiParts, build_api
from controlplane.adapters.grpc.transport import API_OPTIONS
from controlplane.adapters.postgres.database import PostgresDatabase, open_api_pool
from controlplane.adapters.postgres.roles import API
from controlplane.adapters.sealing import Keyring
from controlplane.domain.hosts import HostPolicy
from controlplane.services.bootstrap import bootstrap
from postroad.control.v1 import (
    account_pb2,
    account_service_pb2,
    account_service_pb2_grpc,
    credential_pb2,
    credential_service_pb2,
    credential_service_pb2_grpc,
    destination_service_pb2_grpc,
    limit_service_pb2_grpc,
    message_service_pb2_grpc,
    node_service_pb2_grpc,
    provider_service_pb2_grpc,
    routing_rule_service_pb2_grpc,
    suspension_service_pb2_grpc,
)
from support.databases import Database
from support.fleet import role_dsn

_DETAILS = {
    "ErrorInfo": error_details_pb2.ErrorInfo,
    "BadRequest": error_details_pb2.BadRequest,
    "PreconditionFailure": error_details_pb2.PreconditionFailure,
    "ResourceInfo": error_details_pb2.ResourceInfo,
    "RetryInfo": error_details_pb2.RetryInfo,
    "QuotaFailure": error_details_pb2.QuotaFailure,
    "RequestInfo": error_details_pb2.RequestInfo,
}


class Signal:
    """A ledger signal that tests ring themselves."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self.waits = 0

    async def wait(self, timeout_s: float) -> None:
        self.waits += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self._rung.wait()
        except TimeoutError:
            return

    def ring(self) -> None:
        self._rung.set()
        self._rung = asyncio.Event()


def reading(request: Message) -> Callable[[], Awaitable[Message]]:
    """What a call in this process takes: a request that is read when the call is let in."""

    async def read() -> Message:
        return request

    return read


@dataclass(frozen=True)
class ApiError:
    """A call's failure, taken apart."""

    code: grpc.StatusCode
    text: str
    details: dict[str, Any]

    @property
    def reason(self) -> str:
        return str(self.details["ErrorInfo"].reason)

    @property
    def fields(self) -> list[str]:
        return [one.field for one in self.details["BadRequest"].field_violations]


@dataclass
class Client:
    """Stubs that send one key."""

    channel: grpc.aio.Channel
    key: str
    metadata: tuple[tuple[str, str], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.metadata = (("authorization", f"Bearer {self.key}"),)

    async def call(self, stub: Any, method: str, request: Message) -> Any:
        return await getattr(stub(self.channel), method)(request, metadata=self.metadata, timeout=20)

    async def account(self, method: str, request: Message) -> Any:
        return await self.call(account_service_pb2_grpc.AccountServiceStub, method, request)

    async def credential(self, method: str, request: Message) -> Any:
        return await self.call(credential_service_pb2_grpc.CredentialServiceStub, method, request)

    async def provider(self, method: str, request: Message) -> Any:
        return await self.call(provider_service_pb2_grpc.ProviderServiceStub, method, request)

    async def rule(self, method: str, request: Message) -> Any:
        return await self.call(routing_rule_service_pb2_grpc.RoutingRuleServiceStub, method, request)

    async def limit(self, method: str, request: Message) -> Any:
        return await self.call(limit_service_pb2_grpc.LimitServiceStub, method, request)

    async def node(self, method: str, request: Message) -> Any:
        return await self.call(node_service_pb2_grpc.NodeServiceStub, method, request)

    async def destination(self, method: str, request: Message) -> Any:
        return await self.call(destination_service_pb2_grpc.DestinationServiceStub, method, request)

    async def suspension(self, method: str, request: Message) -> Any:
        return await self.call(suspension_service_pb2_grpc.SuspensionServiceStub, method, request)

    async def message(self, method: str, request: Message) -> Any:
        return await self.call(message_service_pb2_grpc.MessageServiceStub, method, request)

    async def refused(self, call: Any) -> ApiError:
        """The error of a call that must fail."""
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            return take_apart(error)
        raise AssertionError(f"was not refused: {answer}")


def take_apart(error: grpc.aio.AioRpcError) -> ApiError:
    """Code, text and details of a failure."""
    details = {}
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            for packed in Status.FromString(cast("bytes", value)).details:
                kind = _DETAILS[packed.TypeName().rsplit(".", 1)[1]]
                message: Any = kind()
                assert packed.Unpack(message)
                details[message.DESCRIPTOR.name] = message
    return ApiError(error.code(), error.details() or "", details)


@dataclass
class ApiStack:
    """A running API."""

    api: Api
    database: Database
    store: PostgresDatabase
    pool: asyncpg.Pool[Any]
    channel: grpc.aio.Channel
    operator: Client
    signal: Signal
    calls: list[tuple[str, str, float | None]]
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def make_account(self, account: str, *scopes: str) -> Client:
        """An account with its default domain, and a client with a key of it."""
        domain = f"{account}.example"
        await self.operator.account(
            "CreateAccount",
            account_service_pb2.CreateAccountRequest(
                account_id=account, account=account_pb2.Account(sender_domains=[domain])
            ),
        )
        return await self.make_key(account, *scopes)

    async def make_key(self, account: str, *scopes: str) -> Client:
        """A client with a new key of an account; every scope unless some are named."""
        wanted = scopes or ("config.read", "config.write", "messages.read", "messages.write")
        key = await self.operator.credential(
            "CreateApiKey",
            credential_service_pb2.CreateApiKeyRequest(
                parent=f"accounts/{account}",
                api_key_id=f"key-{next(self.numbers)}",
                api_key=credential_pb2.ApiKey(scopes=wanted),
            ),
        )
        return Client(self.channel, key.secret)

    async def as_superuser(self, sql: str, *arguments: object) -> list[asyncpg.Record]:
        """Rows of a query that no row-level security touches."""
        connection = await asyncpg.connect(self.database.dsn())
        try:
            return await connection.fetch(sql, *arguments)
        finally:
            await connection.close()


@asynccontextmanager
async def running_api(database: Database, **parts: Any) -> AsyncIterator[ApiStack]:
    """An API on `database`, which is migrated; `parts` replace those of ApiParts."""
    pool = await open_api_pool(await role_dsn(database, API))
    signal, calls = Signal(), []
    store = PostgresDatabase(pool)
    settings: dict[str, Any] = {
        "database": store,
        "keyring": Keyring({"k1": bytes(range(32))}),
        "signal": signal,
        "hosts": HostPolicy([ip_network("127.0.0.0/8")]),
        "observe": lambda *call: calls.append(call),
    }
    api = build_api(ApiParts(**(settings | parts)))
    secret = await bootstrap(store, api.pools, os.urandom)
    server = grpc.aio.server(interceptors=[api.interceptor], options=API_OPTIONS)
    api.registry.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    try:
        yield ApiStack(api, database, store, pool, channel, Client(channel, secret), signal, calls)
    finally:
        api.drain()
        signal.ring()
        async with asyncio.timeout(15):
            await channel.close()
            await server.stop(None)
            await pool.close()
