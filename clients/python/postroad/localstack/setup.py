"""The steps that turn an empty folder into a stack that can start; each knows whether it has been done.

Contract. A step may be cut off at any moment, by SIGKILL too, and is then done again by the next start: what a step
makes is either made in one piece or looked at before it is made again, and its note is written last. Notes of steps
that live in the database name the cluster; when the folder of PostgreSQL was thrown away they count no more.

    step          done when                                   makes
    database      the note names the cluster                  database, roles; keys/database.json
    migrations    the note names the cluster and the files    schema
    certificates  pki/ holds them                             CA, server certificate
    bootstrap     the note names the cluster                  operator's key, keys/operator.key
    enrolment     the note names the cluster                  node-1's certificate
    demo          keys/demo.json names the cluster            account, provider, rule, credential
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import yaml

from postroad.control.v1.node_pb2 import Node
from postroad.control.v1.node_service_pb2 import CreateNodeRequest, ResetNodeEnrollmentRequest
from postroad.files import write_private
from postroad.localstack.child import child_environment, end_left_behind, tail, tethered
from postroad.localstack.database import API, DATABASE, FLEET, OWNER, ROLES, forget_first_key, prepare_database
from postroad.localstack.errors import LocalStackError
from postroad.localstack.layout import Layout
from postroad.localstack.ports import LOOPBACK
from postroad.localstack.postgres import PostgresServer
from postroad.localstack.valkey import ValkeyServer
from postroad.sdk import AlreadyExistsError, AsyncClient, PostroadError

NODE_ID = "node-1"
NODE = f"nodes/{NODE_ID}"
_LOOPBACK_NETWORK = "127.0.0.0/8"
_CERTIFICATE_USE_S = 300 * 86_400
_API_KEY = re.compile(r"prk_[A-Za-z0-9_-]+")

Step = tuple[str, Callable[[], Awaitable[None]]]


# --- where things are --------------------------------------------------------------------------


def controlplane_file(layout: Layout) -> Path:
    """The control plane's settings."""
    return layout / "controlplane" / "controlplane.yaml"


def node_file(layout: Layout) -> Path:
    """The node's settings."""
    return layout / NODE_ID / "node.yaml"


def ca_file(layout: Layout) -> Path:
    """The CA that every certificate of the stack hangs on."""
    return layout / "pki" / "ca.pem"


def operator_key(layout: Layout) -> str:
    """The operator's API key, as soon as bootstrap is done."""
    return (layout / "keys" / "operator.key").read_text(encoding="ascii").strip()


def cluster_id(server: PostgresServer) -> str:
    """Tells this database cluster from the next one in the same folder: each has a password of its own."""
    return hashlib.sha256(server.password.encode()).hexdigest()[:16]


def credential_file(layout: Layout) -> Path:
    """Where the demo's user name and password are kept; without it they are made anew."""
    return layout / "keys" / "demo.json"


def kept_credential(layout: Layout, cluster: str) -> dict[str, str] | None:
    """The demo's user name and password, None until they are made for this cluster."""
    kept = _read_json(credential_file(layout))
    return kept["credential"] if kept.get("cluster") == cluster else None


def keep_credential(layout: Layout, cluster: str, credential: dict[str, str]) -> None:
    """Keep the demo's user name and password; from now on the demo is not made again."""
    write_private(credential_file(layout), json.dumps({"cluster": cluster, "credential": credential}))


# --- steps -------------------------------------------------------------------------------------


async def end_interrupted(layout: Layout) -> None:
    """End the steps that a killed stack left running, so that nobody makes the same thing beside us."""
    for pid_file in (layout / "run").glob("setup-*.pid"):
        await end_left_behind(pid_file, (str(layout.root),))


def write_controlplane_settings(
    layout: Layout, ports: dict[str, int], postgres: PostgresServer, valkey: ValkeyServer | None = None
) -> None:
    """The control plane's settings, made anew at each start from what is the case; for people to read, too.

    Its commands need no Valkey; when it is to serve, Valkey has started, for its password stands in them.
    """
    values = _controlplane_settings(layout, ports, postgres)
    if valkey is not None:
        values["redis"] = {"url": valkey.url()}
    write_private(controlplane_file(layout), _settings_text(values))


def write_node_settings(layout: Layout, ports: dict[str, int], valkey: ValkeyServer, workers: int) -> None:
    """The node's settings, in the same way; Valkey has started, for its password stands in them."""
    (layout / NODE_ID).mkdir(mode=0o700, exist_ok=True)
    write_private(node_file(layout), _settings_text(_node_settings(layout, ports, valkey, workers)))


def certificate_steps(layout: Layout) -> Iterator[Step]:
    """What is still to be done about keys and certificates; the control plane's settings are written."""
    if not _certificates_are_there(layout):
        yield "Keys and certificates", lambda: _certificates(layout)


def database_steps(layout: Layout, server: PostgresServer) -> Iterator[Step]:
    """What is still to be done about the database, in order; PostgreSQL runs."""
    cluster = cluster_id(server)
    if layout.note("database") != cluster:
        yield "Database and roles", lambda: _database(layout, server)
    schema = f"{cluster} {_migrations_digest()}"
    if layout.note("schema") != schema:
        yield "Migrations", lambda: _migrate(layout, schema)
    if layout.note("bootstrap") != cluster:
        yield "Operator's key", lambda: _bootstrap(layout, server)


def is_enrolled(layout: Layout, server: PostgresServer) -> bool:
    """Whether the node has a certificate that this control plane knows of."""
    return bool(layout.note("enrolled") == cluster_id(server))


async def enroll(layout: Layout, server: PostgresServer, client: AsyncClient) -> None:
    """Create the node, or reset its enrolment where a start was cut off, and let it fetch its certificate."""
    try:
        try:
            node = await client.nodes.CreateNode(
                CreateNodeRequest(node_id=NODE_ID, node=Node(display_name="The node of the local stack"))
            )
        except AlreadyExistsError:
            node = await client.nodes.ResetNodeEnrollment(ResetNodeEnrollmentRequest(name=NODE))
    except PostroadError as error:
        raise LocalStackError(
            f"the node could not be created: {error.message}", f"{layout.log('controlplane')} may say more"
        ) from error
    await _run(
        layout,
        "enroll",
        ["-m", "dataplane", "enroll", "--config", str(node_file(layout))],
        {"POSTROAD_ENROLL_TOKEN": node.enrollment_token},
    )
    layout.keep_note("enrolled", cluster_id(server))


async def _database(layout: Layout, server: PostgresServer) -> None:
    await _with_database(prepare_database(server, _passwords(layout)), server)
    layout.keep_note("database", cluster_id(server))


async def _certificates(layout: Layout) -> None:
    if not ca_file(layout).exists():
        # A key without its certificate: a start was cut off between the two, and nothing was signed yet.
        (layout / "pki" / "ca.key").unlink(missing_ok=True)
        await _controlplane(layout, "pki", "init")
    await _controlplane(layout, "pki", "issue-server", "--name", LOOPBACK, "--name", "localhost")


async def _migrate(layout: Layout, schema: str) -> None:
    await _controlplane(layout, "migrate", "up")
    layout.keep_note("schema", schema)


async def _bootstrap(layout: Layout, server: PostgresServer) -> None:
    await _with_database(forget_first_key(server), server)
    found = _API_KEY.search(await _controlplane(layout, "bootstrap", capture=True))
    if found is None:
        raise LocalStackError("`python -m controlplane bootstrap` printed no key", "Upgrade both to the same version")
    write_private(layout / "keys" / "operator.key", found.group() + "\n")
    layout.keep_note("bootstrap", cluster_id(server))


# --- inside ------------------------------------------------------------------------------------


async def _with_database(work: Awaitable[None], server: PostgresServer) -> None:
    try:
        await work
    except (OSError, asyncpg.PostgresError) as error:
        raise LocalStackError(
            f"the database could not be set up: {error}", f"The end of {server.log_file} may say more"
        ) from error


def _passwords(layout: Layout) -> dict[str, str]:
    file = layout / "keys" / "database.json"
    passwords = _read_json(file)
    if set(passwords) != set(ROLES):
        passwords = {role: secrets.token_urlsafe(24) for role in ROLES}
        write_private(file, json.dumps(passwords))
    return passwords


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LocalStackError(f"{file} is damaged", "Move it away; what it held is made anew") from error
    return value if isinstance(value, dict) else {}


def _settings_text(values: dict[str, Any]) -> str:
    note = "# Written by `postroad up` at each start; changes made here are lost. Environment variables win over it.\n"
    return note + yaml.safe_dump(values, sort_keys=False)


def _controlplane_settings(layout: Layout, ports: dict[str, int], server: PostgresServer) -> dict[str, Any]:
    passwords = _passwords(layout)
    return {
        "database": {
            "api_dsn": server.dsn(API, DATABASE, password=passwords[API]),
            "fleet_dsn": server.dsn(FLEET, DATABASE, password=passwords[FLEET]),
            "owner_dsn": server.dsn(OWNER, DATABASE, password=passwords[OWNER]),
        },
        "pki_dir": str(layout / "pki"),
        "keyring_dir": str(layout / "keys" / "ring"),
        "grpc": {"host": LOOPBACK, "port": ports["grpc"]},
        "nodes": {"host": LOOPBACK, "port": ports["nodes"]},
        "http": {"host": LOOPBACK, "port": ports["http"]},
        "hostname": "localhost",
        # The inbox is on this machine, where deliveries do not go otherwise.
        "allowed_private_networks": [_LOOPBACK_NETWORK],
    }


def _node_settings(layout: Layout, ports: dict[str, int], valkey: ValkeyServer, workers: int) -> dict[str, Any]:
    return {
        "data_dir": str(layout / NODE_ID),
        "hostname": "localhost",
        "workers": workers,
        "control_plane": {
            "address": f"{LOOPBACK}:{ports['nodes']}",
            "enroll_address": f"{LOOPBACK}:{ports['grpc']}",
            "ca_file": str(ca_file(layout)),
        },
        "listeners": [
            {"address": LOOPBACK, "port": ports["smtp"], "mode": "starttls"},
            {"address": LOOPBACK, "port": ports["smtps"], "mode": "tls"},
            {"address": LOOPBACK, "port": ports["plain"], "mode": "plain"},
        ],
        "tls": {
            "certificate_file": str(layout / "pki" / "server.pem"),
            "key_file": str(layout / "pki" / "server.key"),
        },
        "redis": {"url": valkey.url()},
        "delivery": {"allowed_private_networks": [_LOOPBACK_NETWORK]},
        "metrics": {"address": LOOPBACK, "port": ports["node-http"]},
    }


def _certificates_are_there(layout: Layout) -> bool:
    files = [layout / "pki" / name for name in ("ca.pem", "ca.key", "server.pem", "server.key")]
    # The server's certificate is good for 397 days; a stack that is used gets a new one in time.
    return all(file.exists() for file in files) and files[2].stat().st_mtime > time.time() - _CERTIFICATE_USE_S


def _migrations_digest() -> str:
    """Changes when a migration is added; found without importing the control plane."""
    spec = importlib.util.find_spec("controlplane")
    if spec is None or spec.origin is None:
        raise LocalStackError("the control plane is not installed", "Run `make up`, or: pip install 'postroad[local]'")
    package = Path(spec.origin).parent
    files = sorted([*package.glob("_migrations/*.sql"), *package.parent.glob("migrations/*.sql")])
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()[:16]


async def _controlplane(layout: Layout, *arguments: str, capture: bool = False) -> str:
    command = ["-m", "controlplane", "--config", str(controlplane_file(layout)), *arguments]
    return await _run(layout, arguments[0], command, capture=capture)


async def _run(
    layout: Layout,
    name: str,
    arguments: list[str],
    variables: dict[str, str] | None = None,
    *,
    capture: bool = False,
) -> str:
    """Run a program to its end; LocalStackError with the end of its log when it fails.

    What it prints goes to the log, or, with `capture`, is returned and written nowhere: it may be a secret.
    """
    pid_file = layout / "run" / f"setup-{name}.pid"
    log = layout.log(name)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *tethered(arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if capture else descriptor,
            stderr=descriptor,
            start_new_session=True,
            env={**child_environment(os.environ), **(variables or {})},
            cwd=layout.root,
        )
    except OSError as error:
        raise LocalStackError(
            f"Python could not be started: {error}", f"Check that you may run {sys.executable}"
        ) from error
    finally:
        os.close(descriptor)
    try:
        pid_file.write_text(str(process.pid), encoding="ascii")
        printed, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    finally:
        pid_file.unlink(missing_ok=True)
    if process.returncode != 0:
        raise LocalStackError(
            f"`python {' '.join(arguments)}` ended with status {process.returncode}; the end of {log}:\n{tail(log)}",
            "Mend what it names, then start again: what was done so far is kept",
        )
    return (printed or b"").decode()
