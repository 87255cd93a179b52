"""The change feed: wakes whoever must look at PostgreSQL again, by LISTEN and by the clock.

Contract. `ChangeFeed.run` calls `scan` for ever: at once after it listens (what changed before is in the
database), at each NOTIFY, and every `poll_s` seconds in any case, since a NOTIFY is only a hint and a
listener may die without a word. Hints that arrive while a scan runs cause one more. The connection is
direct and its own; when it is lost, polling goes on with `scan`'s own connections while it is made anew.
Before the next scan `reconnected` is told: the server may be another one, which has lost what was committed
last. An error of `scan` is reported and does not end the feed; cancelling it closes the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from controlplane.adapters.postgres.fleet_database import CONNECTION_ERRORS

CHANNELS = ("postroad_config", "postroad_denials", "postroad_commands")

_CONNECT_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0


class ChangeFeed:
    """See the module. `report` is told of what went wrong."""

    def __init__(
        self,
        dsn: str,
        scan: Callable[[], Awaitable[None]],
        *,
        poll_s: float = 2.0,
        reconnected: Callable[[], None] = lambda: None,
        report: Callable[[str, Exception], None] = lambda _what, _error: None,
    ) -> None:
        self._dsn = dsn
        self._scan = scan
        self._poll_s = poll_s
        self._reconnected = reconnected
        self._report = report
        self._hint = asyncio.Event()
        self._connection: asyncpg.Connection[Any] | None = None
        self._succeeded = time.monotonic()

    def seconds_since_success(self) -> float:
        """How long ago a scan ended well, or the feed was made."""
        return time.monotonic() - self._succeeded

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self._listen()
                self._hint.clear()
                await self._scan_once()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await self._hint.wait()
        finally:
            await self._close()

    async def _listen(self) -> None:
        if self._connection is not None and not self._connection.is_closed():
            return
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                connection: asyncpg.Connection[Any] = await asyncpg.connect(
                    self._dsn, server_settings={"application_name": "postroad-feed"}
                )
                self._connection = connection
                connection.add_termination_listener(self._wake)
                for channel in CHANNELS:
                    await connection.add_listener(channel, self._wake)
                self._reconnected()
        except CONNECTION_ERRORS as error:
            self._report("listen", error)
            if self._connection is not None:
                self._connection.terminate()
                self._connection = None

    def _wake(self, *_: object) -> None:
        self._hint.set()

    async def _scan_once(self) -> None:
        try:
            await self._scan()
            self._succeeded = time.monotonic()
        except Exception as error:  # noqa: BLE001 - one bad row must not stop all news; it is reported
            self._report("scan", error)

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(Exception):
            await connection.close(timeout=_CLOSE_TIMEOUT_S)
