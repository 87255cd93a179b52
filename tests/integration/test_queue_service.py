"""The replicated queue over mutual TLS, as the agent relays it: who may ask, and what each refusal is called."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dataplane.agent.queue_relay import QueueRelay
from dataplane.link import QueueAnswer, QueueCall, QueueMethod
from postroad.node.v1 import queue_service_pb2 as pb
from support.databases import Database
from support.fleet import accepted, execute, message_id
from support.ingress import Log
from support.nodes_port import Certificate, NodesPort, nodes_port
from support.replicated import add_account, end_lease

OK = 0
INVALID_ARGUMENT, PERMISSION_DENIED, ABORTED, UNAVAILABLE, UNAUTHENTICATED = (
    code.value[0]
    for code in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNAUTHENTICATED,
    )
)


@pytest.fixture
async def port(migrated_database: Database, tmp_path: Path) -> AsyncIterator[NodesPort]:
    await add_account(migrated_database)
    async with nodes_port(migrated_database, tmp_path / "pki") as port:
        yield port


class Node:
    """A node's agent, as far as its workers' calls go."""

    def __init__(self, port: NodesPort, certificate: Certificate | None) -> None:
        self.relay = QueueRelay(lambda: port.channel(certificate), Log())
        self.spool = str(uuid.uuid4())
        self.epoch = 0

    async def ask(self, method: QueueMethod, request: Any, response: Any = None) -> tuple[int, Any]:
        """Status and response, or its text."""
        answered: asyncio.Future[QueueAnswer] = asyncio.get_running_loop().create_future()
        self.relay.call(QueueCall(1, method, 10_000, request.SerializeToString()), answered.set_result)
        async with asyncio.timeout(20):
            answer = await answered
        return answer.status, response.FromString(answer.payload) if answer.status == OK and response else answer

    async def renew(self) -> int:
        request = pb.RenewLeaseRequest(spool=self.spool, epoch=self.epoch)
        status, response = await self.ask(QueueMethod.RENEW_LEASE, request, pb.RenewLeaseResponse)
        if status == OK:
            self.epoch = response.epoch
            assert response.duration.seconds == 15
        return status

    async def store(self, raw_id: bytes) -> int:
        message = pb.QueuedMessage(record=accepted(raw_id).SerializeToString(), envelope=b"e", content=b"hello\r\n")
        request = pb.StoreMessagesRequest(spool=self.spool, epoch=self.epoch, messages=[message])
        return (await self.ask(QueueMethod.STORE_MESSAGES, request))[0]

    async def claim(self, count: int = 10) -> tuple[int, Any]:
        request = pb.ClaimMessagesRequest(
            spool=self.spool, epoch=self.epoch, claim_id=str(uuid.uuid4()), max_messages=count, max_bytes=1_000
        )
        status, response = await self.ask(QueueMethod.CLAIM_MESSAGES, request, pb.ClaimMessagesResponse)
        return status, (request.claim_id, response)


async def test_a_message_goes_in_and_out(port: NodesPort) -> None:
    node, raw_id = Node(port, await port.enrolled("edge-1")), message_id()
    assert await node.renew() == OK
    former = node.epoch
    assert (await node.renew(), node.epoch) == (OK, former)
    assert await node.store(raw_id) == OK
    status, (claim_id, response) = await node.claim()
    assert status == OK
    (message,) = response.messages
    assert (message.message_id, message.envelope, message.content) == (raw_id, b"e", b"hello\r\n")
    request = pb.ConfirmClaimRequest(spool=node.spool, epoch=node.epoch, claim_id=claim_id, message_ids=[raw_id])
    for _ in range(2):
        _, confirmed = await node.ask(QueueMethod.CONFIRM_CLAIM, request, pb.ConfirmClaimResponse)
        assert list(confirmed.message_ids) == [raw_id]
    fetch = pb.FetchContentRequest(spool=node.spool, epoch=node.epoch, message_id=raw_id)
    _, content = await node.ask(QueueMethod.FETCH_CONTENT, fetch, pb.FetchContentResponse)
    assert (content.data, content.next_chunk) == (b"hello\r\n", 0)
    await node.relay.close()


async def test_a_lease_that_has_ended_is_aborted(port: NodesPort, migrated_database: Database) -> None:
    node = Node(port, await port.enrolled("edge-1"))
    await node.renew()
    await end_lease(migrated_database, node.epoch)
    assert await node.store(message_id()) == ABORTED
    assert (await node.claim())[0] == ABORTED
    former = node.epoch
    assert await node.renew() == OK
    assert node.epoch != former
    await node.relay.close()


async def test_a_node_speaks_for_its_own_spools_and_only_while_it_is_admitted(
    port: NodesPort, migrated_database: Database
) -> None:
    node, other = Node(port, await port.enrolled("edge-1")), Node(port, await port.enrolled("edge-2"))
    await node.renew()
    other.spool, other.epoch = node.spool, node.epoch
    assert await other.renew() == PERMISSION_DENIED
    assert await other.store(message_id()) == ABORTED
    stranger = Node(port, None)
    assert await stranger.renew() == UNAVAILABLE
    await execute(migrated_database, "UPDATE postroad.nodes SET state = 3 WHERE node = 'edge-3'")
    revoked = Node(port, await port.enrolled("edge-3"))
    await execute(migrated_database, "UPDATE postroad.nodes SET state = 3 WHERE node = 'edge-3'")
    assert await revoked.renew() == UNAUTHENTICATED
    for one in (node, other, stranger, revoked):
        await one.relay.close()


async def test_a_node_that_is_revoked_or_moves_is_known_for_what_it_is_after_a_scan(
    port: NodesPort, migrated_database: Database
) -> None:
    node, other = Node(port, await port.enrolled("edge-1")), Node(port, await port.enrolled("edge-2", "elsewhere"))
    assert (await node.renew(), await other.renew()) == (OK, OK)
    await execute(migrated_database, "UPDATE postroad.nodes SET state = 3 WHERE node = 'edge-1'")
    await execute(migrated_database, "UPDATE postroad.nodes SET node_pool = 'default' WHERE node = 'edge-2'")
    await port.fleet.scan()
    assert await node.renew() == UNAUTHENTICATED
    assert await node.store(message_id()) == UNAUTHENTICATED
    assert (await node.claim())[0] == UNAUTHENTICATED
    assert await other.store(message_id()) == OK
    for one in (node, other):
        await one.relay.close()


async def test_what_is_no_request_is_refused_for_good(port: NodesPort) -> None:
    node = Node(port, await port.enrolled("edge-1"))
    await node.renew()
    assert (await node.claim(0))[0] == INVALID_ARGUMENT
    assert await node.store(b"short") == INVALID_ARGUMENT
    content = pb.StoreContentRequest(spool=node.spool, message_id=b"short", data=b"x")
    assert (await node.ask(QueueMethod.STORE_CONTENT, content))[0] == INVALID_ARGUMENT
    node.spool = "no uuid"
    assert await node.renew() == INVALID_ARGUMENT
    await node.relay.close()
