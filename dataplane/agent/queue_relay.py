"""Passes the workers' calls of QueueService on to the control plane, as bytes.

Contract. Each call is answered once, with the response or with the status of its failure; a call that the agent cannot
take (MAX_CALLS are under way) or whose control plane cannot be reached is UNAVAILABLE. One channel for all of them,
opened with the first one; opened anew where the control plane refuses the certificate, for the node may have been
enrolled again. Nothing here is durable or repeated: what is not known, the worker resolves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio

from dataplane.agent.channel import why_ended
from dataplane.agent.identity import IdentityError
from dataplane.link import QueueAnswer, QueueCall, QueueMethod
from dataplane.ports import EventLog

MAX_CALLS = 256
_UNAVAILABLE = 14
_CLOSE_S = 5.0
_PATHS = {
    method: "/postroad.node.v1.QueueService/" + "".join(part.capitalize() for part in method.name.split("_"))
    for method in QueueMethod
}


class QueueRelay:
    """See the module."""

    def __init__(self, open_channel: Callable[[], grpc.aio.Channel], log: EventLog) -> None:
        self._open_channel = open_channel
        self._log = log
        self._channel: grpc.aio.Channel | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def call(self, call: QueueCall, answer: Callable[[QueueAnswer], object]) -> None:
        """Make a call; `answer` is called once."""
        if len(self._tasks) >= MAX_CALLS:
            answer(QueueAnswer(call.number, _UNAVAILABLE, b"too many calls"))
            return
        task = asyncio.get_running_loop().create_task(self._relay(call, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _relay(self, call: QueueCall, answer: Callable[[QueueAnswer], object]) -> None:
        try:
            channel = self._channel or self._open_channel()
        except IdentityError as error:
            answer(QueueAnswer(call.number, _UNAVAILABLE, str(error).encode()))
            return
        self._channel = channel
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_PATHS[call.method])
        try:
            payload = await method(call.payload, timeout=call.timeout_ms / 1000)
        except grpc.aio.AioRpcError as error:
            code: int = error.code().value[0]
            answer(QueueAnswer(call.number, code, (error.details() or "").encode("utf-8", "replace")))
            if error.code() is grpc.StatusCode.UNAUTHENTICATED and self._channel is channel:
                self._log.warning("queue.refused", error=error.details())
                self._channel = None
                await channel.close(_CLOSE_S)
        except Exception as error:  # noqa: BLE001 - why_ended raises what is our own bug
            answer(QueueAnswer(call.number, _UNAVAILABLE, why_ended(error).encode("utf-8", "replace")))
        else:
            answer(QueueAnswer(call.number, 0, payload))
