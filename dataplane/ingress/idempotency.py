"""One worker's submissions under a key: each is stored once, whoever repeats it, and however often.

Contract. `known` answers from this worker's memory and spool, without waiting; `claim` then takes the key for a
message, here and in the fleet, and goes on to store it or refuses; `ended` follows each message that went on, with the
error that kept it from being stored or None, and answers where that was its key. Between `known` and `claim` nothing
may wait.

    the key                          found by                       answer
    is being stored by this worker   memory                         451 4.7.1, 550 5.7.0 for another content
    was stored by this spool         its table                      250 with the id of then, 550 for another content
    is being stored elsewhere        Claims, PENDING                451 4.7.1
    was stored elsewhere             Claims, STORED                 250 with the id of then
    has another content elsewhere    Claims, OTHER                  550 5.7.0
    is new to all                    Claims, YES                    goes on, checked
    nobody could be asked            Claims, UNKNOWN, or no Claims  goes on, unchecked; REPLICATED mail checked
    is another's in PostgreSQL       RepeatedSubmissionError        250 with the id of then, 550 for another content

A message that is not stored gives its key free. Where nobody can know whether it was (the spool failed), the fleet's
mark stays until it ends by itself: the next start of this spool knows. REPLICATED mail is stored once whatever anybody
else knows, for PostgreSQL has the keys of all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from dataplane.core import replies
from dataplane.core.envelope import Envelope
from dataplane.core.idempotency import SubmissionKey
from dataplane.core.ids import MessageId, format_message_id
from dataplane.core.replies import Reply
from dataplane.ingress.counters import IngressCounters
from dataplane.ports import Claim, Claimed, Claims, EventLog, RepeatedSubmissionError, Spool, SpoolFailedError

GoOn = Callable[[Envelope | Reply], None]
"""Is told the envelope to store, or why nothing is stored."""


@dataclass(slots=True)
class Submissions:
    """See the module. `claims` is None where no fleet can be asked."""

    spool: Spool
    claims: Claims | None
    counters: IngressCounters
    log: EventLog
    _under_way: dict[bytes, bytes] = field(default_factory=dict)

    def known(self, key: SubmissionKey, account: str, session: str) -> Reply | None:
        """Return the answer to a submission whose key this worker knows, None for a new key. SpoolError.

        The account's name and the session are for the log.
        """
        content_hash = self._under_way.get(key.key_hash)
        if content_hash is not None:
            return self._pending() if content_hash == key.content_hash else self._conflict()
        submitted = self.spool.submitted(key.key_hash)
        if submitted is None:
            return None
        if submitted.content_hash != key.content_hash:
            return self._conflict()
        return self._repeated(submitted.message_id, account, session)

    def claim(self, envelope: Envelope, key: SubmissionKey, go_on: GoOn) -> None:
        """Take the key for the envelope's message, and go on when that is known: at once or later, in any case."""
        self._under_way[key.key_hash] = key.content_hash
        if self.claims is None:
            self._go_on(envelope, key, go_on, Claim(Claimed.UNKNOWN))
            return
        answer = self.claims.claim(key.key_hash, key.content_hash, envelope.message_id)
        answer.add_done_callback(partial(self._claimed, envelope, key, go_on))

    def ended(self, envelope: Envelope, key: SubmissionKey, error: BaseException | None) -> Reply | None:
        """The message is durable, or was not stored for `error`; the reply where another message has the key."""
        del self._under_way[key.key_hash]
        stored_id: bytes | None = None
        reply = None
        if error is None:
            stored_id = envelope.message_id
            self.counters.submissions_stored += key.checked
            self.counters.submissions_unchecked += not key.checked
        elif isinstance(error, RepeatedSubmissionError):
            if error.is_same:
                stored_id = error.message_id
                reply = self._repeated(stored_id, envelope.account, envelope.session)
            else:
                reply = self._conflict()
        if self.claims is not None:
            if stored_id is not None:
                self.claims.stored(key.key_hash, key.content_hash, MessageId(stored_id))
            elif not isinstance(error, SpoolFailedError):
                self.claims.withdraw(key.key_hash, envelope.message_id)
        return reply

    def _claimed(self, envelope: Envelope, key: SubmissionKey, go_on: GoOn, answer: asyncio.Future[Claim]) -> None:
        self._go_on(envelope, key, go_on, answer.result())

    def _go_on(self, envelope: Envelope, key: SubmissionKey, go_on: GoOn, claim: Claim) -> None:
        # The keys of REPLICATED mail are PostgreSQL's to give, when it is stored.
        if claim.state is Claimed.YES or (claim.state is Claimed.UNKNOWN and envelope.epoch):
            go_on(replace(envelope, submission_key=key._replace(checked=True)))
        elif claim.state is Claimed.UNKNOWN:
            go_on(envelope)
        else:
            del self._under_way[key.key_hash]
            go_on(self._refusal(envelope, claim))

    def _refusal(self, envelope: Envelope, claim: Claim) -> Reply:
        if claim.state is Claimed.PENDING:
            return self._pending()
        if claim.state is Claimed.STORED:
            return self._repeated(claim.message_id, envelope.account, envelope.session)
        return self._conflict()

    def _pending(self) -> Reply:
        self.counters.submissions_pending += 1
        return replies.SUBMISSION_PENDING

    def _conflict(self) -> Reply:
        self.counters.submissions_conflicting += 1
        return replies.KEY_TAKEN

    def _repeated(self, message_id: bytes, account: str, session: str) -> Reply:
        self.counters.submissions_repeated += 1
        identifier = format_message_id(message_id)
        self.log.info("message.repeated", session=session, message=identifier, account=account)
        return replies.queued(identifier, replies.REPEATED)
