"""The middle of the agent: passes facts and wishes between the workers, the configuration stream and the ledger stream.

It decides nothing that the machines decide. Commands for a spool that no worker has open wait here, few of them, until
one has: what is lost is sent again by the control plane, which asks until the result is in the ledger.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from dataplane.agent.held import EMPTY, HeldConfig
from dataplane.agent.ledger import LedgerStream
from dataplane.agent.ledger_machine import former_openings
from dataplane.agent.queue_relay import QueueRelay
from dataplane.agent.stream import ConfigStream
from dataplane.agent.stream_machine import StreamMachine
from dataplane.agent.workers import WorkerHub
from dataplane.core.commands import Filter
from dataplane.core.ids import MessageId
from dataplane.link import (
    ConfigChanged,
    ContactTime,
    DenialsChanged,
    DrainNode,
    LedgerCursor,
    LedgerHandover,
    LedgerInvitation,
    LedgerPause,
    LedgerPull,
    LedgerQuestion,
    LedgerRecords,
    LedgerStatement,
    LedgerTake,
    QueueCall,
    RunCommand,
    SpoolVerdict,
    WorkerHello,
    WorkerStatus,
)
from dataplane.ports import Clock
from postroad.node.v1.config_stream_service_pb2 import Command, SpoolStatus, StatusReport

MAX_WAITING_COMMANDS = 1_000


class NodeAgent:
    """Fills the observer and side protocols of workers.py, stream.py and ledger.py."""

    def __init__(
        self, hub: WorkerHub, machine: StreamMachine, clock: Clock, config_changed: Callable[[HeldConfig], None]
    ) -> None:
        self._hub = hub
        self._config_changed = config_changed
        self._machine = machine
        self._clock = clock
        self._config: ConfigStream
        self._ledger: LedgerStream
        self._queue: QueueRelay
        self._commands: OrderedDict[str, RunCommand] = OrderedDict()
        self._lost: set[str] = set()

    def attach(self, config: ConfigStream, ledger: LedgerStream, queue: QueueRelay) -> None:
        """Hand over the streams, which were made with this object; before anything runs."""
        self._config = config
        self._ledger = ledger
        self._queue = queue

    # --- from workers ----------------------------------------------------------------------------------------

    def worker_connected(self, hello: WorkerHello) -> None:
        """Bring the worker up to date, and its spools to the ledger."""
        held = self._machine.config
        if held is not EMPTY and hello.config_digest != held.digest.hex():
            self._hub.send(hello.worker, ConfigChanged(held.digest.hex()))
        if hello.denials_version < self._machine.denials.version:
            self._hub.send(hello.worker, DenialsChanged(self._machine.denials.version))
        if self._config.last_contact_ms:
            self._hub.send(hello.worker, ContactTime(self._config.last_contact_ms))
        if self._machine.told_to_drain:
            self._hub.send(hello.worker, DrainNode(wanted=True))
        for state in hello.spools:
            self._ledger.spool_opened(state)
        if any(state.refused or state.lost_count or state.unnamed_losses for state in hello.spools):
            self._config.report_soon()
        mine = {state.spool for state in hello.spools}
        if mine & self._lost:
            # Commands that the former worker had begun are sent again when this is known.
            self._lost -= mine
            self._config.report_soon()
        for command in [waiting for waiting in self._commands.values() if waiting.spool in mine]:
            del self._commands[command.command]
            self._hub.send(hello.worker, command)

    def worker_lost(self, index: int, spools: Iterable[str]) -> None:
        """Its spools report no more."""
        del index
        for spool in spools:
            self._lost.add(spool)
            self._ledger.spool_gone(spool)

    def workers_changed(self) -> None:
        """Something may be in use everywhere now."""
        self._config.workers_changed()

    def records_arrived(self, records: LedgerRecords) -> None:
        """Send them on."""
        self._ledger.records_arrived(records)

    def statement_arrived(self, statement: LedgerStatement) -> None:
        """Send it on."""
        self._ledger.statement_arrived(statement)

    def queue_called(self, index: int, call: QueueCall) -> None:
        """Make the call, and give the worker the answer."""
        self._queue.call(call, lambda answer: self._hub.send(index, answer))

    def take_asked(self, take: LedgerTake) -> None:
        """Send it on."""
        self._ledger.take_asked(take)

    def status_changed(self) -> None:
        """A worker told what nobody had asked for: the control plane waits for it."""
        self._config.report_soon()

    # --- for the configuration stream ------------------------------------------------------------------------

    def tell_config(self, digest: str) -> None:
        """Tell the workers, and whoever else follows the configuration in this process."""
        self._hub.broadcast(ConfigChanged(digest))
        self._config_changed(self._machine.config)

    def tell_denials(self, version: int) -> None:
        """Tell the workers."""
        self._hub.broadcast(DenialsChanged(version))

    def tell_contact(self, wall_ms: int) -> None:
        """Tell the workers."""
        self._hub.broadcast(ContactTime(wall_ms))

    def tell_drain(self, *, wanted: bool) -> None:
        """Tell the workers."""
        self._hub.broadcast(DrainNode(wanted=wanted))

    def run_command(self, command: Command) -> None:
        """Hand the command to the spool's worker, or keep it until one is there."""
        message = _run_command(command)
        if not self._hub.send_to_owner(command.spool, message):
            self._commands[command.command] = message
            while len(self._commands) > MAX_WAITING_COMMANDS:
                self._commands.popitem(last=False)

    def look_for_absent(self) -> None:
        """As WorkerHub."""
        self._hub.look_for_absent()

    def spool_statuses(self) -> Sequence[SpoolStatus]:
        """Every spool that a worker reported."""
        return [
            SpoolStatus(
                spool=state.spool,
                incarnation=state.incarnation,
                acknowledged=state.acknowledged,
                last_record=state.last_record,
                waiting_count=state.waiting_count,
                open=self._hub.is_open(state.spool),
                refused=state.refused,
                lost_messages=state.lost_messages,
                lost_count=state.lost_count,
                unnamed_losses=state.unnamed_losses,
                opening_id=bytes.fromhex(state.opening),
                # Only where the ledger is not asked: it hears of them at each opening.
                former_openings=former_openings(state) if state.refused else (),
            )
            for state in self._hub.spools
        ]

    async def status_report(self) -> StatusReport:
        """How the node is, over all workers."""
        statuses = await self._hub.collect_status()
        report = StatusReport(
            draining=any(status.draining for status in statuses),
            queue_depth=sum(status.waiting_count for status in statuses),
            spools=self.spool_statuses(),
            closed=bool(statuses) and all(status.closed for status in statuses),
        )
        oldest_ms = oldest_accepted_ms(statuses)
        if oldest_ms:
            report.oldest_age.FromMilliseconds(max(0, self._clock.wall_ms() - oldest_ms))
        return report

    # --- for the ledger stream -------------------------------------------------------------------------------

    def pull(self, spool: str, after: int) -> None:
        """Ask the spool's worker for records."""
        self._hub.send_to_owner(spool, LedgerPull(spool, after))

    def pause(self, spool: str) -> None:
        """Tell the spool's worker that nobody takes records."""
        self._hub.send_to_owner(spool, LedgerPause(spool))

    def stored(self, spool: str, cursor: int) -> None:
        """Tell the spool's worker what is stored."""
        self._hub.send_to_owner(spool, LedgerCursor(spool, cursor))

    def ask(self, question: LedgerQuestion) -> None:
        """Ask the spool's worker which recipients wait; one that is not there leaves it unanswered."""
        self._hub.send_to_owner(question.spool, question)

    def invite(self, spool: str) -> None:
        """Tell the spool's worker."""
        self._hub.send_to_owner(spool, LedgerInvitation(spool))

    def deliver(self, spool: str, handover: LedgerHandover) -> None:
        """Give it to the spool's worker; one that is not there asks again."""
        self._hub.send_to_owner(spool, handover)

    def give_verdict(self, spool: str, *, refused: bool) -> None:
        """Tell the spool's worker whether it may send; what may be sent is reported, too."""
        told = self._hub.send_to_owner(spool, SpoolVerdict(spool, refused))
        if told and not refused:
            self._hub.note_accepted(spool)
            self._ledger.spool_accepted(spool)


def _run_command(command: Command) -> RunCommand:
    wanted = None
    if command.HasField("filter"):
        told = command.filter
        after = MessageId(told.after)
        wanted = Filter(told.accepted_before_ms, after, told.provider, told.recipient_domain, tuple(told.states))
    message_ids = tuple(command.message_ids)
    return RunCommand(
        command.command, command.spool, command.verb, command.account, message_ids, command.provider, wanted
    )


def oldest_accepted_ms(statuses: Iterable[WorkerStatus]) -> int:
    """When the oldest waiting message was accepted, 0 when none waits."""
    return min((status.oldest_accepted_ms for status in statuses if status.oldest_accepted_ms), default=0)
