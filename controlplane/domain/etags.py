"""Etags: a resource's version with the beginning of its uid, so that a re-created resource never matches an old etag.

Contract. `format_etag` is what the API shows; `parse_etag` gives back what one UPDATE … WHERE compares, or raises
InvalidArgumentError: with reason ETAG_REQUIRED for none, ETAG_INVALID for one that we never made.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from controlplane.domain.errors import Reason, invalid

_ETAG = re.compile(r'"([0-9a-f]{8})-([1-9][0-9]{0,17})"')


class Etag(NamedTuple):
    """First eight digits of the uid, and the version."""

    uid_prefix: str
    version: int


def format_etag(uid: str, version: int) -> str:
    """Return the quoted etag of a row."""
    return f'"{uid[:8]}-{version}"'


def parse_etag(text: str, field: str = "etag") -> Etag:
    """Return what `text` stands for."""
    if not text:
        raise invalid(field, "is required: read the resource and send back its etag", Reason.ETAG_REQUIRED)
    match = _ETAG.fullmatch(text)
    if match is None:
        raise invalid(field, "is none of ours", Reason.ETAG_INVALID)
    return Etag(match[1], int(match[2]))
