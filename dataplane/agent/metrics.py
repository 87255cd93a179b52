"""The node's HTTP endpoint: `/metrics`, `/healthz` and `/readyz`.

/metrics   what the workers count, asked for now and waited for no longer than two seconds: of one that hangs, what
           it said last; and what the agent knows itself
/healthz   200 while the agent's loop runs
/readyz    200 when the node takes mail: it does not drain, has a configuration that is not too old, and a worker at
           least whose spool is not refused; else 503.
           The body is JSON and names what is missing, also of a node that is ready: workers
"""

from __future__ import annotations

import asyncio
import datetime as dt
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from cryptography import x509

from dataplane.agent.applied import WorkerTable
from dataplane.agent.held import EMPTY
from dataplane.agent.ledger import LedgerStream
from dataplane.agent.node_agent import oldest_accepted_ms
from dataplane.agent.processes import process_samples
from dataplane.agent.stream import ConfigStream
from dataplane.agent.stream_machine import StreamMachine
from dataplane.agent.workers import WorkerHub
from dataplane.link import WorkerStatus
from dataplane.ports import Clock
from dataplane.telemetry import METRICS_CONTENT_TYPE, SampleRow, render

READY_FILE = Path("run") / "ready.json"
_DAY_S = 86_400.0


class MetricsPortError(Exception):
    """The port cannot be listened on; the text says what to do."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """What the endpoint looks at; `certificates` are PEM files by the name that the metric gives them."""

    hub: WorkerHub
    table: WorkerTable
    machine: StreamMachine
    config: ConfigStream
    ledger: LedgerStream
    clock: Clock
    config_max_age_s: float
    worker_count: int
    certificates: Mapping[str, Path]


class MetricsServer:
    """Serves on one port from `start` to `stop`."""

    def __init__(self, state: NodeState, address: str, port: int) -> None:
        self._state = state
        self._address = address
        self._port = port
        self._rendering: asyncio.Task[bytes] | None = None
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)

    async def start(self) -> int:
        """Listen; returns the port. MetricsPortError when it is taken."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._address, self._port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            place = f"{self._address} port {self._port}"
            reason = os.strerror(error.errno or 0)
            raise MetricsPortError(
                f"cannot listen on {place}: {reason}: stop what uses it, or change `metrics.port`"
            ) from error
        bound: int = self._runner.addresses[0][1]
        return bound

    async def stop(self) -> None:
        """Close the port and what is open on it."""
        await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        del request
        # Whoever asks while workers are being asked gets the same answer: they are not asked more often for that.
        if self._rendering is None or self._rendering.done():
            self._rendering = asyncio.create_task(self._render())
        body = await asyncio.shield(self._rendering)
        return web.Response(body=body, headers={"Content-Type": METRICS_CONTENT_TYPE})

    async def _render(self) -> bytes:
        statuses = await self._state.hub.collect_status()
        return render([*self._state.hub.totals.samples(), *self._own_samples(statuses)])

    def _own_samples(self, statuses: list[WorkerStatus]) -> Iterator[SampleRow]:
        state = self._state
        now_ms = state.clock.wall_ms()
        oldest_ms = oldest_accepted_ms(statuses)
        yield "queue_oldest_age_seconds", (), max(0.0, (now_ms - oldest_ms) / 1000) if oldest_ms else 0.0
        spools = [spool for status in statuses for spool in status.spools]
        yield (
            "ledger_unacknowledged_records",
            (),
            float(sum(spool.last_record - spool.acknowledged for spool in spools)),
        )
        yield "config_bundles", (), float(len(state.machine.config.bundles))
        yield "config_refused_total", (), float(state.machine.refusal_count)
        yield "denials_version", (), float(state.machine.denials_in_force)
        yield "control_plane_connected_state", ("config",), float(state.config.connected)
        yield "control_plane_connected_state", ("ledger",), float(state.ledger.connected)
        yield "workers_connected", (), float(state.table.connected_count)
        if state.config.last_contact_ms:
            yield "config_age_seconds", (), max(0.0, (now_ms - state.config.last_contact_ms) / 1000)
        yield "workers_late", (), state.hub.late_count
        for name, path in state.certificates.items():
            days = _days_left(path, now_ms)
            if days is not None:
                yield "tls_certificate_days_left", (name,), days
                yield "tls_cert_expiry_days", (), days
        yield from process_samples(READY_FILE, Path("spool"))

    async def _healthz(self, request: web.Request) -> web.Response:
        del request
        return web.json_response({"status": "ok"})

    async def _readyz(self, request: web.Request) -> web.Response:
        del request
        missing = list(self._config_missing())
        if self._state.hub.draining:
            missing.append("new mail, since the node drains")
        connected, wanted = self._state.table.connected_count, self._state.worker_count
        halted = len(self._state.table.halted)
        ready = not missing and connected > halted
        if halted:
            missing.append(f"a spool that may take mail: all those of {halted} of {wanted} workers are refused")
        if connected < wanted:
            missing.append(f"{wanted - connected} of {wanted} workers")
        return web.json_response({"ready": ready, "missing": missing}, status=200 if ready else 503)

    def _config_missing(self) -> Iterator[str]:
        state = self._state
        if state.machine.config is EMPTY:
            yield "no configuration yet"
        elif state.clock.wall_ms() - state.config.last_contact_ms > state.config_max_age_s * 1000:
            yield "the configuration is too old"


def _days_left(path: Path, now_ms: int) -> float | None:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        return None
    left = certificate.not_valid_after_utc - dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC)
    return left.total_seconds() / _DAY_S
