"""A node that is drained takes no mail, and what waits on it goes to other nodes, each message once, whoever is killed
meanwhile: nodes as processes, a real control plane and PostgreSQL.
"""

from __future__ import annotations

import asyncio
import smtplib
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from postroad.control.v1.node_service_pb2 import (
    DeleteNodeRequest,
    DrainNodeMetadata,
    DrainNodeResult,
)
from support.databases import Database
from support.fleet import fetch
from support.node_process import log_events, running
from support.nodes import Fleet, cli, database_away, kill, plane_killed, serving_fleet, submit
from support.nodes_port import until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
async def fleet(migrated_database: Database, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with serving_fleet(migrated_database, tmp_path) as made:
        yield made


async def waiting(fleet: Fleet, node: str, count: int) -> None:
    """Wait until the node has reported so many recipients."""

    async def are_there() -> bool:
        return sum(spool.waiting_count for spool in (await fleet.get(node)).spools) == count

    await until(are_there, 60)


def refused(port: int) -> int:
    """The code with which a connection is greeted."""
    with smtplib.SMTP(timeout=10) as client:
        return client.connect("127.0.0.1", port)[0]


def readiness(port: int) -> int:
    """What a balancer is told."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


async def test_all_mail_of_a_drained_node_is_delivered_by_others_each_message_once_though_it_is_killed_meanwhile(
    fleet: Fleet,
) -> None:
    count = 300
    subjects = [f"waiting {number}" for number in range(count)]
    first, second = await fleet.node("mx1"), await fleet.node("mx2")
    fleet.sink.refusing = True
    async with running(second) as taking:
        async with running(first) as node:
            await fleet.in_use("mx1")
            await fleet.in_use("mx2")
            await submit(node, subjects)
            operation = await fleet.drain("mx1")
            await kill(node)
        async with running(first) as node:
            status, said = await cli(fleet, "nodes", "drain", "mx1", "--wait")
            assert status == 0, said
            assert said.splitlines()[-1] == f"mx1 takes no mail, and nothing waits there; messages taken: mx2 {count}"
            done = await fleet.drained(operation)
            assert await asyncio.to_thread(refused, node.smtp_port) == 421
            assert await asyncio.to_thread(readiness, node.metrics_port) == 503
            assert await asyncio.to_thread(readiness, taking.metrics_port) == 200
            result = DrainNodeResult()
            assert done.response.Unpack(result)
            assert [(one.node, one.message_count, one.recipient_count) for one in result.targets] == [
                ("nodes/mx2", count, count)
            ]
            assert fleet.nothing_came()
            fleet.sink.refusing = False
            await fleet.arrive(count)
            await fleet.all_sent(count)
            assert await node.stop() == 0
        assert fleet.nothing_came()
        assert fleet.arrived == Counter(subjects)
        await waiting(fleet, "mx1", 0)

        async def is_gone() -> bool:
            return not (await fleet.get("mx1")).connected

        await until(is_gone, 30)
        node_now = await fleet.get("mx1")
        await fleet.client.nodes.DeleteNode(DeleteNodeRequest(name="nodes/mx1", etag=node_now.etag))
        assert await taking.stop() == 0
    assert await fetch(fleet.database, "SELECT 1 FROM postroad.ledger_rejects") == []
    for table in ("handovers", "handover_contents"):
        assert await fetch(fleet.database, f"SELECT 1 FROM postroad.{table}") == []  # noqa: S608 - of this file
    metadata = DrainNodeMetadata()
    assert done.metadata.Unpack(metadata)
    assert (metadata.node, metadata.closed, metadata.waiting_count, metadata.moving_count) == ("nodes/mx1", True, 0, 0)


@pytest.mark.parametrize(
    ("struck", "point"),
    [
        ("mx1", "handover.giving:3"),
        ("mx1", "handover.given:1"),
        ("mx2", "handover.arrived:3"),
        ("mx2", "handover.taken:1"),
    ],
)
async def test_a_worker_that_is_killed_at_any_step_of_a_hand_over_neither_loses_nor_repeats_anything(
    fleet: Fleet, struck: str, point: str
) -> None:
    subjects = [f"waiting {number}" for number in range(40)]
    first, second = await fleet.node("mx1"), await fleet.node("mx2")
    spent = fleet.folder / "spent"
    spent.mkdir()
    failing = {"POSTROAD_FAILPOINTS": point, "POSTROAD_FAILPOINTS_SPENT": str(spent)}
    environment: dict[str, dict[str, Any]] = {"mx1": {}, "mx2": {}, struck: failing}
    fleet.sink.refusing = True
    async with running(second, **environment["mx2"]) as other, running(first, **environment["mx1"]) as node:
        await fleet.in_use("mx1")
        await fleet.in_use("mx2")
        await submit(node, subjects)
        await fleet.drained(await fleet.drain("mx1"))
        assert [file.name for file in spent.iterdir()] == [point.partition(":")[0]]
        assert fleet.nothing_came()
        fleet.sink.refusing = False
        await fleet.arrive(len(subjects))
        await fleet.all_sent(len(subjects))
        assert fleet.nothing_came()
        assert [await each.stop() for each in (node, other)] == [0, 0]
    assert fleet.arrived == Counter(subjects)
    assert await fetch(fleet.database, "SELECT 1 FROM postroad.ledger_rejects") == []
    assert await fetch(fleet.database, "SELECT 1 FROM postroad.handovers") == []


async def test_a_control_plane_that_is_killed_and_a_database_that_is_away_only_delay_a_drain(fleet: Fleet) -> None:
    subjects = [f"waiting {number}" for number in range(300)]
    first, second = await fleet.node("mx1"), await fleet.node("mx2")
    fleet.sink.refusing = True
    async with running(second) as other, running(first) as node:
        await fleet.in_use("mx1")
        await fleet.in_use("mx2")
        await submit(node, subjects)
        operation = await fleet.drain("mx1")

        async def moves() -> bool:
            rows = await fetch(
                fleet.database, "SELECT 1 FROM postroad.handovers UNION SELECT 1 FROM postroad.drain_targets"
            )
            return bool(rows)

        await until(moves, 60)
        async with plane_killed(fleet):
            before = len(log_events(first, "ledger.disconnected"))
            async with database_away(fleet.database):
                # Its records are sent again and again.
                await until(lambda: len(log_events(first, "ledger.disconnected")) > before, 60)
            await fleet.drained(operation)
            fleet.sink.refusing = False
            await fleet.arrive(len(subjects))
            await fleet.all_sent(len(subjects))
            assert fleet.nothing_came()
            assert fleet.arrived == Counter(subjects)
            assert [await each.stop() for each in (node, other)] == [0, 0]


async def test_an_undrained_node_takes_mail_again_and_what_nobody_else_has_taken(fleet: Fleet) -> None:
    first, second = await fleet.node("mx1"), await fleet.node("mx2")
    fleet.sink.refusing = True
    async with running(first) as node:
        await fleet.in_use("mx1")
        status, said = await cli(fleet, "nodes", "drain", "mx1")
        assert (status, "no other node of the pool of nodes/mx1 is connected" in said) == (1, True), said
        async with running(second) as other:
            await fleet.in_use("mx2")
            operation = await fleet.drain("mx2")
            await fleet.drained(operation)
            status, said = await cli(fleet, "nodes", "undrain", "mx2")
            assert status == 0, said
            await submit(node, ["one", "two", "three"])
            operation = await fleet.drain("mx1")
            await kill(other)
        # Nobody is there to take it: it waits in between.

        async def is_between() -> bool:
            return len(await fetch(fleet.database, "SELECT 1 FROM postroad.handovers")) == 3

        await until(is_between, 60)
        assert (await fleet.drain("mx1")).name == operation.name
        status, said = await cli(fleet, "nodes", "undrain", "mx1")
        assert status == 0, said
        fleet.sink.refusing = False
        await fleet.arrive(3)
        assert fleet.arrived == Counter(["one", "two", "three"])
        ended = await fleet.drained(operation)
        assert ended.error.message == "the node takes mail again"

        async def serves() -> bool:
            return await asyncio.to_thread(refused, node.smtp_port) == 220

        await until(serves, 30)
        await submit(node, ["after"])
        await fleet.arrive(4)
        status, said = await cli(fleet, "nodes", "undrain", "mx1")
        assert (status, "nodes/mx1 is not drained" in said) == (1, True), said
        assert await node.stop() == 0
