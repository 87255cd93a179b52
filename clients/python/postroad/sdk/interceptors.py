"""What happens around each call, for sync and async channels: request ids, deadlines, and errors as exceptions.

Both kinds do the same. A unary call without a timeout gets `DEFAULT_TIMEOUT_S`; a stream may last. A call that is to
wait for its quota (channel.py says which) waits here. `grpc.RpcError` never reaches a caller: it becomes a
`PostroadError`, also in the middle of a stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import grpc.aio

from postroad.sdk.channel import DEFAULT_TIMEOUT_S, fill_request_id, wait_before_repeating_s
from postroad.sdk.errors import PostroadError, to_error


class _Details(NamedTuple):
    """Call details that can be replaced; gRPC reads these names."""

    method: Any
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None = None


class _Patience:
    """What one unary call may take, its waits for a quota included."""

    def __init__(self, details: Any, clock: Callable[[], float]) -> None:
        self._details = details
        self._clock = clock
        self._end_s = clock() + (DEFAULT_TIMEOUT_S if details.timeout is None else details.timeout)
        self._waits = 0

    def details(self) -> _Details:
        """The details of the next try, with the time that is left as its timeout."""
        given = self._details
        compression = getattr(given, "compression", None)
        left_s = max(0.0, self._end_s - self._clock())
        return _Details(given.method, left_s, given.metadata, given.credentials, given.wait_for_ready, compression)

    def wait_s(self, error: PostroadError) -> float:
        """How long to wait before the next try; raises `error` when there is to be none."""
        method = self._details.method
        name = method.decode() if isinstance(method, bytes) else method
        wait_s = wait_before_repeating_s(name, error, self._waits, self._end_s - self._clock())
        if wait_s is None:
            raise error from None
        self._waits += 1
        return wait_s


def _translated(error: Any) -> PostroadError:
    return to_error(error.code(), error.details(), error.trailing_metadata())


class SyncInterceptor(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """For `grpc.secure_channel`."""

    def __init__(
        self, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sleep = sleep
        self._clock = clock

    def intercept_unary_unary(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        """One request, one answer; blocks until it is there."""
        fill_request_id(request)
        patience = _Patience(client_call_details, self._clock)
        while True:
            call = continuation(patience.details(), request)
            try:
                call.result()
            except grpc.RpcError as error:
                self._sleep(patience.wait_s(_translated(error)))
            else:
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

    def __init__(
        self,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sleep = sleep
        self._clock = clock

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        """One request, one answer; cancelling the caller cancels the call."""
        fill_request_id(request)
        patience = _Patience(client_call_details, self._clock)
        while True:
            call = await continuation(patience.details(), request)
            try:
                return await call
            except grpc.aio.AioRpcError as error:
                wait_s = patience.wait_s(_translated(error))
            await self._sleep(wait_s)


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
