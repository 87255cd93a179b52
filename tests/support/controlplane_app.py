"""A whole control plane for tests: its settings on a test's database, its CA, and the process or the parts."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import yaml

from controlplane.adapters.administration import make_first_key
from controlplane.adapters.pki import create_authority, write_private
from controlplane.adapters.postgres.roles import API, FLEET, OWNER
from controlplane.settings import load_settings
from support.databases import Database
from support.fleet import role_dsn

ROOT = Path(__file__).parents[2]


async def write_settings(database: Database, folder: Path, **more: Any) -> Path:
    """A settings file with a CA beside it; every port is a free one."""
    authority = create_authority(folder / "pki", datetime.now(UTC))
    chain, key = authority.issue_server(["localhost", "127.0.0.1"], datetime.now(UTC))
    write_private(folder / "pki" / "server.pem", chain)
    write_private(folder / "pki" / "server.key", key)
    values: dict[str, Any] = {
        "database": {
            "api_dsn": await role_dsn(database, API),
            "fleet_dsn": await role_dsn(database, FLEET),
            "owner_dsn": await role_dsn(database, OWNER),
            "acquire_timeout_s": 2,
        },
        "pki_dir": str(folder / "pki"),
        "keyring_dir": str(folder / "keys"),
        "grpc": {"port": 0},
        "nodes": {"port": 0},
        "http": {"port": 0},
        # Tests ask more than people do.
        "api": {"requests_per_minute": 0},
        **more,
    }
    file = folder / "controlplane.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


class Finished(NamedTuple):
    status: int
    out: str
    err: str


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("POSTROAD_")}


async def command(settings: Path, *arguments: str) -> Finished:
    """Run one command of the program to its end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "controlplane", "--config", str(settings), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=_environment(),
    )
    async with asyncio.timeout(40):
        out, err = await process.communicate()
    return Finished(process.returncode or 0, out.decode(), err.decode())


class Serving(NamedTuple):
    """A control plane that serves, as its users see it."""

    grpc_port: int
    nodes_port: int
    http_port: int
    key: str
    ca_pem: bytes
    process: asyncio.subprocess.Process
    log: Path

    def channel(self) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(self.ca_pem)
        return grpc.aio.secure_channel(f"localhost:{self.grpc_port}", credentials)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.key}"),)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http_port}{path}"

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text("utf-8").splitlines() if line.startswith("{")]


@asynccontextmanager
async def serving(database: Database, folder: Path, **more: Any) -> AsyncIterator[Serving]:
    """The program, bootstrapped, in a process of its own; ended by SIGTERM, or killed when that does not help."""
    settings = await write_settings(database, folder, **more)
    (key,) = await asyncio.to_thread(make_first_key, load_settings(settings))
    log = folder / "controlplane.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "controlplane", "--config", str(settings), "serve"),
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            cwd=ROOT,
            env=_environment(),
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = await process.stdout.readline()
        assert line, log.read_text("utf-8")
        ready = json.loads(line)
        ports = (ready["grpc"], ready["nodes"], ready["http"])
        yield Serving(*ports, key, (folder / "pki" / "ca.pem").read_bytes(), process, log)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(15):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
