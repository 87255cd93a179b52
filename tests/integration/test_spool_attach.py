"""Mail of a node that died goes on from another one, each message once: two nodes, and a real control plane."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import smtplib
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from controlplane.adapters.pki import write_private
from dataplane.agent.enrollment import enroll
from dataplane.spool_folders import REFUSED_FILE
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
from postroad.sdk.errors import FailedPreconditionError
from support.controlplane_app import Serving, serving
from support.databases import Database
from support.fleet import fetch
from support.node_mail import Sink, listening_sink
from support.node_process import NodeProcess, log_events, running, wait_gone, write_settings
from support.nodes_port import until

pytestmark = pytest.mark.timeout(600)

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

    def nothing_came(self) -> bool:
        return self.sink.received.empty()

    async def sent(self) -> int:
        """Recipients that the ledger calls sent."""
        rows = await fetch(
            self.database, "SELECT count(*) FROM postroad.recipients WHERE state = $1", RECIPIENT_STATE_SENT
        )
        return int(rows[0][0])


@pytest.fixture
async def fleet(migrated_database: Database, tmp_path: Path) -> AsyncIterator[Fleet]:
    networks = {"allowed_private_networks": ["127.0.0.0/8"]}
    async with contextlib.AsyncExitStack() as stack:
        plane = await stack.enter_async_context(serving(migrated_database, tmp_path, **networks))
        sink = await stack.enter_async_context(listening_sink())
        server = f"localhost:{plane.grpc_port}"
        client = await stack.enter_async_context(connect_async(server, plane.key, tmp_path / "pki" / "ca.pem"))
        await _configure(client, sink)
        yield Fleet(plane, client, sink, tmp_path, migrated_database)


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


async def attach_folder(settings: Path, folder: Path) -> tuple[int, str]:
    return await command("dataplane", "attach", "--config", str(settings), str(folder))


def only_spool(settings: Path) -> Path:
    (spool,) = (settings.parent / "data" / "spool").iterdir()
    return spool


def spool_of(node: node_pb2.Node, spool: str) -> Any:
    return next((one for one in node.spools if one.spool == spool), None)


async def reported(fleet: Fleet, node: str, spool: str, is_so: Callable[[Any], bool]) -> None:
    """Wait until the node has said so of the spool."""

    async def said() -> bool:
        found = spool_of(await fleet.get(node), spool)
        return found is not None and is_so(found)

    await until(said, 60)


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.nightly)])
async def test_waiting_mail_of_a_killed_node_is_delivered_by_another_one_each_message_once(
    fleet: Fleet, count: int
) -> None:
    subjects = [f"waiting {number}" for number in range(count)]
    first, second = await fleet.node("mx1"), await fleet.node("mx2")
    async with running(first) as node:
        await fleet.in_use("mx1")
        await fleet.provider("Suspend")
        await submit(node, subjects)
        await kill(node)
    folder = only_spool(first)
    async with running(second) as node:
        await fleet.in_use("mx2")
        own = only_spool(second)
        status, said = await attach_folder(second, folder)
        assert status == 0, said
        assert "the node opens it now" in said
        assert f"postroad spool attach {folder.name} --node mx2" in said
        await node.wait_said("node.reloaded")
        await node.wait_ready()
        # The node may send, and does; of the other one's mail it sends nothing before it is told.
        await fleet.provider("Resume")
        await submit(node, ["fresh"])
        await fleet.arrive(1)
        assert list(fleet.arrived) == ["fresh"]
        with pytest.raises(FailedPreconditionError) as refused:
            await fleet.attach("mx2", folder.name)
        assert refused.value.reason == "SPOOL_IN_USE"
        assert fleet.nothing_came()
        await fleet.client.nodes.RevokeNode(node_service_pb2.RevokeNodeRequest(name="nodes/mx1"))
        server = ("--server", f"localhost:{fleet.plane.grpc_port}", "--api-key", fleet.plane.key)
        ca_file = ("--ca-file", str(fleet.folder / "pki" / "ca.pem"))
        status, said = await command("postroad.cli", *server, *ca_file, "spool", "attach", folder.name, "--node", "mx2")
        assert status == 0, said
        await fleet.arrive(count + 1)

        async def all_recorded() -> bool:
            return await fleet.sent() == count + 1

        await until(all_recorded, 120)
        assert fleet.nothing_came()
        assert fleet.arrived == Counter(["fresh", *subjects])
        assert not (second.parent / "data" / "spool" / folder.name / REFUSED_FILE).exists()
        assert not folder.exists()
        with pytest.raises(FailedPreconditionError) as again:
            await fleet.attach("mx2", folder.name)
        assert again.value.reason == "SPOOL_ATTACHED"
        # It only delivers: new mail goes into the node's own spool.
        await submit(node, ["after"])
        await fleet.arrive(count + 2)
        (stored,) = await fetch(
            fleet.database, "SELECT spool FROM postroad.messages WHERE subject = 'after' OR subject = 'fresh' LIMIT 1"
        )
        assert str(stored["spool"]) == own.name
        assert len(log_events(second, "spool.attached")) == 1
        assert await node.stop() == 0
    rejects = await fetch(fleet.database, "SELECT 1 FROM postroad.ledger_rejects")
    assert rejects == []


async def test_when_the_former_node_comes_back_with_its_copy_it_sends_nothing_and_reports_for_others(
    fleet: Fleet,
) -> None:
    first, second = await fleet.node("mx1"), await fleet.node("mx2")
    async with running(first) as node:
        await fleet.in_use("mx1")
        await fleet.provider("Suspend")
        await submit(node, ["one", "two"])
        await kill(node)
    folder = only_spool(first)
    copy = fleet.folder / "restored" / folder.name
    shutil.copytree(folder, copy)
    async with running(second) as taker:
        await fleet.in_use("mx2")
        status, said = await attach_folder(second, copy)
        assert status == 0, said
        await fleet.attach("mx2", folder.name, force=True)
        await reported(fleet, "mx2", folder.name, lambda spool: spool.incarnation == 2)
        async with running(first) as former:
            await until((folder / REFUSED_FILE).exists, 60)
            await fleet.provider("Resume")
            await fleet.arrive(2)
            assert fleet.arrived == Counter(["one", "two"])

            async def all_recorded() -> bool:
                return await fleet.sent() == 2

            await until(all_recorded, 60)
            assert fleet.nothing_came()
            assert (await fleet.get("mx1")).connected
            assert spool_of(await fleet.get("mx1"), folder.name) is None
            # Its own word does not give it back; an operator's does, and then the copy is older than what is known.
            await fleet.attach("mx1", folder.name, force=True)
            await until((second.parent / "data" / "spool" / folder.name / REFUSED_FILE).exists, 60)
            await reported(fleet, "mx1", folder.name, lambda spool: not spool.accepted)
            assert fleet.nothing_came()
            assert await former.stop() == 0
        assert await taker.stop() == 0


async def test_a_folder_is_attached_once_and_only_when_nobody_has_it_open(fleet: Fleet) -> None:
    first, second = await fleet.node("mx1"), await fleet.node("mx2")
    async with running(first) as node:
        await fleet.in_use("mx1")
        folder = only_spool(first)
        status, said = await attach_folder(second, folder)
        assert (status, "in use by another process" in said) == (69, True)
        assert await node.stop() == 0
    copy = fleet.folder / "copy" / folder.name
    shutil.copytree(folder, copy)
    status, said = await attach_folder(second, copy)
    assert (status, "the node opens it when it starts" in said) == (0, True)
    status, said = await attach_folder(second, folder)
    assert (status, "a spool is attached once" in said) == (69, True)
    status, said = await attach_folder(second, folder.parent)
    assert (status, "a spool's folder is named by its UUID" in said) == (69, True)
    status, said = await attach_folder(second, fleet.folder / "nowhere")
    assert (status, "is no folder" in said) == (69, True)
