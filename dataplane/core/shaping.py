"""How much of a destination may be used now: its connection window, and whether it is dead or stopped.

One `Destination` for each provider and worker; pure, with the monotonic clock and random numbers as arguments. Only
failures of connections count (dial, TLS, greeting, AUTH), never replies about a message or a recipient.

    state      connections               moves
    OPEN       up to `window`            throttle (a connection failed and none is left), suspend
    THROTTLED  none until its timer,     unthrottle (the probe succeeded), throttle (it failed: a longer timer), suspend
               then one probe
    SUSPENDED  none                      resume (to OPEN)

The window is `limit` until something fails. A failure beside connections that work shrinks it to those that work: many
servers allow fewer than they are configured for here. What closes is replaced at once, and one more is tried when the
timer is over. After an outage the window begins with the probe and doubles with each round of connections that become
ready, so that no herd meets a server that has just come back.

The timer is drawn between half of a bound and the bound, which doubles from 1 s to 5 minutes. It doubles once for all
dials that were under way together: a cohort that fails is one failure (compare Postfix's SCHEDULER_README). A dial that
shows that the window is no limit any more begins it anew. Each worker probes by itself: W workers make W probes, each
at a time of its own. Forbidden moves raise ForbiddenShapingError: our own bug.
"""

from __future__ import annotations

from enum import IntEnum

BASE_S = 1.0
CAP_S = 300.0


class Flow(IntEnum):
    """Whether a destination is used."""

    OPEN = 1
    THROTTLED = 2
    SUSPENDED = 3


class ForbiddenShapingError(Exception):
    """A destination was asked for a move or a count that its state does not have."""


class Destination:
    """State of one destination. `connections` counts those being opened and those open."""

    __slots__ = ("_cohort", "_doubling", "_failures", "_ready", "_works", "connections", "flow", "limit", "retry_at_s")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.flow = Flow.OPEN
        self.connections = 0
        self.retry_at_s = 0.0  # monotonic; nothing beyond what works is dialled before
        self._ready = 0  # of the connections, those that are open
        self._works: int | None = None  # so many are known to work at once; None while nothing speaks against the limit
        self._doubling = False
        self._failures = 0  # cohorts that failed since a dial told more than was known
        self._cohort = 0  # dials that were under way when the last failure was counted, and still are

    @property
    def is_new(self) -> bool:
        """Whether a new one would know as much."""
        return self.flow is Flow.OPEN and not self.connections and self._works is None

    def window(self, now_s: float) -> int:
        """How many connections there may be in all while it is open."""
        if self._works is None:
            return self.limit
        more = self._works if self._doubling else 1
        return min(self.limit, self._works + (more if now_s >= self.retry_at_s else 0))

    def may_connect(self, now_s: float) -> bool:
        """Whether one more connection may be opened."""
        if self.flow is Flow.OPEN:
            return self.connections < self.window(now_s)
        return self.flow is Flow.THROTTLED and self.connections == 0 and now_s >= self.retry_at_s

    def usable(self, now_s: float) -> bool:
        """Whether a message may be given to this destination: it is open, or a probe is wanted."""
        if self.flow is Flow.THROTTLED:
            return self.connections == 0 and now_s >= self.retry_at_s
        return self.flow is Flow.OPEN

    def connect(self, now_s: float) -> None:
        """A connection is being opened."""
        if not self.may_connect(now_s):
            raise ForbiddenShapingError("a connection beyond what may be opened")
        self.connections += 1

    def succeeded(self) -> None:
        """A connection that was being opened became ready; what was throttled is open again."""
        if self._ready >= self.connections:
            raise ForbiddenShapingError("no connection is being opened")
        self._ready += 1
        self._cohort = max(0, self._cohort - 1)
        if self.flow is Flow.THROTTLED:
            self.flow = Flow.OPEN
            self._works = 0
            self._doubling = True
        if self._works is not None and self._ready > self._works:
            self._works = self._ready if self._ready < self.limit else None
            self._failures = 0
            self.retry_at_s = 0.0

    def failed(self, now_s: float, random: float) -> bool:
        """A connection could not be made ready. Returns whether the destination is throttled now.

        `random` lies in [0, 1).
        """
        if self._ready >= self.connections:
            raise ForbiddenShapingError("no connection is being opened")
        self.connections -= 1
        if self.flow is Flow.SUSPENDED:
            return False
        if self._cohort:
            self._cohort -= 1
        else:
            self._cohort = self.connections - self._ready
            bound_s = min(CAP_S, BASE_S * 2.0 ** min(self._failures, 20))
            self._failures += 1
            # Half of it is certain: a herd of workers spreads, and none of them comes back at once.
            self.retry_at_s = now_s + bound_s * (0.5 + random / 2)
        self._works = max(1, self._ready)
        self._doubling = False
        if self.connections:
            return False
        self.flow = Flow.THROTTLED
        return True

    def given_up(self) -> None:
        """A connection that was being opened was not tried: nothing is known that was not known before."""
        if self._ready >= self.connections:
            raise ForbiddenShapingError("no connection is being opened")
        self.connections -= 1
        self._cohort = max(0, self._cohort - 1)

    def disconnected(self) -> None:
        """A connection that was ready ended."""
        if self._ready == 0:
            raise ForbiddenShapingError("no connection is open")
        self._ready -= 1
        self.connections -= 1

    def suspend(self) -> None:
        """Stop using it until `resume`."""
        if self.flow is Flow.SUSPENDED:
            raise ForbiddenShapingError("it is suspended")
        self.flow = Flow.SUSPENDED

    def resume(self) -> None:
        """Use it again, as if nothing had failed."""
        if self.flow is not Flow.SUSPENDED:
            raise ForbiddenShapingError("it is not suspended")
        self.flow = Flow.OPEN
        self._works = None
        self._failures = self._cohort = 0
        self.retry_at_s = 0.0
