"""The agent as it runs: real gRPC to a scripted control plane, a real socket to played workers, files on disk."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from dataplane.adapters.lkg import LastKnownGoodFiles, open_files
from dataplane.agent import stream as agent_stream
from dataplane.agent import workers as agent_workers
from dataplane.agent.enrollment import enroll
from dataplane.agent.identity import IdentityError, load_identity
from dataplane.agent.workers import hold_worker_lock
from dataplane.agent_link import AgentLink
from dataplane.agent_process import run_agent
from dataplane.clock import SystemClock
from dataplane.core.commands import Filter
from dataplane.core.ids import MessageId
from dataplane.data_dir import prepare_data_dir
from dataplane.link import (
    SOCKET_PATH,
    ConfigApplied,
    ConfigChanged,
    ContactTime,
    DenialsApplied,
    DenialsChanged,
    LedgerCursor,
    LedgerPull,
    LedgerRecords,
    Message,
    RunCommand,
    Sample,
    SpoolState,
    SpoolVerdict,
    StatusRequest,
    WorkerHello,
    WorkerStatus,
)
from dataplane.process import Child
from dataplane.settings import (
    ControlPlaneSettings,
    ListenerSettings,
    MetricsSettings,
    Settings,
)
from postroad.config.v1 import bundle_pb2 as pb
from postroad.config.v1.denials_pb2 import Denial, DenialSet
from postroad.localstack.probe import Readiness, readiness
from postroad.node.v1.config_stream_service_pb2 import (
    Command,
    Denials,
    Directive,
    Progress,
    Snapshot,
    StreamConfigResponse,
)
from support.node_plane import TOKEN, WAIT_S, ControlPlane, Pki, Stream, control_plane

SPOOL = "0b2f6f0e-59a7-4f0d-8b54-6a2f7d0c9d11"


class Log:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def info(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))

    warning = info


def settings_bundle(max_recipients: int = 1_000) -> pb.Bundle:
    content = pb.NodeSettingsBundle(
        account_messages_per_hour=1,
        credential_messages_per_hour=1,
        address_connections_per_minute=1,
        max_message_bytes=26_214_400,
        max_recipients=max_recipients,
        node_count=1,
    ).SerializeToString()
    return pb.Bundle(
        name="pools/default/settings",
        kind=pb.BUNDLE_KIND_NODE_SETTINGS,
        revision=max_recipients,
        hash=hashlib.sha256(content).digest(),
        content=content,
    )


def bad_bundle(name: str) -> pb.Bundle:
    return pb.Bundle(
        name=name, kind=pb.BUNDLE_KIND_ACCOUNT, revision=1, hash=hashlib.sha256(b"\xff").digest(), content=b"\xff"
    )


def snapshot(nonce: str, *bundles: pb.Bundle) -> StreamConfigResponse:
    return StreamConfigResponse(
        snapshot=Snapshot(
            nonce=nonce,
            complete=True,
            bundle_count=len(bundles),
            bundles=bundles,
            pool_keys=[pb.PoolKey(key_id="k1", key=bytes(32))],
            node_pool="nodePools/default",
        )
    )


def denials(nonce: str, version: int) -> StreamConfigResponse:
    return StreamConfigResponse(
        denials=Denials(nonce=nonce, denials=DenialSet(version=version, denials=[Denial(account="accounts/a")]))
    )


class PlayedWorker:
    """A worker that holds its lock, takes what the agent announces when told to, and remembers what it heard."""

    def __init__(self, index: int = 0, *, obedient: bool = True) -> None:
        self.index = index
        self.obedient = obedient
        self.digest = ""
        self.denials_version = 0
        self.heard: list[Message] = []
        self.records = [b"record-1", b"record-2"]
        self.pid = 1
        self.enqueued = 7
        self.mute = False
        self._changed = asyncio.Condition()
        self.link = AgentLink(Path(SOCKET_PATH), self._hello, self._on_message, lambda: None, lambda: 0.5, Log())

    async def _hello(self) -> WorkerHello:
        state = SpoolState(SPOOL, 1, 0, 1, len(self.records), 3)
        return WorkerHello(self.index, self.pid, self.digest, self.denials_version, (state,) if self.index == 0 else ())

    def _on_message(self, message: Message) -> None:
        self.heard.append(message)
        match message:
            case ConfigChanged() if self.obedient:
                self.apply_config(message.digest)
            case DenialsChanged() if self.obedient:
                self.apply_denials(message.version)
            case LedgerPull() if message.after < len(self.records):
                self.link.send(LedgerRecords(SPOOL, 1, message.after + 1, self.records[message.after :]))
            case StatusRequest() if not self.mute:
                sample = Sample("smtp_message_enqueued_total", (), self.enqueued)
                self.link.send(WorkerStatus(message.number, False, 3, 1, (), (sample,)))
            case _:
                pass
        self._notify()

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        asyncio.get_running_loop().create_task(notify())

    def apply_config(self, digest: str) -> None:
        self.digest = digest
        self.link.send(ConfigApplied(digest, ""))

    def apply_denials(self, version: int) -> None:
        self.denials_version = version
        self.link.send(DenialsApplied(version, ""))

    async def until(self, holds: Callable[[Message], bool]) -> Message:
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: any(map(holds, self.heard)))
        return next(filter(holds, self.heard))


@contextlib.asynccontextmanager
async def working(worker: PlayedWorker) -> AsyncIterator[PlayedWorker]:
    task = asyncio.create_task(worker.link.run())
    try:
        yield worker
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Node:
    """A data directory (the current one) and an agent that a test starts and stops in it."""

    def __init__(self, folder: Path, plane: ControlPlane) -> None:
        self.folder = folder
        self.plane = plane
        self.log = Log()

    @contextlib.asynccontextmanager
    async def agent(self, workers: int = 1) -> AsyncIterator[int]:
        """Runs the agent; yields the port of its HTTP endpoint."""
        settings = Settings(
            data_dir=self.folder,
            hostname="node.example",
            control_plane=ControlPlaneSettings(address=self.plane.address),
            listeners=(ListenerSettings(port=0, mode="plain"),),
            metrics=MetricsSettings(port=0),
        )
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[int] = loop.create_future()

        class Reported(Child):
            def report_ready(self, facts: object) -> None:
                ready.set_result(json.loads(json.dumps(facts))["metrics"]["port"])

        task = asyncio.create_task(run_agent(settings, workers, Reported(-1, -1, 0), self.log))
        try:
            task.add_done_callback(lambda _: ready.done() or ready.cancel())
            async with asyncio.timeout(WAIT_S):
                port = await ready
            yield port
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    @property
    def files(self) -> LastKnownGoodFiles:
        return open_files(Path(), None, None, "nodes/n1", SystemClock())


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    pki = Pki()
    async with control_plane(pki) as plane:
        prepare_data_dir(tmp_path)
        pki.write_identity(tmp_path)
        monkeypatch.chdir(tmp_path)
        yield Node(tmp_path, plane)


async def hello_of(node: Node) -> tuple[Stream, object]:
    stream = await node.plane.next_stream()
    return stream, (await stream.next()).hello


async def test_configuration_is_on_disk_and_in_use_before_it_is_acknowledged(node: Node) -> None:
    async with node.agent(), working(PlayedWorker(obedient=False)) as worker:
        stream, hello = await hello_of(node)
        assert getattr(hello, "node", "") == "nodes/n1"
        stream.send(snapshot("n1", settings_bundle()))
        announced = await worker.until(lambda message: isinstance(message, ConfigChanged))
        assert isinstance(announced, ConfigChanged)
        assert node.files.load().digest.hex() == announced.digest
        assert stream.received.empty()
        worker.apply_config(announced.digest)
        await stream.ack("n1")


async def test_a_bad_bundle_is_named_and_the_good_one_is_in_use(node: Node) -> None:
    async with node.agent(), working(PlayedWorker()):
        stream, _ = await hello_of(node)
        stream.send(snapshot("n1", settings_bundle(), bad_bundle("accounts/bad")))
        nack = await stream.nack("n1")
        assert [error.name for error in nack.bundle_errors] == ["accounts/bad"]
        assert set(node.files.load().bundles) == {"pools/default/settings"}


async def test_a_worker_that_is_not_there_does_not_hold_the_ack_and_one_that_lives_does(node: Node) -> None:
    async with node.agent(workers=2), working(PlayedWorker()):
        stream, _ = await hello_of(node)
        stream.send(snapshot("n1", settings_bundle()))
        await stream.ack("n1")
        lock = hold_worker_lock(1)
        stream.send(snapshot("n2", settings_bundle(max_recipients=5)))
        stream.send(denials("d1", 4))
        late = PlayedWorker(1)
        async with working(late):
            await late.until(lambda message: isinstance(message, DenialsChanged))
            acked = {(await stream.next()).ack.nonce for _ in range(2)}
        assert acked == {"n2", "d1"}
        assert late.digest
        os.close(lock)


async def test_denials_are_in_force_everywhere_before_their_ack_and_never_go_back(node: Node) -> None:
    async with node.agent(), working(PlayedWorker()) as worker:
        stream, _ = await hello_of(node)
        stream.send(denials("d1", 9))
        await stream.ack("d1")
        assert worker.denials_version == 9
        stream.send(denials("d2", 8))
        request = await stream.next()
        assert (request.ack.nonce, request.ack.denials_version) == ("d2", 9)
        assert node.files.read_denials().version == 9


async def test_a_restarted_agent_says_what_it_holds_and_brings_a_new_worker_up_to_date(node: Node) -> None:
    async with node.agent(), working(PlayedWorker()):
        stream, _ = await hello_of(node)
        stream.send(snapshot("n1", settings_bundle()))
        await stream.ack("n1")
        stream.send(denials("d1", 2))
        await stream.ack("d1")
    async with node.agent(), working(PlayedWorker()) as worker:
        stream = await node.plane.next_stream()
        hello = (await stream.next()).hello
        assert [bundle.name for bundle in hello.bundles] == ["pools/default/settings"]
        await worker.until(lambda message: isinstance(message, ConfigChanged))
        await worker.until(lambda message: isinstance(message, DenialsChanged))
        stream.send(StreamConfigResponse(progress=Progress()))
        await worker.until(lambda message: isinstance(message, ContactTime))


@pytest.mark.parametrize("damage", ["torn", "tampered", "other key"])
async def test_last_known_good_that_cannot_be_read_is_reported_and_fetched_anew(node: Node, damage: str) -> None:
    async with node.agent():
        stream, _ = await hello_of(node)
        stream.send(snapshot("n1", settings_bundle()))
        await stream.ack("n1")
    file = node.folder / "last-known-good" / "config"
    match damage:
        case "torn":
            file.write_bytes(file.read_bytes()[:-1])
        case "tampered":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        case _:
            (node.folder / "identity" / "seal.key").unlink()
    async with node.agent():
        assert "config.unreadable" in [event for event, _ in node.log.events]
        stream = await node.plane.next_stream()
        assert not (await stream.next()).hello.bundles
        stream.send(snapshot("n2", settings_bundle()))
        await stream.ack("n2")
    assert set(node.files.load().bundles) == {"pools/default/settings"}


async def test_the_agent_comes_back_after_the_control_plane_was_away(node: Node) -> None:
    async with node.agent(), working(PlayedWorker()) as worker:
        stream, _ = await hello_of(node)
        stream.send(snapshot("n1", settings_bundle()))
        await stream.ack("n1")
        await node.plane.stop()
        await node.plane.start(node.plane.port)
        stream = await node.plane.next_stream()
        assert [bundle.name for bundle in (await stream.next()).hello.bundles] == ["pools/default/settings"]
        stream.send(snapshot("n2", settings_bundle(max_recipients=7)))
        await stream.ack("n2")
        assert worker.digest == node.files.load().digest.hex()


async def test_a_directive_to_reconnect_is_followed(node: Node) -> None:
    async with node.agent():
        stream, _ = await hello_of(node)
        directive = Directive(action=Directive.ACTION_RECONNECT)
        stream.send(StreamConfigResponse(directive=directive))
        again, hello = await hello_of(node)
        assert again is not stream
        assert getattr(hello, "boot_id", "")


async def test_records_reach_the_control_plane_and_cursors_come_back(node: Node) -> None:
    async with node.agent(), working(PlayedWorker()) as worker:
        assert await node.plane.wait_for_records(SPOOL, 2) == worker.records
        await worker.until(lambda message: message == LedgerCursor(SPOOL, 2))
        assert [(opened.spool, opened.incarnation) for opened in node.plane.opened] == [(SPOOL, 1)]


async def test_commands_and_verdicts_reach_the_worker_of_the_spool_also_when_it_comes_later(node: Node) -> None:
    async with node.agent():
        stream, _ = await hello_of(node)
        command = Command(command="c1", spool=SPOOL, verb=Command.VERB_CANCEL, account="a", message_ids=[bytes(16)])
        stream.send(StreamConfigResponse(command=command))
        stream.send(snapshot("n1", settings_bundle()))
        await stream.ack("n1")
        async with working(PlayedWorker()) as worker:
            await worker.until(lambda message: message == RunCommand("c1", SPOOL, 1, "a", (bytes(16),)))
            wanted = Command.Filter(accepted_before_ms=5, provider="providers/p", states=[2], after=bytes(16))
            rerouting = Command(command="c2", spool=SPOOL, account="a", provider="providers/q", filter=wanted)
            rerouting.verb = Command.VERB_REROUTE
            stream.send(StreamConfigResponse(command=rerouting))
            described = Filter(5, MessageId(bytes(16)), "providers/p", "", (2,))
            expected = RunCommand("c2", SPOOL, 6, "a", (), "providers/q", described)
            await worker.until(lambda message: message == expected)
            refuse = Directive(action=Directive.ACTION_REFUSE_SPOOL, spool=SPOOL)
            stream.send(StreamConfigResponse(directive=refuse))
            await worker.until(lambda message: message == SpoolVerdict(SPOOL, refused=True))


async def test_a_worker_that_comes_back_is_told_to_the_control_plane_at_once(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_stream, "STATUS_INTERVAL_S", 3_600.0)
    async with node.agent():
        stream, hello = await hello_of(node)
        assert list(getattr(hello, "client_features", ())) == ["command-filter", "destination-denials"]
        stream.send(snapshot("n1", settings_bundle()))
        await stream.ack("n1")
        async with working(PlayedWorker()) as worker:
            await worker.until(lambda message: isinstance(message, LedgerPull))
        async with working(PlayedWorker()) as worker:
            while not (request := await stream.next()).HasField("status_report"):
                pass
            assert [one.spool for one in request.status_report.spools] == [SPOOL]


async def fetch(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status, await response.text()


async def test_metrics_and_probes(node: Node) -> None:
    async with node.agent() as port:
        assert (await fetch(port, "/healthz"))[0] == 200
        status, text = await fetch(port, "/readyz")
        assert status == 503
        assert json.loads(text)["missing"] == ["no configuration yet", "1 of 1 workers"]
        async with working(PlayedWorker()) as worker:
            stream, _ = await hello_of(node)
            stream.send(snapshot("n1", settings_bundle()))
            await stream.ack("n1")
            await worker.until(lambda message: isinstance(message, ContactTime))
            assert (await fetch(port, "/readyz"))[0] == 200
            _, metrics = await fetch(port, "/metrics")
    assert "smtp_message_enqueued_total 7.0" in metrics
    assert 'control_plane_connected_state{stream="config"} 1.0' in metrics
    assert "workers_connected 1.0" in metrics
    assert 'tls_certificate_days_left{certificate="node"}' in metrics
    assert re.search(r"^tls_cert_expiry_days [0-9.]+$", metrics, re.MULTILINE)


async def test_a_node_is_ready_while_one_worker_serves_and_names_those_that_are_missing(node: Node) -> None:
    async with node.agent(workers=2) as port, working(PlayedWorker()) as worker:
        stream, _ = await hello_of(node)
        stream.send(snapshot("n1", settings_bundle()))
        await worker.until(lambda message: isinstance(message, ContactTime))
        status, text = await fetch(port, "/readyz")
        assert (status, json.loads(text)) == (200, {"ready": True, "missing": ["1 of 2 workers"]})
        found = await asyncio.to_thread(readiness, f"http://127.0.0.1:{port}")
        assert found == Readiness(ready=True, detail="missing: 1 of 2 workers")


async def test_counters_go_on_from_where_a_worker_ended(node: Node) -> None:
    async with node.agent() as port:
        async with working(PlayedWorker()) as worker:
            await worker.until(lambda message: isinstance(message, LedgerPull))
            assert "smtp_message_enqueued_total 7.0" in (await fetch(port, "/metrics"))[1]
        assert "smtp_message_enqueued_total 7.0" in (await fetch(port, "/metrics"))[1]
        successor = PlayedWorker()
        successor.pid, successor.enqueued = 2, 3
        async with working(successor):
            await successor.until(lambda message: isinstance(message, LedgerPull))
            assert "smtp_message_enqueued_total 10.0" in (await fetch(port, "/metrics"))[1]


async def test_scrapes_at_the_same_time_ask_the_workers_once(node: Node) -> None:
    async with node.agent() as port, working(PlayedWorker()) as worker:
        await worker.until(lambda message: isinstance(message, LedgerPull))
        worker.mute = True
        scrapes = [asyncio.create_task(fetch(port, "/metrics")) for _ in range(20)]
        await worker.until(lambda message: isinstance(message, StatusRequest))
        (status, _), *_ = await asyncio.gather(*scrapes)
    assert status == 200
    assert sum(isinstance(message, StatusRequest) for message in worker.heard) == 1


async def test_a_worker_that_hangs_does_not_hang_the_scrape(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_workers, "STATUS_TIMEOUT_S", 0.05)
    async with node.agent() as port, working(PlayedWorker()) as worker:
        await worker.until(lambda message: isinstance(message, LedgerPull))
        _, before = await fetch(port, "/metrics")
        assert "workers_late 0.0" in before
        worker.mute = True
        async with asyncio.timeout(WAIT_S):
            _, metrics = await fetch(port, "/metrics")
    assert "smtp_message_enqueued_total 7.0" in metrics
    assert "workers_late 1.0" in metrics


async def test_enrolment_makes_a_key_here_and_keeps_the_certificate(node: Node, tmp_path: Path) -> None:
    ca_file = tmp_path / "public-ca.pem"
    ca_file.write_bytes(node.plane.pki.certificate_pem)
    data_dir = tmp_path / "new"
    with pytest.raises(IdentityError, match="token"):
        await asyncio.to_thread(enroll, data_dir, node.plane.address, ca_file, "wrong", "0.1")
    key = (data_dir / "identity" / "key.pem").read_bytes()
    identity = await asyncio.to_thread(enroll, data_dir, node.plane.address, ca_file, TOKEN, "0.1")
    assert identity.node == "nodes/n1"
    assert identity == load_identity(data_dir)
    assert identity.key_pem == key
    assert (data_dir / "identity" / "key.pem").stat().st_mode & 0o077 == 0


async def test_enrolment_with_a_server_that_the_ca_does_not_know_is_an_error_in_words(node: Node) -> None:
    ca_file = node.folder / "other-ca.pem"
    ca_file.write_bytes(Pki().certificate_pem)
    with pytest.raises(IdentityError, match="UNAVAILABLE"):
        await asyncio.to_thread(enroll, node.folder / "new", node.plane.address, ca_file, TOKEN, "0.1")


def test_a_node_that_is_not_enrolled_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="enroll --token"):
        load_identity(tmp_path)
