"""The scenarios: what is sent to a server, in which phases, and what is read from the figures.

A scenario is a class with a name, a sentence, defaults, what it needs of a server, and `phases`: each is one measured
run. Where there are two, the first is without a disturbance and the second with it; what counts is then the first
stream of both, and how its latencies differ.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from benchmarks.load.job import Job
from benchmarks.load.options import Defaults, Options
from benchmarks.load.peers import Needs, Place, Server
from benchmarks.load.results import RunResult, Stream
from benchmarks.postroad import Postroad
from benchmarks.smtp_tools import ToolError

_RECIPIENT = "someone@example.net"
_FIRST, _SECOND = Place("bench", "127.0.0.1"), Place("second", "127.0.0.2")
_THIRD = Place("third", "127.0.0.3")
_LARGE_BYTES = 100_000
_RAMP_S = 60.0
_LIMIT_PER_S = 100
# Above the node's least rate of 500 bytes a second, so that slow clients are served, not cut off.
_DRIP_BYTES = 300
_DRIP_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Phase:
    """One measured run. `holds`: memory is read while connections are held, and set in relation to their number."""

    name: str
    streams: tuple[Stream, ...]
    holds: bool = False


class Scenario:
    """See the module. The plain one: one stream, one phase."""

    name: ClassVar[str]
    summary: ClassVar[str]
    defaults: ClassVar[Defaults] = Defaults()
    needs: ClassVar[Needs] = Needs()
    module: ClassVar[str] = "benchmarks.load.generator"

    def job(self, options: Options, server: Server) -> Job:
        """Return the job of the stream that counts."""
        return Job(
            stream=0,
            port=server.port,
            sender="app@bench.example.org",
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

    def findings(self, options: Options, result: RunResult) -> dict[str, float]:
        """Return figures that only this scenario has."""
        return {}


class Closed(Scenario):
    """Kept sessions, each sends its next message when the last one is answered."""

    name = "closed"
    summary = "kept sessions, each sends its next message when the last one is answered"


class Paced(Scenario):
    """Messages at a steady rate over kept sessions."""

    name = "paced"
    summary = "a steady rate over kept sessions; latency from the moment a message was meant to be sent"
    defaults = Defaults(messages=0, seconds=20.0, rate=1_000.0)


class Ramp(Scenario):
    """Connections are opened one after the other, and held, all with mail."""

    name = "ramp"
    summary = "connections opened evenly over 60 s, then held; the rate grows with them"
    defaults = Defaults(messages=0, seconds=90.0, rate=500.0)

    def job(self, options: Options, server: Server) -> Job:
        """Two thirds of the time for opening, at most a minute."""
        return replace(super().job(options, server), connect_over_s=min(_RAMP_S, options.seconds * 2 / 3))

    def phases(self, options: Options, server: Server) -> Sequence[Phase]:
        """Memory is read as well: what a working connection takes."""
        return [replace(phase, holds=True) for phase in super().phases(options, server)]


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


class TlsAuth(Scenario):
    """STARTTLS and AUTH PLAIN, on kept sessions, or with --reconnect for every message."""

    name = "tls-auth"
    summary = "a closed loop with STARTTLS and AUTH; with --reconnect for every message"
    defaults = Defaults(sessions=200, messages=5_000)
    needs = Needs(postroad_only=True)

    def job(self, options: Options, server: Server) -> Job:
        """On the port with STARTTLS, as a credential made for it."""
        return _inside_tls(super().job(options, server), _postroad(server))


class Idle(Scenario):
    """Connections that do nothing, and what memory they take."""

    name = "idle"
    summary = "connections that are held and do nothing, plain, and inside TLS where there is a port for it: memory"
    defaults = Defaults(messages=0, seconds=8.0)

    def job(self, options: Options, server: Server) -> Job:
        """Nothing is sent."""
        return replace(super().job(options, server), messages=0, rate=0.0, idle=True, messages_per_connection=0)

    def phases(self, options: Options, server: Server) -> Sequence[Phase]:
        """Plain, then TLS."""
        job = self.job(options, server)
        phases = [Phase("plain", (Stream("idle", job, options.processes),), holds=True)]
        if isinstance(server, Postroad):
            # With AUTH, because before it a connection is not held for long.
            tls = _inside_tls(job, server)
            phases.append(Phase("tls", (Stream("idle", tls, options.processes),), holds=True))
        return phases


class Slow(Scenario):
    """Good clients alone, then beside slow ones."""

    name = "slow"
    summary = "a paced stream alone, then beside as many clients that send their content drop by drop"
    defaults = Defaults(sessions=200, messages=0, seconds=15.0, rate=200.0)

    def phases(self, options: Options, server: Server) -> Sequence[Phase]:
        """The slow ones begin with the others, and go on until their last message is through."""
        good = Stream("good", self.job(options, server), 1)
        drip = replace(good.job, rate=0.0, drip_bytes=_DRIP_BYTES, drip_interval_s=_DRIP_INTERVAL_S)
        return [Phase("alone", (good,)), Phase("disturbed", (good, Stream("slow", drip, 1)))]


class DeadTarget(Scenario):
    """One account's provider accepts connections and says nothing; another account's lives."""

    name = "dead-target"
    summary = "a paced stream alone, then beside an account whose provider is dead: accepts and says nothing"
    defaults = Defaults(sessions=50, messages=0, seconds=15.0, rate=200.0)
    needs = Needs((_FIRST, replace(_SECOND, sink="dead")))

    def phases(self, options: Options, server: Server) -> Sequence[Phase]:
        """Both at the same rate."""
        live = Stream("live", self.job(options, server), 1)
        dead = Stream("dead", _from(_SECOND, live.job), 1, arrives=False)
        return [Phase("alone", (live,)), Phase("disturbed", (live, dead))]


class Flood(Scenario):
    """Two accounts; one floods. A third may keep the server busy all the time, as in daily life."""

    name = "flood"
    summary = "a paced stream alone, then beside an account that floods: --messages, at once or at --flood-rate"
    defaults = Defaults(sessions=50, messages=100_000, seconds=30.0, rate=50.0)
    needs = Needs((_FIRST, _SECOND, _THIRD))

    def phases(self, options: Options, server: Server) -> Sequence[Phase]:
        """Quiet account and background send for as many seconds as said; the flood has no bound but its messages."""
        quiet = Stream("quiet", replace(self.job(options, server), messages=0), 1)
        flood = _from(_SECOND, quiet.job)
        flood = replace(flood, messages=options.messages, seconds=0.0, rate=options.flood_rate)
        flood = replace(flood, sessions=options.flood_sessions)
        before = (quiet, *self._background(options, quiet.job))
        return [Phase("alone", before), Phase("disturbed", (*before, Stream("flood", flood, options.processes)))]

    @staticmethod
    def _background(options: Options, quiet: Job) -> tuple[Stream, ...]:
        if not options.background_sessions:
            return ()
        job = replace(_from(_THIRD, quiet), sessions=options.background_sessions, rate=0.0)
        return (Stream("background", job, 1),)


class Limits(Scenario):
    """An account sends above its limit, beside one that has none."""

    name = "limits"
    summary = "an account sends at twice its limit of messages, over all workers, beside one without a limit"
    defaults = Defaults(sessions=50, messages=0, seconds=15.0, rate=2.0 * _LIMIT_PER_S)
    needs = Needs((_FIRST, replace(_SECOND, messages_per_s=_LIMIT_PER_S)))

    def phases(self, options: Options, server: Server) -> Sequence[Phase]:
        """The limited one counts: what is refused is answered with 450."""
        free = Stream("free", replace(self.job(options, server), rate=_LIMIT_PER_S), 1)
        limited = Stream("limited", replace(_from(_SECOND, free.job), rate=options.rate), options.processes)
        return [Phase("load", (limited, free))]

    def findings(self, options: Options, result: RunResult) -> dict[str, float]:
        """How many times what the limit allows: the burst at the begin, and its rate until the last was answered."""
        limited = result.streams["limited"]
        seconds = limited.verdict.answered / limited.answered_per_s if limited.answered_per_s else 0.0
        return {"admitted_share": round(limited.verdict.answered / (_LIMIT_PER_S * (1 + seconds)), 3)}


class Api(Scenario):
    """The control plane's API under load, alone, then beside SMTP."""

    name = "api"
    summary = "100 API requests/s alone, then beside 500 SMTP sessions at --rate"
    defaults = Defaults(sessions=500, messages=0, seconds=15.0, rate=500.0)
    needs = Needs(postroad_only=True)

    def phases(self, options: Options, server: Server) -> Sequence[Phase]:
        """The API is the stream that counts."""
        postroad = _postroad(server)
        mail = self.job(options, server)
        job = replace(
            mail,
            port=postroad.ports["grpc"],
            ca_file=str(postroad.ca_file),
            username=postroad.tenants[0].name,
            password=postroad.api_key,
            sessions=1,
            messages=0,
            rate=options.api_rate,
        )
        api = Stream("api", job, 1, arrives=False, is_mail=False, module="benchmarks.load.api")
        return [Phase("alone", (api,)), Phase("disturbed", (api, Stream("smtp", mail, options.processes)))]


class ApiSend(Scenario):
    """Mail that is sent by API, with one control plane, and delivered by one node."""

    name = "api-send"
    summary = "10,000 messages a minute by SendMessage, each a call with a request id; delivered to the sink"
    defaults = Defaults(sessions=64, messages=0, seconds=60.0, rate=10_000 / 60)
    needs = Needs(postroad_only=True)
    module = "benchmarks.load.api_send"

    def job(self, options: Options, server: Server) -> Job:
        """By the API of the first account, as an operator's key."""
        postroad = _postroad(server)
        return replace(
            super().job(options, server),
            port=postroad.ports["grpc"],
            ca_file=str(postroad.ca_file),
            username=postroad.tenants[0].name,
            password=postroad.api_key,
        )

    def phases(self, options: Options, server: Server) -> Sequence[Phase]:
        """One stream, by calls instead of SMTP."""
        job = self.job(options, server)
        return [Phase("load", (Stream("api-send", job, options.processes, module=self.module),))]


def _inside_tls(job: Job, server: Postroad) -> Job:
    """By STARTTLS, as a credential made for it."""
    login = server.create_login()
    return replace(
        job,
        port=server.tls_port,
        tls=True,
        ca_file=str(server.ca_file),
        username=login.username,
        password=login.password,
    )


def _from(place: Place, job: Job) -> Job:
    return replace(job, source_address=place.address, sender=f"app@{place.account}.example.org")


def _postroad(server: Server) -> Postroad:
    if not isinstance(server, Postroad):
        raise ToolError("only Postroad is set up for this scenario")
    return server


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Closed(),
        Paced(),
        Ramp(),
        ConnectionPerMessage(),
        Large(),
        TlsAuth(),
        Idle(),
        Slow(),
        DeadTarget(),
        Flood(),
        Limits(),
        Api(),
        ApiSend(),
    )
}
