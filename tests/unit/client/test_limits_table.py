"""What `postroad limits` makes of words and of states."""

from __future__ import annotations

from datetime import timedelta

import pytest
import typer
from google.protobuf.duration_pb2 import Duration

from postroad.cli import limits
from postroad.control.v1.limit_pb2 import Limit, LimitState


@pytest.mark.parametrize(
    ("text", "seconds"), [("minute", 60), ("hour", 3_600), ("day", 86_400), ("90s", 90), ("10m", 600), ("2h", 7_200)]
)
def test_a_period_is_a_word_or_a_number_with_a_unit(text: str, seconds: int) -> None:
    assert limits._period(text) == Duration(seconds=seconds)


@pytest.mark.parametrize("text", ["", "week", "10", "1.5h", "-1s", "1h30m", "1w"])
def test_another_period_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        limits._period(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0s"),
        (0.64, "0.6s"),
        (2, "2s"),
        (59.6, "1m"),
        (90, "1m30s"),
        (3_600, "1h"),
        (3_661, "1h1m"),
        (90_000, "1d1h"),
    ],
)
def test_a_span_is_told_in_two_units(seconds: float, text: str) -> None:
    assert limits._span(seconds) == text


def cells(limit: Limit) -> list[list[str]]:
    return [[column.cell(row) for column in limits._COLUMNS] for row in limits._rows(limit)]


def test_a_bucket_shows_what_is_left_and_when_more_comes() -> None:
    next_delay, full_delay = Duration(), Duration()
    next_delay.FromTimedelta(timedelta(seconds=0.6))
    full_delay.FromTimedelta(timedelta(seconds=150))
    state = LimitState.Subject(
        subject="accounts/demo", available=38, used=12, capacity=50, next_delay=next_delay, full_delay=full_delay
    )
    limit = Limit(
        name="accounts/demo/limits/trial",
        scope=Limit.SCOPE_ACCOUNT,
        unit=Limit.UNIT_MESSAGE,
        amount=500,
        period=Duration(seconds=86_400),
        origin=Limit.ORIGIN_ACCOUNT,
        state=LimitState(known=True, subjects=[state]),
    )
    row = ["trial", "account", "accounts/demo", "500 messages a day", "38 of 50", "0.6s", "2m30s"]
    assert cells(limit) == [row]


def test_a_limit_without_subjects_to_show_is_a_line_too() -> None:
    limit = Limit(scope=Limit.SCOPE_ADDRESS, unit=Limit.UNIT_CONNECTION, amount=1, origin=Limit.ORIGIN_DEFAULT)
    limit.period.seconds = 90
    limit.state.known = True
    assert cells(limit) == [["default", "address", "each address", "1 connection in 1m30s", "", "", ""]]
    limit.state.known = False
    assert cells(limit)[0][4] == "?"


def test_connections_at_once_have_no_time() -> None:
    limit = Limit(
        name="limits/hosts",
        scope=Limit.SCOPE_DESTINATION,
        unit=Limit.UNIT_CONNECTION,
        subject="mx.example",
        amount=5,
        origin=Limit.ORIGIN_SHARED,
        state=LimitState(known=True, subjects=[LimitState.Subject(subject="mx.example", available=2, capacity=5)]),
    )
    row = ["limits/hosts", "destination", "mx.example", "5 connections at once", "2 of 5", "", ""]
    assert cells(limit) == [row]
