"""Messages of the replicated queue on a test's database, and who holds them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.queue import PostgresQueue
from controlplane.ports_fleet import RawBatch, SpoolOpening
from controlplane.ports_queue import Claimed, ClaimWish, QueuedMessage, Repeated
from postroad.node.v1.ledger_pb2 import LedgerRecord
from support.databases import Database
from support.fleet import NOW, NOW_MS, accepted, execute, fetch, message_id, text_id


@dataclass
class Holder:
    """A spool of a node, with a lease."""

    queue: PostgresQueue
    ledger: PostgresLedger
    node: str = "edge-1"
    pool: str = "default"
    spool: str = ""
    epoch: int = 0
    last_record: int = 0

    async def begin(self) -> Holder:
        """A new spool and its first lease."""
        self.spool = self.spool or str(uuid.uuid4())
        await self.ledger.open_spool(self.node, SpoolOpening(self.spool, 1, 0, 1, 0), NOW)
        self.epoch = (await self.queue.renew(self.node, self.spool, 0)).epoch
        return self

    async def store(
        self,
        *recipients: str,
        account: str = "demo",
        sending: bool = True,
        content: bytes = b"hello\r\n",
        priority: int = 0,
        hold_s: float = 0,
    ) -> bytes:
        """Store a message; its id. `hold_s` seconds from NOW is its time."""
        raw_id = message_id()
        wished = {"priority": priority, "send_time_ms": NOW_MS + int(hold_s * 1000) if hold_s else 0}
        await self.store_all([queued(raw_id, *recipients, account=account, sending=sending, content=content, **wished)])
        return raw_id

    async def store_all(self, messages: Sequence[QueuedMessage]) -> list[Repeated]:
        return await self.queue.store(self.node, self.pool, self.spool, self.epoch, messages, NOW)

    async def claim(
        self,
        count: int = 100,
        *,
        after_s: float = 0,
        now: datetime | None = None,
        adopt: bool = True,
        left_out: tuple[str, ...] = (),
        max_bytes: int = 1_000_000,
    ) -> tuple[str, list[Claimed]]:
        """Claim so many; `after_s` seconds later by the database's clock."""
        claim_id = str(uuid.uuid4())
        moment = now or (NOW + timedelta(seconds=after_s) if after_s else None)
        wish = ClaimWish(self.spool, self.epoch, claim_id, count, max_bytes, left_out)
        return claim_id, await self.queue.claim(self.node, self.pool, wish, moment, adopt=adopt)

    async def take(self, lot: int, count: int) -> list[Claimed]:
        """Claim so many with a claim's id of one's own choice, which decides what account comes first."""
        wish = ClaimWish(self.spool, self.epoch, str(uuid.UUID(int=lot)), count, 1_000_000)
        return await self.queue.claim(self.node, self.pool, wish, None, adopt=False)

    async def confirm(self, claim_id: str, claimed: Sequence[Claimed]) -> list[bytes]:
        return await self.queue.confirm(
            self.node, self.spool, self.epoch, claim_id, [one.message_id for one in claimed]
        )

    async def report(self, *records: LedgerRecord, epoch: int | None = None, rejected: int = 0) -> None:
        """Report by the ledger, as under this holder's lease; so many records are set aside."""
        for record in records:
            record.epoch = self.epoch if epoch is None else epoch
        raw = [record.SerializeToString() for record in records]
        stored = await self.ledger.store(self.node, RawBatch(self.spool, 1, self.last_record + 1, raw), NOW)
        assert stored.rejected_count == rejected
        self.last_record += len(records)


def queued(
    raw_id: bytes,
    *recipients: str,
    account: str = "demo",
    sending: bool = True,
    content: bytes | None = b"hello\r\n",
    chunks: int = 0,
    **more: Any,
) -> QueuedMessage:
    """A message; `more` is of its acceptance."""
    record = accepted(raw_id, *recipients, account=f"accounts/{account}", **more).SerializeToString()
    return QueuedMessage(record, b"envelope of " + raw_id.hex().encode(), content, chunks, sending)


async def add_account(database: Database, account: str = "demo", pool: str = "default", uncertain: int = 1) -> None:
    await execute(database, "INSERT INTO postroad.node_pools (node_pool) VALUES ($1) ON CONFLICT DO NOTHING", pool)
    await execute(
        database,
        "INSERT INTO postroad.accounts (account, node_pool, durability, uncertain_policy) VALUES ($1, $2, 2, $3)",
        *(account, pool, uncertain),
    )


async def end_lease(database: Database, epoch: int, ago_s: float = 1) -> None:
    """The lease ends now, or ended so long ago."""
    await execute(
        database,
        "UPDATE postroad.node_leases SET lease_until = now() - $2 * interval '1 s' WHERE epoch = $1",
        *(epoch, ago_s),
    )


async def queue_row(database: Database, raw_id: bytes) -> Any:
    rows = await fetch(database, "SELECT * FROM postroad.replicated_queue WHERE message_id = $1", text_id(raw_id))
    return rows[0] if rows else None


async def queue_states(database: Database, raw_id: bytes) -> list[tuple[int, int]]:
    """State and attempt of each recipient that has not ended."""
    rows = await fetch(
        database,
        "SELECT state, attempt FROM postroad.queue_recipients WHERE message_id = $1 ORDER BY recipient_index",
        text_id(raw_id),
    )
    return [tuple(row) for row in rows]


async def ledger_states(database: Database, raw_id: bytes) -> list[int]:
    rows = await fetch(
        database,
        "SELECT state FROM postroad.recipients WHERE message_id = $1 ORDER BY recipient_index",
        text_id(raw_id),
    )
    return [row["state"] for row in rows]


async def event_types(database: Database, raw_id: bytes) -> list[int]:
    rows = await fetch(
        database, "SELECT type FROM postroad.delivery_events WHERE message_id = $1 ORDER BY position", text_id(raw_id)
    )
    return [row["type"] for row in rows]
