"""One server as the limiter uses it: wishes of one turn of the loop leave together, and a breaker gives up on it.

    state   how it is left                                       a wish is decided by
    local   a probe in the background connects, makes sure of    the local limiter, at once
            the library and calls it: then shared
    shared  an error, or an answer that takes too long: the      the server; by the local limiter for those whose
            connection is dropped, then local                    call failed
    closed  never                                                the local limiter

Probes come after 0.1 s, doubling up to 5 s. Nothing is kept for later: a wish that was decided is never sent again.
One task owns the connection and reads every answer to what it wrote, so that a caller who is cancelled neither shifts
the answers of others nor is charged: a call that had not left is dropped, one that had is refunded or released.
A call is late when its answer takes longer than `timeout_s` while the loop runs: what the loop itself was late by does
not count, or a busy worker would give up a server that answers in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from redis.exceptions import AskError, ClusterDownError, RedisError, ResponseError, TryAgainError

from dataplane.adapters.limiter_levels import Levels, Recalled
from dataplane.adapters.limiter_link import CONNECT_TIMEOUT_S, Link
from dataplane.adapters.limiter_local import MICRO, LocalLimiter
from dataplane.adapters.limiter_wire import (
    Known,
    Packer,
    pack_command,
    pack_epoch,
    pack_hold,
    pack_peek,
    pack_release,
    pack_seed,
)
from dataplane.histogram import CALL_BOUNDS_S, Histogram
from dataplane.ports import Grant, Slot, Take

LOOK_S = 1.0

_MAX_BATCH = 256
_MAX_GIVEN_BACK = 10_000
_MAX_ROUNDS = 4
_SEEDS_A_ROUND = 100
_LOOKS_A_ROUND = 100
_KEYS_A_LOOK = 500
_FIRST_PROBE_S = 0.1
_LONGEST_PROBE_S = 5.0
_LAG_S = 0.005
_LAST_LOOK_S = 0.001
_MOST_LATE = 5
_GRANTED = Grant(allowed=True, wait_s=0.0, refused_key="", local=False)
_ASKING = pack_command("ASKING")


class Wish:
    """What somebody waits for: `takes` or `slots` of one lot, or what a server says to a packed `call`.

    `answer` is a Grant; to a call it is the server's, or None.
    """

    __slots__ = ("answer", "asking", "call", "hops", "lot", "slots", "takes")

    def __init__(
        self,
        lot: str,
        takes: Sequence[Take],
        slots: Sequence[Slot],
        answer: asyncio.Future[Any],
        call: bytes = b"",
    ) -> None:
        self.lot = lot
        self.call = call
        self.takes = takes
        self.slots = slots
        self.answer = answer
        self.hops = 0
        self.asking = False


class Counters:
    """Plain numbers since start, of all servers.

    `local` wishes were decided by the local share, `local_granted` of them with yes: no more than those can be above a
    limit while servers are away. `shared` ones were decided by a server, in round trips of `call_seconds`. `trips`
    counts connections given up, `lost` epochs that ended: buckets were lost.
    """

    __slots__ = ("call_seconds", "local", "local_granted", "lost", "shared", "trips")

    def __init__(self) -> None:
        self.shared = 0
        self.call_seconds = Histogram(CALL_BOUNDS_S)
        self.local = 0
        self.local_granted = 0
        self.trips = 0
        self.lost = 0


class Tools(NamedTuple):
    """What servers share. `clock` is monotonic; `on_change` hears a server come (True) and go (False), with the reason.

    `moved` takes wishes that belong to another server, with the error that says where. `recalled` has levels of long
    buckets from before the worker started, for whichever server keeps them.
    """

    local: LocalLimiter
    clock: Callable[[], float]
    packer: Packer
    counters: Counters
    on_change: Callable[[bool, str], None]
    moved: Callable[[Sequence[Wish], ResponseError], None]
    sleep: Callable[[float], Awaitable[None]]
    recalled: Recalled


class _Call(NamedTuple):
    packed: bytes
    settle: Callable[[Any], None]


class Shard:
    """See the module."""

    def __init__(self, link: Link, tools: Tools, timeout_s: float, look_s: float) -> None:
        self.link = link
        self.timeout_s = timeout_s
        self.is_cluster = False
        self._local, self._clock, self._packer, self._counters, self._on_change, self._moved, self._sleep, _ = tools
        self.levels = Levels(self._clock, tools.recalled)
        self._look_s = look_s
        self._pending: list[Wish] = []
        self._refunds: list[tuple[str, Sequence[Take]]] = []
        self._releases: list[tuple[str, Sequence[Slot]]] = []
        self._again: list[Wish] = []
        self._sender: asyncio.Task[None] | None = None
        self._probe: asyncio.Task[None] | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._look_due = False
        self._probe_delay_s = _FIRST_PROBE_S
        self._closed = False

    @property
    def shared(self) -> bool:
        """Whether the server decides."""
        return self.link.is_open

    async def start(self) -> None:
        """Connect, in at most two seconds; when that fails the local limiter decides until a probe succeeds."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._open()
        except (RedisError, OSError, TimeoutError) as error:
            self._begin_probing(error)

    def ask(self, wish: Wish) -> None:
        """Decide a wish; its answer may be there when this returns."""
        if not self.link.is_open:
            if self._probe is None and not self._closed:
                self._begin_probing(None)
            self.answer_locally((wish,))
            return
        self._pending.append(wish)
        self._wake()

    def refund(self, lot: str, takes: Sequence[Take]) -> None:
        """Give back; with the server away to the local buckets."""
        if not self.link.is_open:
            self._local.refund(takes)
        elif len(self._refunds) < _MAX_GIVEN_BACK:
            self._refunds.append((lot, takes))
            self._wake()

    def release(self, lot: str, slots: Sequence[Slot]) -> None:
        """Give slots back, wherever they are held."""
        self._local.release(slots)
        if self.link.is_open and len(self._releases) < _MAX_GIVEN_BACK:
            self._releases.append((lot, slots))
            self._wake()

    def answer_locally(self, wishes: Sequence[Wish]) -> None:
        """Let the local share decide for those who still wait."""
        for wish in wishes:
            if wish.answer.done():
                continue
            if wish.call:
                wish.answer.set_result(None)
            else:
                grant = self._local.hold_now(wish.slots) if wish.slots else self._local.take_now(wish.takes)
                self._counters.local += 1
                self._counters.local_granted += grant.allowed
                wish.answer.set_result(grant)

    async def close(self) -> None:
        """Drop the connection; whoever waits is answered by the local limiter."""
        self._closed = True
        if self._look_timer is not None:
            self._look_timer.cancel()
        tasks = [task for task in (self._probe, self._sender) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._give_up()
        await self.link.drop(nowait=False)

    # --- sending

    def _wake(self) -> None:
        if self._sender is None and not self._closed:
            # Begins in the loop's next turn: by then all that this turn asks has gathered.
            self._sender = asyncio.get_running_loop().create_task(self._send_all())

    async def _send_all(self) -> None:
        """Send batches until nothing is left; what gathers while one is on its way makes the next."""
        try:
            while self._pending or self._refunds or self._releases or self._look_due or self._seeds_are_owed():
                batch = [wish for wish in self._pending[:_MAX_BATCH] if not wish.answer.done()]
                del self._pending[:_MAX_BATCH]
                await self._send(batch)
        finally:
            self._sender = None

    def _seeds_are_owed(self) -> bool:
        # In a cluster a lot's seeds all leave with the first wish of that lot.
        return self.link.is_open and not self.is_cluster and bool(self.levels.lots_to_seed)

    async def _send(self, batch: list[Wish]) -> None:
        is_settled = False
        try:
            async with asyncio.timeout(None) as deadline:
                watch = _Watch(deadline.reschedule, self.timeout_s)
                try:
                    await self._settle(batch)
                    is_settled = True
                finally:
                    watch.stop()
        except (RedisError, OSError, TimeoutError, LookupError, TypeError, ValueError) as error:
            # The last three: an answer that is none of ours.
            self._counters.trips += 1
            await self.link.drop()
            self._begin_probing(error)
            self._give_up()
        finally:
            # Else each has its answer, or is with another server.
            if not is_settled:
                self.answer_locally(batch)

    def _give_up(self) -> None:
        """Nobody is there: who waits is answered by the local share, and what is given back ends by itself."""
        pending, self._pending = self._pending, []
        self.answer_locally(pending)
        self._refunds, self._releases, self._look_due = [], [], False

    async def _settle(self, batch: list[Wish]) -> None:
        for _ in range(_MAX_ROUNDS):
            self._again = []
            calls = [*self._given_back(), *self._seeds(batch), *self._decisions(batch), *self._looks()]
            if not calls:
                return
            called_s = self._clock()
            answers = await self.link.exchange([call.packed for call in calls])
            self._counters.call_seconds.observe(self._clock() - called_s)
            for call, answer in zip(calls, answers, strict=True):
                call.settle(answer)
            if not self._again:
                return
            batch = self._again
        raise ValueError("the epoch changes without end")

    # --- what a round says

    def _given_back(self) -> list[_Call]:
        refunds, self._refunds = self._refunds, []
        releases, self._releases = self._releases, []
        calls = [_Call(self._packer.refund(takes), _pass_over) for takes in _by_lot(refunds)]
        return calls + [_Call(pack_release(slots), _pass_over) for slots in _by_lot(releases)]

    def _seeds(self, batch: Sequence[Wish]) -> list[_Call]:
        calls = []
        for lot in {wish.lot for wish in batch} if self.is_cluster else self.levels.lots_to_seed:
            wishes = [wish for wish in batch if wish.lot == lot]
            names = [self._packer.known(take).name for wish in wishes for take in wish.takes]
            seeds = self.levels.take_seeds(lot, names, _SEEDS_A_ROUND)
            if seeds:
                calls.append(_Call(pack_seed(seeds), self._seeded(lot, seeds)))
        return calls

    def _seeded(self, lot: str, seeds: Sequence[tuple[Known, int]]) -> Callable[[Any], None]:
        names = [known.name for known, _ in seeds]
        # Owed until it is known that they arrived.
        self.levels.owe_again(lot, names)

        def settle(answer: Any) -> None:
            if not isinstance(answer, ResponseError):
                self.levels.take_seeds(lot, names, 0)

        return settle

    def _decisions(self, batch: Sequence[Wish]) -> list[_Call]:
        takes: dict[tuple[str, bool], list[Wish]] = {}
        holds: dict[tuple[str, bool], list[Wish]] = {}
        others: list[Wish] = []
        for wish in batch:
            if wish.call:
                others.append(wish)
                continue
            kind = holds if wish.slots else takes
            kind.setdefault((wish.lot, wish.asking), []).append(wish)
        calls = []
        for (lot, asking), wishes in takes.items():
            calls += self._asked(asking)
            long_ones: dict[str, Known] = {}
            epoch = self.levels.epoch(lot)
            packed = self._packer.take(lot, epoch, [wish.takes for wish in wishes], long_ones)
            calls.append(_Call(packed, self._taken(lot, wishes, long_ones)))
        for (_, asking), wishes in holds.items():
            calls += self._asked(asking)
            calls.append(_Call(pack_hold([wish.slots for wish in wishes]), self._held(wishes)))
        for wish in others:
            calls += self._asked(wish.asking)
            calls.append(_Call(wish.call, self._called(wish)))
        return calls

    def _asked(self, asking: bool) -> list[_Call]:  # noqa: FBT001 - a key of the dictionaries above
        return [_Call(_ASKING, _pass_over)] if asking else []

    def _taken(self, lot: str, wishes: Sequence[Wish], long_ones: dict[str, Known]) -> Callable[[Any], None]:
        def settle(answer: Any) -> None:
            if isinstance(answer, ResponseError):
                self._refused(wishes, answer)
                return
            if long_ones and answer[0] != self.levels.epoch(lot):
                self._counters.lost += self.levels.changed(lot, answer[0])
                self._again += wishes
                return
            refusals = {answer[at] - 1: (answer[at + 1], answer[at + 2]) for at in range(1, len(answer), 3)}
            for number, wish in enumerate(wishes):
                wait_us, refused = refusals.get(number, (0, 0))
                self._answer(wish, _grant(wish.takes, wait_us, refused) if refused else _GRANTED)
            if long_ones:
                self.levels.touch(lot, long_ones)
                self._look_later()

        return settle

    def _held(self, wishes: Sequence[Wish]) -> Callable[[Any], None]:
        def settle(answer: Any) -> None:
            if isinstance(answer, ResponseError):
                self._refused(wishes, answer)
                return
            for wish, wait_us, refused in zip(wishes, answer[::2], answer[1::2], strict=True):
                self._answer(wish, _grant(wish.slots, wait_us, refused) if refused else _GRANTED)

        return settle

    def _called(self, wish: Wish) -> Callable[[Any], None]:
        def settle(answer: Any) -> None:
            if isinstance(answer, AskError | TryAgainError | ClusterDownError):
                self._moved((wish,), answer)
            elif not wish.answer.done():
                # A refusal of this one call says nothing about the server: limits go on there.
                wish.answer.set_result(None if isinstance(answer, ResponseError) else answer)

        return settle

    def _answer(self, wish: Wish, grant: Grant) -> None:
        self._counters.shared += 1
        if not wish.answer.done():
            wish.answer.set_result(grant)
        elif grant.allowed and wish.slots:
            self.release(wish.lot, wish.slots)
        elif grant.allowed:
            self.refund(wish.lot, wish.takes)

    def _refused(self, wishes: Sequence[Wish], error: ResponseError) -> None:
        """The server did not decide: it says who does, or that nobody can now."""
        if isinstance(error, AskError | TryAgainError | ClusterDownError):
            self._moved(wishes, error)
        else:
            raise error

    # --- looking

    def _look_later(self) -> None:
        if self._look_timer is None:
            self._look_timer = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def _look(self) -> None:
        if self._look_timer is not None:
            self._look_timer.cancel()
            self._look_timer = None
        if self.link.is_open:
            self._look_due = True
            self._wake()

    def _looks(self) -> list[_Call]:
        if not self._look_due:
            return []
        self._look_due = False
        calls = []
        for lot, buckets in self.levels.take_touched(_LOOKS_A_ROUND).items():
            every = list(buckets.values())
            for at in range(0, len(every), _KEYS_A_LOOK):
                calls += self._look_at(lot, every[at : at + _KEYS_A_LOOK])
        if self.levels.anything_touched:
            self._look_later()
        return calls

    def _look_at(self, lot: str, buckets: list[Known]) -> list[_Call]:
        """Look, and then make sure that nothing was lost before."""
        seen: list[Any] = []

        def settle(answer: Any) -> None:
            peeked = seen[0]
            if isinstance(answer, ResponseError) or isinstance(peeked, ResponseError):
                return
            if answer[0] == self.levels.epoch(lot):
                self.levels.learn(lot, buckets, peeked)

        return [_Call(pack_peek(buckets), seen.append), _Call(pack_epoch(lot, self.levels.epoch(lot)), settle)]

    # --- connecting

    async def _open(self) -> None:
        self.is_cluster = await self.link.open()
        self._probe_delay_s = _FIRST_PROBE_S
        self._on_change(True, "")

    def _begin_probing(self, error: BaseException | None) -> None:
        if error is not None:
            self._on_change(False, f"{type(error).__name__}: {error}"[:200])
        if self._probe is None and not self._closed:
            self._probe = asyncio.get_running_loop().create_task(self._probe_until_shared())

    async def _probe_until_shared(self) -> None:
        try:
            while not self.link.is_open:
                await self._sleep(self._probe_delay_s)
                self._probe_delay_s = min(_LONGEST_PROBE_S, self._probe_delay_s * 2)
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT_S):
                        await self._open()
                except (RedisError, OSError, TimeoutError):
                    continue
        finally:
            self._probe = None


class _Watch:
    """Ends a wait by `end`, with the time, after `timeout_s` of a loop that runs."""

    def __init__(self, end: Callable[[float], None], timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = end
        self._timeout_s = timeout_s
        self._late_count = 0
        self._looked = False
        self._arm(timeout_s)

    def stop(self) -> None:
        """The answer came."""
        self._timer.cancel()

    def _arm(self, seconds: float) -> None:
        self._due_s = self._loop.time() + seconds
        self._timer = self._loop.call_later(seconds, self._ring)

    def _ring(self) -> None:
        now_s = self._loop.time()
        if now_s - self._due_s > _LAG_S and self._late_count < _MOST_LATE:
            self._late_count += 1
            self._arm(self._timeout_s)
        elif not self._looked:
            # The answer may lie in the socket: timers come before sockets in a turn of the loop.
            self._looked = True
            self._arm(_LAST_LOOK_S)
        else:
            self._end(now_s)


def _by_lot(given_back: Sequence[tuple[str, Sequence[Any]]]) -> list[list[Any]]:
    lots: dict[str, list[Any]] = {}
    for lot, items in given_back:
        lots.setdefault(lot, []).extend(items)
    return list(lots.values())


def _grant(asked: Sequence[Take] | Sequence[Slot], wait_us: int, refused: int) -> Grant:
    return Grant(allowed=False, wait_s=wait_us / MICRO, refused_key=asked[refused - 1].key, local=False)


def _pass_over(answer: Any) -> None:
    """Who gives back waits for no answer."""
    del answer
