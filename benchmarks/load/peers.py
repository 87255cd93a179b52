"""The servers under test by name, started with what a scenario needs of them.

Contract. `start_peer` returns a running server, or raises ToolError: for a peer that cannot do what is needed, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from benchmarks.load.run import Peer
from benchmarks.postfix import Postfix
from benchmarks.postroad import Postroad, Tenant
from benchmarks.smtp_tools import ToolError

NAMES = ("postroad", "postfix")


class Server(Peer, Protocol):
    """A server under test, with its door."""

    @property
    def port(self) -> int:
        """Takes mail without TLS and AUTH from loopback."""
        ...

    def close(self) -> None:
        """Stop it."""
        ...


@dataclass(frozen=True, slots=True)
class Needs:
    """What a scenario needs beside a relay that takes everything: only Postroad has it."""

    tenants: tuple[Tenant, ...] = ()
    tls: bool = False
    api: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether any relay will do."""
        return not (self.tenants or self.tls or self.api)


def start_peer(name: str, sink_port: int, needs: Needs, workers: int) -> Server:
    """Start a server that relays to the sink; see the module. 0 workers: as many as it takes by itself."""
    if name == "postroad":
        return Postroad(sink_port, workers=workers, tenants=needs.tenants)
    if not needs.is_plain:
        raise ToolError(f"this scenario needs accounts, TLS or the API, which {name} is not set up for here")
    return Postfix(sink_port)
