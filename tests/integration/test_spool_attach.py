"""Mail of a node that died goes on from another one, each message once: two nodes, and a real control plane."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from dataplane.spool_folders import REFUSED_FILE
from postroad.control.v1 import (
    node_pb2,
    node_service_pb2,
)
from postroad.sdk.errors import FailedPreconditionError
from support.databases import Database
from support.fleet import fetch
from support.node_process import log_events, running
from support.nodes import Fleet, command, kill, serving_fleet, submit
from support.nodes_port import until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
async def fleet(migrated_database: Database, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with serving_fleet(migrated_database, tmp_path) as made:
        yield made


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
