"""Keeps the configuration stream open and does what its machine says: see stream_machine.py for the rules.

`ConfigStream.run` never ends by itself: whatever happens to a stream, it is closed, and after a wait with full jitter
(1 s to 60 s, short again after a minute of health) a new one is opened. Checking and writing happen in threads; what is
under way when a stream ends is brought to its end before the next Hello says what the node holds. Cancelling it closes
the stream; a write that was under way is whole or undone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from dataplane.agent.channel import why_ended
from dataplane.agent.held import HeldConfig, Proposal
from dataplane.agent.ports import CheckBundles, ConfigStore, StoreError
from dataplane.agent.stream_machine import (
    Action,
    Check,
    Contact,
    Drain,
    Reconnect,
    RunCommand,
    Send,
    StoreConfig,
    StoreDenials,
    StreamMachine,
    TellConfig,
    TellDenials,
    Verdict,
)
from dataplane.backoff import Backoff
from dataplane.ports import Clock, EventLog
from postroad.config.v1.denials_pb2 import DenialSet
from postroad.node.v1.config_stream_service_pb2 import Command, SpoolStatus, StatusReport, StreamConfigRequest
from postroad.node.v1.config_stream_service_pb2_grpc import ConfigStreamServiceStub

STATUS_INTERVAL_S = 20.0
LOOK_FOR_WORKERS_S = 1.0
STORE_AGAIN_S = 5.0
CONTACT_WRITE_INTERVAL_S = 10.0


class NodeSide(Protocol):
    """What the stream needs of the rest of the agent."""

    def tell_config(self, digest: str) -> None:
        """The configuration on disk has this digest now."""
        ...

    def tell_denials(self, version: int) -> None:
        """The denials on disk have this version now."""
        ...

    def tell_contact(self, wall_ms: int) -> None:
        """The configuration was current at this time."""
        ...

    def run_command(self, command: Command) -> None:
        """Hand the command to the spool's worker, if it is there."""
        ...

    def give_verdict(self, spool: str, *, refused: bool) -> None:
        """The control plane refuses the spool, or takes it again."""
        ...

    def tell_drain(self, *, wanted: bool) -> None:
        """Whether the node drains."""
        ...

    def look_for_absent(self) -> None:
        """Find out which unheard workers have no process."""
        ...

    def spool_statuses(self) -> Sequence[SpoolStatus]:
        """Every spool of the node."""
        ...

    async def status_report(self) -> StatusReport:
        """How the node is, without digest and times."""
        ...


class _StreamEndedError(Exception):
    """The stream must be closed: why is in the Reconnect action."""

    def __init__(self, reconnect: Reconnect) -> None:
        super().__init__(reconnect.error)
        self.reconnect = reconnect


class ConfigStream:
    """See the module."""

    def __init__(
        self,
        machine: StreamMachine,
        open_channel: Callable[[], grpc.aio.Channel],
        node: NodeSide,
        store: ConfigStore,
        check: CheckBundles,
        clock: Clock,
        random: Callable[[], float],
        log: EventLog,
    ) -> None:
        self._machine = machine
        self._open_channel = open_channel
        self._node = node
        self._store = store
        self._check = check
        self._clock = clock
        self._random = random
        self._log = log
        self._outgoing: asyncio.Queue[StreamConfigRequest] | None = None
        self._group: asyncio.TaskGroup
        self._work: set[asyncio.Task[None]] = set()
        self._contact_written = float("-inf")
        self._report_wanted = asyncio.Event()
        self.connected = False
        self.last_contact_ms = 0

    async def run(self) -> None:
        """Serve until cancelled."""
        backoff = Backoff(self._random, base_s=1.0, cap_s=60.0)
        async with asyncio.TaskGroup() as self._group:
            self._group.create_task(self._watch_workers())
            self._group.create_task(self._store_again())
            while True:
                while self._work:
                    await asyncio.wait(self._work)
                opened = self._clock.monotonic()
                reconnect = await self._serve_one()
                worked_for_s = self._clock.monotonic() - opened
                if reconnect.error:
                    wait_s = backoff.next_wait_s(worked_for_s)
                else:
                    # At least a moment, so that a control plane that says it over and over costs little.
                    wait_s = max(0.1, reconnect.after_s + reconnect.jitter_s * self._random())
                self._log.info("config.disconnected", error=reconnect.error, retry_in_s=round(wait_s, 1))
                await asyncio.sleep(wait_s)

    def workers_changed(self) -> None:
        """The worker table changed."""
        self._do(self._machine.workers_changed())

    def report_soon(self) -> None:
        """What the next StatusReport says matters now."""
        self._report_wanted.set()

    # --- one stream ------------------------------------------------------------------------------------------

    async def _serve_one(self) -> Reconnect:
        """Open a stream and serve it to its end; returns how to go on."""
        self._outgoing = asyncio.Queue()
        try:
            async with self._open_channel() as channel:
                call = ConfigStreamServiceStub(channel).StreamConfig()
                try:
                    return await self._serve_call(call)
                finally:
                    call.cancel()
        except Exception as failure:  # noqa: BLE001 - why_ended raises what is our own bug
            return Reconnect(error=why_ended(failure))
        finally:
            self.connected = False
            self._outgoing = None
            self._machine.disconnected()

    async def _serve_call(self, call: grpc.aio.StreamStreamCall[StreamConfigRequest, Any]) -> Reconnect:
        reconnect = Reconnect(error="the control plane ended the stream")
        self._do(self._machine.connected(self._node.spool_statuses()))
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(self._write(call)), group.create_task(self._report_status())]
            try:
                async for response in call:
                    if not self.connected:
                        self.connected = True
                        self._log.info("config.connected")
                    self._do(self._machine.receive(response))
            except _StreamEndedError as ended:
                # Kept out of the group, which would wrap it.
                reconnect = ended.reconnect
            for helper in helpers:
                helper.cancel()
        return reconnect

    async def _write(self, call: grpc.aio.StreamStreamCall[StreamConfigRequest, Any]) -> None:
        outgoing = self._outgoing
        while outgoing is not None:
            await call.write(await outgoing.get())

    async def _report_status(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATUS_INTERVAL_S):
                    await self._report_wanted.wait()
            self._report_wanted.clear()
            report = await self._node.status_report()
            report.digest = self._machine.config.digest
            report.denials_version = self._machine.denials_in_force
            report.told_to_drain = self._machine.told_to_drain
            report.node_time.CopyFrom(_timestamp(self._clock.wall_ms()))
            self._send(StreamConfigRequest(status_report=report))

    async def _watch_workers(self) -> None:
        while True:
            await asyncio.sleep(LOOK_FOR_WORKERS_S)
            self._node.look_for_absent()

    async def _store_again(self) -> None:
        while True:
            await asyncio.sleep(STORE_AGAIN_S)
            self._do(self._machine.store_again())

    def _send(self, request: StreamConfigRequest) -> None:
        if self._outgoing is not None:
            self._outgoing.put_nowait(request)

    # --- actions ---------------------------------------------------------------------------------------------

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            self._do_one(action)

    def _do_one(self, action: Action) -> None:
        match action:
            case Send():
                self._log_answer(action.request)
                self._send(action.request)
            case Check():
                self._start(self._check_bundles(action.proposal))
            case StoreConfig():
                self._start(self._store_config(action.config))
            case StoreDenials():
                self._start(self._store_denials(action.denials))
            case TellConfig() | TellDenials() | Drain():
                self._announce(action)
            case Contact():
                self._start(self._note_contact())
            case Reconnect():
                raise _StreamEndedError(action)
            case RunCommand():
                self._node.run_command(action.command)
            case Verdict():
                self._node.give_verdict(action.spool, refused=action.refused)

    def _announce(self, action: TellConfig | TellDenials | Drain) -> None:
        if isinstance(action, Drain):
            self._log.info("node.told_to_drain" if action.wanted else "node.told_to_resume")
            self._node.tell_drain(wanted=action.wanted)
            self.report_soon()
        elif isinstance(action, TellConfig):
            self._node.tell_config(self._machine.config.digest.hex())
        else:
            self._node.tell_denials(self._machine.denials.version)
        self._node.look_for_absent()

    def _log_answer(self, request: StreamConfigRequest) -> None:
        match request.WhichOneof("message"):
            case "ack":
                self._log.info(
                    "config.applied",
                    digest=self._machine.config.digest.hex()[:16],
                    denials_version=request.ack.denials_version,
                )
            case "nack":
                self._log.info(
                    "config.refused",
                    error=request.nack.error_detail.message,
                    bundles=[error.name for error in request.nack.bundle_errors],
                )
            case _:
                pass

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _check_bundles(self, proposal: Proposal) -> None:
        try:
            errors = await asyncio.to_thread(self._check, proposal)
        except Exception as error:  # noqa: BLE001 - our own bug must not keep good mail from flowing: refuse them all
            self._log.info("config.check_failed", error=f"{type(error).__name__}: {error}")
            errors = {bundle.name: "the node could not check it" for bundle in proposal.changed}
        self._do(self._machine.checked(errors))

    async def _store_config(self, config: HeldConfig) -> None:
        error = ""
        try:
            await asyncio.to_thread(self._store.write_config, config)
        except StoreError as failed:
            error = str(failed)
        self._do(self._machine.config_stored(config, error))

    async def _store_denials(self, denials: DenialSet) -> None:
        error = ""
        try:
            await asyncio.to_thread(self._store.write_denials, denials)
        except StoreError as failed:
            error = str(failed)
        self._do(self._machine.denials_stored(denials, error))

    async def _note_contact(self) -> None:
        self.last_contact_ms = self._clock.wall_ms()
        self._node.tell_contact(self.last_contact_ms)
        if self._clock.monotonic() - self._contact_written < CONTACT_WRITE_INTERVAL_S:
            return
        self._contact_written = self._clock.monotonic()
        try:
            await asyncio.to_thread(self._store.write_contact, self.last_contact_ms)
        except StoreError as failed:
            self._log.info("config.contact_not_written", error=str(failed))


def _timestamp(wall_ms: int) -> Timestamp:
    return Timestamp(seconds=wall_ms // 1000, nanos=wall_ms % 1000 * 1_000_000)
