"""Times on the line: the same forms for every option."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import typer

from postroad.cli import times
from postroad.cli.main import run

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-28", NOON.replace(hour=0)),
        ("2026-11-28T12:00", NOON),
        ("2026-11-28T12:00:00", NOON),
        ("2026-11-28T12:00:00Z", NOON),
        ("2026-11-28 12:00:00", NOON),
        ("2026-11-28T12:00:00.500Z", NOON + timedelta(seconds=0.5)),
        ("2026-11-28T14:00:00+02:00", NOON),
    ],
)
def test_a_moment_has_one_meaning_before_and_behind_us(text: str, moment: datetime) -> None:
    assert (times.earlier(text), times.later(text)) == (moment, moment)


def test_a_span_leads_back_for_what_was_and_ahead_for_what_is_to_come() -> None:
    before = datetime.now(UTC)
    earlier, later = times.earlier("2h"), times.later("2h")
    after = datetime.now(UTC)
    span = timedelta(hours=2)
    assert before <= earlier + span <= after
    assert before <= later - span <= after


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7_200), ("3d", 259_200)])
def test_a_span_is_a_number_with_a_unit(text: str, seconds: int) -> None:
    assert times.seconds_of(text) == times.hold_seconds_of(text) == seconds


def test_only_what_was_always_given_in_seconds_takes_a_number_alone() -> None:
    assert times.hold_seconds_of("90") == 90
    with pytest.raises(typer.BadParameter):
        times.seconds_of("90")


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands in the box."""
    return " ".join(word for word in capsys.readouterr().err.split() if word != "│")


@pytest.mark.parametrize(
    "text", ["", "now", "10", "m", "-5m", "1w", "2026-13-01", "2026-11-28T25:00", "20261128", "999999999d"]
)
@pytest.mark.parametrize(
    "line",
    [
        "messages list --since",
        "messages list --before",
        "messages send --at",
        "send --at",
        "credentials create x --expires",
    ],
)
def test_what_is_no_time_is_a_wrong_line_that_says_how_to_write_one(
    line: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    *words, option = line.split()
    assert run([*words, f"{option}={text}"]) == 2
    said = _said(capsys)
    assert option in said
    assert "2026-12-01T08:00:00Z, or 15m" in said


@pytest.mark.parametrize("line", ["messages hold --older-than", "messages send --in", "send --hold-for"])
def test_what_is_no_span_is_a_wrong_line_that_says_how_to_write_one(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    *words, option = line.split()
    assert run([*words, f"{option}=soon"]) == 2
    assert "write 90s, 15m, 2h or 3d" in _said(capsys)
