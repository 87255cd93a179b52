from __future__ import annotations

import pytest

from benchmarks.load.__main__ import parse
from benchmarks.load.job import job_from_json
from benchmarks.load.peers import Needs, start_peer
from benchmarks.load.scenarios import SCENARIOS, Phase
from benchmarks.smtp_tools import ToolError

_ANY_RELAY = [name for name, scenario in SCENARIOS.items() if not scenario.needs.postroad_only]


class Door:
    """A server that nobody talks to."""

    port = 2525
    holders = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def cpu(self) -> dict[str, float]:
        return {}

    def memory(self) -> dict[str, int]:
        return {}

    def settle(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        return


def phases(*words: str, server: str = "postroad") -> list[Phase]:
    options = parse(words)
    return list(SCENARIOS[options.scenario].phases(options, Door(server)))


@pytest.mark.parametrize("name", _ANY_RELAY)
def test_every_stream_of_every_scenario_has_an_end_by_default(name: str) -> None:
    for phase in phases(name):
        for stream in phase.streams:
            assert job_from_json(stream.job.to_json()) == stream.job
            assert stream.job.messages or stream.job.seconds < stream.job.deadline_s


@pytest.mark.parametrize("name", ["slow", "dead-target", "flood"])
def test_what_counts_is_sent_alike_with_the_disturbance_and_without(name: str) -> None:
    alone, disturbed = phases(name)
    assert alone.streams == disturbed.streams[:1]
    assert len(disturbed.streams) == 2


def test_the_flood_is_another_accounts_and_bounded_by_its_messages() -> None:
    quiet, flood = (stream.job for stream in phases("flood", "--messages", "500", "--flood-rate", "90")[1].streams)
    assert quiet.sender != flood.sender
    assert (flood.source_address, flood.messages, flood.seconds, flood.rate) == ("127.0.0.2", 500, 0.0, 90.0)
    assert (quiet.messages, quiet.rate) == (0, 50.0)


def test_mail_for_a_dead_target_is_not_expected_to_arrive() -> None:
    live, dead = phases("dead-target")[1].streams
    assert (live.arrives, dead.arrives) == (True, False)
    assert SCENARIOS["dead-target"].needs.has_dead_sink


def test_other_peers_get_fewer_messages() -> None:
    (ours,) = phases("closed", "--messages", "1000")[0].streams
    (theirs,) = phases("closed", "--messages", "1000", server="postfix")[0].streams
    assert (ours.job.messages, theirs.job.messages) == (1_000, 250)


def test_a_ramp_opens_connections_for_a_minute_at_most() -> None:
    assert phases("ramp", "--seconds", "18")[0].streams[0].job.connect_over_s == 12.0
    assert phases("ramp", "--seconds", "600", "--deadline", "900")[0].streams[0].job.connect_over_s == 60.0


def test_a_peer_that_cannot_do_what_a_scenario_needs_is_refused_before_it_starts() -> None:
    with pytest.raises(ToolError, match="not set up"):
        start_peer("postfix", {"live": 1}, Needs(postroad_only=True), 1)
