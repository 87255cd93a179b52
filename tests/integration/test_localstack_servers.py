"""The servers of the local stack, for real: what survives a kill, and what people are told when it fails."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from postroad.localstack import LocalStackError, PostgresServer, ValkeyServer, shelter
from postroad.localstack.ports import DEFAULT_PORTS


@pytest.fixture
def postgres(passable_folder: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(passable_folder / "postgres").start()
    yield server
    server.destroy()


@pytest.fixture
def valkey(passable_folder: Path) -> Iterator[ValkeyServer]:
    settings = {"appendonly": "yes", "appendfsync": "always"}
    server = ValkeyServer(passable_folder / "valkey", settings=settings).start()
    yield server
    server.destroy()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield holder.getsockname()[1]


async def _execute(server: PostgresServer, statement: str) -> None:
    connection = await asyncpg.connect(server.dsn())
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def _fetch(server: PostgresServer, query: str) -> object:
    connection = await asyncpg.connect(server.dsn())
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def test_postgres_keeps_what_was_committed_over_kill_and_stop(postgres: PostgresServer) -> None:
    await _execute(postgres, "CREATE TABLE kept (i int)")
    await _execute(postgres, "INSERT INTO kept VALUES (7)")
    postgres.kill()
    assert not postgres.is_running
    postgres.start()
    assert await _fetch(postgres, "SELECT i FROM kept") == 7
    postgres.stop()
    assert postgres.pid is None
    postgres.start()
    assert await _fetch(postgres, "SELECT i FROM kept") == 7


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_postgres_stops_in_every_mode(postgres: PostgresServer, mode: str) -> None:
    postgres.stop(mode)
    assert not postgres.is_running
    postgres.stop(mode)


async def test_postgres_serves_utf8_with_durable_defaults(postgres: PostgresServer) -> None:
    assert await _fetch(postgres, "SHOW server_encoding") == "UTF8"
    assert await _fetch(postgres, "SHOW fsync") == "on"
    assert await _fetch(postgres, "SHOW data_checksums") == "on"


async def test_postgres_wants_the_password(postgres: PostgresServer) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(postgres.dsn(password="guess"))


def test_secrets_can_be_read_by_the_serving_user_only(postgres: PostgresServer, valkey: ValkeyServer) -> None:
    for path in (
        postgres.data_dir / "password",
        valkey.data_dir / "password",
        valkey.data_dir / "valkey.conf",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_postgres_does_not_run_as_root(postgres: PostgresServer) -> None:
    assert postgres.pid is not None
    assert (postgres.data_dir / "cluster").stat().st_uid != 0


@pytest.mark.parametrize("kind", [PostgresServer, ValkeyServer])
def test_taken_port_is_named(kind: type[PostgresServer | ValkeyServer], passable_folder: Path, taken_port: int) -> None:
    server = kind(passable_folder / "data", taken_port)
    with pytest.raises(LocalStackError, match=f"port {taken_port} .* is taken") as refused:
        server.start()
    assert re.findall(r"--port (\w+)=0", refused.value.advice)[0] in DEFAULT_PORTS
    assert not server.is_running


def test_second_owner_is_refused_while_the_first_runs(postgres: PostgresServer) -> None:
    with pytest.raises(LocalStackError, match="in use by another running Postroad"):
        PostgresServer(postgres.data_dir).start()
    assert postgres.is_running


def test_half_written_cluster_is_made_anew(passable_folder: Path) -> None:
    folder = passable_folder / "postgres"
    (folder / "cluster" / "base").mkdir(parents=True)
    (folder / "cluster" / "PG_VERSION").write_text("18\n", encoding="ascii")
    (folder / "initializing").touch()
    server = PostgresServer(folder)
    try:
        server.start()
        assert (folder / "initialized").exists()
        assert not (folder / "initializing").exists()
    finally:
        server.destroy()


def test_cluster_of_somebody_else_is_refused_and_left_alone(passable_folder: Path) -> None:
    foreign = passable_folder / "postgres" / "cluster" / "PG_VERSION"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("15\n", encoding="ascii")
    with pytest.raises(LocalStackError, match="not made by Postroad"):
        PostgresServer(passable_folder / "postgres").start()
    assert foreign.read_text(encoding="ascii") == "15\n"


async def test_stale_pid_of_a_stranger_does_not_keep_postgres_down(postgres: PostgresServer) -> None:
    postgres.kill()
    # After a reboot the number may belong to anybody: here, to this very test.
    for path in (postgres.data_dir / "cluster" / "postmaster.pid", postgres.data_dir / "server.pid"):
        path.write_text(f"{os.getpid()}\n", encoding="ascii")
    postgres.start()
    assert await _fetch(postgres, "SELECT 1") == 1


async def test_server_whose_owner_was_killed_is_replaced(passable_folder: Path) -> None:
    folder = passable_folder / "postgres"
    script = (
        "import sys, pathlib; from postroad.localstack import PostgresServer;"
        "print(PostgresServer(pathlib.Path(sys.argv[1])).start().pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs on this loop
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        orphan = int(owner.stdout.readline())
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    os.kill(orphan, 0)
    server = PostgresServer(folder)
    try:
        server.start()
        assert server.pid != orphan
        assert await _fetch(server, "SELECT 1") == 1
    finally:
        server.destroy()


def test_valkey_keeps_what_was_appended_over_kill(valkey: ValkeyServer) -> None:
    with redis.Redis.from_url(valkey.url()) as client:
        client.set("kept", "7")
    valkey.kill()
    valkey.start()
    with redis.Redis.from_url(valkey.url()) as client:
        assert client.get("kept") == b"7"


def test_valkey_wants_the_password(valkey: ValkeyServer) -> None:
    with (
        redis.Redis(port=valkey.port, password="guess", retry=Retry(NoBackoff(), 0)) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_bad_setting_shows_what_the_server_said(passable_folder: Path) -> None:
    server = ValkeyServer(passable_folder / "valkey", settings={"no-such-setting": "1"})
    with pytest.raises(LocalStackError, match="no-such-setting"):
        server.start()
    assert not server.is_running


def test_missing_wheel_says_what_to_install(passable_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    for server in (PostgresServer(passable_folder / "p"), ValkeyServer(passable_folder / "v")):
        with pytest.raises(LocalStackError, match="make up"):
            server.start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root switches users")
def test_folder_closed_to_the_serving_user_becomes_a_link_into_a_shelter(passable_folder: Path) -> None:
    closed = passable_folder / "closed"
    closed.mkdir(mode=0o700)
    open_shelter = passable_folder / "shelter"
    open_shelter.mkdir()
    open_shelter.chmod(0o711)
    server = PostgresServer(closed / "postgres", shelter=open_shelter)
    try:
        server.start()
        assert server.data_dir.is_symlink()
        assert server.data_dir.resolve().is_relative_to(open_shelter.resolve())
        server.stop()
        first = server.data_dir.resolve()
        assert server.start().data_dir.resolve() == first
    finally:
        server.destroy()
    assert not list(open_shelter.glob("data-*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root switches users")
def test_programs_closed_to_the_serving_user_are_copied_once(passable_folder: Path) -> None:
    account = shelter.serving_account(passable_folder / "none", "nobody")
    source = passable_folder / "programs"
    (source / "bin").mkdir(parents=True)
    (source / "bin" / "server").write_text("#!/bin/sh\n", encoding="ascii")
    (source / "bin" / "server").chmod(0o700)
    copy = shelter.runnable_copy(source, ("bin/server",), account, passable_folder)
    assert copy != source
    assert stat.S_IMODE((copy / "bin" / "server").stat().st_mode) == 0o705
    assert shelter.runnable_copy(source, ("bin/server",), account, passable_folder) == copy
    assert not list(passable_folder.glob("making-*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root switches users")
def test_room_of_a_deleted_checkout_is_swept(passable_folder: Path) -> None:
    account = shelter.serving_account(passable_folder / "none", "nobody")
    rooms = passable_folder / "shelter"
    rooms.mkdir()
    rooms.chmod(0o711)
    checkouts = [passable_folder / name for name in ("first", "second")]
    for checkout in checkouts:
        checkout.mkdir(mode=0o700)
    abandoned = shelter.settle_folder(checkouts[0] / "postgres", account, rooms)
    shutil.rmtree(checkouts[0])
    kept = shelter.settle_folder(checkouts[1] / "postgres", account, rooms)
    assert not abandoned.exists()
    assert kept.exists()
