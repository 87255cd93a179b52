"""How long anybody waits for Redis: once, then not at all for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from controlplane.adapters.redis.functions import RedisAwayError, RedisFunctions


class Server:
    """Work for `within`, that counts how often it is begun."""

    def __init__(self) -> None:
        self.asked = 0
        self.error: Exception | None = None
        self.hangs = False

    async def ask(self) -> str:
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return "answer"


class Fixture:
    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.heard: list[str] = []
        self.server = Server()
        self.functions = RedisFunctions(
            "redis://:hunter2@127.0.0.1:1/0", timeout_s=0.01, clock=lambda: self.now_s, on_change=self.heard.append
        )

    async def ask(self) -> str:
        return await self.functions.within(self.server.ask)


@pytest.fixture
async def redis() -> AsyncIterator[Fixture]:
    fixture = Fixture()
    yield fixture
    await fixture.functions.close()


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_server_that_failed_is_left_alone_for_two_seconds(redis: Fixture, *, hangs: bool) -> None:
    redis.server.hangs, redis.server.error = hangs, RedisConnectionError("refused")
    for _ in range(3):
        with pytest.raises(RedisAwayError, match="10 ms" if hangs else "refused"):
            await redis.ask()
    assert redis.server.asked == 1
    redis.now_s += 1.9
    with pytest.raises(RedisAwayError):
        await redis.ask()
    assert redis.server.asked == 1
    redis.now_s += 0.2
    redis.server.hangs, redis.server.error = False, None
    assert await redis.ask() == "answer"
    assert redis.server.asked == 2


async def test_going_away_and_coming_back_are_told_once(redis: Fixture) -> None:
    assert await redis.ask() == "answer"
    redis.server.error = RedisConnectionError("refused")
    for _ in range(3):
        with pytest.raises(RedisAwayError):
            await redis.ask()
        redis.now_s += 3
    redis.server.error = None
    for _ in range(2):
        await redis.ask()
    assert redis.heard == ["ConnectionError: refused", ""]


async def test_the_password_is_in_no_text(redis: Fixture) -> None:
    redis.server.error = None
    with pytest.raises(RedisAwayError) as caught:
        await redis.functions.within(lambda: redis.functions.call("a:b", "f", ["k"], [], only_looks=True))
    assert "hunter2" not in str(caught.value) + repr(redis.heard)


async def test_cancelling_a_caller_is_no_failure_of_the_server(redis: Fixture) -> None:
    redis.server.hangs = True
    asking = asyncio.ensure_future(redis.ask())
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    redis.server.hangs = False
    assert await redis.ask() == "answer"
    assert redis.heard == []
