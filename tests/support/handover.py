"""Hand-over without processes: real spools, their givers and takers, and the control plane's side on a real database.

What travels between them does so as messages of the contract; when it travels is the test's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from controlplane.adapters.grpc.node_ledger import _handover
from controlplane.adapters.postgres.books import PostgresBooks
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.handovers import PostgresHandovers
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.ports_fleet import Cursor, RawBatch, SpoolOpening
from controlplane.services.handovers import HandoverPart, Handovers, Take
from dataplane.adapters.handover_codec import decode_part, encode_given, encode_taken
from dataplane.adapters.ledger_codec import encode_record
from dataplane.adapters.spool_sqlite import SqliteSpool
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.handover import HandedOver
from dataplane.core.ids import MessageId
from dataplane.core.ledger import CommandResult, LedgerRecord
from dataplane.core.waiting import WaitingQuestion
from dataplane.handover import Giver, HandoverTools, Taker
from dataplane.link import LedgerTake, Message
from dataplane.ports import Settlement, StoredMessage
from support.databases import Database
from support.fleet import NOW, NOW_MS, execute
from support.spools import ManualClock, make_envelope, make_row, open_durable


class QuietDelivery:
    """A delivery that sends nothing; `woken` are the keys that it was told of."""

    def __init__(self) -> None:
        self.locked: set[MessageId] = set()
        self.woken: set[str] = set()

    def lock(self, message_id: MessageId) -> bool:
        self.locked.add(message_id)
        return False

    def unlock(self, message_ids: Iterable[MessageId], queue_keys: Iterable[str]) -> None:
        self.locked.difference_update(message_ids)
        self.woken.update(queue_keys)


class QuietLog:
    """A log that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def info(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))

    def warning(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))


@dataclass
class Plane:
    """The control plane's side."""

    database: Database
    fleet: FleetDatabase

    def __post_init__(self) -> None:
        self.ledger = PostgresLedger(self.fleet, retention=timedelta(days=30))
        self.store = PostgresHandovers(self.fleet)
        self.books = PostgresBooks(self.fleet)
        self.handovers = Handovers(self.store, lambda: NOW)


@dataclass
class Side:
    """A node with one spool: what it gives and takes, and what it reports."""

    plane: Plane
    node: str
    spool: SqliteSpool
    log: QuietLog = field(default_factory=QuietLog)
    engine: QuietDelivery = field(default_factory=QuietDelivery)
    stored: int = 0
    lose_answers: bool = False

    def __post_init__(self) -> None:
        spools = {self.name: self.spool}
        tools = HandoverTools({self.name: self.engine}, encode_given, encode_taken, decode_part, self.log)
        self.giver = Giver(spools, tools, asyncio.Lock(), lambda _: True)
        self.taker = Taker(spools, tools, self._send)
        self.receiver = self.plane.handovers.attend(self.node, self._invite, self._give)
        self.receiver.reports(self.name, taken=True)

    @property
    def name(self) -> str:
        return self.spool.identity.spool

    async def accept(self, *rows: RecipientRow, content: bytes = b"content", **changes: Any) -> Envelope:
        """A message that waits, and whose acceptance no record has told yet."""
        envelope = make_envelope(accepted_ms=NOW_MS)
        for name, value in changes.items():
            object.__setattr__(envelope, name, value)
        await self.spool.accept(envelope, content, list(rows) or [make_row()])
        return envelope

    async def report(self) -> None:
        """Bring what the spool has to tell to the ledger, and its answer back."""
        first, records = await self.spool.records(self.stored, 10_000, 1 << 30)
        if records:
            batch = RawBatch(self.name, self.spool.identity.incarnation, first, records)
            stored = await self.plane.ledger.store(self.node, batch, NOW)
            assert isinstance(stored.answer, Cursor)
            self.stored = stored.answer.cursor
            await self.spool.acknowledge(self.stored)

    @contextlib.asynccontextmanager
    async def reporting(self) -> AsyncIterator[None]:
        """Report over and over."""

        async def run() -> None:
            while True:
                await self.report()
                await asyncio.sleep(0)

        async with beside(run()):
            yield

    async def give_all(self) -> int:
        """Give up what waits, while it reports; how many messages went."""
        self.giver.tell(wanted=True)
        async with self.reporting(), asyncio.timeout(60):
            return await self.giver.give_all(self.name, self.spool)

    async def give_unreported(self) -> None:
        """Give up what waits, up to the commit: nobody takes records."""
        self.giver.tell(wanted=True)
        before = (await self.spool.stats()).outbox_last
        giving = asyncio.get_running_loop().create_task(self.giver.give_all(self.name, self.spool))
        async with asyncio.timeout(60):
            while (await self.spool.stats()).outbox_last == before:  # noqa: ASYNC110 - a spool tells nobody
                await asyncio.sleep(0)
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)

    async def take_all(self, *, report: bool = True) -> int:
        """Look for an invitation and take what there is; how many messages came."""
        before = self.taker.taken_count
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(beside(self.receiver.run()))
            if report:
                await stack.enter_async_context(self.reporting())
            await stack.enter_async_context(asyncio.timeout(60))
            await self.taker._take_all(self.name, self.spool, (await self.spool.stats()).outbox_last)
        return self.taker.taken_count - before

    async def take_all_but_report(self) -> None:
        """Take what there is into the spool, and say nothing of it."""
        taken = self.taker.taken_count
        async with beside(self.receiver.run()), asyncio.timeout(60):
            taking = self.taker._take_all(self.name, self.spool, self.stored)
            task = asyncio.get_running_loop().create_task(taking)
            while self.taker.taken_count == taken:  # noqa: ASYNC110 - it waits for what nobody will say
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def take_by_hand(self, stored: StoredMessage) -> None:
        """Put a message into the spool that it was not given, and say that it has it."""
        message = HandedOver(stored.envelope, stored.recipients, len(stored.content))
        record = encode_taken(message)
        await self.spool.take(stored.envelope, stored.content, stored.recipients, record)
        await self.report()

    async def report_acceptance(self) -> None:
        """Tell of all that no record has told of."""
        for message_id in await self.spool.unreported(1_000):
            stored = await self.spool.load(message_id)
            assert stored is not None
            addresses = tuple(row.address for row in stored.recipients)
            record = LedgerRecord(message_id, stored.envelope.account, stored.envelope, recipients_accepted=addresses)
            await self.spool.settle(Settlement(message_id, (), encode_record(record), reported=True))
        await self.report()

    async def answer_command(self, command: uuid.UUID, *, too_late: int) -> None:
        """Say what became of a command."""
        result = CommandResult(str(command), 0, too_late)
        record = LedgerRecord(MessageId(b""), "accounts/demo", command_result=result)
        await self.spool.write_record(encode_record(record))
        await self.report()

    async def report_without_pieces(self, first: int, records: list[bytes]) -> None:
        """Report, as if pieces of contents had been lost: empty records take their places."""
        nothing = encode_record(
            LedgerRecord(MessageId(b""), "accounts/demo", command_result=CommandResult(str(uuid.uuid4()), 0, 0))
        )
        kept = [record if record == records[-1] else nothing for record in records]
        await self.plane.ledger.store(self.node, RawBatch(self.name, 1, first, kept), NOW)

    async def rows(self, envelope: Envelope) -> tuple[RecipientRow, ...] | None:
        stored = await self.spool.load(envelope.message_id)
        return None if stored is None else stored.recipients

    async def book(self) -> tuple[bool, bool]:
        """Whether the account's book balances, and whether both sides have the same mail, up to the ledger's record."""
        books = (await self.plane.books.read_books([self.name]))[self.name]
        statement = await self.spool.waiting(WaitingQuestion(self.name, 1, books.as_of_record))
        assert not statement.error, statement.error
        spool = {account.removeprefix("accounts/"): tally for account, _, tally in statement.totals}
        ledger = {account: side.waiting for account, side in books.accounts.items() if side.waiting.count}
        return all(side.balances for side in books.accounts.values()), spool == ledger

    async def _invite(self, spool: str) -> None:
        self.taker.invited(spool)

    async def _give(self, part: HandoverPart) -> None:
        if not self.lose_answers:
            self.taker.arrived(_handover(part).handover.SerializeToString())
        elif part.last:
            # As if the stream had ended: who asked gives up.
            part = HandoverPart(part.take, last=True)
            self.taker.arrived(_handover(part).handover.SerializeToString())

    def _send(self, message: Message) -> bool:
        assert isinstance(message, LedgerTake)
        self.receiver.asked(Take(*message))
        return True


@contextlib.asynccontextmanager
async def beside(work: Any) -> AsyncIterator[None]:
    """Run something meanwhile; what it raises comes out."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


@contextlib.asynccontextmanager
async def side(plane: Plane, node: str, folder: Path) -> AsyncIterator[Side]:
    """A node's worker from its start to its end, which is as sudden as a kill for all that is not in the spool."""
    spool = await open_durable(folder, ManualClock(), node=node)
    try:
        made = Side(plane, node, spool)
        stats = await spool.stats()
        opening = SpoolOpening(
            made.name, spool.identity.incarnation, stats.acknowledged, stats.outbox_first, stats.outbox_last
        )
        answer = await plane.ledger.open_spool(node, opening, NOW)
        assert isinstance(answer, Cursor)
        made.stored = answer.cursor
        yield made
        plane.handovers.leave(made.receiver)
    finally:
        await spool.close()


async def drain(database: Database, node: str) -> None:
    """As DrainNode leaves it."""
    await execute(
        database,
        """
        WITH made AS (INSERT INTO postroad.node_drains (node) VALUES ($1) RETURNING drain)
        UPDATE postroad.nodes SET drain = made.drain FROM made WHERE node = $1
        """,
        node,
    )
