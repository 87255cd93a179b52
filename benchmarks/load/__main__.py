"""`postroad-bench SCENARIO [options]`: load from several processes; what it did to the server, as a table and JSON.

Exit status 0 when every run came to its end and every message that was answered with 250 arrived and was recorded; 1
when not, with what went wrong; 2 for arguments that make no sense. Progress goes to standard error, a line a second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.load.bench import run_bench
from benchmarks.load.options import Options
from benchmarks.load.peers import NAMES
from benchmarks.load.plot import draw
from benchmarks.load.report import as_json, summary_table
from benchmarks.load.scenarios import SCENARIOS
from benchmarks.smtp_tools import ToolError

Number = TypeVar("Number", int, float)

_OTHERS_SHARE = 4
_DEADLINE_S = 300.0


def parse(words: Sequence[str]) -> Options:
    """Return the options; exits with status 2 and a sentence when they make no sense."""
    parser = argparse.ArgumentParser(
        prog="postroad-bench",
        description="Load against Postroad and its peers.",
        epilog="\n".join(f"  {name:24} {each.summary}" for name, each in SCENARIOS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("scenario", choices=list(SCENARIOS), metavar="SCENARIO", help="see below")
    add("--sessions", type=int, help="connections at a time")
    add("--messages", type=int, help="messages a round; 0: until --seconds are over")
    add("--other-messages", type=int, help="messages a round of the other peers; a quarter of --messages")
    add("--seconds", type=float, help="nothing new begins after that; 0: until --messages are sent")
    add("--rate", type=float, help="messages a second on a schedule; 0: a closed loop")
    add("--size", type=int, help="bytes of a message with its header")
    add("--deadline", type=float, default=_DEADLINE_S, help="seconds after which load processes end in any case")
    add("--patience", type=float, default=15.0, help="seconds without an arrival after which the rest is lost")
    add("--rounds", type=int, default=1, help="rounds of each peer, in turn")
    add("--workers", type=int, default=os.cpu_count() or 1, help="workers of Postroad; one a core")
    add("--processes", type=int, default=2, help="load processes")
    add("--peer", action="append", choices=NAMES, help="who is measured, repeatable; postroad")
    add("--pipelining", action="store_true", help="MAIL, RCPT and DATA in one write; one by one without")
    add("--reconnect", action="store_true", help="a connection for every message")
    add("--flood-sessions", type=int, default=50, help="sessions of the account that floods")
    add("--background-sessions", type=int, default=0, help="flood: sessions of a third account, in a closed loop")
    add("--flood-rate", type=float, default=0.0, help="its messages a second; 0: a closed loop")
    add("--api-rate", type=float, default=100.0, help="API requests a second")
    add("--drop-every", type=int, metavar="N", help="the sink loses every N-th message: shows that a loss is found")
    add("--fail-every", type=int, metavar="N", help="the sink answers every N-th message with 451")
    add("--delay-ms", type=float, metavar="MS", help="the sink waits before each final reply")
    add("--capture", type=Path, metavar="FILE", help="the sink keeps all content there")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--plot", type=Path, metavar="FILE", help="write latency over time there, as SVG")
    given = parser.parse_args(words)
    defaults = SCENARIOS[given.scenario].defaults
    messages = _or(given.messages, defaults.messages)
    options = Options(
        scenario=given.scenario,
        sessions=_or(given.sessions, defaults.sessions),
        messages=messages,
        other_messages=_or(given.other_messages, messages and max(messages // _OTHERS_SHARE, 1)),
        seconds=_or(given.seconds, defaults.seconds),
        rate=_or(given.rate, defaults.rate),
        size_bytes=_or(given.size, defaults.size_bytes),
        deadline_s=given.deadline,
        patience_s=given.patience,
        rounds=given.rounds,
        workers=given.workers,
        processes=given.processes,
        peers=tuple(given.peer or ["postroad"]),
        pipelining=given.pipelining,
        reconnect=given.reconnect,
        flood_sessions=given.flood_sessions,
        flood_rate=given.flood_rate,
        background_sessions=given.background_sessions,
        api_rate=given.api_rate,
        sink_options=_sink_options(given),
        json_file=given.json,
        plot_file=given.plot,
    )
    if not (options.messages or options.seconds):
        parser.error("a run needs an end: say --messages or --seconds")
    if min(options.sessions, options.rounds, options.workers, options.processes) < 1:
        parser.error("sessions, rounds, workers and processes are 1 at least")
    return options


def _or(given: Number | None, default: Number) -> Number:
    return default if given is None else given


def _sink_options(given: argparse.Namespace) -> tuple[str, ...]:
    named = {
        "--drop-every": given.drop_every,
        "--fail-every": given.fail_every,
        "--delay-ms": given.delay_ms,
        "--capture": given.capture,
    }
    return tuple(word for name, value in named.items() if value is not None for word in (name, str(value)))


def main() -> int:
    """Run what the command line says."""
    options = parse(sys.argv[1:])
    try:
        results = run_bench(options)
    except ToolError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    print(f"\nmedians of {options.rounds} rounds, and ratios\n{summary_table(results)}")
    report = as_json(options, results)
    if options.json_file:
        options.json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.plot_file:
        title = f"{options.scenario}, {options.sessions:,} sessions, {options.size_bytes:,} bytes"
        options.plot_file.write_text(draw(title, results), encoding="utf-8")
    for problem in report["problems"]:
        sys.stderr.write(f"PROBLEM: {problem}\n")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
