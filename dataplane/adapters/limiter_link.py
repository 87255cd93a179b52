"""One connection to one Redis server: packed calls go out in one write, their answers come back in order.

Contract. `open` makes a connection that has proved that the library is there, loading it where it is missing; whoever
fails raises RedisError, OSError or TimeoutError and leaves nothing open. `exchange` returns an answer for each call,
an error of the server as a value. Cancelled or failed while reading, the connection is closed: no answer is left behind
for the next caller.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ClusterCrossSlotError, RedisError, ResponseError

from dataplane.adapters.limiter_wire import CLUSTER_PROBE, PROBE, function_library, pack_command

CONNECT_TIMEOUT_S = 2.0


class Server:
    """How to reach the server of a URL, and others of its cluster. ValueError for a URL that redis-py does not know."""

    def __init__(self, url: str) -> None:
        # Only makes connections: retries are off, since a call that was repeated would be charged twice, and nothing
        # but AUTH is sent before ours, so that an ACL which allows FCALL only is enough.
        self._pool = ConnectionPool.from_url(
            url,
            protocol=2,
            driver_info=None,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
        )

    @property
    def host(self) -> str:
        """The host of the URL; empty for a Unix socket."""
        return str(self._pool.connection_kwargs.get("host", ""))

    def connection(self, address: tuple[str, int] | None) -> AbstractConnection:
        """Return a connection that is not open yet, to another address where one is given."""
        options = dict(self._pool.connection_kwargs)
        if address is not None:
            options["host"], options["port"] = address
        made: AbstractConnection = self._pool.connection_class(**options)
        return made


class Link:
    """See the module. `address` is that of a server of a cluster; None for the one that the URL names."""

    def __init__(self, server: Server, address: tuple[str, int] | None) -> None:
        self._server = server
        self._address = address
        self._connection: AbstractConnection | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls may be sent."""
        return self._connection is not None

    async def open(self) -> bool:
        """Connect. Returns whether the server belongs to a cluster."""
        connection = self._server.connection(self._address)
        try:
            await connection.connect()  # type: ignore[no-untyped-call] # redis-py's
            _raise_error(await _exchange_surely(connection, [PROBE]))
            (refusal,) = await _exchange(connection, [CLUSTER_PROBE])
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._connection = connection
        return isinstance(refusal, ClusterCrossSlotError)

    async def exchange(self, calls: Sequence[bytes]) -> list[Any]:
        """Call and return the answers; where the library is missing it is loaded and those calls repeated."""
        if self._connection is None:
            raise ConnectionError("the connection was dropped")
        return await _exchange_surely(self._connection, calls)

    async def command(self, *words: str) -> Any:
        """Send any command; an error of the server is raised."""
        if self._connection is None:
            raise ConnectionError("the connection was dropped")
        answers = await _exchange(self._connection, [pack_command(*words)])
        _raise_error(answers)
        return answers[0]

    async def drop(self, *, nowait: bool = True) -> None:
        """Close the connection; `nowait` without a goodbye."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(RedisError, OSError):
                await connection.disconnect(nowait=nowait)


async def _exchange_surely(connection: AbstractConnection, calls: Sequence[bytes]) -> list[Any]:
    answers = await _exchange(connection, calls)
    # A call of a function that is missing was refused as a whole, so that it may be sent again.
    missing = [number for number, answer in enumerate(answers) if _is_function_missing(answer)]
    if missing:
        load = pack_command("FUNCTION", "LOAD", "REPLACE", function_library())
        loaded, *repeated = await _exchange(connection, [load, *(calls[number] for number in missing)])
        for number, answer in zip(missing, repeated, strict=True):
            # Who may not load gives what is missing up, not what is there.
            answers[number] = loaded if isinstance(loaded, ResponseError) else answer
    return answers


async def _exchange(connection: AbstractConnection, calls: Sequence[bytes]) -> list[Any]:
    await connection.send_packed_command(calls, check_health=False)
    answers = []
    for _ in calls:
        try:
            answers.append(await connection.read_response())
        except ResponseError as error:
            answers.append(error)
    return answers


def _raise_error(answers: Sequence[Any]) -> None:
    for answer in answers:
        if isinstance(answer, ResponseError):
            raise answer


def _is_function_missing(answer: object) -> bool:
    return isinstance(answer, ResponseError) and "function not found" in str(answer).lower()
