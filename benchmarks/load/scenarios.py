"""The scenarios: what is sent to a server, in which phases, and what is read from the figures.

A scenario is a class with a name, a sentence, defaults, what it needs of a server, and `phases`: each is one measured
run. Where there are several, the first is the one without the disturbance, and `findings` compares.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from benchmarks.load.job import Job
from benchmarks.load.options import Defaults, Options
from benchmarks.load.peers import Needs, Server
from benchmarks.load.results import Stream

_RECIPIENT = "someone@example.net"
_SENDER = "app@bench.example.org"
_LARGE_BYTES = 100_000
_RAMP_S = 60.0


@dataclass(frozen=True, slots=True)
class Phase:
    """One measured run."""

    name: str
    streams: tuple[Stream, ...]


class Scenario:
    """See the module. The plain one: one stream, one phase."""

    name: ClassVar[str]
    summary: ClassVar[str]
    defaults: ClassVar[Defaults] = Defaults()
    needs: ClassVar[Needs] = Needs()

    def job(self, options: Options, server: Server) -> Job:
        """Return the stream's job."""
        return Job(
            stream=0,
            port=server.port,
            sender=_SENDER,
            recipient=_RECIPIENT,
            ledger_file=os.devnull,
            deadline_s=options.deadline_s,
            sessions=options.sessions,
            messages=options.messages if server.name == "postroad" else options.other_messages,
            seconds=options.seconds,
            rate=options.rate,
            size_bytes=options.size_bytes,
            pipelining=options.pipelining,
            messages_per_connection=1 if options.reconnect else 0,
        )

    def phases(self, options: Options, server: Server) -> Sequence[Phase]:
        """Return the runs of one round."""
        return [Phase("load", (Stream("load", self.job(options, server), options.processes),))]


class Closed(Scenario):
    """Kept sessions, each sends its next message when the last one is answered."""

    name = "closed"
    summary = "kept sessions, each sends its next message when the last one is answered"


class Paced(Scenario):
    """Messages at a steady rate over kept sessions."""

    name = "paced"
    summary = "messages at a steady rate over kept sessions; latency from the moment each was meant to be sent"
    defaults = Defaults(messages=0, seconds=20.0, rate=1_000.0)


class ConnectionPerMessage(Scenario):
    """Every message has a connection of its own."""

    name = "connection-per-message"
    summary = "a closed loop with a connection for every message"
    defaults = Defaults(sessions=200, messages=10_000)

    def job(self, options: Options, server: Server) -> Job:
        """As the plain one, and QUIT after each."""
        return replace(super().job(options, server), messages_per_connection=1)


class Large(Scenario):
    """Large messages."""

    name = "large"
    summary = "a closed loop of messages of 100 KB"
    defaults = Defaults(sessions=100, messages=3_000, size_bytes=_LARGE_BYTES)


class Ramp(Scenario):
    """Connections are opened one after the other, and held, all with mail."""

    name = "ramp"
    summary = "connections opened evenly over 60 s, then held; the rate grows with them"
    defaults = Defaults(messages=0, seconds=90.0, rate=500.0)

    def job(self, options: Options, server: Server) -> Job:
        """Two thirds of the time for opening, at most a minute."""
        return replace(super().job(options, server), connect_over_s=min(_RAMP_S, options.seconds * 2 / 3))


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario for scenario in (Closed(), Paced(), Ramp(), ConnectionPerMessage(), Large())
}
