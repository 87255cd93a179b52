"""REPLICATED mail with an Idempotency-Key, from the sockets of two nodes to PostgreSQL: stored once, without Redis."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dataplane.adapters.ledger_codec import encode_record
from dataplane.adapters.replicated_queue import LinkedQueue
from dataplane.adapters.spool_ram import RamSpool
from dataplane.agent.queue_relay import QueueRelay
from dataplane.core.policy import compile_account
from dataplane.delivery.engine import DeliveryEngine
from dataplane.link import Message, QueueAnswer, QueueCall, QueueMethod
from postroad.node.v1.ledger_pb2 import RecipientState
from support.databases import Database
from support.delivery import delivery_bench
from support.fleet import NOW_MS, execute, fetch
from support.ingress import ACCOUNT, Clock, Config, Log, Node, Peer, make_node, running, until
from support.nodes_port import NodesPort, nodes_port
from support.replicated import add_account, queue_states

EHLO = b"EHLO client.example\r\n"
ENVELOPE = b"MAIL FROM:<app@example.com>%s\r\nRCPT TO:<someone@example.net>\r\nDATA\r\n"
BODY = b"From: App <app@example.com>\r\nSubject: hello\r\nMessage-ID: <1@example.com>\r\n\r\nbody\r\n"
LARGE = BODY + (b"x" * 78 + b"\r\n") * 12_500
KEY = b"Idempotency-Key: order-4711\r\n"
STORED = b"250 2.0.0 queued as "
PENDING = b"451 4.7.1 A message with this Idempotency-Key is being stored, try again\r\n"
TAKEN = b"550 5.7.0 This Idempotency-Key was used for another message\r\n"
FAILED = b"451 4.3.0"
SCHEDULED = RecipientState.RECIPIENT_STATE_SCHEDULED


@dataclass
class Site:
    """A node: its ingress, and its worker's end of the queue behind an agent that can lose an answer."""

    ingress: Node
    queue: LinkedQueue
    relay: QueueRelay
    loses_stores: bool = False

    def send(self, message: Message) -> bool:
        assert isinstance(message, QueueCall)
        lost = self.loses_stores and message.method is QueueMethod.STORE_MESSAGES
        self.relay.call(message, self._lose if lost else self.queue.answered)
        return True

    def _lose(self, _: QueueAnswer) -> None:
        self.queue.agent_lost()

    async def submit(self, content: bytes, parameters: bytes = b"") -> bytes:
        """Send a message over a session of its own; return the answer to its dot."""
        peer: Peer = await self.ingress.greeted()
        await peer.ask(EHLO)
        assert (await peer.ask(ENVELOPE % parameters, 3)).startswith(b"354")
        answer = await peer.ask(content + b".\r\n")
        await peer.close()
        return answer


@asynccontextmanager
async def site(port: NodesPort, name: str, uid: str, engine: DeliveryEngine) -> AsyncIterator[Site]:
    certificate, config = await port.enrolled(name), Config()
    spool = RamSpool(Clock())
    queue = LinkedQueue(spool, config, encode_record, time.monotonic, Log())
    ingress = make_node(config=config, spool=spool, replicated=queue)
    config.accounts[ACCOUNT.name] = compile_account(replace(ACCOUNT, uid=uid, replicated=True))
    ingress.clock.seconds += (NOW_MS - ingress.clock.wall_ms()) / 1000
    made = Site(ingress, queue, QueueRelay(lambda: port.channel(certificate), Log()))
    queue.attach(engine, made.send)
    lease = asyncio.create_task(queue.keep_lease())
    async with running(ingress):
        await until(lambda: queue.epoch > 0)
        yield made
    lease.cancel()
    await made.relay.close()


@pytest.fixture
async def sites(migrated_database: Database, tmp_path: Path) -> AsyncIterator[tuple[Site, Site]]:
    await add_account(migrated_database)
    uid = str((await fetch(migrated_database, "SELECT uid FROM postroad.accounts"))[0]["uid"])
    async with contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(nodes_port(migrated_database, tmp_path / "pki"))
        bench = await stack.enter_async_context(delivery_bench())
        one = await stack.enter_async_context(site(port, "edge-1", uid, bench.engine))
        other = await stack.enter_async_context(site(port, "edge-2", uid, bench.engine))
        yield one, other


async def recorded(database: Database) -> list[bytes]:
    """Ids of all messages that are in the ledger, which are those of the queue."""
    rows = await fetch(database, "SELECT message_id FROM postroad.messages ORDER BY 1")
    assert rows == await fetch(database, "SELECT message_id FROM postroad.replicated_queue ORDER BY 1")
    return [str(row["message_id"]).encode() for row in rows]


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["small", "large"])
async def test_of_many_sessions_at_two_nodes_exactly_one_stores(
    sites: tuple[Site, Site], migrated_database: Database, body: bytes
) -> None:
    answers = await asyncio.gather(*(one.submit(KEY + body) for one in sites * 5))
    (stored,) = await recorded(migrated_database)
    assert set(answers) - {PENDING} == {STORED + stored + b"\r\n"}
    for one in sites:
        assert await one.submit(KEY + body) == STORED + stored + b"\r\n"
        assert await one.submit(KEY + body + b"more\r\n") == TAKEN
        assert one.ingress.counters.content_bytes == 0
    assert await recorded(migrated_database) == [stored]
    handed_on = [len(one.ingress.delivery.delivered) for one in sites]
    # What is large waits in PostgreSQL.
    assert sum(handed_on) == (1 if body == BODY else 0)
    checked = [counts(one.ingress) for one in sites]
    assert [found.get("unchecked", 0) for found in checked] == [0, 0]
    assert sum(found.get("stored", 0) for found in checked) == 1


async def test_a_message_whose_answer_was_lost_is_there_when_it_is_sent_again_to_another_node(
    sites: tuple[Site, Site], migrated_database: Database
) -> None:
    """Window W1 is closed for it: its submitter heard 451, PostgreSQL had it."""
    one, other = sites
    one.loses_stores = True
    assert (await one.submit(KEY + BODY)).startswith(FAILED)
    (stored,) = await recorded(migrated_database)
    one.loses_stores = False
    await until(lambda: one.queue.epoch > 0)
    for each in (other, one):
        assert await each.submit(KEY + BODY) == STORED + stored + b"\r\n"
    assert await recorded(migrated_database) == [stored]


async def test_without_a_key_every_message_is_another_one(
    sites: tuple[Site, Site], migrated_database: Database
) -> None:
    answers = await asyncio.gather(*(one.submit(BODY) for one in sites * 2))
    assert {STORED + found + b"\r\n" for found in await recorded(migrated_database)} == set(answers)
    assert len(set(answers)) == 4


async def test_what_is_held_until_its_time_is_stored_with_it_and_its_priority(
    sites: tuple[Site, Site], migrated_database: Database
) -> None:
    answer = await sites[0].submit(BODY, b" HOLDFOR=3600 MT-PRIORITY=-4")
    (row,) = await fetch(migrated_database, "SELECT * FROM postroad.replicated_queue")
    assert answer == STORED + str(row["message_id"]).encode() + b"\r\n"
    assert (row["priority"], row["epoch"]) == (-4, None)
    assert await queue_states(migrated_database, row["message_id"].bytes) == [(SCHEDULED, 0)]
    sent_ms = sites[0].ingress.clock.wall_ms() + 3_600_000
    assert row["due_time"].timestamp() * 1000 == pytest.approx(sent_ms, abs=1)
    assert sites[0].ingress.delivery.delivered == []


def counts(node: Node) -> dict[str, float]:
    rows = {name: value for metric, name, value in node.counters.samples() if metric == "smtp_submission_keys_total"}
    return {name[0]: value for name, value in rows.items() if isinstance(value, int)}


async def test_mail_of_an_account_that_was_made_anew_unheard_is_not_taken_for_the_new_ones(
    sites: tuple[Site, Site], migrated_database: Database
) -> None:
    await execute(migrated_database, "DELETE FROM postroad.accounts")
    await add_account(migrated_database)
    assert (await sites[0].submit(BODY)).startswith(FAILED)
    assert await recorded(migrated_database) == []
