"""The live state of limits: what nodes drew is what the API shows, and counters that are away fail no call."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from controlplane.adapters.redis.functions import RedisFunctions
from controlplane.adapters.redis.limits import RedisLiveLimits
from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.core.config import NodeSettings
from dataplane.core.limits import LimitScope, LimitUnit, bucket_of, default_burst, slots_of
from dataplane.ports import Slot, Take
from postroad.control.v1 import credential_service_pb2, provider_service_pb2
from postroad.control.v1 import limit_pb2 as pb
from postroad.control.v1 import limit_service_pb2 as service
from postroad.localstack import ValkeyServer
from support.api import ApiStack, Client, running_api
from support.controlplane_app import serving
from support.databases import Database
from support.valkey_cluster import ValkeyCluster

HOUR_S = 3_600


@asynccontextmanager
async def api_on(database: Database, url: str, **options: Any) -> AsyncIterator[ApiStack]:
    """An API that looks at the counters at `url`, with an account `acme` that has a credential and a provider."""
    functions = RedisFunctions(url, **options)
    try:
        async with running_api(database, live=RedisLiveLimits(functions)) as stack:
            await stack.make_account("acme")
            for credential in ("app", "web"):
                request = credential_service_pb2.CreateSmtpCredentialRequest(
                    parent="accounts/acme", smtp_credential_id=credential
                )
                await stack.operator.credential("CreateSmtpCredential", request)
            provider = provider_service_pb2.CreateProviderRequest(parent="accounts/acme", provider_id="relay")
            provider.provider.smtp.endpoints.add(host="relay.example.com")
            await stack.operator.provider("CreateProvider", provider)
            yield stack
    finally:
        await functions.close()


@asynccontextmanager
async def node(url: str) -> AsyncIterator[RedisLimiter]:
    """The limiter of a worker."""
    limiter = RedisLimiter(url, LocalLimiter(time.monotonic), timeout_s=5.0)
    await limiter.start()
    try:
        yield limiter
    finally:
        await limiter.close()


@pytest.fixture
async def stack(migrated_database: Database, valkey_url: str) -> AsyncIterator[ApiStack]:
    async with api_on(migrated_database, valkey_url, timeout_s=5.0) as stack:
        yield stack


def limit_of(scope: LimitScope, unit: LimitUnit, amount: int, period_s: int = HOUR_S, **fields: Any) -> pb.Limit:
    limit = pb.Limit(scope=pb.Limit.Scope.ValueType(scope), unit=pb.Limit.Unit.ValueType(unit), amount=amount, **fields)
    if period_s:
        limit.period.seconds = period_s
    return limit


async def make(stack: ApiStack, limit_id: str, limit: pb.Limit, parent: str = "accounts/acme") -> str:
    request = service.CreateLimitRequest(parent=parent, limit_id=limit_id, limit=limit)
    return str((await stack.operator.limit("CreateLimit", request)).name)


async def state_of(client: Client, name: str) -> pb.LimitState:
    found = await client.limit("GetLimit", service.GetLimitRequest(name=name))
    state: pb.LimitState = found.state
    return state


def take(scope: LimitScope, subject: str, amount: int, cost: int, burst: int = 0) -> Take:
    bucket = bucket_of(scope, LimitUnit.MESSAGE, subject)
    return Take(bucket.key, bucket.tag, burst or default_burst(amount), amount / HOUR_S, cost)


async def test_what_a_node_takes_is_missing_from_the_bucket(stack: ApiStack, valkey_url: str) -> None:
    name = await make(stack, "hourly", limit_of(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 3_600, burst=100))
    state = await state_of(stack.operator, name)
    (full,) = state.subjects
    assert (state.known, full.subject) == (True, "accounts/acme")
    assert (full.available, full.used, full.capacity) == (100, 0, 100)
    assert not full.HasField("next_delay")
    async with node(valkey_url) as limiter:
        grant = await limiter.take([take(LimitScope.ACCOUNT, "accounts/acme", 3_600, 60, burst=100)])
        assert (grant.allowed, grant.local) == (True, False)
    (used,) = (await state_of(stack.operator, name)).subjects
    # One comes back each second.
    assert 40 <= used.available <= 50
    assert used.used == 100 - used.available
    assert 0 < used.next_delay.ToTimedelta().total_seconds() <= 1
    assert 50 <= used.full_delay.ToTimedelta().total_seconds() <= 60


async def test_a_debt_shows_as_nothing_left_and_the_time_until_it_is_paid(stack: ApiStack, valkey_url: str) -> None:
    name = await make(stack, "hourly", limit_of(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 3_600, burst=100))
    async with node(valkey_url) as limiter:
        assert (await limiter.take([take(LimitScope.ACCOUNT, "accounts/acme", 3_600, 300, burst=100)])).allowed
    (owed,) = (await state_of(stack.operator, name)).subjects
    # One comes back each second.
    assert (owed.available, owed.capacity) == (0, 100)
    assert 290 <= owed.used <= 300
    assert 191 <= owed.next_delay.ToTimedelta().total_seconds() <= 201
    assert 290 <= owed.full_delay.ToTimedelta().total_seconds() <= 300


async def test_connections_that_a_node_holds_are_counted(stack: ApiStack, valkey_url: str) -> None:
    limit = limit_of(LimitScope.PROVIDER, LimitUnit.CONNECTION, 2, 0, subject="accounts/acme/providers/relay")
    name = await make(stack, "at-once", limit)
    bucket = slots_of(LimitScope.PROVIDER, "accounts/acme/providers/relay")
    slots = [Slot(bucket.key, bucket.tag, 5, 60.0, f"holder-{n}") for n in range(3)]
    async with node(valkey_url) as limiter:
        assert (await limiter.hold(slots[:1])).allowed
        (state,) = (await state_of(stack.operator, name)).subjects
        assert (state.available, state.used, state.capacity) == (1, 1, 2)
        assert not state.HasField("full_delay")
        # More than the limit allows since it was lowered.
        assert (await limiter.hold(slots[1:])).allowed
        (state,) = (await state_of(stack.operator, name)).subjects
        assert (state.available, state.used, state.capacity) == (0, 3, 2)


async def test_a_limit_without_a_subject_shows_each_one_that_no_other_limit_counts_for(
    stack: ApiStack, valkey_url: str
) -> None:
    each = await make(stack, "each", limit_of(LimitScope.CREDENTIAL, LimitUnit.MESSAGE, 600))
    app, web = "accounts/acme/smtpCredentials/app", "accounts/acme/smtpCredentials/web"
    assert [one.subject for one in (await state_of(stack.operator, each)).subjects] == [app, web]
    async with node(valkey_url) as limiter:
        assert (await limiter.take([take(LimitScope.CREDENTIAL, web, 600, 60)])).allowed
    states = {one.subject: one.available for one in (await state_of(stack.operator, each)).subjects}
    assert states == {app: 60, web: 0}
    await make(stack, "app", limit_of(LimitScope.CREDENTIAL, LimitUnit.MESSAGE, 5, subject=app))
    assert [one.subject for one in (await state_of(stack.operator, each)).subjects] == [web]
    # The account's word for all of its credentials counts before the shared one.
    shared = await make(stack, "shared", limit_of(LimitScope.CREDENTIAL, LimitUnit.MESSAGE, 5), "")
    assert list((await state_of(stack.operator, shared)).subjects) == []


async def test_a_shared_limit_shows_at_most_a_hundred_subjects_and_says_that_there_are_more(stack: ApiStack) -> None:
    await stack.as_superuser(
        "INSERT INTO postroad.accounts (account, node_pool)"
        " SELECT 'many-' || to_char(n, 'FM000'), 'default' FROM generate_series(1, 120) n"
    )
    name = await make(stack, "all", limit_of(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 600), "")
    state = await state_of(stack.operator, name)
    assert (state.known, state.more, len(state.subjects)) == (True, True, 100)
    assert state.subjects[1].subject == "accounts/many-001"
    addresses = await make(stack, "addresses", limit_of(LimitScope.ADDRESS, LimitUnit.CONNECTION, 600), "")
    state = await state_of(stack.operator, addresses)
    assert (state.known, len(state.subjects)) == (True, 0)


async def test_an_answer_looks_at_so_much_and_says_what_it_left_out(
    stack: ApiStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.services.limit_states._MAX_LOOKS", 3)
    for limit_id, unit in (("a", LimitUnit.MESSAGE), ("b", LimitUnit.RECIPIENT)):
        await make(stack, limit_id, limit_of(LimitScope.CREDENTIAL, unit, 600))
    await make(stack, "c", limit_of(LimitScope.ACCOUNT, LimitUnit.BYTE, 600))
    found = await stack.operator.limit("ListLimits", service.ListLimitsRequest(parent="accounts/acme"))
    assert [(one.state.known, len(one.state.subjects)) for one in found.limits] == [(True, 2), (False, 0), (True, 1)]
    assert "by itself" in found.limits[1].state.reason
    assert (await state_of(stack.operator, "accounts/acme/limits/b")).known


async def test_what_holds_for_an_account_shows_the_state_of_its_defaults(stack: ApiStack, valkey_url: str) -> None:
    amount = NodeSettings().account_messages_per_hour
    async with node(valkey_url) as limiter:
        assert (await limiter.take([take(LimitScope.ACCOUNT, "accounts/acme", amount, 10_000)])).allowed
    client = await stack.make_key("acme", "config.read")
    request = service.ListEffectiveLimitsRequest(parent="accounts/acme")
    found = await client.limit("ListEffectiveLimits", request)
    default = found.limits[0]
    assert (default.name, default.scope, default.origin) == ("", LimitScope.ACCOUNT, pb.Limit.ORIGIN_DEFAULT)
    assert [one.subject for one in default.state.subjects] == ["accounts/acme"]
    assert default.state.subjects[0].capacity == 10_000
    assert default.state.subjects[0].available < 5_000


async def test_an_account_is_told_of_its_own_part_of_a_shared_limit(stack: ApiStack) -> None:
    await stack.make_account("other")
    await make(stack, "all", limit_of(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 600), "")
    request = provider_service_pb2.CreateProviderRequest(provider_id="shared")
    request.provider.smtp.endpoints.add(host="relay.example.com")
    await stack.operator.provider("CreateProvider", request)
    limit = limit_of(LimitScope.PROVIDER, LimitUnit.MESSAGE, 600, subject="providers/shared")
    await make(stack, "shared-relay", limit, "")
    client = await stack.make_key("acme", "config.read")
    for caller, seen in ((client, []), (stack.operator, ["providers/shared"])):
        found = await caller.limit("ListEffectiveLimits", service.ListEffectiveLimitsRequest(parent="accounts/acme"))
        subjects = {one.name: [state.subject for state in one.state.subjects] for one in found.limits if one.name}
        # How much others send through a shared provider is nobody's business.
        assert subjects == {"limits/all": ["accounts/acme"], "limits/shared-relay": seen}


async def test_the_library_is_loaded_where_no_node_did(stack: ApiStack, valkey_server: ValkeyServer) -> None:
    name = await make(stack, "hourly", limit_of(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 600))
    (state,) = (await state_of(stack.operator, name)).subjects
    assert state.available == 60


async def test_counters_that_hang_cost_a_tenth_of_a_second_and_no_more(
    migrated_database: Database, passable_folder: Any
) -> None:
    server = ValkeyServer(passable_folder / "hanging").start()
    clock = Clock()
    heard: list[str] = []
    try:
        async with api_on(migrated_database, server.url(), timeout_s=0.1, clock=clock, on_change=heard.append) as stack:
            name = await make(stack, "hourly", limit_of(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 600))
            await until_known(stack, name, clock)
            heard.clear()
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            try:
                begun = time.monotonic()
                state = await state_of(stack.operator, name)
                assert (state.known, list(state.subjects)) == (False, [])
                assert "no answer in 100 ms" in state.reason
                # Hung up on, not waited for: far below any timeout of TCP or of the call.
                assert time.monotonic() - begun < 5
                assert len(heard) == 1
                # For a while nobody even asks.
                begun = time.monotonic()
                for _ in range(5):
                    assert not (await state_of(stack.operator, name)).known
                assert heard == [state.reason.removeprefix("Redis cannot be asked: ")]
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await until_known(stack, name, clock)
            assert heard[-1] == ""
    finally:
        server.destroy()


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def until_known(stack: ApiStack, name: str, clock: Clock) -> None:
    """A machine that is busy may need more than one try within a tenth of a second."""
    async with asyncio.timeout(20):
        while not (await state_of(stack.operator, name)).known:
            clock.now_s += 10


async def test_counters_that_are_not_there_fail_no_call(migrated_database: Database) -> None:
    async with api_on(migrated_database, "redis://127.0.0.1:1/0", timeout_s=5.0) as stack:
        name = await make(stack, "hourly", limit_of(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 600))
        state = await state_of(stack.operator, name)
        assert not state.known
        assert "ConnectionError" in state.reason


async def test_a_cluster_is_asked_where_its_keys_are(
    migrated_database: Database, valkey_cluster: ValkeyCluster
) -> None:
    async with api_on(migrated_database, valkey_cluster.url(), timeout_s=20.0) as stack:
        for account in ("other", "third", "fourth"):
            await stack.make_account(account)
        each = await make(stack, "all", limit_of(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 600), "")
        slots = await make(stack, "slots", limit_of(LimitScope.PROVIDER, LimitUnit.CONNECTION, 5, 0))
        subjects = [f"accounts/{account}" for account in ("acme", "fourth", "other", "third")]
        async with node(valkey_cluster.url()) as limiter:
            for number, subject in enumerate(subjects):
                grant = await limiter.take([take(LimitScope.ACCOUNT, subject, 600, 10 * number)])
                assert (grant.allowed, grant.local) == (True, False)
        for _ in range(2):
            state = await state_of(stack.operator, each)
            assert state.known, state.reason
            assert [one.subject for one in state.subjects] == subjects
            levels = [one.available for one in state.subjects]
            assert all(60 - 10 * n <= level <= 70 - 10 * n for n, level in enumerate(levels)), levels
        assert (await state_of(stack.operator, slots)).subjects[0].available == 5


async def test_limits_live_their_life_over_json_and_are_described(
    migrated_database: Database, tmp_path: Path, valkey_url: str
) -> None:
    settings = {"redis": {"url": valkey_url}}
    async with serving(migrated_database, tmp_path, **settings) as plane, aiohttp.ClientSession() as http:

        async def call(verb: str, path: str, body: Any = None) -> Any:
            headers = {"Authorization": f"Bearer {plane.key}"}
            async with http.request(verb, plane.url(f"/api/v1/{path}"), json=body, headers=headers) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.json()

        await call("POST", "accounts?accountId=acme", {"deliveryWeight": 3})
        hourly = {"scope": "SCOPE_ACCOUNT", "unit": "UNIT_MESSAGE", "amount": "600", "period": "3600s"}
        own = await call("POST", "accounts/acme/limits?limitId=hourly", hourly)
        slots = {"scope": "SCOPE_DESTINATION", "unit": "UNIT_CONNECTION", "amount": "5"}
        shared = await call("POST", "limits?limitId=hosts", slots)
        assert (own["name"], shared["name"]) == ("accounts/acme/limits/hourly", "limits/hosts")
        assert [one["name"] for one in (await call("GET", "accounts/acme/limits"))["limits"]] == [own["name"]]
        assert [one["name"] for one in (await call("GET", "limits"))["limits"]] == [shared["name"]]
        (state,) = (await call("GET", own["name"]))["state"]["subjects"]
        assert state == {"subject": "accounts/acme", "available": "60", "capacity": "60"}
        found = await call("GET", "accounts/acme/effectiveLimits")
        assert {one.get("name") for one in found["limits"]} >= {own["name"], shared["name"], None}
        for made, amount in ((own, "7"), (shared, "8")):
            change = {"amount": amount, "etag": made["etag"]}
            changed = await call("PATCH", f"{made['name']}?updateMask=amount", change)
            assert changed["amount"] == amount
            await call("DELETE", f"{made['name']}?etag={quote(changed['etag'])}")
        paths = (await call("GET", "openapi.json"))["paths"]
    assert set(paths["/api/v1/limits"]) == set(paths["/api/v1/accounts/{parent_1}/limits"]) == {"get", "post"}
    assert "get" in paths["/api/v1/accounts/{parent_1}/effectiveLimits"]
