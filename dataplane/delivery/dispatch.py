"""Attempts from their beginning to their settlement: offers them to targets, gives out transactions, concludes.

A message enters by `begin` with rows that are `sending` in the spool already; every attempt ends in exactly one
settlement, by `_conclude` or `_put_back`. How targets are chosen:

    target is                                   then
    unknown here, or another account's          the next one
    denied                                      the next one; if none is left: back to the queue, not an attempt
    throttled, or found dead by somebody else   the next one; if none is left: back to the queue, not an attempt
    found dead by this attempt                  the next one; if none is left: deferred
    lost before the dot, or cannot take it      the next one; if none is left: the verdict
    none left, all of them unknown              deferred, never failed

Denials are looked at once more before the first byte of MAIL: recipients whose destination is denied by then step
aside, and the rest of the attempt goes on. So is the lease of REPLICATED mail, which is looked at again before the dot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from dataplane.core.config import Denials, RetryPolicy, SmtpProvider, Target
from dataplane.core.envelope import Envelope, RecipientRow, is_pinned, make_queue_key, under_key
from dataplane.core.fair import message_cost
from dataplane.core.ids import format_message_id
from dataplane.core.ledger import AttemptEvent
from dataplane.core.policy import denied, destination_denied, is_denied
from dataplane.core.queue import EventType, State
from dataplane.core.retry import is_expired
from dataplane.core.shaping import Flow
from dataplane.core.transaction import Transaction, Verdict, VerdictKind
from dataplane.delivery.attempt import Attempt, Message
from dataplane.delivery.connection import Connection
from dataplane.delivery.connections import Job
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.outcome import Concluder, Facts, Moment, put_back
from dataplane.delivery.planning import Group, Plan, part_denied
from dataplane.delivery.pools import Pools
from dataplane.delivery.settler import Done, Settler
from dataplane.delivery.transforms import Transform, apply_transforms
from dataplane.failpoints import failpoint
from dataplane.ports import Clock, ConfigView, EventLog, Settlement

UNREACHABLE = Verdict(VerdictKind.TEMPORARY, 0, "4.4.7", "no target could be reached within the lifetime")
_NO_TARGET = Verdict(VerdictKind.TEMPORARY, 0, "4.3.5", "no target of the rule is known here")
GIVEN_BACK_MS = 30_000
DENIED_DELAY_MS = 300_000
_NEXT_TARGET = (VerdictKind.INTERRUPTED, VerdictKind.REFUSED)
_DEFAULT_RETRY = RetryPolicy()

_EVENTS: dict[EventType, tuple[str, str]] = {
    EventType.SENT: ("delivery.sent", "sent"),
    EventType.DEFERRED: ("delivery.deferred", "deferred"),
    EventType.BOUNCED: ("delivery.bounced", "bounced"),
    EventType.FAILED: ("delivery.failed", "failed"),
    EventType.EXPIRED: ("delivery.expired", "expired"),
    EventType.UNCERTAIN: ("delivery.uncertain", "uncertain"),
    EventType.INTERRUPTED: ("delivery.interrupted", "interrupted"),
}


class Follower(NamedTuple):
    """Who is told what follows: rows put back and committed, rows due later, places and memory that became free."""

    requeued: Callable[[str], None]
    expected: Callable[[str, int], None]
    place_free: Callable[[str], None]  # for read-back, of a next hop
    window_free: Callable[[], None]


class Tools(NamedTuple):
    """What a dispatcher works with."""

    config: ConfigView
    pools: Pools
    settler: Settler
    concluder: Concluder
    clock: Clock
    moment: Callable[[], Moment]
    random: Callable[[], float]
    counters: DeliveryCounters
    log: EventLog
    transforms: tuple[Transform, ...]
    holds: Callable[[int], bool]  # whether mail may be sent that is held under this lease


class Outlook(NamedTuple):
    """Whether an attempt makes sense now; `is_dead`: not, because connections to a target fail."""

    usable: bool
    is_dead: bool


class Dispatcher:
    """State: attempts live in pools; here is only what they share."""

    def __init__(self, tools: Tools) -> None:
        (
            self._config,
            self._pools,
            self._settler,
            self._concluder,
            self._clock,
            self._moment,
            self._random,
            self._counters,
            self._log,
            self._transforms,
            self._holds,
        ) = tools
        self._held_bytes: dict[str, int] = {}
        self.given_back: set[str] = set()  # accounts whose REPLICATED mail PostgreSQL has back unsent
        self.follower = Follower(_nothing, _nothing, _nothing, _nothing)
        self.stopping = False

    # --- entrance

    def hold(self, message: Message, attempt_count: int) -> None:
        """The message is in memory for that many attempts."""
        if message.open_count == 0:
            account = message.envelope.account
            self._counters.window_bytes += message.held_bytes
            self._counters.window_messages += 1
            self._held_bytes[account] = self._held_bytes.get(account, 0) + message.held_bytes
        message.open_count += attempt_count

    def held_bytes(self, account: str) -> int:
        """What messages of an account take in memory."""
        return self._held_bytes.get(account, 0)

    def holders(self) -> Iterable[str]:
        """Accounts with messages in memory."""
        return self._held_bytes

    def begin(self, message: Message, group: Group, plan: Plan, *, read_back_for: str = "") -> None:
        """Start an attempt of a message that is held; the group's rows are `sending`."""
        now = self._moment()
        envelope = message.envelope
        attempt = Attempt(
            owner=self,
            message=message,
            rows=group.rows,
            rule=group.rule,
            targets=group.targets,
            bundle_revision=plan.bundle_revision,
            queue_key=group.queue_key,
            read_back_for=read_back_for,
            account=envelope.account,
            weight=plan.weight,
            cost=message_cost(len(message.content), len(group.rows)),
            queued_ms=max(0, now.steady_ms - group.rows[0].due_ms) if read_back_for else 0,
            begun_s=self._clock.monotonic(),
            priority=envelope.priority,
        )
        self.offer(attempt)

    def conclude(
        self,
        message: Message,
        ends: Sequence[tuple[RecipientRow, Verdict]],
        bundle_revision: int,
        moment: Moment,
        done: Done | None = None,
    ) -> None:
        """Settle recipients that end at this moment without an attempt: refused by the plan, or past their lifetime."""
        self._conclude(message, ends, Facts(bundle_revision=bundle_revision), moment, done)

    def outlook(self, targets: Sequence[Target], account: str) -> Outlook:
        """Whether one of these targets would take an attempt now. Targets that are all unknown make an attempt, too."""
        wall_ms = self._clock.wall_ms()
        known = is_dead = False
        for target in targets:
            provider = self._provider(target, account)
            if provider is None:
                continue
            known = True
            if is_denied(self._config.denials.providers, provider.name, wall_ms):
                continue
            pool = self._pools.find(provider.name)
            if pool is None or pool.usable() or pool.destination.flow is Flow.SUSPENDED:
                return Outlook(usable=True, is_dead=False)
            is_dead = True
        return Outlook(not known, is_dead)

    def next_hop(self, account: str, targets: Sequence[Target]) -> str:
        """The provider that mail for these targets waits for: the first that takes some now, else the first of all."""
        wall_ms = self._clock.wall_ms()
        for target in targets:
            provider = self._provider(target, account)
            if provider is not None and not is_denied(self._config.denials.providers, provider.name, wall_ms):
                pool = self._pools.find(provider.name)
                if pool is None or pool.usable():
                    return provider.name
        return targets[0].provider

    # --- attempts.Owner

    def offer(self, attempt: Attempt) -> None:
        """Give the attempt to the first usable target from its place on, or end it."""
        if self.stopping:
            self.put_back(attempt)
            return
        account = attempt.message.envelope.account
        wall_ms = self._clock.wall_ms()
        while attempt.place < len(attempt.targets):
            provider = self._provider(attempt.targets[attempt.place], account)
            if provider is not None:
                if self._is_stopped(provider, wall_ms):
                    attempt.waits = True
                else:
                    pool = self._pools.get(provider)
                    if pool.usable():
                        attempt.provider = provider.name
                        pool.submit(attempt, accepted_now=not attempt.read_back_for)
                        return
                    attempt.waits = True
            attempt.place += 1
        self._end_without_target(attempt)

    def prepare(self, attempt: Attempt, connection: Connection) -> Transaction | None:
        """See `connections.Job`."""
        envelope = attempt.message.envelope
        epoch = envelope.epoch
        if epoch and not self._holds(epoch):
            self.put_back(attempt)
            return None
        wall_ms = self._clock.wall_ms()
        denials = self._config.denials
        if denied(denials, envelope.account, envelope.credential, wall_ms, accepted_ms=envelope.accepted_ms):
            self.put_back(attempt)
            return None
        if is_denied(denials.providers, attempt.provider, wall_ms):
            attempt.waits = True
            attempt.place += 1
            self.offer(attempt)
            return None
        if denials.destinations and not self._part(attempt, denials, wall_ms):
            return None
        attempt.sending_s = self._clock.monotonic()
        attempt.remote_host = connection.remote_host
        attempt.connecting_ms = connection.connecting_ms if connection.transaction_count == 0 else 0
        return Transaction(
            envelope.sender,
            tuple([row.address for row in attempt.rows]),
            apply_transforms(self._transforms, envelope, attempt.message.content),
            envelope.smtputf8,
            envelope.body_8bit,
            # Nothing has touched the content since its line ends were looked at.
            verified=attempt.message.canonical and not self._transforms,
            priority=envelope.priority,
            permit=partial(self._holds, epoch) if epoch else None,
        )

    def done(self, attempt: Attempt, connection: Connection, verdicts: tuple[Verdict, ...]) -> None:
        """See `connections.Job`."""
        kind = verdicts[0].kind
        if kind in _NEXT_TARGET and all(verdict.kind is kind for verdict in verdicts):
            if self.is_denied(attempt):
                self.put_back(attempt)
                return
            if attempt.place + 1 < len(attempt.targets) and not self.stopping:
                attempt.failure = verdicts[0]
                attempt.probed = True
                attempt.place += 1
                self.offer(attempt)
                return
        rows = attempt.rows
        if attempt.place > 0 and not is_pinned(attempt.queue_key):
            # What this target put off waits for it, not behind everything that waits for a dead one before it.
            rows = under_key(rows, make_queue_key(attempt.message.envelope.account, attempt.provider, attempt.priority))
        self._end(attempt, list(zip(rows, verdicts, strict=True)), connection.tls)

    # --- ends

    def is_denied(self, job: Job) -> bool:
        """Whether a denial, or the end of the lease that holds it, stops this attempt now."""
        if not isinstance(job, Attempt):
            return False
        envelope, denials, wall_ms = job.message.envelope, self._config.denials, self._clock.wall_ms()
        if envelope.epoch and not self._holds(envelope.epoch):
            return True
        found = denied(
            denials,
            envelope.account,
            envelope.credential,
            wall_ms,
            provider=job.provider,
            accepted_ms=envelope.accepted_ms,
        )
        if found is not None:
            return True
        return any(destination_denied(denials, envelope.account, row.address, wall_ms) for row in job.rows)

    def _part(self, attempt: Attempt, denials: Denials, wall_ms: int) -> bool:
        """Take recipients whose destination is denied out of the attempt; False when none is left of it."""
        waiting, others = part_denied(denials, attempt.account, attempt.rows, wall_ms)
        if waiting:
            attempt.rows = tuple(others)
            self.step_aside(attempt.message, waiting)
        if not others:
            self._release(attempt)
        return bool(others)

    def put_back(self, attempt: Attempt) -> None:
        """Return the recipients to the queue: this was no attempt."""
        queue_key = attempt.queue_key
        self._counters.put_back += len(attempt.rows)
        settlement = self._returned(attempt.message, attempt.rows)
        self._settler.settle(settlement, lambda _: self.follower.requeued(queue_key))
        self._release(attempt)

    def put_back_rows(self, message: Message, rows: Sequence[RecipientRow]) -> None:
        """The same for recipients that no attempt was made for."""
        self._put_back(rows, self._returned(message, rows))

    def step_aside(self, message: Message, rows: Sequence[RecipientRow]) -> None:
        """The same for recipients whose destination is denied; the rest of their account's mail goes on."""
        moment = self._moment()
        if message.envelope.epoch:
            settlement = self._concluder.give_back(message, rows, moment.wall_ms + DENIED_DELAY_MS, moment)
        else:
            # When its turn comes it is looked at, and remembered.
            settlement = put_back(message, rows, moment.steady_ms)
        self._put_back(rows, settlement)

    def _put_back(self, rows: Sequence[RecipientRow], settlement: Settlement) -> None:
        self._counters.put_back += len(rows)
        queue_keys = {row.queue_key for row in rows}

        def requeued(_: int) -> None:
            for queue_key in queue_keys:
                self.follower.requeued(queue_key)

        self._settler.settle(settlement, requeued)

    def _returned(self, message: Message, rows: Sequence[RecipientRow]) -> Settlement:
        moment = self._moment()
        if not message.envelope.epoch:
            return put_back(message, rows, moment.steady_ms)
        # What could not be sent here is not asked for again at once; what a drain gives up is there for others.
        self.given_back.add(message.envelope.account)
        delay_ms = 0 if self.stopping else int(GIVEN_BACK_MS * (0.5 + self._random() / 2))
        return self._concluder.give_back(message, rows, moment.wall_ms + delay_ms, moment)

    def _end_without_target(self, attempt: Attempt) -> None:
        if attempt.probed and attempt.failure is not None:
            failure = attempt.failure
        elif attempt.waits and attempt.message.envelope.epoch and self.outlived(attempt.message.envelope):
            # LOCAL mail is looked at when its turn comes; of this nobody else asks how old it is.
            failure = UNREACHABLE
        elif attempt.waits:
            self.put_back(attempt)
            return
        else:
            failure = _NO_TARGET
        self._end(attempt, [(row, failure) for row in attempt.rows], "")

    def _end(self, attempt: Attempt, ends: Sequence[tuple[RecipientRow, Verdict]], tls: str) -> None:
        now_s = self._clock.monotonic()
        sent_s = attempt.sending_s or now_s
        facts = Facts(
            attempt.bundle_revision,
            attempt.rule,
            attempt.provider,
            attempt.remote_host,
            tls,
            attempt.queued_ms,
            max(0, int((sent_s - attempt.begun_s) * 1000) - attempt.connecting_ms),
            attempt.connecting_ms,
            int((now_s - sent_s) * 1000),
        )
        self._count_stages(facts, transferred=attempt.sending_s > 0)
        self._conclude(attempt.message, ends, facts, self._moment())
        self._release(attempt)

    def _count_stages(self, facts: Facts, *, transferred: bool) -> None:
        counters = self._counters
        counters.waiting_seconds.observe(facts.waiting_ms / 1000)
        if facts.connecting_ms:
            counters.connecting_seconds.observe(facts.connecting_ms / 1000)
        if transferred:
            counters.transferring_seconds.observe(facts.transferring_ms / 1000)

    def _conclude(
        self,
        message: Message,
        ends: Sequence[tuple[RecipientRow, Verdict]],
        facts: Facts,
        moment: Moment,
        done: Done | None = None,
    ) -> None:
        envelope = message.envelope
        conclusion = self._concluder.conclude(message, ends, facts, self.retry_policy(envelope), moment, self._random())
        failpoint("delivery.concluded")
        self._settler.settle(conclusion.settlement, done)
        lifetime_s = max(0, moment.wall_ms - envelope.released_ms) / 1000
        for change in conclusion.settlement.changes:
            if change.state is State.DEFERRED:
                self.follower.expected(change.queue_key, change.due_ms)
            elif change.state is not State.CANCELLED:  # that one waits in PostgreSQL
                self._counters.lifetime_seconds.observe(lifetime_s)
        for event in conclusion.events:
            self._tell(envelope, event)

    def outlived(self, envelope: Envelope) -> bool:
        """Whether the message's lifetime is over."""
        moment = self._moment()
        return is_expired(self.retry_policy(envelope), envelope.released_ms, moment.wall_ms, moment.steady_ms)

    def retry_policy(self, envelope: Envelope) -> RetryPolicy:
        """The account's retry policy of this moment."""
        compiled = self._config.account(envelope.account)
        return compiled.account.retry_policy if compiled is not None else _DEFAULT_RETRY

    def _tell(self, envelope: Envelope, event: AttemptEvent) -> None:
        name, counter = _EVENTS[event.type]
        counters = self._counters
        setattr(counters, counter, getattr(counters, counter) + len(event.indexes))
        self._log.info(
            name,
            session=envelope.session,
            message=format_message_id(envelope.message_id),
            recipients=event.indexes,
            attempt=event.attempt,
            account=envelope.account,
            bundle_revision=event.bundle_revision,
            provider=event.provider,
            remote_host=event.remote_host,
            tls=event.tls,
            reply_code=event.reply_code,
            enhanced_code=event.enhanced_code,
            reply=event.reply_text,
            queued_ms=event.queued_ms,
            waiting_ms=event.waiting_ms,
            connecting_ms=event.connecting_ms,
            transferring_ms=event.transferring_ms,
        )

    def _release(self, attempt: Attempt) -> None:
        self.let_go(attempt.message)
        if attempt.read_back_for:
            self.follower.place_free(attempt.read_back_for)

    def let_go(self, message: Message) -> None:
        """One attempt less holds the message."""
        message.open_count -= 1
        if message.open_count == 0:
            account = message.envelope.account
            self._counters.window_bytes -= message.held_bytes
            self._counters.window_messages -= 1
            left = self._held_bytes.get(account, 0) - message.held_bytes
            if left:
                self._held_bytes[account] = left
            else:
                self._held_bytes.pop(account, None)
            message.content = b""
            self.follower.window_free()

    # --- targets

    def _provider(self, target: Target, account: str) -> SmtpProvider | None:
        """The target's provider, unless it is unknown or belongs to another account."""
        provider = self._config.provider(target.provider)
        if provider is not None and provider.account in ("", account):
            return provider
        return None

    def _is_stopped(self, provider: SmtpProvider, wall_ms: int) -> bool:
        """Whether the provider is denied; brings its pool in line with that."""
        stopped = is_denied(self._config.denials.providers, provider.name, wall_ms)
        pool = self._pools.find(provider.name)
        if pool is not None and stopped is not (pool.destination.flow is Flow.SUSPENDED):
            if stopped:
                pool.destination.suspend()
                pool.retire()
            else:
                pool.destination.resume()
        return stopped

    def follow_denials(self) -> None:
        """Denials changed: stop and resume destinations, cut what is denied and has not been sent."""
        wall_ms = self._clock.wall_ms()
        for pool in self._pools:
            self._is_stopped(pool.provider, wall_ms)
            pool.cut(self.is_denied)


def _nothing(*_: object) -> None:
    """What nobody follows."""
