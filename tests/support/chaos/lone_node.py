"""A running node, supervisor and all, between the judge's client and the judge's sink, with a scripted control plane.

Its worker can be killed at a step of a conversation, at a failpoint, or by its disk, and is started again by the
supervisor. What the node reports is kept by the scripted control plane, which acknowledges every record.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from dataplane.failpoints import SPENT_VARIABLE, VARIABLE
from postroad.config.v1 import bundle_pb2 as pb
from postroad.node.v1.config_stream_service_pb2 import Snapshot, StreamConfigResponse
from postroad.node.v1.ledger_pb2 import LedgerRecord
from support.chaos.application import Message, answers
from support.chaos.books import Books, Strike
from support.chaos.disk import disk_environment
from support.chaos.judge import TERMINAL, Case, Ledger, Told, check
from support.chaos.sink import Sink, end_of
from support.chaos.stack import spool_rows
from support.chaos.talk import Listener, hold_talk
from support.node_plane import ControlPlane, Pki
from support.node_process import NodeProcess, running, write_settings

_ACCOUNT = "accounts/demo"
_PROVIDER = "accounts/demo/providers/out"
_TRIES = 40
QUIET_VARIABLE = "CHAOS_QUIET_S"
_WAIT_S = 60.0
# Less where a broken build is expected never to come to rest.
_QUIET_S = float(os.environ.get(QUIET_VARIABLE, "60"))
_UNCERTAIN = 8


@dataclass
class LoneNode:
    """See the module."""

    folder: Path
    books: Books
    sink: Sink
    plane: ControlPlane
    process: NodeProcess
    settings_file: Path
    environment: dict[str, str]

    @property
    def disk(self) -> Path:
        """The control folder of the node's disk."""
        return self.folder / "disk"

    @property
    def spent(self) -> set[str]:
        """Failpoints that struck."""
        return {path.name for path in (self.folder / "spent").iterdir()}

    # --- mail ------------------------------------------------------------------------------------

    async def submit(self, message: Message, listener: Listener | None = None) -> list[int]:
        """Try until it is acknowledged; the codes, 0 where no reply came. `listener` hears the first try only."""
        codes: list[int] = []
        while codes[-1:] != [250]:
            assert len(codes) < _TRIES, codes
            await self.until(lambda: answers(self.process.smtp_port), "the node answers")
            talk = await hold_talk(self.process.smtp_port, message, len(codes) + 1, None if codes else listener)
            self.books.note_try(talk.entry())
            codes.append(talk.code)
            await asyncio.sleep(0.02 * min(len(codes), 10))
        return codes

    async def submit_once(self, message: Message, listener: Listener | None = None) -> int:
        """One try; its code, 0 where no reply came."""
        talk = await hold_talk(self.process.smtp_port, message, 1, listener)
        self.books.note_try(talk.entry())
        return talk.code

    async def quiet(self) -> None:
        """Wait until everything has ended and was reported."""
        await self.until(self._is_quiet, "all mail has ended and was reported", _QUIET_S)

    async def judged(self) -> Case:
        """Wait for the end of all mail, drain the node, and let the judge speak; of what does not end, too."""
        stuck = ""
        try:
            await self.quiet()
        except AssertionError as error:
            stuck = str(error)
        status = await self.process.stop()
        case = check(self.case())
        assert not stuck, stuck
        assert status == 0
        return case

    def _is_quiet(self) -> bool:
        try:
            if self.left_in_spools():
                return False
        except apsw.Error:
            return False  # its worker writes at this moment, or has been killed in doing so
        ledger = self.ledger()
        tries, copies, _, _ = self.books.snapshot()
        stored = {entry.message_id for entry in tries if entry.code == 250} | {copy.message_id for copy in copies}
        return stored <= set(ledger) and all(one.state in TERMINAL for rows in ledger.values() for one in rows)

    async def has_committed(self) -> None:
        """Wait for the spool's first commit, which belongs to no message: it notes what the ledger knows of it."""
        await self.until(self._has_committed, "the commit that belongs to no message")

    def _has_committed(self) -> bool:
        url = f"http://127.0.0.1:{self.process.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return re.search(rb"^spool_commits_total [1-9]", answer.read(), re.MULTILINE) is not None

    async def until(self, condition: Callable[[], bool], what: str, wait_s: float = _WAIT_S) -> None:
        """Wait for it, a minute at most."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + wait_s
        while not await asyncio.to_thread(condition):
            assert loop.time() < ends_s, f"never: {what}"
            await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def again(self) -> AsyncIterator[None]:
        """Start the node anew after its end."""
        async with running(self.settings_file, None, **self.environment) as self.process:
            yield

    # --- faults ----------------------------------------------------------------------------------

    def kill_worker(self) -> None:
        """SIGKILL for the one worker; the supervisor starts it again."""
        self.books.note_strike(Strike("worker", "SIGKILL", ends_worker=True))
        os.kill(self.process.ready["processes"]["worker-0"], signal.SIGKILL)

    def kill_at(self, step: str) -> Listener:
        """A listener, of a conversation or of the sink, that kills the worker when this step first comes."""
        struck = False

        async def listen(heard: str) -> None:
            nonlocal struck
            if heard == step and not struck:
                struck = True
                self.kill_worker()

        return listen

    # --- what Postroad says ----------------------------------------------------------------------

    def ledger(self) -> Ledger:
        """What was reported and acknowledged."""
        found: dict[str, list[Told]] = {}
        for records in list(self.plane.records.values()):
            for encoded in list(records):
                _enter(LedgerRecord.FromString(encoded), found)
        return found

    def left_in_spools(self) -> list[str]:
        """Recipients that the spools still hold."""
        return [row for file in self.process.data_dir.glob("spool/*/spool.db") for row in spool_rows(file)]

    def case(self) -> Case:
        """What the judge is given."""
        tries, copies, strikes, confirmed = self.books.snapshot()
        # A failpoint kills by itself, and only the process knows when.
        strikes += [Strike("worker", name, True, copy.time_s) for name in self.spent for copy in copies]
        return Case(tries, copies, strikes, frozenset(confirmed), self.ledger(), self.left_in_spools(), end_of)


def _enter(record: LedgerRecord, found: dict[str, list[Told]]) -> None:
    message_id = str(uuid.UUID(bytes=bytes(record.message_id)))
    if record.HasField("accepted"):
        token = record.accepted.header_message_id.strip("<>").partition("@")[0]
        found[message_id] = [Told(token, address, 2) for address in record.accepted.recipients]
    rows = found.setdefault(message_id, [])
    indexes = [update.index for update in record.recipients] + [one for event in record.events for one in event.indexes]
    while len(rows) <= max(indexes, default=-1):
        # Its acceptance was never told.
        rows.append(Told("unknown", f"recipient {len(rows)}", 2))
    for update in record.recipients:
        rows[update.index].state = int(update.state)
        if update.state in TERMINAL:
            rows[update.index].ends.append(int(update.state))
    for event in record.events:
        for index in event.indexes:
            rows[index].uncertain_count += event.type == _UNCERTAIN


def snapshot(sink_port: int) -> StreamConfigResponse:
    """One account, bound to the loopback, whose mail goes to the sink, retried after a second."""
    account = pb.AccountBundle(
        account=_ACCOUNT, uid="3b1c1bb0-29f5-4d6c-8f0c-0d6d1f2a7c11", sender_domains=["example.com"]
    )
    account.retry_policy.base.seconds = account.retry_policy.cap.seconds = 1
    account.retry_policy.factor = 1
    account.retry_policy.lifetime.seconds = 432_000
    provider = account.providers.add(name=_PROVIDER)
    provider.smtp.endpoints.add(host="127.0.0.1", port=sink_port)
    provider.smtp.tls_policy = pb.SmtpProvider.TLS_POLICY_NONE
    provider.smtp.max_connections = 20
    provider.smtp.max_messages_per_connection = 100
    account.rules.add(name="accounts/demo/routingRules/default", priority=1).targets.add(provider=_PROVIDER)
    networks = pb.NetworksBundle(bindings=[pb.NetworksBundle.Binding(network="127.0.0.0/8", account=_ACCOUNT)])
    settings = pb.NodeSettingsBundle(max_message_bytes=26_214_400, max_recipients=1_000, node_count=1)
    parts: list[tuple[str, pb.BundleKind.ValueType, Any]] = [
        (_ACCOUNT, pb.BUNDLE_KIND_ACCOUNT, account),
        ("pools/default/networks", pb.BUNDLE_KIND_NETWORKS, networks),
        ("pools/default/settings", pb.BUNDLE_KIND_NODE_SETTINGS, settings),
    ]
    bundles = []
    for name, kind, value in parts:
        content = value.SerializeToString()
        digest = hashlib.sha256(content).digest()
        bundles.append(pb.Bundle(name=name, kind=kind, revision=1, hash=digest, content=content))
    made = Snapshot(nonce="n1", complete=True, bundle_count=3, bundles=bundles, node_pool="nodePools/default")
    return StreamConfigResponse(snapshot=made)


@contextlib.asynccontextmanager
async def lone_node(
    folder: Path, failpoints: str = "", *, loses: bool = False, by_spool: bool = False, redis_url: str = ""
) -> AsyncIterator[LoneNode]:
    """A node that serves. `by_spool` lets every message be read back from the spool instead of being handed over."""
    (folder / "spent").mkdir()
    books = Books(folder / "books")
    sink = await Sink(books).start()
    delivery: dict[str, Any] = {"allowed_private_networks": ["127.0.0.0/8"]}
    if by_spool:
        delivery["handover_bytes"] = 1
    environment = {
        **disk_environment(folder / "disk", loses=loses),
        VARIABLE: failpoints,
        SPENT_VARIABLE: str(folder / "spent"),
    }
    plane = ControlPlane(Pki())
    await plane.start()
    try:
        plane.pki.write_identity(folder / "data")
        shared = {"redis": {"url": redis_url}} if redis_url else {}
        settings_file = write_settings(folder, plane.address, workers=1, delivery=delivery, **shared)
        async with running(settings_file, None, **environment) as process:
            stream = await plane.next_stream()
            stream.send(snapshot(sink.port))
            await stream.ack("n1")
            node = LoneNode(folder, books, sink, plane, process, settings_file, environment)
            follower = asyncio.create_task(_follow(node))
            try:
                yield node
            finally:
                follower.cancel()
                await asyncio.wait([follower])
    finally:
        await plane.stop()
        # gRPC's server must not outlive this loop, though the traceback of a failed test keeps the plane.
        del plane._server
        await sink.stop()


async def _follow(node: LoneNode) -> None:
    """Take up what the node says when a process has come again: the pids of the next kill."""
    assert node.process.process.stdout is not None
    while line := await node.process.process.stdout.readline():
        said = json.loads(line)
        if said["event"] == "node.ready":
            node.process.ready = said
