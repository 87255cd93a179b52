"""What every call goes through, whichever way it came in: guard, deadline, error table, measurement.

Contract. `Calls.unary` runs a handler and returns its answer, `Calls.stream` runs one that yields; both raise
ApiStatusError for everything that went wrong, but for cancellation, which passes. The observer hears of each call
that ended: full method name, name of the status, seconds unless it streamed. A unary call has a deadline of its own
even if the caller set none; its handler reads the request, so that nothing of one is read whose key opens nothing.
`LARGE_METHODS` take requests that are larger than others': they find a place first (`Places`), and wait for one before
they are read. A stream is ended when its key no longer opens it, before the next answer, and by `take`, which carries
each answer, when its reader does not take that within a minute.
"""

from __future__ import annotations

import asyncio
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import TypeVar

from google.rpc.status_pb2 import Status

from controlplane.adapters.grpc.auth import Guard, Metadata
from controlplane.adapters.grpc.context import calling
from controlplane.adapters.grpc.errors import ApiStatusError, code_of, to_status
from controlplane.adapters.grpc.places import Places
from controlplane.domain.access import Caller
from controlplane.domain.errors import ControlPlaneError, DeadlineError, Reason, ResourceExhaustedError
from controlplane.telemetry import get_logger

CallObserver = Callable[[str, str, float | None], None]
"""Told of each call that ended: method, status, seconds (None for one that streamed)."""

MAX_RECEIVE_BYTES = 4 * 1024 * 1024
MAX_LARGE_BYTES = 32 * 1024 * 1024
LARGE_METHODS = frozenset(
    f"/postroad.control.v1.MessageService/{method}" for method in ("SendMessage", "BatchSendMessages")
)
READER_S = 60.0
_DEADLINE_S = 30.0
# How old the look at a stream's key may be when an answer is sent.
_ADMITTED_S = 1.0
# Methods that wait on purpose, and those whose requests take a while to come.
_LONG_DEADLINES_S = {
    "/google.longrunning.Operations/WaitOperation": 75.0,
    "/postroad.control.v1.SuspensionService/WaitSuspension": 75.0,
} | dict.fromkeys(LARGE_METHODS, 60.0)

Answer = TypeVar("Answer")


class Calls:
    """See the module."""

    def __init__(self, guard: Guard, observe: CallObserver = lambda _method, _status, _seconds: None) -> None:
        self._guard = guard
        self._observe = observe
        self._places = Places()
        self._log = get_logger("api")

    async def unary(
        self,
        method: str,
        metadata: Metadata,
        handle: Callable[[], Awaitable[Answer]],
        remaining_s: float | None,
    ) -> Answer:
        """Run a handler that answers once; `remaining_s` is what the caller's deadline leaves."""
        allowed_s = _LONG_DEADLINES_S.get(method, _DEADLINE_S)
        begun, ended = time.monotonic(), "CANCELLED"
        try:
            deadline = asyncio.timeout(allowed_s if remaining_s is None else min(remaining_s, allowed_s))
            try:
                async with deadline:
                    caller = await self._guard.enter(method, metadata)
                    with _as(caller):
                        if method in LARGE_METHODS and caller is not None:
                            async with self._places.place(caller.account):
                                answer = await handle()
                        else:
                            answer = await handle()
            except TimeoutError as error:
                if deadline.expired():
                    raise DeadlineError(Reason.DEADLINE_TOO_SHORT) from error
                raise
            ended = "OK"
            return answer
        except ApiStatusError as error:
            ended = code_of(error.status).name
            raise
        except Exception as error:
            status = self._status(method, error)
            ended = code_of(status).name
            raise ApiStatusError(status) from error
        finally:
            self._observe(method, ended, time.monotonic() - begun)

    async def stream(
        self, method: str, metadata: Metadata, handle: Callable[[], AsyncGenerator[Answer, None]]
    ) -> AsyncGenerator[Answer, None]:
        """Run a handler that answers many times; however this ends, what the handler holds is given back first.

        An error of the domain that is thrown into it ends it as one of the handler's would.
        """
        ended = "CANCELLED"
        try:
            caller = await self._guard.enter(method, metadata)
            with _as(caller):
                answers = handle()
            admitted = time.monotonic()
            async with aclosing(answers):
                async for answer in answers:
                    if time.monotonic() - admitted > _ADMITTED_S:
                        await self._guard.admit(method, metadata)
                        admitted = time.monotonic()
                    yield answer
            ended = "OK"
        except Exception as error:
            status = self._status(method, error)
            ended = code_of(status).name
            raise ApiStatusError(status) from error
        finally:
            self._observe(method, ended, None)

    async def take(self, answers: AsyncGenerator[Answer, None], writing: Awaitable[None]) -> None:
        """Wait until the reader of a `stream` took an answer; when that takes too long it ends with ApiStatusError."""
        limit = asyncio.timeout(READER_S)
        try:
            async with limit:
                await writing
        except TimeoutError:
            if not limit.expired():
                raise
            # Merely closed, it would be counted as one that its caller gave up.
            await answers.athrow(
                ResourceExhaustedError(Reason.READER_TOO_SLOW, "resume from the last position", retry_after_s=1)
            )

    def _status(self, method: str, error: Exception) -> Status:
        request = uuid.uuid4().hex
        if not isinstance(error, ControlPlaneError):
            # Where and what kind, not the exception's words: a driver's quote the values it was given.
            where = "".join(traceback.format_tb(error.__traceback__))
            self._log.error(
                "api.failed", method=method, request_id=request, error=type(error).__qualname__, where=where
            )
        return to_status(error, request)


def _as(caller: Caller | None) -> AbstractContextManager[None]:
    return nullcontext() if caller is None else calling(caller)
