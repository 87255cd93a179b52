"""Brings back from the spool what is due, as fast as its next hops take it, with accounts taking turns by weight.

One loop, no memory of rows: of a key (account, next hop) it reads as many heads as it may claim, claims what may go
(`sending`, attempt one higher, committed before anything is sent) and reads again when its turn comes. Next hops take
turns, and accounts of a next hop by core/fair; of an account's keys the one with the highest priority has the turn.

What is `scheduled` is due when the wall clock shows its time, everything else by the steady clock (core/retry): a clock
that is put back puts off what is scheduled, one that is put ahead is followed within a minute.

A key is in one place at a time:

    wanting   has or may have due rows: waits for its turn, or has it until its claims are committed
    timed     its first row is due later, or it was put off
    crowded   due, and its account holds its share of memory; `nudge` makes it wanting
    parked    due, and nothing can go before configuration, denials or a destination change; `release` frees it

A next hop that takes no more is `full` until `kick`, or until a turn of one of its keys ends. One that is dead is
probed: when its time comes one parked key gets a turn, and the next one if that has nothing to send, so that a dead
next hop costs one attempt and not one for each key or message.

What a command is about to change is locked until that is committed: a claim must not follow from what was read before.

A wake-up that got lost is found by reading all keys again every minute. Failures of the spool put a key off by a
second.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from dataplane.core.envelope import RecipientRow, make_queue_key, queue_priority, split_queue_key
from dataplane.core.fair import FlowTurns, message_cost
from dataplane.core.ids import MessageId, format_message_id
from dataplane.core.queue import State
from dataplane.core.retry import rebase_due
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.outcome import Moment
from dataplane.ports import Cursor, Due, EventLog, RecipientChange, Settlement, Spool, SpoolError, StoredMessage

READ_COUNT = 64
SCOUTS = 4  # messages of a turn that could not go before the rest is taken to be like them
LOADS = 8  # messages read before the sessions have their turn
POLL_S = 60.0
PUT_OFF_MS = 1_000
STOP_S = 5.0
# No retry is further away than this unless a clock was ahead when it was written.
LONGEST_DELAY_S = 86_400.0
SPARE_TIMERS = 64


class Taken(NamedTuple):
    """What became of a message that was offered. `park_ms` above 0 parks its key until then (steady clock)."""

    claims: list[asyncio.Future[None]]
    park_ms: int = 0
    cost: int = 0


class Work(Protocol):
    """What the scheduler feeds."""

    def weight(self, account: str) -> int:
        """How much of its next hops an account gets beside others."""
        ...

    def room(self, next_hop: str) -> int:
        """How many messages for this next hop may be claimed now."""
        ...

    def window_open(self) -> bool:
        """Whether more content may be read into memory."""
        ...

    def crowded(self, account: str) -> bool:
        """Whether this account has its share of memory."""
        ...

    def take(self, stored: StoredMessage, rows: Sequence[RecipientRow]) -> Taken:
        """Claim and start what may go of these waiting recipients."""
        ...


class _Hop:
    """A next hop with keys that want turns.

    `full` since it had no room; `owed` is a key whose turn ended by that and goes on before any other's; `told` see
    `Scheduler.expect`.
    """

    __slots__ = ("full", "name", "owed", "told", "turns")

    def __init__(self, name: str) -> None:
        self.name = name
        self.turns = FlowTurns()
        self.full = False
        self.owed = ""
        self.told: dict[str, int] = {}


class Scheduler:
    """State: where each key stands. Its times are those of the steady clock."""

    def __init__(
        self, spool: Spool, work: Work, moment: Callable[[], Moment], counters: DeliveryCounters, log: EventLog
    ) -> None:
        self._spool = spool
        self._work = work
        self._moment = moment
        self._counters = counters
        self._log = log
        self._hops: dict[str, _Hop] = {}
        self._ready: dict[str, None] = {}  # next hops where a key waits for its turn, and that are not known to be full
        self._timed: dict[str, int] = {}
        self._parked: dict[str, int] = {}
        self._parked_by_hop: dict[str, dict[str, None]] = {}  # the same, longest first
        self._crowded: dict[str, None] = {}
        self._probes: dict[str, int] = {}  # by the key of no account
        self._probing: dict[str, int] = {}  # next hops that want a probe, and how many keys are still to be tried
        self._heap: list[tuple[int, str]] = []  # of timed and parked keys and probes; stale entries are skipped
        self._polled_ms = 0
        self._release_count = 0
        self._locked: set[MessageId] = set()
        self._loading: MessageId | None = None  # None again when it was locked meanwhile
        self._is_blocked = False  # something could be read, and the window is closed
        self._event = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is due that could go: all that waits waits for a time or for somebody."""
        return not self._hops

    async def start(self, on_end: Callable[[asyncio.Task[None]], None]) -> None:
        """Read the keys and begin; `on_end` hears of the loop's end, which is a failure unless `stop` was called."""
        await self._poll()
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(on_end)

    async def stop(self) -> None:
        """Claim nothing any more. A turn under way is finished, unless the spool keeps it for long."""
        task, self._task = self._task, None
        self._event.set()
        if task is not None:
            await asyncio.wait({task}, timeout=STOP_S)
            task.cancel()

    # --- what others tell

    def wake(self, queue_key: str) -> None:
        """Rows were added to the key or became due."""
        if queue_key not in self._parked and queue_key not in self._crowded:
            self._want(queue_key, 0)

    def expect(self, queue_key: str, due_ms: int) -> None:
        """A row of the key will be due then (steady clock)."""
        if queue_key in self._parked or queue_key in self._crowded:
            return
        hop = self._hops.get(split_queue_key(queue_key)[1])
        if hop is not None and queue_key in hop.turns:
            # The row may not be committed yet when the key is read.
            hop.told[queue_key] = min(hop.told.get(queue_key, due_ms), due_ms)
        elif self._timed.get(queue_key, due_ms + 1) > due_ms:
            self._put(self._timed, queue_key, due_ms)
            self._event.set()

    def lock(self, message_id: MessageId) -> None:
        """Claim nothing of this message before `unlock`."""
        self._locked.add(message_id)
        if self._loading == message_id:
            self._loading = None

    def unlock(self, message_ids: Iterable[MessageId], queue_keys: Iterable[str]) -> None:
        """These were changed, or were not; rows under these keys came, went or became due."""
        self._locked.difference_update(message_ids)
        self._release_count += 1
        for queue_key in queue_keys:
            if queue_key in self._parked:
                self._unpark(queue_key)
            self.wake(queue_key)

    def kick(self, next_hop: str) -> None:
        """Places for more messages became free."""
        hop = self._hops.get(next_hop)
        if hop is not None and hop.full and not hop.owed:
            self._open(hop)

    def nudge(self) -> None:
        """Content left the memory."""
        if self._is_blocked or self._crowded:
            crowded, self._crowded = self._crowded, {}
            for queue_key in crowded:
                self._want(queue_key)
            self._event.set()

    def release(self, next_hop: str | None = None) -> None:
        """Look again at parked keys, all or those of a next hop, and at what room there is."""
        self._release_count += 1
        names = [next_hop] if next_hop is not None else list(self._parked_by_hop)
        for name in names:
            for queue_key in list(self._parked_by_hop.get(name, ())):
                self._unpark(queue_key)
        for name in [next_hop] if next_hop is not None else list(self._hops):
            self.kick(name)

    def probe_at(self, next_hop: str, due_ms: int) -> None:
        """The next hop is dead, and wants one attempt then (steady clock)."""
        self._put(self._probes, make_queue_key("", next_hop), due_ms)
        self._event.set()

    # --- places of keys

    def _want(self, queue_key: str, told_ms: int | None = None) -> None:
        account, next_hop = split_queue_key(queue_key)
        self._timed.pop(queue_key, None)
        hop = self._hops.get(next_hop)
        if hop is None:
            hop = self._hops[next_hop] = _Hop(next_hop)
        if queue_key not in hop.turns:
            hop.turns.join(queue_key, account, queue_priority(queue_key), self._work.weight(account))
        elif told_ms is not None:
            hop.told[queue_key] = told_ms
        if not hop.full:
            self._open(hop)

    def _open(self, hop: _Hop) -> None:
        hop.full = False
        if hop.turns.waiting_count:
            self._ready[hop.name] = None
            self._event.set()

    def _leave(self, hop: _Hop, queue_key: str, due_ms: int = 0) -> None:
        """End the last turn of a key; above 0 it is due again then, or when somebody told that it is."""
        told_ms = hop.told.pop(queue_key, None)
        if told_ms == 0:
            self._give_back(hop, queue_key, 0)
            return
        hop.turns.leave(queue_key)
        if due_ms or told_ms:
            self._put(self._timed, queue_key, min(due_ms or told_ms or 0, told_ms or due_ms))
        self._after_leaving(hop)

    def _give_back(self, hop: _Hop, queue_key: str, spent: int) -> None:
        hop.turns.give_back(queue_key, spent, self._work.weight(split_queue_key(queue_key)[0]))
        if hop.owed in ("", queue_key):
            hop.owed = ""
            self._open(hop)

    def _after_leaving(self, hop: _Hop) -> None:
        """A key left the next hop: it is forgotten with its last one; another key of the account may have its turn."""
        if not len(hop.turns):
            del self._hops[hop.name]
            self._ready.pop(hop.name, None)
        elif not hop.full:
            self._open(hop)

    def _park(self, hop: _Hop, queue_key: str, due_ms: int) -> None:
        hop.told.pop(queue_key, None)
        hop.turns.leave(queue_key)
        self._after_leaving(hop)
        self._parked_by_hop.setdefault(hop.name, {})[queue_key] = None
        self._put(self._parked, queue_key, due_ms)
        self._probe_next(hop.name)

    def _unpark(self, queue_key: str) -> None:
        next_hop = split_queue_key(queue_key)[1]
        parked = self._parked_by_hop[next_hop]
        self._parked.pop(queue_key, None)
        del parked[queue_key]
        if not parked:
            del self._parked_by_hop[next_hop]
        self._want(queue_key)

    def _probe_next(self, next_hop: str) -> None:
        """Give the key that is parked longest a turn, while a probe is wanted and there is one that had none."""
        left = self._probing.pop(next_hop, 0)
        if left:
            self._probing[next_hop] = left - 1
            self._unpark(next(iter(self._parked_by_hop[next_hop])))

    # --- the loop

    async def _run(self) -> None:
        while self._task is not None:
            self._event.clear()
            self._promote()
            self._is_blocked = bool(self._ready) and not self._work.window_open()
            if self._ready and not self._is_blocked:
                hop = self._hops[next(iter(self._ready))]
                del self._ready[hop.name]
                await self._turn(hop)
                # Turns that never wait for the disk must still let the sessions have theirs.
                await asyncio.sleep(0)
            else:
                await self._rest()

    async def _rest(self) -> None:
        """Wait until somebody tells something, a key is due, or it is time to read all keys again."""
        until_ms = self._polled_ms + int(POLL_S * 1000)
        if self._heap:
            until_ms = min(until_ms, self._heap[0][0])
        delay_s = max(0.001, (until_ms - self._moment().steady_ms) / 1000)
        timer = asyncio.get_running_loop().call_later(delay_s, self._event.set)
        try:
            await self._event.wait()
        finally:
            timer.cancel()
        if self._task is not None and self._moment().steady_ms >= self._polled_ms + int(POLL_S * 1000):
            await self._poll()

    async def _poll(self) -> None:
        self._polled_ms = self._moment().steady_ms
        try:
            heads = await self._spool.keys()
        except SpoolError as error:
            self._log.warning("delivery.spool_read_failed", error=type(error).__name__)
            return
        moment = self._moment()
        ahead_ms = max(0, moment.wall_ms - moment.steady_ms)
        for queue_key, head_ms in heads:
            # The head may be scheduled, and then it is due by the wall clock.
            due_ms = head_ms - ahead_ms
            hop = self._hops.get(split_queue_key(queue_key)[1])
            wanting = hop is not None and queue_key in hop.turns
            if not wanting and queue_key not in self._parked and queue_key not in self._crowded:
                self._put(self._timed, queue_key, due_ms)
        for next_hop in list(self._hops):
            self.kick(next_hop)

    def _put(self, place: dict[str, int], queue_key: str, due_ms: int) -> None:
        if place.get(queue_key) == due_ms:
            return
        place[queue_key] = due_ms
        heapq.heappush(self._heap, (due_ms, queue_key))
        current_count = len(self._timed) + len(self._parked) + len(self._probes)
        if len(self._heap) > 2 * current_count + SPARE_TIMERS:
            places = (self._timed, self._parked, self._probes)
            self._heap = [(due_ms, key) for each in places for key, due_ms in each.items()]
            heapq.heapify(self._heap)

    def _promote(self) -> None:
        """Give turns to the keys and probes whose time has come."""
        now_ms = self._moment().steady_ms
        while self._heap:
            due_ms, queue_key = self._heap[0]
            is_timed = self._timed.get(queue_key) == due_ms
            is_parked = self._parked.get(queue_key) == due_ms
            is_probe = self._probes.get(queue_key) == due_ms
            if due_ms > now_ms and (is_timed or is_parked or is_probe):
                return
            heapq.heappop(self._heap)
            if is_timed:
                self._want(queue_key)
            elif is_parked:
                self._unpark(queue_key)
            elif is_probe:
                del self._probes[queue_key]
                next_hop = split_queue_key(queue_key)[1]
                self._probing[next_hop] = len(self._parked_by_hop.get(next_hop, ()))
                self._probe_next(next_hop)

    # --- a turn

    async def _turn(self, hop: _Hop) -> None:
        """One turn of a key of this next hop."""
        room = self._work.room(hop.name)
        if room <= 0:
            hop.full = True
            return
        # A key that is alone takes all the room at once; where there are many, each has a message by turns.
        queue_key, budget = hop.turns.take(max(1, room // len(hop.turns)))
        self._open(hop)
        if self._work.crowded(split_queue_key(queue_key)[0]):
            hop.turns.leave(queue_key)
            hop.told.pop(queue_key, None)
            self._after_leaving(hop)
            self._crowded[queue_key] = None
            return
        try:
            await self._serve(hop, queue_key, room, budget)
        except SpoolError as error:
            self._log.warning("delivery.spool_read_failed", error=type(error).__name__)
            self._leave(hop, queue_key, self._moment().steady_ms + PUT_OFF_MS)

    async def _serve(self, hop: _Hop, queue_key: str, room: int, budget: int) -> None:
        """Claim what may go; puts the key where it belongs afterwards, or leaves that to the end of its claims."""
        count = min(READ_COUNT, 2 * min(room, budget) + SCOUTS)
        ready, next_due_ms = await self._read(queue_key, count)
        if not ready:
            self._leave(hop, queue_key, next_due_ms)
            return
        moment = self._moment()
        now_ms = moment.steady_ms
        account = split_queue_key(queue_key)[0]
        release_count = self._release_count
        claims: list[asyncio.Future[None]] = []
        parks: list[int] = []
        spent = 0
        for place, message_id in enumerate(dict.fromkeys(due.message_id for due in ready)):
            if len(claims) >= room or spent >= budget or len(parks) >= SCOUTS:
                break
            if self._work.crowded(account) or not self._work.window_open():
                break
            if place and place % LOADS == 0:
                await asyncio.sleep(0)
            taken = await self._offer(message_id, queue_key, moment)
            claims += taken.claims
            spent += taken.cost
            if taken.park_ms:
                parks.append(taken.park_ms)
        if claims:
            self._probing.pop(hop.name, None)
            if len(claims) >= room and spent < budget:
                hop.full = True
                hop.owed = queue_key
                self._ready.pop(hop.name, None)
            self._when_claimed(hop, queue_key, claims, spent)
        elif not parks or release_count != self._release_count:
            # What stood in the way may have gone while the rows were read.
            self._give_back(hop, queue_key, spent)
        else:
            self._park(hop, queue_key, max(min(parks), now_ms + PUT_OFF_MS))

    def _when_claimed(self, hop: _Hop, queue_key: str, claims: list[asyncio.Future[None]], spent: int) -> None:
        """Read the key again when its claims are committed: until then they look as if they waited."""
        left = len(claims)

        def claimed(_: asyncio.Future[None]) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._give_back(hop, queue_key, spent)

        for claim in claims:
            claim.add_done_callback(claimed)

    async def _read(self, queue_key: str, count: int) -> tuple[list[Due], int]:
        """Return heads of the key that are due; when there are none, when the first one will be (0: there is none)."""
        after: Cursor | None = None
        next_due_ms = 0
        while True:
            dues = await self._spool.heads(queue_key, after, count)
            moment = self._moment()
            ready = [due for due in dues if _is_due(due.state, due.due_ms, moment)]
            if ready or not dues:
                return ready, next_due_ms
            first_ms = min(_due_by_steady_ms(due, moment) for due in dues)
            next_due_ms = min(next_due_ms or first_ms, first_ms)
            await self._rebase(dues[0], moment)
            last = dues[-1]
            if len(dues) < count or last.due_ms > max(moment):
                return ready, next_due_ms
            # The wall clock was put back: behind what is scheduled there may be others that are due.
            after = Cursor(last.due_ms, last.priority, last.message_id, last.index)
            await asyncio.sleep(0)

    async def _offer(self, message_id: MessageId, queue_key: str, moment: Moment) -> Taken:
        now_ms = moment.steady_ms
        try:
            stored = await self._load(message_id)
        except SpoolError:
            self._counters.quarantined += 1
            self._log.warning("delivery.quarantined", message=format_message_id(message_id))
            return Taken([], now_ms + PUT_OFF_MS)
        rows = [row for row in (stored.recipients if stored else ()) if _is_ready(row, queue_key, moment)]
        if stored is None or not rows:
            # Locked, or changed since the heads were read; a row that stays like this must not be read in a circle.
            return Taken([], now_ms + PUT_OFF_MS)
        # What is taken may let its content go.
        cost = message_cost(len(stored.content), len(rows))
        return self._work.take(stored, rows)._replace(cost=cost)

    async def _load(self, message_id: MessageId) -> StoredMessage | None:
        """Read a message; None also when it was locked before the content was there."""
        if message_id in self._locked:
            return None
        self._loading = message_id
        stored = await self._spool.load(message_id)
        return stored if self._loading == message_id else None

    async def _rebase(self, due: Due, moment: Moment) -> None:
        """Bring back a retry that a clock far ahead has put off."""
        due_ms = _due_by_steady_ms(due, moment)
        if due.state is State.SCHEDULED or due_ms == due.due_ms:
            return
        stored = await self._load(due.message_id)
        for row in stored.recipients if stored else ():
            if row.index == due.index and row.state in (State.QUEUED, State.DEFERRED):
                change = RecipientChange(row.index, row.attempt, row.state, row.attempt, due_ms, row.queue_key)
                await self._spool.settle(Settlement(due.message_id, (change,), None, reported=False))


def _is_due(state: State, due_ms: int, moment: Moment) -> bool:
    return due_ms <= (moment.wall_ms if state is State.SCHEDULED else moment.steady_ms)


def _due_by_steady_ms(due: Due, moment: Moment) -> int:
    if due.state is State.SCHEDULED:
        return due.due_ms - moment.wall_ms + moment.steady_ms
    return rebase_due(due.due_ms, moment.steady_ms, LONGEST_DELAY_S)


def _is_ready(row: RecipientRow, queue_key: str, moment: Moment) -> bool:
    waits = row.state in (State.QUEUED, State.DEFERRED, State.SCHEDULED)
    return waits and row.queue_key == queue_key and _is_due(row.state, row.due_ms, moment)
