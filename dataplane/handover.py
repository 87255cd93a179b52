"""Hands a draining node's waiting mail over to other nodes, and takes over what others gave up.

**The rule**: from the commit on that gives a message up nobody sends it but who is given it. `Giver` moves a message,
in one commit of its spool, out of the queue and into the outbox, where it is records like all others: the control plane
has it once they are stored, however often they are sent, and whatever is killed in between. Nothing brings it back into
this spool but taking it over again.

    giving    the node was told to drain; the records of the last batch are stored (a batch is all that a control plane
              that is away can keep from being sent); the message is not being sent, and no command changes it
    taking    the control plane said that mail waits; the records of all that was taken before are stored. What is asked
              for by a Take is the spool's whether it arrives or not, and given again: so a Take that comes before what
              was taken is known would be given the same mail twice

    killed, giving     before the commit: the message waits here as before; after it: its records are sent at the next
                       start
    killed, taking     before the commit: it is given again; after it: the record that says so was in the same commit,
                       and nothing is asked for before that one is stored
    an answer is lost  the next Take has another number, and is given what is still missing

What is due while it waits for its turn is sent as ever: a drain stops nothing but new mail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import NamedTuple, Protocol

from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.handover import DamagedHandoverError, HandedOver, HandoverPart
from dataplane.core.ids import MessageId, format_message_id
from dataplane.core.queue import State
from dataplane.failpoints import failpoint
from dataplane.link import LedgerTake, Message
from dataplane.ports import EventLog, SpoolError, SpoolStats, StoredMessage, WalkedRow

LOOK_S = 1.0
ACKNOWLEDGED_LOOK_S = 0.02
SLICE_ROWS = 256
BATCH_MESSAGES = 32
BATCH_BYTES = 8 * 1024 * 1024
ANSWER_S = 30.0
_BEFORE_ALL = (MessageId(b""), 0)
_AFTER_ALL = MessageId(b"\xff" * 17)


class HandoverSpool(Protocol):
    """What this module needs of a spool on disk."""

    def give(
        self, message_id: MessageId, recipients: Sequence[RecipientRow], records: Sequence[bytes]
    ) -> asyncio.Future[int]:
        """Give a message up; the number of its last record, 0 when it was not as `recipients` say."""
        ...

    def take(
        self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow], record: bytes
    ) -> asyncio.Future[int]:
        """Store a message that another spool gave up; the number of its record."""
        ...

    def has_room(self, size_bytes: int) -> bool:
        """As `ports.Spool`."""
        ...

    async def load(self, message_id: MessageId) -> StoredMessage | None:
        """As `ports.Spool`."""
        ...

    async def walk(self, after: tuple[MessageId, int], before: MessageId, limit: int) -> list[WalkedRow]:
        """As `ports.Spool`."""
        ...

    async def stats(self) -> SpoolStats:
        """As `ports.Spool`."""
        ...


class Delivery(Protocol):
    """What this module needs of an engine."""

    def lock(self, message_id: MessageId) -> bool:
        """Begin no attempt of the message before `unlock`; whether the record of its acceptance is on its way."""
        ...

    def unlock(self, message_ids: Iterable[MessageId], queue_keys: Iterable[str]) -> None:
        """These are done; rows under these keys may have come, gone or become due."""
        ...


class EncodeGiven(Protocol):
    """Makes the records that give a message up."""

    def __call__(self, stored: StoredMessage, *, told: bool) -> list[bytes]:
        """In the order in which they must be written."""
        ...


class HandoverTools(NamedTuple):
    """What mail is handed over with; engines by their spool's name. `encode_taken` makes the record of a taking."""

    engines: Mapping[str, Delivery]
    encode_given: EncodeGiven
    encode_taken: Callable[[HandedOver], bytes]
    decode_part: Callable[[bytes], HandoverPart]
    log: EventLog


class Giver:
    """Gives up what waits in the spools of one worker, while it is told to.

    `turn` is held by whoever changes messages of these spools, `is_served` says whether the control plane takes a
    spool's records now, and `looked` is called after each look while it drains.
    """

    def __init__(
        self,
        spools: Mapping[str, HandoverSpool],
        tools: HandoverTools,
        turn: asyncio.Lock,
        is_served: Callable[[str], bool],
    ) -> None:
        self._spools = spools
        self._tools = tools
        self._turn = turn
        self._is_served = is_served
        self._told = asyncio.Event()
        self.looked: Callable[[], Awaitable[None]] = _nobody
        self.given_count = 0

    def tell(self, *, wanted: bool) -> None:
        """Whether to give mail up from now on."""
        (self._told.set if wanted else self._told.clear)()

    async def run(self) -> None:
        """Until cancelled; a commit that is under way is whole or undone."""
        async with asyncio.TaskGroup() as group:
            for name, spool in self._spools.items():
                group.create_task(self._run(name, spool))

    async def _run(self, name: str, spool: HandoverSpool) -> None:
        while True:
            await self._told.wait()
            given = 0
            try:
                given = await self.give_all(name, spool)
                await self.looked()
            except SpoolError as error:
                self._tools.log.warning("handover.not_given", spool=name, error=str(error))
            if not given:
                await asyncio.sleep(LOOK_S)

    async def give_all(self, name: str, spool: HandoverSpool) -> int:
        """Give up all that waits and is not being sent, as long as its records are stored; how many messages went.

        SpoolError when the spool could not give all of a batch up; the rest of the batch went.
        """
        position, given = _BEFORE_ALL, 0
        while rows := await spool.walk(position, _AFTER_ALL, SLICE_ROWS):
            position = (rows[-1].message_id, rows[-1].index)
            message_ids = list(dict.fromkeys(row.message_id for row in rows))
            while message_ids:
                if not (self._told.is_set() and self._is_served(name)):
                    return given
                batch = _Batch(name, spool, self._tools)
                async with self._turn:
                    message_ids = await batch.give(message_ids)
                failpoint("handover.given")
                if batch.given_count:
                    given += batch.given_count
                    self.given_count += batch.given_count
                    self._tools.log.info("handover.given", spool=name, count=batch.given_count)
                await _acknowledged(spool, batch.last_record)
                if batch.error is not None:
                    raise batch.error
        return given


class _Batch:
    """Messages that one spool gives up together."""

    def __init__(self, name: str, spool: HandoverSpool, tools: HandoverTools) -> None:
        self._spool = spool
        self._engine = tools.engines[name]
        self._tools = tools
        self.given_count = 0
        self.last_record = 0
        self.error: SpoolError | None = None

    async def give(self, message_ids: Sequence[MessageId]) -> list[MessageId]:
        """Give up some of these, from the first one on; returns those that were not looked at."""
        locked: list[MessageId] = []
        keys: set[str] = set()
        futures: list[asyncio.Future[int]] = []
        size_bytes = 0
        try:
            for message_id in message_ids:
                if len(locked) >= BATCH_MESSAGES or size_bytes >= BATCH_BYTES:
                    break
                locked.append(message_id)
                told = self._engine.lock(message_id)
                stored = await self._load(message_id)
                if stored is None or any(row.state is State.SENDING for row in stored.recipients):
                    continue
                keys.update(row.queue_key for row in stored.recipients)
                size_bytes += len(stored.content)
                records = self._tools.encode_given(stored, told=told or stored.reported)
                failpoint("handover.giving")
                futures.append(self._spool.give(message_id, stored.recipients, records))
                await asyncio.sleep(0)
        finally:
            ended = await asyncio.gather(*futures, return_exceptions=True)
            numbers = [number for number in ended if isinstance(number, int) and number]
            self.given_count = len(numbers)
            self.last_record = max(numbers, default=0)
            self.error = next((error for error in ended if isinstance(error, SpoolError)), None)
            self._engine.unlock(locked, keys)
        return list(message_ids[len(locked) :])

    async def _load(self, message_id: MessageId) -> StoredMessage | None:
        try:
            return await self._spool.load(message_id)
        except SpoolError as error:
            self._tools.log.warning("handover.unreadable", message=format_message_id(message_id), error=str(error))
            return None


class Taker:
    """Takes mail over into the spools of one worker, when it is invited. `send` gives a message to the agent."""

    def __init__(
        self, spools: Mapping[str, HandoverSpool], tools: HandoverTools, send: Callable[[Message], bool]
    ) -> None:
        self._spools = spools
        self._tools = tools
        self._send = send
        self._numbers = count(1)
        self._invitations = {name: asyncio.Event() for name in spools}
        self._answers: dict[str, asyncio.Queue[HandoverPart]] = {}
        self._takes: dict[str, int] = {}
        self.taken_count = 0

    def invited(self, spool: str) -> None:
        """Mail waits that the spool may take over."""
        if spool in self._invitations:
            self._invitations[spool].set()

    def arrived(self, raw: bytes) -> None:
        """A part of what a spool takes over; one of an earlier Take is passed over."""
        try:
            part = self._tools.decode_part(raw)
        except DamagedHandoverError as error:
            self._tools.log.warning("handover.unreadable", message="", error=str(error))
            return
        if self._takes.get(part.spool) == part.number:
            self._answers[part.spool].put_nowait(part)

    async def run(self) -> None:
        """Until cancelled; what is not in the spool by then is given again."""
        async with asyncio.TaskGroup() as group:
            for name, spool in self._spools.items():
                group.create_task(self._run(name, spool))

    async def _run(self, name: str, spool: HandoverSpool) -> None:
        # What a former process took is in its records, the last of which is at most this one.
        after_record = (await spool.stats()).outbox_last
        while True:
            await self._invitations[name].wait()
            self._invitations[name].clear()
            try:
                if spool.has_room(BATCH_BYTES):
                    after_record = await self._take_all(name, spool, after_record)
            except SpoolError as error:
                self._tools.log.warning("handover.not_taken", spool=name, message="", error=str(error))

    async def _take_all(self, name: str, spool: HandoverSpool, after_record: int) -> int:
        """Take until there is no more; the record that tells of the last one."""
        while True:
            await _acknowledged(spool, after_record)
            arriving = _Arriving(name, spool, self._tools)
            await self._take_once(name, after_record, arriving)
            after_record = max(after_record, arriving.last_record)
            if not arriving.taken_count:
                return after_record
            self.taken_count += arriving.taken_count
            self._tools.log.info("handover.taken", spool=name, count=arriving.taken_count)

    async def _take_once(self, name: str, after_record: int, arriving: _Arriving) -> None:
        number = next(self._numbers)
        answer = self._answers[name] = asyncio.Queue()
        self._takes[name] = number
        try:
            if not self._send(LedgerTake(name, number, after_record)):
                return
            while True:
                async with asyncio.timeout(ANSWER_S):
                    part = await answer.get()
                arriving.add(part)
                if part.last:
                    return
        except TimeoutError:
            # The stream ended; what was not given is given for the next Take.
            return
        finally:
            del self._takes[name], self._answers[name]
            await arriving.settled()


class _Arriving:
    """What one Take is given, message by message."""

    def __init__(self, name: str, spool: HandoverSpool, tools: HandoverTools) -> None:
        self._name = name
        self._spool = spool
        self._engine = tools.engines[name]
        self._tools = tools
        self._current: HandedOver | None = None
        self._content: list[bytes] = []
        self._left_bytes = 0
        self._keys: set[str] = set()
        self._futures: dict[MessageId, asyncio.Future[int]] = {}
        self.taken_count = 0
        self.last_record = 0

    def add(self, part: HandoverPart) -> None:
        """Take the next part; a message that is whole goes into the spool."""
        if part.handed_over is not None:
            self._current = part.handed_over
            self._content = []
            self._left_bytes = part.handed_over.content_bytes
        if self._current is None or not part.message_id:
            return
        self._content.append(part.content)
        self._left_bytes -= len(part.content)
        if self._left_bytes <= 0:
            self._store(self._current)
            self._current = None

    def _store(self, message: HandedOver) -> None:
        self._keys.update(row.queue_key for row in message.recipients)
        record = self._tools.encode_taken(message)
        content, self._content = b"".join(self._content), []
        envelope = message.envelope
        failpoint("handover.arrived")
        self._futures[envelope.message_id] = self._spool.take(envelope, content, message.recipients, record)

    async def settled(self) -> None:
        """Wait until all that is whole is in the spool, and let delivery know."""
        results = await asyncio.gather(*self._futures.values(), return_exceptions=True)
        for message_id, result in zip(self._futures, results, strict=True):
            if isinstance(result, BaseException):
                text = format_message_id(message_id)
                self._tools.log.warning("handover.not_taken", spool=self._name, message=text, error=str(result))
            else:
                self.taken_count += 1
                self.last_record = max(self.last_record, result)
        failpoint("handover.taken")
        self._engine.unlock((), self._keys)


async def _acknowledged(spool: HandoverSpool, number: int) -> None:
    """Wait until the records up to this one are stored by the control plane."""
    while (await spool.stats()).acknowledged < number:  # noqa: ASYNC110 - a spool tells nobody of its mark
        await asyncio.sleep(ACKNOWLEDGED_LOOK_S)


async def _nobody() -> None:
    return
