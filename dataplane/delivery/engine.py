"""The delivery engine of a worker: takes accepted mail, finds its way, gives it to connections, settles the outcome.

It is what ingress sees as `ports.Handover`. A message comes in memory (`deliver`) or from the spool (`scheduler`), is
planned by the configuration of that moment (`planning`), offered to the targets of its rule and concluded
(`dispatch`), sent by a pooled connection (`connections`), and its outcome becomes one settlement (`outcome`,
`settler`).

What messages take in memory, recipients included, is bounded by the window and one message: when it is full nothing is
handed over or read back. Of the window and of a provider's line one account has its share (core/fair): what a flood has
beyond it is queued on disk and comes back by turns, while mail of others is handed on. What a denial holds back stays
in the spool, is looked at again when denials change, and once a minute; what steps aside for the rest of its queue,
every five. Mail whose lifetime is over ends also without
an attempt of its own: where its targets are known to be dead, for one failed probe stands for all that wait, and where
its credential is revoked, so that it never leaves. What a command holds waits for its release, and ends with its
lifetime (`held`). `failed` is done when the engine can go on no more; the worker must end then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from dataplane.core.config import Target
from dataplane.core.envelope import Envelope, RecipientRow, message_bytes, split_queue_key
from dataplane.core.fair import may_hold
from dataplane.core.ids import MessageId
from dataplane.core.policy import is_denied
from dataplane.core.retry import RetryClock, is_expired
from dataplane.core.transaction import Verdict, VerdictKind
from dataplane.delivery.attempt import Message
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.deadlines import Deadlines
from dataplane.delivery.dispatch import DENIED_DELAY_MS, UNREACHABLE, Dispatcher, Follower, Tools
from dataplane.delivery.held import HeldMail
from dataplane.delivery.limits import DeliveryLimits
from dataplane.delivery.outcome import Concluder, Moment, claim, claimed, released
from dataplane.delivery.planning import Group, Held, Plan, make_plan
from dataplane.delivery.pools import Pools, PoolsFollower
from dataplane.delivery.recovery import Recovery
from dataplane.delivery.reporter import Reporter
from dataplane.delivery.scheduler import Scheduler, Taken
from dataplane.delivery.settler import Done, Settler
from dataplane.delivery.transforms import NO_TRANSFORMS, Transform
from dataplane.delivery.transports.smtp import SmtpTransport
from dataplane.failpoints import failpoint
from dataplane.ports import (
    Clock,
    ConfigView,
    EventLog,
    RecipientChange,
    RecordEncoder,
    Resolver,
    Settlement,
    Spool,
    StoredMessage,
)

WINDOW_BYTES = 64 * 1024 * 1024
CONNECT_TIMEOUT_S = 30.0
# Of an account that is claimed of PostgreSQL: enough to keep connections busy, and what is claimed by a node that dies
# counts as begun.
AHEAD_BYTES = 1024 * 1024
HANDED_OVER_LIMIT = 2_000  # messages just accepted that may wait for one provider; one account has its share of them
UNROUTED_ROOM = 32  # messages under way of next hops that are unknown: they are planned anew
AHEAD = 16  # messages under way for a next hop beside those that have a connection, so that none of these idles
REFILL = 8  # places that are free before they are filled: many claims to a commit
LOOK_AGAIN_MS = 60_000
DENIED_LIMIT = 10_000  # recipients remembered; more of them are looked at again when they are due
SETTLE_GRACE_S = 5.0

_REVOKED = Verdict(VerdictKind.TEMPORARY, 0, "4.7.1", "the credential that submitted it was revoked before")


class Surroundings(NamedTuple):
    """What the engine works with. `hostname` is what EHLO says; `random` draws from [0, 1)."""

    spool: Spool
    config: ConfigView
    resolver: Resolver
    encode: RecordEncoder
    clock: Clock
    random: Callable[[], float]
    log: EventLog
    hostname: str


class DeliveryEngine:
    """`ports.Handover`, and the life of delivery in a worker.

    Engines of one worker share the `pools` of one of them, so that connections are counted once; they stop together.
    `holds` says whether REPLICATED mail that is held under a lease may be sent; without it none is.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        *,
        window_bytes: int = WINDOW_BYTES,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        transforms: tuple[Transform, ...] = NO_TRANSFORMS,
        pools: Pools | None = None,
        limits: DeliveryLimits | None = None,
        holds: Callable[[int], bool] | None = None,
    ) -> None:
        spool, config, resolver, encode, clock, random, log, hostname = surroundings
        self.counters = DeliveryCounters()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._spool = spool
        self._config = config
        self._clock = clock
        self._window_bytes = window_bytes
        self._stopping = False
        self._retry_clock = RetryClock(clock.wall_ms(), clock.monotonic())
        self._denied: dict[MessageId, tuple[RecipientRow, ...]] = {}  # longest first
        self._denied_count = 0
        self._deadlines = Deadlines(clock)
        transport = SmtpTransport(resolver, config, hostname, clock, self._deadlines, connect_timeout_s, limits)
        self._owns_pools = pools is None
        self.pools = pools or Pools(transport.open, clock, random, self.counters, log, limits=limits)
        self._under_way: dict[str, int] = {}  # messages claimed and not ended, by the next hop they waited for
        self._claiming: dict[str, int] = {}  # of these, the ones whose claim is not committed
        self._settler = Settler(spool, self.counters, log)
        concluder = Concluder(encode)
        self._reporter = Reporter(self._settler, concluder, clock, self.counters)
        self._dispatcher = Dispatcher(
            Tools(
                config,
                self.pools,
                self._settler,
                concluder,
                clock,
                self.moment,
                random,
                self.counters,
                log,
                transforms,
                holds or _holds_nothing,
            )
        )
        self._scheduler = Scheduler(spool, self, self.moment, self.counters, log)
        self._recovery = Recovery(
            spool, self._settler, concluder, self.counters, log, self.moment, random, self._dispatcher.retry_policy
        )
        self.held_mail = HeldMail(spool, encode, self.moment, self._dispatcher.retry_policy, self.counters, log)
        self._keeper: asyncio.Task[None] | None = None
        self._quiet = asyncio.Event()
        self._grace: asyncio.Timeout | None = None  # of a stop that waits
        self.on_message_left: Callable[[], None] = _nobody  # set by who yields to delivery
        self.pools.follow(PoolsFollower(self._scheduler.release, self._found_dead, self._quiet.set, self._fail))
        self._dispatcher.follower = Follower(
            self._scheduler.wake, self._scheduler.expect, self._place_free, self._window_free
        )

    # --- life

    async def start(self) -> None:
        """Recover what a former process left, then begin. SpoolError when the spool cannot be read."""
        await self.recover()
        await self.begin()

    async def recover(self) -> None:
        """Put back and record what a former process left; before anything is accepted. SpoolError as `start`."""
        await self._recovery.recover_interrupted()
        await self._recovery.report_unreported()

    async def begin(self) -> None:
        """Send what waits in the spool from now on. SpoolError as `start`."""
        await self._scheduler.start(self._scheduler_ended)
        self._keeper = asyncio.get_running_loop().create_task(self.held_mail.run())

    async def stop(self, grace_s: float) -> None:
        """Begin nothing, let what is under way finish for `grace_s` seconds, cut the rest and settle it.

        Cancellation leaves the rest to the next start.
        """
        self._stopping = self._dispatcher.stopping = True
        if self._keeper is not None:
            self._keeper.cancel()
        await self._scheduler.stop()
        for job in self.pools.stop():
            job.rerouted()
        try:
            async with asyncio.timeout(grace_s) as self._grace:
                while self.pools.busy_count:
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            self.pools.abort()
        self._grace = None
        await self.pools.join()
        self._reporter.close()
        try:
            async with asyncio.timeout(SETTLE_GRACE_S):
                await self._settler.drained()
        except TimeoutError:
            self._settler.close()
        self.pools.abort()
        self._deadlines.close()

    def hurry(self) -> None:
        """Let a `stop` that runs wait no longer for what is under way."""
        if self._grace is not None and not self._grace.expired():
            self._grace.reschedule(asyncio.get_running_loop().time())

    def held(self) -> Mapping[str, int]:
        """What keeps `stop` waiting, by label."""
        transactions = self.pools.busy_count if self._owns_pools else 0
        return {"transactions": transactions, "settlements": self._settler.pending_count}

    def config_changed(self) -> None:
        """A new configuration is in use."""
        for pool in self.pools:
            provider = self._config.provider(pool.provider.name)
            if provider is None:
                self.pools.remove(pool)
            else:
                pool.update(provider)
        self._scheduler.release()

    def denials_changed(self) -> None:
        """New denials are in force: what they stop is cut before its dot, what they stopped is looked at again."""
        self._dispatcher.follow_denials()
        due_ms = self._steady_ms()
        held, self._denied, self._denied_count = self._denied, {}, 0
        for message_id, rows in held.items():
            self._settler.settle(_move_due(message_id, rows, due_ms), self._woken(rows))
        self._scheduler.release()

    def lock(self, message_id: MessageId) -> bool:
        """A command is about to change the message: begin no attempt of it before `unlock`.

        Says whether the record of its acceptance is on its way or written, as far as this process knows.
        """
        self._scheduler.lock(message_id)
        self._forget_denied(message_id)
        return self._reporter.hurry(message_id)

    def unlock(self, message_ids: Iterable[MessageId], queue_keys: Iterable[str]) -> None:
        """The command is done with these; rows under these keys may have come, gone or become due."""
        self._scheduler.unlock(message_ids, queue_keys)

    def due_now_ms(self) -> int:
        """Now, by the clock that due times follow."""
        return self._steady_ms()

    def lease_ended(self) -> None:
        """What was held under a lease is nobody's business here any more: cut it where its dot has not left."""
        self._dispatcher.follow_denials()

    def moment(self) -> Moment:
        """Both clocks, now."""
        wall_ms = self._clock.wall_ms()
        return Moment(wall_ms, self._retry_clock.read(wall_ms, self._clock.monotonic()))

    # --- ports.Handover

    def next_hop(self, account: str, targets: Sequence[Target]) -> str:
        """Which provider mail for these targets waits for: behind a dead one it would be seen after its whole queue."""
        return self._dispatcher.next_hop(account, targets)

    def admit(self, held_bytes: int, queue_key: str) -> bool:
        """Whether a message that takes so much (`envelope.message_bytes`) may be handed on in memory."""
        account, next_hop = split_queue_key(queue_key)
        used, capacity = self.counters.window_bytes, self._window_bytes
        if self._stopping or not (
            # Nobody asks whose it is while one could hold all of it.
            may_hold(used, held_bytes, used, capacity)
            or may_hold(self._dispatcher.held_bytes(account), held_bytes, used, capacity)
        ):
            return False
        if not next_hop:
            return True
        pool = self.pools.find(next_hop)
        if pool is None:
            return self._config.provider(next_hop) is not None
        waiting = pool.accepted_now_count
        return pool.usable() and (
            may_hold(waiting, 1, waiting, HANDED_OVER_LIMIT)
            or may_hold(pool.accepted_now_of(account), 1, waiting, HANDED_OVER_LIMIT)
        )

    def deliver(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> None:
        """Deliver a message whose rows are committed as `sending`, attempt 1."""
        addresses = tuple([row.address for row in recipients])
        # Ingress counted the line ends of what it hands over.
        held_bytes = message_bytes(len(content), addresses)
        reported = envelope.epoch > 0  # PostgreSQL recorded it when it stored it
        message = Message(envelope, content, addresses, reported, canonical=True, held_bytes=held_bytes)
        plan = make_plan(self._config, envelope, recipients, self._clock.wall_ms())
        if plan.held is not None or self._stopping:
            if plan.held is Held.MESSAGE and envelope.epoch and self._dispatcher.outlived(envelope):
                ends = [(row, _REVOKED) for row in recipients]
                self._dispatcher.conclude(message, ends, plan.bundle_revision, self.moment())
                return
            self._reporter.watch(message)
            self._dispatcher.put_back_rows(message, recipients)
            return
        if plan.refused:
            self._dispatcher.conclude(message, plan.refused, plan.bundle_revision, self.moment())
        if plan.groups:
            self._dispatcher.hold(message, len(plan.groups))
        for group in plan.groups:
            self._dispatcher.begin(message, group, plan)
        self._reporter.watch(message)
        if plan.waiting:
            self._dispatcher.step_aside(message, plan.waiting)

    def queued(self, envelope: Envelope, recipients: Sequence[RecipientRow]) -> None:
        """Record a message that was committed as `queued` soon, and read it back when its turn comes.

        The same with one that is `scheduled`, when its time has come.
        """
        message = Message(envelope, b"", tuple([row.address for row in recipients]), reported=False)
        self._reporter.watch(message)
        for queue_key in dict.fromkeys([row.queue_key for row in recipients]):
            if envelope.send_time_ms:
                moment = self.moment()
                self._scheduler.expect(queue_key, envelope.send_time_ms - moment.wall_ms + moment.steady_ms)
            else:
                self._scheduler.wake(queue_key)

    def wake(self, queue_key: str) -> None:
        """Look at this key anew."""
        self._scheduler.wake(queue_key)

    # --- what the replicated queue asks

    def left_out(self) -> set[str]:
        """Accounts of whose mail no more is to be claimed: suspended, or with enough of it in memory."""
        now_ms = self._clock.wall_ms()
        suspended = self._config.denials.accounts
        held_bytes = self._dispatcher.held_bytes
        return {account for account in suspended if is_denied(suspended, account, now_ms)} | {
            account
            for account in self._dispatcher.holders()
            if held_bytes(account) >= AHEAD_BYTES or self.crowded(account)
        }

    def take_given_back(self) -> set[str]:
        """Accounts whose mail went back unsent since this was asked last."""
        found, self._dispatcher.given_back = self._dispatcher.given_back, set()
        return found

    # --- scheduler.Work

    def weight(self, account: str) -> int:
        """How much of its next hops an account gets beside others."""
        compiled = self._config.account(account)
        return compiled.account.delivery_weight if compiled is not None else 1

    def room(self, next_hop: str) -> int:
        """How many messages for this next hop may be claimed now."""
        under_way = self._under_way.get(next_hop, 0)
        provider = self._config.provider(next_hop)
        if provider is None:
            return UNROUTED_ROOM - under_way
        pool = self.pools.find(provider.name)
        if pool is None:
            return provider.max_connections + AHEAD - under_way
        if not pool.usable():
            return AHEAD - under_way  # they may have other targets
        if not pool.is_open:
            return 1 - self._claiming.get(next_hop, 0)  # the probe
        return pool.window + AHEAD - under_way

    def window_open(self) -> bool:
        """Whether more messages may be read into memory."""
        return self.counters.window_bytes < self._window_bytes

    def crowded(self, account: str) -> bool:
        """Whether this account has its share of memory."""
        held_bytes = self._dispatcher.held_bytes(account)
        return not may_hold(held_bytes, 0, self.counters.window_bytes, self._window_bytes)

    def take(self, stored: StoredMessage, rows: Sequence[RecipientRow]) -> Taken:
        """Claim and start what may go of these waiting recipients."""
        envelope = stored.envelope
        plan = make_plan(self._config, envelope, rows, self._clock.wall_ms())
        if plan.held is Held.EVERYTHING:
            return Taken([], self._steady_ms() + LOOK_AGAIN_MS)
        moment = self.moment()
        outlived = is_expired(plan.retry_policy, envelope.released_ms, moment.wall_ms, moment.steady_ms)
        if plan.held is not None:
            if outlived and plan.held is Held.MESSAGE:
                return Taken([self._expire(stored, rows, plan, moment, _REVOKED)])
            return Taken([self._hold_back(envelope.message_id, rows)])
        steps_aside = [self._hold_back(envelope.message_id, plan.waiting)] if plan.waiting else []
        outlooks = [self._dispatcher.outlook(group.targets, envelope.account) for group in plan.groups]
        groups = [group for group, outlook in zip(plan.groups, outlooks, strict=True) if outlook.usable]
        if not groups and not plan.refused:
            if outlived and any(outlook.is_dead for outlook in outlooks):
                left = [row for group in plan.groups for row in group.rows]
                return Taken([*steps_aside, self._expire(stored, left, plan, moment, UNREACHABLE)])
            return Taken(steps_aside, 0 if steps_aside else moment.steady_ms + LOOK_AGAIN_MS)
        claims = self._claim(stored, plan, groups, split_queue_key(rows[0].queue_key)[1])
        return Taken([*steps_aside, *claims])

    # --- inside

    def _read_back(self, stored: StoredMessage) -> Message:
        """The message as delivery holds it; who asked for it watches over its record."""
        message_id = stored.envelope.message_id
        reported = stored.reported or self._reporter.is_reported(message_id)
        self._reporter.take(message_id)
        addresses = tuple([row.address for row in stored.recipients])
        return Message(
            stored.envelope,
            stored.content,
            () if reported else addresses,
            reported,
            canonical=stored.canonical,
            held_bytes=message_bytes(len(stored.content), addresses),
        )

    def _expire(
        self, stored: StoredMessage, rows: Sequence[RecipientRow], plan: Plan, moment: Moment, reason: Verdict
    ) -> asyncio.Future[None]:
        """End what outlived its lifetime while no attempt was worth making."""
        message = self._read_back(stored)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ends = [(row, reason) for row in rows]
        self._dispatcher.conclude(message, ends, plan.bundle_revision, moment, _resolver(future))
        self._reporter.watch(message)
        return future

    def _claim(
        self, stored: StoredMessage, plan: Plan, groups: list[Group], next_hop: str
    ) -> list[asyncio.Future[None]]:
        message = self._read_back(stored)
        futures: list[asyncio.Future[None]] = []
        if plan.refused:
            future = asyncio.get_running_loop().create_future()
            futures.append(future)
            self._dispatcher.conclude(message, plan.refused, plan.bundle_revision, self.moment(), _resolver(future))
        if groups:
            self._dispatcher.hold(message, len(groups))
        for group in groups:
            future = asyncio.get_running_loop().create_future()
            futures.append(future)
            _count(self._under_way, next_hop, 1)
            _count(self._claiming, next_hop, 1)
            self._settler.settle(claim(message, group.rows), self._claimed(message, group, plan, next_hop, future))
        self._reporter.watch(message)
        return futures

    def _claimed(self, message: Message, group: Group, plan: Plan, next_hop: str, future: asyncio.Future[None]) -> Done:
        def done(changed_count: int) -> None:
            _resolver(future)(changed_count)
            failpoint("delivery.claimed")
            _count(self._claiming, next_hop, -1)
            if changed_count == len(group.rows):
                started = group._replace(rows=claimed(group.rows))
                self._dispatcher.begin(message, started, plan, read_back_for=next_hop)
            else:
                self._dispatcher.let_go(message)
                self._place_free(next_hop)

        return done

    def _hold_back(self, message_id: MessageId, rows: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Mail of a denied credential or for a denied destination steps aside; the rest of its queue goes on."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        due_ms = self._steady_ms() + DENIED_DELAY_MS
        self._settler.settle(_move_due(message_id, rows, due_ms), _resolver(future))
        # Those that were looked at again and must wait on are there already.
        known = {row.index: row for row in self._denied.get(message_id, ())}
        self._forget_denied(message_id)
        self._denied[message_id] = tuple((known | {row.index: row for row in rows}).values())
        self._denied_count += len(self._denied[message_id])
        while self._denied_count > DENIED_LIMIT:
            self._forget_denied(next(iter(self._denied)))
        return future

    def _forget_denied(self, message_id: MessageId) -> None:
        self._denied_count -= len(self._denied.pop(message_id, ()))

    def _woken(self, rows: Sequence[RecipientRow]) -> Done:
        queue_keys = {row.queue_key for row in rows}

        def done(_: int) -> None:
            for queue_key in queue_keys:
                self._scheduler.wake(queue_key)

        return done

    def _steady_ms(self) -> int:
        return self.moment().steady_ms

    def _place_free(self, next_hop: str) -> None:
        _count(self._under_way, next_hop, -1)
        if next_hop not in self._under_way or self.room(next_hop) >= REFILL:
            self._scheduler.kick(next_hop)

    def _found_dead(self, next_hop: str, retry_at_s: float) -> None:
        wait_ms = int((retry_at_s - self._clock.monotonic()) * 1000) + 1
        self._scheduler.probe_at(next_hop, self._steady_ms() + max(0, wait_ms))

    def _window_free(self) -> None:
        self._scheduler.nudge()
        self.on_message_left()

    def _scheduler_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)


def _count(counts: dict[str, int], name: str, change: int) -> None:
    """Change a count; one that is 0 is not kept."""
    count = counts.get(name, 0) + change
    if count:
        counts[name] = count
    else:
        counts.pop(name, None)


def _resolver(future: asyncio.Future[None]) -> Done:
    def done(_: int) -> None:
        if not future.done():
            future.set_result(None)

    return done


def _move_due(message_id: MessageId, rows: Sequence[RecipientRow], due_ms: int) -> Settlement:
    """Change when rows are due that were due once; what was scheduled is released."""
    changes = [
        RecipientChange(row.index, row.attempt, released(row.state), row.attempt, due_ms, row.queue_key) for row in rows
    ]
    return Settlement(message_id, changes, None, reported=False)


def _holds_nothing(epoch: int) -> bool:
    del epoch
    return False


def _nobody() -> None:
    """Who hears of what nobody waits for."""
