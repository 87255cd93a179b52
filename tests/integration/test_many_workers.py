"""A node with several workers: what the end of one does to the others, to who waits, and to mail in its spool."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from dataplane.cores import available_cores
from dataplane.spool_folders import QUARANTINE_FILE, assign_spools
from postroad.node.v1.ledger_pb2 import RECIPIENT_STATE_SENT, LedgerRecord
from support.node_mail import (
    Connection,
    Sink,
    configure,
    connect,
    listening_sink,
    send,
    server_of,
    waiting_for,
    workers_of,
)
from support.node_plane import WAIT_S, ControlPlane, Pki, control_plane
from support.node_process import NodeProcess, log_events, running, write_settings

pytestmark = pytest.mark.timeout(180)

# More than chance needs to bring connections to every worker.
MOST_CONNECTIONS = 200


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    async with listening_sink() as made:
        yield made


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with control_plane(Pki()) as made:
        yield made


@pytest.fixture
def settings_file(tmp_path: Path, plane: ControlPlane) -> Path:
    plane.pki.write_identity(tmp_path / "data")
    return write_settings(tmp_path, plane.address, workers=2)


@pytest.fixture
async def connections() -> AsyncIterator[list[Connection]]:
    """What a test opens; closed at its end."""
    made: list[Connection] = []
    yield made
    for connection in made:
        connection.close()


async def greeted_by_each(node: NodeProcess, connections: list[Connection]) -> dict[str, Connection]:
    """A greeted session of every worker."""
    found: dict[str, Connection] = {}
    workers = {name for name in node.ready["processes"] if name != "agent"}
    while set(found) != workers:
        assert len(connections) < MOST_CONNECTIONS
        connections.append(connection := await connect(node))
        assert (await connection.line()).startswith(b"220 ")
        found.setdefault(server_of(node, connection), connection)
    return found


async def queue_up(node: NodeProcess, worker: str, count: int, connections: list[Connection]) -> list[Connection]:
    """Open connections until so many wait for the worker, which is stopped; all that were opened."""
    opened: list[Connection] = []
    while waiting_for(node, worker) < count:
        assert len(opened) < MOST_CONNECTIONS
        opened.append(await connect(node))
        connections.append(opened[-1])
    return opened


async def is_cut(connection: Connection) -> bool:
    with contextlib.suppress(ConnectionError):
        return await connection.line() == b""
    return True


async def test_a_killed_worker_resets_nobody_else_and_who_waited_for_it_is_served_by_the_next(
    settings_file: Path, plane: ControlPlane, sink: Sink, connections: list[Connection]
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        sessions = await greeted_by_each(node, connections)
        victim = node.ready["processes"]["worker-0"]
        os.kill(victim, signal.SIGSTOP)
        waiting = await queue_up(node, "worker-0", 3, connections)
        os.kill(victim, signal.SIGKILL)
        await node.wait_ready()
        assert await is_cut(sessions["worker-0"])
        assert (await sessions["worker-1"].ask(b"NOOP")).startswith(b"250 ")
        greetings = [await connection.line() for connection in waiting]
        assert all(greeting.startswith(b"220 ") for greeting in greetings)
        served = Counter(server_of(node, connection) for connection in waiting)
        assert served["worker-0"] >= 3
        for connection in connections:
            connection.close()
        assert await node.stop() == 0


async def spools_with_waiting_mail(node: NodeProcess, plane: ControlPlane, sink: Sink, count: int) -> Counter[str]:
    """Send mail that stays, until so many spools hold some; how many messages each of them holds."""
    sink.reply = "451 later"
    for number in range(MOST_CONNECTIONS):
        before = accepted(plane)
        await send(node, f"waiting {number}")
        # A message is recorded when it was put off; only then does its spool stand there.
        async with asyncio.timeout(WAIT_S), plane.record_arrived:
            await plane.record_arrived.wait_for(partial(_differs, plane, before))
        if len(plane.records) == count:
            return accepted(plane)
    raise AssertionError("chance never came to every worker")


def _differs(plane: ControlPlane, before: Counter[str]) -> bool:
    return accepted(plane) != before


def accepted(plane: ControlPlane) -> Counter[str]:
    """Messages of each spool that its records tell of."""
    return Counter(
        spool
        for spool, records in plane.records.items()
        for record in map(LedgerRecord.FromString, records)
        if record.HasField("accepted")
    )


def sent(plane: ControlPlane) -> Counter[str]:
    """Recipients of each spool that were recorded as sent."""
    return Counter(
        spool
        for spool, records in plane.records.items()
        for record in map(LedgerRecord.FromString, records)
        for update in record.recipients
        if update.state == RECIPIENT_STATE_SENT
    )


async def until_sent(plane: ControlPlane, wanted: Counter[str]) -> None:
    async with asyncio.timeout(WAIT_S), plane.record_arrived:
        await plane.record_arrived.wait_for(lambda: sent(plane) == wanted)


async def test_mail_of_killed_workers_is_delivered_and_recorded_by_those_that_follow_them(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        waiting = await spools_with_waiting_mail(node, plane, sink, 2)
        for name in ("worker-0", "worker-1"):
            os.kill(node.ready["processes"][name], signal.SIGKILL)
            await node.wait_ready()
        sink.reply = "250 taken"
        await until_sent(plane, waiting)
        incarnations = {spool: max(o.incarnation for o in plane.opened if o.spool == spool) for spool in waiting}
        assert set(incarnations.values()) == {2}
        assert await node.stop() == 0


async def test_with_fewer_workers_the_spools_left_over_deliver_what_they_hold_and_take_nothing(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    write_settings(settings_file.parent, plane.address, workers=3)
    async with running(settings_file) as node:
        await configure(plane, sink)
        waiting = await spools_with_waiting_mail(node, plane, sink, 3)
        assert await node.stop() == 0
    write_settings(settings_file.parent, plane.address, workers=1)
    async with running(settings_file) as node:
        sink.reply = "250 taken"
        await until_sent(plane, waiting)
        for number in range(4):
            await send(node, f"new {number}")
        async with asyncio.timeout(WAIT_S), plane.record_arrived:
            await plane.record_arrived.wait_for(lambda: sum(sent(plane).values()) == sum(waiting.values()) + 4)
        assert sorted((sent(plane) - waiting).values()) == [4]
        assert len(log_events(settings_file, "spool.delivers_only")) == 2
        assert await node.stop() == 0


async def test_with_more_workers_than_before_each_takes_mail_into_a_spool_of_its_own(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    write_settings(settings_file.parent, plane.address, workers=1)
    async with running(settings_file) as node:
        await configure(plane, sink)
        waiting = await spools_with_waiting_mail(node, plane, sink, 1)
        assert await node.stop() == 0
    write_settings(settings_file.parent, plane.address, workers=3)
    async with running(settings_file) as node:
        after = await spools_with_waiting_mail(node, plane, sink, 3)
        assert waiting <= after
        sink.reply = "250 taken"
        await until_sent(plane, after)
        assert await node.stop() == 0


async def test_a_worker_that_ends_three_times_is_left_out_and_who_waits_for_it_hears_so(
    settings_file: Path, plane: ControlPlane, sink: Sink, connections: list[Connection]
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        for _ in range(2):
            os.kill(node.ready["processes"]["worker-0"], signal.SIGKILL)
            await node.wait_ready()
        victim = node.ready["processes"]["worker-0"]
        os.kill(victim, signal.SIGSTOP)
        waiting = await queue_up(node, "worker-0", 2, connections)
        before = [server_of(node, connection) for connection in waiting]
        os.kill(victim, signal.SIGKILL)
        answers = [await connection.line() for connection in waiting]
        assert {answer[:4] for name, answer in zip(before, answers, strict=True) if name} <= {b"220 "}
        assert Counter(answer[:10] for answer in answers)[b"421 4.3.2 "] >= 2
        await node.wait_ready()
        assert set(node.ready["processes"]) == {"agent", "worker-1"}
        assert len(node.ready["quarantined"]) == 1
        for number in range(6):
            await send(node, f"message {number}")
            assert f"Subject: message {number}".encode() in await sink.next()
        assert await node.stop() == 0


async def test_a_spool_that_cannot_be_opened_keeps_no_other_spool_of_its_worker_from_going_on(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    write_settings(settings_file.parent, plane.address, workers=1)
    spools = settings_file.parent / "data" / "spool"
    ((good,), (bad,)) = assign_spools(spools, 2)
    (spools / bad / "identity").write_text("of somebody else")
    async with running(settings_file) as node:
        await configure(plane, sink)
        await send(node, "goes on")
        await until_sent(plane, Counter({good: 1}))
        assert (spools / bad / QUARANTINE_FILE).exists()
        (spools / bad / "identity").unlink()
        os.kill(node.ready["processes"]["worker-0"], signal.SIGKILL)
        await node.wait_ready()
        assert not (spools / bad / QUARANTINE_FILE).exists()
        assert await node.stop() == 0


async def test_unless_told_otherwise_a_node_has_a_worker_for_each_core(
    settings_file: Path, plane: ControlPlane
) -> None:
    write_settings(settings_file.parent, plane.address, workers=0)
    async with running(settings_file) as node:
        assert len(workers_of(node.ready)) == available_cores()
        assert await node.stop() == 0


async def test_the_cap_of_an_address_holds_over_all_workers(
    settings_file: Path, plane: ControlPlane, connections: list[Connection]
) -> None:
    write_settings(settings_file.parent, plane.address, workers=2, ingress={"connections_per_address": 4})
    async with running(settings_file) as node:
        for _ in range(4):
            connections.append(await connect(node))
            assert (await connections[-1].line()).startswith(b"220 ")
        connections.append(await connect(node))
        assert (await connections[-1].line()).startswith(b"421 ")
        await node.stop()
