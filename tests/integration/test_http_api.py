"""The HTTP port of a whole control plane: probes, metrics, the JSON API, and how the process begins and ends."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from postroad.control.v1 import account_service_pb2, account_service_pb2_grpc
from postroad.localstack import UNSAFE_BUT_FAST, PostgresServer
from support.controlplane_app import Serving, command, serving, write_settings
from support.databases import Database, _migrate
from support.fleet import NOW, add_node, execute, message_id, text_id
from support.nodes_port import until


@pytest.fixture
async def plane(migrated_database: Database, tmp_path: Path) -> AsyncIterator[Serving]:
    async with serving(migrated_database, tmp_path) as plane:
        yield plane


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as session:
        yield session


async def _call(
    http: aiohttp.ClientSession, plane: Serving, verb: str, path: str, body: Any = None, *, key: bool = True
) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {plane.key}"} if key else {}
    async with http.request(verb, plane.url(path), json=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_an_account_lives_its_life_over_json(plane: Serving, http: aiohttp.ClientSession) -> None:
    status, account = await _call(http, plane, "POST", "/api/v1/accounts?accountId=demo", {"displayName": "Demo"})
    assert (status, account["name"], account["displayName"]) == (200, "accounts/demo", "Demo")

    change = {"displayName": "Other", "etag": account["etag"]}
    status, account = await _call(http, plane, "PATCH", "/api/v1/accounts/demo?updateMask=displayName", change)
    assert (status, account["displayName"]) == (200, "Other")

    status, page = await _call(http, plane, "GET", "/api/v1/accounts?page_size=10")
    assert (status, [one["name"] for one in page["accounts"]]) == (200, ["accounts/demo"])

    status, account = await _call(http, plane, "POST", "/api/v1/accounts/demo:suspend", {"reason": "abuse"})
    assert (status, account["state"]) == (200, "STATE_SUSPENDED")


async def test_a_command_with_a_filter_is_an_operation_over_json(
    plane: Serving, http: aiohttp.ClientSession, migrated_database: Database
) -> None:
    await add_node(migrated_database)
    await execute(migrated_database, "INSERT INTO postroad.spools (spool, node) VALUES (gen_random_uuid(), 'edge-1')")
    wanted = {"recipientDomain": "x.example", "minAge": "90s", "states": ["RECIPIENT_STATE_DEFERRED"]}
    body = {"verb": "COMMAND_VERB_HOLD", "filter": wanted}
    status, operation = await _call(http, plane, "POST", "/api/v1/accounts/-/messages:command", body)
    assert (status, operation.get("done", False)) == (200, False)
    told = operation["metadata"]
    assert (told["verb"], told["filter"], told["spoolCount"]) == ("COMMAND_VERB_HOLD", wanted, 1)
    assert [one["node"] for one in told["pendingSpools"]] == ["nodes/edge-1"]
    assert (await _call(http, plane, "GET", f"/api/v1/{operation['name']}"))[1]["metadata"] == told
    status, error = await _call(http, plane, "POST", f"/api/v1/accounts/a/messages/{text_id(message_id())}:hold", {})
    assert (status, error["details"][0]["reason"]) == (404, "RESOURCE_NOT_FOUND")


@pytest.mark.parametrize(
    ("verb", "path", "body", "status", "reason"),
    [
        ("GET", "/api/v1/accounts/none", None, 404, "RESOURCE_NOT_FOUND"),
        ("GET", "/api/v1/accounts?colour=red", None, 400, "FIELD_INVALID"),
        ("GET", "/api/v1/accounts?pageSize=many", None, 400, "FIELD_INVALID"),
        ("GET", "/api/v1/accounts?pageSize=1&pageSize=2", None, 400, "FIELD_INVALID"),
        ("POST", "/api/v1/accounts?accountId=demo", {"colour": "red"}, 400, "FIELD_INVALID"),
        ("POST", "/api/v1/accounts?accountId=demo", ["no", "object"], 400, "FIELD_INVALID"),
        ("POST", "/api/v1/accounts?account.displayName=x", {}, 400, "FIELD_INVALID"),
        ("GET", "/api/v1/nowhere", None, 404, "METHOD_UNKNOWN"),
        ("PUT", "/api/v1/accounts", {}, 405, "METHOD_UNKNOWN"),
    ],
)
async def test_errors_are_google_rpc_status_with_the_status_of_their_code(
    plane: Serving, http: aiohttp.ClientSession, verb: str, path: str, body: Any, status: int, reason: str
) -> None:
    got, error = await _call(http, plane, verb, path, body)

    assert got == status
    assert isinstance(error["code"], int)
    assert [one.get("reason") for one in error.get("details", ())][:1] == [reason]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("messages:send", {"message": {"raw": "aGk=", "content": {}}}, "message"),
        (
            "messages:batchSend",
            {"requests": [{"message": {"raw": "aGk="}}, {"message": {"content": {}, "raw": "aGk="}}]},
            "requests[1].message",
        ),
    ],
)
async def test_two_fields_of_which_one_may_be_given_are_named(
    plane: Serving, http: aiohttp.ClientSession, path: str, body: Any, field: str
) -> None:
    status, error = await _call(http, plane, "POST", f"/api/v1/accounts/demo/{path}", body)
    (violation,) = error["details"][1]["fieldViolations"]
    assert (status, violation["field"]) == (400, field)
    assert violation["description"].startswith("must have only one of ")
    assert {"raw", "content"} <= set(violation["description"].split())


async def test_without_a_good_key_nothing_is_told(plane: Serving, http: aiohttp.ClientSession) -> None:
    status, error = await _call(http, plane, "GET", "/api/v1/accounts/none", key=False)

    assert (status, error["code"]) == (401, 16)


async def test_domains_stand_in_paths_as_they_are(plane: Serving, http: aiohttp.ClientSession) -> None:
    path = "/api/v1/destinations/*.example.net"
    status, suspended = await _call(http, plane, "POST", f"{path}:suspend", {"reason": "theirs"})
    assert (status, suspended["name"], suspended["state"]) == (200, "destinations/*.example.net", "STATE_SUSPENDED")
    status, receipt = await _call(http, plane, "GET", f"{path}/suspension")
    assert (status, receipt["state"]) == (200, "STATE_IN_FORCE")
    assert (await _call(http, plane, "GET", "/api/v1/destinations"))[1]["destinations"] == [suspended]
    assert (await _call(http, plane, "POST", f"{path}:resume", {}))[1]["state"] == "STATE_ACTIVE"


async def test_a_form_of_a_web_page_is_not_taken(plane: Serving, http: aiohttp.ClientSession) -> None:
    headers = {"Authorization": f"Bearer {plane.key}"}
    url = plane.url("/api/v1/accounts?accountId=demo")

    async with http.post(url, data=b'{"displayName": "x"}', headers=headers) as answer:
        assert answer.status == 400


async def test_a_stream_is_lines_of_json_that_end_when_the_server_drains(
    plane: Serving, http: aiohttp.ClientSession, migrated_database: Database
) -> None:
    await _call(http, plane, "POST", "/api/v1/accounts?accountId=demo", {})
    headers = {"Authorization": f"Bearer {plane.key}"}
    raw_id, event_time = message_id(), NOW

    async with http.get(plane.url("/api/v1/accounts/demo/messages:watch"), headers=headers) as answer:
        assert answer.status == 200, plane.log.read_text()[-6000:]
        assert json.loads(await answer.content.readline()) == {"position": "0-0"}
        await execute(
            migrated_database,
            """
            INSERT INTO postroad.delivery_events (message_id, account, type, event_time, node, spool)
            VALUES ($1, 'demo', 2, $2, 'edge-1', gen_random_uuid())
            """,
            text_id(raw_id),
            event_time,
        )
        line = json.loads(await answer.content.readline())
        assert line["events"][0]["type"] == "DELIVERY_EVENT_TYPE_SENT"
        plane.process.terminate()
        rest = [json.loads(line) for line in (await answer.text()).splitlines()]

    assert rest[-1]["error"]["code"] == 14


async def test_a_stream_that_is_refused_is_an_error_at_once(plane: Serving, http: aiohttp.ClientSession) -> None:
    status, error = await _call(http, plane, "GET", "/api/v1/accounts/demo/messages:watch", key=False)

    assert (status, error["code"]) == (401, 16)


async def test_the_openapi_document_covers_every_route(plane: Serving, http: aiohttp.ClientSession) -> None:
    status, document = await _call(http, plane, "GET", "/api/v1/openapi.json")

    assert status == 200
    assert "post" in document["paths"]["/api/v1/accounts/{name_1}/providers/{name_2}:verify"]
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))
    assert len(ids) > 40


async def test_metrics_have_the_names_that_were_asked_for(plane: Serving, http: aiohttp.ClientSession) -> None:
    await _call(http, plane, "GET", "/api/v1/accounts")
    await _call(http, plane, "GET", "/api/v1/accounts", key=False)

    async with http.get(plane.url("/metrics")) as answer:
        text = await answer.text()

    for line in (
        r'api_requests_total\{method="GET",path="/api/v1/accounts",status="200"\} 1\.0',
        r'api_requests_total\{method="GET",path="/api/v1/accounts",status="401"\} 1\.0',
        r"api_request_duration_seconds_count 2\.0",
        r"api_auth_failures_total 1\.0",
        r"db_connections_active \d",
        r"db_connections_idle \d",
        r'db_query_duration_seconds_count\{query="account_list"\} 1\.0',
        r"tls_cert_expiry_days \d+",
    ):
        assert re.search(f"^{line}", text, re.MULTILINE), line
    assert plane.key not in text


async def test_each_call_is_counted_once_and_only_by_what_it_called(
    plane: Serving, http: aiohttp.ClientSession
) -> None:
    await _call(http, plane, "PATCH", "/api/v1/accounts/a@example.com", {"displayName": 1})
    await _call(http, plane, "GET", "/api/v1/nothing/of/the/kind/prk_secret")
    async with http.request("PROPFIND", plane.url("/api/v1/accounts")) as refused:
        assert refused.status == 405
    async with plane.channel() as channel:
        stub: Any = account_service_pb2_grpc.AccountServiceStub(channel)
        await stub.ListAccounts(account_service_pb2.ListAccountsRequest(), metadata=plane.metadata)

    async with http.get(plane.url("/metrics")) as answer:
        lines = [line for line in (await answer.text()).splitlines() if line.startswith("api_requests_total")]

    assert sorted(lines) == [
        'api_requests_total{method="GET",path="unknown",status="404"} 1.0',
        'api_requests_total{method="PATCH",path="/api/v1/{account.name=accounts/*}",status="400"} 1.0',
        'api_requests_total{method="POST",path="/postroad.control.v1.AccountService/ListAccounts",status="OK"} 1.0',
        'api_requests_total{method="other",path="unknown",status="405"} 1.0',
    ]


async def test_health_is_open_and_reflection_is_the_operators(plane: Serving) -> None:
    async with plane.channel() as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        check = await health.Check(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.SERVING

        async def list_services(metadata: tuple[tuple[str, str], ...]) -> list[str]:
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            make_stub: Any = reflection_pb2_grpc.ServerReflectionStub
            stub = make_stub(channel)
            answers = [one async for one in stub.ServerReflectionInfo(iter([request]), metadata=metadata)]
            return [service.name for service in answers[0].list_services_response.service]

        assert "postroad.control.v1.AccountService" in await list_services(plane.metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await list_services(())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_sigterm_ends_it_in_time_and_in_order(plane: Serving) -> None:
    begun = time.monotonic()
    plane.process.terminate()

    async with asyncio.timeout(10):
        assert await plane.process.wait() == 0
    assert time.monotonic() - begun < 10
    assert "controlplane.stopping" in [event["event"] for event in plane.events()]


async def test_nothing_secret_is_in_its_log(plane: Serving, http: aiohttp.ClientSession) -> None:
    await _call(http, plane, "GET", "/api/v1/accounts")
    plane.process.terminate()
    await plane.process.wait()

    text = plane.log.read_text("utf-8")
    assert plane.key not in text
    assert "only-for-tests" not in text


async def test_it_does_not_serve_what_was_not_migrated(postgres_server: PostgresServer, tmp_path: Path) -> None:
    from support.databases import create_database, drop_database

    database = await asyncio.to_thread(create_database, postgres_server)
    settings = await write_settings(database, tmp_path)
    (tmp_path / "keys").mkdir()
    try:
        assert (await command(settings, "migrate", "verify")).status == 1
        refused = await command(settings, "bootstrap")
        assert (refused.status, "migrate up" in refused.err) == (1, True)
    finally:
        await asyncio.to_thread(drop_database, database)


async def test_it_does_not_serve_a_database_that_is_too_new(migrated_database: Database, tmp_path: Path) -> None:
    settings = await write_settings(migrated_database, tmp_path)
    assert (await command(settings, "bootstrap")).status == 0
    assert (await command(settings, "bootstrap")).status == 1
    await execute(migrated_database, "UPDATE postroad.schema_compat SET oldest_code = 999")

    refused = await command(settings, "serve")

    assert (refused.status, "999" in refused.err) == (1, True)


async def test_a_restart_of_postgresql_is_survived(passable_folder: Path, tmp_path: Path) -> None:
    server = PostgresServer(passable_folder / "postgres", settings=UNSAFE_BUT_FAST)
    await asyncio.to_thread(server.start)
    try:
        database = Database("postgres", server)
        await _migrate(database.dsn())
        async with serving(database, tmp_path) as plane, aiohttp.ClientSession() as http:
            port = server.port
            assert (await _call(http, plane, "GET", "/api/v1/accounts"))[0] == 200
            await asyncio.to_thread(server.stop, "immediate")

            status, error = await _call(http, plane, "GET", "/api/v1/accounts")
            assert (status, error["code"]) == (503, 14)
            assert [one["@type"] for one in error["details"]].count("type.googleapis.com/google.rpc.RetryInfo") == 1
            async with http.get(plane.url("/readyz")) as answer:
                assert answer.status == 503
            async with http.get(plane.url("/healthz")) as answer:
                assert answer.status == 200

            again = PostgresServer(passable_folder / "postgres", port, settings=UNSAFE_BUT_FAST)
            await asyncio.to_thread(again.start)
            try:

                async def is_ready() -> bool:
                    async with http.get(plane.url("/readyz")) as answer:
                        return answer.status == 200

                await until(is_ready, 20)
                assert (await _call(http, plane, "GET", "/api/v1/accounts"))[0] == 200
            finally:
                await asyncio.to_thread(again.stop)
    finally:
        await asyncio.to_thread(server.destroy)
