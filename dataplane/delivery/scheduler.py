"""Brings back from the spool what is due, key by key in turn, as fast as its destinations take it.

One loop, no memory of rows: of a key it reads the first READ_COUNT heads, claims what may go (`sending`, attempt one
higher, committed before anything is sent) and reads again when its turn comes. A key is in one place at a time:

    active   has or may have due rows, and waits for its turn
    timed    its first row is due later, or it was put off
    full     due, and its destination takes no more now; `kick` makes it active
    parked   due, and nothing can go before configuration, denials or a destination change; `release` frees it

A wake-up that got lost is found by reading all keys again every minute. Failures of the spool put a key off by a
second.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from dataplane.core.envelope import RecipientRow, split_queue_key
from dataplane.core.ids import MessageId, format_message_id
from dataplane.core.queue import State
from dataplane.core.retry import rebase_due
from dataplane.delivery.counters import DeliveryCounters
from dataplane.ports import Due, EventLog, RecipientChange, Settlement, Spool, SpoolError, StoredMessage

READ_COUNT = 64
POLL_S = 60.0
PUT_OFF_MS = 1_000
STOP_S = 5.0
# No retry is further away than this unless a clock was ahead when it was written.
LONGEST_DELAY_S = 86_400.0


class Taken(NamedTuple):
    """What became of a message that was offered. `park_ms` above 0 parks its key until then (steady clock)."""

    claims: list[asyncio.Future[None]]
    park_ms: int = 0


class Work(Protocol):
    """What the scheduler feeds."""

    def room(self, queue_key: str) -> int:
        """How many messages of this key may be claimed now."""
        ...

    def window_open(self) -> bool:
        """Whether more content may be read into memory."""
        ...

    def take(self, stored: StoredMessage, rows: Sequence[RecipientRow]) -> Taken:
        """Claim and start what may go of these waiting recipients."""
        ...


class Scheduler:
    """State: where each key stands. `now_ms` is the steady clock."""

    def __init__(
        self, spool: Spool, work: Work, now_ms: Callable[[], int], counters: DeliveryCounters, log: EventLog
    ) -> None:
        self._spool = spool
        self._work = work
        self._now_ms = now_ms
        self._counters = counters
        self._log = log
        self._active: dict[str, None] = {}
        self._full: dict[str, bool] = {}
        self._full_by_hop: dict[str, dict[str, bool]] = {}  # the same, oldest first
        self._timed: dict[str, int] = {}
        self._parked: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []  # of timed and parked keys; stale entries are skipped
        self._polled_ms = 0
        self._release_count = 0
        self._event = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, on_end: Callable[[asyncio.Task[None]], None]) -> None:
        """Read the keys and begin; `on_end` hears of the loop's end, which is a failure unless `stop` was called."""
        await self._poll()
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(on_end)

    async def stop(self) -> None:
        """Claim nothing any more. A claim under way is finished, unless the spool keeps it for long."""
        task, self._task = self._task, None
        self._event.set()
        if task is not None:
            await asyncio.wait({task}, timeout=STOP_S)
            task.cancel()

    # --- what others tell

    def wake(self, queue_key: str) -> None:
        """Rows were added to the key or became due."""
        if queue_key not in self._parked and queue_key not in self._full:
            self._timed.pop(queue_key, None)
            self._activate(queue_key)

    def expect(self, queue_key: str, due_ms: int) -> None:
        """A row of the key will be due then (steady clock)."""
        if queue_key in self._active or queue_key in self._parked or queue_key in self._full:
            return
        if self._timed.get(queue_key, due_ms + 1) > due_ms:
            self._put(self._timed, queue_key, due_ms)
            self._event.set()

    def kick(self, next_hop: str) -> None:
        """A place for one more message became free: it is the turn of the key that waits longest for this next hop."""
        waiting = self._full_by_hop.get(next_hop)
        if waiting:
            queue_key = next(iter(waiting))
            self._leave_full(queue_key)
            self._activate(queue_key)

    def nudge(self) -> None:
        """The window is open again."""
        self._event.set()

    def release(self, next_hop: str | None = None) -> None:
        """Look again at parked and full keys, all or those of a next hop."""
        self._release_count += 1
        for queue_key in [*self._parked, *self._full]:
            if next_hop is None or split_queue_key(queue_key)[1] == next_hop:
                self._parked.pop(queue_key, 0)
                self._leave_full(queue_key)
                self._activate(queue_key)

    def _enter_full(self, queue_key: str) -> None:
        self._full[queue_key] = True
        self._full_by_hop.setdefault(split_queue_key(queue_key)[1], {})[queue_key] = True

    def _leave_full(self, queue_key: str) -> None:
        if self._full.pop(queue_key, False):
            next_hop = split_queue_key(queue_key)[1]
            waiting = self._full_by_hop[next_hop]
            del waiting[queue_key]
            if not waiting:
                del self._full_by_hop[next_hop]

    # --- the loop

    def _activate(self, queue_key: str) -> None:
        self._active[queue_key] = None
        self._event.set()

    async def _run(self) -> None:
        while self._task is not None:
            self._event.clear()
            self._promote()
            if self._active and self._work.window_open():
                queue_key = next(iter(self._active))
                del self._active[queue_key]
                try:
                    await self._serve(queue_key)
                except SpoolError as error:
                    self._log.warning("delivery.spool_read_failed", error=type(error).__name__)
                    self._put(self._timed, queue_key, self._now_ms() + PUT_OFF_MS)
                # Turns that never wait for the disk must still let the sessions have theirs.
                await asyncio.sleep(0)
            else:
                await self._rest()

    async def _rest(self) -> None:
        """Wait until somebody tells something, a key is due, or it is time to read all keys again."""
        until_ms = self._polled_ms + int(POLL_S * 1000)
        if self._heap and not self._active:
            until_ms = min(until_ms, self._heap[0][0])
        delay_s = max(0.001, (until_ms - self._now_ms()) / 1000)
        timer = asyncio.get_running_loop().call_later(delay_s, self._event.set)
        try:
            await self._event.wait()
        finally:
            timer.cancel()
        if self._task is not None and self._now_ms() >= self._polled_ms + int(POLL_S * 1000):
            await self._poll()

    async def _poll(self) -> None:
        self._polled_ms = self._now_ms()
        try:
            heads = await self._spool.keys()
        except SpoolError as error:
            self._log.warning("delivery.spool_read_failed", error=type(error).__name__)
            return
        for queue_key, due_ms in heads:
            if queue_key not in self._active and queue_key not in self._parked:
                self._leave_full(queue_key)
                self._put(self._timed, queue_key, due_ms)

    def _put(self, place: dict[str, int], queue_key: str, due_ms: int) -> None:
        place[queue_key] = due_ms
        heapq.heappush(self._heap, (due_ms, queue_key))

    def _promote(self) -> None:
        """Activate the keys whose time has come."""
        now_ms = self._now_ms()
        while self._heap:
            due_ms, queue_key = self._heap[0]
            place = self._timed if self._timed.get(queue_key) == due_ms else self._parked
            current = place.get(queue_key) == due_ms
            if current and due_ms > now_ms:
                return
            heapq.heappop(self._heap)
            if current:
                del place[queue_key]
                self._activate(queue_key)

    async def _serve(self, queue_key: str) -> None:
        """One turn of a key; puts it where it belongs afterwards."""
        room = self._work.room(queue_key)
        if room <= 0:
            self._enter_full(queue_key)
            return
        dues = await self._spool.heads(queue_key, None, READ_COUNT)
        now_ms = self._now_ms()
        ready = [due for due in dues if due.due_ms <= now_ms]
        if not ready:
            self.kick(split_queue_key(queue_key)[1])
            if dues:
                await self._wait_for(queue_key, dues[0], now_ms)
            return
        release_count = self._release_count
        claims: list[asyncio.Future[None]] = []
        parks: list[int] = []
        for message_id in dict.fromkeys(due.message_id for due in ready):
            if len(claims) >= room or not self._work.window_open():
                break
            taken = await self._offer(message_id, queue_key, now_ms)
            claims += taken.claims
            if taken.park_ms:
                parks.append(taken.park_ms)
        if claims:
            await asyncio.wait(claims)
        if len(claims) < room:
            self.kick(split_queue_key(queue_key)[1])
        if claims or not parks or release_count != self._release_count:
            # What stood in the way may have gone while the rows were read.
            self._active[queue_key] = None
        else:
            self._put(self._parked, queue_key, max(min(parks), now_ms + PUT_OFF_MS))

    async def _offer(self, message_id: MessageId, queue_key: str, now_ms: int) -> Taken:
        try:
            stored = await self._spool.load(message_id)
        except SpoolError:
            self._counters.quarantined += 1
            self._log.warning("delivery.quarantined", message=format_message_id(message_id))
            return Taken([], now_ms + PUT_OFF_MS)
        rows = [row for row in (stored.recipients if stored else ()) if _is_ready(row, queue_key, now_ms)]
        if stored is None or not rows:
            # Changed since the heads were read; a row that stays like this must not be read in a circle.
            return Taken([], now_ms + PUT_OFF_MS)
        return self._work.take(stored, rows)

    async def _wait_for(self, queue_key: str, due: Due, now_ms: int) -> None:
        due_ms = rebase_due(due.due_ms, now_ms, LONGEST_DELAY_S)
        if due_ms < due.due_ms:
            await self._rebase(due, due_ms)
        self._put(self._timed, queue_key, due_ms)

    async def _rebase(self, due: Due, due_ms: int) -> None:
        """Bring back a retry that a clock far ahead has put off."""
        stored = await self._spool.load(due.message_id)
        for row in stored.recipients if stored else ():
            if row.index == due.index and row.state in (State.QUEUED, State.DEFERRED):
                change = RecipientChange(row.index, row.attempt, row.state, row.attempt, due_ms, row.queue_key)
                await self._spool.settle(Settlement(due.message_id, (change,), None, reported=False))


def _is_ready(row: RecipientRow, queue_key: str, now_ms: int) -> bool:
    return row.queue_key == queue_key and row.due_ms <= now_ms and row.state in (State.QUEUED, State.DEFERRED)
