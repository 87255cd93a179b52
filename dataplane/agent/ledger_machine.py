"""The node's side of `LedgerService.ReportLedger` without I/O: how records of spools get to the control
plane.

State of a spool while a stream is open:

    away       no worker has it open: nothing is asked of it
    opening    Open was sent: the answer says from where on records are wanted
    reporting  records are pulled from the worker and sent on, at most 8 batches unanswered
    refused    the control plane takes nothing of this incarnation

Records are bytes that nobody looks into. What is sent and not answered is bounded in batches per spool and in
bytes over all; a pull that would exceed it waits for a Cursor. After a Cursor that goes back, and after a new
stream, records are pulled again from there: the spool keeps them until a Cursor passes them. Questions go to the
spool's worker as they come, and its statements back; those that a stream does not live to see are lost. The same
goes for invitations to take mail over, and for what follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeAlias

from dataplane.link import LedgerHandover, LedgerQuestion, LedgerRecords, LedgerStatement, LedgerTake, SpoolState
from postroad.node.v1.ledger_service_pb2 import (
    LedgerBatch,
    LedgerCursor,
    LedgerOpen,
    LedgerRefusal,
    ReportLedgerRequest,
    ReportLedgerResponse,
)
from postroad.node.v1.ledger_service_pb2 import LedgerStatement as StatementMessage
from postroad.node.v1.ledger_service_pb2 import LedgerTake as TakeMessage
from postroad.node.v1.spool_pb2 import FormerOpening

MAX_UNANSWERED = 8
MAX_UNANSWERED_BYTES = 32 * 1024 * 1024
_HALTING = (LedgerRefusal.REASON_WENT_BACKWARDS, LedgerRefusal.REASON_NOT_OWNED)


class SendLedger(NamedTuple):
    """Send this to the control plane."""

    request: ReportLedgerRequest


class Pull(NamedTuple):
    """Ask the worker for the records behind `after`."""

    spool: str
    after: int


class Pause(NamedTuple):
    """Tell the worker that nobody takes records of this spool now."""

    spool: str


class Stored(NamedTuple):
    """Tell the worker that records up to `cursor` are stored."""

    spool: str
    cursor: int


class Refused(NamedTuple):
    """The control plane takes nothing of this spool; `halts` when nothing may be sent from it either, since it came
    back older than it was or is another node's.
    """

    spool: str
    halts: bool
    detail: str


class Ask(NamedTuple):
    """Ask the worker which recipients wait."""

    question: LedgerQuestion


class Invite(NamedTuple):
    """Tell the worker that mail waits which the spool may take over."""

    spool: str


class Deliver(NamedTuple):
    """Give the worker a part of what its spool takes over."""

    spool: str
    handover: LedgerHandover


LedgerAction: TypeAlias = SendLedger | Pull | Pause | Stored | Refused | Ask | Invite | Deliver


class _Phase(Enum):
    AWAY = 1
    OPENING = 2
    REPORTING = 3
    REFUSED = 4


@dataclass(slots=True)
class _SpoolReport:
    state: SpoolState
    phase: _Phase = _Phase.AWAY
    present: bool = True
    cursor: int = 0
    sent_up_to: int = 0
    pulling: bool = False
    # The control plane took it while the answer to Open was on its way: a refusal is older than that.
    taken_meanwhile: bool = False
    # Last number and size of each batch that is not answered.
    unanswered: deque[tuple[int, int]] = field(default_factory=deque)


def former_openings(state: SpoolState) -> list[FormerOpening]:
    """What tells the spool from a copy of its disk, as the control plane hears of it."""
    return [FormerOpening(id=bytes.fromhex(text), last_record=last) for text, last in state.former_openings]


class LedgerMachine:
    """See the module."""

    def __init__(self) -> None:
        self._spools: dict[str, _SpoolReport] = {}
        self._connected = False

    @property
    def unanswered_bytes(self) -> int:
        """Bytes of records sent and not answered."""
        return sum(size for report in self._spools.values() for _, size in report.unanswered)

    def connected(self) -> list[LedgerAction]:
        """A stream was opened."""
        self._connected = True
        return [action for report in self._spools.values() if report.present for action in self._open(report)]

    def disconnected(self) -> list[LedgerAction]:
        """The stream ended: what was not answered is pulled again on the next one."""
        self._connected = False
        for report in self._spools.values():
            self._rewind(report)
            # Refused is not the spool's state but this stream's verdict: the next one is asked again.
            report.phase = _Phase.AWAY
        return [Pause(spool) for spool, report in self._spools.items() if report.present]

    def spool_opened(self, state: SpoolState) -> list[LedgerAction]:
        """A worker has this spool open."""
        known = self._spools.get(state.spool)
        report = _SpoolReport(state)
        self._spools[state.spool] = report
        if known is not None and known.phase is _Phase.REFUSED and known.state.incarnation == state.incarnation:
            report.phase = _Phase.REFUSED
            return []
        return self._open(report) if self._connected else []

    def spool_accepted(self, spool: str) -> list[LedgerAction]:
        """The control plane takes the spool: what it refused of it before is asked for again."""
        report = self._spools.get(spool)
        if report is None or not report.present or not self._connected:
            return []
        report.taken_meanwhile = report.phase is _Phase.OPENING
        return self._open(report) if report.phase is _Phase.REFUSED else []

    def spool_gone(self, spool: str) -> None:
        """Its worker is gone; what was sent of it is still answered."""
        if (report := self._spools.get(spool)) is not None:
            report.present = False
            report.pulling = False

    def records(self, message: LedgerRecords) -> list[LedgerAction]:
        """A worker answered a pull. What does not follow the last batch is left over from before: ignored."""
        report = self._spools.get(message.spool)
        if (
            report is None
            or report.phase is not _Phase.REPORTING
            or message.incarnation != report.state.incarnation
            or message.first != report.sent_up_to + 1
            or not message.records
        ):
            return []
        report.pulling = False
        report.sent_up_to += len(message.records)
        report.unanswered.append((report.sent_up_to, sum(map(len, message.records))))
        batch = LedgerBatch(
            spool=message.spool,
            incarnation=message.incarnation,
            first_record=message.first,
            records=message.records,
        )
        return [SendLedger(ReportLedgerRequest(batch=batch)), *self._pull_more([report])]

    def statement(self, message: LedgerStatement) -> list[LedgerAction]:
        """A worker answered a question."""
        return [SendLedger(ReportLedgerRequest(statement=StatementMessage.FromString(message.statement)))]

    def take(self, message: LedgerTake) -> list[LedgerAction]:
        """A worker's spool takes mail over."""
        return [SendLedger(ReportLedgerRequest(take=TakeMessage(**message._asdict())))]

    def receive(self, response: ReportLedgerResponse) -> list[LedgerAction]:
        """A message of the control plane."""
        match response.WhichOneof("message"):
            case "cursor":
                return self._cursor(response.cursor)
            case "refusal":
                return self._refusal(response.refusal)
            case "question":
                one = response.question
                asked = LedgerQuestion(one.spool, one.number, one.as_of_record, one.account, tuple(one.buckets))
                return [Ask(asked)]
            case "invitation":
                return [Invite(response.invitation.spool)]
            case "handover":
                part = response.handover
                return [Deliver(part.spool, LedgerHandover(part.SerializeToString()))]
            case _:
                return []

    def _open(self, report: _SpoolReport) -> list[LedgerAction]:
        self._rewind(report)
        report.taken_meanwhile = False
        report.phase = _Phase.OPENING
        state = report.state
        opened = LedgerOpen(
            spool=state.spool,
            incarnation=state.incarnation,
            acknowledged=max(state.acknowledged, report.cursor),
            oldest_record=state.oldest_record,
            last_record=max(state.last_record, report.sent_up_to),
            opening_id=bytes.fromhex(state.opening),
            former_openings=former_openings(state),
        )
        return [SendLedger(ReportLedgerRequest(open=opened))]

    def _cursor(self, message: LedgerCursor) -> list[LedgerAction]:
        report = self._spools.get(message.spool)
        if report is None or report.phase not in {_Phase.OPENING, _Phase.REPORTING}:
            return []
        if report.phase is _Phase.OPENING or message.cursor < report.cursor:
            self._rewind(report)
            report.phase = _Phase.REPORTING
            report.taken_meanwhile = False
            report.sent_up_to = message.cursor
        report.cursor = message.cursor
        while report.unanswered and report.unanswered[0][0] <= message.cursor:
            report.unanswered.popleft()
        # Another spool may have waited for the bytes that are free now.
        return [Stored(message.spool, message.cursor), *self._pull_more(self._spools.values())]

    def _refusal(self, refusal: LedgerRefusal) -> list[LedgerAction]:
        report = self._spools.get(refusal.spool)
        if report is None:
            return []
        if refusal.reason == LedgerRefusal.REASON_GAP or report.taken_meanwhile:
            return self._open(report) if report.present else []
        self._rewind(report)
        report.phase = _Phase.REFUSED
        return [Pause(refusal.spool), Refused(refusal.spool, refusal.reason in _HALTING, refusal.detail)]

    def _rewind(self, report: _SpoolReport) -> None:
        report.unanswered.clear()
        report.pulling = False

    def _pull_more(self, reports: Iterable[_SpoolReport]) -> list[LedgerAction]:
        pulls: list[LedgerAction] = []
        free = MAX_UNANSWERED_BYTES - self.unanswered_bytes
        for report in reports:
            if (
                report.phase is _Phase.REPORTING
                and report.present
                and not report.pulling
                and len(report.unanswered) < MAX_UNANSWERED
                and free > 0
            ):
                report.pulling = True
                pulls.append(Pull(report.state.spool, report.sent_up_to))
        return pulls
