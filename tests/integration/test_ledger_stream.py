"""The ledger stream over mutual TLS: batches in flight, cursors, other nodes' spools, PostgreSQL that goes away."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from postroad.node.v1 import ledger_service_pb2 as pb
from postroad.node.v1.ledger_pb2 import RecipientState
from postroad.node.v1.ledger_service_pb2_grpc import LedgerServiceStub
from support.databases import Database
from support.fleet import accepted, execute, fetch, message_id
from support.nodes_port import Certificate, NodesPort, nodes_port

SENT = RecipientState.RECIPIENT_STATE_SENT


@pytest.fixture
async def port(migrated_database: Database, tmp_path: Path) -> AsyncIterator[NodesPort]:
    async with nodes_port(migrated_database, tmp_path / "pki") as port:
        yield port


class Reporter:
    """A node's ledger stream, typed by hand, for one spool."""

    def __init__(self, port: NodesPort, certificate: Certificate, spool: str) -> None:
        self.call = LedgerServiceStub(port.channel(certificate)).ReportLedger()
        self.spool = spool

    async def open(self, last_record: int = 10_000) -> Any:
        opening = pb.LedgerOpen(spool=self.spool, incarnation=1, oldest_record=1, last_record=last_record)
        await self.call.write(pb.ReportLedgerRequest(open=opening))
        return await self.answer()

    async def send(self, first: int, count: int) -> None:
        records = [accepted(message_id(), state=SENT).SerializeToString() for _ in range(count)]
        batch = pb.LedgerBatch(spool=self.spool, incarnation=1, first_record=first, records=records)
        await self.call.write(pb.ReportLedgerRequest(batch=batch))

    async def answer(self) -> Any:
        async with asyncio.timeout(10):
            response: Any = await self.call.read()
        assert response is not grpc.aio.EOF, await self.call.code()
        return getattr(response, response.WhichOneof("message"))

    async def end_code(self) -> grpc.StatusCode:
        async with asyncio.timeout(20):
            return await self.call.code()


async def test_batches_in_flight_are_answered_in_order(port: NodesPort, migrated_database: Database) -> None:
    reporter = Reporter(port, await port.enrolled("edge-1"), str(uuid.uuid4()))
    assert (await reporter.open()).cursor == 0

    for first in range(1, 400, 50):
        await reporter.send(first, 50)

    assert [(await reporter.answer()).cursor for _ in range(8)] == list(range(50, 401, 50))
    assert (await fetch(migrated_database, "SELECT count(*) FROM postroad.recipients WHERE state = 6"))[0][0] == 400


async def test_after_a_new_stream_the_cursor_says_where_to_go_on(port: NodesPort) -> None:
    certificate, spool = await port.enrolled("edge-1"), str(uuid.uuid4())
    first = Reporter(port, certificate, spool)
    await first.open()
    await first.send(1, 3)
    await first.answer()
    first.call.cancel()

    second = Reporter(port, certificate, spool)

    assert (await second.open()).cursor == 3


async def test_a_gap_is_answered_by_a_refusal_and_the_stream_goes_on(port: NodesPort) -> None:
    reporter = Reporter(port, await port.enrolled("edge-1"), str(uuid.uuid4()))
    await reporter.open()

    await reporter.send(5, 1)
    assert (await reporter.answer()).reason == pb.LedgerRefusal.REASON_GAP

    assert (await reporter.open()).cursor == 0
    await reporter.send(1, 1)
    assert (await reporter.answer()).cursor == 1


async def test_what_a_failover_lost_is_asked_for_again_though_there_is_no_news(
    port: NodesPort, migrated_database: Database
) -> None:
    reporter = Reporter(port, await port.enrolled("edge-1"), str(uuid.uuid4()))
    await reporter.open()
    await reporter.send(1, 3)
    assert (await reporter.answer()).cursor == 3

    await execute(migrated_database, "UPDATE postroad.spools SET cursor = 2")
    lost = await reporter.answer()
    assert (lost.spool, lost.reason) == (reporter.spool, pb.LedgerRefusal.REASON_GAP)
    assert lost.detail == "stored up to 2, no more up to 3"
    assert (await reporter.open()).cursor == 2

    await execute(migrated_database, "DELETE FROM postroad.spools")
    assert (await reporter.answer()).reason == pb.LedgerRefusal.REASON_GAP
    assert (await reporter.open()).cursor == 0


async def test_another_nodes_spool_is_refused(port: NodesPort) -> None:
    spool = str(uuid.uuid4())
    first = Reporter(port, await port.enrolled("edge-1"), spool)
    await first.open()
    second = Reporter(port, await port.enrolled("edge-2"), spool)
    opening = pb.LedgerOpen(spool=spool, incarnation=1)

    await second.call.write(pb.ReportLedgerRequest(open=opening))
    refusal = await second.answer()
    assert (refusal.spool, refusal.reason) == (spool, pb.LedgerRefusal.REASON_NOT_OWNED)
    second.spool = str(uuid.uuid4())
    assert (await second.open()).cursor == 0


@pytest.mark.parametrize(
    "request_",
    [
        pb.ReportLedgerRequest(),
        pb.ReportLedgerRequest(open=pb.LedgerOpen(spool="no uuid")),
        pb.ReportLedgerRequest(batch=pb.LedgerBatch(spool=str(uuid.uuid4()), first_record=1)),
    ],
)
async def test_what_breaks_the_protocol_ends_the_stream(port: NodesPort, request_: pb.ReportLedgerRequest) -> None:
    reporter = Reporter(port, await port.enrolled("edge-1"), str(uuid.uuid4()))

    await reporter.call.write(request_)

    assert await reporter.end_code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_revoked_node_does_not_report(port: NodesPort, migrated_database: Database) -> None:
    certificate = await port.enrolled("edge-1")
    await execute(migrated_database, "UPDATE postroad.nodes SET state = 3")
    reporter = Reporter(port, certificate, str(uuid.uuid4()))

    await reporter.call.write(pb.ReportLedgerRequest(open=pb.LedgerOpen(spool=reporter.spool)))

    assert await reporter.end_code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_node_that_is_revoked_while_it_reports_is_heard_no_more(
    port: NodesPort, migrated_database: Database
) -> None:
    reporter = Reporter(port, await port.enrolled("edge-1"), str(uuid.uuid4()))
    await reporter.open()
    await execute(migrated_database, "UPDATE postroad.nodes SET state = 3")
    await port.fleet.scan()

    await reporter.call.write(pb.ReportLedgerRequest(open=pb.LedgerOpen(spool=reporter.spool)))

    assert await reporter.end_code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_drained_stream_ends_after_what_it_has_in_hand(port: NodesPort) -> None:
    reporter = Reporter(port, await port.enrolled("edge-1"), str(uuid.uuid4()))
    await reporter.open()

    port.ledger.drain()

    assert await reporter.end_code() is grpc.StatusCode.OK


async def test_a_connection_that_postgresql_cuts_costs_nothing_that_was_answered(
    port: NodesPort, migrated_database: Database
) -> None:
    certificate, spool = await port.enrolled("edge-1"), str(uuid.uuid4())

    async def come_back() -> tuple[Reporter, int]:
        """As a node does: again, while the control plane finds out which connections are dead."""
        for _ in range(20):
            reporter = Reporter(port, certificate, spool)
            with contextlib.suppress(AssertionError, grpc.aio.AioRpcError):
                return reporter, (await reporter.open()).cursor
        pytest.fail("the ledger does not come back")

    stored = 0
    for _ in range(5):
        reporter, cursor = await come_back()
        assert cursor >= stored, "what was answered stays"
        stored = cursor
        for first in range(cursor + 1, cursor + 81, 20):
            await reporter.send(first, 20)
        await execute(
            migrated_database,
            """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE usename = 'postroad_fleet' AND datname = current_database()
            """,
        )
        reporter.call.cancel()

    _, cursor = await come_back()
    assert (await fetch(migrated_database, "SELECT count(*) FROM postroad.messages"))[0][0] == cursor
