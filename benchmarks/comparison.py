"""Postroad and Postfix by a stranger's tools, smtp-source and smtp-sink: the same load, the same sink, in one run.

It confirms what `postroad-bench` measures with tools of our own, which know more: latencies, and what was lost.
`python -m benchmarks.comparison` prints a table and, with --json FILE, writes the figures. Rounds are interleaved, so
that a machine that slows down slows both. What is compared is end to end: from the first connection of the load tool
to the last message at the sink, durable on both sides (fsync before 250), with PostgreSQL and Valkey on Postroad's
bill.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from benchmarks.postfix import Postfix
from benchmarks.postroad import Postroad
from benchmarks.processes import cpu_seconds
from benchmarks.smtp_tools import Load, Sink, ToolError, run_source

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIMEOUT_S = 300.0


class Peer(Protocol):
    """A server under test."""

    port: int
    master_pid: int

    def close(self) -> None:
        """Stop it."""
        ...


@dataclass(frozen=True)
class Round:
    """One measured round of one peer: messages a second answered with 250 and delivered, CPU microseconds a message."""

    peer: str
    accepted_per_s: float
    delivered_per_s: float
    cpu_us_per_message: float


def measure(name: str, peer: Peer, sink: Sink, load: Load) -> Round:
    """Send the load once and wait until the sink has all of it. ToolError when anything is missing at the end."""
    before_messages, before_cpu, begin = sink.messages, cpu_seconds(peer.master_pid), time.monotonic()
    run_source(load, peer.port, _TIMEOUT_S)
    answered = time.monotonic()
    sink.wait_for(before_messages + load.messages, _TIMEOUT_S)
    delivered = time.monotonic()
    cpu = cpu_seconds(peer.master_pid) - before_cpu
    return Round(
        name,
        load.messages / (answered - begin),
        load.messages / (delivered - begin),
        cpu / load.messages * 1_000_000,
    )


def compare(load: Load, rounds: int, messages: dict[str, int], workers: int) -> list[Round]:
    """Run both peers `rounds` times in turn, after a warm-up each."""
    results = []
    sink = Sink()
    peers: dict[str, Peer] = {}
    try:
        peers["postfix"] = Postfix(sink.port)
        peers["postroad"] = Postroad(sink.port, workers=workers)
        for name, peer in peers.items():
            measure(name, peer, sink, _sized(load, min(load.sessions * 2, messages[name])))
        for number in range(rounds):
            for name, peer in peers.items():
                results.append(measure(name, peer, sink, _sized(load, messages[name])))
                _say(f"round {number + 1}: {_line(results[-1])}")
    finally:
        for peer in peers.values():
            peer.close()
        sink.close()
    return results


def _sized(load: Load, messages: int) -> Load:
    return Load(messages, load.sessions, load.size_bytes, load.keep_connections, load.sender, load.recipient)


def _line(result: Round) -> str:
    return (
        f"{result.peer:9} accepted {result.accepted_per_s:8.0f}/s   delivered {result.delivered_per_s:8.0f}/s   "
        f"CPU {result.cpu_us_per_message:6.0f} µs/message"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def summary(results: Sequence[Round]) -> dict[str, float]:
    """Return medians of each peer and the ratio between them."""
    figures: dict[str, float] = {}
    for peer in ("postfix", "postroad"):
        mine = [result for result in results if result.peer == peer]
        figures[f"{peer}_delivered_per_s"] = statistics.median(result.delivered_per_s for result in mine)
        figures[f"{peer}_cpu_us_per_message"] = statistics.median(result.cpu_us_per_message for result in mine)
    figures["ratio"] = figures["postroad_delivered_per_s"] / figures["postfix_delivered_per_s"]
    return figures


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=200, help="connections at a time (200)")
    parser.add_argument("--size", type=int, default=4096, help="content bytes a message (4096)")
    parser.add_argument("--messages", type=int, default=20_000, help="messages a round for Postroad (20000)")
    parser.add_argument("--postfix-messages", type=int, default=5_000, help="messages a round for Postfix (5000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="workers of Postroad; one a core")
    parser.add_argument("--reconnect", action="store_true", help="a connection per message")
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def main() -> int:
    """Run, print, and return 0, or 1 with the reason when a tool failed."""
    arguments = _arguments()
    load = Load(
        arguments.messages,
        arguments.sessions,
        arguments.size,
        not arguments.reconnect,
        "app@bench.example.org",
        "someone@example.net",
    )
    try:
        results = compare(
            load,
            arguments.rounds,
            {"postroad": arguments.messages, "postfix": arguments.postfix_messages},
            arguments.workers,
        )
    except ToolError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    figures = summary(results)
    _say("\nmedians:")
    for key, value in figures.items():
        _say(f"  {key:30} {value:10.2f}")
    if arguments.json:
        report = {"load": asdict(load), "rounds": [asdict(result) for result in results], "medians": figures}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
