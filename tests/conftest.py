"""Fixtures for all tests: real servers for the session, and for each test a database or an empty Valkey of
its own.

    postgres_server     session   PostgreSQL with fsync off: for tests of logic, not of durability
    postgres_dsn        test      a new, empty database, as the superuser
    migrated_database   test      a `support.databases.Database` with all migrations applied
    valkey_server       session   Valkey
    valkey_url          test      the same, emptied (functions too)
    valkey_cluster      test      three Valkey servers as one cluster, emptied; the servers last for the session
    passable_folder     test      a folder that servers can use when the tests run as root

Servers start when a test first asks for them, one set a worker process, and end with the session whatever
happened. Async tests run on uvloop; POSTROAD_TEST_LOOP=asyncio chooses the standard loop.

Modules whose tests may take longest, by their own `timeout`, begin first: the quick ones fill up what time is left, and
no process works alone at the end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

# gRPC reads this when it is loaded. uvloop starts programs by fork, and where gRPC is at work then, its handlers crash
# one child in thirty before it has become the program. No test goes on with gRPC in a child.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import pytest
import redis
import uvloop
from hypothesis import settings

from postroad.localstack import UNSAFE_BUT_FAST, PostgresServer, ValkeyServer
from support import folders
from support.databases import Database, create_database, create_migrated_template, drop_database
from support.valkey_cluster import ValkeyCluster

# A slow machine is no finding: timings never decide a test.
settings.register_profile("postroad", deadline=None, print_blob=True)
settings.load_profile("postroad")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Both loops must serve; which one a run uses is the caller's choice."""
    del config, item
    loops = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    name = os.environ.get("POSTROAD_TEST_LOOP", "uvloop")
    return {name: loops[name]}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """See the module. Modules that are equal in this stay in their random order, as do the tests of each."""
    modules = [list(group) for _, group in groupby(items, lambda item: item.path)]
    modules.sort(key=lambda tests: max(map(_allowed_s, tests)), reverse=True)
    items[:] = [item for tests in modules for item in tests]


def _allowed_s(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0]) if mark else 0.0


@pytest.fixture
def passable_folder() -> Iterator[Path]:
    with folders.passable_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    folders.sweep_left_behind()
    with folders.passable_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def postgres_server(server_folder: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(server_folder / folders.POSTGRES_NAME, settings=UNSAFE_BUT_FAST)
    try:
        yield server.start()
    finally:
        server.destroy()


@pytest.fixture
def postgres_dsn(postgres_server: PostgresServer) -> Iterator[str]:
    database = create_database(postgres_server)
    yield database.dsn()
    drop_database(database)


@pytest.fixture(scope="session")
def migrated_template(postgres_server: PostgresServer) -> str:
    return create_migrated_template(postgres_server)


@pytest.fixture
def migrated_database(postgres_server: PostgresServer, migrated_template: str) -> Iterator[Database]:
    database = create_database(postgres_server, migrated_template)
    yield database
    drop_database(database)


@pytest.fixture(scope="session")
def valkey_server(server_folder: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(server_folder / folders.VALKEY_NAME)
    try:
        yield server.start()
    finally:
        server.destroy()


@pytest.fixture
def valkey_url(valkey_server: ValkeyServer) -> str:
    url = valkey_server.url()
    with redis.Redis.from_url(url) as client:
        client.flushall()
        client.function_flush("SYNC")
    return url


@pytest.fixture(scope="session")
def valkey_cluster_servers(server_folder: Path) -> Iterator[ValkeyCluster]:
    cluster = ValkeyCluster(server_folder / "valkey-cluster")
    try:
        yield cluster.start()
    finally:
        cluster.destroy()


@pytest.fixture
def valkey_cluster(valkey_cluster_servers: ValkeyCluster) -> ValkeyCluster:
    valkey_cluster_servers.empty()
    return valkey_cluster_servers
