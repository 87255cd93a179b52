"""Puts every method of a grpc.aio server behind `Calls`: the handler is wrapped, whichever of the four kinds it is.

Contract. An interceptor is given handlers, not calls, so each handler is replaced by one that runs it through `Calls`
and ends with the status of ApiStatusError, details included. `abort` is awaited and its exception passes, since
suppressing it is undefined. A method that the server does not have stays UNIMPLEMENTED.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
import grpc.aio

from controlplane.adapters.grpc.auth import PUBLIC_METHODS
from controlplane.adapters.grpc.calls import LARGE_METHODS, MAX_LARGE_BYTES, MAX_RECEIVE_BYTES, Calls
from controlplane.adapters.grpc.context import coming_from
from controlplane.adapters.grpc.errors import ApiStatusError, code_of
from controlplane.domain.acceptance import Origin
from controlplane.domain.errors import invalid
from dataplane.core.limits import normalize_address

_DETAILS_KEY = "grpc-status-details-bin"
_PEERS = frozenset({"ipv4", "ipv6"})


class ApiInterceptor(grpc.aio.ServerInterceptor):
    """See the module."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if method in PUBLIC_METHODS and handler.response_streaming:
            # Health.Watch writes to its context instead of yielding; it needs neither key nor error table.
            return handler
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **codecs)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._gathering(method, handler.stream_unary), **codecs)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), **codecs)
        return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), **codecs)

    def _unary(self, method: str, behavior: Any) -> Any:
        """Run a method with one request, which is read when the call is let in and not before.

        On the wire it looks like a stream of one: served as such it leaves the reading to us.
        """
        most_bytes = MAX_LARGE_BYTES if method in LARGE_METHODS else MAX_RECEIVE_BYTES

        async def handle(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async def read_and_run() -> Any:
                request = await anext(requests, None)
                if request is None:
                    raise invalid("request", "there is none")
                if request.ByteSize() > most_bytes:
                    raise invalid("request", f"is larger than {most_bytes >> 20} MiB")
                return await behavior(request, context)

            return await self._run(method, read_and_run, context)

        return handle

    def _gathering(self, method: str, behavior: Any) -> Any:
        async def handle(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            return await self._run(method, lambda: behavior(requests, context), context)

        return handle

    async def _run(
        self, method: str, run: Callable[[], Awaitable[Any]], context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        try:
            with coming_from(lambda: _origin(context)):
                return await self._calls.unary(
                    method, context.invocation_metadata() or (), run, context.time_remaining()
                )
        except ApiStatusError as error:
            await _abort(context, error)

    def _stream(self, method: str, behavior: Any) -> Any:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            answers = self._calls.stream(
                method, context.invocation_metadata() or (), lambda: behavior(request, context)
            )
            try:
                # However it ends, what the handler holds is given back now.
                async with aclosing(answers):
                    async for answer in answers:
                        await self._calls.take(answers, context.write(answer))
            except ApiStatusError as error:
                await _abort(context, error)

        return handle


def _origin(context: grpc.aio.ServicerContext[Any, Any]) -> Origin:
    """Address and TLS of the peer, which gRPC writes as `ipv4:192.0.2.1:5000` and `ipv6:%5B::1%5D:5000`."""
    kind, _, rest = unquote(context.peer()).partition(":")
    address = rest.rpartition(":")[0].strip("[]") if kind in _PEERS else ""
    is_secure = context.auth_context().get("transport_security_type") == [b"ssl"]
    return Origin(normalize_address(address), "GRPCS" if is_secure else "GRPC", "TLS" if is_secure else "")


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: ApiStatusError) -> NoReturn:
    status = error.status
    await context.abort(code_of(status), status.message, ((_DETAILS_KEY, status.SerializeToString()),))
