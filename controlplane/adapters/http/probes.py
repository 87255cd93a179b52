"""Answers whether this process lives, and whether it can serve: `/healthz` and `/readyz`.

Contract. `Readiness.check` runs every check, each bounded in time, and remembers the answer for a second, so that
probes cost PostgreSQL little. A check returns a text when something is wrong and None otherwise; one that raises or
takes too long is wrong. `/readyz` answers 503 with the reasons while one is. Nothing secret is in them: an exception
shows as its type.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

Check = Callable[[], Awaitable[str | None]]

_REMEMBERED_S = 1.0
_CHECK_TIMEOUT_S = 3.0


class Readiness:
    """Checks by name; see the module."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = dict(checks)
        self._lock = asyncio.Lock()
        self._answer: dict[str, str | None] = {}
        self._until = 0.0

    async def check(self) -> dict[str, str | None]:
        """What is wrong, by check."""
        async with self._lock:
            if time.monotonic() >= self._until:
                found = await asyncio.gather(*(_bounded(check) for check in self._checks.values()))
                self._answer = dict(zip(self._checks, found, strict=True))
                self._until = time.monotonic() + _REMEMBERED_S
            return self._answer

    def forget(self) -> None:
        """Ask anew next time: something changed."""
        self._until = 0.0


async def _bounded(check: Check) -> str | None:
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            return await check()
    except TimeoutError:
        return "no answer in time"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a reason not to be ready
        return type(error).__name__


def add_probes(app: web.Application, readiness: Readiness) -> None:
    """Serve both."""

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def readyz(_: web.Request) -> web.Response:
        found = await readiness.check()
        ready = all(problem is None for problem in found.values())
        checks = {name: problem or "ok" for name, problem in found.items()}
        status = 200 if ready else 503
        return web.json_response({"status": "ready" if ready else "not ready", "checks": checks}, status=status)

    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
