"""Composition root of the agent: `python -m dataplane agent`, started by the supervisor in the data directory.

Puts together last-known-good, the link to the workers, both streams to the control plane and the HTTP endpoint; runs
until SIGTERM, which the supervisor sends after the workers have ended. Last-known-good that cannot be read is reported
and treated as nothing held: the control plane then sends everything anew, and what the workers use stays meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import grpc.aio

from dataplane.adapters.bundle_check import check_bundles
from dataplane.adapters.bundle_codec import decode_settings
from dataplane.adapters.lkg import LastKnownGoodFiles, open_files
from dataplane.agent.applied import WorkerTable
from dataplane.agent.channel import eager_options, open_channel
from dataplane.agent.held import EMPTY, HeldConfig
from dataplane.agent.identity import load_identity
from dataplane.agent.ledger import LedgerStream
from dataplane.agent.metrics import MetricsServer, NodeState
from dataplane.agent.node_agent import NodeAgent
from dataplane.agent.ports import StoreError
from dataplane.agent.queue_relay import QueueRelay
from dataplane.agent.stream import ConfigStream
from dataplane.agent.stream_machine import NodeFacts, StreamMachine
from dataplane.agent.workers import WorkerHub
from dataplane.clock import SystemClock
from dataplane.core.config import NodeSettings
from dataplane.lifecycle import ProcessSignals
from dataplane.link import SOCKET_PATH
from dataplane.live_settings import wished_log_level
from dataplane.ports import EventLog
from dataplane.process import Child
from dataplane.settings import Settings, SettingsError
from dataplane.telemetry import name_node, set_log_level
from postroad.config.v1.bundle_pb2 import BUNDLE_KIND_NODE_SETTINGS
from postroad.config.v1.denials_pb2 import DenialSet


@dataclass(frozen=True, slots=True)
class _Held:
    config: HeldConfig
    denials: DenialSet
    contact_ms: int


async def run_agent(settings: Settings, worker_count: int, child: Child, log: EventLog) -> None:
    """Serve until SIGTERM. IdentityError, StoreError, MetricsPortError and OSError when it cannot begin."""
    signals = ProcessSignals()
    clock = SystemClock()
    data_dir = Path()
    identity = load_identity(data_dir)
    name_node(identity.node)
    key_text = settings.seal_key.get_secret_value() if settings.seal_key else None
    files = open_files(data_dir, settings.seal_key_file, key_text, identity.node, clock)
    held = _read_held(files, log)
    table = WorkerTable(worker_count)
    facts = NodeFacts(identity.node, str(uuid.uuid4()), version("postroad"))
    machine = StreamMachine(facts, held.config, held.denials, table)
    hub = WorkerHub(Path(SOCKET_PATH), table, log)
    level = _LogLevel(settings)
    level.config_changed(held.config)
    agent = NodeAgent(hub, machine, clock, level.config_changed)

    def channel() -> grpc.aio.Channel:
        # Read anew each time: the node may have been enrolled again.
        return open_channel(settings.control_plane.address, load_identity(data_dir))

    config = ConfigStream(machine, channel, agent, files, check_bundles, clock, random.random, log)
    config.last_contact_ms = held.contact_ms
    ledger = LedgerStream(channel, agent, clock, random.random, log)
    queue = QueueRelay(
        lambda: open_channel(settings.control_plane.address, load_identity(data_dir), eager_options()), log
    )
    agent.attach(config, ledger, queue)
    certificates = {"node": data_dir / "identity" / "certificate.pem"}
    if settings.tls is not None:
        certificates["listeners"] = settings.tls.certificate_file
    state = NodeState(hub, table, machine, config, ledger, clock, settings.config_max_age_s, worker_count, certificates)
    metrics = MetricsServer(state, settings.metrics.address, settings.metrics.port)
    await hub.start(agent)
    port = await metrics.start()
    try:
        async with asyncio.TaskGroup() as group:
            work = (config.run(), ledger.run(), level.follow(child, signals))
            services = [group.create_task(each) for each in work]
            child.report_ready({"metrics": {"address": settings.metrics.address, "port": port}})
            await signals.drain.wait()
            for service in services:
                service.cancel()
    finally:
        await queue.close()
        await metrics.stop()
        await hub.stop()


class _LogLevel:
    """The level of this process's log: as the pool's settings say, else the node's own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._node = NodeSettings()

    def config_changed(self, held: HeldConfig) -> None:
        """The node holds this now."""
        bundles = (bundle for bundle in held.bundles.values() if bundle.kind == BUNDLE_KIND_NODE_SETTINGS)
        bundle = next(bundles, None)
        self._node = NodeSettings() if bundle is None else decode_settings(bundle)
        set_log_level(wished_log_level(self._settings, self._node))

    async def follow(self, child: Child, signals: ProcessSignals) -> None:
        """Take over the node's settings at each SIGHUP; what is being replaced this moment comes with the next."""
        while True:
            await signals.reload.wait()
            signals.reload.clear()
            with contextlib.suppress(SettingsError):
                self._settings = child.settings() or self._settings
                set_log_level(wished_log_level(self._settings, self._node))


def _read_held(files: LastKnownGoodFiles, log: EventLog) -> _Held:
    config, denials, contact_ms = EMPTY, DenialSet(), 0
    try:
        config = files.read_config()
    except StoreError as error:
        log.warning("config.unreadable", error=str(error))
    try:
        denials = files.read_denials()
    except StoreError as error:
        log.warning("denials.unreadable", error=str(error))
    with contextlib.suppress(StoreError):
        contact_ms = files.read_contact()
    return _Held(config, denials, contact_ms)
