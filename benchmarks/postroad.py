"""Postroad on free ports in a temporary folder, with accounts that relay all their mail to sinks.

It is the local stack as `postroad up` starts it: control plane, node, PostgreSQL and Valkey, all durable. Accounts are
bound to loopback networks, because smtp-source cannot authenticate, and the pool's limits on rate are far above what
can be reached: the limiter is asked all the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import yaml
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from benchmarks.processes import cpu_by_role, memory_by_role
from benchmarks.smtp_tools import ToolError
from postroad.control.v1.account_pb2 import Account
from postroad.control.v1.account_service_pb2 import CreateAccountRequest
from postroad.control.v1.credential_service_pb2 import CreateSmtpCredentialRequest
from postroad.control.v1.limit_pb2 import Limit
from postroad.control.v1.limit_service_pb2 import CreateLimitRequest
from postroad.control.v1.node_pb2 import Node, NodePool
from postroad.control.v1.node_service_pb2 import GetNodePoolRequest, GetNodeRequest, UpdateNodePoolRequest
from postroad.control.v1.provider_pb2 import Provider, SmtpProvider
from postroad.control.v1.provider_service_pb2 import CreateProviderRequest
from postroad.control.v1.routing_rule_pb2 import RoutingRule
from postroad.control.v1.routing_rule_service_pb2 import CreateRoutingRuleRequest
from postroad.localstack import PostgresServer
from postroad.localstack.database import DATABASE
from postroad.sdk import Client, connect

_PORTS = ("smtp", "smtps", "plain", "inbox", "grpc", "nodes", "http", "node-http", "postgres", "valkey")
_START_S = 120.0
_SYNC_S = 20.0
_POLL_S = 0.05
_OUT_OF_REACH = 1_000_000_000
_ROLES = (
    ("-m dataplane worker", "worker"),
    ("-m dataplane agent", "agent"),
    ("-m dataplane run", "supervisor"),
    ("-m controlplane", "control plane"),
    ("valkey-server", "Valkey"),
    ("postgres", "PostgreSQL"),
    ("postroad.inbox", "inbox"),
)


@dataclass(frozen=True, slots=True)
class Tenant:
    """An account whose mail comes from `network` without AUTH and leaves to the sink on `sink_port`.

    `messages_per_s` is a limit of the account, with a second's worth as burst; 0 is none.
    """

    name: str
    network: str
    sink_port: int
    messages_per_s: int = 0

    @property
    def sender(self) -> str:
        """An address that it may send as."""
        return f"app@{self.name}.example.org"


@dataclass(frozen=True, slots=True)
class Login:
    """User and password of an SMTP credential."""

    username: str
    password: str


def role_of(command: str) -> str:
    """Return which part of the stack a command line is."""
    # The stack's own command line names a folder, and may name anything; its parts are looked for first.
    return next((role for words, role in _ROLES if words in command and " up " not in command), "stack")


class Postroad:
    """One stack; `port` takes mail without TLS or AUTH from loopback, `tls_port` with STARTTLS and AUTH."""

    holders = ("worker",)

    def __init__(
        self,
        sink_port: int,
        *,
        workers: int = 1,
        tenants: Sequence[Tenant] = (),
        replicated: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Start and configure it; one account `bench` for all of loopback unless tenants are given.

        `replicated` is the durability of the accounts.
        ToolError with the stack's own words when it does not come up.
        """
        self.tenants = tuple(tenants) or (Tenant("bench", "127.0.0.0/8", sink_port),)
        self.name = "replicated" if replicated else "postroad"
        self._durability = Account.DURABILITY_REPLICATED if replicated else Account.DURABILITY_LOCAL
        self.root = Path(tempfile.mkdtemp(prefix="postroad-bench-"))
        self.root.chmod(0o711)
        self.folder = self.root / "stack"
        self._errors = (self.root / "up.log").open("wb")
        self._process = self._start(workers, environment or {})
        self.master_pid = self._process.pid
        try:
            self.ports = self._wait_ready()
            self.port, self.tls_port = self.ports["plain"], self.ports["smtp"]
            with self.connect() as client:
                self._configure(client)
        except BaseException:
            self.close()
            raise

    def _start(self, workers: int, environment: dict[str, str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "postroad.cli.main", "--output", "json"]
        command += ["up", "--dir", str(self.folder), "--workers", str(workers)]
        for name in _PORTS:
            command += ["--port", f"{name}=0"]
        ours = {
            "POSTROAD_NODE_INGRESS__CONNECTIONS_PER_ADDRESS": "20000",
            "POSTROAD_NODE_INGRESS__CONNECTIONS": "20000",
            "POSTROAD_CONTROLPLANE_API__REQUESTS_PER_MINUTE": "1000000",
        }
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={name: value for name, value in os.environ.items() if not name.startswith("POSTROAD_")}
            | ours
            | environment,
            text=True,
        )

    def _wait_ready(self) -> dict[str, int]:
        output = self._process.stdout
        if output is None:
            raise ToolError("postroad up has no output")
        deadline = time.monotonic() + _START_S
        for line in output:
            event = json.loads(line)
            if event["event"] == "up.ready":
                return {name: int(port) for name, port in event["ports"].items()}
            if time.monotonic() > deadline:
                break
        log = (self.root / "up.log").read_text(encoding="utf-8", errors="replace")
        raise ToolError(f"postroad up does not come up: {log[-2000:]}")

    # --- configuration ----------------------------------------------------------------------------

    def connect(self) -> Client:
        """Return a client of its API with the operator's key."""
        return connect(self._cli["server"], self.api_key, self.ca_file)

    @property
    def ca_file(self) -> Path:
        """What clients need to trust it."""
        return self.folder / "pki" / "ca.pem"

    def _configure(self, client: Client) -> None:
        pool = client.nodes.GetNodePool(GetNodePoolRequest(name="nodePools/default"))
        pool.submission_limits.CopyFrom(
            NodePool.SubmissionLimits(
                account_messages_per_hour=_OUT_OF_REACH,
                credential_messages_per_hour=_OUT_OF_REACH,
                address_connections_per_minute=_OUT_OF_REACH,
            )
        )
        mask = FieldMask(paths=["submission_limits"])
        client.nodes.UpdateNodePool(UpdateNodePoolRequest(node_pool=pool, update_mask=mask))
        for tenant in self.tenants:
            _create_tenant(client, tenant, self._durability)
        self._wait_synced(client)

    def _wait_synced(self, client: Client) -> None:
        deadline = time.monotonic() + _SYNC_S
        while time.monotonic() < deadline:
            node = client.nodes.GetNode(GetNodeRequest(name="nodes/node-1"))
            if node.config_status == Node.CONFIG_STATUS_SYNCED:
                return
            time.sleep(0.1)
        raise ToolError("the node does not take its configuration")

    @property
    def api_key(self) -> str:
        """The operator's key."""
        return str(self._cli["api_key"])

    @property
    def _cli(self) -> dict[str, Any]:
        settings: dict[str, Any] = yaml.safe_load((self.folder / "cli.yaml").read_text(encoding="utf-8"))
        return settings

    def create_login(self) -> Login:
        """Return a new SMTP credential of the first account, in use on the node."""
        with self.connect() as client:
            parent = f"accounts/{self.tenants[0].name}"
            made = client.credentials.CreateSmtpCredential(
                CreateSmtpCredentialRequest(parent=parent, smtp_credential_id=f"load-{time.time_ns()}")
            )
            self._wait_synced(client)
        return Login(made.username, made.secret)

    # --- what is measured -------------------------------------------------------------------------

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far by part of the stack."""
        return cpu_by_role(self.master_pid, role_of)

    def memory(self) -> dict[str, int]:
        """Bytes by part of the stack."""
        return memory_by_role(self.master_pid, role_of)

    def settle(self, timeout_s: float) -> bool:
        """Return True when nothing waits in the spools and every record is acknowledged, False after the time."""
        deadline = time.monotonic() + timeout_s
        while not all(_is_drained(spool) for spool in self.folder.glob("node-1/spool/*/spool.db")):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def recorded(self) -> int:
        """Return how many messages the control plane's records have, all accounts."""
        return asyncio.run(self._count_records())

    async def _count_records(self) -> int:
        server = PostgresServer(self.folder / "postgres", self.ports["postgres"])
        connection = await asyncpg.connect(server.dsn(database=DATABASE))
        try:
            return int(await connection.fetchval("SELECT count(*) FROM postroad.messages"))
        finally:
            await connection.close()

    def close(self) -> None:
        """Drain and stop it, and delete its folder."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(90)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._errors.close()
        shutil.rmtree(self.root, ignore_errors=True)


def _create_tenant(client: Client, tenant: Tenant, durability: Account.Durability.ValueType) -> None:
    account = Account(sender_domains=[f"{tenant.name}.example.org"], networks=[tenant.network], durability=durability)
    client.accounts.CreateAccount(CreateAccountRequest(account_id=tenant.name, account=account))
    parent = f"accounts/{tenant.name}"
    endpoint = SmtpProvider.Endpoint(host="127.0.0.1", port=tenant.sink_port)
    provider = Provider(smtp=SmtpProvider(endpoints=[endpoint], tls_policy=SmtpProvider.TLS_POLICY_NONE))
    client.providers.CreateProvider(
        CreateProviderRequest(parent=parent, provider_id="sink", provider=provider),
    )
    if tenant.messages_per_s:
        limit = Limit(
            scope=Limit.SCOPE_ACCOUNT,
            unit=Limit.UNIT_MESSAGE,
            amount=tenant.messages_per_s,
            period=Duration(seconds=1),
            burst=tenant.messages_per_s,
        )
        client.limits.CreateLimit(CreateLimitRequest(parent=parent, limit_id="load", limit=limit))
    rule = RoutingRule(targets=[RoutingRule.Target(provider=f"{parent}/providers/sink")])
    client.routing_rules.CreateRoutingRule(
        CreateRoutingRuleRequest(parent=parent, routing_rule_id="all", routing_rule=rule)
    )


def _is_drained(spool: Path) -> bool:
    """Whether a spool has nothing waiting and nothing to report; read beside the worker, which is not disturbed."""
    connection = sqlite3.connect(f"file:{spool}?mode=ro", uri=True)
    try:
        waiting, last, acknowledged = connection.execute(
            "SELECT waiting_count, outbox_last, acknowledged FROM state"
        ).fetchone()
    finally:
        connection.close()
    return not waiting and last == acknowledged
