"""The worker's end of the replicated queue: what is stored where before it is answered, and what a lost answer does."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dataplane.adapters import replicated_queue
from dataplane.adapters.ledger_codec import encode_record
from dataplane.adapters.replicated_queue import REST_S, STRANGE_S, LinkedQueue
from dataplane.adapters.spool_ram import RamSpool
from dataplane.adapters.spool_sqlite.codec import decode_envelope, encode_envelope
from dataplane.core.config import Account
from dataplane.core.envelope import Envelope, RecipientRow, make_queue_key, pinned_provider, queue_priority
from dataplane.core.idempotency import SubmissionKey
from dataplane.core.ids import MessageId, new_message_id
from dataplane.core.queue import State
from dataplane.link import Message, QueueAnswer, QueueCall, QueueMethod
from dataplane.ports import RecipientChange, RepeatedSubmissionError, Settlement, SpoolError
from postroad.node.v1 import queue_service_pb2 as pb
from postroad.node.v1.ledger_pb2 import LedgerRecord
from support.ingress import Clock, Config, Log

ACCOUNT, UID = "accounts/demo", "uid-1"
UNAVAILABLE, INVALID_ARGUMENT, ABORTED = 14, 3, 10


class Peer:
    """Agent and control plane: answers calls as a test says."""

    def __init__(self) -> None:
        self.queue: LinkedQueue
        self.calls: list[tuple[QueueMethod, Any]] = []
        self.unanswered: list[QueueCall] = []
        self.answers: dict[QueueMethod, Callable[[Any], Any]] = {
            QueueMethod.RENEW_LEASE: lambda _: lease(7),
            QueueMethod.STORE_MESSAGES: lambda _: pb.StoreMessagesResponse(),
            QueueMethod.STORE_CONTENT: lambda _: pb.StoreContentResponse(),
            QueueMethod.CLAIM_MESSAGES: lambda _: pb.ClaimMessagesResponse(),
            QueueMethod.CONFIRM_CLAIM: lambda request: pb.ConfirmClaimResponse(message_ids=request.message_ids),
        }

    def send(self, message: Message) -> bool:
        assert isinstance(message, QueueCall)
        request = _REQUESTS[message.method].FromString(message.payload)
        self.calls.append((message.method, request))
        answer = self.answers[message.method](request)
        if answer is None:
            self.unanswered.append(message)
        else:
            status, payload = (answer, b"no") if isinstance(answer, int) else (0, answer.SerializeToString())
            loop = asyncio.get_running_loop()
            loop.call_soon(self.queue.answered, QueueAnswer(message.number, status, payload))
        return True

    def asked(self, method: QueueMethod) -> list[Any]:
        return [request for called, request in self.calls if called is method]


_REQUESTS: dict[QueueMethod, Any] = {
    QueueMethod.RENEW_LEASE: pb.RenewLeaseRequest,
    QueueMethod.STORE_MESSAGES: pb.StoreMessagesRequest,
    QueueMethod.STORE_CONTENT: pb.StoreContentRequest,
    QueueMethod.CLAIM_MESSAGES: pb.ClaimMessagesRequest,
    QueueMethod.FETCH_CONTENT: pb.FetchContentRequest,
    QueueMethod.CONFIRM_CLAIM: pb.ConfirmClaimRequest,
}


def lease(epoch: int) -> pb.RenewLeaseResponse:
    response = pb.RenewLeaseResponse(epoch=epoch)
    response.duration.FromSeconds(15)
    return response


class Engine:
    def __init__(self) -> None:
        self.delivered: asyncio.Queue[tuple[Envelope, bytes, Sequence[RecipientRow]]] = asyncio.Queue()
        self.ended = 0
        self.enough_of: set[str] = set()
        self.given_back: set[str] = set()

    def left_out(self) -> set[str]:
        return self.enough_of

    def take_given_back(self) -> set[str]:
        given_back, self.given_back = self.given_back, set()
        return given_back

    def deliver(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> None:
        self.delivered.put_nowait((envelope, content, recipients))

    def window_open(self) -> bool:
        return True

    def lease_ended(self) -> None:
        self.ended += 1


class Bench:
    def __init__(self, spool: RamSpool) -> None:
        self.now_s = 1_000.0
        self.numbers = itertools.count()
        self.spool = spool
        self.peer, self.engine, self.config = Peer(), Engine(), Config()
        self.config.set_account(Account(ACCOUNT, UID, revision=1))
        self.queue = self.peer.queue = LinkedQueue(
            spool, self.config, encode_record, lambda: self.now_s, Log(), claim_again_s=0.0
        )
        self.queue.attach(self.engine, self.peer.send)
        self.tasks: list[asyncio.Task[None]] = []

    async def live(self) -> Bench:
        """With a lease."""
        self.tasks.append(asyncio.create_task(self.queue.keep_lease()))
        await settled()
        assert self.queue.epoch == 7
        return self

    def envelope(self, size_bytes: int = 7) -> Envelope:
        message_id = new_message_id(1_700_000_000_000, bytes(9) + bytes([next(self.numbers)]))
        return Envelope(
            *(message_id, ACCOUNT, UID, "", "a@example.com", size_bytes, 1_700_000_000_000),
            *("s", "127.0.0.1", "h", "", "<i>", "s"),
            smtputf8=False,
            body_8bit=False,
            epoch=self.queue.epoch,
        )


async def settled() -> None:
    """Everything that can happen without more answers has happened."""
    for _ in range(50):
        await asyncio.sleep(0)


def row(state: State = State.SENDING, attempt: int = 1) -> RecipientRow:
    return RecipientRow(0, "b@example.net", state, attempt, 0, 0, f"{ACCOUNT}\thop")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench(RamSpool(Clock()))
    yield await made.live()
    for task in made.tasks:
        task.cancel()


async def test_what_is_sent_at_once_is_in_postgresql_and_then_in_the_spool(bench: Bench) -> None:
    envelope = bench.envelope()
    await bench.queue.accept(envelope, b"hello\r\n", [row()])
    (request,) = bench.peer.asked(QueueMethod.STORE_MESSAGES)
    assert (request.epoch, request.messages[0].content, request.messages[0].sending) == (7, b"hello\r\n", True)
    stored = await bench.spool.load(envelope.message_id)
    assert stored is not None
    assert (stored.envelope.epoch, stored.recipients[0].state) == (7, State.SENDING)


async def test_what_waits_is_in_postgresql_alone(bench: Bench) -> None:
    envelope = bench.envelope()
    await bench.queue.accept(envelope, b"hello\r\n", [row(State.QUEUED, 0)])
    assert not bench.peer.asked(QueueMethod.STORE_MESSAGES)[0].messages[0].sending
    assert await bench.spool.load(envelope.message_id) is None


async def test_what_is_held_until_its_time_waits_in_postgresql_and_is_asked_for_by_nobody_before(bench: Bench) -> None:
    bench.tasks.append(asyncio.create_task(bench.queue.claim_mail()))
    await settled()
    bench.peer.calls.clear()
    envelope = replace(bench.envelope(), send_time_ms=1_700_000_060_000, priority=-4)
    await bench.queue.accept(envelope, b"hello\r\n", [row(State.SCHEDULED, 0)])
    await settled()
    (request,) = bench.peer.asked(QueueMethod.STORE_MESSAGES)
    record = LedgerRecord.FromString(request.messages[0].record)
    assert (record.accepted.send_time_ms, record.accepted.priority) == (1_700_000_060_000, -4)
    assert not request.messages[0].sending
    assert await bench.spool.load(envelope.message_id) is None
    assert bench.peer.asked(QueueMethod.CLAIM_MESSAGES) == []


async def test_many_messages_share_a_store(bench: Bench) -> None:
    bench.peer.answers[QueueMethod.STORE_MESSAGES] = lambda _: None
    futures = [bench.queue.accept(bench.envelope(), b"x", [row(State.QUEUED, 0)]) for _ in range(50)]
    await settled()
    assert [len(request.messages) for request in bench.peer.asked(QueueMethod.STORE_MESSAGES)] == [50]
    bench.queue.agent_lost()
    errors = await asyncio.gather(*futures, return_exceptions=True)
    assert all(isinstance(error, SpoolError) for error in errors)


@pytest.mark.parametrize(("status", "given_up"), [(UNAVAILABLE, 1), (ABORTED, 0), (INVALID_ARGUMENT, 0)])
async def test_a_store_that_failed_is_an_error_and_one_without_answer_ends_the_lease(
    bench: Bench, status: int, given_up: int
) -> None:
    envelope = bench.envelope()
    bench.peer.answers[QueueMethod.STORE_MESSAGES] = lambda _: status
    bench.peer.answers[QueueMethod.RENEW_LEASE] = lambda request: lease(request.epoch or 8)
    with pytest.raises(SpoolError):
        await bench.queue.accept(envelope, b"hello\r\n", [row()])
    assert await bench.spool.load(envelope.message_id) is None
    assert bench.queue.holds(7) is not bool(given_up)
    assert bench.engine.ended == given_up
    if given_up:
        await settled()
        assert bench.queue.epoch == 8


async def test_what_the_spool_has_no_room_for_is_stored_all_the_same_and_not_refused_as_full() -> None:
    bench = await Bench(RamSpool(Clock(), capacity_bytes=100)).live()
    try:
        with pytest.raises(SpoolError) as refusal:
            await bench.queue.accept(bench.envelope(1_000), bytes(1_000), [row()])
    finally:
        for task in bench.tasks:
            task.cancel()
    # A client that is told so asks again, and knows that it may be there.
    assert type(refusal.value) is SpoolError
    assert (bench.queue.counters.stored, bench.queue.counters.refused) == (1, 1), "a window W1, which is counted"
    assert bench.engine.ended == 1


async def test_a_lease_that_was_given_up_does_not_come_back_with_a_late_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(RamSpool(Clock()))
    answers = iter([lease(7), None, lease(8)])
    monkeypatch.setattr(replicated_queue, "RENEW_S", 0.0)
    bench.peer.answers[QueueMethod.RENEW_LEASE] = lambda _: next(answers, None)
    bench.peer.answers[QueueMethod.STORE_MESSAGES] = lambda _: UNAVAILABLE
    await bench.live()
    (renewal,) = bench.peer.unanswered
    with pytest.raises(SpoolError):
        await bench.queue.accept(bench.envelope(), b"hello\r\n", [row()])
    bench.queue.answered(QueueAnswer(renewal.number, 0, lease(7).SerializeToString()))
    await settled()
    asked = [request.epoch for request in bench.peer.asked(QueueMethod.RENEW_LEASE)]
    assert asked[:3] == [0, 7, 0]
    assert bench.queue.epoch == 8
    for task in bench.tasks:
        task.cancel()


async def test_one_bad_message_keeps_no_other_from_being_stored(bench: Bench) -> None:
    def answer(request: pb.StoreMessagesRequest) -> Any:
        bad = any(message.content == b"bad" for message in request.messages)
        return INVALID_ARGUMENT if bad else pb.StoreMessagesResponse()

    bench.peer.answers[QueueMethod.STORE_MESSAGES] = answer
    contents = [b"one", b"bad", b"two"]
    futures = [bench.queue.accept(bench.envelope(), content, [row(State.QUEUED, 0)]) for content in contents]
    errors = await asyncio.gather(*futures, return_exceptions=True)
    assert [error is None for error in errors] == [True, False, True]


@pytest.mark.parametrize("state", [State.SENDING, State.QUEUED])
async def test_a_message_whose_key_another_one_has_is_not_ours(bench: Bench, state: State) -> None:
    def answer(request: pb.StoreMessagesRequest) -> Any:
        record = LedgerRecord.FromString(request.messages[0].record)
        assert (record.accepted.submission_key_hash, record.accepted.submission_content_hash) == (b"k" * 32, b"c" * 32)
        repeated = pb.RepeatedMessage(message_id=record.message_id, first_message_id=b"1" * 16, same_content=True)
        return pb.StoreMessagesResponse(repeated_messages=[repeated])

    bench.peer.answers[QueueMethod.STORE_MESSAGES] = answer
    envelope = replace(bench.envelope(), submission_key=SubmissionKey(b"k" * 32, b"c" * 32))
    with pytest.raises(RepeatedSubmissionError) as refused:
        await bench.queue.accept(envelope, b"hello\r\n", [row(state)])
    assert (refused.value.message_id, refused.value.is_same) == (b"1" * 16, True)
    assert await bench.spool.load(envelope.message_id) is None
    assert (bench.queue.counters.stored, bench.queue.counters.refused, bench.engine.ended) == (0, 0, 0)


async def test_a_lease_that_is_over_accepts_nothing_and_what_it_holds_is_not_sent(bench: Bench) -> None:
    envelope = bench.envelope()
    bench.now_s += 14.5
    assert bench.queue.epoch == 0
    assert not bench.queue.holds(envelope.epoch)
    with pytest.raises(SpoolError):
        await bench.queue.accept(envelope, b"hello\r\n", [row()])
    assert bench.peer.asked(QueueMethod.STORE_MESSAGES) == []


async def test_a_large_content_goes_in_pieces_before_its_message(bench: Bench) -> None:
    envelope = bench.envelope(1_000_000)
    incoming = bench.queue.receive(envelope.message_id)
    for _ in range(10):
        await incoming.write(b"x" * 100_000)
    await incoming.accept(envelope, [row(State.QUEUED, 0)])
    chunks = bench.peer.asked(QueueMethod.STORE_CONTENT)
    assert [chunk.chunk for chunk in chunks] == [0, 1, 2, 3]
    assert sum(len(chunk.data) for chunk in chunks) == 1_000_000
    (request,) = bench.peer.asked(QueueMethod.STORE_MESSAGES)
    assert request.messages[0].chunks == 4


def claimed(bench: Bench, uid: str = UID) -> pb.ClaimedMessage:
    envelope = bench.envelope()
    encoded = encode_envelope(envelope, [row()]).replace(UID.encode(), uid.encode())
    recipient = pb.ClaimedRecipient(index=0, attempt=3, due_ms=5)
    return pb.ClaimedMessage(
        message_id=envelope.message_id, envelope=encoded, recipients=[recipient], has_content=True, content=b"hello\r\n"
    )


@pytest.mark.parametrize("content", [b"", b"hello", b"hello\r\nmore\r\n"])
async def test_a_content_that_is_not_whole_is_not_sent(bench: Bench, content: bytes) -> None:
    broken, whole = claimed(bench), claimed(bench)
    broken.content = content
    messages = iter([[broken, whole]])
    bench.peer.answers[QueueMethod.CLAIM_MESSAGES] = lambda _: pb.ClaimMessagesResponse(messages=next(messages, []))
    bench.tasks.append(asyncio.create_task(bench.queue.claim_mail()))
    async with asyncio.timeout(10):
        envelope, _, _ = await bench.engine.delivered.get()
    assert envelope.message_id == whole.message_id
    await settled()
    assert bench.engine.delivered.empty()
    assert await bench.spool.load(MessageId(broken.message_id)) is None


async def test_what_is_claimed_is_in_the_spool_and_confirmed_before_it_is_sent(bench: Bench) -> None:
    message, strange = claimed(bench), claimed(bench, "uid-2")
    answers = iter([pb.ClaimMessagesResponse(messages=[message, strange])])
    bench.peer.answers[QueueMethod.CLAIM_MESSAGES] = lambda _: next(answers, pb.ClaimMessagesResponse())
    held: list[Any] = []

    def confirm(request: pb.ConfirmClaimRequest) -> Any:
        held.append((list(request.message_ids), set(bench.spool._messages), bench.engine.delivered.qsize()))
        # The first answer is lost.
        return UNAVAILABLE if len(held) == 1 else pb.ConfirmClaimResponse(message_ids=request.message_ids)

    bench.peer.answers[QueueMethod.CONFIRM_CLAIM] = confirm
    bench.tasks.append(asyncio.create_task(bench.queue.claim_mail()))
    async with asyncio.timeout(20):
        envelope, content, rows = await bench.engine.delivered.get()
    assert (envelope.message_id, envelope.epoch, content) == (message.message_id, 7, b"hello\r\n")
    assert [(one.state, one.attempt, one.address) for one in rows] == [(State.SENDING, 3, "b@example.net")]
    # Mail of an account that is unknown here is left alone.
    assert [asked[0] for asked in held] == [[message.message_id]] * 2
    assert all(message.message_id in asked[1] and asked[2] == 0 for asked in held)


async def test_one_claim_follows_the_other_until_nothing_comes(bench: Bench) -> None:
    answers = iter([pb.ClaimMessagesResponse(messages=[claimed(bench)]) for _ in range(5)])
    bench.peer.answers[QueueMethod.CLAIM_MESSAGES] = lambda _: next(answers, pb.ClaimMessagesResponse())
    bench.tasks.append(asyncio.create_task(bench.queue.claim_mail()))
    for _ in range(4):
        await settled()
    assert bench.engine.delivered.qsize() == 5
    assert len(bench.peer.asked(QueueMethod.CLAIM_MESSAGES)) == 6


async def test_of_accounts_whose_mail_cannot_be_sent_none_is_claimed_for_a_while(bench: Bench) -> None:
    strange = claimed(bench, "uid-2")
    answers = iter([pb.ClaimMessagesResponse(messages=[strange])])
    bench.peer.answers[QueueMethod.CLAIM_MESSAGES] = lambda _: next(answers, pb.ClaimMessagesResponse())
    bench.engine.enough_of = {"accounts/much"}
    bench.engine.given_back = {"accounts/dead"}
    bench.tasks.append(asyncio.create_task(bench.queue.claim_mail()))
    await settled()
    bench.now_s += REST_S
    await bench.queue.accept(bench.envelope(), b"x", [row(State.QUEUED, 0)])
    await settled()
    bench.now_s += STRANGE_S
    bench.engine.enough_of = set()
    bench.queue._renewed(7, 15.0, bench.now_s)
    await bench.queue.accept(bench.envelope(), b"x", [row(State.QUEUED, 0)])
    await settled()
    asked = [list(request.left_out_accounts) for request in bench.peer.asked(QueueMethod.CLAIM_MESSAGES)]
    first = ["accounts/dead", "accounts/much"]
    assert asked == [first, sorted([ACCOUNT, *first]), [ACCOUNT, "accounts/much"], []]


async def test_what_recipients_wait_for_is_told_and_what_a_command_bound_them_to_is_heard(bench: Bench) -> None:
    rows = [row(State.QUEUED, 0), row(State.QUEUED, 0)._replace(index=1, queue_key=make_queue_key(ACCOUNT, "other"))]
    await bench.queue.accept(bench.envelope(), b"hello\r\n", rows)
    (request,) = bench.peer.asked(QueueMethod.STORE_MESSAGES)
    assert list(request.messages[0].next_hops) == ["hop", "other"]
    message = claimed(bench)
    message.recipients[0].provider = "other"
    answers = iter([pb.ClaimMessagesResponse(messages=[message])])
    bench.peer.answers[QueueMethod.CLAIM_MESSAGES] = lambda _: next(answers, pb.ClaimMessagesResponse())
    bench.tasks.append(asyncio.create_task(bench.queue.claim_mail()))
    async with asyncio.timeout(20):
        _, _, taken = await bench.engine.delivered.get()
    assert [pinned_provider(one.queue_key) for one in taken] == ["other"]


async def test_a_claimed_message_has_the_priority_that_was_asked_for(bench: Bench) -> None:
    message = claimed(bench)
    envelope, _ = decode_envelope(MessageId(message.message_id), message.envelope)
    message.envelope = encode_envelope(replace(envelope, priority=7), [row()])
    answers = iter([pb.ClaimMessagesResponse(messages=[message])])
    bench.peer.answers[QueueMethod.CLAIM_MESSAGES] = lambda _: next(answers, pb.ClaimMessagesResponse())
    bench.tasks.append(asyncio.create_task(bench.queue.claim_mail()))
    async with asyncio.timeout(20):
        taken, _, rows = await bench.engine.delivered.get()
    assert (taken.priority, [(one.priority, queue_priority(one.queue_key)) for one in rows]) == (7, [(7, 7)])


async def test_a_message_with_a_key_comes_back_to_the_spool_that_has_the_key(bench: Bench) -> None:
    """It was sent at once from here, put off, and is claimed: that is no repetition of its submission."""
    first = replace(bench.envelope(), submission_key=SubmissionKey(b"k" * 32, b"c" * 32))
    await bench.queue.accept(first, b"hello\r\n", [row()])
    change = RecipientChange(0, 1, State.CANCELLED, 1, 0, row().queue_key)
    assert await bench.spool.settle(Settlement(first.message_id, [change], None, reported=False)) == 1
    recipient = pb.ClaimedRecipient(index=0, attempt=2, due_ms=5)
    message = pb.ClaimedMessage(
        message_id=first.message_id,
        envelope=encode_envelope(first, [row()]),
        recipients=[recipient],
        has_content=True,
        content=b"hello\r\n",
    )
    answers = iter([pb.ClaimMessagesResponse(messages=[message])])
    bench.peer.answers[QueueMethod.CLAIM_MESSAGES] = lambda _: next(answers, pb.ClaimMessagesResponse())
    bench.tasks.append(asyncio.create_task(bench.queue.claim_mail()))
    async with asyncio.timeout(20):
        envelope, _, _ = await bench.engine.delivered.get()
    assert envelope.message_id == first.message_id


async def test_what_is_not_confirmed_is_forgotten_and_not_sent(bench: Bench) -> None:
    message = claimed(bench)
    answers = iter([pb.ClaimMessagesResponse(messages=[message])])
    bench.peer.answers[QueueMethod.CLAIM_MESSAGES] = lambda _: next(answers, pb.ClaimMessagesResponse())
    confirmed = asyncio.Event()

    def confirm(_: pb.ConfirmClaimRequest) -> Any:
        confirmed.set()
        return pb.ConfirmClaimResponse()

    bench.peer.answers[QueueMethod.CONFIRM_CLAIM] = confirm
    bench.tasks.append(asyncio.create_task(bench.queue.claim_mail()))
    await confirmed.wait()
    await settled()
    assert await bench.spool.load(MessageId(message.message_id)) is None
    assert bench.engine.delivered.empty()
