"""What the tests themselves stand on: programs that they start while gRPC is at work do start."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest


@pytest.fixture
async def busy_grpc() -> AsyncIterator[None]:
    """Calls that follow each other without a pause, over a server of this process."""

    async def echo(request: bytes, context: object) -> bytes:
        del context
        return request

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Test/Echo")

        async def go_on() -> None:
            while True:
                await call(b"request")

        calls = [asyncio.create_task(go_on()) for _ in range(4)]
        yield
        for task in calls:
            task.cancel()
        for task in calls:
            with contextlib.suppress(asyncio.CancelledError):
                await task
    await server.stop(None)


async def test_a_program_that_is_started_while_grpc_is_at_work_starts(busy_grpc: None) -> None:
    del busy_grpc
    statuses = []
    for _ in range(400):
        process = await asyncio.create_subprocess_exec("/bin/true")
        statuses.append(await process.wait())
    assert set(statuses) == {0}
