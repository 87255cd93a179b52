"""The load harness against its own sink as the server: what it counts, and what it must not overlook."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.load.children import SinkProcess
from benchmarks.load.job import Job
from benchmarks.load.results import RunResult, Stream
from benchmarks.load.run import Progress, Run

_SENDER, _RECIPIENT = "app@bench.example.org", "someone@example.net"


class DirectPeer:
    """A server without anything between its door and its sink."""

    name = "direct"
    holders = ("door",)

    def cpu(self) -> dict[str, float]:
        return {"door": 0.0}

    def memory(self) -> dict[str, int]:
        return {"door": 0}

    def settle(self, timeout_s: float) -> bool:
        return True


@contextlib.contextmanager
def sink_process(*options: str) -> Iterator[SinkProcess]:
    sink = SinkProcess(options)
    try:
        yield sink
    finally:
        sink.close()


def job_for(sink: SinkProcess, *, messages: int = 60, sessions: int = 4, deadline_s: float = 20.0) -> Job:
    return Job(
        stream=0,
        port=sink.port,
        sender=_SENDER,
        recipient=_RECIPIENT,
        ledger_file="",
        deadline_s=deadline_s,
        sessions=sessions,
        messages=messages,
    )


def run(sink: SinkProcess, job: Job, *, patience_s: float = 0.5) -> tuple[RunResult, list[Progress]]:
    progress: list[Progress] = []
    result = Run(DirectPeer(), sink, progress.append, patience_s=patience_s).measure([Stream("load", job, 2)])
    return result, progress


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pipelining": True},
        {"messages_per_connection": 1},
        {"size_bytes": 300_000},
        {"rate": 200.0},
        {"rate": 200.0, "messages_per_connection": 1},
        {"connect_over_s": 0.2, "rate": 100.0},
        {"drip_bytes": 2_000, "drip_interval_s": 0.01},
        {"source_address": "127.0.0.2"},
    ],
    ids=str,
)
def test_every_message_is_counted_at_both_ends(change: dict[str, object]) -> None:
    with sink_process() as sink:
        result, _ = run(sink, replace(job_for(sink), **change))  # type: ignore[arg-type]  # by name, from a list
    load = result.streams["load"]
    assert result.problems == []
    assert (load.begun, load.verdict.answered, load.verdict.arrived, load.errors) == (60, 60, 60, {})
    assert (load.verdict.lost, load.verdict.duplicates, load.unanswered) == (0, 0, 0)
    for name in ("dot", "message", "arrival"):
        assert load.latency_ms[name]["values"] == 60
    connections = 60 if change.get("messages_per_connection") else 4
    assert load.latency_ms["connect"]["values"] == connections


def test_a_loss_behind_the_answer_is_a_problem_that_names_the_messages() -> None:
    with sink_process("--drop-every", "20") as sink:
        result, _ = run(sink, job_for(sink))
    assert result.streams["load"].verdict.lost == 3
    (problem,) = result.problems
    assert "3 of 60 answered messages did not arrive" in problem


def test_refusals_are_counted_by_code_and_are_no_loss() -> None:
    with sink_process("--fail-every", "20") as sink:
        result, _ = run(sink, job_for(sink))
    load = result.streams["load"]
    assert load.errors == {"451": 3}
    assert (load.verdict.answered, load.verdict.lost, result.problems) == (57, 0, [])


def test_a_server_that_says_nothing_ends_at_the_deadline_with_a_problem() -> None:
    with sink_process("--silent") as sink:
        result, _ = run(sink, job_for(sink, deadline_s=0.5))
        assert sink.connections_so_far() == 4
    assert any("reached its deadline" in problem for problem in result.problems)
    assert any("no message was answered" in problem for problem in result.problems)


def test_a_refused_connection_counts_as_such() -> None:
    with sink_process() as sink:
        port = sink.port
    with sink_process() as sink:
        result, _ = run(sink, replace(job_for(sink, deadline_s=0.5), port=port))
    assert set(result.streams["load"].errors) == {"connect"}


def test_progress_is_said_while_messages_go_through() -> None:
    with sink_process() as sink:
        job = replace(job_for(sink, messages=0), seconds=2.5, rate=100.0)
        result, progress = run(sink, job)
    assert len(progress) >= 2
    assert progress[0].open == 4
    assert 0 < progress[0].answered < result.streams["load"].verdict.answered
    assert progress[0].dot.p95 > 0


def test_the_sink_keeps_what_it_took_on_wish(tmp_path: Path) -> None:
    with sink_process("--capture", str(tmp_path / "all")) as sink:
        run(sink, job_for(sink, messages=2))
    assert (tmp_path / "all").read_bytes().count(b"Subject: a message of the load harness\r\n") == 2


def test_a_stall_is_charged_to_every_message_that_it_kept_from_being_sent() -> None:
    """One session, 100 messages a second, and a server that takes 100 ms for each: the line grows.

    Without the schedule each message would have waited for its own reply only, 100 ms.
    """
    with sink_process("--delay-ms", "100") as sink:
        job = replace(job_for(sink, messages=20, sessions=1), rate=100.0)
        result, _ = run(sink, job)
    latency = result.streams["load"].latency_ms
    # The last is meant to be sent after 190 ms and has its reply after 20 times 100 ms.
    assert latency["message"]["max"] > 1_500
    assert latency["message"]["p50"] > 4 * latency["dot"]["p50"]
