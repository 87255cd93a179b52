"""A part of the stack that is started, watched and stopped: one shape for servers and for programs of our own.

`Child` has this shape by itself; `ServerService` gives it to `PostgresServer` and `ValkeyServer`, whose calls block and
therefore run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from postroad.localstack.server import LocalServer

_LOOK_S = 0.5


class Service(Protocol):
    """What the stack asks of each part."""

    label: str

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""

    async def start(self) -> None:
        """Start; return when it serves. LocalStackError when it does not."""

    async def stop(self) -> None:
        """End it in order."""

    async def ended(self) -> int | None:
        """Wait until it ends by itself; its status where that is known."""


class ServerService:
    """A database server as a Service."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self.label = server.label
        self._starting: asyncio.Task[object] | None = None

    @property
    def is_running(self) -> bool:
        """See Service."""
        return self.server.is_running

    async def start(self) -> None:
        """See Service; when cancelled, the start goes on in its thread and stop() waits for it."""
        self._starting = asyncio.create_task(asyncio.to_thread(self.server.start))
        await asyncio.shield(self._starting)

    async def stop(self) -> None:
        """See Service."""
        if self._starting is not None:
            # A start that failed has said so to its caller.
            with contextlib.suppress(Exception):
                await self._starting
        await asyncio.to_thread(self.server.stop)

    async def ended(self) -> int | None:
        """See Service; looks twice a second, for threads cannot be told."""
        while self.server.is_running:  # noqa: ASYNC110 - as above
            await asyncio.sleep(_LOOK_S)
        return None
