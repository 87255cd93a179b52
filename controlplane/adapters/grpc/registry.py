"""The services of the public API, for a server to offer and for this process to call without a network hop.

Contract. `ApiRegistry.services` lists (descriptor, servicer, function that adds it to a server). `call(method, read,
metadata)` runs a method exactly as over the network, through the same guard, deadline and error table: it returns the
answer, or for a method that streams an asynchronous generator of answers, each of which is carried under `take`; errors
are ApiStatusError. The request of a method that does not stream is read, by `read`, when the call is let in.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from controlplane.adapters.grpc.auth import Metadata
from controlplane.adapters.grpc.calls import Calls
from controlplane.adapters.grpc.errors import ApiStatusError, to_status
from controlplane.domain.errors import Reason, UnimplementedError


class ApiService(NamedTuple):
    """One service of the API."""

    descriptor: ServiceDescriptor
    servicer: Any
    add_to_server: Callable[[Any, Any], None]


class ApiRegistry:
    """See the module."""

    def __init__(self, calls: Calls, services: Sequence[ApiService]) -> None:
        self.services = tuple(services)
        self._calls = calls
        self._methods: dict[str, tuple[MethodDescriptor, Any]] = {
            f"/{service.descriptor.full_name}/{method.name}": (method, getattr(service.servicer, method.name))
            for service in self.services
            for method in service.descriptor.methods
        }

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Let a server offer every service."""
        for service in self.services:
            service.add_to_server(service.servicer, server)

    def method(self, full_name: str) -> MethodDescriptor:
        """Return the descriptor of `/package.Service/Method`; KeyError when there is none."""
        return self._methods[full_name][0]

    async def call(
        self, full_name: str, read: Callable[[], Awaitable[Message]], metadata: Metadata, timeout_s: float | None = None
    ) -> Message | AsyncGenerator[Message, None]:
        """Call `/package.Service/Method`; see the module."""
        if full_name not in self._methods:
            unknown = UnimplementedError(Reason.METHOD_UNKNOWN, metadata={"method": full_name})
            raise ApiStatusError(to_status(unknown, ""))
        descriptor, behavior = self._methods[full_name]
        if descriptor.server_streaming:
            request = await read()
            return self._calls.stream(full_name, metadata, lambda: behavior(request, None))

        async def handle() -> Message:
            answer: Message = await behavior(await read(), None)
            return answer

        return await self._calls.unary(full_name, metadata, handle, timeout_s)

    async def take(self, answers: AsyncGenerator[Message, None], writing: Awaitable[None]) -> None:
        """Wait until the reader of a stream took an answer; when that takes too long it ends with ApiStatusError."""
        await self._calls.take(answers, writing)
