"""The clients: one attribute for each service, with the generated stubs' methods and types.

    with connect("127.0.0.1:7443", api_key, "ca.pem") as client:
        client.accounts.GetAccount(GetAccountRequest(name="accounts/demo"))

    async with connect_async(…) as client:
        await client.accounts.GetAccount(…)

Contract. Connecting does nothing yet; the first call finds the server. Calls raise `PostroadError` (errors.py) and are
retried as channel.py says. A client may be shared by threads (sync) or by the tasks of one loop (async), never by two
loops. After `close()` calls raise ValueError (sync) or UsageError (async).
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio
from google.longrunning import operations_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from postroad.control.v1.account_service_pb2_grpc import AccountServiceStub
from postroad.control.v1.book_service_pb2_grpc import BookServiceStub
from postroad.control.v1.credential_service_pb2_grpc import CredentialServiceStub
from postroad.control.v1.destination_service_pb2_grpc import DestinationServiceStub
from postroad.control.v1.limit_service_pb2_grpc import LimitServiceStub
from postroad.control.v1.message_service_pb2_grpc import MessageServiceStub
from postroad.control.v1.node_service_pb2_grpc import NodeServiceStub
from postroad.control.v1.provider_service_pb2_grpc import ProviderServiceStub
from postroad.control.v1.routing_rule_service_pb2_grpc import RoutingRuleServiceStub
from postroad.control.v1.suspension_service_pb2_grpc import SuspensionServiceStub
from postroad.sdk.channel import credentials, options
from postroad.sdk.interceptors import AsyncStreamInterceptor, AsyncUnaryInterceptor, SyncInterceptor

if TYPE_CHECKING:
    # The asynchronous faces of the stubs exist for type checkers only.
    from postroad.control.v1.account_service_pb2_grpc import AccountServiceAsyncStub
    from postroad.control.v1.book_service_pb2_grpc import BookServiceAsyncStub
    from postroad.control.v1.credential_service_pb2_grpc import CredentialServiceAsyncStub
    from postroad.control.v1.destination_service_pb2_grpc import DestinationServiceAsyncStub
    from postroad.control.v1.limit_service_pb2_grpc import LimitServiceAsyncStub
    from postroad.control.v1.message_service_pb2_grpc import MessageServiceAsyncStub
    from postroad.control.v1.node_service_pb2_grpc import NodeServiceAsyncStub
    from postroad.control.v1.provider_service_pb2_grpc import ProviderServiceAsyncStub
    from postroad.control.v1.routing_rule_service_pb2_grpc import RoutingRuleServiceAsyncStub
    from postroad.control.v1.suspension_service_pb2_grpc import SuspensionServiceAsyncStub


class Client:
    """The API for code without asyncio; a context manager."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        intercepted = grpc.intercept_channel(channel, SyncInterceptor())
        self.accounts = AccountServiceStub(intercepted)
        self.credentials = CredentialServiceStub(intercepted)
        self.providers = ProviderServiceStub(intercepted)
        self.routing_rules = RoutingRuleServiceStub(intercepted)
        self.limits = LimitServiceStub(intercepted)
        self.messages = MessageServiceStub(intercepted)
        self.books = BookServiceStub(intercepted)
        self.nodes = NodeServiceStub(intercepted)
        self.destinations = DestinationServiceStub(intercepted)
        self.suspensions = SuspensionServiceStub(intercepted)
        self.operations = operations_pb2_grpc.OperationsStub(intercepted)  # type: ignore[no-untyped-call]  # Google's, untyped
        self._health: Any = health_pb2_grpc.HealthStub(intercepted)

    def is_serving(self) -> bool:
        """Whether the server says that it serves (grpc.health.v1)."""
        answer = self._health.Check(health_pb2.HealthCheckRequest())
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Drop the connection; running calls are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """The API for asyncio; an async context manager."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self.accounts: AccountServiceAsyncStub = AccountServiceStub(channel)
        self.credentials: CredentialServiceAsyncStub = CredentialServiceStub(channel)
        self.providers: ProviderServiceAsyncStub = ProviderServiceStub(channel)
        self.routing_rules: RoutingRuleServiceAsyncStub = RoutingRuleServiceStub(channel)
        self.limits: LimitServiceAsyncStub = LimitServiceStub(channel)
        self.messages: MessageServiceAsyncStub = MessageServiceStub(channel)
        self.books: BookServiceAsyncStub = BookServiceStub(channel)
        self.nodes: NodeServiceAsyncStub = NodeServiceStub(channel)
        self.destinations: DestinationServiceAsyncStub = DestinationServiceStub(channel)
        self.suspensions: SuspensionServiceAsyncStub = SuspensionServiceStub(channel)
        self.operations = operations_pb2_grpc.OperationsStub(channel)  # type: ignore[no-untyped-call]  # Google's, untyped
        self._health: Any = health_pb2_grpc.HealthStub(channel)

    async def is_serving(self) -> bool:
        """Whether the server says that it serves (grpc.health.v1)."""
        answer = await self._health.Check(health_pb2.HealthCheckRequest())
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Drop the connection; running calls are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def connect(server: str, api_key: str, ca_file: str | Path | None = None) -> Client:
    """A client for `server` (`host:port`), trusting `ca_file` or the system's CAs. OSError for an unreadable file."""
    return Client(grpc.secure_channel(server, credentials(api_key, ca_file), options=options()))


def connect_async(server: str, api_key: str, ca_file: str | Path | None = None) -> AsyncClient:
    """As `connect`, for asyncio; to be called on the loop that will use it."""
    interceptors = [AsyncUnaryInterceptor(), AsyncStreamInterceptor()]
    return AsyncClient(
        grpc.aio.secure_channel(server, credentials(api_key, ca_file), options=options(), interceptors=interceptors)
    )
