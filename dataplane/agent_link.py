"""A worker's end of the link to the agent: connects, says Hello, and comes back whenever the connection ends.

Contract. `run` never ends by itself. Each message of the agent is handed to `on_message`, in order; `on_lost` is
called when the agent is gone, after which `send` answers False until the next Hello was said. The worker does its work
whether the agent is there or not. Waits between tries grow from 0.05 s to 1 s, with jitter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from dataplane.backoff import Backoff
from dataplane.link import LinkProtocol, Message, WorkerHello
from dataplane.ports import EventLog


class AgentLink:
    """See the module. `hello` is asked anew at each connection."""

    def __init__(
        self,
        socket_path: Path,
        hello: Callable[[], Awaitable[WorkerHello]],
        on_message: Callable[[Message], None],
        on_lost: Callable[[], None],
        random: Callable[[], float],
        log: EventLog,
    ) -> None:
        self._socket_path = socket_path
        self._hello = hello
        self._on_message = on_message
        self._on_lost = on_lost
        self._random = random
        self._log = log
        self._protocol: LinkProtocol | None = None

    def send(self, message: Message) -> bool:
        """Give a message to the agent; False when it is not there."""
        return self._protocol is not None and self._protocol.send(message)

    async def run(self) -> None:
        """Stay connected until cancelled, which closes the connection."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(self._random, base_s=0.05, cap_s=1.0, healthy_after_s=1.0)
        while True:
            opened = loop.time()
            await self._serve_one()
            await asyncio.sleep(backoff.next_wait_s(loop.time() - opened))

    async def _serve_one(self) -> None:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Exception | None] = loop.create_future()

        def lost(protocol: LinkProtocol, error: Exception | None) -> None:
            del protocol
            if not ended.done():
                ended.set_result(error)

        try:
            _, protocol = await loop.create_unix_connection(
                lambda: LinkProtocol(lambda _, message: self._on_message(message), lost), str(self._socket_path)
            )
        except OSError:
            return
        try:
            protocol.send(await self._hello())
            self._protocol = protocol
            error = await ended
            self._log.info("agent.lost", error=str(error) if error else "")
        finally:
            self._protocol = None
            protocol.close()
            self._on_lost()
