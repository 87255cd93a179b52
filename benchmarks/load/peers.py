"""The servers under test by name, started with what a scenario needs of them.

Contract. `start_peer` returns a running server, or raises ToolError: for a peer that cannot do what is needed, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from benchmarks.haraka import Haraka
from benchmarks.load.run import Peer
from benchmarks.postfix import Postfix
from benchmarks.postroad import Postroad, Tenant
from benchmarks.smtp_tools import ToolError

NAMES = ("postroad", "replicated", "postfix", "haraka")
"""`replicated` is Postroad with accounts whose mail PostgreSQL keeps."""


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
class Place:
    """An account for mail from one loopback address; `sink` names where its mail goes: `live` or `dead`.

    `messages_per_s` is a limit of the account, 0 is none.
    """

    account: str
    address: str
    sink: str = "live"
    messages_per_s: int = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a scenario needs beside a relay that takes everything: only Postroad has it."""

    places: tuple[Place, ...] = ()
    postroad_only: bool = False

    @property
    def has_dead_sink(self) -> bool:
        """Whether some mail goes to a server that says nothing."""
        return any(place.sink == "dead" for place in self.places)


def start_peer(name: str, sink_ports: Mapping[str, int], needs: Needs, workers: int) -> Server:
    """Start a server that relays to the sinks, by name; see the module."""
    if name in ("postroad", "replicated"):
        tenants = [
            Tenant(place.account, f"{place.address}/32", sink_ports[place.sink], place.messages_per_s)
            for place in needs.places
        ]
        return Postroad(sink_ports["live"], workers=workers, tenants=tenants, replicated=name == "replicated")
    if needs.places or needs.postroad_only:
        raise ToolError(f"this scenario needs accounts, TLS or the API, which {name} is not set up for here")
    return Haraka(sink_ports["live"], workers) if name == "haraka" else Postfix(sink_ports["live"])
