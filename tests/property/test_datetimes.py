"""Dates and times of RFC 3339: exactly its grammar, never early, and nothing but ValueError."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.core.datetimes import format_date_time, parse_date_time

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
moments = st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30))  # noqa: DTZ001 - a zone is added
offsets = st.integers(-(24 * 60 - 1), 24 * 60 - 1).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(moments, offsets)
def test_what_the_library_writes_is_read_as_the_millisecond_that_is_not_before_it(
    moment: datetime, zone: timezone
) -> None:
    moment = moment.replace(tzinfo=zone)
    microseconds = (moment - _EPOCH) // timedelta(microseconds=1)
    assert parse_date_time(moment.isoformat()) == -(-microseconds // 1000)


@given(st.integers(0, 253_402_300_799))
def test_what_is_written_reads_the_same(second: int) -> None:
    assert parse_date_time(format_date_time(second * 1000 + 999)) == second * 1000


@given(st.text(max_size=40) | st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,12}(Z|[+-][0-9:]{5})"))
def test_other_text_is_refused_with_a_value_error_or_is_a_time_that_the_library_knows_too(text: str) -> None:
    try:
        time_ms = parse_date_time(text)
    except ValueError:
        return
    known = (datetime.fromisoformat(text.upper().replace(":60", ":59")) - _EPOCH) // timedelta(milliseconds=1)
    assert 0 <= time_ms - known <= 1_001


@pytest.mark.parametrize(
    "text",
    [
        "2026-10-01 00:00:00Z", "20261001T000000Z", "2026-10-01T00:00:00", "2026-10-01T00:00:00z ",
        "2026-10-01T24:00:00Z",
        "2026-10-01T00:60:00Z", "2026-10-01T00:00:61Z", "2026-10-01T12:00:60Z", "2026-10-01T00:00:00,5Z",
        "2026-10-01T00:00:00.Z", "2026-10-01T00:00:00+24:00", "2026-10-01T00:00:00+0200", "2026-13-01T00:00:00Z",
        "2026-00-01T00:00:00Z", "0000-01-01T00:00:00Z", "2025-02-29T00:00:00Z", "+2026-10-01T00:00:00Z",
        "٢٠٢٦-10-01T00:00:00Z", "2026-10-01T00:00:00." + "1" * 101 + "Z", "2026-W40-4T00:00:00Z",
    ],
)  # fmt: skip
def test_what_the_grammar_does_not_have_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no |digits|month|day|year"):
        parse_date_time(text)


def test_a_leap_second_and_an_unknown_offset_are_read() -> None:
    assert parse_date_time("2016-12-31T23:59:60Z") == parse_date_time("2017-01-01T00:00:00Z")
    assert parse_date_time("2017-01-01T01:59:60+02:00") == parse_date_time("2017-01-01T00:00:00Z")
    assert parse_date_time("2017-01-01T00:00:00-00:00") == parse_date_time("2017-01-01T00:00:00Z")
