"""The HTTP port against callers without a good key, who are slow, or who say one thing in two places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import pytest

from controlplane.adapters.http import transcoding
from controlplane.adapters.http.server import HttpServer
from support.api import ApiStack, running_api
from support.databases import Database


class Http(NamedTuple):
    session: aiohttp.ClientSession
    stack: ApiStack
    base: str

    async def call(self, verb: str, path: str, key: str = "", **more: Any) -> tuple[int, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.base}{path}"
        async with self.session.request(verb, url, headers=headers, **more) as answer:
            return answer.status, await answer.json()


@pytest.fixture
async def http(migrated_database: Database) -> AsyncIterator[Http]:
    async with running_api(migrated_database) as stack:
        server = HttpServer(bytes, [lambda app: transcoding.add_json_api(app, stack.api.registry)])
        port = await server.start("127.0.0.1", 0)
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as session:
                yield Http(session, stack, f"http://127.0.0.1:{port}")
        finally:
            await server.stop()


def reason_of(error: dict[str, Any]) -> str:
    (reason,) = [str(detail["reason"]) for detail in error["details"] if "reason" in detail]
    return reason


@pytest.mark.parametrize("key", ["", "prk_AAAAAAAA_" + "A" * 43])
async def test_a_body_is_not_looked_at_without_a_good_key(http: Http, key: str) -> None:
    status, error = await http.call("POST", "/api/v1/accounts?accountId=x", key, json={"no such field": 1})
    assert (status, reason_of(error)) == (401, "API_KEY_INVALID" if key else "API_KEY_MISSING")


async def test_a_body_that_does_not_come_is_not_waited_for(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcoding, "BODY_S", 0.1)

    async def never_all() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {http.stack.operator.key}"}
    url = f"{http.base}/api/v1/accounts?accountId=x"
    async with http.session.post(url, data=never_all(), headers=headers) as answer:
        assert answer.status == 400
        assert "did not come" in (await answer.json())["message"]


async def test_what_the_path_says_cannot_be_said_again_in_the_query(http: Http) -> None:
    await http.stack.make_account("acme")
    path = "/api/v1/accounts/acme/providers?parent=accounts/other"
    status, error = await http.call("GET", path, http.stack.operator.key)
    assert (status, error["message"]) == (400, "parent: stands in the path")


@pytest.mark.parametrize(("verb", "path", "status"), [("GET", "/api/v1/none", 404), ("PUT", "/api/v1/accounts", 405)])
async def test_paths_that_nothing_serves_have_a_reason_too(http: Http, verb: str, path: str, status: int) -> None:
    got, error = await http.call(verb, path)
    assert (got, reason_of(error)) == (status, "METHOD_UNKNOWN")


async def test_a_path_with_a_line_end_is_answered_in_json(http: Http) -> None:
    status, error = await http.call("GET", "/api/v1/accounts/acme%0A", http.stack.operator.key)
    assert (status, reason_of(error)) == (400, "FIELD_INVALID")
