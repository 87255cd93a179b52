"""A node dies with 10,000 REPLICATED messages: the other one delivers them all by itself, each once.

What counts as arrived is kept by a next hop in this process, outside Postroad. It is shut while the first node accepts,
so that its lease holds what it took, and while the second one comes. Then either nothing is let through before the
first node is killed, and each message arrives once, without exception; or it is killed in the midst of sending, and
then only messages of which the ledger says that an attempt was uncertain may arrive again, once for each such attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from postroad.control.v1.account_pb2 import Account
from postroad.control.v1.account_service_pb2 import GetAccountRequest, UpdateAccountRequest
from postroad.control.v1.book_pb2 import Book
from postroad.control.v1.book_service_pb2 import ListBookFindingsRequest, ListBooksRequest
from postroad.control.v1.message_pb2 import DELIVERY_EVENT_TYPE_UNCERTAIN
from postroad.control.v1.message_service_pb2 import GetMessageRequest, ListMessagesRequest
from support.databases import Database
from support.fleet import fetch
from support.node_process import NodeProcess, log_events, running, wait_gone
from support.nodes import Fleet, serving_fleet, submit
from support.nodes_port import until

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

WAITING = 10_000
_ACCOUNT = "accounts/acme"
_SESSIONS = 8
_HELD = """
SELECT count(*) FROM postroad.replicated_queue AS q JOIN postroad.node_leases AS l ON l.epoch = q.epoch
WHERE l.node = $1
"""


@pytest.fixture
async def fleet(migrated_database: Database, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with serving_fleet(migrated_database, tmp_path, audit={"interval_s": 1}) as made:
        account = await made.client.accounts.GetAccount(GetAccountRequest(name=_ACCOUNT))
        account.durability = Account.DURABILITY_REPLICATED
        await made.client.accounts.UpdateAccount(UpdateAccountRequest(account=account))
        yield made


@contextlib.asynccontextmanager
async def node_with_lease(fleet: Fleet, settings: Path, name: str) -> AsyncIterator[NodeProcess]:
    begun = len(log_events(settings, "queue.lease_begun")) if (settings.parent / "node.log").exists() else 0
    async with running(settings) as node:
        await fleet.in_use(name)

        async def has_lease() -> bool:
            return len(log_events(settings, "queue.lease_begun")) > begun

        await until(has_lease, 60)
        yield node


async def kill_all(node: NodeProcess) -> None:
    """SIGKILL for the supervisor and all that it started, as when their machine dies."""
    pids = [node.process.pid, *node.ready["processes"].values()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that none sees another one die
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    await node.process.wait()
    for pid in pids[1:]:
        await wait_gone(pid)


async def uncertain_attempts(fleet: Fleet, subjects: set[str]) -> dict[str, int]:
    """How many attempts of each of these messages the API calls uncertain."""
    found: dict[str, int] = {}
    request = ListMessagesRequest(parent=_ACCOUNT, page_size=1_000)
    while True:
        page = await fleet.client.messages.ListMessages(request)
        for listed in page.messages:
            if listed.subject in subjects:
                message = await fleet.client.messages.GetMessage(GetMessageRequest(name=listed.name))
                found[listed.subject] = [event.type for event in message.events].count(DELIVERY_EVENT_TYPE_UNCERTAIN)
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def books(fleet: Fleet) -> list[Book]:
    return list((await fleet.client.books.ListBooks(ListBooksRequest(parent=_ACCOUNT))).books)


async def settled_books(fleet: Fleet) -> None:
    """Wait until the books say that all was accepted and sent; nothing may be wrong with them."""

    async def are_settled() -> bool:
        found = await books(fleet)
        return sum(book.sent_count for book in found) == WAITING and all(
            book.balances and book.agrees and not book.waiting_count and not book.spool_waiting_count for book in found
        )

    await until(are_settled, 60)
    assert sum(book.accepted_count for book in await books(fleet)) == WAITING
    findings = await fleet.client.books.ListBookFindings(ListBookFindingsRequest(parent=_ACCOUNT))
    assert not findings.book_findings


@pytest.mark.parametrize("delivered", [0, 1_000], ids=["before-any-is-sent", "in-the-midst"])
async def test_replicated_mail_of_a_killed_node_is_delivered_by_the_other_one_by_itself(
    fleet: Fleet, delivered: int, capsys: pytest.CaptureFixture[str]
) -> None:
    subjects = [f"waiting {number}" for number in range(WAITING)]
    first, second = await fleet.node("mx1"), await fleet.node("mx2")
    fleet.sink.gate.clear()
    async with node_with_lease(fleet, first, "mx1") as lost:
        begun_s = time.monotonic()
        await asyncio.gather(*(submit(lost, subjects[part::_SESSIONS]) for part in range(_SESSIONS)))
        accepted_s = time.monotonic()
        ((held,),) = await fetch(fleet.database, _HELD, "mx1")
        async with node_with_lease(fleet, second, "mx2") as other:
            assert fleet.nothing_came()
            if delivered:
                fleet.sink.gate.set()
                await fleet.arrive(delivered)
            await kill_all(lost)
            killed_s = time.monotonic()
            fleet.sink.gate.set()
            before = fleet.arrived.total() + fleet.sink.received.qsize()

            async def are_sent() -> bool:
                return await fleet.sent() == WAITING

            await until(are_sent, 600)
            sent_s = time.monotonic()
            await settled_books(fleet)
            async with node_with_lease(fleet, first, "mx1") as back:
                # It has the mail on its disk still, and knows that others have sent it.
                assert [await each.stop() for each in (back, other)] == [0, 0]
    await fleet.arrive(fleet.sink.received.qsize() + fleet.arrived.total())
    assert fleet.arrived.keys() == set(subjects)
    doubled = {subject: copies for subject, copies in fleet.arrived.items() if copies > 1}
    uncertain = await uncertain_attempts(fleet, set(doubled))
    assert all(copies <= 1 + uncertain[subject] for subject, copies in doubled.items()), (doubled, uncertain)
    assert delivered or not doubled
    with capsys.disabled():
        print(  # noqa: T201 - how long it took is what a nightly run is to say
            f"\n{WAITING:,} accepted in {accepted_s - begun_s:.0f} s, {held:,} of them held by the node; {before:,} had"
            f" arrived when it was killed; the other one had sent the rest {sent_s - killed_s:.0f} s later,"
            f" {len(doubled)} of them again"
        )
