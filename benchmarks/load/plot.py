"""Latency over time as one SVG: a band from p50 to p95 and a line of p99 for each run, and messages a second below.

Contract. `draw(results)` returns the text of an SVG 1.1 file; each run of a peer and phase has a colour, rounds of the
same have the same. The latencies are the first stream's dot to 250, on a logarithmic scale, because a stall and a
millisecond shall both be seen; requests of the API, which have no dot, are drawn by the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from benchmarks.load.results import RunResult, StreamResult

_WIDTH, _LEFT, _RIGHT = 900, 70, 20
_LATENCY_TOP, _LATENCY_BOTTOM = 60, 340
_RATE_TOP, _RATE_BOTTOM = 380, 500
_HEIGHT = 540
_COLOURS = ("#1f6fb4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#666666")
_LEAST_MS = 0.1

Scale = Callable[[float], float]


def draw(title: str, results: Sequence[RunResult]) -> str:
    """Return the SVG; see the module."""
    names = list(dict.fromkeys(_name(result) for result in results))
    streams = [(names.index(_name(result)), next(iter(result.streams.values()))) for result in results]
    rows = [row for _, stream in streams for row in stream.timeline]
    across = _linear(0, max([row["second"] for row in rows] + [1]), _LEFT, _WIDTH - _RIGHT)
    most_ms = max([row["dot_p99_ms"] for row in rows] + [1.0])
    up = _logarithmic(_LEAST_MS, 10 ** math.ceil(math.log10(most_ms)), _LATENCY_BOTTOM, _LATENCY_TOP)
    most_rate = max([row["answered"] for row in rows] + [1])
    rate_up = _linear(0, most_rate, _RATE_BOTTOM, _RATE_TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 24, title, size=16),
        _text(_LEFT, _LATENCY_TOP - 8, "dot→250 in ms: band p50 to p95, line p99", size=11),
        _text(_LEFT, _RATE_TOP - 8, "answered messages a second", size=11),
        *_latency_grid(up, most_ms),
        *_rate_grid(rate_up, most_rate),
        *_seconds_grid(across, max([row["second"] for row in rows] + [1])),
    ]
    for index, stream in streams:
        parts += _curves(stream, _COLOURS[index % len(_COLOURS)], across, up, rate_up)
    parts += [
        _text(_WIDTH - 200, 24 + 14 * index, name, size=11, colour=_COLOURS[index % len(_COLOURS)])
        for index, name in enumerate(names)
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _name(result: RunResult) -> str:
    return result.peer if result.phase == "load" else f"{result.peer} {result.phase}"


def _linear(low: float, high: float, begin: float, end: float) -> Scale:
    return lambda value: begin + (value - low) / (high - low) * (end - begin)


def _logarithmic(low: float, high: float, begin: float, end: float) -> Scale:
    linear = _linear(math.log10(low), math.log10(high), begin, end)
    return lambda value: linear(math.log10(max(value, low)))


def _curves(stream: StreamResult, colour: str, across: Scale, up: Scale, rate_up: Scale) -> list[str]:
    rows = [row for row in stream.timeline if row["answered"]]
    lower = [(across(row["second"]), up(row["dot_p50_ms"])) for row in rows]
    upper = [(across(row["second"]), up(row["dot_p95_ms"])) for row in rows]
    worst = [(across(row["second"]), up(row["dot_p99_ms"])) for row in rows]
    rates = [(across(row["second"]), rate_up(row["answered"])) for row in stream.timeline]
    return [
        f'<polygon points="{_points(lower + upper[::-1])}" fill="{colour}" fill-opacity="0.2"/>',
        f'<polyline points="{_points(worst)}" fill="none" stroke="{colour}"/>',
        f'<polyline points="{_points(rates)}" fill="none" stroke="{colour}"/>',
    ]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _latency_grid(up: Scale, most_ms: float) -> list[str]:
    decades = range(round(math.log10(_LEAST_MS)), math.ceil(math.log10(most_ms)) + 1)
    return [part for decade in decades for part in _line_across(up(10.0**decade), f"{10.0**decade:g}")]


def _rate_grid(up: Scale, most: float) -> list[str]:
    return [part for share in (0.0, 0.5, 1.0) for part in _line_across(up(most * share), f"{most * share:,.0f}")]


def _seconds_grid(across: Scale, last: float) -> list[str]:
    step = max(1, math.ceil(last / 10))
    marks = range(0, int(last) + 1, step)
    return [_text(across(second) - 4, _RATE_BOTTOM + 16, f"{second} s", size=10) for second in marks]


def _line_across(y: float, label: str) -> list[str]:
    return [
        f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>',
        _text(8, y + 4, label, size=10),
    ]


def _text(x: float, y: float, text: str, *, size: int, colour: str = "#222222") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
