"""What people read and programs read: tables of a run, medians and ratios of all, and the JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.load.options import Options
from benchmarks.load.results import RunResult, StreamResult
from benchmarks.load.run import Progress

FORMAT = 1

_SECURITY = {"tls-auth": "STARTTLS and AUTH", "idle": "plain, then STARTTLS and AUTH"}
_TITLES = {"connect": "connect→220", "dot": "dot→250", "message": "intended→250", "arrival": "intended→sink"}


def progress_line(progress: Progress) -> str:
    """One line a second while a run goes on."""
    rate = progress.answered / max(progress.elapsed_s, 0.001)
    return (
        f"{progress.elapsed_s:6.1f} s  {rate:7,.0f}/s  answered {progress.answered:9,}  arrived {progress.arrived:9,}  "
        f"open {progress.open:6,}  p95 dot→250 {progress.dot.p95:8,.1f} ms  errors {progress.errors:,}"
    )


def conditions(options: Options) -> str:
    """Return what must be said with every figure."""
    security = _SECURITY.get(options.scenario, "no TLS, no AUTH")
    pipelining = "commands in one write" if options.pipelining else "each command waits for its reply"
    return (
        f"{options.size_bytes:,} bytes, 1 recipient, {security}, no DKIM, {pipelining}, fsync before 250, "
        f"{os.cpu_count()} cores for server, load and sink, {options.workers} workers, "
        f"{options.processes} load processes"
    )


def run_table(result: RunResult) -> str:
    """All figures of one run."""
    lines = []
    for name, stream in result.streams.items():
        lines += _stream_lines(name, stream)
    lines += _cpu_lines(result)
    lines.append(f"  other processes  {result.others_cores:8.2f} cores")
    if result.memory:
        grown = "  ".join(
            f"{role} {value / 1024:,.1f}" for role, value in result.memory["bytes_per_connection"].items() if value
        )
        lines.append(f"  KiB/connection   of {result.memory['connections']:,}: {grown}")
    lines += [f"  {name:16} {value:8.3f}" for name, value in result.findings.items()]
    if result.recorded is not None:
        lines.append(f"  recorded         {result.recorded:8,}")
    if result.dead_target_connections is not None:
        lines.append(f"  connections to the dead target {result.dead_target_connections:,}")
    lines += [f"  PROBLEM: {problem}" for problem in result.problems]
    return "\n".join(lines)


def _cpu_lines(result: RunResult) -> list[str]:
    if not result.cpu_us_per_message:
        return [f"  CPU ms           {result.cpu_s['total'] * 1_000:8,.0f}   in {result.seconds:,.1f} s"]
    cpu, load = result.cpu_us_per_message, result.load_cpu_us_per_message
    parts = "  ".join(f"{role} {value:,.0f}" for role, value in cpu.items() if role != "total" and value >= 1)
    load_parts = "  ".join(f"{role} {value:,.0f}" for role, value in load.items())
    return [
        f"  CPU µs/message   {cpu['total']:8,.0f}   = {parts}",
        f"  of the load      {sum(load.values()):8,.0f}   = {load_parts}",
    ]


def _stream_lines(name: str, stream: StreamResult) -> list[str]:
    verdict = stream.verdict
    errors = "  ".join(f"{code}: {count:,}" for code, count in sorted(stream.errors.items())) or "none"
    if not verdict.answered:
        return [f"  {name}: errors {errors}"]
    lines = [
        (
            f"  {name}: answered {verdict.answered:,} of {stream.begun:,}, arrived {verdict.arrived:,}, "
            f"lost {verdict.lost:,}, twice {verdict.duplicates:,}, errors {errors}"
        ),
        f"  messages/s       {stream.answered_per_s:8,.0f} answered   {stream.delivered_per_s:8,.0f} delivered",
        "  milliseconds            p50      p95      p99      max",
    ]
    for key, figures in stream.latency_ms.items():
        if figures["values"]:
            row = "".join(f"{figures[each]:9,.1f}" for each in ("p50", "p95", "p99", "max"))
            lines.append(f"    {_TITLES.get(key, key):16}{row}")
    return lines


def figures(result: RunResult) -> dict[str, float]:
    """Return the figures of a run that medians are made of, by name: those of the first stream. Nothing that is 0."""
    stream = next(iter(result.streams.values()))
    found = {
        "answered_per_s": stream.answered_per_s,
        "delivered_per_s": stream.delivered_per_s,
        "cpu_us_per_message": result.cpu_us_per_message.get("total", 0.0),
        "others_cores": result.others_cores,
        **result.findings,
    }
    for key in ("connect", "dot", "message", "arrival"):
        for each in ("p50", "p95", "p99", "max"):
            found[f"{key}_{each}_ms"] = stream.latency_ms[key][each]
    if result.memory:
        found["kib_per_connection"] = result.memory["bytes_per_connection"]["holders"] / 1024
    return {name: value for name, value in found.items() if value}


def medians(results: Sequence[RunResult]) -> dict[str, dict[str, float]]:
    """Return the median of each figure by `peer phase`."""
    groups: dict[str, list[dict[str, float]]] = {}
    for result in results:
        groups.setdefault(_group(result.peer, result.phase), []).append(figures(result))
    return {
        group: {
            name: round(statistics.median([figure[name] for figure in many if name in figure]), 3)
            for name in dict.fromkeys(name for figure in many for name in figure)
        }
        for group, many in groups.items()
    }


def _group(peer: str, phase: str) -> str:
    return peer if phase == "load" else f"{peer} {phase}"


def ratios(results: Sequence[RunResult]) -> dict[str, dict[str, float]]:
    """Return how many times as much: the first peer's figures of the others', and a disturbed phase's of the first."""
    of = medians(results)
    peers = list(dict.fromkeys(result.peer for result in results))
    phases = list(dict.fromkeys(result.phase for result in results))
    pairs = [(_group(peers[0], phase), _group(peer, phase)) for peer in peers[1:] for phase in phases]
    if phases[1:] == ["disturbed"]:
        pairs += [(_group(peer, "disturbed"), _group(peer, phases[0])) for peer in peers]
    return {
        f"{one} / {other}": {name: round(of[one][name] / of[other][name], 3) for name in of[one] if name in of[other]}
        for one, other in pairs
        if one in of and other in of
    }


def summary_table(results: Sequence[RunResult]) -> str:
    """Medians side by side, and ratios."""
    columns = {**medians(results), **ratios(results)}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    first = max(len(name) for name in names) if names else 0
    widths = {title: max(len(title), 10) + 3 for title in columns}
    lines = [" " * first + "".join(f"{title:>{widths[title]}}" for title in columns)]
    for name in names:
        cells = "".join(f"{_cell(column.get(name)):>{widths[title]}}" for title, column in columns.items())
        lines.append(f"{name:{first}}{cells}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def as_json(options: Options, results: Sequence[RunResult]) -> dict[str, Any]:
    """Return everything as plain values; `format` grows when the shape changes."""
    return {
        "format": FORMAT,
        "scenario": options.scenario,
        "options": {name: _plain(value) for name, value in asdict(options).items()},
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "conditions": conditions(options),
        "runs": [result.to_json() for result in results],
        "medians": medians(results),
        "ratios": ratios(results),
        "problems": [problem for result in results for problem in result.problems],
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, str)) else str(value)
