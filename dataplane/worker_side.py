"""What a worker does with the messages of the agent, and what it tells the agent of itself.

Configuration and denials are read in a thread, each in a lane of its own and one after the other, and answered when
they are in use: denials after delivery has cut what they stop. Commands run one after the other, those with a filter in
a lane of their own, since a walk may take minutes; one that fails is asked for again by the control plane, and one that
is asked for again while it is under way is not begun twice. Questions about who waits are answered one at a time, from
a thread. Everything else is a step on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dataplane.agent.ports import StoreError
from dataplane.agent_link import AgentLink
from dataplane.commands import CommandRunner
from dataplane.core.waiting import WaitingQuestion, WaitingStatement
from dataplane.forwarding import RecordForwarder
from dataplane.handover import Giver, Taker
from dataplane.ledger_lag import LedgerLag
from dataplane.link import (
    UNASKED,
    ConfigApplied,
    ConfigChanged,
    ContactTime,
    DenialsApplied,
    DenialsChanged,
    DrainNode,
    LedgerCursor,
    LedgerHandover,
    LedgerInvitation,
    LedgerPause,
    LedgerPull,
    LedgerQuestion,
    LedgerStatement,
    Message,
    QueueAnswer,
    RunCommand,
    Sample,
    SpoolState,
    SpoolVerdict,
    StatusRequest,
    WorkerHello,
    WorkerStatus,
)
from dataplane.ports import ConfigView, EventLog, QueueDepth, Spool, SpoolError, SpoolLosses, SpoolStats
from dataplane.spool_folders import is_refused, mark_refused
from dataplane.telemetry import SampleRow

FLUSH_LOOK_S = 0.02
LEDGER_LOOK_S = 1.0


class SwappableView(ConfigView, Protocol):
    """A ConfigView that is told when its files are new."""

    @property
    def digest(self) -> str:
        """Digest of what is in use."""
        ...

    def load(self) -> str:
        """Put the configuration on disk in use. Blocks; StoreError."""
        ...

    def load_denials(self) -> int:
        """Put the denials on disk in force. Blocks; StoreError."""
        ...

    def note_contact(self, wall_ms: int) -> None:
        """The configuration was current then."""
        ...


class Books(Protocol):
    """What this module needs of a spool on disk, to answer for it."""

    async def waiting(self, question: WaitingQuestion) -> WaitingStatement:
        """Who waits as of a record; never raises, never holds the loop."""
        ...


class Delivery(Protocol):
    """What this module needs of an engine."""

    def config_changed(self) -> None:
        """A new configuration is in use."""
        ...

    def denials_changed(self) -> None:
        """New denials are in force."""
        ...


class QueueCaller(Protocol):
    """Who calls the replicated queue over the link."""

    def answered(self, answer: QueueAnswer) -> None:
        """What came of a call."""
        ...

    def agent_lost(self) -> None:
        """No call will be answered any more."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """The worker. `books` are the same spools as they answer for themselves; `samples` is what it counts, beside its
    spools; `config_changed` is told of a new configuration before the agent hears that it is in use; `restart` ends
    the worker, to be started anew; `deliver_from` begins to send from a spool that was refused, and says whether that
    could be done without a restart; `known` hears that the control plane takes the spool for the newest;
    `close_to_mail` ends sessions and begins none, or takes mail again, and `is_closed` says whether none is left.
    """

    index: int
    view: SwappableView
    spools: Mapping[str, Spool]
    books: Mapping[str, Books]
    encode_statement: Callable[[WaitingStatement], bytes]
    engines: Mapping[str, Delivery]
    losses: Mapping[str, SpoolLosses]
    samples: Callable[[], Iterable[SampleRow]]
    config_changed: Callable[[], None]
    restart: Callable[[str], None]
    deliver_from: Callable[[str], bool]
    known: Callable[[str], None]
    close_to_mail: Callable[[bool], None]
    is_closed: Callable[[], bool]
    log: EventLog
    queue: QueueCaller | None = None


class WorkerSide:
    """See the module."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._link: AgentLink
        self._forwarder: RecordForwarder
        self._runner: CommandRunner
        self._giver: Giver
        self._taker: Taker
        self._config_news = asyncio.Event()
        self._denials_news = asyncio.Event()
        self._commands: asyncio.Queue[RunCommand] = asyncio.Queue()
        self._walks: asyncio.Queue[RunCommand] = asyncio.Queue()
        self._under_way: set[str] = set()
        self._status_requests: asyncio.Queue[int] = asyncio.Queue()
        # The control plane asks one question of a spool at a time.
        self._questions: asyncio.Queue[LedgerQuestion] = asyncio.Queue()
        self._lags = {name: LedgerLag() for name in parts.spools}
        self.draining = False
        self._told_to_drain = False
        self._emptied = False

    def attach(
        self, link: AgentLink, forwarder: RecordForwarder, runner: CommandRunner, giver: Giver, taker: Taker
    ) -> None:
        """Hand over what was made with this object; before anything runs."""
        self._giver = giver
        self._taker = taker
        giver.looked = self._look_whether_empty
        self._link = link
        self._forwarder = forwarder
        self._runner = runner

    def services(self) -> list[Coroutine[Any, Any, None]]:
        """What must run for as long as the worker does."""
        return [
            self._link.run(),
            self._forwarder.run(),
            self._follow_config(),
            self._follow_denials(),
            self._run_commands(self._commands),
            self._run_commands(self._walks),
            self._report_status(),
            self._answer_questions(),
            self._watch_ledger(),
            self._giver.run(),
            self._taker.run(),
        ]

    # --- from the agent --------------------------------------------------------------------------------------

    def received(self, message: Message) -> None:
        """A message of the agent."""
        match message:
            case ConfigChanged():
                self._config_news.set()
            case DenialsChanged():
                self._denials_news.set()
            case ContactTime():
                self._parts.view.note_contact(message.wall_ms)
            case LedgerPull():
                self._forwarder.pull(message.spool, message.after)
            case LedgerPause():
                self._forwarder.pause(message.spool)
            case LedgerCursor():
                self._parts.known(message.spool)
                self._forwarder.stored(message.spool, message.cursor)
            case _:
                self._received_rare(message)

    def _received_rare(self, message: Message) -> None:
        match message:
            case RunCommand() if message.command not in self._under_way:
                self._under_way.add(message.command)
                (self._commands if message.filter is None else self._walks).put_nowait(message)
            case RunCommand():
                pass
            case LedgerQuestion():
                self._questions.put_nowait(message)
            case SpoolVerdict():
                self._judge(message)
            case QueueAnswer():
                if self._parts.queue is not None:
                    self._parts.queue.answered(message)
            case LedgerInvitation() | LedgerHandover() | DrainNode():
                self._received_of_drain(message)
            case StatusRequest():
                self._status_requests.put_nowait(message.number)
            case _:
                self._parts.log.warning("agent.unexpected", kind=type(message).__name__)

    def _received_of_drain(self, message: LedgerInvitation | LedgerHandover | DrainNode) -> None:
        match message:
            case LedgerInvitation():
                self._taker.invited(message.spool)
            case LedgerHandover():
                self._taker.arrived(message.part)
            case DrainNode():
                self._drain_node(wanted=message.wanted)

    def agent_lost(self) -> None:
        """The agent is gone."""
        self._forwarder.agent_lost()
        if self._parts.queue is not None:
            self._parts.queue.agent_lost()

    def _judge(self, verdict: SpoolVerdict) -> None:
        folder = Path("spool") / verdict.spool
        if verdict.spool in self._parts.spools and is_refused(folder) != verdict.refused:
            mark_refused(folder, refused=verdict.refused)
            if verdict.refused:
                self._parts.log.warning("spool.refused", spool=verdict.spool)
                self._parts.restart(f"the control plane refused spool {verdict.spool}")
                return
            self._parts.log.info("spool.accepted", spool=verdict.spool)
            # What the agent knows of it must not be older than what is sent from it.
            self._status_requests.put_nowait(UNASKED)
            if not self._parts.deliver_from(verdict.spool):
                self._parts.restart(f"the control plane accepted spool {verdict.spool}")

    def _drain_node(self, *, wanted: bool) -> None:
        if wanted == self._told_to_drain or self.draining:
            return
        self._told_to_drain = wanted
        self._emptied = False
        self._parts.log.info("node.closed_to_mail" if wanted else "node.open_to_mail")
        self._parts.close_to_mail(wanted)
        self._giver.tell(wanted=wanted)
        self._status_requests.put_nowait(UNASKED)

    async def _look_whether_empty(self) -> None:
        """Tell the agent when the last session and the last recipient are gone, or there are some again."""
        waiting = [(await spool.stats()).waiting_count for spool in self._parts.spools.values()]
        emptied = self._parts.is_closed() and not any(waiting)
        if emptied != self._emptied:
            self._emptied = emptied
            self._status_requests.put_nowait(UNASKED)

    # --- lanes -----------------------------------------------------------------------------------------------

    async def _follow_config(self) -> None:
        while True:
            await self._config_news.wait()
            self._config_news.clear()
            error = ""
            try:
                await asyncio.to_thread(self._parts.view.load)
            except StoreError as failed:
                error = str(failed)
                self._parts.log.warning("config.unreadable", error=error)
            else:
                for engine in self._parts.engines.values():
                    engine.config_changed()
                self._parts.config_changed()
                self._parts.log.info("config.in_use", digest=self._parts.view.digest[:16])
            self._link.send(ConfigApplied(self._parts.view.digest, error))

    async def _follow_denials(self) -> None:
        while True:
            await self._denials_news.wait()
            self._denials_news.clear()
            error = ""
            try:
                await asyncio.to_thread(self._parts.view.load_denials)
            except StoreError as failed:
                error = str(failed)
                self._parts.log.warning("denials.unreadable", error=error)
            else:
                for engine in self._parts.engines.values():
                    engine.denials_changed()
                # What was cut is closed in the loop's next turn; then the kernel has forgotten what it had not sent.
                await asyncio.sleep(0)
                self._parts.log.info("denials.in_force", version=self._parts.view.denials.version)
            self._link.send(DenialsApplied(self._parts.view.denials.version, error))

    async def _run_commands(self, commands: asyncio.Queue[RunCommand]) -> None:
        while True:
            command = await commands.get()
            try:
                await self._runner.run(command)
            except SpoolError as error:
                self._parts.log.warning("command.failed", command=command.command, error=str(error))
            finally:
                self._under_way.discard(command.command)

    async def _report_status(self) -> None:
        while True:
            number = await self._status_requests.get()
            try:
                self._link.send(await self.status(number))
            except SpoolError as error:
                self._parts.log.warning("status.failed", error=str(error))

    async def _answer_questions(self) -> None:
        while True:
            question = await self._questions.get()
            if (books := self._parts.books.get(question.spool)) is not None:
                statement = await books.waiting(WaitingQuestion(*question))
                self._link.send(LedgerStatement(self._parts.encode_statement(statement)))

    async def _watch_ledger(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for name, spool in self._parts.spools.items():
                with contextlib.suppress(SpoolError):
                    stats = await spool.stats()
                    self._lags[name].note(stats.outbox_last, stats.acknowledged, loop.time())
            await asyncio.sleep(LEDGER_LOOK_S)

    def begin_draining(self) -> None:
        """Tell the agent, without being asked, that this worker takes no more mail."""
        self.draining = True
        self._giver.tell(wanted=False)
        self._status_requests.put_nowait(UNASKED)

    # --- to the agent ----------------------------------------------------------------------------------------

    async def hello(self) -> WorkerHello:
        """What this worker has in use and open."""
        parts = self._parts
        spools = [self._state(name, await spool.stats()) for name, spool in parts.spools.items()]
        return WorkerHello(parts.index, os.getpid(), parts.view.digest, parts.view.denials.version, tuple(spools))

    async def status(self, number: int) -> WorkerStatus:
        """How this worker is."""
        stats = {name: await spool.stats() for name, spool in self._parts.spools.items()}
        depths = await asyncio.gather(*(spool.depth() for spool in self._parts.spools.values()))
        return WorkerStatus(
            number=number,
            draining=self.draining or self._told_to_drain,
            waiting_count=sum(each.waiting_count for each in stats.values()),
            oldest_accepted_ms=min(
                (each.oldest_accepted_ms for each in stats.values() if each.oldest_accepted_ms), default=0
            ),
            spools=tuple(self._state(name, each) for name, each in stats.items()),
            samples=tuple(self._samples(list(stats.values()), depths)),
            closed=self._told_to_drain and self._parts.is_closed(),
        )

    def _state(self, name: str, stats: SpoolStats) -> SpoolState:
        refused = is_refused(Path("spool") / name)
        return spool_state(self._parts.spools[name], stats, self._parts.losses[name], refused=refused)

    def _samples(self, stats: Sequence[SpoolStats], depths: Sequence[QueueDepth]) -> Iterator[Sample]:
        for row in self._parts.samples():
            yield Sample(*row)
        for state, count in depth_by_state(depths).items():
            yield Sample("queue_depth", (state,), count)
        yield Sample("queue_depth", ("failed",), sum(each.quarantined_count for each in stats))
        yield Sample("spool_bytes", ("database",), sum(each.database_bytes for each in stats))
        yield Sample("spool_bytes", ("wal",), sum(each.wal_bytes for each in stats))
        yield Sample("spool_commits_total", (), sum(each.commits for each in stats))
        yield Sample("handover_messages_total", ("given",), self._giver.given_count)
        yield Sample("handover_messages_total", ("taken",), self._taker.taken_count)
        yield Sample("config_stale", (), float(self._parts.view.stale))
        now_s = asyncio.get_running_loop().time()
        yield Sample("ledger_lag_seconds", (), max((lag.age_s(now_s) for lag in self._lags.values()), default=0.0))

    async def unstored(self) -> int:
        """Ledger records that the control plane has not stored yet, over all spools."""
        stats = [await spool.stats() for spool in self._parts.spools.values()]
        return sum(max(0, each.outbox_last - each.acknowledged) for each in stats)

    async def flush(self, timeout_s: float) -> None:
        """Wait while the agent still takes records and there are some, at most `timeout_s`.

        Cancellation leaves the rest for the next start.
        """
        try:
            async with asyncio.timeout(timeout_s):
                for name, spool in self._parts.spools.items():
                    while self._forwarder.is_served(name):
                        stats = await spool.stats()
                        if stats.acknowledged >= stats.outbox_last:
                            break
                        await asyncio.sleep(FLUSH_LOOK_S)
        except TimeoutError:
            self._parts.log.warning("ledger.not_flushed", timeout_s=timeout_s)


def spool_state(spool: Spool, stats: SpoolStats, losses: SpoolLosses, *, refused: bool) -> SpoolState:
    """A spool as the agent hears of it."""
    openings = spool.openings
    return SpoolState(
        spool=spool.identity.spool,
        incarnation=spool.identity.incarnation,
        acknowledged=stats.acknowledged,
        oldest_record=stats.outbox_first,
        last_record=stats.outbox_last,
        waiting_count=stats.waiting_count,
        refused=refused,
        lost_messages=losses.messages,
        lost_count=losses.message_count,
        unnamed_losses=losses.damaged_places > 0,
        opening=openings.present.hex(),
        former_openings=tuple((former.id.hex(), former.last_record) for former in openings.former),
    )


def depth_by_state(depths: Sequence[QueueDepth]) -> dict[str, int]:
    """Recipients by state over all spools, by the names of the metric."""
    return {
        "queued": sum(depth.queued for depth in depths),
        "processing": sum(depth.sending for depth in depths),
        "deferred": sum(depth.deferred for depth in depths),
        "scheduled": sum(depth.scheduled for depth in depths),
        "held": sum(depth.held for depth in depths),
    }
