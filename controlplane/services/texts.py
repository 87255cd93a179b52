"""Checks of texts and times that several resources share.

Contract. Each function returns nothing, or raises InvalidArgumentError for the field that it is told.
"""

from __future__ import annotations

from datetime import datetime

from controlplane.domain.errors import invalid

_DISPLAY_NAME_LIMIT = 200
_REASON_LIMIT = 500
_DOMAIN_LIMIT = 255


def check_display_name(text: str, field: str) -> None:
    """At most 200 characters, and nothing that a terminal would act on."""
    _check_text(text, field, _DISPLAY_NAME_LIMIT)


def check_reason(text: str) -> None:
    """At most 500 characters, and nothing that a terminal would act on."""
    _check_text(text, "reason", _REASON_LIMIT)


def check_domain_text(text: str, field: str) -> None:
    """At most 255 characters (RFC 5321, section 4.5.3.1.2), and nothing that a domain cannot hold."""
    _check_text(text, field, _DOMAIN_LIMIT)
    if "@" in text or any(character.isspace() for character in text):
        raise invalid(field, "must be a domain")


def check_expiry(time: datetime | None, now: datetime, field: str) -> None:
    """Not in the past."""
    if time is not None and time <= now:
        raise invalid(field, "must lie in the future")


def _check_text(text: str, field: str, limit: int) -> None:
    if len(text) > limit:
        raise invalid(field, f"must be at most {limit} characters")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise invalid(field, "must not hold control characters")
