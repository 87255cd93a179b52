"""Carries LedgerService: what spools report goes to the ingest service, cursors go back.

Contract. Requests are answered in order. While one transaction runs, what comes next gathers, and batches that follow
each other are stored together. Beside that the node is asked who waits in its spools (`services.auditing`), told of
spools whose records a PostgreSQL that failed over has lost, and its spools are given mail that other nodes gave up
(`services.handovers`). A stream ends UNAVAILABLE while PostgreSQL is away (the node comes back and sends what the
cursor does not cover), UNAUTHENTICATED when the node was revoked meanwhile. Another node's spool is refused; the stream
goes on for the others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from controlplane.adapters.grpc.node_config import Report
from controlplane.adapters.grpc.stream_codec import BadMessageError, openings_of, uuid_text
from controlplane.adapters.grpc.transport import identity_of
from controlplane.adapters.pki import NodeIdentity, PkiError
from controlplane.domain.errors import UnavailableError
from controlplane.ports_fleet import Cursor, RawBatch, Refusal, SpoolOpening
from controlplane.services.auditing import Auditor, Comparer
from controlplane.services.handovers import HandoverPart, Handovers, Receiver, Take
from controlplane.services.ingest import IngestService, Told
from controlplane.stream.fleet import FleetService, NotAdmittedError
from dataplane.core.waiting import Tally, Waiting, WaitingQuestion, WaitingStatement
from postroad.node.v1 import ledger_service_pb2 as pb
from postroad.node.v1.ledger_service_pb2_grpc import LedgerServiceServicer

Context = grpc.aio.ServicerContext[pb.ReportLedgerRequest, pb.ReportLedgerResponse]

_ACCOUNTS = "accounts/"
# As many batches as a node may have unanswered.
_GATHERED = 8
# A spool keeps what was stored for ten minutes.
LOOK_BACK_S = 20.0


class NodeLedgerServicer(LedgerServiceServicer):
    """LedgerService; see the module."""

    def __init__(
        self,
        ingest: IngestService,
        auditor: Auditor,
        handovers: Handovers,
        fleet: FleetService,
        report: Report,
        look_back_s: float = LOOK_BACK_S,
    ) -> None:
        self._look_back_s = look_back_s
        self._ingest = ingest
        self._auditor = auditor
        self._handovers = handovers
        self._fleet = fleet
        self._report = report
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Let every stream end after what it has in hand."""
        self._draining.set()

    async def ReportLedger(  # type: ignore[override] # the generated base is for both kinds of server
        self, _: AsyncIterator[pb.ReportLedgerRequest], context: Context
    ) -> None:
        """One stream, from its opening to its end."""
        try:
            await self._serve(identity_of(context), context)
        except PkiError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except NotAdmittedError:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the node's certificate is refused")
        except BadMessageError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except UnavailableError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.text)

    async def _serve(self, identity: NodeIdentity, context: Context) -> None:
        gathered: asyncio.Queue[pb.ReportLedgerRequest | None] = asyncio.Queue(_GATHERED)
        reader = asyncio.create_task(_read(context, gathered))
        draining = asyncio.create_task(self._end_when_draining(gathered))
        # One write at a time: answers to batches and questions do not know of each other.
        writing = asyncio.Lock()

        async def write(response: pb.ReportLedgerResponse) -> None:
            async with writing:
                await context.write(response)

        comparer = self._auditor.attend(identity.node_id, lambda one: write(_question(one)))
        comparing = asyncio.create_task(comparer.run())
        comparing.add_done_callback(self._comparer_ended)
        receiver = self._handovers.attend(
            identity.node_id, lambda spool: write(_invitation(spool)), lambda part: write(_handover(part))
        )
        giving = asyncio.create_task(receiver.run())
        giving.add_done_callback(self._giver_ended)
        told = Told()

        async def answer(answers: Sequence[Cursor | Refusal]) -> None:
            for one in answers:
                told.note(one)
                comparer.reports(one.spool, taken=isinstance(one, Cursor))
                receiver.reports(one.spool, taken=isinstance(one, Cursor))
                await write(self._response(identity.node_id, one))

        looking = asyncio.create_task(self._look_back(told, answer))
        try:
            async for requests in _groups(gathered):
                await self._fleet.admitted(identity.node_id, identity.serial)
                await answer(await self._answers(identity.node_id, requests, comparer, receiver))
        finally:
            self._handovers.leave(receiver)
            for task in (reader, draining, comparing, looking, giving):
                task.cancel()
            await asyncio.gather(reader, draining, comparing, looking, giving, return_exceptions=True)

    async def _look_back(self, told: Told, answer: Callable[[Sequence[Cursor | Refusal]], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self._look_back_s)
            with contextlib.suppress(UnavailableError):
                await answer(await self._ingest.lost(told))

    def _comparer_ended(self, task: asyncio.Task[None]) -> None:
        # Mail goes on whatever becomes of the books; their age tells.
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report("audit.failed", spool="", error=f"{type(error).__name__}: {error}")

    def _giver_ended(self, task: asyncio.Task[None]) -> None:
        # Records go on being stored; the node's next stream is given what waits.
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report("handover.failed", error=f"{type(error).__name__}: {error}")

    async def _answers(
        self, node_id: str, requests: list[pb.ReportLedgerRequest], comparer: Comparer, receiver: Receiver
    ) -> list[Cursor | Refusal]:
        answers: list[Cursor | Refusal] = []
        batches: list[RawBatch] = []
        for request in requests:
            match request.WhichOneof("message"):
                case "batch":
                    batches.append(_batch(request.batch))
                case "open":
                    answers += await self._ingest.store(node_id, batches)
                    batches = []
                    answers.append(await self._ingest.open_spool(node_id, _opening(request.open)))
                case "statement":
                    comparer.answered(_statement(request.statement))
                case "take":
                    take = request.take
                    receiver.asked(Take(uuid_text(take.spool), take.number, take.after_record))
                case _:
                    raise BadMessageError("a message says nothing")
        return answers + await self._ingest.store(node_id, batches)

    def _response(self, node_id: str, answer: Cursor | Refusal) -> pb.ReportLedgerResponse:
        if isinstance(answer, Cursor):
            return pb.ReportLedgerResponse(cursor=pb.LedgerCursor(spool=answer.spool, cursor=answer.cursor))
        self._report("ledger.refused", node=node_id, spool=answer.spool, reason=answer.reason.name)
        reason = pb.LedgerRefusal.Reason.ValueType(answer.reason)
        return pb.ReportLedgerResponse(
            refusal=pb.LedgerRefusal(spool=answer.spool, reason=reason, detail=answer.detail)
        )

    async def _end_when_draining(self, gathered: asyncio.Queue[Any]) -> None:
        await self._draining.wait()
        await gathered.put(None)


async def _read(context: Context, gathered: asyncio.Queue[pb.ReportLedgerRequest | None]) -> None:
    try:
        request: Any = await context.read()
        while request is not grpc.aio.EOF:
            await gathered.put(request)
            request = await context.read()
    except Exception:
        # Who waits for more must not wait for ever.
        await gathered.put(None)
        raise
    await gathered.put(None)


async def _groups(
    gathered: asyncio.Queue[pb.ReportLedgerRequest | None],
) -> AsyncIterator[list[pb.ReportLedgerRequest]]:
    """What came while the last group was in work, at least one; ends with the stream."""
    ended = False
    while not ended:
        requests = []
        request = await gathered.get()
        while request is not None:
            requests.append(request)
            if gathered.empty():
                break
            request = gathered.get_nowait()
        ended = request is None
        if requests:
            yield requests


def _batch(message: pb.LedgerBatch) -> RawBatch:
    if not message.records or message.first_record < 1:
        raise BadMessageError("a batch holds records, the first of which has a number above 0")
    return RawBatch(uuid_text(message.spool), message.incarnation, message.first_record, message.records)


def _question(question: WaitingQuestion) -> pb.ReportLedgerResponse:
    message = pb.LedgerQuestion(
        spool=question.spool,
        number=question.number,
        as_of_record=question.as_of_record,
        account=f"{_ACCOUNTS}{question.account}" if question.account else "",
        buckets=question.buckets,
    )
    return pb.ReportLedgerResponse(question=message)


def _invitation(spool: str) -> pb.ReportLedgerResponse:
    return pb.ReportLedgerResponse(invitation=pb.LedgerInvitation(spool=spool))


def _handover(part: HandoverPart) -> pb.ReportLedgerResponse:
    message = pb.LedgerHandover(
        spool=part.take.spool, number=part.take.number, message_id=part.message_id, content=part.content, last=part.last
    )
    if part.message_id:
        message.account = f"{_ACCOUNTS}{part.account}"
    if part.what is not None:
        message.handed_over.ParseFromString(part.what)
    return pb.ReportLedgerResponse(handover=message)


def _statement(message: pb.LedgerStatement) -> WaitingStatement:
    return WaitingStatement(
        message.spool,
        message.number,
        message.error,
        tuple((_account(one.account), one.bucket, _tally(one)) for one in message.totals),
        tuple((_account(one.account), Waiting(one.message_id, one.index)) for one in message.recipients),
        tuple((_account(one.account), Waiting(one.message_id, one.index)) for one in message.without_deadline),
        tuple(message.quarantined),
    )


def _tally(message: pb.WaitingTotal) -> Tally:
    return Tally(message.count, int.from_bytes(message.digest))


def _account(name: str) -> str:
    return name.removeprefix(_ACCOUNTS)


def _opening(message: pb.LedgerOpen) -> SpoolOpening:
    if min(message.incarnation, message.acknowledged, message.oldest_record, message.last_record) < 0:
        raise BadMessageError("numbers of records begin at 0")
    return SpoolOpening(
        uuid_text(message.spool),
        message.incarnation,
        message.acknowledged,
        message.oldest_record,
        message.last_record,
        openings_of(message),
    )
