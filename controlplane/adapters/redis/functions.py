"""Calls of the library of limits in Redis or Valkey, cluster or not, that never make a caller wait for long.

Contract. `RedisFunctions(url).call(tag, …)` runs a function of `dataplane/core/limiter_functions.lua` with keys of one
tag on the server that has them, and loads the library where it is missing. Calls run inside `within`: RedisAwayError
when there is no answer within `timeout_s`, and at once for two seconds after that. A call is never repeated once it may
have been carried out. A cluster is known by its answers: MOVED says where a slot lies, and is remembered until that
server fails. Cancelling a call closes its connection, so that no answer is left behind for the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import MovedError, RedisError, ResponseError

Answer = TypeVar("Answer")

_AWAY_S = 2.0
_CONNECTIONS = 8
_MOST_MOVES = 3

_Address = tuple[str, int]


class RedisAwayError(Exception):
    """Redis did not answer, in time or at all; the text says how, without the server's password."""


class RedisFunctions:
    """See the module. `on_change` hears when Redis goes away (with the reason) and comes back (with none)."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        """ValueError for a URL that redis-py does not know."""
        # Nothing but AUTH is sent before a call, so that an ACL which allows calls only is enough.
        self._home = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=None,
            protocol=2,
            driver_info=None,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=None,
        )
        self._timeout_s = timeout_s
        self._clock = clock
        self._on_change = on_change
        self._client_home = Redis(connection_pool=self._home)
        self._clients: dict[_Address, Redis] = {}
        self._moved: dict[int, _Address] = {}
        self._away_until = 0.0
        self._reason = ""

    async def within(self, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """Run `work`, which consists of calls, in the time that one call has; RedisAwayError."""
        if self._clock() < self._away_until:
            raise RedisAwayError(self._reason)
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await work()
        except TimeoutError as error:
            raise self._away(f"no answer in {self._timeout_s * 1000:.0f} ms") from error
        except (RedisError, OSError) as error:
            raise self._away(f"{type(error).__name__}: {error}"[:200]) from error
        if self._reason:
            self._reason = ""
            self._on_change("")
        return answer

    async def call(
        self, tag: str, function: str, keys: Sequence[str], arguments: Sequence[str | int], *, only_looks: bool
    ) -> Any:
        """Call inside `within`; all keys have this tag."""
        words = ("FCALL_RO" if only_looks else "FCALL", function, len(keys), *keys, *arguments)
        slot = key_slot(tag.encode())
        for _ in range(_MOST_MOVES):
            address = self._moved.get(slot)
            try:
                return await self._surely(self._client(address), words)
            except MovedError as error:
                self._moved[slot] = (error.host or self._home.connection_kwargs.get("host", ""), error.port)
            except BaseException:
                self._moved.pop(slot, None)
                raise
        raise ResponseError("the cluster sends us round in circles")

    async def close(self) -> None:
        """Drop every connection."""
        for client in (self._client_home, *self._clients.values()):
            await client.aclose()
            await client.connection_pool.disconnect()

    async def _surely(self, client: Redis, words: tuple[str | int, ...]) -> Any:
        try:
            return await _command(client, *words)
        except ResponseError as error:
            # Refused as a whole, so that it may be sent again.
            if "function not found" not in str(error).lower():
                raise
        library = files("dataplane.core").joinpath("limiter_functions.lua").read_text(encoding="utf-8")
        await _command(client, "FUNCTION", "LOAD", "REPLACE", library)
        return await _command(client, *words)

    def _client(self, address: _Address | None) -> Redis:
        if address is None:
            return self._client_home
        if address not in self._clients:
            pool = BlockingConnectionPool(
                connection_class=self._home.connection_class,
                max_connections=_CONNECTIONS,
                timeout=None,
                **{**self._home.connection_kwargs, "host": address[0], "port": address[1]},
            )
            self._clients[address] = Redis(connection_pool=pool)
        return self._clients[address]

    def _away(self, reason: str) -> RedisAwayError:
        self._away_until = self._clock() + _AWAY_S
        if not self._reason:
            self._on_change(reason)
        self._reason = reason
        return RedisAwayError(reason)


async def _command(client: Redis, *words: str | int) -> Any:
    return await client.execute_command(*words)  # type: ignore[no-untyped-call] # redis-py's
