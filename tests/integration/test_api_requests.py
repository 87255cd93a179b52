"""Requests of an API key: counted once each, after the key is known to be good, by all replicas together."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane.adapters.redis.functions import RedisFunctions
from controlplane.adapters.redis.limits import RedisLiveLimits
from controlplane.adapters.redis.requests import RedisRequestBudget
from controlplane.domain.limits import Look
from controlplane.services.throttle import LocalRequestBudget
from dataplane.core.limits import server_key
from postroad.control.v1 import account_service_pb2, message_service_pb2, message_service_pb2_grpc
from postroad.sdk import connect_async
from support.api import ApiStack, Client, running_api
from support.controlplane_app import serving
from support.databases import Database
from support.nodes_port import until
from support.valkey_cluster import ValkeyCluster

DOCUMENTED = (Path(__file__).parents[2] / "docs" / "settings.md").read_text("utf-8")
LIST = account_service_pb2.ListAccountsRequest()


class Counter:
    """A budget of so many requests a key that never come back; remembers who asked."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.spent: dict[str, int] = {}

    async def spend(self, key: str) -> float:
        if self.spent.get(key, 0) >= self.most:
            return 30.25
        self.spent[key] = self.spent.get(key, 0) + 1
        return 0.0

    def of(self, client: Client) -> int:
        return self.spent.get(client.key[4:12], 0)


@pytest.fixture
def counter() -> Counter:
    return Counter(1_000)


@pytest.fixture
async def stack(migrated_database: Database, counter: Counter) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database, requests=counter) as running:
        yield running


async def test_one_request_too_many_is_refused_with_the_time_to_wait(stack: ApiStack, counter: Counter) -> None:
    for _ in range(3):
        await stack.operator.account("ListAccounts", LIST)
    counter.most = 3
    error = await stack.operator.refused(stack.operator.account("ListAccounts", LIST))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUESTS_EXHAUSTED")
    delay = error.details["RetryInfo"].retry_delay
    assert 30 <= delay.ToTimedelta().total_seconds() <= 30.25
    (violation,) = error.details["QuotaFailure"].violations
    assert violation.subject == "apiKeys/bootstrap"
    assert "30." in error.text


async def test_each_key_has_its_own_bucket(stack: ApiStack, counter: Counter) -> None:
    first = await stack.make_account("acme")
    second = await stack.make_key("acme")
    get = account_service_pb2.GetAccountRequest(name="accounts/acme")
    counter.most = 2
    for client in (first, second):
        await client.account("GetAccount", get)
        await client.account("GetAccount", get)
        assert (await client.refused(client.account("GetAccount", get))).reason == "REQUESTS_EXHAUSTED"


async def test_a_wrong_key_spends_nobodys_requests_and_is_told_nothing(stack: ApiStack, counter: Counter) -> None:
    client = await stack.make_account("acme")
    wrong = Client(stack.channel, client.key[:-43] + "A" * 43)
    get = account_service_pb2.GetAccountRequest(name="accounts/acme")
    for _ in range(3):
        error = await wrong.refused(wrong.account("GetAccount", get))
        assert error.code is grpc.StatusCode.UNAUTHENTICATED
    assert counter.of(client) == 0
    counter.most = 0
    assert (await client.refused(client.account("GetAccount", get))).reason == "REQUESTS_EXHAUSTED"
    assert (await wrong.refused(wrong.account("GetAccount", get))).code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_call_that_the_key_does_not_open_is_a_request_too(stack: ApiStack, counter: Counter) -> None:
    client = await stack.make_account("acme", "messages.read")
    get = account_service_pb2.GetAccountRequest(name="accounts/acme")
    assert (await client.refused(client.account("GetAccount", get))).code is grpc.StatusCode.PERMISSION_DENIED
    assert counter.of(client) == 1


async def test_a_spent_key_that_goes_on_asking_reaches_neither_database_nor_counter(
    stack: ApiStack, counter: Counter
) -> None:
    client = await stack.make_account("acme")
    counter.most = 0
    get = account_service_pb2.GetAccountRequest(name="accounts/acme")
    await client.refused(client.account("GetAccount", get))
    counter.most = 1_000
    await stack.as_superuser("DELETE FROM postroad.api_keys WHERE account = 'acme'")
    # It would be unknown by now, if anybody had looked.
    assert (await client.refused(client.account("GetAccount", get))).reason == "REQUESTS_EXHAUSTED"


async def test_a_watch_is_one_request_however_long_it_lasts(
    stack: ApiStack, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.adapters.grpc.calls._ADMITTED_S", 0.0)
    client = await stack.make_account("acme")
    await stack.as_superuser("SELECT postroad.ensure_partitions(current_date - 1, 3)")
    stub: Any = message_service_pb2_grpc.MessageServiceStub(stack.channel)
    watch = stub.WatchEvents(
        message_service_pb2.WatchEventsRequest(parent="accounts/acme"), metadata=client.metadata, timeout=20
    )
    await watch.read()
    await until(lambda: stack.signal.waits > 0, 20)
    counter.most = 1
    insert = (
        "INSERT INTO postroad.delivery_events (message_id, account, type, event_time, node, spool)"
        " VALUES (postroad.message_id_bound(current_date), 'acme', 2, now(), 'edge-1', gen_random_uuid())"
    )
    async with asyncio.timeout(20):
        for _ in range(2):
            await stack.as_superuser(insert)
            stack.signal.ring()
            await watch.read()
    watch.cancel()
    assert counter.of(client) == 1


# --- through Redis ---------------------------------------------------------------------------------------------------


def shared_budget(functions: RedisFunctions, per_minute: int) -> RedisRequestBudget:
    return RedisRequestBudget(functions, per_minute, LocalRequestBudget(per_minute, time.monotonic))


async def count_granted(*budgets: RedisRequestBudget, tries: int, key: str = "lookup12") -> int:
    waits = [await budgets[n % len(budgets)].spend(key) for n in range(tries)]
    assert all(wait == 0.0 or 0 < wait <= 60 for wait in waits)
    return waits.count(0.0)


async def test_replicas_share_the_bucket_of_a_key(valkey_url: str) -> None:
    replicas = [RedisFunctions(valkey_url, timeout_s=10.0) for _ in range(2)]
    try:
        budgets = [shared_budget(functions, 6) for functions in replicas]
        assert await count_granted(*budgets, tries=12) == 6
        assert await count_granted(budgets[1], tries=7, key="another1") == 6
    finally:
        for functions in replicas:
            await functions.close()


async def test_a_replica_counts_by_itself_while_redis_is_away() -> None:
    heard: list[str] = []
    functions = RedisFunctions("redis://127.0.0.1:1/0", timeout_s=10.0, on_change=heard.append)
    try:
        assert await count_granted(shared_budget(functions, 6), tries=12) == 6
    finally:
        await functions.close()
    # Said once, not with every request.
    assert len(heard) == 1


async def test_a_cluster_keeps_the_buckets_of_keys_on_all_of_its_servers(valkey_cluster: ValkeyCluster) -> None:
    functions = RedisFunctions(valkey_cluster.url(), timeout_s=10.0)
    try:
        budget = shared_budget(functions, 2)
        for number in range(6):
            assert await count_granted(budget, tries=3, key=f"lookup{number}") == 2
    finally:
        await functions.close()
    kept = [valkey_cluster.call(number, "DBSIZE") for number in range(3)]
    assert sum(kept) == 6
    assert sum(1 for count in kept if count) > 1


async def test_a_user_with_the_rights_that_the_settings_name_can_do_all_of_it(valkey_url: str) -> None:
    rights = re.search(r"`redis\.url`.*?needs, on `(~postroad:\*)`, `([^`]+)`", DOCUMENTED)
    assert rights is not None
    loader = RedisFunctions(valkey_url, timeout_s=10.0)
    functions = RedisFunctions(f"redis://cp:secret@127.0.0.1:{urlsplit(valkey_url).port}/0", timeout_s=10.0)
    with redis.Redis.from_url(valkey_url) as client:
        words = (rights[1], "resetchannels", "-@all", *rights[2].split())
        client.execute_command("ACL", "SETUSER", "cp", "reset", "on", ">secret", *words)
        try:
            assert await count_granted(shared_budget(loader, 2), tries=3) == 2
            assert await functions.within(lambda: take_one(functions)) == [0]
            looks = [Look("a:accounts/acme", "account:message", 5, 1.0), Look("p:providers/p", "provider:slots", 5, 0)]
            assert await RedisLiveLimits(functions).look(looks) == [5.0, 0.0]
        finally:
            await functions.close()
            await loader.close()
            client.execute_command("ACL", "DELUSER", "cp")


async def take_one(functions: RedisFunctions) -> Any:
    keys = (server_key("k:a", "epoch"), server_key("k:a", "request"))
    return await functions.call("k:a", "postroad_take_2", keys, ("", 1, 5, 1, 1, 1, 1), only_looks=False)


# --- the whole program -----------------------------------------------------------------------------------------------


async def test_json_says_429_and_when_to_come_back_and_a_body_is_not_counted_twice(
    migrated_database: Database, tmp_path: Path, valkey_url: str
) -> None:
    settings = {"api": {"requests_per_minute": 5}, "redis": {"url": valkey_url}}
    async with serving(migrated_database, tmp_path, **settings) as plane, aiohttp.ClientSession() as http:
        headers = {"Authorization": f"Bearer {plane.key}"}
        for number in range(5):
            url = plane.url(f"/api/v1/accounts?accountId=acme-{number}")
            async with http.post(url, json={"displayName": "Acme"}, headers=headers) as answer:
                assert answer.status == 200, await answer.text()
        async with http.post(plane.url("/api/v1/accounts?accountId=more"), json={}, headers=headers) as answer:
            assert answer.status == 429
            assert 1 <= int(answer.headers["Retry-After"]) <= 12
            status = await answer.json()
        kinds = [detail["@type"].rpartition(".")[2] for detail in status["details"]]
        assert sorted(kinds) == ["ErrorInfo", "QuotaFailure", "RetryInfo"]
        # The same bucket, whichever way in.
        async with plane.channel() as channel:
            client = Client(channel, plane.key)
            assert (await client.refused(client.account("ListAccounts", LIST))).reason == "REQUESTS_EXHAUSTED"
            # Whether it serves may be asked by anybody at any rate.
            health: Any = health_pb2_grpc.HealthStub(channel)
            for _ in range(10):
                await health.Check(health_pb2.HealthCheckRequest(), timeout=20)


async def test_a_program_with_the_sdk_becomes_slower_instead_of_failing(
    migrated_database: Database, tmp_path: Path
) -> None:
    async with serving(migrated_database, tmp_path, api={"requests_per_minute": 60}) as plane:
        server, ca_file = f"localhost:{plane.grpc_port}", tmp_path / "pki" / "ca.pem"
        async with connect_async(server, plane.key, ca_file) as client:
            begun = time.monotonic()
            for _ in range(62):
                await client.accounts.ListAccounts(LIST)
            # Sixty at once, then one as each second brings it.
            assert time.monotonic() - begun > 1
