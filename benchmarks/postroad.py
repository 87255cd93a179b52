"""Postroad on free ports in a temporary folder, with one worker and an account that relays all its mail to a sink.

It is the local stack as `postroad up` starts it: control plane, node, PostgreSQL and Valkey, all durable. The account
is bound to loopback, because smtp-source cannot authenticate, and the pool's limits on rate are off; the limiter is
asked all the same by the account's and the connections' buckets being set far above what can be reached.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from google.protobuf.field_mask_pb2 import FieldMask

from benchmarks.smtp_tools import ToolError
from postroad.control.v1.account_pb2 import Account
from postroad.control.v1.account_service_pb2 import CreateAccountRequest
from postroad.control.v1.node_pb2 import Node, NodePool
from postroad.control.v1.node_service_pb2 import GetNodePoolRequest, GetNodeRequest, UpdateNodePoolRequest
from postroad.control.v1.provider_pb2 import Provider, SmtpProvider
from postroad.control.v1.provider_service_pb2 import CreateProviderRequest
from postroad.control.v1.routing_rule_pb2 import RoutingRule
from postroad.control.v1.routing_rule_service_pb2 import CreateRoutingRuleRequest
from postroad.sdk import Client, connect

_PORTS = ("smtp", "smtps", "plain", "inbox", "grpc", "nodes", "http", "node-http", "postgres", "valkey")
_START_S = 120.0
_SYNC_S = 20.0
_OUT_OF_REACH = 1_000_000_000
_ACCOUNT = "accounts/bench"


class Postroad:
    """One stack; `port` takes mail without TLS or AUTH from loopback and relays all of it to the sink."""

    def __init__(self, sink_port: int) -> None:
        """Start and configure it. ToolError with the stack's own words when it does not come up."""
        self.root = Path(tempfile.mkdtemp(prefix="postroad-bench-"))
        self.root.chmod(0o711)
        command = [
            sys.executable,
            "-m",
            "postroad.cli.main",
            "--output",
            "json",
            "up",
            "--dir",
            str(self.root / "stack"),
        ]
        for name in _PORTS:
            command += ["--port", f"{name}=0"]
        environment = os.environ | {
            "POSTROAD_NODE_INGRESS__CONNECTIONS_PER_ADDRESS": "10000",
            "POSTROAD_NODE_WORKERS": "1",
        }
        self._errors = (self.root / "up.log").open("wb")
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, env=environment, text=True
        )
        self.master_pid = self._process.pid
        try:
            self.port = self._wait_ready()
            self._configure(sink_port)
        except BaseException:
            self.close()
            raise

    def _wait_ready(self) -> int:
        output = self._process.stdout
        if output is None:
            raise ToolError("postroad up has no output")
        deadline = time.monotonic() + _START_S
        for line in output:
            event = json.loads(line)
            if event["event"] == "up.ready":
                return int(event["ports"]["plain"])
            if time.monotonic() > deadline:
                break
        log = (self.root / "up.log").read_text(encoding="utf-8", errors="replace")
        raise ToolError(f"postroad up does not come up: {log[-2000:]}")

    def connect(self) -> Client:
        """Return a client of its API with the operator's key."""
        folder = self.root / "stack"
        settings = yaml.safe_load((folder / "cli.yaml").read_text(encoding="utf-8"))
        return connect(settings["server"], settings["api_key"], folder / settings["ca_file"])

    def _configure(self, sink_port: int) -> None:
        with self.connect() as client:
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
            account = Account(sender_domains=["bench.example.org"], networks=["127.0.0.0/8"])
            client.accounts.CreateAccount(CreateAccountRequest(account_id="bench", account=account))
            endpoint = SmtpProvider.Endpoint(host="127.0.0.1", port=sink_port)
            provider = Provider(smtp=SmtpProvider(endpoints=[endpoint], tls_policy=SmtpProvider.TLS_POLICY_NONE))
            request = CreateProviderRequest(parent=_ACCOUNT, provider_id="sink", provider=provider)
            client.providers.CreateProvider(request)
            rule = RoutingRule(targets=[RoutingRule.Target(provider=f"{_ACCOUNT}/providers/sink")])
            client.routing_rules.CreateRoutingRule(
                CreateRoutingRuleRequest(parent=_ACCOUNT, routing_rule_id="all", routing_rule=rule)
            )
            self._wait_synced(client)

    def _wait_synced(self, client: Client) -> None:
        deadline = time.monotonic() + _SYNC_S
        while time.monotonic() < deadline:
            node = client.nodes.GetNode(GetNodeRequest(name="nodes/node-1"))
            if node.config_status == Node.CONFIG_STATUS_SYNCED:
                return
            time.sleep(0.1)
        raise ToolError("the node does not take its configuration")

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
