"""Rounds of a scenario: peers are started once, warmed up, and measured in turn, so that a slow minute slows all."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace

from benchmarks.load.children import SinkProcess
from benchmarks.load.memory import Held
from benchmarks.load.options import Options
from benchmarks.load.peers import Server, start_peer
from benchmarks.load.report import conditions, progress_line, run_table
from benchmarks.load.results import RunResult, Stream
from benchmarks.load.run import Progress, Run
from benchmarks.load.scenarios import SCENARIOS, Phase, Scenario
from benchmarks.postroad import Postroad

_WARM_UP_MESSAGES = 2_000
_WARM_UP_SESSIONS = 100
_FEW = 200
_RECORDS_S = 10.0
_POLL_S = 0.2


def run_bench(options: Options) -> list[RunResult]:
    """Return every run. ToolError when there can be no figures."""
    scenario = SCENARIOS[options.scenario]
    print(f"{options.scenario}: {conditions(options)}", flush=True)
    results: list[RunResult] = []
    with contextlib.ExitStack() as stack:
        sinks = {"live": SinkProcess(options.sink_options)}
        stack.callback(sinks["live"].close)
        if scenario.needs.has_dead_sink:
            sinks["dead"] = SinkProcess(["--silent"])
            stack.callback(sinks["dead"].close)
        ports = {name: sink.port for name, sink in sinks.items()}
        servers: list[Server] = []
        for name in options.peers:
            _say(f"starting {name}")
            servers.append(start_peer(name, ports, scenario.needs, options.workers))
            stack.callback(servers[-1].close)
        for server in servers:
            _warm_up(scenario, options, server, sinks["live"])
        for number in range(options.rounds):
            for server in servers:
                for phase in scenario.phases(options, server):
                    print(f"\nround {number + 1}, {server.name}, {phase.name}", flush=True)
                    results.append(_measure(options, server, sinks, phase))
                    results[-1].findings = scenario.findings(options, results[-1])
                    print(run_table(results[-1]), flush=True)
    return results


def _warm_up(scenario: Scenario, options: Options, server: Server, sink: SinkProcess) -> None:
    """Send some mail in a closed loop, by the way of the scenario's own."""
    job = scenario.job(options, server)
    short = replace(
        job,
        messages=min(_WARM_UP_MESSAGES, job.messages or _WARM_UP_MESSAGES) if not job.idle else _FEW,
        # What connections take of memory is read on a server that has not held many before.
        sessions=1 if job.idle else min(job.sessions, _WARM_UP_SESSIONS),
        idle=False,
        rate=0.0,
        seconds=0.0,
        connect_over_s=0.0,
    )
    _say(f"warming up {server.name}")
    stream = Stream("warm-up", short, module=scenario.module)
    result = Run(server, sink, lambda _: None, patience_s=options.patience_s).measure([stream])
    for problem in result.problems:
        _say(f"PROBLEM while warming up: {problem}")


def _measure(options: Options, server: Server, sinks: dict[str, SinkProcess], phase: Phase) -> RunResult:
    before = server.recorded() if isinstance(server, Postroad) else 0
    held = Held(server, sum(stream.job.sessions for stream in phase.streams)) if phase.holds else None
    dead = sinks.get("dead")
    connections = dead.connections_so_far() if dead else 0
    result = Run(server, sinks["live"], _on_progress, patience_s=options.patience_s).measure(
        phase.streams, held.look if held else None
    )
    result.phase = phase.name
    result.memory = held.figures() if held else {}
    if dead:
        result.dead_target_connections = dead.connections_so_far() - connections
    if isinstance(server, Postroad):
        _count_records(server, result, before)
    return result


def _count_records(server: Postroad, result: RunResult, before: int) -> None:
    """Every answered message must have a record; mail that waits has its first one within seconds."""
    answered = sum(stream.verdict.answered for stream in result.streams.values() if stream.is_mail)
    deadline = time.monotonic() + _RECORDS_S
    while (recorded := server.recorded() - before) < answered and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    result.recorded = recorded
    if recorded < answered:
        result.problems.append(f"{answered - recorded} of {answered} answered messages have no record")


def _on_progress(progress: Progress) -> None:
    _say(progress_line(progress))


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
