"""A control plane in this process, nodes as processes of their own, and one next hop that counts what arrives."""

from __future__ import annotations

import asyncio
import contextlib
import smtplib
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from google.longrunning.operations_pb2 import Operation, WaitOperationRequest
from google.protobuf.duration_pb2 import Duration

from controlplane.adapters.pki import write_private
from dataplane.agent.enrollment import enroll
from postroad.control.v1 import (
    account_pb2,
    account_service_pb2,
    node_pb2,
    node_service_pb2,
    provider_pb2,
    provider_service_pb2,
    routing_rule_pb2,
    routing_rule_service_pb2,
)
from postroad.node.v1.ledger_pb2 import RECIPIENT_STATE_SENT
from postroad.sdk import AsyncClient, connect_async
from support.controlplane_app import ROOT, Serving, serving
from support.databases import Database, execute
from support.fleet import fetch
from support.node_mail import Sink, listening_sink
from support.node_process import NodeProcess, wait_gone, write_settings
from support.nodes_port import until

PROVIDER = "accounts/acme/providers/out"


@dataclass
class Fleet:
    """A control plane, its nodes' folders, and one next hop; `arrived` counts subjects there."""

    plane: Serving
    client: AsyncClient
    sink: Sink
    folder: Path
    database: Database
    arrived: Counter[str] = field(default_factory=Counter)

    async def node(self, name: str) -> Path:
        """A node that is enrolled; its settings file."""
        made = await self.client.nodes.CreateNode(node_service_pb2.CreateNodeRequest(node_id=name))
        (self.folder / name).mkdir()
        ca_file = self.folder / name / "ca.pem"
        write_private(ca_file, self.plane.ca_pem)
        data_dir = self.folder / name / "data"
        data_dir.mkdir()
        server = f"localhost:{self.plane.grpc_port}"
        await asyncio.to_thread(enroll, data_dir, server, ca_file, made.enrollment_token, "test")
        return write_settings(self.folder / name, f"localhost:{self.plane.nodes_port}")

    async def provider(self, verb: str) -> None:
        """Suspend or resume the next hop, and wait until every node that is connected holds to it."""
        request = getattr(provider_service_pb2, f"{verb}ProviderRequest")(name=PROVIDER)
        await getattr(self.client.providers, f"{verb}Provider")(request)
        (row,) = await fetch(self.database, "SELECT version FROM postroad.denial_state")
        await until(lambda: self._holds(row["version"]), 30)

    async def _holds(self, version: int) -> bool:
        nodes = (await self.client.nodes.ListNodes(node_service_pb2.ListNodesRequest())).nodes
        return all(node.denials_version >= version for node in nodes if node.connected)

    async def get(self, node: str) -> node_pb2.Node:
        return await self.client.nodes.GetNode(node_service_pb2.GetNodeRequest(name=f"nodes/{node}"))

    async def attach(self, node: str, spool: str, *, force: bool = False) -> node_pb2.Node:
        request = node_service_pb2.AttachSpoolRequest(name=f"nodes/{node}", spool=spool, force=force)
        return await self.client.nodes.AttachSpool(request)

    async def in_use(self, node: str) -> None:
        """Wait until the node has its configuration in use."""

        async def synced() -> bool:
            return (await self.get(node)).config_status == node_pb2.Node.CONFIG_STATUS_SYNCED

        await until(synced, 30)

    async def arrive(self, count: int) -> None:
        """Wait until so many messages came to the next hop."""
        async with asyncio.timeout(300):
            while self.arrived.total() < count:
                self._note(await self.sink.received.get())

    def _note(self, content: bytes) -> None:
        self.arrived[content.split(b"Subject: ")[1].split(b"\r\n")[0].decode()] += 1

    async def drain(self, node: str) -> Operation:
        """Drain a node; the operation as it begins."""
        return await self.client.nodes.DrainNode(node_service_pb2.DrainNodeRequest(name=f"nodes/{node}"))

    async def drained(self, operation: Operation, timeout_s: float = 120) -> Operation:
        """Wait until a drain is over."""
        async with asyncio.timeout(timeout_s):
            while not operation.done:
                request = WaitOperationRequest(name=operation.name, timeout=Duration(seconds=5))
                operation = await self.client.operations.WaitOperation(request)
        return operation

    async def all_sent(self, count: int) -> None:
        """Wait until the ledger calls so many recipients sent."""

        async def are_sent() -> bool:
            return await self.sent() == count

        await until(are_sent, 120)

    def nothing_came(self) -> bool:
        return self.sink.received.empty()

    async def sent(self) -> int:
        """Recipients that the ledger calls sent."""
        rows = await fetch(
            self.database, "SELECT count(*) FROM postroad.recipients WHERE state = $1", RECIPIENT_STATE_SENT
        )
        return int(rows[0][0])


@contextlib.asynccontextmanager
async def serving_fleet(database: Database, folder: Path, **settings: Any) -> AsyncIterator[Fleet]:
    """A fleet without nodes, and an account whose mail goes to the next hop; `settings` are the control plane's."""
    settings = {"allowed_private_networks": ["127.0.0.0/8"], **settings}
    async with contextlib.AsyncExitStack() as stack:
        plane = await stack.enter_async_context(serving(database, folder, **settings))
        sink = await stack.enter_async_context(listening_sink())
        server = f"localhost:{plane.grpc_port}"
        client = await stack.enter_async_context(connect_async(server, plane.key, folder / "pki" / "ca.pem"))
        await _configure(client, sink)
        yield Fleet(plane, client, sink, folder, database)


async def _configure(client: AsyncClient, sink: Sink) -> None:
    pool = await client.nodes.GetNodePool(node_service_pb2.GetNodePoolRequest(name="nodePools/default"))
    pool.submission_limits.account_messages_per_hour = 0
    await client.nodes.UpdateNodePool(node_service_pb2.UpdateNodePoolRequest(node_pool=pool))
    account = account_pb2.Account(sender_domains=["example.com"], networks=["127.0.0.0/8"])
    for name in ("base", "cap"):
        getattr(account.retry_policy, name).CopyFrom(Duration(seconds=1))
    account.retry_policy.factor = 1
    await client.accounts.CreateAccount(account_service_pb2.CreateAccountRequest(account_id="acme", account=account))
    provider = provider_pb2.Provider()
    provider.smtp.endpoints.add(host="127.0.0.1", port=sink.port)
    provider.smtp.tls_policy = provider_pb2.SmtpProvider.TLS_POLICY_NONE
    await client.providers.CreateProvider(
        provider_service_pb2.CreateProviderRequest(parent="accounts/acme", provider_id="out", provider=provider)
    )
    rule = routing_rule_pb2.RoutingRule(priority=1)
    rule.targets.add(provider=PROVIDER)
    await client.routing_rules.CreateRoutingRule(
        routing_rule_service_pb2.CreateRoutingRuleRequest(
            parent="accounts/acme", routing_rule_id="default", routing_rule=rule
        )
    )


def submit_now(port: int, subjects: list[str]) -> None:
    with smtplib.SMTP("127.0.0.1", port, local_hostname="client.example", timeout=60) as client:
        for subject in subjects:
            content = f"From: app@example.com\r\nSubject: {subject}\r\n\r\nHello\r\n"
            client.sendmail("app@example.com", ["someone@example.net"], content)


async def submit(node: NodeProcess, subjects: list[str]) -> None:
    await asyncio.to_thread(submit_now, node.smtp_port, subjects)


async def kill(node: NodeProcess) -> None:
    """SIGKILL for the supervisor; the kernel ends the others."""
    pids = list(node.ready["processes"].values())
    node.process.kill()
    await node.process.wait()
    for pid in pids:
        await wait_gone(pid)


async def command(*words: str) -> tuple[int, str]:
    """Run a program of ours to its end; its status, and what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


async def cli(fleet: Fleet, *words: str) -> tuple[int, str]:
    """Run the `postroad` command as the operator."""
    server = ("--server", f"localhost:{fleet.plane.grpc_port}", "--api-key", fleet.plane.key)
    return await command("postroad.cli", *server, "--ca-file", str(fleet.folder / "pki" / "ca.pem"), *words)


@contextlib.asynccontextmanager
async def plane_killed(fleet: Fleet) -> AsyncIterator[None]:
    """Kill the control plane and start it again with its ports, until the block ends."""
    plane = fleet.plane
    plane.process.kill()
    await plane.process.wait()
    file = fleet.folder / "controlplane.yaml"
    values = yaml.safe_load(file.read_text("utf-8"))
    for name, port in (("grpc", plane.grpc_port), ("nodes", plane.nodes_port), ("http", plane.http_port)):
        values[name]["port"] = port
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    with plane.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "controlplane", "--config", str(file), "serve"),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            assert await process.stdout.readline(), plane.log.read_text("utf-8")
        yield
    finally:
        process.terminate()
        await process.communicate()


@contextlib.asynccontextmanager
async def database_away(database: Database) -> AsyncIterator[None]:
    """Cut everybody off from the database, and let nobody in, until the block ends."""
    server, name = database.server, database.name
    backends = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608 - ours
    for sql in (f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS false', backends):
        await asyncio.to_thread(execute, server, sql)
    try:
        yield
    finally:
        await asyncio.to_thread(execute, server, f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')
