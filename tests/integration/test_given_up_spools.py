"""Spools whose disk is lost: what waited there ends, nobody waits for them any more, the disk is not let back in."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from controlplane.adapters.postgres.books import PostgresBooks
from controlplane.adapters.postgres.fleet import PostgresFleet
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.handovers import PostgresHandovers
from controlplane.adapters.postgres.leader import PostgresJobs
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.queue import PostgresQueue
from controlplane.domain.books import FindingKind
from controlplane.jobs.books import findings_of
from controlplane.ports_fleet import Cursor, RawBatch, Refusal, RefusalReason, SpoolOpening, SpoolStatus
from controlplane.ports_queue import SpoolOwnershipError
from dataplane.core.queue import EventType, State
from postroad.control.v1 import message_service_pb2 as messages
from postroad.control.v1 import node_service_pb2 as service
from support.api import ApiStack, Client, running_api
from support.databases import Database
from support.fleet import NOW, accepted, fetch, fleet_database, message_id

LOST, OTHER = str(uuid.uuid4()), str(uuid.uuid4())
QUEUED, SENT = int(State.QUEUED), int(State.SENT)
FAILED = int(State.FAILED)


@dataclass
class Plane:
    """Two nodes with a spool each, the API, and what the fleet's side does."""

    stack: ApiStack
    account: Client
    fleet: FleetDatabase
    database: Database

    def __post_init__(self) -> None:
        self.ledger = PostgresLedger(self.fleet, retention=timedelta(days=30))
        self.jobs = PostgresJobs(self.fleet)

    async def open(self, spool: str, node: str) -> Cursor | Refusal:
        return await self.ledger.open_spool(node, SpoolOpening(spool, 1, 0, 1, 1_000), NOW)

    async def was_reported(self, *, seconds_ago: float) -> None:
        reported = datetime.now(UTC) - timedelta(seconds=seconds_ago)
        await self.stack.as_superuser("UPDATE postroad.spools SET update_time = $1", reported)

    async def give_up_lost(self) -> None:
        await self.was_reported(seconds_ago=91)
        await self.give_up()

    async def give_up(self, node: str = "mx2", spool: str = LOST) -> None:
        request = service.GiveUpSpoolRequest(name=f"nodes/{node}", spool=spool)
        await self.stack.operator.node("GiveUpSpool", request)

    async def end(self, limit: int) -> None:
        """As the leader does it, every few seconds."""
        while await self.jobs.end_given_up(limit) >= limit:
            pass

    async def delete(self, node: str) -> None:
        stored = await self.stack.operator.node("GetNode", service.GetNodeRequest(name=f"nodes/{node}"))
        await self.stack.operator.node("DeleteNode", service.DeleteNodeRequest(name=stored.name, etag=stored.etag))

    async def states(self, spool: str) -> list[int]:
        rows = await fetch(
            self.database,
            "SELECT state FROM postroad.recipients JOIN postroad.messages USING (message_id) WHERE spool = $1"
            " ORDER BY state",
            spool,
        )
        return [row["state"] for row in rows]


@pytest.fixture
async def plane(migrated_database: Database) -> AsyncIterator[Plane]:
    async with running_api(migrated_database) as stack, fleet_database(migrated_database) as fleet:
        account = await stack.make_account("demo")
        plane = Plane(stack, account, fleet, migrated_database)
        for node, spool in (("mx1", OTHER), ("mx2", LOST)):
            await stack.operator.node("CreateNode", service.CreateNodeRequest(node_id=node))
            assert await plane.open(spool, node) == Cursor(spool, 0)
            records = [
                accepted(message_id(), "a@example.net", "b@example.net", "c@example.net"),
                accepted(message_id(), "d@example.net", state=SENT),
                accepted(message_id(), "e@example.net", "f@example.net"),
            ]
            batch = RawBatch(spool, 1, 1, [record.SerializeToString() for record in records])
            await plane.ledger.store(node, batch, NOW)
        yield plane


async def test_what_waited_on_a_lost_disk_fails_with_an_event_and_nothing_else_does(plane: Plane) -> None:
    await plane.give_up_lost()
    assert await plane.states(LOST) == [QUEUED] * 5 + [SENT]
    await plane.end(2)

    assert await plane.states(LOST) == [SENT] + [FAILED] * 5
    assert await plane.states(OTHER) == [QUEUED] * 5 + [SENT]
    rows = await fetch(plane.database, "SELECT * FROM postroad.delivery_events WHERE type = $1", int(EventType.FAILED))
    assert {(row["spool"], row["account"]) for row in rows} == {(uuid.UUID(LOST), "demo")}
    assert [row["reply_text"] for row in rows] == ["the disk it waited on was given up"] * 5
    (ended,) = await fetch(plane.database, "SELECT reply_text FROM postroad.recipients WHERE state = 8 LIMIT 1")
    assert ended["reply_text"] == "the disk it waited on was given up"
    (audit,) = await fetch(
        plane.database, "SELECT principal, new_row FROM postroad.audit_log WHERE table_name = 'given_up_spools'"
    )
    assert audit["principal"] == "apiKeys/bootstrap"
    assert LOST in str(audit["new_row"])


async def test_the_books_of_a_lost_disk_are_closed_and_no_finding_stays_open(plane: Plane) -> None:
    store = PostgresBooks(plane.fleet)
    later = NOW + timedelta(hours=1)
    found = {(one.spool, one.node): findings_of(one) for one in await store.silent_spools(later)}
    assert {spool for spool, _ in found} == {LOST, OTHER}
    await store.report_silent(found, later)
    await plane.give_up_lost()
    assert {one.spool for one in await store.silent_spools(later)} == {OTHER}

    await plane.end(2_000)

    health = await store.health(later)
    assert health.findings == {FindingKind.SPOOL_SILENT: 5}
    assert LOST not in health.ages_s
    (row,) = await fetch(
        plane.database,
        "SELECT sum(accepted)::int, sum(sent)::int, sum(failed)::int FROM postroad.book_entries WHERE spool = $1",
        LOST,
    )
    assert tuple(row) == (6, 1, 5)
    assert not await fetch(plane.database, "SELECT FROM postroad.books WHERE spool = $1", LOST)


async def test_commands_do_not_wait_for_a_lost_disk(plane: Plane) -> None:
    every = messages.CommandMessagesRequest(parent="accounts/demo", verb=messages.COMMAND_VERB_HOLD)
    every.filter.SetInParent()
    before = await plane.account.message("CommandMessages", every)
    (one,) = await fetch(plane.database, "SELECT message_id FROM postroad.messages WHERE spool = $1 LIMIT 1", LOST)
    await plane.give_up_lost()
    after = await plane.account.message("CommandMessages", every)
    cancel = messages.CancelMessageRequest(name=f"accounts/demo/messages/{one['message_id']}")
    named = await plane.account.message("CancelMessage", cancel)
    await plane.end(2_000)

    rows = await fetch(
        plane.database,
        "SELECT coalesce(operation, command)::text AS o, spool, error FROM postroad.commands"
        " WHERE done_time IS NOT NULL",
    )
    gone = {(row["o"], str(row["spool"]), row["error"]) for row in rows}
    said = "the spool was given up"
    assert gone == {(operation.name.rpartition("/")[2], LOST, said) for operation in (before, named)}
    waits = await fetch(plane.database, "SELECT spool FROM postroad.commands WHERE done_time IS NULL")
    assert [str(row["spool"]) for row in waits] == [OTHER] * 2
    assert not after.done


async def test_a_node_whose_disk_is_lost_can_be_deleted(plane: Plane) -> None:
    assert (await plane.stack.operator.refused(plane.delete("mx2"))).reason == "NODE_IN_USE"
    await plane.give_up_lost()
    await plane.delete("mx2")
    await plane.end(2_000)
    assert await plane.states(LOST) == [SENT] + [FAILED] * 5


async def test_a_drain_does_not_wait_for_a_lost_disk(plane: Plane) -> None:
    await plane.stack.as_superuser("INSERT INTO postroad.node_status (node, closed) VALUES ('mx2', true)")
    await plane.stack.as_superuser(
        "WITH d AS (INSERT INTO postroad.node_drains (node) VALUES ('mx2') RETURNING drain)"
        " UPDATE postroad.nodes SET drain = (SELECT drain FROM d) WHERE node = 'mx2'"
    )
    handovers = PostgresHandovers(plane.fleet)
    assert await handovers.end_drains(NOW) == []
    await plane.give_up_lost()
    assert await handovers.end_drains(NOW) == ["mx2"]


async def test_a_disk_that_turns_up_is_refused_on_every_node(plane: Plane) -> None:
    await plane.give_up_lost()
    await plane.delete("mx2")
    refusal = await plane.open(LOST, "mx1")
    assert isinstance(refusal, Refusal)
    assert refusal.reason is RefusalReason.NOT_OWNED
    record = accepted(message_id()).SerializeToString()
    stored = await plane.ledger.store("mx1", RawBatch(LOST, 1, 4, [record]), NOW)
    assert isinstance(stored.answer, Refusal)
    fleet = PostgresFleet(plane.fleet, lambda _pool, _key_id, sealed: sealed)
    reported = await fleet.report_spools("mx1", [SpoolStatus(one, 1, 5, 9, 1, open=True) for one in (LOST, OTHER)], NOW)
    assert [owner.spool for owner in reported] == [OTHER]
    with pytest.raises(SpoolOwnershipError):
        await PostgresQueue(plane.fleet, plane.ledger).renew("mx1", LOST, 0)
    assert not await fetch(plane.database, "SELECT FROM postroad.spools WHERE spool = $1", LOST)


async def test_a_spool_that_was_reported_just_now_is_not_given_up(plane: Plane) -> None:
    await plane.was_reported(seconds_ago=0)
    error = await plane.stack.operator.refused(plane.give_up())
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SPOOL_IN_USE")
    # The node is there again, with another disk: it does not speak of the old one.
    await plane.give_up_lost()
    error = await plane.stack.operator.refused(plane.give_up())
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert (await plane.stack.operator.refused(plane.give_up("mx2", OTHER))).code is grpc.StatusCode.NOT_FOUND


async def test_the_spool_of_a_node_that_is_revoked_is_given_up_at_once(plane: Plane) -> None:
    await plane.was_reported(seconds_ago=0)
    await plane.stack.operator.node("RevokeNode", service.RevokeNodeRequest(name="nodes/mx2"))
    await plane.give_up()
    assert not await fetch(plane.database, "SELECT FROM postroad.spools WHERE spool = $1", LOST)


async def test_a_filter_passes_over_the_empty_spool_of_a_revoked_node(plane: Plane) -> None:
    every = messages.CommandMessagesRequest(parent="accounts/demo", verb=messages.COMMAND_VERB_HOLD)
    every.filter.SetInParent()
    await plane.stack.operator.node("RevokeNode", service.RevokeNodeRequest(name="nodes/mx2"))
    await plane.account.message("CommandMessages", every)
    await plane.stack.as_superuser(
        "UPDATE postroad.recipients SET state = 6 WHERE message_id IN (SELECT message_id FROM postroad.messages"
        " WHERE spool = $1)",
        LOST,
    )
    await plane.account.message("CommandMessages", every)
    everybody = messages.CommandMessagesRequest(parent="accounts/-", verb=messages.COMMAND_VERB_HOLD)
    everybody.filter.SetInParent()
    await plane.stack.operator.message("CommandMessages", everybody)
    rows = await fetch(plane.database, "SELECT spool, count(*) FROM postroad.commands GROUP BY spool")
    assert {str(row["spool"]): row["count"] for row in rows} == {OTHER: 3, LOST: 1}
