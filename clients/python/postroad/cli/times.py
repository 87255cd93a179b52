"""Times as the line gives them, in the same forms for every command.

A moment is `2026-12-01`, `2026-12-01T08:00`, `2026-12-01T08:00:00` with `Z`, an offset or nothing behind it, which is
UTC, or a span from now: back for what was, ahead for what is to come. A span is `90s`, `15m`, `2h` or `3d`. Anything
else is a typer.BadParameter, so that typer names the option.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import typer
from google.protobuf.timestamp_pb2 import Timestamp

SPAN = "SPAN"
TIME = "TIME"
_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_SPAN = re.compile(r"([0-9]{1,9})([smhd])")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ].+)?")


def seconds_of(text: str) -> int:
    """Seconds in a span."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text} is no span of time: write 90s, 15m, 2h or 3d")
    return int(found[1]) * _UNITS_S[found[2]]


def span(text: str) -> str:
    """A span as it is, for an option whose text is shown again."""
    seconds_of(text)
    return text


def hold_seconds_of(text: str) -> int:
    """Seconds in a span, or in a number alone, which are seconds."""
    seconds = seconds_of(text if not text.isdecimal() else f"{text}s")
    if not seconds:
        raise typer.BadParameter("it is one second at least")
    return seconds


def earlier(text: str) -> datetime:
    """A moment; a span is so long ago."""
    return _moment(text, lambda span: datetime.now(UTC) - span)


def later(text: str) -> datetime:
    """A moment; a span is so long from now."""
    return _moment(text, lambda span: datetime.now(UTC) + span)


def timestamp(moment: datetime) -> Timestamp:
    """The moment as it travels."""
    found = Timestamp()
    found.FromDatetime(moment)
    return found


def earlier_option(name: str, help_text: str) -> Any:
    """An option that takes a moment in the past."""
    return typer.Option(
        name, parser=earlier, metavar=TIME, help=f"{help_text}: 2026-12-01T08:00:00Z, or 15m for 15m ago"
    )


def later_option(name: str, help_text: str) -> Any:
    """An option that takes a moment to come."""
    return typer.Option(
        name, parser=later, metavar=TIME, help=f"{help_text}: 2026-12-01T08:00:00Z, or 15m for 15m from now"
    )


def _moment(text: str, from_now: Callable[[timedelta], datetime]) -> datetime:
    try:
        if _SPAN.fullmatch(text):
            return from_now(timedelta(seconds=seconds_of(text)))
        if _DATE.fullmatch(text):
            moment = datetime.fromisoformat(text)
            return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass  # said below
    raise typer.BadParameter(f"{text} is no time: write 2026-12-01, 2026-12-01T08:00:00Z, or 15m, 2h or 3d")
