"""Keeps the ledger stream open and does what its machine says: see ledger_machine.py for the rules.

`LedgerStream.run` never ends by itself; streams that end are opened again after a wait with full jitter. Records are
lost with a stream, and pulled again from the spool on the next one: nothing here is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import grpc.aio

from dataplane.agent.channel import why_ended
from dataplane.agent.ledger_machine import (
    Ask,
    Deliver,
    Invite,
    LedgerAction,
    LedgerMachine,
    Pause,
    Pull,
    Refused,
    SendLedger,
    Stored,
)
from dataplane.backoff import Backoff
from dataplane.link import LedgerHandover, LedgerQuestion, LedgerRecords, LedgerStatement, LedgerTake, SpoolState
from dataplane.ports import Clock, EventLog
from postroad.node.v1.ledger_service_pb2 import ReportLedgerRequest
from postroad.node.v1.ledger_service_pb2_grpc import LedgerServiceStub


class SpoolSide(Protocol):
    """What the stream needs of the workers."""

    def pull(self, spool: str, after: int) -> None:
        """Ask for records behind `after`."""
        ...

    def pause(self, spool: str) -> None:
        """Nobody takes records now."""
        ...

    def stored(self, spool: str, cursor: int) -> None:
        """Records up to `cursor` are stored."""
        ...

    def give_verdict(self, spool: str, *, refused: bool) -> None:
        """The control plane refuses the spool."""
        ...

    def ask(self, question: LedgerQuestion) -> None:
        """Ask which recipients wait."""
        ...

    def invite(self, spool: str) -> None:
        """Mail waits that the spool may take over."""
        ...

    def deliver(self, spool: str, handover: LedgerHandover) -> None:
        """A part of what the spool takes over."""
        ...


class LedgerStream:
    """See the module."""

    def __init__(
        self,
        open_channel: Callable[[], grpc.aio.Channel],
        spools: SpoolSide,
        clock: Clock,
        random: Callable[[], float],
        log: EventLog,
    ) -> None:
        self._machine = LedgerMachine()
        self._open_channel = open_channel
        self._spools = spools
        self._clock = clock
        self._random = random
        self._log = log
        # Bounded by the machine: it sends a batch only while few are unanswered.
        self._outgoing: asyncio.Queue[ReportLedgerRequest] | None = None
        self.connected = False

    async def run(self) -> None:
        """Serve until cancelled."""
        backoff = Backoff(self._random, base_s=1.0, cap_s=60.0)
        while True:
            opened = self._clock.monotonic()
            error = await self._serve_one()
            wait_s = backoff.next_wait_s(self._clock.monotonic() - opened)
            self._log.info("ledger.disconnected", error=error, retry_in_s=round(wait_s, 1))
            await asyncio.sleep(wait_s)

    def spool_opened(self, state: SpoolState) -> None:
        """A worker has a spool open."""
        self._do(self._machine.spool_opened(state))

    def spool_accepted(self, spool: str) -> None:
        """The control plane takes the spool again."""
        self._do(self._machine.spool_accepted(spool))

    def spool_gone(self, spool: str) -> None:
        """Its worker is gone."""
        self._machine.spool_gone(spool)

    def records_arrived(self, records: LedgerRecords) -> None:
        """A worker answered a pull."""
        self._do(self._machine.records(records))

    def statement_arrived(self, statement: LedgerStatement) -> None:
        """A worker answered a question."""
        self._do(self._machine.statement(statement))

    def take_asked(self, take: LedgerTake) -> None:
        """A worker's spool takes mail over."""
        self._do(self._machine.take(take))

    async def _serve_one(self) -> str:
        self._outgoing = asyncio.Queue()
        try:
            async with self._open_channel() as channel:
                call = LedgerServiceStub(channel).ReportLedger()
                try:
                    await self._serve_call(call)
                finally:
                    call.cancel()
        except Exception as failure:  # noqa: BLE001 - why_ended raises what is our own bug
            return why_ended(failure)
        finally:
            self.connected = False
            self._outgoing = None
            self._do(self._machine.disconnected())
        return "the control plane ended the stream"

    async def _serve_call(self, call: grpc.aio.StreamStreamCall[ReportLedgerRequest, Any]) -> None:
        await call.wait_for_connection()
        self.connected = True
        self._log.info("ledger.connected")
        self._do(self._machine.connected())
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(self._write(call))
            async for response in call:
                self._do(self._machine.receive(response))
            writer.cancel()

    async def _write(self, call: grpc.aio.StreamStreamCall[ReportLedgerRequest, Any]) -> None:
        outgoing = self._outgoing
        while outgoing is not None:
            await call.write(await outgoing.get())

    def _do(self, actions: Iterable[LedgerAction]) -> None:
        for action in actions:
            match action:
                case SendLedger():
                    if self._outgoing is not None:
                        self._outgoing.put_nowait(action.request)
                case Pull():
                    self._spools.pull(action.spool, action.after)
                case Pause():
                    self._spools.pause(action.spool)
                case Stored():
                    self._spools.stored(action.spool, action.cursor)
                case Ask() | Invite() | Deliver():
                    self._pass_on(action)
                case Refused():
                    self._log.info("ledger.refused", spool=action.spool, detail=action.detail)
                    if action.halts:
                        self._spools.give_verdict(action.spool, refused=True)

    def _pass_on(self, action: Ask | Invite | Deliver) -> None:
        match action:
            case Ask():
                self._spools.ask(action.question)
            case Invite():
                self._spools.invite(action.spool)
            case Deliver():
                self._spools.deliver(action.spool, action.handover)
