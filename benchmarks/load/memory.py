"""What connections take of a server's memory: read before they are opened, and while all of them are held."""

from __future__ import annotations

from typing import Any

from benchmarks.load.run import Peer, Progress

_SETTLED_LOOKS = 2


class Held:
    """`look` is called with the progress each second; the last look at all connections counts. Bytes are PSS."""

    def __init__(self, peer: Peer, connections: int) -> None:
        self._peer = peer
        self._connections = connections
        self._before = peer.memory()
        self._held: dict[str, int] = {}
        self._looks = 0

    def look(self, progress: Progress) -> None:
        """Read the memory when all connections were open at the last look, too."""
        self._looks = self._looks + 1 if progress.open >= self._connections else 0
        if self._looks >= _SETTLED_LOOKS:
            self._held = self._peer.memory()

    def figures(self) -> dict[str, Any]:
        """Return bytes before and held by part, and bytes a connection; nothing when they were never all open.

        `holders` are the parts together that hold connections; what the others grow meanwhile has other reasons.
        """
        if not self._held:
            return {}
        grown = {role: self._held[role] - self._before.get(role, 0) for role in self._held}
        grown["holders"] = sum(grown.get(role, 0) for role in self._peer.holders)
        return {
            "connections": self._connections,
            "before_bytes": self._before,
            "held_bytes": self._held,
            "bytes_per_connection": {role: round(value / self._connections) for role, value in grown.items()},
        }
