"""Carries ConfigStreamService: one driver per stream between gRPC and the node's session.

Contract. The driver reads, writes, records and ticks, each in a task of its own, and ends with the first that ends.
What is sent is pulled from the session, so that nothing queues while a node reads slowly. A database that is away
costs a node its Hello (UNAVAILABLE) and delays what is recorded, nothing else. However a stream ends, its slot is
gone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, NoReturn

import grpc
import grpc.aio

from controlplane.adapters.grpc.stream_codec import (
    BadMessageError,
    StreamEncoder,
    ack_of,
    health_of,
    hello_of,
    nack_of,
    spools_of,
)
from controlplane.adapters.grpc.transport import identity_of
from controlplane.adapters.pki import NodeIdentity, PkiError
from controlplane.domain.errors import UnavailableError
from controlplane.stream.fleet import FleetService, NotAdmittedError
from controlplane.stream.hub import Slot, TooManyStreamsError, close
from controlplane.stream.session import Close, CloseCode
from postroad.node.v1 import config_stream_service_pb2 as pb

Context = grpc.aio.ServicerContext[pb.StreamConfigRequest, bytes]
Report = Callable[..., None]
"""Told of events by name, with facts as keywords."""

_SERVICE = "postroad.node.v1.ConfigStreamService"
_HELLO_TIMEOUT_S = 15.0
_RECORD_RETRY_S = 2.0
_MINUTE_S = 60.0
_CODES = {
    CloseCode.ABORTED: grpc.StatusCode.ABORTED,
    CloseCode.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    CloseCode.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    CloseCode.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    CloseCode.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
}


class _StreamEndedError(Exception):
    """The stream is to end with this status."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class NodeConfigServicer:
    """ConfigStreamService; see the module."""

    def __init__(
        self,
        fleet: FleetService,
        clock: Callable[[], datetime],
        report: Report,
        *,
        progress_s: float = _MINUTE_S,
    ) -> None:
        self._fleet = fleet
        self._clock = clock
        self._report = report
        self._progress_s = progress_s
        self._encoder = StreamEncoder(clock)
        self._open = 0
        self._leaving: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server is given. Responses are bytes already: they are shared between streams."""
        method = grpc.stream_stream_rpc_method_handler(
            self.stream_config, request_deserializer=pb.StreamConfigRequest.FromString, response_serializer=bytes
        )
        return grpc.method_handlers_generic_handler(_SERVICE, {"StreamConfig": method})

    async def wait_idle(self) -> None:
        """Return when no stream is open."""
        await self._idle.wait()

    async def stream_config(self, _: AsyncIterator[pb.StreamConfigRequest], context: Context) -> None:
        """One stream, from its opening to its end."""
        self._open += 1
        self._idle.clear()
        try:
            identity = identity_of(context)
            await self._serve(identity, context)
        except PkiError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except _StreamEndedError as end:
            await context.abort(end.code, end.text)
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _serve(self, identity: NodeIdentity, context: Context) -> None:
        wake, changed = asyncio.Event(), asyncio.Event()
        async with self._admitted(identity, wake) as slot:
            self._report("stream.opened", node=slot.node_id)
            work: list[Awaitable[None]] = [
                self._read(slot, context, changed),
                self._write(slot, context, wake, changed),
                self._record(slot, changed),
                self._tick(slot, identity.not_after),
            ]
            try:
                await _first_of(work)
            finally:
                self._report("stream.closed", node=slot.node_id)

    @asynccontextmanager
    async def _admitted(self, identity: NodeIdentity, wake: asyncio.Event) -> AsyncIterator[Slot]:
        try:
            slot = await self._fleet.admit(identity.node_id, identity.serial, wake.set)
        except NotAdmittedError:
            raise _StreamEndedError(grpc.StatusCode.UNAUTHENTICATED, "the node's certificate is refused") from None
        except TooManyStreamsError:
            raise _StreamEndedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams here") from None
        except UnavailableError as error:
            raise _StreamEndedError(grpc.StatusCode.UNAVAILABLE, error.text) from error
        try:
            yield slot
        finally:
            # Of a client that is gone the call is cancelled, and perhaps at this very moment.
            leaving = asyncio.create_task(self._leave(slot))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            await asyncio.shield(leaving)

    async def _leave(self, slot: Slot) -> None:
        try:
            await self._fleet.leave(slot)
        except UnavailableError as error:
            # `connected` stays true until the node comes back somewhere; last_seen_time tells.
            self._report("stream.leave_unrecorded", node=slot.node_id, error=error.text)

    async def _read(self, slot: Slot, context: Context, changed: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                request: Any = await context.read()
        except TimeoutError:
            _end(grpc.StatusCode.DEADLINE_EXCEEDED, "there was no Hello")
        while request is not grpc.aio.EOF:
            try:
                await self._receive(slot, request)
            except BadMessageError as error:
                close(slot, CloseCode.INVALID_ARGUMENT, str(error))
            changed.set()
            request = await context.read()

    async def _receive(self, slot: Slot, request: pb.StreamConfigRequest) -> None:
        match request.WhichOneof("message"):
            case "hello":
                await self._greet(slot, request.hello)
            case "ack":
                slot.session.receive_ack(ack_of(request.ack))
                self._report("config.acked", node=slot.node_id)
            case "nack":
                nack = nack_of(request.nack)
                slot.session.receive_nack(nack)
                self._report("config.nacked", node=slot.node_id, reason=nack.reason, error=nack.text)
            case "status_report":
                await self._heartbeat(slot, request.status_report)
            case _:
                raise BadMessageError("a message says nothing")
        slot.wake()

    async def _greet(self, slot: Slot, message: pb.Hello) -> None:
        try:
            await self._fleet.greet(slot, hello_of(message))
        except UnavailableError as error:
            _end(grpc.StatusCode.UNAVAILABLE, error.text)

    async def _heartbeat(self, slot: Slot, message: pb.StatusReport) -> None:
        health = health_of(message, self._clock())
        try:
            await self._fleet.heartbeat(slot, health, message.denials_version, spools_of(message.spools))
        except UnavailableError as error:
            self._report("stream.heartbeat_unrecorded", node=slot.node_id, error=error.text)

    async def _write(self, slot: Slot, context: Context, wake: asyncio.Event, changed: asyncio.Event) -> None:
        while True:
            wake.clear()
            while (output := slot.session.next_output()) is not None:
                if isinstance(output, Close):
                    if output.code is CloseCode.OK:
                        return
                    _end(_CODES[output.code], output.text)
                for message in self._encoder.encode(output):
                    await context.write(message)
                changed.set()
            await wake.wait()

    async def _record(self, slot: Slot, changed: asyncio.Event) -> None:
        while True:
            await changed.wait()
            changed.clear()
            try:
                await self._fleet.record(slot)
            except UnavailableError:
                await asyncio.sleep(_RECORD_RETRY_S)
                changed.set()

    async def _tick(self, slot: Slot, not_after: datetime) -> None:
        while True:
            # Spread, so that a thousand nodes do not speak in the same second.
            await asyncio.sleep(self._progress_s * random.uniform(0.75, 1.0))  # noqa: S311 - not secret
            if self._clock() > not_after:
                close(slot, CloseCode.UNAUTHENTICATED, "the node's certificate has ended")
            slot.session.tick()
            slot.wake()


def _end(code: grpc.StatusCode, text: str) -> NoReturn:
    raise _StreamEndedError(code, text)


async def _first_of(work: list[Awaitable[None]]) -> None:
    """Run all until one ends, then end the others; raises what that one raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
