"""What a start finds of a process that ended: attempts that nobody watched to their end, and acceptances not told.

`recover_interrupted` puts recipients left `sending` back into the queue with an event UNCERTAIN: the dot may have left.
A first attempt is due again at once; later ones wait as after a failure, so that a message that ends the process does
not do so in a circle. `report_unreported` records messages whose envelope is in no record yet. Both go on where they
failed at the next start; a message that cannot be read is quarantined by the spool and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dataplane.core.config import RetryPolicy
from dataplane.core.envelope import Envelope
from dataplane.core.ids import MessageId, format_message_id
from dataplane.core.queue import State
from dataplane.core.retry import next_attempt_ms
from dataplane.delivery.attempt import Message
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.outcome import Concluder, Moment
from dataplane.delivery.settler import Settler
from dataplane.ports import EventLog, Spool, SpoolError, SpoolFailedError, StoredMessage

BATCH = 500


class Recovery(NamedTuple):
    """What recovery works with."""

    spool: Spool
    settler: Settler
    concluder: Concluder
    counters: DeliveryCounters
    log: EventLog
    moment: Callable[[], Moment]
    random: Callable[[], float]
    policy: Callable[[Envelope], RetryPolicy]

    async def recover_interrupted(self) -> None:
        """Put back what a former process was sending. Cancellation leaves the rest for the next start."""
        for place, message_id in enumerate(await self.spool.interrupted()):
            stored = await self._load(message_id)
            rows = [row for row in (stored.recipients if stored else ()) if row.state is State.SENDING]
            if stored is None or not rows:
                continue
            moment = self.moment()
            due_ms = moment.steady_ms
            attempt = max(row.attempt for row in rows)
            if attempt > 1:
                due_ms = next_attempt_ms(self.policy(stored.envelope), attempt, moment.steady_ms, self.random())
            conclusion = self.concluder.recover(_message(stored), rows, due_ms, moment)
            self.settler.settle(conclusion.settlement)
            self.counters.recovered += len(rows)
            self.counters.uncertain += len(rows)
            self.log.warning(
                "delivery.uncertain",
                message=format_message_id(message_id),
                recipients=[row.index for row in rows],
                attempt=attempt,
                account=stored.envelope.account,
                session=stored.envelope.session,
            )
            if place % BATCH == BATCH - 1:
                await self.settler.drained()
        await self.settler.drained()

    async def report_unreported(self) -> None:
        """Record acceptances that no record has told yet."""
        unreadable = 0
        while True:
            found = (await self.spool.unreported(BATCH + unreadable))[unreadable:]
            if not found:
                return
            for message_id in found:
                stored = await self._load(message_id)
                if stored is None:
                    unreadable += 1
                    continue
                self.settler.settle(self.concluder.report(_message(stored)))
            await self.settler.drained()

    async def _load(self, message_id: MessageId) -> StoredMessage | None:
        try:
            return await self.spool.load(message_id)
        except SpoolFailedError:
            raise
        except SpoolError:
            self.counters.quarantined += 1
            self.log.warning("delivery.quarantined", message=format_message_id(message_id))
            return None


def _message(stored: StoredMessage) -> Message:
    # PostgreSQL recorded REPLICATED mail when it stored it.
    reported = stored.reported or stored.envelope.epoch > 0
    addresses = () if reported else tuple(row.address for row in stored.recipients)
    return Message(stored.envelope, b"", addresses, reported)
