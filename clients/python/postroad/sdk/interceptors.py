"""What happens around each call, for sync and async channels: request ids, deadlines, and errors as exceptions.

Both kinds do the same. A unary call without a timeout gets `DEFAULT_TIMEOUT_S`; a stream may last. `grpc.RpcError`
never reaches a caller: it becomes a `PostroadError`, also in the middle of a stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import grpc.aio

from postroad.sdk.channel import DEFAULT_TIMEOUT_S, fill_request_id
from postroad.sdk.errors import PostroadError, to_error


class _Details(NamedTuple):
    """Call details that can be replaced; gRPC reads these names."""

    method: Any
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None = None


def _with_timeout(details: Any) -> Any:
    if details.timeout is not None:
        return details
    return _Details(
        details.method,
        DEFAULT_TIMEOUT_S,
        details.metadata,
        details.credentials,
        details.wait_for_ready,
        getattr(details, "compression", None),
    )


def _translated(error: Any) -> PostroadError:
    return to_error(error.code(), error.details(), error.trailing_metadata())


class SyncInterceptor(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """For `grpc.secure_channel`."""

    def intercept_unary_unary(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        """One request, one answer; blocks until it is there."""
        fill_request_id(request)
        call = continuation(_with_timeout(client_call_details), request)
        try:
            call.result()
        except grpc.RpcError as error:
            raise _translated(error) from None
        return call

    def intercept_unary_stream(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        """One request, many answers."""
        return SyncStream(continuation(client_call_details, request))


class SyncStream:
    """The answers of a stream; `cancel()` ends it from any thread."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._call)
        except grpc.RpcError as error:
            raise _translated(error) from None

    def cancel(self) -> None:
        """End the stream; a reader gets CancelledError."""
        self._call.cancel()


class AsyncUnaryInterceptor(grpc.aio.UnaryUnaryClientInterceptor):
    """For unary calls on `grpc.aio.secure_channel`."""

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        """One request, one answer; cancelling the caller cancels the call."""
        fill_request_id(request)
        call = await continuation(_with_timeout(client_call_details), request)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None


class AsyncStreamInterceptor(grpc.aio.UnaryStreamClientInterceptor):
    """For streams on `grpc.aio.secure_channel`."""

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        """One request, many answers."""
        return _translated_stream(await continuation(client_call_details, request))


async def _translated_stream(call: Any) -> AsyncIterator[Any]:
    try:
        async for answer in call:
            yield answer
    except grpc.aio.AioRpcError as error:
        raise _translated(error) from None
    finally:
        call.cancel()
