"""Mail in a durable spool that moves at random as delivery would move it, and is told of as delivery would tell."""

from __future__ import annotations

import random
from dataclasses import replace

import apsw

from dataplane.adapters.ledger_codec import encode_record
from dataplane.adapters.spool_sqlite import SqliteSpool
from dataplane.core.ids import MessageId, new_message_id
from dataplane.core.ledger import LedgerRecord, RecipientUpdate
from dataplane.core.queue import TERMINAL, State
from dataplane.ports import RecipientChange, Settlement
from support.spools import KEY, NOW_MS, make_envelope, make_row

ACCOUNT = "accounts/demo"


class Mail:
    """Mail in a spool, moved at random as delivery would."""

    def __init__(self, spool: SqliteSpool, choice: random.Random, now_ms: int = NOW_MS) -> None:
        self.spool = spool
        self.now_ms = now_ms
        self.choice = choice
        self.rows: dict[tuple[MessageId, int], int] = {}
        self.sizes: dict[MessageId, int] = {}
        self.told: set[MessageId] = set()

    async def hold(self, message_id: MessageId, epoch: int, count: int = 1) -> None:
        """Take a REPLICATED message under a lease, as a claim does."""
        envelope = replace(make_envelope(message_id, accepted_ms=self.now_ms), epoch=epoch)
        rows = [make_row(index, due_ms=self.now_ms)._replace(state=State.SENDING, attempt=1) for index in range(count)]
        await self.spool.accept(envelope, b"content", rows)

    async def give_back(self, message_id: MessageId, epoch: int, state: State) -> None:
        """Tell how the attempt of its first recipient ended; the spool forgets that one."""
        kept = state if state in TERMINAL else State.CANCELLED
        record = LedgerRecord(message_id, ACCOUNT, updates=(RecipientUpdate(0, state, 1, 0, self.now_ms),), epoch=epoch)
        change = RecipientChange(0, 1, kept, 1, 0, KEY)
        assert await self.spool.settle(Settlement(message_id, [change], encode_record(record), reported=True)) == 1

    async def accept(self, count: int = 0) -> MessageId:
        message_id = new_message_id(self.now_ms, self.choice.randbytes(10))
        count = count or self.choice.choice([1, 1, 2, 5])
        rows = [make_row(index, due_ms=self.now_ms) for index in range(count)]
        await self.spool.accept(make_envelope(message_id, accepted_ms=self.now_ms), b"content", rows)
        self.rows |= {(message_id, index): row.attempt for index, row in enumerate(rows)}
        self.sizes[message_id] = count
        return message_id

    async def settle(self, message_id: MessageId, states: dict[int, State]) -> None:
        """Change recipients and tell of it; without any only tell of the acceptance."""
        changes, updates = [], []
        for index, state in states.items():
            attempt = self.rows[message_id, index]
            changes.append(RecipientChange(index, attempt, state, attempt + 1, self.now_ms, KEY))
            updates.append(RecipientUpdate(index, state, attempt + 1, 0, self.now_ms))
            self.rows[message_id, index] += 1
            if state in TERMINAL:
                del self.rows[message_id, index]
        new = message_id not in self.told
        record = LedgerRecord(
            message_id,
            ACCOUNT,
            accepted=make_envelope(message_id, accepted_ms=self.now_ms) if new else None,
            recipients_accepted=tuple(f"{n}@example.net" for n in range(self.sizes[message_id])) if new else (),
            updates=tuple(updates),
        )
        self.told.add(message_id)
        assert await self.spool.settle(Settlement(message_id, changes, encode_record(record), reported=True)) == len(
            changes
        )

    async def step(self) -> None:
        """Something happens."""
        if not self.rows or self.choice.random() < 0.4:
            await self.accept()
            return
        message_id, _ = self.choice.choice(list(self.rows))
        indexes = [index for one, index in self.rows if one == message_id]
        picked = self.choice.sample(indexes, self.choice.randint(0 if message_id not in self.told else 1, len(indexes)))
        ways = [State.SENT, State.BOUNCED, State.DEFERRED, State.SENDING, State.HELD]
        await self.settle(message_id, {index: self.choice.choice(ways) for index in picked})


def harm(spool: SqliteSpool, sql: str, *arguments: apsw.SQLiteValue) -> None:
    """Do something to the file of a spool that nobody should.

    With the library that has the file open: another one, in the same process, would not see its locks, and delete the
    write-ahead log when it closes.
    """
    connection = apsw.Connection(str(spool._folder / "spool.db"))
    try:
        connection.execute(sql, arguments)
    finally:
        connection.close()
