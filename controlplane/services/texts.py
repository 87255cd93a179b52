"""Checks of texts and times that several resources share.

Contract. Each function returns nothing, or raises InvalidArgumentError for the field that it is told.
"""

from __future__ import annotations

from datetime import datetime

from controlplane.domain.errors import invalid

_DISPLAY_NAME_LIMIT = 200
_REASON_LIMIT = 500


def check_display_name(text: str, field: str) -> None:
    """At most 200 characters, and nothing that a terminal would act on."""
    _check_text(text, field, _DISPLAY_NAME_LIMIT)


def check_reason(text: str) -> None:
    """At most 500 characters, and nothing that a terminal would act on."""
    _check_text(text, "reason", _REASON_LIMIT)


def check_expiry(time: datetime | None, now: datetime, field: str) -> None:
    """Not in the past."""
    if time is not None and time <= now:
        raise invalid(field, "must lie in the future")


def _check_text(text: str, field: str, limit: int) -> None:
    if len(text) > limit:
        raise invalid(field, f"must be at most {limit} characters")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise invalid(field, "must not hold control characters")
