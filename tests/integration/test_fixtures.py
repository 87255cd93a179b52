"""The fixtures that all other tests lean on: each test gets a database and a Valkey with nothing in them."""

from __future__ import annotations

import asyncpg
import pytest
import redis


@pytest.mark.parametrize("turn", [1, 2])
async def test_each_test_has_an_empty_database(postgres_dsn: str, turn: int) -> None:
    del turn
    connection = await asyncpg.connect(postgres_dsn)
    try:
        await connection.execute("CREATE TABLE only_here ()")
    finally:
        await connection.close()


@pytest.mark.parametrize("turn", [1, 2])
def test_each_test_has_an_empty_valkey(valkey_url: str, turn: int) -> None:
    del turn
    with redis.Redis.from_url(valkey_url) as client:
        assert client.dbsize() == 0
        assert client.function_list() == []
        client.set("only", "here")
        client.function_load("#!lua name=only\nredis.register_function('only', function() return 1 end)")
