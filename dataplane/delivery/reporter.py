"""Tells the ledger of accepted messages, in the record of their first outcome where that comes within 300 ms.

`watch` takes a message whose envelope is in no record yet. When its time is over and no settlement has carried the
envelope by then (`Message.reported`), it is recorded alone. A message that was committed as `queued` is watched without
its content and may be read back by the scheduler meanwhile: `take` gives the watch up to it, `is_reported` tells of a
record that is on its way. What a crash leaves unrecorded is found by `recovery`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from dataplane.core.ids import MessageId
from dataplane.delivery.attempt import Message
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.outcome import Concluder
from dataplane.delivery.settler import Settler
from dataplane.ports import Clock

REST_S = 0.3

_Watched = tuple[float, Message]


class Reporter:
    """State: messages watched, oldest first, and ids whose record is on its way."""

    def __init__(self, settler: Settler, concluder: Concluder, clock: Clock, counters: DeliveryCounters) -> None:
        self._settler = settler
        self._concluder = concluder
        self._clock = clock
        self._counters = counters
        self._watched: OrderedDict[MessageId, _Watched] = OrderedDict()
        self._writing: set[MessageId] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, message: Message) -> None:
        """Record the message's acceptance unless that happens by itself within REST_S.

        Who holds it and watches it already goes on to: a message may be read back before who accepted it comes here.
        """
        message_id = message.envelope.message_id
        if message.reported or message_id in self._watched or message_id in self._writing:
            return
        self._watched[message_id] = (self._clock.monotonic() + REST_S, message)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(REST_S, self._fire)

    def take(self, message_id: MessageId) -> None:
        """Somebody else holds the message now and watches it anew."""
        self._watched.pop(message_id, None)

    def is_reported(self, message_id: MessageId) -> bool:
        """Whether a record of its acceptance is on its way to the spool."""
        return message_id in self._writing

    def look(self, *, everything: bool = False) -> None:
        """Record those whose time is over, or everything."""
        now_s = self._clock.monotonic()
        while self._watched:
            message_id, (due_s, message) = next(iter(self._watched.items()))
            if due_s > now_s and not everything:
                break
            del self._watched[message_id]
            if not message.reported:
                self._counters.records_alone += 1
                self.record(message)

    def record(self, message: Message) -> None:
        """Record the message's acceptance now."""
        message_id = message.envelope.message_id
        self._writing.add(message_id)
        self._settler.settle(self._concluder.report(message), self._written(message_id))

    def hurry(self, message_id: MessageId) -> bool:
        """Record the message's acceptance now if it is watched; say whether its record is on its way or written."""
        watched = self._watched.pop(message_id, None)
        if watched is not None and not watched[1].reported:
            self._counters.records_alone += 1
            self.record(watched[1])
        return watched is not None or message_id in self._writing

    def close(self) -> None:
        """Record everything and stop."""
        self.look(everything=True)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _written(self, message_id: MessageId) -> Callable[[int], None]:
        return lambda _: self._writing.discard(message_id)

    def _fire(self) -> None:
        self._timer = None
        self.look()
        if self._watched:
            due_s = next(iter(self._watched.values()))[0]
            delay_s = max(0.01, due_s - self._clock.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._fire)
