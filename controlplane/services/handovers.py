"""Gives mail that draining nodes gave up to spools of other nodes, over the streams on which those report.

Contract. `Handovers.attend` makes a `Receiver` for one stream, `leave` ends it. `run` looks every second whether mail
waits, and invites the spools of its streams that may take some. A spool answers with a Take; it is given messages, as
many as one turn carries, and asks again until it is given none. What it was given is the spool's, whether that arrives
or not: a stream that ends, a node that is killed and an answer that is lost leave it to be asked for again. An
invitation or a gift that fails since PostgreSQL is away is made again with the next look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import NamedTuple

from controlplane.domain.errors import UnavailableError
from controlplane.ports_queue import Handover, HandoverCounts, HandoverStore

LOOK_S = 1.0
SWEEP_LOOKS = 30


class Take(NamedTuple):
    """A spool asks for mail; see postroad.node.v1.LedgerTake."""

    spool: str
    number: int
    after_record: int


class HandoverPart(NamedTuple):
    """A part of an answer; see postroad.node.v1.LedgerHandover."""

    take: Take
    message_id: bytes = b""
    account: str = ""
    what: bytes | None = None
    content: bytes = b""
    last: bool = False


Invite = Callable[[str], Awaitable[None]]
Give = Callable[[HandoverPart], Awaitable[None]]


class Handovers:
    """See the module. `ended` is told whose drain is over, `given` what a spool was given, `counted` how much waits."""

    def __init__(
        self,
        store: HandoverStore,
        clock: Callable[[], datetime],
        *,
        ended: Callable[[str], None] = lambda _node: None,
        given: Callable[[str, str, int], None] = lambda _node, _spool, _count: None,
        counted: Callable[[HandoverCounts], None] = lambda _counts: None,
        failed: Callable[[Exception], None] = lambda _error: None,
    ) -> None:
        self.store = store
        self.given = given
        self._clock = clock
        self._ended = ended
        self._counted = counted
        self._failed = failed
        self._receivers: set[Receiver] = set()

    def attend(self, node_id: str, invite: Invite, give: Give) -> Receiver:
        """Begin with a stream of a node."""
        receiver = Receiver(self, node_id, invite, give)
        self._receivers.add(receiver)
        return receiver

    def leave(self, receiver: Receiver) -> None:
        """The stream has ended."""
        self._receivers.discard(receiver)

    async def run(self, look_s: float = LOOK_S) -> None:
        """Until cancelled."""
        looks = 0
        while True:
            try:
                await self.look()
                if looks % SWEEP_LOOKS == 0:
                    self._counted(await self.store.sweep(self._clock()))
            except UnavailableError:
                pass
            except Exception as error:  # noqa: BLE001 - reported; it must not end the process, which does much else
                self._failed(error)
            looks += 1
            await asyncio.sleep(look_s)

    async def look(self) -> None:
        """Invite who may take something, and end the drains that are over. UnavailableError."""
        owners = {spool: receiver for receiver in self._receivers for spool in receiver.spools}
        if owners:
            for spool in await self.store.invited(sorted(owners)):
                owners[spool].invited(spool)
        for node in await self.store.end_drains(self._clock()):
            self._ended(node)


class Receiver:
    """One stream's part; see the module. Nothing of it waits for the database but `run`."""

    def __init__(self, handovers: Handovers, node_id: str, invite: Invite, give: Give) -> None:
        self._handovers = handovers
        self._node_id = node_id
        self._invite = invite
        self._give = give
        self.spools: set[str] = set()
        self._invitations: set[str] = set()
        self._takes: dict[str, Take] = {}
        self._news = asyncio.Event()

    def reports(self, spool: str, *, taken: bool) -> None:
        """The spool reports on this stream, or its records are not taken."""
        (self.spools.add if taken else self.spools.discard)(spool)

    def invited(self, spool: str) -> None:
        """Mail waits that the spool may take."""
        self._invitations.add(spool)
        self._news.set()

    def asked(self, take: Take) -> None:
        """A spool asks; its newest wish counts."""
        self._takes[take.spool] = take
        self._news.set()

    async def run(self) -> None:
        """Invite and give until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._invitations:
                await self._invite(self._invitations.pop())
            while self._takes:
                take = self._takes.pop(next(iter(self._takes)))
                try:
                    await self._answer(take)
                except UnavailableError:
                    # The next invitation brings the spool to ask again.
                    continue

    async def _answer(self, take: Take) -> None:
        found = await self._handovers.store.take(self._node_id, take.spool, take.after_record)
        for handover in found:
            if not await self._give_one(take, handover):
                # It has been taken over: whoever asked has asked anew.
                return
        await self._give(HandoverPart(take, last=True))
        if found:
            self._handovers.given(self._node_id, take.spool, len(found))

    async def _give_one(self, take: Take, handover: Handover) -> bool:
        what: bytes | None = handover.what
        left, piece = handover.content_bytes, 0
        while True:
            content = await self._handovers.store.piece(handover.message_id, piece) if left else b""
            if content is None:
                return False
            await self._give(HandoverPart(take, handover.message_id, handover.account, what, content))
            what = None
            left -= len(content)
            piece += 1
            if left <= 0:
                return True
