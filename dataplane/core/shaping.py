"""How much of a destination may be used now: its connection window, and whether it is dead or stopped.

One `Destination` for each provider and worker; pure, with the monotonic clock and random numbers as arguments. Only
failures of connections count (dial, TLS, greeting, AUTH), never replies about a message or a recipient.

    state      connections             moves
    OPEN       up to the window        throttle (a connection failed and none is left), suspend
    THROTTLED  none until its timer,   unthrottle (the probe succeeded), throttle (it failed: a longer timer), suspend
               then one probe
    SUSPENDED  none                    resume (to OPEN)

A destination that fails is probed by one connection after a delay that doubles from 1 s to 5 minutes, with jitter,
whatever number of messages wait for it. A failure beside connections that work only delays the next one: many servers
allow fewer than they are configured for here. Forbidden moves raise ForbiddenShapingError: our own bug.
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

    __slots__ = ("_failures", "connections", "flow", "retry_at_s", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.flow = Flow.OPEN
        self.connections = 0
        self.retry_at_s = 0.0  # monotonic; nothing is dialled before
        self._failures = 0  # since the last success

    def may_connect(self, now_s: float) -> bool:
        """Whether one more connection may be opened."""
        if self.flow is Flow.OPEN:
            return self.connections < self.window and now_s >= self.retry_at_s
        return self.flow is Flow.THROTTLED and self.connections == 0 and now_s >= self.retry_at_s

    def usable(self, now_s: float) -> bool:
        """Whether a message may be given to this destination: it is open, or a probe is wanted or under way."""
        if self.flow is Flow.THROTTLED:
            return self.connections == 0 and now_s >= self.retry_at_s
        return self.flow is Flow.OPEN

    def connect(self, now_s: float) -> None:
        """A connection is being opened."""
        if not self.may_connect(now_s):
            raise ForbiddenShapingError("a connection beyond what may be opened")
        self.connections += 1

    def succeeded(self) -> None:
        """A connection became ready; what was throttled is open again."""
        self._failures = 0
        self.retry_at_s = 0.0
        if self.flow is Flow.THROTTLED:
            self.flow = Flow.OPEN

    def failed(self, now_s: float, random: float) -> bool:
        """A connection could not be made ready. Returns whether the destination is throttled now.

        `random` lies in [0, 1).
        """
        self.disconnected()
        if self.flow is Flow.SUSPENDED:
            return False
        bound_s = min(CAP_S, BASE_S * 2.0 ** min(self._failures, 20))
        self._failures += 1
        # Half of it is certain: a herd of workers spreads, and none of them comes back at once.
        self.retry_at_s = now_s + bound_s * (0.5 + random / 2)
        if self.connections:
            return False
        self.flow = Flow.THROTTLED
        return True

    def disconnected(self) -> None:
        """A connection ended."""
        if self.connections == 0:
            raise ForbiddenShapingError("no connection is open")
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
        self._failures = 0
        self.retry_at_s = 0.0
