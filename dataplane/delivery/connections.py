"""Connections kept for each provider: jobs come in, each is given to a connection, and it hears how it ended.

A `Pool` belongs to one provider; `pools` holds a worker's. Jobs wait in one line (core/fair): accounts take turns by
their weight, and of an account the highest priority goes first, and those just accepted and those read back from the
spool take turns. A job ends in exactly one of
its methods: `done`, `unreachable`, `rerouted`, or in nothing when `prepare` took it back by returning None. Connections
are opened as jobs wait, at most what the destination's window allows and the worker's number; they close after their
number of messages, when idle, when the provider's settings changed, and at anything the machine finds odd. A used
connection that ended before it answered at all had been closed by the remote while idle: its job starts once more on
another one.

Limits (`limits`) are asked before a connection is opened and before each attempt; where nobody is to be asked nothing
waits. A refusal lets the provider's jobs wait, the others go on. Above LONG_WAIT_S they do not wait here: they are
turned away as from a dead provider, to their next target or back to the spool, and one comes back when it is time.

Only failures to open a connection touch the destination's state (core/shaping). When it is found dead, every waiting
job is told; the first one learns that the attempt was its own (`probed`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from dataplane.core.config import SmtpProvider
from dataplane.core.fair import FairLine
from dataplane.core.shaping import Destination, Flow
from dataplane.core.transaction import Transaction, Verdict, VerdictKind
from dataplane.delivery.connection import Connection, ConnectionFailedError
from dataplane.delivery.limits import DeliveryLimits, LimitedError
from dataplane.ports import Grant, Take

if TYPE_CHECKING:
    from dataplane.delivery.pools import Pools

LONG_WAIT_S = 5.0
_LEAST_WAIT_S = 0.01

# Lanes of an account in a provider's line.
ACCEPTED_NOW = 0
READ_BACK = 1

_BROKEN = Verdict(VerdictKind.TEMPORARY, 0, "4.3.0", "the connection could not be opened")
_LOST = Verdict(VerdictKind.TEMPORARY, 0, "4.4.2", "connection lost")


class Job(Protocol):
    """A message for recipients of one provider, of an account of that weight; `cost` as core/fair counts it."""

    @property
    def recipient_count(self) -> int:
        """How many recipients."""
        ...

    @property
    def size_bytes(self) -> int:
        """Octets of content."""
        ...

    account: str
    weight: int
    cost: int
    priority: int
    restarted: bool

    def prepare(self, connection: Connection) -> Transaction | None:
        """Last look before the first byte: what to send, or None when the job was taken back."""
        ...

    def done(self, connection: Connection, verdicts: tuple[Verdict, ...]) -> None:
        """The transaction ended."""
        ...

    def unreachable(self, failure: Verdict, remote_host: str, *, probed: bool) -> None:
        """No connection can be had."""
        ...

    def rerouted(self) -> None:
        """This provider can no longer be used: gone from the configuration, or stopped."""
        ...


class Pool:
    """Connections of one provider. `provider` is its settings now."""

    def __init__(self, pools: Pools, provider: SmtpProvider) -> None:
        self.provider = provider
        self.destination = Destination(provider.max_connections)
        self._pools = pools
        self._line: FairLine[Job] = FairLine()
        self._again: deque[Job] = deque()  # those that start once more go first
        self._jobs: dict[Connection, Job | None] = {}
        self._made_for: dict[Connection, SmtpProvider] = {}
        self._idle: list[Connection] = []
        self._feeding: set[Connection] = set()
        self._opening_count = 0
        self.is_gone = False  # from the configuration
        self._asking: dict[Connection, Job] = {}  # the limiter is asked for these
        self._sending_waits = False  # for a limit; `_timer` ends it
        self._dialling_waits = False
        self._timer: asyncio.TimerHandle | None = None
        self._refused_since_s = 0.0  # connections; 0 when the last one was not refused
        self._away_until_s = 0.0  # jobs were turned away for a limit
        self._is_away = False

    @property
    def waiting_count(self) -> int:
        """Jobs that have no connection yet."""
        return len(self._line) + len(self._again)

    @property
    def accepted_now_count(self) -> int:
        """Jobs just accepted that have no connection yet."""
        return self._line.counts[ACCEPTED_NOW]

    def accepted_now_of(self, account: str) -> int:
        """Those of an account."""
        return self._line.count(account, ACCEPTED_NOW)

    @property
    def busy_count(self) -> int:
        """Transactions under way."""
        return sum(job is not None for job in self._jobs.values())

    @property
    def is_blank(self) -> bool:
        """Whether forgetting this pool loses nothing."""
        nothing = not self._jobs and not self._opening_count and not self.waiting_count and not self._asking
        return nothing and self._timer is None and (self.is_gone or (self.destination.is_new and not self._is_away))

    @property
    def is_open(self) -> bool:
        """Whether the destination is neither dead nor stopped."""
        return self.destination.flow is Flow.OPEN

    @property
    def window(self) -> int:
        """How many connections there may be now."""
        return self.destination.window(self._pools.clock.monotonic())

    def usable(self) -> bool:
        """Whether a job given now will be looked at before something changes."""
        now_s = self._pools.clock.monotonic()
        return self.destination.usable(now_s) and now_s >= self._away_until_s

    def submit(self, job: Job, *, accepted_now: bool) -> None:
        """Take a job. It may have ended when this returns."""
        lane = ACCEPTED_NOW if accepted_now else READ_BACK
        self._line.put(job.account, job.weight, lane, job.cost, job, job.priority)
        self.pump()

    def update(self, provider: SmtpProvider) -> None:
        """Use new settings: what is idle closes now, what is busy after its message."""
        changed = provider != self.provider
        self.is_gone = False
        self.provider = provider
        self.destination.limit = provider.max_connections
        self._away_until_s = 0.0
        if changed:
            self.close_idle()

    def retire(self) -> None:
        """The provider is gone or stopped: nothing new begins, what is under way ends as it does."""
        self._is_away = False
        self.close_idle()
        self._turn_away()

    def cut(self, unwanted: Callable[[Job], bool]) -> None:
        """Cut transactions of unwanted jobs whose dot has not left."""
        for connection, job in list(self._jobs.items()):
            if job is not None and connection.dot_is_here and unwanted(job):
                connection.abort("stopped by a denial")

    def take_waiting(self) -> list[Job]:
        """Give up all jobs that wait."""
        jobs = [*self._asking.values(), *self._again, *self._line.drain()]
        self._asking.clear()
        self._again.clear()
        return jobs

    def close_idle(self) -> None:
        """Close what is idle."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.leave()

    def close_one_idle(self) -> bool:
        """Close the connection that was idle longest; False when none is."""
        if not self._idle:
            return False
        self._idle.pop(0).leave()
        return True

    def abort(self) -> None:
        """Cut every connection; their jobs are told."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection in list(self._jobs):
            connection.abort("stopped")

    def pump(self) -> None:
        """Give jobs to idle connections and open more for those that wait."""
        while self._idle and self.waiting_count and not self._sending_waits:
            self._feed(self._idle.pop())
        self._dial_more()

    # --- opening

    def _dial_more(self) -> None:
        pools = self._pools
        if self._sending_waits or self._dialling_waits:
            return
        while self.waiting_count > self._opening_count and not pools.stopping:
            now_s = pools.clock.monotonic()
            if not self.destination.may_connect(now_s):
                if self.destination.connections == 0:
                    # Dead or stopped, and nobody else comes back to those that wait.
                    self._turn_away()
                return
            if not pools.make_room():
                return
            self.destination.connect(now_s)
            self._opening_count += 1
            pools.counters.connections_now += 1
            pools.run(self._dial())

    def _turn_away(self) -> None:
        for job in self.take_waiting():
            job.rerouted()

    async def _dial(self) -> None:
        pools, provider = self._pools, self.provider
        started_s = pools.clock.monotonic()
        try:
            connection = await pools.dialer(provider)
        except ConnectionFailedError as error:
            self._dial_failed(error.verdict, error.remote_host)
        except LimitedError as error:
            self._dial_refused(error.wait_s)
        except asyncio.CancelledError:
            self._dial_failed(_BROKEN, "")
            raise
        except Exception as error:  # noqa: BLE001 - jobs wait for this dial, so that it must end in one way or the other
            pools.log.warning("delivery.dial_broken", provider=provider.name, error=repr(error))
            self._dial_failed(_BROKEN, "")
        else:
            connection.connecting_ms = int((pools.clock.monotonic() - started_s) * 1000)
            self._opened(connection, provider)

    def _dial_failed(self, failure: Verdict, remote_host: str) -> None:
        pools = self._pools
        self._opening_count -= 1
        pools.counters.connections_now -= 1
        pools.counters.connections_failed += 1
        was_dead = self.destination.flow is Flow.THROTTLED
        # A dial that our own end cuts says nothing of the next hop.
        throttled = not pools.stopping and self.destination.failed(pools.clock.monotonic(), pools.random())
        # A probe that fails finds nothing new.
        if throttled and not was_dead:
            pools.counters.throttled += 1
            pools.log.warning(
                "delivery.throttled",
                provider=self.provider.name,
                remote_host=remote_host,
                reply_code=failure.code,
                reply=failure.text,
            )
        if throttled:
            pools.found_dead(self.provider.name, self.destination.retry_at_s)
        if self.destination.connections == 0:
            for place, job in enumerate(self.take_waiting()):
                job.unreachable(failure, remote_host, probed=place == 0)
        pools.connection_closed(self)

    def _opened(self, connection: Connection, provider: SmtpProvider) -> None:
        if not connection.reusable:
            self._dial_failed(_LOST, connection.remote_host)
            return
        self._opening_count -= 1
        self._refused_since_s = 0.0
        self._pools.counters.connections_opened += 1
        was_dead = self.destination.flow is Flow.THROTTLED
        self.destination.succeeded()
        self._jobs[connection] = None
        self._made_for[connection] = provider
        connection.on_done = self._done
        connection.on_closed = self._closed
        self._feed(connection)
        self._dial_more()
        if was_dead:
            self._pools.usable_again(provider.name)

    # --- using

    def _feed(self, connection: Connection) -> None:
        """Give jobs to a connection that has none. Jobs that end at once are followed by the next one in this loop."""
        if connection in self._feeding:
            return
        self._feeding.add(connection)
        while connection.reusable and self._jobs.get(connection) is None and not self._is_used_up(connection):
            job = self._next_job()
            if job is None:
                self._idle.append(connection)
                connection.rest()
                break
            if self._pools.limits is not None and self._ask(self._pools.limits, connection, job):
                # It stays among those that are fed until the answer comes.
                return
            transaction = job.prepare(connection)
            if transaction is not None:
                self._start(connection, job, transaction)
        self._feeding.discard(connection)
        if connection.reusable and self._jobs.get(connection) is None and connection not in self._idle:
            connection.leave()

    def _start(self, connection: Connection, job: Job, transaction: Transaction) -> None:
        if self._is_away:
            self._is_away = False
            self._pools.usable_again(self.provider.name)
        self._jobs[connection] = job
        self._pools.counters.attempts += 1
        connection.send(transaction)

    def _is_used_up(self, connection: Connection) -> bool:
        provider = self._made_for[connection]
        stale = provider is not self.provider and provider != self.provider
        stale = stale or (connection.lease is not None and connection.lease.lost)
        return stale or self._pools.stopping or connection.transaction_count >= provider.max_messages_per_connection

    def _next_job(self) -> Job | None:
        if self._sending_waits:
            return None
        return self._again.popleft() if self._again else self._line.take()

    def _done(self, connection: Connection, verdicts: tuple[Verdict, ...]) -> None:
        job = self._jobs.get(connection)
        self._jobs[connection] = None
        if job is None:
            return
        if self._was_stale(connection, verdicts) and not job.restarted and not self._pools.stopping:
            job.restarted = True
            self._again.append(job)
            self.pump()
        else:
            try:
                job.done(connection, verdicts)
            except Exception as error:  # noqa: BLE001 - nobody up the stack knows that an outcome was lost
                self._pools.broken(error)
        if self._pools.stopping:
            self._pools.transaction_ended()
        if connection.reusable:
            self._feed(connection)

    def _was_stale(self, connection: Connection, verdicts: tuple[Verdict, ...]) -> bool:
        if connection.transaction_count == 1 or connection.answered:
            return False
        return all(verdict.kind is VerdictKind.INTERRUPTED for verdict in verdicts)

    def _closed(self, connection: Connection) -> None:
        if connection.lease is not None:
            connection.lease.release()
        self._jobs.pop(connection, None)
        self._made_for.pop(connection, None)
        if connection in self._idle:
            self._idle.remove(connection)
        self.destination.disconnected()
        self._pools.counters.connections_now -= 1
        self.pump()
        self._pools.connection_closed(self)

    # --- limits

    def _ask(self, limits: DeliveryLimits, connection: Connection, job: Job) -> bool:
        """Ask whether a job may go; False when there is nobody to ask."""
        takes = limits.takes(self.provider, connection.host, job.recipient_count, job.size_bytes)
        if not takes:
            return False
        self._asking[connection] = job

        def answer(grant: asyncio.Future[Grant]) -> None:
            self._answered(limits, connection, job, takes, grant.result())

        limits.ask(takes, answer)
        return True

    def _answered(
        self, limits: DeliveryLimits, connection: Connection, job: Job, takes: tuple[Take, ...], grant: Grant
    ) -> None:
        """The limiter has answered. Meanwhile the job may have been taken back, and the connection have closed."""
        self._feeding.discard(connection)
        is_ours = self._asking.get(connection) is job
        self._asking.pop(connection, None)
        if grant.allowed:
            if is_ours and connection.reusable and connection in self._jobs:
                transaction = job.prepare(connection)
                if transaction is not None:
                    self._start(connection, job, transaction)
                    return
                is_ours = False
            limits.refund(takes)
        if is_ours:
            self._again.appendleft(job)
        if not grant.allowed:
            self._sending_refused(grant.wait_s)
        if connection in self._jobs:
            self._feed(connection)
        self.pump()

    def _sending_refused(self, wait_s: float) -> None:
        self._pools.counters.limited += 1
        if wait_s > LONG_WAIT_S:
            self._turn_away_for(wait_s)
        else:
            self._sending_waits = True
            self._wake_in(wait_s)

    def _dial_refused(self, wait_s: float) -> None:
        """Limits allow no connection now; that says nothing of the destination."""
        pools = self._pools
        self._opening_count -= 1
        pools.counters.connections_now -= 1
        pools.counters.limited += 1
        self.destination.given_up()
        now_s = pools.clock.monotonic()
        self._refused_since_s = self._refused_since_s or now_s
        is_long = wait_s > LONG_WAIT_S or now_s - self._refused_since_s > LONG_WAIT_S
        if is_long and not self.destination.connections:
            self._turn_away_for(max(wait_s, LONG_WAIT_S))
        else:
            self._dialling_waits = True
            self._wake_in(min(wait_s, LONG_WAIT_S))
        pools.connection_closed(self)

    def _turn_away_for(self, wait_s: float) -> None:
        """Nothing can go for long: who waits here would only hold memory."""
        self._is_away = True
        self._away_until_s = self._pools.clock.monotonic() + wait_s
        self._pools.found_dead(self.provider.name, self._away_until_s)
        self._turn_away()

    def _wake_in(self, wait_s: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(max(wait_s, _LEAST_WAIT_S), self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._sending_waits = self._dialling_waits = False
        self.pump()
        self._pools.connection_closed(self)
