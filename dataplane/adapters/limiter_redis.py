"""Token buckets in Redis or Valkey, shared by all nodes: one round trip for all that a turn of the loop asks.

Contract. A `Limiter` of `dataplane.ports`: `take` never raises. A call that the server does not answer in
`timeout_s` (30 ms) is given up, and the local limiter decides, with its share of each limit.

    state   how it is left                                       a take is decided by
    local   a probe in the background connects, makes sure of    the local limiter, at once
            the function and calls it: then shared
    shared  an error, or an answer that takes too long: the      the server; by the local limiter for those whose
            connection is dropped, then local                    call failed
    closed  never                                                the local limiter

Probes come after 0.1 s, doubling up to 5 s. Nothing is kept for later: a take that was decided is never sent again.
One task owns the connection and reads every answer to what it wrote, so that a caller who is cancelled neither
shifts the answers of others nor is charged when its call had not left yet.

The buckets are made by `core/limiter_functions.lua`, which the node loads when the server says that a function is
missing (it is new, restarted, or was flushed); where the node's user may not, the local share decides. All takes of a batch go
in one call, which a cluster refuses; keys carry their tag in braces all the same, so that they stay when a cluster
comes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from dataplane.adapters.limiter_local import MICRO, LocalLimiter, micro_take
from dataplane.core.limits import server_key
from dataplane.ports import Grant, Take

FUNCTION_NAME = "postroad_take_1"

_MAX_BATCH = 64
_FIRST_PROBE_S = 0.1
_LONGEST_PROBE_S = 5.0
_CONNECT_TIMEOUT_S = 2.0
_GRANTED = Grant(allowed=True, wait_s=0.0, refused_key="", local=False)


def function_library() -> str:
    """Return the source of the functions."""
    return files("dataplane.core").joinpath("limiter_functions.lua").read_text(encoding="utf-8")


def redis_key(take: Take) -> str:
    """Return the key of the bucket."""
    return server_key(take.tag, take.key)


class _Wish(NamedTuple):
    takes: Sequence[Take]
    answer: asyncio.Future[Grant]


class RedisLimiter:
    """See the module.

    `on_change` hears each change between shared (True) and local (False), with the reason. `sleep` waits between
    probes; tests give their own.
    """

    def __init__(
        self,
        url: str,
        local: LocalLimiter,
        *,
        on_change: Callable[[bool, str], None] | None = None,
        timeout_s: float = 0.03,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """ValueError for a URL that redis-py does not know."""
        # Only makes connections: retries are off, since a call that was repeated would be charged twice, and nothing
        # but AUTH is sent before ours, so that an ACL which allows FCALL only is enough.
        self._pool = ConnectionPool.from_url(
            url,
            protocol=2,
            driver_info=None,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
        )
        self._local = local
        self._on_change = on_change
        self._timeout_s = timeout_s
        self._sleep = sleep
        self._connection: AbstractConnection | None = None
        self._pending: list[_Wish] = []
        self._sender: asyncio.Task[None] | None = None
        self._probe: asyncio.Task[None] | None = None
        self._probe_delay_s = _FIRST_PROBE_S
        self._closed = False
        self.local_count = 0
        self.trip_count = 0

    @property
    def shared(self) -> bool:
        """Whether the server decides."""
        return self._connection is not None

    async def start(self) -> None:
        """Connect, in at most two seconds; when that fails the local limiter decides until a probe succeeds."""
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await self._connect()
        except (RedisError, OSError, TimeoutError) as error:
            self._begin_probing(error)

    async def take(self, takes: Sequence[Take]) -> Grant:
        """Take all or none. Cancelled before the call left: nothing is taken; later, it may be."""
        if not takes:
            return _GRANTED
        if self._connection is None:
            if self._probe is None and not self._closed:
                self._begin_probing(None)
            return self._take_locally(takes)
        loop = asyncio.get_running_loop()
        wish = _Wish(takes, loop.create_future())
        self._pending.append(wish)
        if self._sender is None:
            # Begins in the loop's next turn: by then all that this turn asks has gathered.
            self._sender = loop.create_task(self._send_pending())
        return await wish.answer

    async def close(self) -> None:
        """Drop the connection; whoever waits is answered by the local limiter."""
        self._closed = True
        tasks = [task for task in (self._probe, self._sender) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._answer_locally(self._pending)
        self._pending = []
        with contextlib.suppress(RedisError, OSError):
            await self._drop_connection(nowait=False)

    def _take_locally(self, takes: Sequence[Take]) -> Grant:
        self.local_count += 1
        return self._local.take_now(takes)

    def _answer_locally(self, wishes: Sequence[_Wish]) -> None:
        for wish in wishes:
            if not wish.answer.done():
                wish.answer.set_result(self._take_locally(wish.takes))

    async def _send_pending(self) -> None:
        """Send batches until nothing is left; what gathers while one is on its way makes the next."""
        try:
            while self._pending:
                batch = [wish for wish in self._pending[:_MAX_BATCH] if not wish.answer.done()]
                del self._pending[:_MAX_BATCH]
                if batch:
                    await self._send(batch)
        finally:
            self._sender = None

    async def _send(self, batch: Sequence[_Wish]) -> None:
        try:
            if self._connection is not None:
                async with asyncio.timeout(self._timeout_s):
                    answers = await _call_surely(self._connection, batch)
                for wish, wait_us, refused in zip(batch, answers[::2], answers[1::2], strict=True):
                    if not wish.answer.done():
                        wish.answer.set_result(_grant(wish.takes, wait_us, refused))
        except (RedisError, OSError, TimeoutError, LookupError, TypeError, ValueError) as error:
            # The last three: an answer that is none of ours.
            self.trip_count += 1
            await self._drop_connection()
            self._begin_probing(error)
        finally:
            self._answer_locally(batch)

    async def _connect(self) -> None:
        """Make a connection that has proved itself; on failure there is none."""
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call] # redis-py's
        try:
            await connection.connect()  # type: ignore[no-untyped-call] # as above
            await _call_surely(connection, [])
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._connection = connection
        self._probe_delay_s = _FIRST_PROBE_S
        self._tell(shared=True, reason="")

    async def _drop_connection(self, *, nowait: bool = True) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=nowait)

    def _begin_probing(self, error: BaseException | None) -> None:
        if error is not None:
            self._tell(shared=False, reason=f"{type(error).__name__}: {error}"[:200])
        if self._probe is None and not self._closed:
            self._probe = asyncio.get_running_loop().create_task(self._probe_until_shared())

    async def _probe_until_shared(self) -> None:
        try:
            while self._connection is None:
                await self._sleep(self._probe_delay_s)
                self._probe_delay_s = min(_LONGEST_PROBE_S, self._probe_delay_s * 2)
                try:
                    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                        await self._connect()
                except (RedisError, OSError, TimeoutError):
                    continue
        finally:
            self._probe = None

    def _tell(self, *, shared: bool, reason: str) -> None:
        if self._on_change is not None:
            self._on_change(shared, reason)


async def _call_surely(connection: AbstractConnection, batch: Sequence[_Wish]) -> list[int]:
    """Call, and load the function where it is missing."""
    try:
        return await _call(connection, batch)
    except ResponseError as error:
        # Refused as a whole, so that it may be sent again.
        if not _is_function_missing(error):
            raise
    await _command(connection, "FUNCTION", "LOAD", "REPLACE", function_library())
    return await _call(connection, batch)


async def _call(connection: AbstractConnection, batch: Sequence[_Wish]) -> list[int]:
    buckets: dict[str, int] = {}
    sizes: list[int] = []
    groups: list[int] = []
    for wish in batch:
        groups.append(len(wish.takes))
        for take in wish.takes:
            key = redis_key(take)
            number = buckets.get(key)
            if number is None:
                number = buckets[key] = len(buckets) + 1
                sizes += micro_take(take)[:2]
            groups += (number, max(0, take.cost))
    arguments = ("", len(buckets), *sizes, *groups)
    refusals = await _command(
        connection, "FCALL", FUNCTION_NAME, len(buckets) + 1, "postroad:epoch", *buckets, *arguments
    )
    answers = [0] * (2 * len(batch))
    for at in range(1, len(refusals), 3):
        group, wait_us, refused = refusals[at : at + 3]
        answers[2 * group - 2 : 2 * group] = (wait_us, refused)
    return answers


async def _command(connection: AbstractConnection, *words: str | int) -> Any:
    await connection.send_command(*words, check_health=False)
    # Cancelled or failed while reading, redis-py closes the connection: no answer is left behind for the next.
    return await connection.read_response()


def _grant(takes: Sequence[Take], wait_us: int, refused: int) -> Grant:
    if not refused:
        return _GRANTED
    return Grant(allowed=False, wait_s=wait_us / MICRO, refused_key=takes[refused - 1].key, local=False)


def _is_function_missing(error: ResponseError) -> bool:
    return "function not found" in str(error).lower()
