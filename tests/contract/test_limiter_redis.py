"""What the shared limiter does when its server forgets, falls silent, dies or refuses."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
import redis

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_memory import KEEP_S, LimiterMemory
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.adapters.limiter_shard import Shard
from dataplane.adapters.limiter_wire import function_library
from dataplane.core.limits import server_key
from dataplane.ports import Slot, Take
from postroad.localstack import ValkeyServer
from support.ingress import Log, until

PATIENT_S = 5.0


class Gate:
    """A sleep that lasts until the test opens it; remembers what was asked."""

    def __init__(self) -> None:
        self.asked_s: list[float] = []
        self.asleep = asyncio.Event()
        self._open = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.asked_s.append(seconds)
        self.asleep.set()
        await self._open.wait()
        self._open.clear()
        self.asleep.clear()

    def open(self) -> None:
        self._open.set()


class Changes:
    """Hears the limiter and lets a test wait for what it says."""

    def __init__(self) -> None:
        self.heard: list[tuple[bool, str]] = []
        self._news = asyncio.Event()

    def __call__(self, shared: bool, reason: str) -> None:  # noqa: FBT001 - the limiter's signature
        self.heard.append((shared, reason))
        self._news.set()

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.heard) < count:
                self._news.clear()
                await self._news.wait()


class Proxy:
    """Stands between limiter and server; while stopped it reads and passes nothing on."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.lead_to(url)
        self._parts = parts
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        assert self._parts.port is not None
        self.url = self._parts.geturl().replace(f":{self._parts.port}/", f":{port}/")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    def lead_to(self, url: str) -> None:
        """Serve connections that come from now on by this server."""
        parts = urlsplit(url)
        self._target = (str(parts.hostname), int(parts.port or 0))

    def stop(self) -> None:
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*self._target)
        self._writers += [writer, there_writer]
        for source, target in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                await self._flowing.wait()
                target.write(data)
        except ConnectionError:
            pass
        finally:
            target.close()


@pytest.fixture
def local() -> LocalLimiter:
    return LocalLimiter(lambda: 0.0, lambda: 4)


Start = Callable[..., Awaitable[RedisLimiter]]


@pytest.fixture
async def start(local: LocalLimiter) -> AsyncIterator[Start]:
    """Starts limiters, and closes them whatever the test comes to: uvloop waits for ever for an open transport."""
    started: list[RedisLimiter] = []

    async def start(
        url: str, *, before: Callable[[RedisLimiter], None] = lambda _: None, **options: Any
    ) -> RedisLimiter:
        limiter = RedisLimiter(url, local, **{"timeout_s": PATIENT_S, **options})
        started.append(limiter)
        before(limiter)
        await limiter.start()
        return limiter

    yield start
    for limiter in started:
        await limiter.close()


@pytest.fixture
async def limiter(valkey_url: str, start: Start) -> RedisLimiter:
    return await start(valkey_url)


def bucket(key: str = "messages", *, capacity: int = 12, cost: int = 1) -> Take:
    return Take(key, "a:demo", capacity, 0.001, cost)


def minute(key: str = "connections", *, cost: int = 1) -> Take:
    """A bucket that fills within two minutes: too short to be remembered."""
    return Take(key, "a:demo", 12, 0.1, cost)


async def quiet(shard: Shard) -> None:
    """Wait until all has left."""
    if shard._sender is not None:
        await asyncio.wait([shard._sender])


async def look(limiter: RedisLimiter) -> None:
    """Let the limiter look at its long buckets now."""
    shards = [limiter._first, *limiter._shards.values()]
    for shard in shards:
        shard._look()
    for shard in shards:
        await quiet(shard)


def server(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


async def test_a_node_loads_the_library_where_it_is_missing(limiter: RedisLimiter, valkey_url: str) -> None:
    assert limiter.shared
    with server(valkey_url) as client:
        assert [library[1] for library in client.function_list()] == [b"postroad"]


async def test_function_flush_costs_no_take_its_shared_answer(limiter: RedisLimiter, valkey_url: str) -> None:
    await limiter.take([bucket(cost=12)])
    with server(valkey_url) as client:
        client.function_flush("SYNC")
    grant = await limiter.take([bucket()])
    assert (grant.allowed, grant.local) == (False, False)


async def test_flushall_gives_a_short_bucket_one_capacity_more_and_no_other_harm(
    limiter: RedisLimiter, valkey_url: str
) -> None:
    await limiter.take([minute(cost=12)])
    with server(valkey_url) as client:
        client.flushall()
    grants = [await limiter.take([minute()]) for _ in range(13)]
    assert [grant.allowed for grant in grants] == [True] * 12 + [False]
    assert not any(grant.local for grant in grants)


async def test_keys_expire_by_themselves_when_the_bucket_would_be_full(limiter: RedisLimiter, valkey_url: str) -> None:
    await limiter.take([Take("quick", "a:demo", 10, 1.0, 4), Take("still", "a:demo", 10, 0.0, 4)])
    with server(valkey_url) as client:
        assert 3_000 < client.pttl("postroad:{a:demo}quick") <= 4_000
        assert 86_000_000 < client.pttl("postroad:{a:demo}still") <= 86_400_000


async def test_a_library_that_is_there_is_used_and_not_replaced(valkey_url: str, start: Start) -> None:
    marked = function_library() + "\n-- another version's\n"
    with server(valkey_url) as client:
        client.function_load(marked)
    limiter = await start(valkey_url)
    assert not (await limiter.take([bucket()])).local
    await limiter.close()
    with server(valkey_url) as client:
        assert b"another version's" in client.function_list(withcode=True)[0][-1]


async def test_an_acl_that_allows_only_the_call_is_enough(valkey_url: str, start: Start) -> None:
    with server(valkey_url) as client:
        client.function_load(function_library())
        client.execute_command("ACL", "SETUSER", "node", "on", ">secret", "~postroad:*", "-@all")
        # What a function does is held to the caller's rights: those that the library's header names.
        rights = re.findall(r"\+[a-z]+", function_library().partition("one that looks only")[0])
        client.execute_command("ACL", "SETUSER", "node", *rights)
    parts = urlsplit(valkey_url)
    limiter = await start(f"redis://node:secret@{parts.hostname}:{parts.port}/0")
    assert (await limiter.take([bucket()])).local is False
    held = Slot("slots", "d:mx", 1, 60.0, "holder")
    assert (await limiter.hold([held])).local is False
    limiter.refund([bucket()])
    limiter.release([held])
    await look(limiter)
    assert (await limiter.hold([held])).local is False
    assert limiter.counters.trips == 0
    with server(valkey_url) as client:
        client.function_flush("SYNC")
    # It may not load: the leader will; until then the local share decides.
    assert (await limiter.take([bucket()])).local is True
    assert not limiter.shared
    with server(valkey_url) as client:
        client.execute_command("ACL", "DELUSER", "node")


async def test_without_a_server_the_local_share_decides_at_once(start: Start) -> None:
    gate, changes = Gate(), Changes()
    limiter = await start("redis://127.0.0.1:1/0", sleep=gate.sleep, on_change=changes)
    grants = [await limiter.take([bucket()]) for _ in range(4)]
    assert [(grant.allowed, grant.local) for grant in grants] == [(True, True)] * 3 + [(False, True)]
    assert [shared for shared, _ in changes.heard] == [False]


async def test_probes_come_later_and_later_and_never_more_than_one_at_a_time(start: Start) -> None:
    gate = Gate()
    limiter = await start("redis://127.0.0.1:1/0", sleep=gate.sleep)
    for _ in range(8):
        await limiter.take([bucket(cost=0)])
        async with asyncio.timeout(10):
            await gate.asleep.wait()
        gate.open()
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await gate.asleep.wait()
    assert gate.asked_s[:8] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


async def test_a_silent_server_trips_the_breaker_and_a_probe_finds_the_way_back(valkey_url: str, start: Start) -> None:
    gate, changes = Gate(), Changes()
    async with Proxy(valkey_url) as proxy:
        limiter = await start(proxy.url, sleep=gate.sleep, on_change=changes)
        assert not (await limiter.take([bucket()])).local
        proxy.stop()
        limiter._first.timeout_s = 0.03
        waiting = [asyncio.ensure_future(limiter.take([bucket()])) for _ in range(3)]
        assert [grant.local for grant in await asyncio.gather(*waiting)] == [True] * 3
        assert limiter.counters.trips == 1
        # While it is open nobody waits: not one turn of the loop is needed.
        with pytest.raises(StopIteration) as stopped:
            limiter.take([bucket(cost=0)]).send(None)
        assert stopped.value.value.local
        limiter._first.timeout_s = PATIENT_S
        proxy.flow()
        gate.open()
        await changes.wait_for(3)
        assert [shared for shared, _ in changes.heard] == [True, False, True]
        assert not (await limiter.take([bucket()])).local


async def test_what_was_decided_locally_is_never_sent_later(valkey_url: str, start: Start) -> None:
    gate, changes = Gate(), Changes()
    async with Proxy(valkey_url) as proxy:
        limiter = await start(proxy.url, sleep=gate.sleep, on_change=changes)
        await limiter._first.link.drop()
        assert (await limiter.take([bucket(cost=3)])).local
        gate.open()
        await changes.wait_for(2)
        assert (await limiter.take([bucket(cost=12)])) == (True, 0.0, "", False)


async def test_cancelled_callers_do_not_shift_the_answers_of_others(limiter: RedisLimiter) -> None:
    await limiter.take([bucket("empty", cost=12)])
    for turn in range(30):
        cancelled = [asyncio.ensure_future(limiter.take([bucket("empty")])) for _ in range(5)]
        for _ in range(turn % 4):
            await asyncio.sleep(0)
        kept = asyncio.ensure_future(limiter.take([bucket(f"fresh-{turn}")]))
        refused = asyncio.ensure_future(limiter.take([bucket("empty")]))
        for task in cancelled:
            task.cancel()
        assert (await kept).allowed
        grant = await refused
        assert (grant.allowed, grant.refused_key, grant.local) == (False, "empty", False)
        await asyncio.gather(*cancelled, return_exceptions=True)


async def test_a_take_cancelled_before_it_left_is_not_charged(limiter: RedisLimiter) -> None:
    task = asyncio.ensure_future(limiter.take([bucket(cost=12)]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await limiter.take([bucket(cost=12)])).allowed


async def test_a_turn_of_the_loop_is_one_call(limiter: RedisLimiter, valkey_url: str) -> None:
    await limiter.take([bucket()])
    with server(valkey_url) as client:
        client.config_resetstat()
        await asyncio.gather(*(limiter.take([bucket(f"key-{number}")]) for number in range(50)))
        assert client.info("commandstats")["cmdstat_fcall"]["calls"] == 1


async def test_a_restarted_server_is_found_again_with_its_library_gone(passable_folder: Path, start: Start) -> None:
    gate, changes = Gate(), Changes()
    folder = passable_folder / "valkey"
    own = ValkeyServer(folder).start()
    try:
        limiter = await start(own.url(), sleep=gate.sleep, on_change=changes)
        assert not (await limiter.take([bucket(cost=12)])).local
        own.stop()
        assert (await limiter.take([bucket()])).local
        own = ValkeyServer(folder, own.port).start()
        gate.open()
        await changes.wait_for(3)
        grant = await limiter.take([minute()])
        assert (grant.allowed, grant.local) == (True, False)
    finally:
        own.destroy()


async def test_an_answer_that_is_none_of_ours_trips_the_breaker(valkey_url: str, start: Start) -> None:
    liar = function_library().replace("return answers", "return {1, 1, 3, 4}")
    with server(valkey_url) as client:
        client.function_load(liar)
        limiter = await start(valkey_url)
        assert (await limiter.take([bucket()])).local
        assert not limiter.shared


async def test_closing_answers_whoever_waits(valkey_url: str, start: Start) -> None:
    async with Proxy(valkey_url) as proxy:
        limiter = await start(proxy.url, timeout_s=60.0)
        proxy.stop()
        waiting = [asyncio.ensure_future(limiter.take([bucket()])) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await limiter.close()
        assert all(grant.local for grant in await asyncio.gather(*waiting))
        assert (await limiter.take([bucket(cost=0)])).local


async def test_an_answer_after_a_cancellation_is_given_back(limiter: RedisLimiter) -> None:
    slot = Slot("slots", "d:mx", 1, 60.0, "gone")
    taking, holding = limiter.ask([bucket(cost=12)]), asyncio.ensure_future(limiter.hold([slot]))
    sender = None
    while sender is None or not limiter._first.link.is_open:
        await asyncio.sleep(0)
        sender = limiter._first._sender
    await asyncio.sleep(0)
    taking.cancel()
    holding.cancel()
    assert (await limiter.take([bucket(cost=12)])).allowed
    assert (await limiter.hold([slot._replace(holder="next")])).allowed


async def test_the_library_answers_who_only_looks(limiter: RedisLimiter, valkey_url: str) -> None:
    await limiter.take([bucket(cost=5)])
    for number in range(3):
        await limiter.hold([Slot("slots", "d:mx", 3, 60.0, f"holder-{number}")])
    with server(valkey_url) as client:
        keys = [server_key("a:demo", "messages"), server_key("a:demo", "never")]
        sizes = [12_000_000, 1_000] * 2
        levels = client.execute_command("FCALL_RO", "postroad_peek_2", 2, *keys, *sizes)
        assert 7_000_000 <= levels[0] < 7_100_000
        assert levels[1] == 12_000_000
        slots = [server_key("d:mx", "slots"), server_key("d:mx", "never")]
        assert client.execute_command("FCALL_RO", "postroad_count_1", 2, *slots) == [3, 0]


async def test_slots_end_with_their_key_when_the_last_holder_died(limiter: RedisLimiter, valkey_url: str) -> None:
    await limiter.hold([Slot("slots", "d:mx", 3, 30.0, "long")])
    await limiter.hold([Slot("slots", "d:mx", 3, 2.0, "short")])
    with server(valkey_url) as client:
        assert 29_000 < client.pttl(server_key("d:mx", "slots")) <= 30_001


# --- what was lost


async def test_a_long_bucket_is_not_full_after_flushall(limiter: RedisLimiter, valkey_url: str) -> None:
    await limiter.take([bucket(cost=10)])
    await look(limiter)
    with server(valkey_url) as client:
        client.flushall()
    grants = [await limiter.take([bucket()]) for _ in range(4)]
    assert [grant.allowed for grant in grants] == [True, True, False, False]
    assert not any(grant.local for grant in grants)
    assert limiter.counters.lost == 1


async def test_a_debt_lasts_as_long_in_redis_as_it_takes_to_pay(limiter: RedisLimiter, valkey_url: str) -> None:
    take = Take("messages", "a:demo", 10, 10.0, 1_000)
    assert (await limiter.take([take])).allowed
    with server(valkey_url) as client:
        key = server_key("a:demo", "messages")
        level, _ = client.get(key).split()
        assert int(level) == -990_000_000
        assert 95_000 < client.pttl(key) <= 100_000
        (level,) = client.execute_command("FCALL_RO", "postroad_peek_2", 1, key, 10_000_000, 10_000_000)
        assert -990_000_000 <= level < -900_000_000


async def test_a_debt_is_remembered_after_flushall(limiter: RedisLimiter, valkey_url: str) -> None:
    await limiter.take([bucket(cost=100)])
    await look(limiter)
    with server(valkey_url) as client:
        client.flushall()
    grant = await limiter.take([bucket()])
    assert (grant.allowed, grant.local) == (False, False)
    assert 88_000.0 < grant.wait_s <= 89_000.0


async def test_the_lowest_level_that_any_worker_remembers_holds(valkey_url: str, start: Start) -> None:
    first, second = await start(valkey_url), await start(valkey_url)
    await second.take([bucket(cost=1)])
    await look(second)
    await first.take([bucket(cost=9)])
    await look(first)
    with server(valkey_url) as client:
        client.flushall()
    # The one that remembers less comes first: 11 are left as far as it knows.
    assert (await second.take([bucket(cost=1)])).allowed
    assert (await first.take([bucket(cost=1)])).allowed
    assert (await second.take([bucket(cost=1)])).allowed
    assert not (await second.take([bucket(cost=1)])).allowed
    await look(first)
    with server(valkey_url) as client:
        client.flushall()
    # Now it comes second: what it remembers raises nothing.
    assert not (await first.take([bucket(cost=1)])).allowed
    assert not (await second.take([bucket(cost=1)])).allowed


async def test_what_is_remembered_of_other_buckets_is_seeded_too(limiter: RedisLimiter, valkey_url: str) -> None:
    for number in range(250):
        await limiter.take([bucket(f"key-{number}", cost=12)])
    await look(limiter)
    with server(valkey_url) as client:
        client.flushall()
        await limiter.take([bucket("key-7", cost=0)])
        await quiet(limiter._first)
        names = [server_key("a:demo", f"key-{number}") for number in range(250)]
        assert all(value.startswith(b"0 ") or int(value.split()[0]) < 1_000_000 for value in client.mget(names))


async def test_a_seed_grows_by_the_rate_while_nobody_looks(valkey_url: str, start: Start) -> None:
    now_s = [1_000.0]
    limiter = await start(valkey_url, clock=lambda: now_s[0])
    await limiter.take([bucket(cost=12)])
    await look(limiter)
    now_s[0] += 3_000.0  # three tokens
    with server(valkey_url) as client:
        client.flushall()
    grants = [await limiter.take([bucket()]) for _ in range(5)]
    assert sum(grant.allowed for grant in grants) == 3


async def test_a_loss_between_a_look_and_the_wish_teaches_nothing_wrong(limiter: RedisLimiter, valkey_url: str) -> None:
    await limiter.take([bucket(cost=12)])
    await look(limiter)
    await limiter.take([bucket(cost=0)])
    with server(valkey_url) as client:
        client.flushall()
    # A look now finds no bucket, which is not to be taken for a full one.
    await look(limiter)
    assert not (await limiter.take([bucket()])).allowed


async def test_long_buckets_survive_a_restart_of_the_server(passable_folder: Path, start: Start) -> None:
    gate, changes = Gate(), Changes()
    folder = passable_folder / "valkey"
    own = ValkeyServer(folder).start()
    try:
        limiter = await start(own.url(), sleep=gate.sleep, on_change=changes)
        await limiter.take([bucket(cost=10)])
        await look(limiter)
        own.stop()
        assert (await limiter.take([bucket(cost=0)])).local
        own = ValkeyServer(folder, own.port).start()
        gate.open()
        await changes.wait_for(3)
        grants = [await limiter.take([bucket()]) for _ in range(3)]
        assert [(grant.allowed, grant.local) for grant in grants] == [(True, False)] * 2 + [(False, False)]
    finally:
        own.destroy()


async def test_seeds_that_did_not_arrive_are_owed_again(valkey_url: str, start: Start) -> None:
    gate, changes = Gate(), Changes()
    async with Proxy(valkey_url) as proxy:
        limiter = await start(proxy.url, sleep=gate.sleep, on_change=changes)
        await limiter.take([bucket(cost=12)])
        await look(limiter)
        with server(valkey_url) as client:
            client.flushall()
            other = await start(valkey_url)
            await other.take([bucket("another")])
            # As if the answer had come that says so, and then the connection had died with the seeds.
            limiter._first.levels.changed("", other._first.levels.epoch(""))
        proxy.stop()
        limiter._first.timeout_s = 0.03
        assert (await limiter.take([bucket(cost=0)])).local
        limiter._first.timeout_s = PATIENT_S
        proxy.flow()
        gate.open()
        await changes.wait_for(3)
        assert not (await limiter.take([bucket()])).allowed


# --- a late loop, counters


async def test_a_loop_that_is_late_gives_up_no_server_that_answers(valkey_url: str, start: Start) -> None:
    limiter = await start(valkey_url, timeout_s=0.03)
    for _ in range(3):
        asked = limiter.ask([bucket(cost=0)])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(0.06)  # noqa: ASYNC251 - a callback that holds the loop
        assert not (await asked).local
    assert limiter.counters.trips == 0


async def test_counters_tell_how_much_was_decided_without_the_server(start: Start) -> None:
    limiter = await start("redis://127.0.0.1:1/0", sleep=Gate().sleep)
    for _ in range(5):
        await limiter.take([bucket()])
    assert (limiter.counters.local, limiter.counters.local_granted) == (5, 3)
    assert limiter.counters.trips == 0


async def test_slots_without_a_server_are_shared_out_one_at_least(start: Start) -> None:
    limiter = await start("redis://127.0.0.1:1/0", sleep=Gate().sleep)
    for capacity, expected in ((8, 2), (2, 1)):
        grants = [
            await limiter.hold([Slot(f"slots-{capacity}", "d:mx", capacity, 60.0, f"holder-{number}")])
            for number in range(4)
        ]
        assert sum(grant.allowed for grant in grants) == expected
        assert all(grant.local for grant in grants)
    limiter.release([Slot("slots-2", "d:mx", 2, 60.0, "holder-0")])
    assert (await limiter.hold([Slot("slots-2", "d:mx", 2, 60.0, "next")])).allowed


# --- what else happens to servers


async def test_no_key_lives_for_ever(limiter: RedisLimiter, valkey_url: str) -> None:
    await limiter.take([bucket(), minute(), Take("still", "a:demo", 10, 0.0, 1), Take("none", "a:demo", 0, 0.0, 1)])
    limiter.refund([bucket("charged", cost=-3)])
    await limiter.hold([Slot("slots", "d:mx", 2, 60.0, "holder")])
    await look(limiter)
    with server(valkey_url) as client:
        client.flushall()
    await limiter.take([bucket()])
    await limiter.hold([Slot("slots", "d:mx", 2, 60.0, "holder")])
    limiter.refund([bucket("charged", cost=-3)])
    await quiet(limiter._first)
    with server(valkey_url) as client:
        keys: Any = client.keys("*")
        assert len(keys) >= 4
        assert all(client.pttl(key) > 0 for key in keys)


async def test_a_server_without_memory_leaves_it_to_the_local_share(valkey_url: str, start: Start) -> None:
    gate, changes = Gate(), Changes()
    limiter = await start(valkey_url, sleep=gate.sleep, on_change=changes)
    with server(valkey_url) as client:
        try:
            client.config_set("maxmemory", "1")
            grants = [await limiter.take([bucket()]) for _ in range(4)]
            assert [(grant.allowed, grant.local) for grant in grants] == [(True, True)] * 3 + [(False, True)]
        finally:
            client.config_set("maxmemory", "0")
    gate.open()
    await changes.wait_for(3)
    assert not (await limiter.take([bucket()])).local


async def test_a_replica_that_is_promoted_goes_on_with_library_and_levels(passable_folder: Path, start: Start) -> None:
    gate, changes = Gate(), Changes()
    primary = ValkeyServer(passable_folder / "primary", settings={"repl-diskless-sync-delay": "0"}).start()
    replica = ValkeyServer(passable_folder / "replica").start()
    try:
        with server(replica.url()) as client:
            client.config_set("masterauth", primary.password)
            client.execute_command("REPLICAOF", "127.0.0.1", primary.port)
            client.config_set("requirepass", primary.password)
        async with Proxy(primary.url()) as proxy:
            limiter = await start(proxy.url, sleep=gate.sleep, on_change=changes)
            await limiter.take([bucket(cost=10)])
            with redis.Redis.from_url(primary.url(), socket_timeout=30.0) as client:
                # WAIT waits for what its own connection wrote, and with that for all before.
                client.set("marker", "1")
                assert client.wait(1, 20_000) == 1
            primary.kill()
            async with asyncio.timeout(20):
                while not (await limiter.take([bucket(cost=0)])).local:
                    pass
            url = replica.url().replace(replica.password, primary.password)
            with server(url) as client:
                client.execute_command("REPLICAOF", "NO", "ONE")
            proxy.lead_to(url)
            gate.open()
            await changes.wait_for(3)
            grants = [await limiter.take([bucket()]) for _ in range(3)]
            assert [(grant.allowed, grant.local) for grant in grants] == [(True, False)] * 2 + [(False, False)]
            assert limiter.counters.lost == 0
    finally:
        primary.destroy()
        replica.destroy()


# --- what is kept on disk


class Machine:
    """The clock of a machine, and the workers that run there one after the other."""

    def __init__(self, data_dir: Path, url: str, start: Start) -> None:
        self.now_s = 1_000.0
        self._data_dir = data_dir
        self._url = url
        self._start = start
        self.log = Log()

    def monotonic(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return round(self.now_s * 1000)

    def memory(self, limiter: RedisLimiter, index: int = 0, gate: Gate | None = None) -> LimiterMemory:
        return LimiterMemory(self._data_dir, index, limiter, self, self.log, (gate or Gate()).sleep)

    async def worker(self, index: int = 0) -> RedisLimiter:
        """Begin as a worker does."""
        return await self._start(self._url, clock=self.monotonic, before=lambda one: self.memory(one, index).recall())

    async def end(self, limiter: RedisLimiter, index: int = 0) -> None:
        """End as a worker does."""
        await look(limiter)
        task = asyncio.create_task(self.memory(limiter, index).run())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
def machine(tmp_path: Path, valkey_url: str, start: Start) -> Machine:
    return Machine(tmp_path, valkey_url, start)


async def allowed(limiter: RedisLimiter, *takes: Take) -> list[bool]:
    return [(await limiter.take([take])).allowed for take in takes]


async def test_a_long_bucket_is_not_full_when_workers_and_redis_start_anew(machine: Machine, valkey_url: str) -> None:
    first = await machine.worker()
    assert await allowed(first, bucket(cost=10))
    await machine.end(first)
    with server(valkey_url) as client:
        client.flushall()
    second = await machine.worker()
    assert await allowed(second, *[bucket()] * 4) == [True, True, False, False]


async def test_what_was_kept_is_older_by_the_time_that_has_passed(machine: Machine, valkey_url: str) -> None:
    first = await machine.worker()
    assert await allowed(first, bucket(cost=12))
    await machine.end(first)
    with server(valkey_url) as client:
        client.flushall()
    # A token in a thousand seconds.
    machine.now_s += 3_500.0
    second = await machine.worker()
    assert await allowed(second, *[bucket()] * 4) == [True, True, True, False]


async def test_what_any_worker_of_the_node_kept_is_taken_up_and_kept_on(machine: Machine, valkey_url: str) -> None:
    for index in range(2):
        worker = await machine.worker(index)
        assert await allowed(worker, bucket(f"key-{index}", cost=12))
        await machine.end(worker, index)
    with server(valkey_url) as client:
        client.flushall()
    # One that draws from neither keeps what it knows of both.
    third = await machine.worker(0)
    await machine.end(third, 0)
    fourth = await machine.worker(0)
    assert await allowed(fourth, bucket("key-0"), bucket("key-1"), bucket("key-2")) == [False, False, True]


async def test_what_was_kept_takes_nothing_from_a_server_that_lost_nothing(machine: Machine) -> None:
    first = await machine.worker()
    assert await allowed(first, bucket(cost=10))
    await machine.end(first)
    second = await machine.worker()
    assert await allowed(second, *[bucket()] * 3) == [True, True, False]


async def test_it_is_kept_every_few_seconds_as_well(machine: Machine, tmp_path: Path, valkey_url: str) -> None:
    first, gate = await machine.worker(), Gate()
    assert await allowed(first, bucket(cost=12))
    await look(first)
    running = asyncio.create_task(machine.memory(first, gate=gate).run())
    await gate.asleep.wait()
    gate.open()
    await until(lambda: len(gate.asked_s) == 2)
    assert gate.asked_s == [KEEP_S, KEEP_S]
    kept = (tmp_path / "limits" / "worker-0.json").read_bytes()
    running.cancel()
    await asyncio.wait([running])
    assert server_key("a:demo", "messages").encode() in kept
    assert (tmp_path / "limits" / "worker-0.json").stat().st_mode & 0o777 == 0o600


def kept(*numbers: str, seen_ms: str = "1000000", twice: bool = False) -> bytes:
    """A file with one level: capacity, rate, level, seconds before."""
    row = f'["", "postroad:{{a:demo}}messages", {", ".join(numbers)}]'
    return f'{{"seen_ms": {seen_ms}, "levels": [{", ".join([row] * (2 if twice else 1))}]}}'.encode()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b'{"seen_ms": 1, "levels": [["", "x"]]}', b'{"levels": []}', b"[" * 200_000),
        kept("12000000", "1000", "0", "1", seen_ms="Infinity"),
        kept("12000000", "1000", "0", "1", seen_ms="9" * 400),
        kept("Infinity", "1000", "0", "1"),
        kept("12000000", "1e999", "0", "1"),
        kept("12000000", "9" * 400, "0", "1"),
        kept("12000000", "NaN", "0", "1", twice=True),
        kept("12000000", "1000", "-Infinity", "1"),
        kept("12000000", "1000", "0", "Infinity", twice=True),
        kept("12000000", '"1000"', "0", "1"),
    ],
)
async def test_a_file_that_cannot_be_read_is_passed_over(machine: Machine, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "limits").mkdir()
    (tmp_path / "limits" / "worker-3.json").write_bytes(content)
    worker = await machine.worker()
    assert await allowed(worker, bucket())
    assert machine.log.events() == ["limiter.memory_unreadable"]


async def test_a_disk_that_takes_nothing_ends_nobody(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "limits").write_text("in the way")
    worker = await machine.worker()
    assert await allowed(worker, bucket(cost=10))
    await machine.end(worker)
    assert machine.log.events() == ["limiter.memory_not_written"]
