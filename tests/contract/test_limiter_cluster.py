"""What the shared limiter does in a cluster: slots that move, servers that are gone, buckets that are lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.adapters.limiter_wire import slot_of_tag
from dataplane.ports import Grant, Slot, Take
from support.valkey_cluster import SIZE, ValkeyCluster

PATIENT_S = 5.0
DOCUMENT = Path(__file__).parents[2] / "docs" / "limits.md"


def bucket(tag: str, *, cost: int = 1, rate_per_s: float = 0.001) -> Take:
    return Take("messages", tag, 12, rate_per_s, cost)


def tag_at(cluster: ValkeyCluster, number: int) -> str:
    """A tag whose keys lie on this server."""
    names = (f"a:account-{count}" for count in range(1_000))
    return next(name for name in names if cluster.server_of(slot_of_tag(name)) == number)


@pytest.fixture
def tags(valkey_cluster: ValkeyCluster) -> list[str]:
    return [tag_at(valkey_cluster, number) for number in range(SIZE)]


@pytest.fixture
async def limiter(valkey_cluster: ValkeyCluster) -> AsyncIterator[RedisLimiter]:
    limiter = RedisLimiter(valkey_cluster.url(), LocalLimiter(lambda: 0.0, lambda: 4), timeout_s=PATIENT_S)
    await limiter.start()
    yield limiter
    await limiter.close()


@pytest.fixture
def moved(valkey_cluster: ValkeyCluster, tags: list[str]) -> Iterator[int]:
    """The slot of the first tag, brought back to its server in the end."""
    slot = slot_of_tag(tags[0])
    yield slot
    valkey_cluster.restore(slot)


async def allowed(limiter: RedisLimiter, wish: Take, most: int = 40) -> list[Grant]:
    return [await limiter.take([wish]) for _ in range(most)]


async def test_any_server_of_the_cluster_shows_the_way(valkey_cluster: ValkeyCluster, tags: list[str]) -> None:
    for number in range(SIZE):
        limiter = RedisLimiter(valkey_cluster.url(number), LocalLimiter(lambda: 0.0), timeout_s=PATIENT_S)
        await limiter.start()
        for tag in tags:
            assert not (await limiter.take([bucket(tag)])).local
        await limiter.close()


async def test_a_user_with_the_rights_that_are_documented_is_enough(
    valkey_cluster: ValkeyCluster, tags: list[str]
) -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition("ACL SETUSER node")[2].partition("Without")[0]
    rights = [word for word in text.split() if word.startswith(("+", "~"))]
    for number in range(SIZE):
        valkey_cluster.call(number, "ACL", "SETUSER", "node", "on", ">secret", *rights, "+cluster|slots", "+asking")
    url = valkey_cluster.url().replace("redis://:cluster-of-the-tests@", "redis://node:secret@")
    limiter = RedisLimiter(url, LocalLimiter(lambda: 0.0), timeout_s=PATIENT_S)
    await limiter.start()
    for tag in tags:
        assert not (await limiter.take([bucket(tag)])).local
        assert not (await limiter.hold([Slot("slots", tag, 1, 60.0, "holder")])).local
    await limiter.close()
    assert limiter.counters.trips == 0
    for number in range(SIZE):
        valkey_cluster.call(number, "ACL", "DELUSER", "node")


async def test_a_tag_is_one_call_to_one_server(
    limiter: RedisLimiter, valkey_cluster: ValkeyCluster, tags: list[str]
) -> None:
    await asyncio.gather(*(limiter.take([bucket(tag)]) for tag in tags))
    for number in range(SIZE):
        with valkey_cluster.client(number) as client:
            client.config_resetstat()
    await asyncio.gather(*(limiter.take([bucket(tag) for tag in tags]) for _ in range(12)))
    for number in range(SIZE):
        with valkey_cluster.client(number) as client:
            assert client.info("commandstats")["cmdstat_fcall"]["calls"] == 1


async def test_a_slot_that_moved_is_followed_with_what_it_holds(
    limiter: RedisLimiter, valkey_cluster: ValkeyCluster, tags: list[str], moved: int
) -> None:
    await limiter.take([bucket(tags[0], cost=10)])
    valkey_cluster.begin_move(moved, 1)
    valkey_cluster.end_move(moved, 1)
    grants = await allowed(limiter, bucket(tags[0]), 3)
    assert [(grant.allowed, grant.local) for grant in grants] == [(True, False)] * 2 + [(False, False)]
    with valkey_cluster.client(1) as client:
        client.config_resetstat()
        await limiter.take([bucket(tags[0])])
        assert client.info("commandstats")["cmdstat_fcall"]["calls"] == 1


async def test_a_slot_on_its_way_is_asked_for_where_it_goes(
    limiter: RedisLimiter, valkey_cluster: ValkeyCluster, tags: list[str], moved: int
) -> None:
    await limiter.take([bucket(tags[0], cost=10)])
    valkey_cluster.begin_move(moved, 1)
    grants = await allowed(limiter, bucket(tags[0]), 3)
    assert [(grant.allowed, grant.local) for grant in grants] == [(True, False)] * 2 + [(False, False)]
    assert limiter.counters.trips == 0


async def test_a_slot_that_is_half_on_its_way_is_decided_by_the_local_share(
    limiter: RedisLimiter, valkey_cluster: ValkeyCluster, tags: list[str], moved: int
) -> None:
    valkey_cluster.begin_move(moved, 1)
    grants = await allowed(limiter, bucket(tags[0]), 5)
    assert [(grant.allowed, grant.local) for grant in grants] == [(True, True)] * 3 + [(False, True)] * 2
    assert limiter.counters.trips == 0


async def test_one_server_that_is_gone_leaves_the_others_shared(
    limiter: RedisLimiter, valkey_cluster: ValkeyCluster, tags: list[str]
) -> None:
    limiter._shards[_address(valkey_cluster, 1)].timeout_s = 0.03
    valkey_cluster.pause(1, paused=True)
    try:
        grants = await allowed(limiter, bucket(tags[1]), 5)
        assert [(grant.allowed, grant.local) for grant in grants] == [(True, True)] * 3 + [(False, True)] * 2
        for tag in (tags[0], tags[2]):
            assert not (await limiter.take([bucket(tag)])).local
        both = await limiter.take([bucket(tags[0]), bucket(tags[1])])
        assert (both.allowed, both.local) == (False, True)
    finally:
        valkey_cluster.pause(1, paused=False)
        valkey_cluster.wait_until_well()
    probe = limiter._shards[_address(valkey_cluster, 1)]._probe
    if probe is not None:
        await asyncio.wait([probe], timeout=30)
    assert not (await limiter.take([bucket(tags[1], cost=0)])).local
    # What the refusal at the server that was gone had taken elsewhere was given back.
    grants = await allowed(limiter, bucket(tags[0]), 12)
    assert sum(grant.allowed for grant in grants) == 11


async def test_a_long_bucket_is_not_full_after_its_server_lost_it(
    limiter: RedisLimiter, valkey_cluster: ValkeyCluster, tags: list[str]
) -> None:
    for tag in tags:
        await limiter.take([bucket(tag, cost=10)])
    for shard in limiter._shards.values():
        shard._look()
        assert shard._sender is not None
        await asyncio.wait([shard._sender])
    for number in range(SIZE):
        with valkey_cluster.client(number) as client:
            client.flushall()
    for tag in tags:
        grants = await allowed(limiter, bucket(tag), 4)
        assert [grant.allowed for grant in grants] == [True, True, False, False]


async def test_without_a_cluster_that_answers_the_local_share_decides() -> None:
    limiter = RedisLimiter("redis://127.0.0.1:1/0", LocalLimiter(lambda: 0.0, lambda: 4))
    await limiter.start()
    assert not limiter.is_cluster
    assert (await limiter.take([bucket("a:one"), bucket("a:two")])).local
    await limiter.close()


def _address(cluster: ValkeyCluster, number: int) -> tuple[str, int]:
    return ("127.0.0.1", cluster.servers[number].port)
