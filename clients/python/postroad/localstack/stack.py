"""The whole stack: what is started in which order, kept alive, and stopped in which order.

Contract. `start()` returns when a message could be submitted and would be delivered, or raises `LocalStackError`; it
can be cancelled at any moment. `keep_alive()` starts again whatever ends by itself, with growing pauses, until it is
cancelled. `stop()` ends everything that runs: the node first, for it needs the others to report what it still finishes,
the inbox last, for it takes what the node still delivers.

    start: PostgreSQL with migrations, Valkey, inbox, certificates · control plane · demo · node
    stop:  node · control plane · Valkey · PostgreSQL · inbox
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from postroad.control.v1.node_pb2 import Node
from postroad.control.v1.node_service_pb2 import GetNodeRequest
from postroad.files import write_private
from postroad.localstack import setup
from postroad.localstack.child import Child
from postroad.localstack.demo import ACCOUNT, SENDER, make_demo, point_inbox
from postroad.localstack.errors import LocalStackError
from postroad.localstack.layout import Layout
from postroad.localstack.ports import LOOPBACK, is_free, port_taken
from postroad.localstack.postgres import PostgresServer
from postroad.localstack.probe import login_is_refused, readiness
from postroad.localstack.progress import Progress
from postroad.localstack.service import ServerService, Service
from postroad.localstack.valkey import ValkeyServer
from postroad.sdk import AsyncClient, PostroadError, connect_async

_RESTART_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_HEALTHY_S = 60.0
_SYNC_TIMEOUT_S = 30.0
_SYNC_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Facts:
    """What a user needs to know of a running stack. `smtp_password` is empty when it was changed since it was kept."""

    ports: dict[str, int]
    smtp_username: str
    smtp_password: str
    ca_file: Path


class Stack:
    """See the module. `ports` are settled, the layout is open; `workers` of 0 is one a core."""

    def __init__(self, layout: Layout, ports: dict[str, int], progress: Progress, workers: int) -> None:
        self._layout = layout
        self._ports = ports
        self._progress = progress
        self._workers = workers
        self._postgres = PostgresServer(layout / "postgres", ports["postgres"])
        self._valkey = ValkeyServer(layout / "valkey", ports["valkey"])
        self._inbox = Child(
            "The inbox",
            "inbox",
            ["-m", "postroad.inbox", "--dir", str(layout / "inbox"), "--port", str(ports["inbox"])],
            layout,
            ready=self._inbox_listens,
            stop_steps=[(signal.SIGTERM, 10.0)],
        )
        self._controlplane = Child(
            "The control plane",
            "controlplane",
            ["-m", "controlplane", "--config", str(setup.controlplane_file(layout)), "serve"],
            layout,
            ready=lambda: _is_ready(ports["http"]),
            stop_steps=[(signal.SIGTERM, 15.0)],
        )
        self._node = Child(
            "The node",
            "node-1",
            ["-m", "dataplane", "run", "--config", str(setup.node_file(layout))],
            layout,
            ready=lambda: _is_ready(ports["node-http"]),
            # The node drains for up to 30 s; a second SIGTERM makes it hand back what is left.
            stop_steps=[(signal.SIGTERM, 40.0), (signal.SIGTERM, 10.0)],
        )
        self._databases = (ServerService(self._postgres), ServerService(self._valkey))

    @property
    def _stop_order(self) -> Sequence[Service]:
        return (self._node, self._controlplane, self._databases[1], self._databases[0], self._inbox)

    # --- starting --------------------------------------------------------------------------------

    async def start(self) -> Facts:
        """Bring everything up. See the module."""
        for child in (self._node, self._controlplane, self._inbox):
            await child.end_orphan()
        await setup.end_interrupted(self._layout)
        self._check_ports()
        setup.write_controlplane_settings(self._layout, self._ports, self._postgres)
        async with _together() as group:
            group.create_task(self._prepare_database())
            group.create_task(self._start("Valkey", self._databases[1].start()))
            group.create_task(self._start("Inbox", self._inbox.start()))
            group.create_task(self._do(setup.certificate_steps(self._layout)))
        setup.write_controlplane_settings(self._layout, self._ports, self._postgres, self._valkey)
        setup.write_node_settings(self._layout, self._ports, self._valkey, self._workers)
        await self._start("Control plane", self._controlplane.start())
        async with self._client() as client:
            credential = await self._demo(client)
            self._write_cli_file(credential)
            await self._start_node(client)
            await self._start("Configuration on the node", self._synced(client))
        username, password, ca_file = credential["username"], credential["password"], setup.ca_file(self._layout)
        is_refused = await asyncio.to_thread(login_is_refused, self._ports["smtps"], ca_file, username, password)
        return Facts(self._ports, username, "" if is_refused else password, ca_file)

    async def _start(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        with self._progress.step(what):
            await work

    def _check_ports(self) -> None:
        # The two databases look for themselves, after they have ended what a killed stack left behind.
        for name, port in self._ports.items():
            if name not in {"postgres", "valkey"} and not is_free(port):
                raise port_taken(port, name)

    async def _prepare_database(self) -> None:
        await self._start("PostgreSQL", self._databases[0].start())
        await self._do(setup.database_steps(self._layout, self._postgres))

    async def _do(self, steps: Iterable[setup.Step]) -> None:
        for what, step in steps:
            with self._progress.step(what):
                await step()

    async def _start_node(self, client: AsyncClient) -> None:
        if not setup.is_enrolled(self._layout, self._postgres):
            await self._start("Enrolment of the node", setup.enroll(self._layout, self._postgres, client))
        await self._start("Node", self._node.start())

    async def _demo(self, client: AsyncClient) -> dict[str, str]:
        cluster = setup.cluster_id(self._postgres)
        kept = setup.kept_credential(self._layout, cluster)
        inbox_port = self._ports["inbox"]
        try:
            if kept is None:
                with self._progress.step("Demo account"):
                    made = await make_demo(client, inbox_port)
                kept = {"username": made.username, "password": made.password}
                setup.keep_credential(self._layout, cluster, kept)
            elif self._layout.note("inbox_port") != inbox_port:
                await point_inbox(client, inbox_port)
        except PostroadError as error:
            raise LocalStackError(
                f"the demo account could not be made: {error.message} ({error.reason or error.code.name})",
                f"{self._layout.log('controlplane')} may say more",
            ) from error
        self._layout.keep_note("inbox_port", inbox_port)
        return kept

    async def _synced(self, client: AsyncClient) -> None:
        """Wait until the node uses all that was configured: from then on mail can be submitted."""
        deadline = time.monotonic() + _SYNC_TIMEOUT_S
        while True:
            node = await client.nodes.GetNode(GetNodeRequest(name=setup.NODE))
            if node.connected and node.config_status == Node.CONFIG_STATUS_SYNCED:
                return
            if node.config_status == Node.CONFIG_STATUS_ERROR:
                raise LocalStackError(
                    f"the node refuses its configuration: {node.config_error}", "Mend what it names by the API"
                )
            if time.monotonic() > deadline:
                raise LocalStackError(
                    f"the node did not take its configuration within {_SYNC_TIMEOUT_S:.0f} s; the end of "
                    f"{self._layout.log('node-1')}:\n{self._node.log_tail()}",
                    "Mend what the log names, then start again",
                )
            await asyncio.sleep(_SYNC_POLL_S)

    def _client(self) -> AsyncClient:
        return connect_async(
            f"{LOOPBACK}:{self._ports['grpc']}", setup.operator_key(self._layout), setup.ca_file(self._layout)
        )

    async def _inbox_listens(self) -> bool:
        # Its own word: whoever answers on the port could be a stranger.
        return self._inbox.has_said('"inbox.ready"')

    def _write_cli_file(self, credential: dict[str, str]) -> None:
        ports = self._ports
        values = {
            "server": f"{LOOPBACK}:{ports['grpc']}",
            "api_key": setup.operator_key(self._layout),
            "ca_file": "pki/ca.pem",
            "account": ACCOUNT,
            "smtp": {
                "server": f"{LOOPBACK}:{ports['smtp']}",
                "tls_server": f"{LOOPBACK}:{ports['smtps']}",
                "username": credential["username"],
                "password": credential["password"],
                "ca_file": "pki/ca.pem",
                "sender": SENDER,
            },
            "inbox": "inbox",
            "http": f"http://{LOOPBACK}:{ports['http']}",
            "node_http": f"http://{LOOPBACK}:{ports['node-http']}",
        }
        write_private(self._layout / "cli.yaml", yaml.safe_dump(values, sort_keys=False))

    # --- running ---------------------------------------------------------------------------------

    async def keep_alive(self) -> None:
        """Start again what ends by itself, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for service in self._stop_order:
                group.create_task(self._keep_service(service))

    async def _keep_service(self, service: Service) -> None:
        failures = 0
        while True:
            since = time.monotonic()
            status = await service.ended()
            failures = 0 if time.monotonic() - since > _HEALTHY_S else failures
            pause_s = _RESTART_PAUSES_S[min(failures, len(_RESTART_PAUSES_S) - 1)]
            how = "" if status is None else f" with status {status}"
            self._progress.remark(f"{service.label} ended{how}; starting it again in {pause_s:.0f} s")
            await asyncio.sleep(pause_s)
            failures += 1
            try:
                await service.start()
            except LocalStackError as error:
                self._progress.remark(f"{service.label} does not start: {error.problem}")
            else:
                self._progress.remark(f"{service.label} runs again")

    # --- stopping --------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End everything that runs, in order. To be called once nothing else uses the stack."""
        for service in self._stop_order:
            try:
                if service.is_running:
                    with self._progress.step(f"Stopping {service.label.removeprefix('The ')}"):
                        await service.stop()
                else:
                    await service.stop()
            except (OSError, LocalStackError) as error:
                # The others must not stay because one does not go; the next start ends it.
                self._progress.remark(f"{service.label} could not be stopped: {error}")

    def hurry(self) -> None:
        """Do not wait for mail that is being delivered: it goes on at the next start."""
        for child in (self._node, self._controlplane, self._inbox):
            child.hurry()


async def _is_ready(port: int) -> bool:
    return (await asyncio.to_thread(readiness, f"http://{LOOPBACK}:{port}")).ready


@contextlib.asynccontextmanager
async def _together() -> Any:
    """A TaskGroup that raises the first error that people can mend itself, instead of a group of errors."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as errors:
        first = next((error for error in errors.exceptions if isinstance(error, LocalStackError)), None)
        if first is None:
            raise
        raise first from None
