"""Submission keys in Redis, on one server and on a cluster: who has one, for how long, and when nobody answers."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

from dataplane.adapters.claims_redis import RedisClaims
from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.adapters.limiter_wire import slot_of_tag
from dataplane.core.limits import server_key
from dataplane.ports import Claim, Claimed, Take
from postroad.localstack import ValkeyServer
from support.spools import make_id
from support.valkey_cluster import SIZE, ValkeyCluster

PATIENT_S = 5.0
KEY, OTHER_KEY = sha256(b"a key").digest(), sha256(b"another key").digest()
CONTENT, OTHER_CONTENT = sha256(b"a content").digest(), sha256(b"another content").digest()
UNKNOWN = Claim(Claimed.UNKNOWN)
SHORT = Take("messages", "a:accounts/demo", 10, 1.0, 1)
DOCUMENT = Path(__file__).parents[2] / "docs" / "limits.md"
DAY_MS = 24 * 3_600_000


class Fleet(NamedTuple):
    """Two workers, and the servers that both ask."""

    one: RedisClaims
    other: RedisClaims
    limiters: tuple[RedisLimiter, RedisLimiter]
    servers: list[redis.Redis]

    def left_ms(self, key_hash: bytes) -> int:
        """For how long a key is taken; less than 0 when it is not."""
        found = [int(server.pttl(name_of(key_hash))) for server in self.servers if server.exists(name_of(key_hash))]
        return found[0] if found else -1


def name_of(key_hash: bytes) -> str:
    return server_key(f"i:{key_hash.hex()}", "")


Start = Callable[..., Awaitable[RedisLimiter]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts limiters, and closes them whatever the test comes to: uvloop waits for ever for an open transport."""
    limiters: list[RedisLimiter] = []

    async def start(url: str, timeout_s: float = PATIENT_S) -> RedisLimiter:
        limiter = RedisLimiter(url, LocalLimiter(lambda: 0.0), timeout_s=timeout_s)
        limiters.append(limiter)
        await limiter.start()
        return limiter

    yield start
    for limiter in limiters:
        await limiter.close()


@pytest.fixture(params=["server", "cluster"])
async def fleet(request: pytest.FixtureRequest, start: Start) -> AsyncIterator[Fleet]:
    if request.param == "server":
        url = request.getfixturevalue("valkey_url")
        urls, servers = [url, url], [redis.Redis.from_url(url)]
    else:
        cluster: ValkeyCluster = request.getfixturevalue("valkey_cluster")
        urls, servers = [cluster.url(0), cluster.url(1)], [_own(cluster, number) for number in range(SIZE)]
    limiters = (await start(urls[0]), await start(urls[1]))
    yield Fleet(RedisClaims(limiters[0]), RedisClaims(limiters[1]), limiters, servers)
    for server in servers:
        server.close()


class _Home(redis.Redis):
    """A client of one server of a cluster, to which keys of others do not exist."""

    def exists(self, name: str) -> bool:  # type: ignore[override]  # one key is all that is asked for
        try:
            return bool(super().exists(name))
        except redis.ResponseError:
            return False


def _own(cluster: ValkeyCluster, number: int) -> redis.Redis:
    return _Home.from_url(cluster.url(number))


async def told(fleet: Fleet) -> None:
    """Return when what was told before has arrived: answers come in the order of the calls."""
    for claims, key in itertools.product((fleet.one, fleet.other), (KEY, OTHER_KEY)):
        await claims._call("postroad_withdraw_1", key, "nobody")


# --- who has a key ---


async def test_the_first_has_the_key_for_five_minutes(fleet: Fleet) -> None:
    assert await fleet.one.claim(KEY, CONTENT, make_id()) == Claim(Claimed.YES)
    assert 290_000 < fleet.left_ms(KEY) <= 300_000


async def test_another_worker_finds_it_pending_and_another_content_refused(fleet: Fleet) -> None:
    await fleet.one.claim(KEY, CONTENT, make_id())
    assert await fleet.other.claim(KEY, CONTENT, make_id()) == Claim(Claimed.PENDING)
    assert await fleet.other.claim(KEY, OTHER_CONTENT, make_id()) == Claim(Claimed.OTHER)
    assert await fleet.other.claim(OTHER_KEY, CONTENT, make_id()) == Claim(Claimed.YES)


async def test_what_is_stored_answers_with_its_id_for_a_day(fleet: Fleet) -> None:
    message_id = make_id()
    await fleet.one.claim(KEY, CONTENT, message_id)
    fleet.one.stored(KEY, CONTENT, message_id)
    await told(fleet)
    assert await fleet.other.claim(KEY, CONTENT, make_id()) == Claim(Claimed.STORED, message_id)
    assert await fleet.one.claim(KEY, CONTENT, make_id()) == Claim(Claimed.STORED, message_id)
    assert await fleet.other.claim(KEY, OTHER_CONTENT, make_id()) == Claim(Claimed.OTHER)
    assert DAY_MS - 60_000 < fleet.left_ms(KEY) <= DAY_MS


async def test_of_many_at_once_one_has_the_key(fleet: Fleet) -> None:
    claims = [claims.claim(KEY, CONTENT, make_id()) for claims in (fleet.one, fleet.other) for _ in range(20)]
    states = [claim.state for claim in await asyncio.gather(*claims)]
    assert sorted(states, key=lambda state: state.value) == [Claimed.YES] + [Claimed.PENDING] * 39


async def test_the_same_message_may_ask_again(fleet: Fleet) -> None:
    message_id = make_id()
    assert await fleet.one.claim(KEY, CONTENT, message_id) == Claim(Claimed.YES)
    assert await fleet.one.claim(KEY, CONTENT, message_id) == Claim(Claimed.YES)


async def test_what_was_not_stored_gives_its_key_free(fleet: Fleet) -> None:
    message_id = make_id()
    await fleet.one.claim(KEY, CONTENT, message_id)
    fleet.one.withdraw(KEY, message_id)
    await told(fleet)
    assert fleet.left_ms(KEY) < 0
    assert await fleet.other.claim(KEY, OTHER_CONTENT, make_id()) == Claim(Claimed.YES)


async def test_nobody_gives_free_or_takes_over_what_another_has(fleet: Fleet) -> None:
    first, second = make_id(), make_id()
    await fleet.one.claim(KEY, CONTENT, first)
    fleet.other.withdraw(KEY, second)
    fleet.other.stored(KEY, CONTENT, second)
    await told(fleet)
    assert await fleet.other.claim(KEY, CONTENT, second) == Claim(Claimed.PENDING)
    fleet.one.stored(KEY, CONTENT, first)
    fleet.one.withdraw(KEY, first)
    await told(fleet)
    assert await fleet.other.claim(KEY, CONTENT, second) == Claim(Claimed.STORED, first)


async def test_a_claim_that_nobody_ended_ends_by_itself(fleet: Fleet) -> None:
    brief = RedisClaims(fleet.limiters[0], pending_ms=20)
    assert await brief.claim(KEY, CONTENT, make_id()) == Claim(Claimed.YES)
    async with asyncio.timeout(20):
        while await fleet.other.claim(KEY, CONTENT, make_id()) != Claim(Claimed.YES):
            pass


async def test_a_message_whose_claim_was_lost_is_noted_as_stored_all_the_same(fleet: Fleet) -> None:
    message_id = make_id()
    await fleet.one.claim(KEY, CONTENT, message_id)
    for server in fleet.servers:
        server.flushall()
    fleet.one.stored(KEY, CONTENT, message_id)
    await told(fleet)
    assert await fleet.other.claim(KEY, CONTENT, make_id()) == Claim(Claimed.STORED, message_id)


async def test_what_lies_there_and_is_none_of_ours_is_nobodys(fleet: Fleet) -> None:
    home = next(server for server in fleet.servers if _may_set(server))
    assert home.get(name_of(KEY)) == b"something else"
    assert await fleet.one.claim(KEY, CONTENT, make_id()) == Claim(Claimed.YES)


def _may_set(server: redis.Redis) -> bool:
    try:
        return bool(server.set(name_of(KEY), "something else"))
    except redis.ResponseError:
        return False


# --- what it costs and needs ---


async def test_claims_of_one_turn_leave_with_what_limits_ask(valkey_url: str, start: Start) -> None:
    limiter = await start(valkey_url)
    claims, shard = RedisClaims(limiter), limiter._first
    rounds: list[int] = []
    exchange = shard.link.exchange

    async def counted(calls: Sequence[bytes]) -> list[Any]:
        rounds.append(len(calls))
        return await exchange(calls)

    shard.link.exchange = counted  # type: ignore[method-assign]  # looked at from outside
    keys = [sha256(b"%d" % number).digest() for number in range(10)]
    await asyncio.gather(limiter.ask([SHORT]), *(claims.claim(key, CONTENT, make_id()) for key in keys))
    assert rounds == [11]


@pytest.mark.parametrize("where", ["server", "cluster"])
async def test_a_user_with_the_rights_that_are_documented_is_enough(
    request: pytest.FixtureRequest, start: Start, where: str
) -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition("ACL SETUSER node")[2].partition("Without")[0]
    rights = [word for word in text.split() if word.startswith(("+", "~"))]
    if where == "server":
        url = request.getfixturevalue("valkey_url")
        servers: list[Any] = [redis.Redis.from_url(url)]
    else:
        cluster: ValkeyCluster = request.getfixturevalue("valkey_cluster")
        url, servers = cluster.url(), [cluster.client(number) for number in range(SIZE)]
        rights += ["+cluster|slots", "+asking"]
    for server in servers:
        server.execute_command("ACL", "SETUSER", "node", "on", ">secret", *rights)
    limiter = await start(_as_user(url, "node:secret"))
    claims = RedisClaims(limiter)
    for number in range(9):
        key, message_id = sha256(b"%d" % number).digest(), make_id()
        assert await claims.claim(key, CONTENT, message_id) == Claim(Claimed.YES)
        claims.withdraw(key, message_id)
        assert await claims.claim(key, CONTENT, message_id) == Claim(Claimed.YES)
        claims.stored(key, CONTENT, message_id)
        assert await claims.claim(key, CONTENT, make_id()) == Claim(Claimed.STORED, message_id)
    for server in servers:
        server.execute_command("ACL", "DELUSER", "node")
        server.close()


def _as_user(url: str, login: str) -> str:
    return f"redis://{login}@{url.rpartition('@')[2].removeprefix('redis://')}"


async def test_a_library_that_is_too_old_and_may_not_be_replaced_leaves_limits_shared(
    valkey_url: str, start: Start
) -> None:
    limiter = await start(valkey_url)
    with redis.Redis.from_url(valkey_url) as client:
        code = client.function_list(withcode=True)[0][-1].decode()
        client.function_load(code.replace("redis.register_function('postroad_claim_1', claim)", ""), replace=True)
        client.execute_command(
            "ACL", "SETUSER", "node", "on", ">secret", "~postroad:*", "+fcall", "+time", "+get", "+set"
        )
    limiter = await start(_as_user(valkey_url, "node:secret"))
    assert await RedisClaims(limiter).claim(KEY, CONTENT, make_id()) == UNKNOWN
    assert not (await limiter.take([SHORT])).local
    assert limiter.counters.trips == 0
    with redis.Redis.from_url(valkey_url) as client:
        client.execute_command("ACL", "DELUSER", "node")


async def test_a_library_that_is_too_old_is_replaced(valkey_url: str, start: Start) -> None:
    limiter = await start(valkey_url)
    with redis.Redis.from_url(valkey_url) as client:
        code = client.function_list(withcode=True)[0][-1].decode()
        client.function_load(code.replace("redis.register_function('postroad_claim_1', claim)", ""), replace=True)
    assert await RedisClaims(limiter).claim(KEY, CONTENT, make_id()) == Claim(Claimed.YES)


# --- when nobody answers ---


async def test_without_a_server_nothing_is_known_and_nothing_raises(start: Start) -> None:
    limiter = await start("redis://127.0.0.1:1/0")
    claims, message_id = RedisClaims(limiter), make_id()
    assert await claims.claim(KEY, CONTENT, message_id) == UNKNOWN
    claims.stored(KEY, CONTENT, message_id)
    claims.withdraw(KEY, message_id)
    assert limiter.counters.local == 0, "a claim is no decision about a limit"


async def test_a_server_that_falls_silent_is_given_up_and_claims_are_unknown(
    valkey_server: ValkeyServer, valkey_url: str, start: Start
) -> None:
    limiter = await start(valkey_url, timeout_s=0.03)
    claims = RedisClaims(limiter)
    assert valkey_server.pid is not None
    os.kill(valkey_server.pid, signal.SIGSTOP)
    try:
        assert await claims.claim(KEY, CONTENT, make_id()) == UNKNOWN
        assert await claims.claim(KEY, CONTENT, make_id()) == UNKNOWN
        assert limiter.counters.trips == 1
    finally:
        os.kill(valkey_server.pid, signal.SIGCONT)


async def test_a_limiter_that_is_closed_answers_who_still_waits(valkey_url: str, start: Start) -> None:
    limiter = await start(valkey_url)
    claim = RedisClaims(limiter).claim(KEY, CONTENT, make_id())
    await limiter.close()
    assert await claim == UNKNOWN


async def test_a_slot_that_moves_takes_its_claims_along(valkey_cluster: ValkeyCluster, start: Start) -> None:
    key, slot = next(
        (key, slot)
        for key in (sha256(b"%d" % number).digest() for number in range(100))
        if valkey_cluster.server_of(slot := slot_of_tag(f"i:{key.hex()}")) == 0
    )
    limiter = await start(valkey_cluster.url())
    claims, message_id = RedisClaims(limiter), make_id()
    try:
        await claims.claim(key, CONTENT, message_id)
        valkey_cluster.begin_move(slot, 1)
        assert await claims.claim(key, CONTENT, make_id()) == Claim(Claimed.PENDING)
        claims.stored(key, CONTENT, message_id)
        assert await claims.claim(key, CONTENT, make_id()) == Claim(Claimed.STORED, message_id)
        valkey_cluster.end_move(slot, 1)
        assert await claims.claim(key, CONTENT, make_id()) == Claim(Claimed.STORED, message_id)
    finally:
        valkey_cluster.restore(slot)
