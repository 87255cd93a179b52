"""Dates and times of RFC 3339 as milliseconds since 1970, and back.

Contract. `parse_date_time` takes exactly the grammar `date-time` (section 5.6): four digits of a year, "T", seconds,
and an offset; letters in either case, any number of digits of a fraction. What lies between two milliseconds counts as
the later one, so that nothing happens before its time. A second 60 is taken where a leap second can be, at the end of
a day in UTC, and is the first second of the next one. ValueError for anything else, never another exception.
`format_date_time` writes whole seconds in UTC, rounded down.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime

_DATE_TIME = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?"
    r"(?:[Zz]|([+-])([0-9]{2}):([0-9]{2}))"
)
_EPOCH_DAY = date(1970, 1, 1).toordinal()
_DAY_S = 86_400
_MAX_FRACTION_DIGITS = 100


def parse_date_time(text: str) -> int:
    """Return the milliseconds since 1970 that `text` names. ValueError when it is no date-time of RFC 3339."""
    match = _DATE_TIME.fullmatch(text)
    if match is None:
        raise ValueError("no date-time")
    year, month, day, hour, minute, second = (int(match[group]) for group in range(1, 7))
    fraction = match[7] or "0"
    offset_hour, offset_minute = int(match[9] or 0), int(match[10] or 0)
    if hour > 23 or minute > 59 or second > 60 or offset_hour > 23 or offset_minute > 59:
        raise ValueError("no time of day")
    if len(fraction) > _MAX_FRACTION_DIGITS:
        raise ValueError("a fraction of too many digits")
    days = date(year, month, day).toordinal() - _EPOCH_DAY
    offset_s = (offset_hour * 60 + offset_minute) * 60
    seconds = days * _DAY_S + hour * 3_600 + minute * 60 + second - (-offset_s if match[8] == "-" else offset_s)
    if second == 60 and seconds % _DAY_S:
        raise ValueError("no place for a leap second")
    parts: int = 10 ** len(fraction)
    return seconds * 1000 - -int(fraction) * 1000 // parts


def format_date_time(time_ms: int) -> str:
    """Return the date and time in UTC, to the second."""
    return datetime.fromtimestamp(time_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
