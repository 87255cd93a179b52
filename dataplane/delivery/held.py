"""Ends mail that a command holds when its lifetime is over: no attempt of it ever fails, which is when other mail ends.

`look` walks the spool's recipients in slices and settles those that are held and outlived, each message in one
transaction; who was released or ended meanwhile is left alone. `run` looks once an hour until it is cancelled. A spool
that cannot be read or written is looked at again the next time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from dataplane.core.commands import attempts_of
from dataplane.core.config import RetryPolicy
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.ids import MessageId, first_message_id
from dataplane.core.ledger import AttemptEvent, LedgerRecord, RecipientUpdate
from dataplane.core.queue import EventType, State, check_move
from dataplane.core.retry import is_expired
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.outcome import Moment
from dataplane.ports import EventLog, RecipientChange, RecordEncoder, Settlement, Spool, SpoolError, StoredMessage

LOOK_S = 3_600.0
SLICE_ROWS = 256
_BEFORE_ALL = (MessageId(b""), 0)


class HeldMail(NamedTuple):
    """What looking works with. `policy` is an account's retry policy of this moment."""

    spool: Spool
    encode: RecordEncoder
    moment: Callable[[], Moment]
    policy: Callable[[Envelope], RetryPolicy]
    counters: DeliveryCounters
    log: EventLog

    async def run(self) -> None:
        """Look once an hour."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except SpoolError as error:
                self.log.warning("delivery.spool_read_failed", error=type(error).__name__)

    async def look(self) -> None:
        """End what is over. SpoolError leaves the rest to the next look."""
        position = _BEFORE_ALL
        before = first_message_id(self.moment().wall_ms)
        done = MessageId(b"")
        while rows := await self.spool.walk(position, before, SLICE_ROWS):
            position = (rows[-1].message_id, rows[-1].index)
            for row in rows:
                if row.state is State.HELD and row.message_id != done:
                    done = row.message_id
                    await self._end_if_over(done)
                    # Reading one takes some 30 µs and never waits; the sessions must have their turn.
                    await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def _end_if_over(self, message_id: MessageId) -> None:
        stored = await self.spool.describe(message_id)
        if stored is None:
            return
        moment = self.moment()
        policy = self.policy(stored.envelope)
        if not is_expired(policy, stored.envelope.released_ms, moment.wall_ms, moment.steady_ms):
            return
        held = [row for row in stored.recipients if row.state is State.HELD]
        if not held:
            return
        self.counters.expired += await self.spool.settle(self._settlement(stored, held, moment.wall_ms))

    def _settlement(self, stored: StoredMessage, held: list[RecipientRow], now_ms: int) -> Settlement:
        envelope = stored.envelope
        for row in held:
            check_move(row.state, State.EXPIRED)
        record = LedgerRecord(
            envelope.message_id,
            envelope.account,
            None if stored.reported else envelope,
            () if stored.reported else tuple(row.address for row in stored.recipients),
            tuple(RecipientUpdate(row.index, State.EXPIRED, attempts_of(row), 0, now_ms) for row in held),
            (
                AttemptEvent(
                    tuple(row.index for row in held),
                    EventType.EXPIRED,
                    now_ms,
                    0,
                    enhanced_code="4.4.7",
                    reply_text="held until its lifetime was over",
                ),
            ),
        )
        changes = [
            RecipientChange(row.index, row.attempt, State.EXPIRED, row.attempt, 0, row.queue_key) for row in held
        ]
        return Settlement(envelope.message_id, changes, self.encode(record), reported=True, whole=True)
