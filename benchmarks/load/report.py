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


def progress_line(progress: Progress) -> str:
    """One line a second while a run goes on."""
    rate = progress.answered / max(progress.elapsed_s, 0.001)
    return (
        f"{progress.elapsed_s:5.0f} s  {rate:7,.0f}/s  answered {progress.answered:9,}  arrived {progress.arrived:9,}  "
        f"open {progress.open:6,}  p95 dot→250 {progress.dot.p95:8,.1f} ms  errors {progress.errors:,}"
    )


def run_table(result: RunResult) -> str:
    """All figures of one run."""
    lines = []
    for name, stream in result.streams.items():
        lines += _stream_lines(name, stream)
    cpu = result.cpu_us_per_message
    parts = "  ".join(f"{role} {value:,.0f}" for role, value in cpu.items() if role != "total" and value >= 1)
    lines.append(f"  CPU µs/message   {cpu['total']:8,.0f}   = {parts}")
    load = "  ".join(f"{role} {value:,.0f}" for role, value in result.load_cpu_us_per_message.items())
    lines.append(f"  of the load      {sum(result.load_cpu_us_per_message.values()):8,.0f}   = {load}")
    lines += [f"  PROBLEM: {problem}" for problem in result.problems]
    return "\n".join(lines)


def _stream_lines(name: str, stream: StreamResult) -> list[str]:
    verdict = stream.verdict
    errors = "  ".join(f"{code}: {count:,}" for code, count in sorted(stream.errors.items())) or "none"
    lines = [
        (
            f"  {name}: answered {verdict.answered:,} of {stream.begun:,}, arrived {verdict.arrived:,}, "
            f"lost {verdict.lost:,}, twice {verdict.duplicates:,}, errors {errors}"
        ),
        f"  messages/s       {stream.answered_per_s:8,.0f} answered   {stream.delivered_per_s:8,.0f} delivered",
        "  milliseconds          p50      p95      p99      max",
    ]
    titles = {
        "connect": "connect→220",
        "dot": "dot→250",
        "message": "intended→250",
        "arrival": "intended→sink",
    }
    for key, title in titles.items():
        figures = stream.latency_ms[key]
        if figures["values"]:
            row = "".join(f"{figures[each]:9,.1f}" for each in ("p50", "p95", "p99", "max"))
            lines.append(f"    {title:14}{row}")
    return lines


def figures(result: RunResult) -> dict[str, float]:
    """Return the figures of a run that medians are made of, by name; the first stream's."""
    stream = next(iter(result.streams.values()))
    found = {
        "answered_per_s": stream.answered_per_s,
        "delivered_per_s": stream.delivered_per_s,
        "cpu_us_per_message": result.cpu_us_per_message["total"],
    }
    for key in ("connect", "dot", "message", "arrival"):
        for each in ("p50", "p95", "p99"):
            found[f"{key}_{each}_ms"] = stream.latency_ms[key][each]
    return found


def medians(results: Sequence[tuple[str, RunResult]]) -> dict[str, dict[str, float]]:
    """Return the median of each figure by `peer phase`."""
    groups: dict[str, list[dict[str, float]]] = {}
    for phase, result in results:
        groups.setdefault(_group(result.peer, phase), []).append(figures(result))
    return {
        group: {name: statistics.median(figure[name] for figure in many) for name in many[0]}
        for group, many in groups.items()
    }


def _group(peer: str, phase: str) -> str:
    return peer if phase == "load" else f"{peer} {phase}"


def ratios(of: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return each other group's share of the first one's figures: how many times as much."""
    if len(of) < 2:
        return {}
    first, *others = of
    return {
        f"{first} / {other}": {
            name: round(of[first][name] / value, 3) for name, value in of[other].items() if value and of[first][name]
        }
        for other in others
    }


def summary_table(of: dict[str, dict[str, float]], relations: dict[str, dict[str, float]]) -> str:
    """Medians side by side, with ratios."""
    columns = {**of, **relations}
    names = list(next(iter(of.values())))
    width = max(len(name) for name in names)
    lines = [" " * width + "".join(f"{title:>22}" for title in columns)]
    for name in names:
        cells = "".join(f"{_cell(column.get(name)):>22}" for column in columns.values())
        lines.append(f"{name:{width}}{cells}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def as_json(options: Options, results: Sequence[tuple[str, RunResult]], notes: Sequence[str]) -> dict[str, Any]:
    """Return everything as plain values; `format` grows when the shape changes."""
    of = medians(results)
    return {
        "format": FORMAT,
        "scenario": options.scenario,
        "options": {name: _plain(value) for name, value in asdict(options).items()},
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "notes": list(notes),
        "runs": [{"phase": phase, **result.to_json()} for phase, result in results],
        "medians": of,
        "ratios": ratios(of),
        "problems": [problem for _, result in results for problem in result.problems],
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, str)) else str(value)
