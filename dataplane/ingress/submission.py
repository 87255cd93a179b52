"""The use case of submission: who may send what, and making an accepted message durable before it is answered.

Contract. A `Submitter` is one connection's policy: it fills `session_contract.Policy` from memory, with the
configuration pinned at MAIL until the transaction ends, and looks at denials anew at every MAIL. Beyond that:

    login        same reply, same work for an unknown account, a wrong secret and a revoked credential; who has the
                 right secret is told of a suspension, which passes, and guesses nothing, so that it counts as no guess
    ask, permit  what must be asked before the content comes: room now, token buckets from the limiter; what was granted
                 for a message that is refused, or does not come, is given back
    spill        a content that gets too large for memory: checks its header, which has come by then, and begins a file
    accept       checks the content, builds the envelope, and lets the spool commit it; `answer` is called once, with
                 250 after the commit or with the refusal, whether or not the client is still there

A message with an `Idempotency-Key` loses that field, and may be answered without being stored (`idempotency`). What is
to be held (RFC 4865) is committed as `scheduled`, due at its time, and kept by the spool alone; a time that is past by
then is none.

Each recipient is counted as content in memory: from its 250 until the transaction ends, is dropped, or is committed.

The commit belongs to the spool: nothing here cancels it. A fault of ours is a 4xx, never a 5xx.

    checks at MAIL, in order            refusal
    configuration too old               451 4.3.2
    account or credential suspended     451 4.7.1: it passes
    account or credential revoked, gone 550 5.7.1
    REPLICATED, and there is no lease   451 4.3.0: PostgreSQL is away, or the control plane
    sender's domain not the account's   553 5.7.1; the null sender is everybody's, it marks bounces

At the end of the content an account that was deleted meanwhile and made anew under its name is refused as one that is
gone is at MAIL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from dataplane.core import replies
from dataplane.core.address import Mailbox
from dataplane.core.config import NodeSettings, Target
from dataplane.core.datetimes import format_date_time
from dataplane.core.envelope import (
    COMMITTING_BYTES,
    MESSAGE_BYTES,
    Envelope,
    RecipientRow,
    make_queue_key,
    recipient_bytes,
)
from dataplane.core.headers import HeaderScan, Receipt, format_date, head_of, prepare, received_line, scan, without_key
from dataplane.core.idempotency import SubmissionHash, SubmissionKey, hash_key
from dataplane.core.ids import MessageId, format_message_id, new_message_id
from dataplane.core.limits import counting_key
from dataplane.core.policy import CompiledAccount, denied, is_suspended, secret_matches, split_username
from dataplane.core.queue import State
from dataplane.core.replies import Reply
from dataplane.core.routing import MessageRouter, may_match
from dataplane.core.session_contract import MAX_HOLD_S, MailParameters
from dataplane.failpoints import failpoint
from dataplane.ingress.admission import Admission
from dataplane.ingress.buckets import IngressLimits, MessageLimits, Permit
from dataplane.ingress.counters import IngressCounters
from dataplane.ingress.idempotency import Submissions
from dataplane.ingress.turnstile import Turnstile
from dataplane.ports import (
    Clock,
    ConfigView,
    EventLog,
    Grant,
    Handover,
    Incoming,
    Limiter,
    ReplicatedQueue,
    Spool,
    SpoolError,
    SpoolFullError,
    Take,
)

Answer = Callable[[Reply], None]
_RANDOM_OCTETS = 10
_STORED = 250
# Above this a content goes to its file; by then the header is there as far as `headers.scan` looks.
SPILL_BYTES = 512 * 1024
# Above this while memory is short: such a content ends in a file anyway.
LEAST_SPILL_BYTES = 64 * 1024
# Above this 250 is held back; half of what the settings allow in all.
DELAY_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Submission:
    """What all submitters of a worker share. `random` gives that many random octets.

    `keyed` takes care of messages with an `Idempotency-Key`; `halted`: `spool` is refused, and nothing is stored in it.
    """

    config: ConfigView
    spool: Spool
    limiter: Limiter
    handover: Handover
    clock: Clock
    log: EventLog
    admission: Admission
    counters: IngressCounters
    hostname: str
    random: Callable[[int], bytes]
    max_content_bytes: int
    keyed: Submissions
    spill_bytes: int = SPILL_BYTES
    limits: IngressLimits = field(default_factory=IngressLimits)
    delay_bytes: int = DELAY_BYTES
    turnstile: Turnstile | None = None
    replicated: ReplicatedQueue | None = None
    halted: bool = False

    def submitter(self, address: str) -> Submitter:
        """Return the policy for a connection from this address."""
        return Submitter(self, address, self.random(8).hex())


@dataclass(slots=True)
class Hello:
    """What the session knows of its client when a message is complete."""

    helo: str
    esmtp: bool
    tls: str


@dataclass(slots=True)
class _Large:
    """A message whose content is on its way to a file."""

    incoming: Incoming
    message_id: MessageId
    scanned: HeaderScan
    header_message_id: str
    hashed: SubmissionHash | None
    body_8bit: bool = False
    received_bytes: int = 0

    def write(self, pieces: Sequence[bytes], added: bytes = b"") -> asyncio.Future[None]:
        """Append what came, behind header fields that are `added`."""
        self.body_8bit = self.body_8bit or not all(piece.isascii() for piece in pieces)
        self.received_bytes += sum(map(len, pieces))
        if self.hashed is not None:
            self.hashed.add(*pieces)
        return self.incoming.write(added, *pieces)


_NO_LIMITS = MessageLimits()
_NOTHING: dict[str, object] = {}


class Submitter:
    """Policy and use case of one connection."""

    __slots__ = (
        "_account_name",
        "_credential_name",
        "_large",
        "_limits",
        "_limits_for",
        "_network_account",
        "_parameters",
        "_permit",
        "_pinned",
        "_recipient_bytes",
        "_recipients",
        "_replicated",
        "_sender",
        "_shared",
        "address",
        "session_id",
    )

    def __init__(self, shared: Submission, address: str, session_id: str) -> None:
        self._shared = shared
        self.address = address
        self.session_id = session_id
        self._network_account = shared.config.account_of_network(address) or ""
        self._account_name = self._network_account
        self._credential_name = ""
        self._pinned: CompiledAccount | None = None
        self._replicated = False  # whether the transaction's mail is PostgreSQL's
        self._sender = ""
        self._parameters = MailParameters()
        self._recipients: list[str] = []
        self._recipient_bytes = 0
        self._large: _Large | None = None
        self._limits = _NO_LIMITS
        self._limits_for: tuple[NodeSettings | None, CompiledAccount | None] = (None, None)
        self._permit: Permit | None = None

    @property
    def account_name(self) -> str:
        """Whose mail the next transaction is; empty before AUTH."""
        return self._account_name

    @property
    def bound_by_network(self) -> bool:
        """Whether the client may send without AUTH."""
        return bool(self._network_account)

    # --- session_contract.Policy ---------------------------------------------------------------------------------

    def authenticate(self, username: str, secret: str) -> Reply | None:
        """Decide about a login; every refusal takes the same way."""
        shared = self._shared
        now = shared.clock.monotonic()
        if shared.admission.auth_throttled(self.address, now):
            shared.counters.auth_throttled += 1
            return replies.AUTH_THROTTLED
        account_name, credential_name = split_username(username)
        compiled = shared.config.account(account_name)
        credential = compiled.credential(credential_name) if compiled is not None else None
        now_ms = shared.clock.wall_ms()
        matches = secret_matches(credential, secret, now_ms)
        denial = denied(shared.config.denials, account_name, credential_name, now_ms)
        if matches and denial is None:
            self._account_name, self._credential_name = account_name, credential_name
            self._limits_for = (None, None)
            shared.counters.auth_succeeded += 1
            return None
        shared.counters.auth_failed += 1
        shared.log.info("auth.failed", session=self.session_id, address=self.address)
        if matches and is_suspended(shared.config.denials, account_name, credential_name, now_ms):
            return replies.AUTH_SUSPENDED
        shared.admission.note_auth_failure(self.address, now)
        # Without a configuration to be sure of, a refusal for good would be a fault of ours told as theirs.
        return replies.AUTH_UNKNOWABLE if shared.config.stale else replies.AUTH_FAILED

    def mail(self, sender: Mailbox | None, parameters: MailParameters) -> Reply | None:
        """Decide about a sender by the configuration of this moment, and pin it."""
        shared = self._shared
        if shared.halted:
            return replies.SPOOL_REFUSED
        if shared.config.stale:
            return replies.CONFIG_STALE
        compiled = self._account_now()
        if compiled is None:
            return self._denial()
        if compiled.account.replicated and not self._lease():
            return replies.REPLICATION_UNAVAILABLE
        if sender is not None and not compiled.owns_sender_domain(sender.domain):
            return replies.SENDER_NOT_OWNED
        self._pinned = compiled
        self._replicated = compiled.account.replicated
        self._sender = "" if sender is None else sender.text
        self._parameters = parameters
        return None

    def latest_release_ms(self) -> int:
        """As far ahead of this moment as mail may be held."""
        return self._shared.clock.wall_ms() + MAX_HOLD_S * 1000

    def recipient(self, address: Mailbox) -> Reply | None:
        """Decide about a recipient: some rule must be able to match, and there must be memory to keep it."""
        text = address.text
        if not may_match(self._account().rules, self._sender, text):
            return replies.NO_ROUTE
        shared = self._shared
        size_bytes = recipient_bytes(text)
        if shared.counters.content_bytes + size_bytes > shared.max_content_bytes:
            return replies.OVERLOADED
        shared.counters.content_bytes += size_bytes
        self._recipient_bytes += size_bytes
        self._recipients.append(text)
        return None

    def reset(self) -> None:
        """Forget the transaction."""
        self._pinned = None
        self._sender = ""
        if self._recipients or self._large is not None or self._permit is not None:
            self.drop()

    def forget(self) -> None:
        """Forget the login as well; what the client's network says stays."""
        self.reset()
        self._account_name, self._credential_name = self._network_account, ""
        self._limits_for = (None, None)

    def failed(self, error: Exception) -> str:
        """Log a fault of ours under a reference that the client is told."""
        reference = self._shared.random(4).hex()
        self._shared.log.warning(
            "session.failed",
            session=self.session_id,
            reference=reference,
            error=type(error).__name__,
            exc_info=error,
        )
        return reference

    # --- before the content --------------------------------------------------------------------------------------

    def refusal_before_data(self, declared_bytes: int) -> Reply | None:
        """Return why content of this size cannot come now, from memory."""
        shared = self._shared
        if shared.counters.content_bytes + min(declared_bytes, shared.spill_bytes) > shared.max_content_bytes:
            return replies.OVERLOADED
        return None if shared.spool.has_room(declared_bytes) else replies.STORAGE_FULL

    def takes(self) -> tuple[Take, ...]:
        """Return what the limiter must be asked for this message."""
        settings, pinned = self._shared.config.settings, self._account()
        limits_for = self._limits_for
        if limits_for[0] is not settings or limits_for[1] is not pinned:
            self._limits = self._shared.limits.of_message(
                settings,
                pinned,
                self._credential_name,
                counting_key(self.address),
                listed=bool(self._network_account),
            )
            self._limits_for = (settings, pinned)
        return self._limits.takes(len(self._recipients), self._parameters.size_bytes)

    def ask(self, takes: tuple[Take, ...]) -> asyncio.Future[Grant]:
        """Ask the limiter; `permit` takes its answer."""
        return self._shared.limiter.ask(takes)

    def permit(self, takes: tuple[Take, ...], grant: Grant) -> Reply | None:
        """Return the refusal, or keep what was granted until the message is stored or given up."""
        if grant.allowed:
            per_byte = len(self._limits.per_byte)
            self._permit = Permit(takes, takes[-per_byte:] if per_byte else ())
            return None
        self._shared.log.info(
            "message.limited", session=self.session_id, account=self._account_name, bucket=grant.refused_key
        )
        return replies.rate_limited(grant.wait_s)

    def give_back(self) -> None:
        """The message that was permitted does not come."""
        permit, self._permit = self._permit, None
        if permit is not None:
            self._shared.limiter.refund(permit.takes)

    def _settle(self, permit: Permit, size_bytes: int, answer: Answer, reply: Reply) -> None:
        """A permitted message was stored, refused, or had been stored before."""
        if reply.code != _STORED or reply.reason == replies.REPEATED:
            self._shared.limiter.refund(permit.takes)
        elif permit.byte_takes:
            self._shared.limiter.refund(permit.difference(size_bytes))
        answer(reply)

    # --- the content ---------------------------------------------------------------------------------------------

    def spill(self, pieces: Sequence[bytes], hello: Hello) -> asyncio.Future[None] | Reply:
        """Put what came of a large content into its file; done when its memory is free, or the refusal.

        The first time there must be more than `headers.MAX_HEADER_BYTES` of it.
        """
        large = self._large
        if large is not None:
            return large.write(pieces)
        scanned = scan(head_of(pieces))
        refusal = self._content_refusal(scanned)
        if refusal is not None:
            self._shared.counters.messages_refused += 1
            return refusal
        now_ms = self._shared.clock.wall_ms()
        message_id = new_message_id(now_ms, self._shared.random(_RANDOM_OCTETS))
        added, header_message_id = self._complete(b"", scanned, hello, now_ms, format_message_id(message_id))
        hashed = SubmissionHash(self._sender, self._recipients) if scanned.idempotency_key else None
        shared = self._shared
        owner = shared.replicated if self._replicated and shared.replicated is not None else shared.spool
        incoming = owner.receive(message_id)
        large = self._large = _Large(incoming, message_id, scanned, header_message_id, hashed)
        if hashed is not None:
            whole = b"".join(pieces)
            pieces = [without_key(whole, scanned)]
            # The octets of the field came as well.
            large.received_bytes = len(whole) - len(pieces[0])
        return large.write(pieces, added)

    def drop(self) -> None:
        """Forget recipients and what `spill` has put into a file, and give back what was counted and granted."""
        if self._recipients:
            self._recipients = []
            self._shared.counters.content_bytes -= self._recipient_bytes
            self._recipient_bytes = 0
        large, self._large = self._large, None
        if large is not None:
            large.incoming.discard()
        if self._permit is not None:
            self.give_back()

    def accept(self, content: bytes, hello: Hello, answer: Answer) -> None:
        """Check the message and store it; `answer` is called once, at once or after the commit.

        After `spill`, `content` is what came since.
        """
        permit, self._permit = self._permit, None
        if permit is not None:
            spilled_bytes = self._large.received_bytes if self._large is not None else 0
            answer = partial(self._settle, permit, spilled_bytes + len(content), answer)
        try:
            self._accept(content, hello, answer)
        except Exception:
            # Whoever called answers for it, and knows nothing of what was granted.
            self._permit = permit
            raise

    def _accept(self, content: bytes, hello: Hello, answer: Answer) -> None:
        if self._is_former():
            self._shared.counters.messages_refused += 1
            answer(replies.SENDER_DENIED)
            return
        if self._large is not None:
            self._accept_large(self._large, content, hello, answer)
            return
        scanned = scan(content)
        refusal = self._content_refusal(scanned)
        if refusal is not None:
            self._shared.counters.messages_refused += 1
            answer(refusal)
            return
        key = None
        if scanned.idempotency_key:
            content = without_key(content, scanned)
            hashed = SubmissionHash(self._sender, self._recipients)
            hashed.add(content)
            key = self._key(scanned, hashed)
            if self._is_answered(key, answer):
                return
        self._store(content, scanned, hello, answer, key)

    def _key(self, scanned: HeaderScan, hashed: SubmissionHash) -> SubmissionKey:
        return SubmissionKey(hash_key(self._account().account.uid, scanned.idempotency_key), hashed.digest())

    def _is_answered(self, key: SubmissionKey, answer: Answer) -> bool:
        """Whether there was nothing to store, and the client has its answer."""
        try:
            reply = self._shared.keyed.known(key, self._account_name, self.session_id)
        except SpoolError as error:
            reply = self.storage_refusal(error)
        if reply is None:
            return False
        self._shared.counters.messages_refused += reply is replies.KEY_TAKEN
        answer(reply)
        return True

    def _content_refusal(self, scanned: HeaderScan) -> Reply | None:
        if scanned.problem is not None:
            return replies.bad_headers(*scanned.problem)
        if not self._account().owns_sender_domains(scanned.author_domains):
            return replies.FROM_NOT_OWNED
        return None

    def _store(
        self, content: bytes, scanned: HeaderScan, hello: Hello, answer: Answer, key: SubmissionKey | None
    ) -> None:
        shared = self._shared
        now_ms = shared.clock.wall_ms()
        message_id = new_message_id(now_ms, shared.random(_RANDOM_OCTETS))
        identifier = format_message_id(message_id)
        stored, header_message_id = self._complete(content, scanned, hello, now_ms, identifier)
        envelope = self._envelope(
            message_id, len(stored), scanned, header_message_id, hello, now_ms, key, body_8bit=not content.isascii()
        )
        keys = self._queue_keys(envelope)
        if not any(keys):
            shared.counters.messages_refused += 1
            answer(replies.NO_ROUTE)
            return
        owner: Spool | ReplicatedQueue = shared.spool
        if self._replicated:
            if not envelope.epoch or shared.replicated is None:
                answer(replies.REPLICATION_UNAVAILABLE)
                return
            owner = shared.replicated
        rows, handed_over = self._rows(keys, envelope)
        handed_content = stored if handed_over else b""
        if key is not None:
            write = partial(owner.accept, content=stored, recipients=rows)
            self._store_once(envelope, key, write, handed_content, rows, answer)
            return
        failpoint("accept.received")
        future = owner.accept(envelope, stored, rows)
        future.add_done_callback(
            partial(self._stored, envelope, identifier, handed_content, rows, self._part_with_recipients(), answer)
        )

    def _accept_large(self, large: _Large, content: bytes, hello: Hello, answer: Answer) -> None:
        """Store a message whose content is in its file but for the last piece; it is delivered from there."""
        shared = self._shared
        if content:
            # Should this write fail, accepting fails with it.
            large.write([content]).add_done_callback(asyncio.Future.exception)
        key = None
        if large.hashed is not None:
            key = self._key(large.scanned, large.hashed)
            if self._is_answered(key, answer):
                return
        envelope = self._envelope(
            large.message_id,
            large.incoming.size_bytes,
            large.scanned,
            large.header_message_id,
            hello,
            shared.clock.wall_ms(),
            key,
            body_8bit=large.body_8bit,
        )
        keys = self._queue_keys(envelope)
        if not any(keys):
            shared.counters.messages_refused += 1
            answer(replies.NO_ROUTE)
            return
        if self._replicated and not envelope.epoch:
            answer(replies.REPLICATION_UNAVAILABLE)
            return
        rows, _ = self._rows(keys, envelope, in_memory=False)
        self._large = None
        if key is not None:
            write = partial(large.incoming.accept, recipients=rows)
            self._store_once(envelope, key, write, b"", rows, answer, large.incoming.discard)
            return
        failpoint("accept.received")
        future = large.incoming.accept(envelope, rows)
        identifier = format_message_id(large.message_id)
        future.add_done_callback(
            partial(self._stored, envelope, identifier, b"", rows, self._part_with_recipients(), answer)
        )

    def _store_once(
        self,
        envelope: Envelope,
        key: SubmissionKey,
        write: Callable[[Envelope], asyncio.Future[None]],
        content: bytes,
        rows: list[RecipientRow],
        answer: Answer,
        discard: Callable[[], None] = lambda: None,
    ) -> None:
        """Store a message when its key is free. Whoever leaves meanwhile leaves it as it is."""
        shared, counted_bytes = self._shared, self._part_with_recipients()

        def go_on(claimed: Envelope | Reply) -> None:
            if isinstance(claimed, Reply):
                shared.counters.content_bytes -= counted_bytes
                shared.counters.messages_refused += claimed is replies.KEY_TAKEN
                discard()
                answer(claimed)
                return
            failpoint("accept.received")
            identifier = format_message_id(claimed.message_id)
            stored = partial(self._stored, claimed, identifier, content, rows, counted_bytes, answer)
            try:
                future = write(claimed)
            except Exception as fault:  # noqa: BLE001 - nobody else answers for it any more
                future = asyncio.get_running_loop().create_future()
                future.set_exception(fault)
                discard()
            future.add_done_callback(stored)

        shared.keyed.claim(envelope, key, go_on)

    def _envelope(
        self,
        message_id: MessageId,
        size_bytes: int,
        scanned: HeaderScan,
        header_message_id: str,
        hello: Hello,
        now_ms: int,
        key: SubmissionKey | None,
        *,
        body_8bit: bool,
    ) -> Envelope:
        return Envelope(
            message_id=message_id,
            account=self._account_name,
            account_uid=self._account().account.uid,
            credential=self._credential_name,
            sender=self._sender,
            size_bytes=size_bytes,
            accepted_ms=now_ms,
            session=self.session_id,
            client_address=self.address,
            client_helo=hello.helo,
            client_tls=hello.tls,
            header_message_id=header_message_id,
            subject=scanned.subject,
            smtputf8=self._parameters.smtputf8,
            body_8bit=self._parameters.body_8bit or body_8bit,
            headers=scanned.rule_values,
            submission_key=key,
            send_time_ms=self._send_time_ms(now_ms),
            priority=self._parameters.priority,
            epoch=self._lease() if self._replicated else 0,
        )

    def _send_time_ms(self, now_ms: int) -> int:
        parameters = self._parameters
        if parameters.hold_for_s:
            return now_ms + parameters.hold_for_s * 1000
        return parameters.hold_until_ms if parameters.hold_until_ms > now_ms else 0

    def _complete(
        self, content: bytes, scanned: HeaderScan, hello: Hello, now_ms: int, identifier: str
    ) -> tuple[bytes, str]:
        """Return the content with the headers that are added, and the value of its Message-ID."""
        hostname = self._shared.hostname
        date = format_date(now_ms)
        receipt = Receipt(
            helo=hello.helo,
            client_address=self.address,
            hostname=hostname,
            protocol=self._protocol(hello),
            message_id=identifier,
            date=date,
            recipient=self._recipients[0] if len(self._recipients) == 1 else "",
            tls=hello.tls,
            priority=self._parameters.priority,
        )
        made_up = f"<{identifier}@{hostname}>"
        stored = prepare(content, scanned, received_line(receipt), date, made_up)
        return stored, scanned.message_id if scanned.has_message_id else made_up

    def _protocol(self, hello: Hello) -> str:
        """RFC 3848 and RFC 6531, section 4.3."""
        if not hello.esmtp:
            return "SMTP"
        suffix = ("S" if hello.tls else "") + ("A" if self._credential_name else "")
        return ("UTF8SMTP" if self._parameters.smtputf8 else "ESMTP") + suffix

    def _queue_keys(self, envelope: Envelope) -> list[str]:
        """Return for each recipient the provider that it waits for, empty where no rule matches."""
        router = MessageRouter(
            self._account().rules, envelope.sender, envelope.size_bytes, envelope.headers, envelope.message_id
        )
        hops = []
        for recipient in self._recipients:
            decision = router.route(recipient)
            hops.append("" if decision is None else self._next_hop(decision.targets))
        return hops

    def _next_hop(self, targets: Sequence[Target]) -> str:
        if len(targets) < 2:
            return targets[0].provider if targets else ""
        return self._shared.handover.next_hop(self._account_name, targets)

    def _rows(self, hops: list[str], envelope: Envelope, *, in_memory: bool = True) -> tuple[list[RecipientRow], bool]:
        """Return the recipients as they are committed, and whether delivery takes them from memory.

        All or none: rows that are handed over are committed as `sending`, and one record tells of the message.
        """
        account, priority = envelope.account, envelope.priority
        keys = {hop: make_queue_key(account, hop, priority) for hop in hops}
        admit = self._shared.handover.admit
        held_bytes = MESSAGE_BYTES + envelope.size_bytes + self._recipient_bytes
        in_memory = in_memory and not envelope.send_time_ms
        handed_over = in_memory and all(admit(held_bytes, key) for key in keys.values())
        state, attempt = (State.SENDING, 1) if handed_over else (State.QUEUED, 0)
        if envelope.send_time_ms:
            state = State.SCHEDULED
        due_ms = envelope.released_ms
        rows = [
            RecipientRow(index, address, state, attempt, due_ms, priority, keys[hop])
            for index, (address, hop) in enumerate(zip(self._recipients, hops, strict=True))
        ]
        return rows, handed_over

    def _part_with_recipients(self) -> int:
        """Leave the recipients to the commit, and return what they count until its end, whoever still waits for it."""
        added_bytes = COMMITTING_BYTES * len(self._recipients)
        self._shared.counters.content_bytes += added_bytes
        size_bytes, self._recipient_bytes = self._recipient_bytes + added_bytes, 0
        self._recipients = []
        return size_bytes

    def _stored(
        self,
        envelope: Envelope,
        identifier: str,
        content: bytes,
        rows: list[RecipientRow],
        counted_bytes: int,
        answer: Answer,
        future: asyncio.Future[None],
    ) -> None:
        """The commit is over: hand the message on and answer. Runs without the client too."""
        shared = self._shared
        shared.counters.content_bytes -= counted_bytes
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        key = envelope.submission_key
        reply = shared.keyed.ended(envelope, key, error) if key is not None else None
        if error is not None:
            shared.counters.messages_refused += reply is replies.KEY_TAKEN
            answer(reply or self.storage_refusal(error))
            return
        failpoint("accept.stored")
        shared.counters.messages_enqueued += 1
        try:
            if rows[0].state is State.SENDING:
                shared.handover.deliver(envelope, content, rows)
            elif not envelope.epoch:
                shared.handover.queued(envelope, rows)
        except Exception as fault:  # noqa: BLE001 - it is stored: whatever delivery does, 250 is the truth
            self.failed(fault)
        shared.log.info(
            "message.accepted",
            session=envelope.session,
            message=identifier,
            account=envelope.account,
            credential=envelope.credential,
            recipients=len(rows),
            size_bytes=envelope.size_bytes,
            **_asked_for(envelope),
        )
        once = key is not None and key.checked
        answer(replies.queued(identifier, replies.QUEUED_ONCE if once else replies.QUEUED))
        failpoint("accept.answered")

    def storage_refusal(self, error: BaseException) -> Reply:
        """Return what a client is told of a write that failed."""
        if isinstance(error, SpoolFullError):
            return replies.STORAGE_FULL
        if isinstance(error, SpoolError):
            self._shared.log.warning("message.not_stored", session=self.session_id, error=str(error))
            return replies.STORAGE_FAILED
        reported = error if isinstance(error, Exception) else RuntimeError("the commit was cancelled")
        return replies.internal_error(self.failed(reported))

    # --- the account ---------------------------------------------------------------------------------------------

    def _account(self) -> CompiledAccount:
        """Return the account pinned at MAIL."""
        if self._pinned is None:
            raise RuntimeError("no transaction")
        return self._pinned

    def _is_former(self) -> bool:
        """Whether another account has the name of the pinned one by now: it must not be shown what is not its own."""
        present = self._shared.config.account(self._account_name)
        return present is not None and present.account.uid != self._account().account.uid

    def _lease(self) -> int:
        """The lease under which REPLICATED mail may be taken now, 0 for none."""
        queue = self._shared.replicated
        return queue.epoch if queue is not None else 0

    def _denial(self) -> Reply:
        """Why this client may not send now."""
        shared = self._shared
        denials, now_ms = shared.config.denials, shared.clock.wall_ms()
        suspended = is_suspended(denials, self._account_name, self._credential_name, now_ms)
        return replies.SENDER_SUSPENDED if suspended else replies.SENDER_DENIED

    def _account_now(self) -> CompiledAccount | None:
        """Return the account if it, and what the client showed, still may send."""
        shared = self._shared
        now_ms = shared.clock.wall_ms()
        config = shared.config
        if denied(config.denials, self._account_name, self._credential_name, now_ms) is not None:
            return None
        compiled = config.account(self._account_name)
        if compiled is None:
            return None
        if not self._credential_name:
            bound = config.account_of_network(self.address) == self._account_name
            return compiled if bound else None
        credential = compiled.credential(self._credential_name)
        expired = credential is None or 0 < credential.expire_ms <= now_ms
        return None if expired else compiled


def _asked_for(envelope: Envelope) -> dict[str, object]:
    """What is logged of a message beside the usual."""
    if not (envelope.priority or envelope.send_time_ms):
        return _NOTHING
    asked: dict[str, object] = {}
    if envelope.send_time_ms:
        asked["send_time"] = format_date_time(envelope.send_time_ms)
    if envelope.priority:
        asked["priority"] = envelope.priority
    return asked
