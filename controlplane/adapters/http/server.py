"""The HTTP port: probes, metrics, the JSON form of the API.

Contract. `HttpServer.start` binds and serves, `stop` lets requests end; both once. A port that is taken is an OSError.
An error in a handler of ours is 500 without a word of what it was.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable
from pathlib import Path

from aiohttp import web

from controlplane.telemetry import METRICS_CONTENT_TYPE


class HttpServer:
    """See the module; `parts` add their routes."""

    def __init__(self, render_metrics: Callable[[], bytes], parts: Iterable[Callable[[web.Application], None]]) -> None:
        app = web.Application()

        async def metrics(_: web.Request) -> web.Response:
            return web.Response(body=render_metrics(), headers={"Content-Type": METRICS_CONTENT_TYPE})

        app.router.add_get("/metrics", metrics)
        for part in parts:
            part(app)
        # A caller that hangs up ends its call, as over gRPC.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=2.0)

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Serve; returns the port."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=tls)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Stop accepting, let requests end for two seconds, then cut them."""
        await self._runner.cleanup()


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer with these files; OSError when they cannot be used."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context
