"""Hears that the ledger grew, on a connection of its own, and wakes whoever waits.

Contract. `PostgresLedgerSignal` implements `controlplane.ports.LedgerSignal`. `run()` listens until it is cancelled:
it connects, LISTENs, wakes everybody (what was missed meanwhile must be looked for), and begins again after a pause
when the connection is lost. While there is none, waits end by their timeout, so that a dead listener costs delay and
nothing else. The connection must be direct: LISTEN does not work through a transaction pooler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from controlplane.adapters.postgres.fleet_database import CONNECTION_ERRORS

CHANNEL = "postroad_ledger"
_RECONNECT_S = 2.0
_CONNECT_TIMEOUT_S = 10.0
_CHECK_S = 30.0


class PostgresLedgerSignal:
    """See the module; `connect` opens a new connection of any role."""

    def __init__(self, connect: Callable[[], Awaitable[asyncpg.Connection[Any]]]) -> None:
        self._connect = connect
        self._changed = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """As the port says."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return

    def wake(self) -> None:
        """End every wait now."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            try:
                await self._listen()
            except CONNECTION_ERRORS:
                self.wake()
            await asyncio.sleep(_RECONNECT_S)

    async def _listen(self) -> None:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            connection = await self._connect()
        try:
            await connection.add_listener(CHANNEL, lambda *_: self.wake())
            self.wake()
            while not connection.is_closed():
                # A listener dies silently behind a firewall: ask now and then.
                await asyncio.sleep(_CHECK_S)
                await connection.execute("SELECT 1", timeout=_CONNECT_TIMEOUT_S)
        finally:
            connection.terminate()
