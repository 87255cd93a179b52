"""Acceptance, a durable spool and delivery in this process, between two fault proxies: thousands of cuts in seconds.

The clock of retries is the test's, so that nothing waits. What it reports is read back from the spool: only what was
committed counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

from dataplane.adapters.resolver import CheckingResolver
from dataplane.adapters.spool_sqlite import SqliteSpool
from dataplane.core.config import Endpoint, RetryPolicy, SmtpProvider, TlsPolicy
from dataplane.core.envelope import make_queue_key
from dataplane.core.ids import format_message_id
from dataplane.core.ledger import LedgerRecord
from dataplane.core.queue import TERMINAL, EventType
from dataplane.delivery.engine import DeliveryEngine, Surroundings
from dataplane.ingress.listeners import Mode
from support.chaos.application import Message
from support.chaos.books import Books
from support.chaos.judge import Case, Told
from support.chaos.sink import Sink, end_of
from support.chaos.talk import WAIT_S, hold_talk
from support.fault_proxy import Fault, FaultProxy, Kind
from support.ingress import ACCOUNT, Node, make_node, running
from support.spools import ManualClock, open_durable

_PROVIDER = "providers/inbox"
_KEY = make_queue_key(ACCOUNT.name, _PROVIDER)


@dataclass
class SmallNode:
    """See the module. `submission` and `next_hop` are the proxies."""

    node: Node
    engine: DeliveryEngine
    spool: SqliteSpool
    clock: ManualClock
    books: Books
    sink: Sink
    submission: FaultProxy
    next_hop: FaultProxy
    records: list[LedgerRecord]

    async def submit(self, message: Message, number: int, fault: Fault | None = None) -> int:
        """One try by the proxy under that fault; the code of the reply, 0 without one."""
        proxy = self.submission
        proxy.plan = lambda: fault
        before = proxy.passed[0]
        talk = await hold_talk(proxy.port, message, number)
        # What the client wrote may have ended in the proxy: only what passed it has left.
        if talk.dot_at:
            async with asyncio.timeout(WAIT_S):
                await proxy.ended()
        dot_left = talk.dot_at > 0 and proxy.passed[0] - before >= talk.dot_at
        half_closed = fault is not None and fault.kind is Kind.HALF_CLOSE and fault.upstream
        self.books.note_try(replace(talk.entry(), dot_left=dot_left, half_closed=half_closed))
        return talk.code

    async def deliver_all(self) -> None:
        """Let retries come due until nothing waits any more, or for a while: what then waits is for the judge."""
        with contextlib.suppress(TimeoutError):
            await self._deliver_all()

    async def _deliver_all(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while (await self.spool.stats()).waiting_count:
                self.clock.advance(1)
                self.engine.wake(_KEY)
                await asyncio.sleep(0.002)

    async def case(self) -> Case:
        """What the judge is given."""
        tries, copies, strikes, confirmed = self.books.snapshot()
        left = ["recipients wait"] if (await self.spool.stats()).waiting_count else []
        return Case(tries, copies, strikes, frozenset(confirmed), await self._ledger(), left, end_of)

    async def _ledger(self) -> dict[str, list[Told]]:
        found: dict[str, list[Told]] = {}
        after = 0
        while True:
            first, numbers = await self.spool.records(after, 1_000, 1 << 24)
            if not numbers:
                return found
            for number in numbers:
                _enter(self.records[int(number)], found)
            after = first + len(numbers) - 1


def _enter(record: LedgerRecord, found: dict[str, list[Told]]) -> None:
    message_id = format_message_id(record.message_id)
    if record.accepted is not None:
        token = record.accepted.header_message_id.strip("<>").partition("@")[0]
        found[message_id] = [Told(token, address, 2) for address in record.recipients_accepted]
    for event in record.events:
        for index in event.indexes:
            found[message_id][index].uncertain_count += event.type is EventType.UNCERTAIN
    for update in record.updates:
        told = found[message_id][update.index]
        told.state = int(update.state)
        if update.state in TERMINAL:
            told.ends.append(int(update.state))


@contextlib.asynccontextmanager
async def small_node(folder: Path, messages_per_connection: int = 1) -> AsyncIterator[SmallNode]:
    """Everything up: sink, proxies, spool, delivery, acceptance."""
    books = Books(folder / "books")
    sink = await Sink(books).start()
    next_hop = await FaultProxy(sink.port).start()
    manual = ManualClock()
    spool = await open_durable(folder / str(uuid.uuid4()), manual)
    node = make_node(spool=spool)
    node.config.set_account(replace(ACCOUNT, retry_policy=RetryPolicy(1.0, 1.0, 1.0)))
    node.config.providers[_PROVIDER] = SmtpProvider(
        _PROVIDER,
        "",
        (Endpoint("127.0.0.1", next_hop.port, implicit_tls=False),),
        tls_policy=TlsPolicy.NONE,
        max_messages_per_connection=messages_per_connection,
    )
    records: list[LedgerRecord] = []

    def encode(record: LedgerRecord) -> bytes:
        records.append(record)
        return b"%d" % (len(records) - 1)

    resolver = CheckingResolver(manual, ["127.0.0.0/8"])
    engine = DeliveryEngine(
        Surroundings(spool, node.config, resolver, encode, manual, lambda: 0.5, node.log, "relay.test")
    )
    await engine.start()
    # The ingress of the tests comes with a delivery that only takes notes, and a clock of its own.
    service = node.ingress.service
    service.submission = replace(service.submission, handover=engine, clock=manual)
    async with running(node):
        submission = await FaultProxy(node.ports[Mode.PLAIN]).start()
        try:
            yield SmallNode(node, engine, spool, manual, books, sink, submission, next_hop, records)
        finally:
            await submission.stop()
            await engine.stop(0.0)
            await next_hop.stop()
            await sink.stop()
    await spool.close()
