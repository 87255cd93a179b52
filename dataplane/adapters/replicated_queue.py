"""`ports.ReplicatedQueue` over the link to the agent: keeps the lease, stores what is accepted, claims what is due.

Contract. PostgreSQL owns the mail. What this worker sends at once it holds in its spool too, as `sending`, so that a
worker that is killed can say that the attempt is uncertain; everything else waits in PostgreSQL, for any node. Calls go
by `send` and come back by `answered`; while nobody answers there is no lease, once the last one is over.

    accept, sending     PostgreSQL, then the spool; both within STORE_TIMEOUT_S, else SpoolError
    accept, queued      PostgreSQL alone; claimed later, from here or elsewhere
    accept, scheduled   the same, at its time
    claim               PostgreSQL gives, the spool commits, PostgreSQL hears of it, then delivery begins
    nobody knows        a store whose answer is lost: the lease is given up, so that what PostgreSQL may think that it
                        holds returns at the end of it, and another one is begun
    the lease ends      delivery cuts what has not sent its dot, and PostgreSQL hears of each end by the ledger

Messages that come while two stores are under way gather for the next one. One claim follows the other as long as they
are full, and CLAIM_AGAIN_S after one that was not empty: where mail goes on coming it is fetched in handfuls. Accounts
whose mail could not be sent are left out of claims for a while: REST_S where it was given back, STRANGE_S where this
node does not know the account, for its configuration may be on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from dataplane.adapters.replicated_content import IncomingContent, look_at, resolve
from dataplane.adapters.spool_sqlite.codec import DamagedRowError, decode_envelope, encode_envelope
from dataplane.core.envelope import Envelope, RecipientRow, make_queue_key, split_queue_key
from dataplane.core.ids import MessageId, format_message_id
from dataplane.core.lease import Lease
from dataplane.core.ledger import LedgerRecord
from dataplane.core.queue import State
from dataplane.link import Message as LinkMessage
from dataplane.link import QueueAnswer, QueueCall, QueueMethod
from dataplane.ports import (
    ConfigView,
    EventLog,
    RecipientChange,
    RecordEncoder,
    RepeatedSubmissionError,
    Settlement,
    Spool,
    SpoolError,
    SpoolFailedError,
)
from dataplane.telemetry import SampleRow
from postroad.node.v1 import queue_service_pb2 as pb

RENEW_S = 5.0
RENEW_AGAIN_S = 1.0
RENEW_TIMEOUT_S = 4.0
STORE_TIMEOUT_S = 20.0
CLAIM_S = 3.0
CLAIM_AGAIN_S = 0.2
CLAIM_TIMEOUT_S = 15.0
REST_S = 3.0
STRANGE_S = 60.0
CLAIMED_MESSAGES = 100
CLAIMED_BYTES = 4 * 1024 * 1024
INLINE_BYTES = 1024 * 1024
STORES_AT_ONCE = 2
BATCH_MESSAGES = 500
BATCH_BYTES = 4 * 1024 * 1024

_INVALID_ARGUMENT, _PERMISSION_DENIED, _ABORTED, _UNAVAILABLE = 3, 7, 10, 14
# What says that nothing was done; anything else says nothing.
_DECIDED = (_INVALID_ARGUMENT, _PERMISSION_DENIED, _ABORTED)
_Response = TypeVar("_Response", bound=Message)


class QueueError(SpoolError):
    """The control plane did not do it; `status` is the gRPC code. UNAVAILABLE: nobody knows whether it did."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Delivery(Protocol):
    """What the queue needs of the engine."""

    def deliver(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> None:
        """Deliver a message whose rows are committed as `sending`."""
        ...

    def window_open(self) -> bool:
        """Whether more messages may be read into memory."""
        ...

    def left_out(self) -> set[str]:
        """Accounts whose mail is of no use here now: suspended, or enough of it is here."""
        ...

    def take_given_back(self) -> set[str]:
        """Accounts whose mail was given back unsent since this was asked last."""
        ...

    def lease_ended(self) -> None:
        """Cut what is held under a lease that is over."""
        ...


@dataclass(slots=True)
class QueueCounters:
    """Totals since the start, by message."""

    stored: int = 0
    refused: int = 0
    claimed: int = 0
    given_up: int = 0  # leases that were given up or ended


@dataclass(slots=True)
class _Store:
    message: pb.QueuedMessage
    envelope: Envelope
    content: bytes
    rows: Sequence[RecipientRow]
    future: asyncio.Future[None]


class _Taken(NamedTuple):
    envelope: Envelope
    content: bytes
    rows: list[RecipientRow]


class LinkedQueue:
    """See the module. `boot_s` is CLOCK_BOOTTIME; `holds` is what delivery asks before it sends."""

    def __init__(
        self,
        spool: Spool,
        config: ConfigView,
        encode: RecordEncoder,
        boot_s: Callable[[], float],
        log: EventLog,
        *,
        claim_again_s: float = CLAIM_AGAIN_S,
    ) -> None:
        self.counters = QueueCounters()
        self._claim_again_s = claim_again_s
        self._spool = spool
        self._config = config
        self._encode = encode
        self._boot_s = boot_s
        self._log = log
        self._delivery: Delivery
        self._send: Callable[[LinkMessage], bool]
        self._lease = Lease()
        self._renew_now = asyncio.Event()
        self._claim_now = asyncio.Event()
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._waiting: list[_Store] = []
        self._storing = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._resting: dict[str, float] = {}  # accounts, and until when they are left out of claims
        self._ending: asyncio.TimerHandle | None = None
        self._stopping = False

    def attach(self, delivery: Delivery, send: Callable[[LinkMessage], bool]) -> None:
        """Hand over what was made with this object; before anything runs."""
        self._delivery = delivery
        self._send = send

    # --- ports.ReplicatedQueue

    @property
    def epoch(self) -> int:
        """As the port says."""
        epoch = self._lease.epoch
        return epoch if self._lease.holds(epoch, self._boot_s()) else 0

    def holds(self, epoch: int) -> bool:
        """Whether what is held under this lease may be sent, by the clock of this moment."""
        return self._lease.holds(epoch, self._boot_s())

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """As the port says."""
        if len(content) > INLINE_BYTES:
            incoming = IncomingContent(self, envelope.message_id)
            incoming.write(content).add_done_callback(look_at)
            return incoming.store(envelope, content, recipients)
        return self.put(envelope, content, recipients, pb.QueuedMessage(content=content))

    def receive(self, message_id: MessageId) -> IncomingContent:
        """As the port says."""
        return IncomingContent(self, message_id)

    # --- what the worker calls

    def answered(self, answer: QueueAnswer) -> None:
        """The agent says what came of a call."""
        future = self._calls.pop(answer.number, None)
        if future is None or future.done():
            return
        if answer.status:
            future.set_exception(QueueError(answer.status, answer.payload.decode("utf-8", "replace")))
        else:
            future.set_result(answer.payload)

    def agent_lost(self) -> None:
        """The agent is gone, and what it was asked with it."""
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done():
                future.set_exception(QueueError(_UNAVAILABLE, "the agent is gone"))

    def stop(self) -> None:
        """Claim no more; the lease goes on while deliveries do."""
        self._stopping = True

    def go_on(self) -> None:
        """Claim again after `stop`."""
        self._stopping = False
        self._claim_now.set()

    async def keep_lease(self) -> None:
        """Renew the lease until cancelled."""
        while True:
            sent_s = self._boot_s()
            self._renew_now.clear()
            wait_s = RENEW_S
            epoch = self._lease.epoch
            try:
                request = pb.RenewLeaseRequest(spool=self._spool.identity.spool, epoch=epoch)
                response = await self.call(QueueMethod.RENEW_LEASE, request, pb.RenewLeaseResponse, RENEW_TIMEOUT_S)
            except QueueError:
                wait_s = RENEW_AGAIN_S
            else:
                # A lease that was given up meanwhile must not come back: `_renew_now` is set, and another one is begun.
                if epoch == self._lease.epoch:
                    self._renewed(response.epoch, response.duration.ToMilliseconds() / 1000, sent_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, wait_s - (self._boot_s() - sent_s))):
                    await self._renew_now.wait()

    async def claim_mail(self) -> None:
        """Claim what is due until cancelled: again at once while claims are full, soon after one that was not empty."""
        wait_s = CLAIM_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._claim_now.wait()
            self._claim_now.clear()
            wait_s, count = CLAIM_S, CLAIMED_MESSAGES
            try:
                while count == CLAIMED_MESSAGES and (epoch := self.epoch) and self._has_room():
                    count = await self._claim(epoch)
                    wait_s = self._claim_again_s if count else CLAIM_S
            except SpoolFailedError:
                raise
            except SpoolError as error:
                self._log.info("queue.not_claimed", error=str(error))

    def samples(self) -> Iterator[SampleRow]:
        """Rows for the metrics of the node."""
        yield "replicated_lease_seconds", (), self._lease.left_s(self._boot_s())
        yield "replicated_messages_total", ("stored",), self.counters.stored
        yield "replicated_messages_total", ("refused",), self.counters.refused
        yield "replicated_messages_total", ("claimed",), self.counters.claimed
        yield "replicated_leases_lost_total", (), self.counters.given_up

    # --- the lease

    def _renewed(self, epoch: int, duration_s: float, sent_s: float) -> None:
        begun = epoch != self._lease.epoch
        void = self._lease.renewed(epoch, duration_s, sent_s)
        if void:
            self._lost("another one was begun")
        if begun:
            self._log.info("queue.lease_begun", epoch=epoch)
            self._claim_now.set()
        if self._ending is not None:
            self._ending.cancel()
        left_s = self._lease.left_s(self._boot_s())
        self._ending = asyncio.get_running_loop().call_later(left_s + 0.01, self._look_whether_over)

    def _look_whether_over(self) -> None:
        self._ending = None
        if self._lease.epoch and not self._lease.left_s(self._boot_s()):
            self._lost("it was not renewed in time")

    def _abandon(self, why: str) -> None:
        """Nobody knows what PostgreSQL thinks that the lease holds."""
        self._lease.abandon()
        self._lost(why)
        self._renew_now.set()

    def _lost(self, why: str) -> None:
        self.counters.given_up += 1
        self._log.warning("queue.lease_lost", reason=why)
        self._delivery.lease_ended()

    # --- storing

    def put(
        self, envelope: Envelope, content: bytes, rows: Sequence[RecipientRow], message: pb.QueuedMessage
    ) -> asyncio.Future[None]:
        """Store a message whose content is in `message`, or put there before; the contract of `accept`."""
        addresses = tuple(row.address for row in rows)
        message.record = self._encode(LedgerRecord(envelope.message_id, envelope.account, envelope, addresses))
        message.envelope = encode_envelope(envelope, rows)
        message.account_uid = envelope.account_uid
        message.sending = rows[0].state is State.SENDING
        message.next_hops.extend([split_queue_key(row.queue_key)[1] for row in rows])
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Store(message, envelope, content, rows, future))
        if self._storing < STORES_AT_ONCE:
            self._storing += 1
            self.spawn(self._store())
        return future

    async def _store(self) -> None:
        try:
            while self._waiting:
                await self._store_batch(self._next_batch())
        finally:
            self._storing -= 1

    def _next_batch(self) -> list[_Store]:
        size_bytes = count = 0
        for store in self._waiting[:BATCH_MESSAGES]:
            message = store.message
            size_bytes += len(message.content) + len(message.envelope) + len(message.record)
            if count and size_bytes > BATCH_BYTES:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    async def _store_batch(self, batch: list[_Store]) -> None:
        epoch = self.epoch
        good = [store for store in batch if store.envelope.epoch == epoch != 0]
        for store in batch:
            if store.envelope.epoch != epoch or not epoch:
                self._refuse(store, QueueError(_ABORTED, "the lease has ended"))
        if not good:
            return
        request = pb.StoreMessagesRequest(
            spool=self._spool.identity.spool, epoch=epoch, messages=[store.message for store in good]
        )
        try:
            response = await self.call(QueueMethod.STORE_MESSAGES, request, pb.StoreMessagesResponse, STORE_TIMEOUT_S)
        except QueueError as error:
            if error.status == _INVALID_ARGUMENT and len(good) > 1:
                for store in good:
                    await self._store_batch([store])
                return
            decided = error.status in _DECIDED or epoch != self._lease.epoch
            if not decided and any(store.message.sending for store in good):
                self._abandon("a store was not answered")
            for store in good:
                self._refuse(store, error)
            return
        self._answer(good, response)

    def _answer(self, stores: Sequence[_Store], response: pb.StoreMessagesResponse) -> None:
        repeated = {one.message_id: one for one in response.repeated_messages}
        self.counters.stored += len(stores) - len(repeated)
        for store in stores:
            first = repeated.get(store.envelope.message_id)
            if first is None:
                self._stored(store)
            else:
                resolve(store.future, RepeatedSubmissionError(first.first_message_id, is_same=first.same_content))

    def _stored(self, store: _Store) -> None:
        if not store.message.sending:
            if not store.envelope.send_time_ms:
                self._claim_now.set()
            resolve(store.future, None)
            return
        local = self._spool.accept(store.envelope, store.content, store.rows)
        local.add_done_callback(partial(self._held_here, store))

    def _held_here(self, store: _Store, local: asyncio.Future[None]) -> None:
        error = SpoolError("the commit was cancelled") if local.cancelled() else local.exception()
        if error is not None:
            self._abandon("the spool did not take what it holds")
            # It is stored, and goes by another way: whatever the spool says, no client may hear that it is not.
            self.counters.refused += 1
            error = SpoolError(f"PostgreSQL has it, the spool does not: {error}")
        resolve(store.future, error)

    def _refuse(self, store: _Store, error: SpoolError) -> None:
        self.counters.refused += 1
        resolve(store.future, error)

    # --- claiming

    def _has_room(self) -> bool:
        return not self._stopping and self._delivery.window_open()

    async def _claim(self, epoch: int) -> int:
        """Claim once; how many messages came."""
        spool = self._spool.identity.spool
        claim_id = str(uuid.uuid4())
        request = pb.ClaimMessagesRequest(
            spool=spool,
            epoch=epoch,
            claim_id=claim_id,
            max_messages=CLAIMED_MESSAGES,
            max_bytes=CLAIMED_BYTES,
            left_out_accounts=self._left_out(),
        )
        response = await self.call(QueueMethod.CLAIM_MESSAGES, request, pb.ClaimMessagesResponse, CLAIM_TIMEOUT_S)
        taken = await self._take_all(epoch, response.messages)
        if not taken:
            return len(response.messages)
        confirm = pb.ConfirmClaimRequest(spool=spool, epoch=epoch, claim_id=claim_id, message_ids=list(taken))
        confirmed = await self._confirm(epoch, confirm)
        self.counters.claimed += len(confirmed)
        for message_id, (envelope, content, rows) in taken.items():
            if message_id in confirmed:
                self._delivery.deliver(envelope, content, rows)
            else:
                self._forget(envelope.message_id, rows)
        return len(response.messages)

    def _left_out(self) -> list[str]:
        """Accounts that nothing is wanted of now."""
        now_s = self._boot_s()
        self._resting.update(dict.fromkeys(self._delivery.take_given_back(), now_s + REST_S))
        self._resting = {account: until_s for account, until_s in self._resting.items() if until_s > now_s}
        return sorted(self._delivery.left_out() | self._resting.keys())

    async def _take_all(self, epoch: int, messages: Sequence[pb.ClaimedMessage]) -> dict[bytes, _Taken]:
        """Commit claimed messages to the spool, together; those that are in it."""
        taken: dict[bytes, _Taken] = {}
        commits: list[asyncio.Future[None]] = []
        for message in messages:
            with contextlib.suppress(QueueError):
                read = await self._read(epoch, message)
                if read is not None:
                    taken[message.message_id] = read
                    commits.append(self._spool.accept(*read))
        errors = await asyncio.gather(*commits, return_exceptions=True)
        for message_id, error in zip(tuple(taken), errors, strict=True):
            if isinstance(error, SpoolError) and not isinstance(error, SpoolFailedError):
                del taken[message_id]
            elif error is not None:
                raise error
        return taken

    async def _read(self, epoch: int, message: pb.ClaimedMessage) -> _Taken | None:
        """Read a claimed message; None to leave it alone."""
        message_id = MessageId(message.message_id)
        try:
            envelope, addresses = decode_envelope(message_id, message.envelope)
            # A spool that stored the message before has its key still.
            envelope = replace(envelope, epoch=epoch, submission_key=None)
            rows = [
                RecipientRow(
                    *(one.index, addresses[one.index], State.SENDING, one.attempt, one.due_ms, envelope.priority),
                    make_queue_key(envelope.account, one.provider, envelope.priority, pinned=bool(one.provider)),
                )
                for one in message.recipients
            ]
        except (DamagedRowError, KeyError):
            self._log.warning("queue.unreadable", message=format_message_id(message_id))
            return None
        account = self._config.account(envelope.account)
        if account is None or account.account.uid != envelope.account_uid:
            self._resting[envelope.account] = self._boot_s() + STRANGE_S
            return None
        if not rows:
            return None
        content = message.content if message.has_content else await self._fetch(epoch, message_id)
        if len(content) != envelope.size_bytes:
            # Nothing is sent in its place.
            self._log.warning("queue.unreadable", message=format_message_id(message_id))
            return None
        return _Taken(envelope, content, rows)

    async def _fetch(self, epoch: int, message_id: MessageId) -> bytes:
        parts: list[bytes] = []
        chunk = 0
        while True:
            request = pb.FetchContentRequest(
                spool=self._spool.identity.spool, epoch=epoch, message_id=message_id, chunk=chunk
            )
            part = await self.call(QueueMethod.FETCH_CONTENT, request, pb.FetchContentResponse, CLAIM_TIMEOUT_S)
            parts.append(part.data)
            chunk = part.next_chunk
            if not chunk:
                return b"".join(parts)

    async def _confirm(self, epoch: int, request: pb.ConfirmClaimRequest) -> set[bytes]:
        """Say what is in the spool until it is answered or the lease is over; asked twice it is answered the same."""
        while self.holds(epoch):
            try:
                response = await self.call(QueueMethod.CONFIRM_CLAIM, request, pb.ConfirmClaimResponse, RENEW_TIMEOUT_S)
            except QueueError as error:
                if error.status in _DECIDED:
                    break
                await asyncio.sleep(RENEW_AGAIN_S)
            else:
                return set(response.message_ids)
        return set()

    def _forget(self, message_id: MessageId, rows: Sequence[RecipientRow]) -> None:
        """It is not ours to send: nothing is said about it."""
        changes = [
            RecipientChange(row.index, row.attempt, State.CANCELLED, row.attempt, 0, row.queue_key) for row in rows
        ]
        self._spool.settle(Settlement(message_id, changes, None, reported=False)).add_done_callback(look_at)

    # --- calls

    async def call(
        self, method: QueueMethod, request: Message, response: type[_Response], timeout_s: float
    ) -> _Response:
        """Make a call; QueueError. Cancellation leaves it undecided."""
        number = next(self._numbers)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        try:
            if not self._send(QueueCall(number, method, int(timeout_s * 1000), request.SerializeToString())):
                raise QueueError(_UNAVAILABLE, "the agent is not there")
            # The agent's own limit comes first, unless it is stuck.
            async with asyncio.timeout(timeout_s + 1.0):
                return response.FromString(await future)
        except TimeoutError:
            raise QueueError(_UNAVAILABLE, "no answer in time") from None
        except DecodeError as error:
            raise QueueError(_UNAVAILABLE, "an answer that is none") from error
        finally:
            self._calls.pop(number, None)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something to its end, whoever waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def put_chunk(self, message_id: MessageId, chunk: int, data: bytes) -> None:
        """Put a piece of a content."""
        request = pb.StoreContentRequest(
            spool=self._spool.identity.spool, message_id=message_id, chunk=chunk, data=data
        )
        await self.call(QueueMethod.STORE_CONTENT, request, pb.StoreContentResponse, STORE_TIMEOUT_S)
