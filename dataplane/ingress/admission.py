"""Who may open a connection: caps in all and for each address, and addresses that fail to log in too often.

Contract. `admit` answers None and counts the connection, or the refusal; each admitted one is given back by `leave`.
An IPv6 client is counted by its /64, since it can take any address in it. With `shared` counts the cap of an address
holds over all workers of the node, over which the kernel spreads an address's connections as it likes; the cap in all
is each worker's own. `bound` changes the caps: who is there stays, even where it would be refused now.

Failed logins are counted for a window of 60 s; from `max_auth_failures` on the address is answered 454 before its
secret is looked at, whoever it claims to be. Memory: one entry for each address that is connected, and at most
`max_tracked` that failed.
"""

from __future__ import annotations

from dataplane.core import replies
from dataplane.core.limits import counting_key
from dataplane.core.replies import Reply
from dataplane.ingress.address_counts import AddressCounts

_WINDOW_S = 60.0


class Admission:
    """Counts of one worker."""

    __slots__ = (
        "_connections",
        "_failures",
        "_max_auth_failures",
        "_max_connections",
        "_max_per_address",
        "_max_tracked",
        "_shared",
        "_total",
        "_window_end",
    )

    def __init__(
        self,
        max_connections: int,
        max_per_address: int,
        max_auth_failures: int = 20,
        max_tracked: int = 10_000,
        shared: AddressCounts | None = None,
    ) -> None:
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._max_auth_failures = max_auth_failures
        self._max_tracked = max_tracked
        self._shared = shared
        self._total = 0
        self._connections: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._window_end = 0.0

    @property
    def total(self) -> int:
        """Connections admitted and not left."""
        return self._total

    def bound(self, max_connections: int, max_per_address: int) -> None:
        """Set the caps for whoever comes from now on."""
        self._max_connections = max_connections
        self._max_per_address = max_per_address

    def admit(self, address: str, *, counted: bool) -> Reply | None:
        """Count a connection or refuse it; `counted` is false for addresses that only the total binds."""
        key = counting_key(address)
        present = self._connections.get(key, 0)
        shared = self._shared
        here = present if shared is None else shared.count(key)
        if self._total >= self._max_connections or (counted and here >= self._max_per_address):
            return replies.TOO_MANY_CONNECTIONS
        self._total += 1
        self._connections[key] = present + 1
        if shared is not None:
            shared.add(key)
        return None

    def leave(self, address: str) -> None:
        """Give back what `admit` counted."""
        key = counting_key(address)
        self._total -= 1
        present = self._connections[key] - 1
        if present:
            self._connections[key] = present
        else:
            del self._connections[key]
        if self._shared is not None:
            self._shared.remove(key)

    def note_auth_failure(self, address: str, now: float) -> None:
        """Count a failed login; `now` in seconds of the monotonic clock."""
        self._turn_window(now)
        key = counting_key(address)
        # Full: forget the oldest. Losing a count gives an attacker a few attempts at 256 random bits.
        if key not in self._failures and len(self._failures) >= self._max_tracked:
            del self._failures[next(iter(self._failures))]
        self._failures[key] = self._failures.get(key, 0) + 1

    def auth_throttled(self, address: str, now: float) -> bool:
        """Whether the address has failed too often in this window."""
        self._turn_window(now)
        return bool(self._failures) and self._failures.get(counting_key(address), 0) >= self._max_auth_failures

    def _turn_window(self, now: float) -> None:
        if now >= self._window_end:
            self._failures.clear()
            self._window_end = now + _WINDOW_S
