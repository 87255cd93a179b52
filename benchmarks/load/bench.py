"""Rounds of a scenario: peers are started once, warmed up, and measured in turn, so that a slow minute slows all."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace

from benchmarks.load.children import SinkProcess
from benchmarks.load.options import Options
from benchmarks.load.peers import Server, start_peer
from benchmarks.load.report import progress_line, run_table
from benchmarks.load.results import RunResult
from benchmarks.load.run import Progress, Run
from benchmarks.load.scenarios import SCENARIOS, Phase, Scenario
from benchmarks.postroad import Postroad

_WARM_UP_MESSAGES = 2_000


def run_bench(options: Options) -> tuple[list[tuple[str, RunResult]], list[str]]:
    """Return each run with the name of its phase, and notes. ToolError when there can be no figures."""
    scenario = SCENARIOS[options.scenario]
    results: list[tuple[str, RunResult]] = []
    with contextlib.ExitStack() as stack:
        sink = SinkProcess(options.sink_options)
        stack.callback(sink.close)
        servers: list[Server] = []
        for name in options.peers:
            servers.append(start_peer(name, sink.port, scenario.needs, options.workers))
            stack.callback(servers[-1].close)
        for server in servers:
            _warm_up(scenario, options, server, sink)
        for number in range(options.rounds):
            for server in servers:
                for phase in scenario.phases(options, server):
                    print(f"\nround {number + 1}, {server.name}, {phase.name}", flush=True)
                    result = _measure(server, sink, phase)
                    print(run_table(result), flush=True)
                    results.append((phase.name, result))
    return results, [f"one worker a core: {options.workers}", "fsync before 250 on every peer"]


def _warm_up(scenario: Scenario, options: Options, server: Server, sink: SinkProcess) -> None:
    job = scenario.job(options, server)
    messages = min(_WARM_UP_MESSAGES, job.messages or _WARM_UP_MESSAGES)
    short = replace(job, messages=messages, rate=0.0, seconds=0.0, connect_over_s=0.0, sessions=min(job.sessions, 100))
    phase = scenario.phases(options, server)[0]
    print(f"warming up {server.name}", flush=True)
    _measure(server, sink, Phase("warm-up", (replace(phase.streams[0], job=short),)))


def _measure(server: Server, sink: SinkProcess, phase: Phase) -> RunResult:
    before = server.recorded() if isinstance(server, Postroad) else 0
    result = Run(server, sink, _say).measure(phase.streams)
    if isinstance(server, Postroad):
        recorded = server.recorded() - before
        answered = sum(stream.verdict.answered for stream in result.streams.values())
        result.recorded = recorded
        if recorded < answered:
            result.problems.append(f"{answered - recorded} of {answered} answered messages have no record")
    return result


def _say(progress: Progress) -> None:
    sys.stderr.write(progress_line(progress) + "\n")
    sys.stderr.flush()
