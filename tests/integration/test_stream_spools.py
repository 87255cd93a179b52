"""Whose a spool is, judged by a heartbeat and by a scan at a time: who read first does not have the last word."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import datetime

import pytest

from controlplane.adapters.postgres.fleet import PostgresFleet
from controlplane.ports_fleet import NodeHealth, SpoolOwner, SpoolStatus
from controlplane.stream.fleet import FleetService
from controlplane.stream.hub import Hub, Slot
from controlplane.stream.session import Action, Directive, Hello
from support.databases import Database
from support.fleet import execute, fleet_database
from support.nodes_port import now

SPOOL = "22222222-2222-4222-8222-222222222222"
STATUS = SpoolStatus(SPOOL, 3, 5, 10, 1, open=True)
HEALTH = NodeHealth(b"", draining=False, queue_depth=0, oldest_age_s=0.0, clock_skew_s=0.0)


class SlowFleet(PostgresFleet):
    """Brings what it read of spools when `gate` lets it; `has_read` says that it waits."""

    gate: asyncio.Event | None = None
    has_read = asyncio.Event()

    async def list_spools(self, node_ids: Sequence[str]) -> list[SpoolOwner]:
        return await self._slowly(await super().list_spools(node_ids))

    async def report_spools(self, node_id: str, spools: Sequence[SpoolStatus], now: datetime) -> list[SpoolOwner]:
        return await self._slowly(await super().report_spools(node_id, spools, now))

    async def _slowly(self, read: list[SpoolOwner]) -> list[SpoolOwner]:
        gate, self.gate = self.gate, None
        if gate is not None:
            self.has_read.set()
            await gate.wait()
        return read


class Replica:
    """A replica with one stream, of node `edge-1`, which has the spool."""

    def __init__(self, repository: SlowFleet) -> None:
        self.repository = repository
        self.fleet = FleetService(repository, Hub(10), now, "test")
        self.slot: Slot

    async def open(self) -> None:
        self.slot = await self.fleet.admit("edge-1", "serial-edge-1", lambda: None)
        await self.fleet.greet(self.slot, Hello("nodes/edge-1", "boot", "1.0", (), 0, (STATUS,)))
        assert self.directives() == []

    def directives(self) -> list[Action]:
        """What the node is told of the spool now."""
        told = []
        while (output := self.slot.session.next_output()) is not None:
            if isinstance(output, Directive):
                told.append(output.action)
        return told

    async def heartbeat(self) -> None:
        await self.fleet.heartbeat(self.slot, HEALTH, 0, (STATUS,))

    async def scan(self) -> None:
        await self.fleet.scan()


@pytest.fixture
async def replica(migrated_database: Database) -> AsyncIterator[Replica]:
    await execute(migrated_database, "INSERT INTO postroad.node_pools (node_pool) VALUES ('default')")
    for node in ("edge-1", "edge-2"):
        await execute(
            migrated_database,
            "INSERT INTO postroad.nodes (node, node_pool, state, certificate_serial, certificate_not_after)"
            " VALUES ($1, 'default', 2, $2, now() + interval '30 days')",
            *(node, f"serial-{node}"),
        )
    async with fleet_database(migrated_database) as database:
        replica = Replica(SlowFleet(database, lambda _pool, _key, sealed: sealed))
        await replica.open()
        yield replica


@pytest.mark.parametrize(("slow", "quick"), [("scan", "heartbeat"), ("heartbeat", "scan")])
async def test_who_read_before_a_spool_moved_lets_nobody_send_from_it_after_it_was_refused(
    replica: Replica, migrated_database: Database, slow: str, quick: str
) -> None:
    gate = replica.repository.gate = asyncio.Event()
    replica.repository.has_read = asyncio.Event()
    slow_one = asyncio.ensure_future(getattr(replica, slow)())
    await replica.repository.has_read.wait()
    await execute(migrated_database, "UPDATE postroad.spools SET node = 'edge-2' WHERE spool = $1", uuid.UUID(SPOOL))
    await getattr(replica, quick)()
    assert replica.directives() == [Action.REFUSE_SPOOL]

    gate.set()
    await slow_one

    # A heartbeat that left before the node heard of it calls the spool not refused: it is said again.
    assert Action.ACCEPT_SPOOL not in replica.directives()
    assert replica.slot.refused_spools == {SPOOL}
    assert replica.slot.let_send == frozenset()
