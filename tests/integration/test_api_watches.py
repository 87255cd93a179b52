"""Watches against who misuses them: too many for one account, readers that read nothing, keys that end meanwhile."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
import pytest

from controlplane.adapters.grpc import calls
from controlplane.adapters.http.server import HttpServer
from controlplane.adapters.http.transcoding import add_json_api
from dataplane.core.ids import format_message_id, new_message_id
from postroad.control.v1 import credential_service_pb2
from postroad.control.v1 import message_service_pb2 as service
from postroad.control.v1 import message_service_pb2_grpc as service_grpc
from support.api import ApiStack, Client, running_api, take_apart
from support.databases import Database
from support.fleet import execute
from support.nodes_port import until

SPOOL = "22222222-2222-4222-8222-222222222222"
MUCH = 30_000


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database, max_watchers=8) as running:
        yield running


def watch(client: Client, account: str, **fields: str) -> Any:
    stub: Any = service_grpc.MessageServiceStub(client.channel)
    request = service.WatchEventsRequest(parent=f"accounts/{account}", **fields)
    return stub.WatchEvents(request, metadata=client.metadata, timeout=20)


async def add_events(database: Database, account: str, count: int) -> str:
    """A message of the account with many long events; returns its name."""
    one = format_message_id(new_message_id(int(datetime.now(UTC).timestamp() * 1000), bytes(10)))
    await execute(database, "SELECT postroad.ensure_partitions(current_date - 1, 3)")
    await execute(
        database,
        """
        INSERT INTO postroad.delivery_events (message_id, account, recipient_index, type, event_time, node, spool,
            reply_text)
        SELECT $1, $2, 0, 3, now(), 'edge-1', $3, repeat('x', 500) FROM generate_series(1, $4)
        """,
        *(one, account, SPOOL, count),
    )
    return f"accounts/{account}/messages/{one}"


async def test_one_account_cannot_take_every_watch(stack: ApiStack) -> None:
    greedy, other = await stack.make_account("greedy"), await stack.make_account("other")
    async with AsyncExitStack() as open_watches:
        for _ in range(2):
            call = watch(greedy, "greedy")
            open_watches.callback(call.cancel)
        await until(lambda: stack.signal.waits >= 2)

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await watch(greedy, "greedy").read()
        assert take_apart(refused.value).reason == "TOO_MANY_WATCHERS"

        good = watch(other, "other")
        open_watches.callback(good.cancel)
        waits = stack.signal.waits
        await until(lambda: stack.signal.waits > waits)
    assert not good.done() or good.cancelled()


async def test_a_reader_that_reads_nothing_gives_its_watch_back(
    stack: ApiStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "READER_S", 0.2)
    client = await stack.make_account("acme")
    message = await add_events(stack.database, "acme", MUCH)
    stalled = [watch(client, "acme", message=message) for _ in range(2)]

    async def ended() -> bool:
        return sum(method.endswith("WatchEvents") for method, _, _ in stack.calls) == len(stalled)

    await until(ended)
    # It is told and counted as what it is, not as what its caller gave up.
    assert [status for method, status, _ in stack.calls if method.endswith("WatchEvents")] == ["RESOURCE_EXHAUSTED"] * 2
    for call in stalled:
        assert await reason_of_end(call, []) == "READER_TOO_SLOW"
    again = watch(client, "acme", message=message)
    assert (await again.read()).events
    again.cancel()


async def read_to_the_end(call: Any, seen: list[str]) -> None:
    """What was on its way when a watch was ended is still read."""
    while (page := await call.read()) is not grpc.aio.EOF:
        seen += [event.position for event in page.events]
    await call


async def reason_of_end(call: Any, seen: list[str]) -> str:
    """Read to the end; why it was ended."""
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await read_to_the_end(call, seen)
    return take_apart(ended.value).reason


async def test_a_reader_that_was_ended_resumes_without_gap_or_double(
    stack: ApiStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "READER_S", 0.2)
    client = await stack.make_account("acme")
    message = await add_events(stack.database, "acme", MUCH)
    slow = watch(client, "acme", message=message)
    seen = [event.position for event in (await slow.read()).events]
    await until(lambda: any(method.endswith("WatchEvents") for method, _, _ in stack.calls))
    assert await reason_of_end(slow, seen) == "READER_TOO_SLOW"
    assert 0 < len(seen) < MUCH

    again = watch(client, "acme", message=message, position=seen[-1])
    while len(seen) < MUCH:
        seen += [event.position for event in (await again.read()).events]
    again.cancel()

    rows = await stack.as_superuser(
        "SELECT change_xid::text || '-' || position FROM postroad.delivery_events ORDER BY change_xid, position"
    )
    assert seen == [row[0] for row in rows]


async def test_a_watch_says_nothing_more_once_its_key_is_gone(stack: ApiStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_ADMITTED_S", 0.0)
    client = await stack.make_account("acme")
    call = watch(client, "acme")
    assert (await call.read()).position
    page = await stack.operator.credential(
        "ListApiKeys", credential_service_pb2.ListApiKeysRequest(parent="accounts/acme")
    )
    (key,) = page.api_keys
    revoke = credential_service_pb2.RevokeApiKeyRequest(name=key.name, etag=key.etag)
    await stack.operator.credential("RevokeApiKey", revoke)

    await add_events(stack.database, "acme", 1)
    stack.signal.ring()

    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await call.read()
    assert take_apart(ended.value).reason == "API_KEY_INVALID"


async def test_a_reader_of_lines_that_reads_nothing_is_cut_off(
    stack: ApiStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "READER_S", 0.2)
    client = await stack.make_account("acme")
    message = await add_events(stack.database, "acme", MUCH)
    ended: list[tuple[str, str, int, float | None]] = []
    http = HttpServer(bytes, [lambda app: add_json_api(app, stack.api.registry, lambda *call: ended.append(call))])
    port = await http.start("127.0.0.1", 0)
    try:
        with socket.create_connection(("127.0.0.1", port)) as peer:
            path = f"/api/v1/accounts/acme/messages:watch?message={message}"
            peer.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\n\r\n".encode())
            await until(lambda: bool(ended))

            peer.settimeout(10)
            got = await asyncio.to_thread(_rest, peer)
    finally:
        await http.stop()
    assert 0 < len(got) < MUCH * 500
    assert not got.endswith(b"0\r\n\r\n"), "cut off, not brought to an end"
    ((verb, path, _, seconds),) = ended
    assert (verb, path, seconds) == ("GET", "/api/v1/{parent=accounts/*}/messages:watch", None)


def _rest(peer: socket.socket) -> bytes:
    got = bytearray()
    while part := peer.recv(1_000_000):
        got += part
    return bytes(got)
