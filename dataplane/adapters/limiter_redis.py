"""Limits in Redis or Valkey, shared by all nodes: one round trip for all that a turn of the loop asks.

Contract. A `Limiter` of `dataplane.ports`: nothing raises. What a server does not answer in `timeout_s` (30 ms) is
decided by the local limiter, with its share of each limit (`limiter_shard` has the states).

One server keeps everything, and all that is asked leaves in one call. A cluster, which a server gives away by refusing
two slots in one call, keeps the keys of each tag on one of its servers: a wish is cut by tag, each part goes to its
server, and a refusal in one part gives back what others granted. Where slots lie is asked of the cluster at the start,
and again when a server says that it moved (MOVED, ASK) or is gone; until it is known anew the local share decides for
what lies there.

Over-admission. Of a limit never more than this is granted, all workers together:

    (capacity + largest cost) x (1 + failovers) + rate x time + one for each worker

The largest cost counts where it is above the capacity (a worker's share of it, once for each worker, while shares
decide): it passes when a bucket is full, and is paid whole before anything else passes. What is charged afterwards
comes on top of it, and is paid likewise.

A failover is each time that workers go over to their local shares, and each time that a server lost its buckets
(restart, FLUSHALL, promotion of a replica that lags); time counts twice while both, shares and buckets, refill. What
lies above a limit after a loss is less for long buckets, which are seeded (`limiter_levels`).

Other functions of the library go the same way by `call`: they leave with what limits ask, and share the breaker; their
own refusals give no server up.

Where Redis' user may call functions only, somebody else loads the library (docs/decisions/0005); in a cluster it needs
`+cluster|slots` as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import AskError, MovedError, RedisError, ResponseError

from dataplane.adapters.limiter_levels import Level, Recalled, aged
from dataplane.adapters.limiter_link import CONNECT_TIMEOUT_S, Link, Server
from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_shard import LOOK_S, Counters, Shard, Tools, Wish
from dataplane.adapters.limiter_wire import Packer, slot_of_tag
from dataplane.ports import Grant, Slot, Take

_MOST_HOPS = 3
_TOPOLOGY_REST_S = 0.5
_LONGEST_TOPOLOGY_REST_S = 5.0
_GRANTED = Grant(allowed=True, wait_s=0.0, refused_key="", local=False)

_Address = tuple[str, int]


class RedisLimiter:
    """See the module.

    `on_change` hears each change between shared (True) and local (False), with the reason. `sleep` waits between
    probes, `clock` is monotonic; tests give their own.
    """

    def __init__(
        self,
        url: str,
        local: LocalLimiter,
        *,
        on_change: Callable[[bool, str], None] | None = None,
        timeout_s: float = 0.03,
        look_s: float = LOOK_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """ValueError for a URL that redis-py does not know."""
        self.counters = Counters()
        self._server = Server(url)
        self._local = local
        self._on_change = on_change
        self._timeout_s = timeout_s
        self._look_s = look_s
        self._sleep = sleep
        self._clock = clock
        self._recalled: Recalled = {}
        self._tools = Tools(local, clock, Packer(), self.counters, self._changed, self._moved, sleep, self._recalled)
        self._first = self._make_shard(None)
        self._shards: dict[_Address, Shard] = {}
        self._slots: list[_Address | None] = []  # of a cluster: who keeps which
        self._tasks: set[asyncio.Task[Any]] = set()
        self._refresh: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def shared(self) -> bool:
        """Whether the server decides, in a cluster every one of them."""
        shards = [self._shards[address] for address in set(self._slots) if address] or [self._first]
        return all(shard.shared for shard in shards)

    @property
    def is_cluster(self) -> bool:
        """Whether there are several servers, each with tags of its own."""
        return bool(self._slots)

    def remembered(self) -> list[tuple[str, Level]]:
        """Levels of long buckets as they were last seen, each with its lot."""
        known = [self._recalled, *(shard.levels.remembered for shard in (self._first, *self._shards.values()))]
        return [(lot, level) for lots in known for lot, levels in lots.items() for level in levels.values()]

    def recall(self, lot: str, level: Level) -> None:
        """Before the start: a worker saw this. Of several the one that says less holds."""
        levels = self._recalled.setdefault(lot, {})
        known = levels.get(level.known.name)
        now_s = self._clock()
        if known is None or aged(level, now_s) < aged(known, now_s):
            levels[level.known.name] = level

    async def start(self) -> None:
        """Connect, in at most two seconds each; when that fails the local limiter decides until a probe succeeds."""
        await self._first.start()
        if self._refresh is not None:
            await asyncio.wait([self._refresh], timeout=CONNECT_TIMEOUT_S)

    def ask(self, takes: Sequence[Take]) -> asyncio.Future[Grant]:
        """Take all or none; the answer may be there already. Cancelled: nothing stays taken."""
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        if not takes:
            answer.set_result(_GRANTED)
        elif not self._slots:
            self._ask_first(Wish("", takes, (), answer))
        else:
            parts = _by_tag(takes)
            wishes = [Wish(tag, part, (), _part(answer, parts)) for tag, part in parts.items()]
            self._ask_cluster(wishes, answer)
        return answer

    async def take(self, takes: Sequence[Take]) -> Grant:
        """Take all or none."""
        return await self.ask(takes)

    async def hold(self, slots: Sequence[Slot]) -> Grant:
        """Hold all or none; cancelled: nothing stays held."""
        if not slots:
            return _GRANTED
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        if not self._slots:
            self._ask_first(Wish("", (), slots, answer))
        else:
            parts = _by_tag(slots)
            wishes = [Wish(tag, (), part, _part(answer, parts)) for tag, part in parts.items()]
            self._ask_cluster(wishes, answer)
        return await answer

    def refund(self, takes: Sequence[Take]) -> None:
        """Give back; lost when the server is away."""
        if not self._slots:
            self._first.refund("", takes)
            return
        for tag, part in _by_tag(takes).items():
            self._shard_of(tag).refund(tag, part)

    def release(self, slots: Sequence[Slot]) -> None:
        """Give slots back; what is lost ends with its time."""
        if not self._slots:
            self._first.release("", slots)
            return
        for tag, part in _by_tag(slots).items():
            self._shard_of(tag).release(tag, part)

    def call(self, tag: str, packed: bytes) -> asyncio.Future[Any]:
        """Call a function whose keys have this tag; the result is None when no server answered, and is never an error.

        Nobody repeats a call that was lost: it may have been done. The answer may be there already.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self._slots:
            self._ask_first(Wish("", (), (), answer, packed))
        else:
            self._shard_of(tag).ask(Wish(tag, (), (), answer, packed))
        return answer

    async def close(self) -> None:
        """Drop the connections; whoever waits is answered by the local limiter."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for shard in (self._first, *self._shards.values()):
            await shard.close()

    def _ask_first(self, wish: Wish) -> None:
        if self._first.is_cluster:
            # Whose slots nobody has told yet.
            self._first.answer_locally((wish,))
        else:
            self._first.ask(wish)

    # --- a cluster

    def _make_shard(self, address: _Address | None) -> Shard:
        return Shard(Link(self._server, address), self._tools, self._timeout_s, self._look_s)

    def _shard_of(self, tag: str) -> Shard:
        address = self._slots[slot_of_tag(tag)]
        return self._shards[address] if address is not None else self._first

    def _ask_cluster(self, wishes: list[Wish], answer: asyncio.Future[Grant]) -> None:
        if len(wishes) > 1:
            _Joint(self, wishes, answer)
        for wish in wishes:
            self._shard_of(wish.lot).ask(wish)

    def _moved(self, wishes: Sequence[Wish], error: ResponseError) -> None:
        """Send wishes to whom the error names; with none named, or after too many ways, the local share decides."""
        self._learn_topology()
        address = _named(error, self._server.host)
        if not isinstance(error, AskError) or address is None:
            self._first.answer_locally(wishes)
            return
        shard = self._shards.get(address)
        if isinstance(error, MovedError) and self._slots:
            self._slots[int(error.slot_id)] = address
        if shard is None:
            shard = self._add_shard(address)
        for wish in wishes:
            wish.hops += 1
            wish.asking = not isinstance(error, MovedError)
            if wish.hops > _MOST_HOPS:
                self._first.answer_locally((wish,))
            else:
                shard.ask(wish)

    def _add_shard(self, address: _Address) -> Shard:
        shard = self._shards[address] = self._make_shard(address)
        self._spawn(shard.start())
        return shard

    def _changed(self, shared: bool, reason: str) -> None:  # noqa: FBT001 - the signature of Tools.on_change
        if shared and self._first.is_cluster and not self._slots:
            self._learn_topology()
        if not shared and self._slots:
            self._learn_topology()
        if self._on_change is not None:
            self._on_change(shared, reason)

    def _learn_topology(self) -> None:
        if self._refresh is None and not self._closed:
            self._refresh = self._spawn(self._refresh_topology())
            self._refresh.add_done_callback(self._refreshed)

    def _refreshed(self, task: asyncio.Task[None]) -> None:
        del task
        self._refresh = None

    async def _refresh_topology(self) -> None:
        """Ask any server that answers until all slots are at servers that do; probes go on meanwhile."""
        rest_s = _TOPOLOGY_REST_S
        while not self._closed:
            slots = await self._ask_topology()
            if slots is not None:
                await self._use(slots)
                if self.shared:
                    return
            elif not self._slots:
                return
            await self._sleep(rest_s)
            rest_s = min(_LONGEST_TOPOLOGY_REST_S, rest_s * 2)

    async def _ask_topology(self) -> list[_Address | None] | None:
        for address in [*self._shards, None]:
            link = Link(self._server, address)
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await link.open()
                    return _slots(await link.command("CLUSTER", "SLOTS"), self._server.host)
            except (RedisError, OSError, TimeoutError, LookupError, TypeError, ValueError):
                continue
            finally:
                await link.drop()
        return None

    async def _use(self, slots: list[_Address | None]) -> None:
        addresses = {address for address in slots if address is not None}
        fresh = [self._make_fresh(address) for address in addresses if address not in self._shards]
        await asyncio.gather(*(shard.start() for shard in fresh))
        self._slots = slots
        for address in set(self._shards) - addresses:
            self._spawn(self._shards.pop(address).close())

    def _make_fresh(self, address: _Address) -> Shard:
        shard = self._shards[address] = self._make_shard(address)
        return shard

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Joint:
    """A wish in parts: granted when all are, else what was granted is given back."""

    __slots__ = ("_answer", "_left", "_limiter", "_wishes")

    def __init__(self, limiter: RedisLimiter, wishes: list[Wish], answer: asyncio.Future[Grant]) -> None:
        self._limiter = limiter
        self._wishes = wishes
        self._answer = answer
        self._left = len(wishes)
        for wish in wishes:
            wish.answer.add_done_callback(self._answered)

    def _answered(self, _: asyncio.Future[Grant]) -> None:
        self._left -= 1
        if self._left:
            return
        grants = [wish.answer.result() for wish in self._wishes]
        refusals = [grant for grant in grants if not grant.allowed]
        if refusals or self._answer.cancelled():
            for wish, grant in zip(self._wishes, grants, strict=True):
                if grant.allowed:
                    self._give_back(wish)
        if self._answer.done():
            return
        if refusals:
            self._answer.set_result(max(refusals, key=lambda grant: grant.wait_s))
        else:
            self._answer.set_result(_GRANTED._replace(local=any(grant.local for grant in grants)))

    def _give_back(self, wish: Wish) -> None:
        if wish.slots:
            self._limiter.release(wish.slots)
        else:
            self._limiter.refund(wish.takes)


def _part(answer: asyncio.Future[Grant], parts: dict[str, Any]) -> asyncio.Future[Grant]:
    return answer if len(parts) == 1 else asyncio.get_running_loop().create_future()


def _by_tag(items: Sequence[Any]) -> dict[str, list[Any]]:
    parts: dict[str, list[Any]] = {}
    for item in items:
        parts.setdefault(item.tag, []).append(item)
    return parts


def _named(error: ResponseError, own_host: str) -> _Address | None:
    if isinstance(error, AskError):
        with contextlib.suppress(ValueError):
            return (error.host or own_host, int(error.port))
    return None


def _slots(answer: Sequence[Any], own_host: str) -> list[_Address | None]:
    """Return who keeps each slot, by the answer to CLUSTER SLOTS."""
    slots: list[_Address | None] = [None] * 16_384
    for first, last, (host, port, *_), *_replicas in answer:
        address = (host.decode() or own_host, int(port))
        slots[first : last + 1] = [address] * (last - first + 1)
    return slots
