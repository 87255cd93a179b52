"""MessageService.SendMessage and BatchSendMessages: who may send, what is counted, and storing each message once.

Contract. Messages are checked first, each by itself; those that pass draw from their buckets, and what was granted is
stored in one transaction, which knows the request ids that were used before; their tokens are given back. The account's
configuration is PostgreSQL's of this moment, nothing here is remembered from the call before. What is answered as
accepted is in PostgreSQL.

    a request id                           what a message with it gets
    is new                                 stored
    is another message's of the same call  the same answer as that one, REQUEST_ID_REUSED where it differs
    was used in the last 24 hours          the name of then, REQUEST_ID_REUSED for another message
    is being stored somewhere else         waits for that, and then as above

Tokens of a message that was not stored are given back. NotFoundError, UnavailableError and PermissionDeniedError
concern a whole call; what is wrong with a message is its own result. Cancellation leaves it unknown whether anything
was stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from controlplane.domain import names
from controlplane.domain.acceptance import Accepted, Origin, SendingAccount, Stamp, accept
from controlplane.domain.access import Caller
from controlplane.domain.errors import (
    AbortedError,
    ControlPlaneError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
    invalid,
)
from controlplane.domain.outgoing import Outgoing
from controlplane.domain.sending_limits import Take
from controlplane.ports import Random
from controlplane.ports_sending import Denied, KnownKey, MessageBudget, Outbox, SendingObserver
from dataplane.core.ids import format_message_id, new_message_id

# Above it a message is made and looked at beside the loop that serves everybody.
_LARGE_BYTES = 64 * 1024


class NoOutbox:
    """`ports_sending.Outbox` of a process that administers and serves nobody."""

    async def account(self, account: str) -> SendingAccount | None:
        """There is none."""
        raise UnavailableError(Reason.DATABASE_UNAVAILABLE, "mail is sent by a control plane", retry_after_s=1)

    async def known(self, account: str, key_hashes: Sequence[bytes]) -> dict[bytes, KnownKey]:
        """Nobody comes here."""
        return {}

    async def store(self, account: str, messages: Sequence[Accepted]) -> set[bytes]:
        """Nobody comes here."""
        return set()


class Unobserved:
    """`ports_sending.SendingObserver` of those who do not look."""

    def accepted(self, message: Accepted) -> None:
        """Nobody hears."""

    def ended(self, result: str) -> None:
        """Nobody hears."""


class Sent(NamedTuple):
    """A message that was accepted, or sent before; the id is empty for a rehearsal."""

    message_id: str
    recipient_count: int
    is_repeated: bool = False


Result = Sent | ControlPlaneError


@dataclass(slots=True)
class _Piece:
    """A message of a call on its way; done when `result` is there."""

    outgoing: Outgoing
    accepted: Accepted | None = None
    takes: tuple[Take, ...] = ()
    result: Result | None = None


class SendingService:
    """See the module. `now_ms` is the wall clock, `hostname` what `Received` names as this server."""

    def __init__(
        self,
        outbox: Outbox,
        budget: MessageBudget,
        observer: SendingObserver,
        *,
        now_ms: Callable[[], int],
        random: Random,
        hostname: str,
    ) -> None:
        self._outbox = outbox
        self._budget = budget
        self._observer = observer
        self._now_ms = now_ms
        self._random = random
        self._hostname = hostname

    async def send(
        self, caller: Caller, account: str, messages: Sequence[Outgoing | InvalidArgumentError], origin: Origin
    ) -> list[Result]:
        """Return what became of each message; an error among them stands for one that could not even be read."""
        caller.require_account(account)
        found = await self._outbox.account(account)
        if found is None:
            raise NotFoundError(names.format_name(names.ACCOUNT, account))
        session = self._random(8).hex()
        results: list[Result | None] = [one if isinstance(one, ControlPlaneError) else None for one in messages]
        pieces = [None if isinstance(one, ControlPlaneError) else _Piece(one) for one in messages]
        going = [piece for piece in pieces if piece is not None]
        for count, piece in enumerate(going):
            if count:
                # Making a message costs a millisecond: a batch lets others go on in between.
                await asyncio.sleep(0)
            await self._check(piece, found, self._stamp(caller, session, origin))
        await self._store(account, found, going)
        for number, one in enumerate(pieces):
            if one is not None:
                results[number] = one.result
        return [self._told(result) for result in results]

    def _stamp(self, caller: Caller, session: str, origin: Origin) -> Stamp:
        now_ms = self._now_ms()
        message_id = new_message_id(now_ms, self._random(10))
        return Stamp(message_id, now_ms, self._hostname, caller.principal, session, origin, self._random(8).hex())

    async def _check(self, piece: _Piece, account: SendingAccount, stamp: Stamp) -> None:
        outgoing = piece.outgoing
        try:
            if _size_bytes(outgoing) > _LARGE_BYTES:
                accepted = await asyncio.to_thread(accept, outgoing, account, stamp)
            else:
                accepted = accept(outgoing, account, stamp)
        except ControlPlaneError as error:
            piece.result = error
            return
        piece.accepted = accepted
        piece.takes = account.limits.takes(stamp.origin.address, len(accepted.recipients), accepted.charged_bytes)
        if outgoing.is_rehearsal:
            piece.result = Sent("", len(accepted.recipients))

    async def _store(self, account: str, found: SendingAccount, pieces: Sequence[_Piece]) -> None:
        twins = _find_twins(pieces)
        await self._take(account, found, pieces)
        left: dict[bytes, _Piece] = {
            piece.accepted.envelope.message_id: piece for piece in pieces if piece.accepted and not piece.result
        }
        if left:
            try:
                stored = await self._outbox.store(account, [one.accepted for one in left.values() if one.accepted])
            except ControlPlaneError:
                await self._give_back(list(left.values()))
                raise
            for message_id in stored:
                self._note_stored(left[message_id])
            late = [piece for message_id, piece in left.items() if message_id not in stored]
            await self._give_back(late)
            await self._answer_known(account, late)
            for piece in late:
                piece.result = piece.result or AbortedError(Reason.CONCURRENT_EDIT)
        for piece, first in twins:
            piece.result = first.result._replace(is_repeated=True) if isinstance(first.result, Sent) else first.result

    def _note_stored(self, piece: _Piece) -> None:
        accepted = piece.accepted
        assert accepted is not None  # noqa: S101 - what was stored was accepted
        piece.result = Sent(format_message_id(accepted.envelope.message_id), len(accepted.recipients))
        self._observer.accepted(accepted)

    async def _answer_known(self, account: str, pieces: Sequence[_Piece]) -> None:
        wanted = {
            piece.accepted.key.key_hash: piece
            for piece in pieces
            if piece.result is None and piece.accepted is not None and piece.accepted.key is not None
        }
        if not wanted:
            return
        for key_hash, known in (await self._outbox.known(account, list(wanted))).items():
            wanted[key_hash].result = _repeated(wanted[key_hash], known)

    async def _take(self, account: str, found: SendingAccount, pieces: Sequence[_Piece]) -> None:
        asking = [piece for piece in pieces if piece.result is None and piece.takes]
        if not asking:
            return
        # One part for each node, and one for the control planes.
        denials = await self._budget.take([piece.takes for piece in asking], found.settings.node_count + 1)
        refused = {id(piece): denied for piece, denied in zip(asking, denials, strict=True) if denied is not None}
        if not refused:
            return
        # One that was stored before costs nothing, so that no limit refuses it.
        late = [piece for piece in asking if id(piece) in refused]
        await self._answer_known(account, late)
        for piece in late:
            piece.result = piece.result or _limited(refused[id(piece)])

    async def _give_back(self, pieces: Sequence[_Piece]) -> None:
        takes = [take for piece in pieces for take in piece.takes]
        if takes:
            await self._budget.give_back(takes)

    def _told(self, result: Result | None) -> Result:
        assert result is not None  # noqa: S101 - every message has a result by now
        if isinstance(result, Sent):
            if result.message_id:
                self._observer.ended("repeated" if result.is_repeated else "accepted")
        else:
            self._observer.ended("limited" if isinstance(result, ResourceExhaustedError) else "refused")
        return result


def _size_bytes(outgoing: Outgoing) -> int:
    if outgoing.raw is not None:
        return len(outgoing.raw)
    return outgoing.content.size_bytes if outgoing.content is not None else 0


def _find_twins(pieces: Sequence[_Piece]) -> list[tuple[_Piece, _Piece]]:
    """Take out messages whose request id an earlier one of the call has; the same ones are answered with that."""
    firsts: dict[bytes, _Piece] = {}
    twins: list[tuple[_Piece, _Piece]] = []
    for piece in pieces:
        if piece.result is not None or piece.accepted is None or piece.accepted.key is None:
            continue
        first = firsts.setdefault(piece.accepted.key.key_hash, piece)
        if first is piece:
            continue
        if first.outgoing.fingerprint == piece.outgoing.fingerprint:
            twins.append((piece, first))
            piece.accepted, piece.takes = None, ()
        else:
            piece.result = _reused(piece)
    return twins


def _repeated(piece: _Piece, known: KnownKey) -> Result:
    if piece.accepted is None or known.content_hash != piece.outgoing.fingerprint:
        return _reused(piece)
    return Sent(format_message_id(known.message_id), len(piece.accepted.recipients), is_repeated=True)


def _reused(piece: _Piece) -> InvalidArgumentError:
    path = f"{piece.outgoing.where.rpartition('message')[0]}request_id"
    return invalid(path, "was used for another message", Reason.REQUEST_ID_REUSED)


def _limited(denied: Denied) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        Reason.LIMIT_EXHAUSTED,
        f"a limit is reached; try again in {denied.wait_s:.1f} s",
        retry_after_s=denied.wait_s,
        subject=denied.key,
    )
